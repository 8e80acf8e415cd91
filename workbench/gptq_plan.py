"""What a quantization will take, before it starts: memory on each device, disk space, and advice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.calibration import CalibrationText, fitted
from workbench.gptq_layers import linear_shape, quantizable_modules
from workbench.hardware import Machine, device_label, format_bytes
from workbench.placement import place
from workbench.precision import GPTQ, FullPrecision, element_bytes
from workbench.skeleton import read_skeleton
from workbench.workload import Workload

if TYPE_CHECKING:
    from workbench.hardware import DeviceId
    from workbench.placement import Placement
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton

_SQUARES = 4  # the Hessian, its reordered copy, its factor and the factor of its inverse
_COPIES = 6  # of a group's weight in float32: as it was, moved, rounded, losses, and two of a block at work


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """What a quantization will take.

    Attributes:
        placement: Where the weights are meanwhile, in full precision, with the calibration batch as its workload.
        targets: Decoder layer to the modules that will be quantized.
        module_count: How many those are.
        works_on: The device that rounds.
        hidden_bytes: The calibration sequences between two layers.
        rounding_bytes: What rounding the largest group of modules takes beside its weights, an estimate.
        output_bytes: Weights of the new folder.
        disk_bytes: Room that is needed at the target while it is written.
        lines: The same in sentences, and advice.
    """

    placement: Placement
    targets: dict[str, tuple[str, ...]]
    module_count: int
    works_on: DeviceId
    hidden_bytes: int
    rounding_bytes: int
    output_bytes: int
    disk_bytes: int
    lines: tuple[str, ...]


def plan_quantization(
    recipe: Recipe,
    *,
    calibration: CalibrationText | None = None,
    batch_size: int = 8,
    machine: Machine | None = None,
) -> QuantizePlan:
    """Work out what a quantization will take, from the config alone.

    Args:
        recipe: As for :func:`workbench.quantize`.
        calibration: As for :func:`workbench.quantize`.
        batch_size: Sequences that go through a layer at a time.
        machine: The machine; None is this one.

    Raises:
        ValueError: If the model cannot be quantized so; the sentence says what to do.
    """
    precision = recipe.precision
    if not isinstance(precision, GPTQ):
        raise ValueError(f"quantize() needs a recipe with precision=GPTQ(...), not {precision.label}.")  # noqa: TRY004 - one kind of error for bad input
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is a whole number of at least 1, not {batch_size!r}.")
    skeleton = read_skeleton(recipe.model)
    title = skeleton.source.title
    if skeleton.quantized_as is not None:
        raise ValueError(f"{title} is already quantized: start from the original model.")
    targets = quantizable_modules(skeleton, precision)
    text = fitted(calibration or CalibrationText(), skeleton.context_length)
    workload = Workload(context_length=text.sequence_length, batch_size=batch_size)
    full = recipe.with_(precision=FullPrecision(), workload=workload)
    placement = place(full, machine=machine or Machine.detect(), skeleton=skeleton)
    gpus = [device for device in placement.device_map.values() if device not in ("cpu", "disk")]
    works_on: DeviceId = gpus[0] if gpus else "cpu"
    hidden = _hidden_bytes(skeleton, text)
    rounding = _rounding_bytes(skeleton, targets)
    output = _output_bytes(skeleton, targets, precision)
    plan = QuantizePlan(
        placement=placement,
        targets=targets,
        module_count=sum(map(len, targets.values())),
        works_on=works_on,
        hidden_bytes=hidden,
        rounding_bytes=rounding,
        output_bytes=output,
        disk_bytes=2 * output,  # the finished layers and the final files are both there for a moment
        lines=tuple(_lines(placement, works_on, hidden, rounding, output)),
    )
    if "disk" in placement.device_map.values():
        raise ValueError(
            f"{title} does not fit in memory as it is, and GPTQ cannot quantize weights on the disk: give the CPU "
            "and the GPUs more, or quantize it on a larger machine."
        )
    return plan


def _lines(placement: Placement, works_on: DeviceId, hidden: int, rounding: int, output: int) -> list[str]:
    label = device_label(works_on)
    lines = [
        (
            f"Rounding works on {label}, with up to {format_bytes(rounding + 2 * hidden)} beside the weights: "
            f"{format_bytes(rounding)} for the largest modules and {format_bytes(2 * hidden)} of calibration states."
        ),
        f"The new folder will hold {format_bytes(output)} of weights, and needs twice that while it is written.",
    ]
    memory = placement.memory.get(works_on)
    if memory is not None and rounding + 2 * hidden > memory.free_bytes:
        lines.append(
            f"{label} has {format_bytes(max(0, memory.free_bytes))} left beside the weights, which may not do: lower "
            f"its budget in max_memory by {format_bytes(rounding + 2 * hidden - memory.free_bytes)} so that more "
            "layers wait on the CPU, or take fewer samples."
            if works_on != "cpu"
            else f"{format_bytes(max(0, memory.free_bytes))} of memory are left beside the weights, which may not do: "
            "take fewer samples, or close other programs."
        )
    return lines


def _hidden_bytes(skeleton: Skeleton, text: CalibrationText) -> int:
    width = int(getattr(skeleton.config.get_text_config(decoder=True), "hidden_size", 0) or 0)
    return text.samples * text.sequence_length * width * element_bytes(skeleton.dtype)


def _rounding_bytes(skeleton: Skeleton, targets: dict[str, tuple[str, ...]]) -> int:
    """For modules with as many inputs in one layer, at worst rounded in one go."""
    module = skeleton.meta_model(FullPrecision()).module
    worst = 0
    for names in targets.values():
        rows_of: dict[int, int] = {}
        for name in names:
            rows, columns = linear_shape(module.get_submodule(name))
            rows_of[columns] = rows_of.get(columns, 0) + rows
        for columns, rows in rows_of.items():
            worst = max(worst, 4 * (_SQUARES * columns * columns + _COPIES * rows * columns))
    return worst


def _output_bytes(skeleton: Skeleton, targets: dict[str, tuple[str, ...]], precision: GPTQ) -> int:
    module = skeleton.meta_model(FullPrecision()).module
    quantized = {f"{name}.weight": name for names in targets.values() for name in names}
    return sum(
        precision.quantized_bytes(linear_shape(module.get_submodule(quantized[name])))
        if name in quantized
        else math.prod(tensor.shape) * tensor.element_size()
        for name, tensor in module.state_dict().items()
        if name not in skeleton.tied
    )
