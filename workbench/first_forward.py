"""What becomes of a loaded model's weights at its first forward, where a backend repacks them then.

On CPUs with AVX512-BF16 bitsandbytes rearranges 4-bit weights for a kernel of its own, with scales in bfloat16 (the
others are kept, see four_bit.py); int8 with has_fp16_weight keeps the int8 values beside the weights; gptqmodel's fused
CPU kernels keep copies of scales and zero points; compressed-tensors unpacks everything. So the bytes after the first
token are not those after the load.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.precision import FOUR_BIT_BLOCK, GPTQ, FourBit, Int8, element_bytes
from workbench.sizes import device_of, sizes_of

if TYPE_CHECKING:
    from workbench.hardware import DeviceId
    from workbench.placement import Placement
    from workbench.precision import Precision
    from workbench.skeleton import Skeleton

_ROWS_AT_A_TIME = 32  # as the rearranged weights are laid out


@functools.lru_cache(maxsize=1)
def repacks_4bit() -> bool:
    """Whether bitsandbytes rearranges 4-bit weights on this machine's CPU: it does so with AVX512-BF16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def bytes_once_run(placement: Placement, skeleton: Skeleton) -> dict[DeviceId, int] | None:
    """The weights on each device after the first forward, where ``memory[...].weight_bytes`` is after the load.

    Exact for what runs on this machine's CPU. On a GPU only the biases of 4-bit modules change, which become the type
    that is computed in; what GPTQ's kernels do there is not counted.

    Args:
        placement: Of the model.
        skeleton: The placement's model.

    Returns:
        Device to bytes; None where it cannot be known: 4-bit or GPTQ weights on another machine's CPU.
    """
    found: dict[DeviceId, int] = {device: memory.weight_bytes for device, memory in placement.memory.items()}
    precision = placement.precision
    if skeleton.unpacks_when_run:
        for tensor in sizes_of(skeleton, placement.recipe.precision).tensors:
            device = device_of(tensor.name, placement.device_map)
            # The scales stay beside what has been unpacked.
            if device is not None and tensor.quantized and tensor.before_bytes:
                found[device] += tensor.before_bytes - tensor.after_bytes
        return found
    if skeleton.quant_method == "awq":
        return _awq(placement, skeleton, found)
    if isinstance(precision, GPTQ) and isinstance(placement.recipe.precision, GPTQ):
        precision = replace(precision, backend=placement.recipe.precision.backend)
    if isinstance(precision, Int8) and precision.has_fp16_weight:
        return _int8_beside(placement, skeleton, precision, found)
    if not isinstance(precision, (FourBit, GPTQ)):
        return found
    quantized = {layer.name for layer in placement.layers if layer.quantized}
    runs_on = placement.runs_on
    on_cpu = any(runs_on.get(name) == "cpu" for name in quantized)
    if on_cpu and not placement.machine.is_here:
        return None
    changes = _four_bit_changes(placement, skeleton, precision) if isinstance(precision, FourBit) else {}
    if isinstance(precision, GPTQ) and on_cpu:
        changes = _gptq_changes(placement, skeleton, precision)
    block_of = sizes_of(skeleton, placement.recipe.precision).block_of
    for name, change in changes.items():
        device = device_of(name, placement.device_map)
        # What is fetched from elsewhere each time is fetched as it is.
        if device is not None and block_of.get(name) in quantized and runs_on.get(block_of[name]) == device:
            found[device] += change
    return found


def unrunnable_modules(skeleton: Skeleton, precision: Precision) -> tuple[str, ...]:
    """The modules that a load would bring to this machine's CPU in 4 bits, and that cannot be computed there.

    bitsandbytes rearranges 32 rows at a time and whole blocks of 64 weights, and raises an error where a matrix has
    another shape.

    Returns:
        Their names, for ``skip_modules``; none where nothing is rearranged.
    """
    if not isinstance(precision, FourBit) or not repacks_4bit():
        return ()
    module = skeleton.meta_model(precision).module
    found = []
    for tensor in sizes_of(skeleton, precision).tensors:
        if tensor.quantized and tensor.name.endswith(".weight"):
            name = tensor.name.removesuffix(".weight")
            child = module.get_submodule(name)
            if child.out_features % _ROWS_AT_A_TIME or child.in_features % FOUR_BIT_BLOCK:
                found.append(name)
    return tuple(found)


