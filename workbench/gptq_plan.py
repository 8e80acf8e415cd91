"""What a quantization will take, before it starts: memory on each device, disk space, and advice."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from workbench.calibration import EVALUATION_LENGTH, CalibrationText, fitted
from workbench.gptq_layers import linear_shape, quantizable_modules
from workbench.hardware import Machine, device_label, format_bytes
from workbench.placement import place
from workbench.precision import GPTQ, FullPrecision, element_bytes
from workbench.skeleton import read_skeleton
from workbench.verdict import Advice
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.hardware import DeviceId
    from workbench.placement import Placement
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton

_SQUARES = 4  # the Hessian, its reordered copy, its factor and the factor of its inverse
_COPIES = 6  # of a group's weight in float32: as it was, moved, rounded, losses, and two of a block at work
_LOSS_BYTES = 10  # for each logit: as it comes, in float32, and the logarithm of its softmax
_MOST_KEPT_BYTES = 1 << 30  # beyond it, outputs of finished modules are computed again
_TRIES = 4  # budgets that are lowered until there is room; each time more layers are fetched


@dataclass(frozen=True, kw_only=True)
class QuantizeMemory:
    """What one device holds while a model is quantized, in bytes.

    Attributes:
        weight_bytes: Weights in full precision that are kept there.
        work_bytes: An estimate of what comes on top at the worst moment: calibration sequences between two layers,
            outputs that are kept, a layer that was fetched, and a forward pass or the rounding of the largest modules;
            on the CPU at least what comes from GPUs to be saved. The packed layers wait in files.
        capacity_bytes: What the device has to give.
    """

    weight_bytes: int
    work_bytes: int
    capacity_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is left; negative if it is exceeded."""
        return self.capacity_bytes - self.weight_bytes - self.work_bytes


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """What a quantization will take.

    Attributes:
        placement: Where the weights are meanwhile, in full precision. Without ``max_memory`` in the recipe the GPUs'
            budgets are lowered until there is room for the work.
        memory: For each device of the budget what it holds.
        verdict: ``"fits"``, ``"offloads"`` (some layers wait on the CPU and are fetched for their turn), or
            ``"does_not_fit"``.
        summary: The verdict in a sentence.
        advice: What to do about it, sentences with numbers that can be applied.
        targets: Decoder layer to the modules that will be quantized.
        module_count: How many those are.
        hidden_bytes: The calibration sequences between two layers.
        kept_bytes: Room for outputs of finished modules; what it does not hold is computed again.
        output_bytes: Weights of the new folder.
        disk_bytes: Room that is needed at the target while it is written.
        lines: All of it in sentences.
    """

    placement: Placement
    memory: dict[DeviceId, QuantizeMemory]
    verdict: Literal["fits", "offloads", "does_not_fit"]
    summary: str
    advice: tuple[Advice, ...]
    targets: dict[str, tuple[str, ...]]
    module_count: int
    hidden_bytes: int
    kept_bytes: int
    output_bytes: int
    disk_bytes: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        """The sentences, one a line."""
        return "\n".join(self.lines)


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
        machine: The machine, which need not be here; None is this one.

    Returns:
        The plan; one that does not fit is a verdict, not an error.

    Raises:
        ValueError: If the model cannot be quantized so on any machine; the sentence says what to do.
    """
    precision = recipe.precision
    if not isinstance(precision, GPTQ):
        raise ValueError(f"quantize() needs a recipe with precision=GPTQ(...), not {precision.label}.")  # noqa: TRY004 - one kind of error for bad input
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is a whole number of at least 1, not {batch_size!r}.")
    if recipe.adapters:
        raise ValueError(
            "Adapters are not quantized with their model: merge them into it, save that with session.save(folder) and "
            "quantize that folder, or leave them out with recipe.with_(adapters=())."
        )
    skeleton = read_skeleton(recipe.model)
    if skeleton.quantized_as is not None:
        raise ValueError(f"{skeleton.source.title} is already quantized: start from the original model.")
    text = fitted(calibration or CalibrationText(), skeleton.context_length)
    work = _Work(
        skeleton=skeleton,
        precision=precision,
        targets=quantizable_modules(skeleton, precision),
        text=text,
        batch_size=batch_size,
    )
    # One sequence: no cache is kept while quantizing, so only the activations are for a whole batch.
    full = recipe.with_(precision=FullPrecision(), workload=Workload(context_length=text.sequence_length))
    machine = machine or Machine.detect()
    own = recipe.max_memory is not None or recipe.strategy == "custom"
    taken = _attempt(full, machine, work, own=own)
    verdict, summary = _judge(taken)
    advice = () if taken.fits else _advise(full, machine, work, own=own)
    output = work.plain_bytes + work.packed_bytes
    return QuantizePlan(
        placement=taken.placement,
        memory=taken.memory,
        verdict=verdict,
        summary=summary,
        advice=advice,
        targets=work.targets,
        module_count=sum(map(len, work.targets.values())),
        hidden_bytes=work.hidden_bytes,
        kept_bytes=taken.kept_bytes,
        output_bytes=output,
        disk_bytes=2 * output,  # the finished layers and the final files are both there for a moment
        lines=(
            summary,
            *(_line(device, memory) for device, memory in taken.memory.items() if memory.weight_bytes),
            f"The new folder will hold {format_bytes(output)} of weights, and needs twice that while it is written.",
            *advice,
        ),
    )


# --- what it takes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What there is to do, whatever the machine."""

    skeleton: Skeleton
    precision: GPTQ
    targets: dict[str, tuple[str, ...]]
    text: CalibrationText
    batch_size: int

    @property
    def hidden_bytes(self) -> int:
        width = int(getattr(self.skeleton.config.get_text_config(decoder=True), "hidden_size", 0) or 0)
        return self.text.samples * self.text.sequence_length * width * element_bytes(self.skeleton.dtype)

    @property
    def plain_bytes(self) -> int:
        """The tensors that stay as they are, each once."""
        module = self.skeleton.meta_model(FullPrecision()).module
        quantized = {f"{name}.weight" for names in self.targets.values() for name in names}
        return sum(
            math.prod(tensor.shape) * tensor.element_size()
            for name, tensor in module.state_dict().items()
            if name not in self.skeleton.tied and name not in quantized
        )

    @property
    def packed_bytes(self) -> int:
        """The modules that are quantized, as they will be."""
        module = self.skeleton.meta_model(FullPrecision()).module
        names = (name for names in self.targets.values() for name in names)
        return sum(self.precision.quantized_bytes(linear_shape(module.get_submodule(name))) for name in names)

    @property
    def most_kept_bytes(self) -> int:
        """What its modules, and two norms, give for all sequences, in the layer that gives most."""
        module = self.skeleton.meta_model(FullPrecision()).module
        rows = max(sum(linear_shape(module.get_submodule(n))[0] for n in names) for names in self.targets.values())
        tokens = self.text.samples * self.text.sequence_length
        return tokens * rows * element_bytes(self.skeleton.dtype) + 2 * self.hidden_bytes

    def layer_bytes(self, layer: str) -> tuple[int, int]:
        """For one decoder layer: the Hessians that are gathered at a time, and what rounding takes at worst."""
        module = self.skeleton.meta_model(FullPrecision()).module
        shapes = {name: linear_shape(module.get_submodule(name)) for name in self.targets[layer]}
        kind = {name: re.sub(r"\d+", "*", name.removeprefix(layer)) for name in shapes}
        count = Counter(kind.values())  # experts are alike, are gathered together and rounded one by one
        squares = {name: 4 * columns * columns for name, (_, columns) in shapes.items()}
        if self.precision.true_sequential:
            gathered = max((count[kind[name]] * square for name, square in squares.items()), default=0)
        else:
            gathered = sum(squares.values())
        # At worst all modules with as many inputs have one input, and are rounded in one go.
        rows_of: dict[int, int] = {}
        for name, (rows, columns) in shapes.items():
            rows_of[columns] = rows_of.get(columns, 0) + math.ceil(rows / count[kind[name]])
        rounding = (4 * c * ((_SQUARES - 1) * c + _COPIES * rows) for c, rows in rows_of.items())
        return gathered, max(rounding, default=0)

    def on(self, placement: Placement) -> dict[DeviceId, QuantizeMemory]:
        """What each device holds, without outputs that are kept."""
        runs_on = placement.runs_on
        vocabulary = int(self.skeleton.config.get_text_config(decoder=True).vocab_size)
        found = {}
        for device, memory in placement.memory.items():
            layers = [layer for layer in self.targets if runs_on.get(layer) == device]
            work = 0
            if layers:
                gathered, rounding = (max(sizes) for sizes in zip(*map(self.layer_bytes, layers), strict=True))
                passing = self.batch_size * (memory.activation_bytes or 0)
                work = 2 * self.hidden_bytes + gathered + max(passing, rounding)
            if runs_on.get(placement.layers[-1].name) == device:
                work = max(work, EVALUATION_LENGTH * vocabulary * _LOSS_BYTES)
            work += memory.reserved_bytes
            if device == "cpu" and any(runs != "cpu" for runs in runs_on.values()):
                work = max(work, self.plain_bytes)
            found[device] = QuantizeMemory(
                weight_bytes=memory.weight_bytes, work_bytes=work, capacity_bytes=memory.capacity_bytes
            )
        return found