def _four_bit_changes(placement: Placement, skeleton: Skeleton, precision: FourBit) -> dict[str, int]:
    """Tensor name to how many bytes it gains on the device where it is."""
    sizes = sizes_of(skeleton, placement.recipe.precision)
    module = skeleton.meta_model(placement.recipe.precision).module
    compute = placement.dtype if precision.compute_dtype == "auto" else precision.compute_dtype
    changes = {}
    for tensor in sizes.tensors:
        if not tensor.quantized or not tensor.name.endswith(".weight"):
            continue
        child = module.get_submodule(tensor.name.removesuffix(".weight"))
        on_cpu = device_of(tensor.name, placement.device_map) == "cpu"
        if on_cpu and repacks_4bit():
            # Scales in bfloat16, in the kernel's order; the others are kept (see four_bit.py).
            changes[tensor.name] = 2 * child.out_features * (child.in_features // FOUR_BIT_BLOCK)
        if child.bias is not None:
            bias = f"{tensor.name.removesuffix('weight')}bias"
            changes[bias] = child.bias.numel() * (element_bytes(compute) - child.bias.element_size())
    return changes


def _int8_beside(
    placement: Placement, skeleton: Skeleton, precision: Int8, found: dict[DeviceId, int]
) -> dict[DeviceId, int]:
    """The same for int8 with ``has_fp16_weight``, which keeps what it has multiplied with."""
    sizes = sizes_of(skeleton, placement.recipe.precision)
    for name, child in skeleton.meta_model(placement.recipe.precision).module.named_modules():
        device = device_of(name, placement.device_map)
        if device is None or type(child).__name__ != "Linear8bitLt":
            continue
        if placement.runs_on.get(sizes.block_of[f"{name}.weight"]) == device:
            found[device] += precision.quantized_bytes((child.out_features, child.in_features))
    return found


def _awq(placement: Placement, skeleton: Skeleton, found: dict[DeviceId, int]) -> dict[DeviceId, int] | None:
    """The same for AWQ, on whose packed weights transformers picks the kernel when it builds the tree."""
    runs_on = placement.runs_on
    sizes = sizes_of(skeleton, placement.recipe.precision)
    for name, child in skeleton.meta_model(placement.recipe.precision).module.named_modules():
        device = device_of(name, placement.device_map)
        packed = f"{name}.qweight"
        if not hasattr(child, "qweight") or device is None or runs_on.get(sizes.block_of[packed]) != device:
            continue
        if device == "cpu" and not placement.machine.is_here:
            return None
        if device == "cpu" and type(child).__name__ == "TorchAtenAwqLinear":
            # Zero points in bfloat16 in place of packed ones, and both they and the scales once more side by side.
            found[device] += 6 * child.scales.numel() - child.qzeros.numel() * child.qzeros.element_size()
    return found


def _gptq_changes(placement: Placement, skeleton: Skeleton, precision: GPTQ) -> dict[str, int]:
    """The same for GPTQ: what the kernel keeps besides, under the name of the packed weight."""
    from workbench.gptq_layers import quantized_shapes
    from workbench.kernels import choose_backend

    shapes = quantized_shapes(skeleton)
    backend, _ = choose_backend(
        precision,
        shapes,
        devices=placement.device_map.values(),
        dtype=placement.dtype,
        adapters=bool(placement.recipe.adapters),
    )
    wide = element_bytes(placement.dtype)
    changes = {}
    for name, child in skeleton.meta_model(placement.recipe.precision).module.named_modules():
        rows, columns = getattr(child, "out_features", 0), getattr(child, "in_features", 0)
        if not hasattr(child, "qweight"):
            continue
        groups = 1 if precision.group_size == -1 else -(-columns // precision.group_size)
        cells = groups * rows
        change = 0
        if backend == "gptq_torch" and precision.bits in (2, 4, 8):  # zero points and group index, unpacked
            change = 8 * columns + cells * (2 if precision.bits == 8 else 1)
        elif backend in ("gptq_torch_aten", "gptq_torch_fused"):
            # Scales and zero points in bfloat16 (fused: in the type computed in), both once more side by side, and the
            # order of the inputs.
            each = 2 if backend == "gptq_torch_aten" else min(wide, 2)
            packed = child.qzeros.numel() * child.qzeros.element_size()
            held = child.scales.numel() * child.scales.element_size()
            change = 4 * each * cells - packed - held + 4 * columns
        elif backend == "gptq_torch_int8":
            change = 0 if wide == 4 else wide * rows  # the scales, cast
        changes[f"{name}.qweight"] = change
    return changes