# --- where ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A placement with what quantizing there takes."""

    placement: Placement
    memory: dict[DeviceId, QuantizeMemory]
    kept_bytes: int

    @property
    def homeless(self) -> bool:
        """Whether weights are on the disk, where GPTQ cannot change them, or nowhere."""
        return bool(self.placement.unplaced) or "disk" in self.placement.device_map.values()

    @property
    def fits(self) -> bool:
        return not self.homeless and not self.short

    @property
    def short(self) -> dict[DeviceId, int]:
        """What each device lacks."""
        return {d: -m.free_bytes for d, m in self.memory.items() if d != "disk" and m.free_bytes < 0}


def _attempt(full: Recipe, machine: Machine, work: _Work, *, own: bool) -> _Attempt:
    """Place the model, with budgets of somebody's own as they are, else with room for the work on the GPUs.

    The CPU gets what is free there, as AutoGPTQ's best practice has it: layers wait there for their turn.
    """
    attempt = _placed(full, machine, work)
    if own or attempt.fits:
        return attempt
    full = full.with_(strategy="auto", device_map=None)
    budgets: dict[DeviceId, int] = {d: m.limit_bytes for d, m in attempt.placement.memory.items() if d != "disk"}
    budgets.setdefault("cpu", machine.device("cpu").budget_bytes)
    for _ in range(_TRIES):
        for device, lack in attempt.short.items():
            if device != "cpu":
                budgets[device] = max(0, min(budgets[device], attempt.memory[device].weight_bytes) - lack)
        attempt = _placed(full.with_(max_memory=budgets), machine, work)
        if attempt.homeless or not set(attempt.short) - {"cpu"}:
            break
    return attempt


def _placed(full: Recipe, machine: Machine, work: _Work) -> _Attempt:
    placement = place(full, machine=machine, skeleton=work.skeleton, advice=False)
    memory = work.on(placement)
    working = {runs for name, runs in placement.runs_on.items() if name in work.targets}
    spare = min((memory[device].free_bytes for device in working), default=0)
    kept = max(0, min(_MOST_KEPT_BYTES, work.most_kept_bytes, spare))
    memory = {
        device: replace(each, work_bytes=each.work_bytes + kept) if device in working else each
        for device, each in memory.items()
    }
    return _Attempt(placement=placement, memory=memory, kept_bytes=kept)


def _judge(attempt: _Attempt) -> tuple[Literal["fits", "offloads", "does_not_fit"], str]:
    placement = attempt.placement
    if attempt.homeless:
        return "does_not_fit", (
            f"Does not fit: all {format_bytes(placement.total_bytes)} of weights have to be in memory while GPTQ "
            "changes them, and there is no room for that."
        )
    for device, lack in attempt.short.items():
        memory = attempt.memory[device]
        return "does_not_fit", (
            f"Does not fit: quantizing takes {format_bytes(memory.work_bytes)} beside the weights on "
            f"{device_label(device)}, which lacks {format_bytes(lack)}."
        )
    waiting = len(placement.waiting)
    works = ", ".join(device_label(d) for d in dict.fromkeys(placement.runs_on.values()))
    if waiting:
        return "offloads", f"Fits: {works} works, and {waiting} of {len(placement.layers)} layers wait on the CPU."
    return "fits", f"Fits: all of it is on {works}."


def _advise(full: Recipe, machine: Machine, work: _Work, *, own: bool) -> tuple[Advice, ...]:
    """What to do about what does not fit; what is advised with numbers works."""
    advice = []
    for roomy in _other_budgets(full, machine, work) if own else ():
        if not roomy.fits:
            continue
        budgets = {d: m.limit_bytes for d, m in roomy.placement.memory.items()}
        said = ", ".join(f"{device_label(d)} {format_bytes(size)}" for d, size in budgets.items())
        waiting = len(roomy.placement.waiting)
        advice.append(
            Advice(
                f"Set the budgets to {said}: then there is room for the work"
                + (f", and {waiting} layers wait on the CPU." if waiting else "."),
                max_memory=budgets,
                strategy="auto",
            )
        )
        break
    samples = work.text.samples
    for fewer in (samples // 2, samples // 4):
        less = replace(work, text=replace(work.text, samples=max(1, fewer)))
        if fewer and _attempt(full, machine, less, own=own).fits:
            advice.append(Advice(f"Calibrate with {fewer} samples in place of {samples}: then there is room."))
            break
    if not advice:
        advice.append(
            Advice("Close other programs, give the CPU and the GPUs more, or quantize it on a larger machine.")
        )
    return tuple(advice)


def _other_budgets(full: Recipe, machine: Machine, work: _Work) -> Iterator[_Attempt]:
    """The GPUs' own budgets at most, with all of the CPU; and whatever the machine has."""
    cpu = machine.device("cpu").budget_bytes
    own = {device: size for device, size in (full.max_memory or {}).items() if device not in ("cpu", "disk")}
    for budgets in ({**own, "cpu": cpu}, None):
        yield _attempt(full.with_(max_memory=budgets, strategy="auto", device_map=None), machine, work, own=False)


def _line(device: DeviceId, memory: QuantizeMemory) -> str:
    return (
        f"{device_label(device)}: {format_bytes(memory.weight_bytes)} of weights and up to "
        f"{format_bytes(memory.work_bytes)} for the work, of {format_bytes(memory.capacity_bytes)}."
    )
