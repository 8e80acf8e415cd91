"""Take back what bitsandbytes does to 4-bit weights on CPUs with AVX512-BF16, to the bit.

There it rearranges a weight for a kernel of its own when it first runs, rounds the scales to bfloat16, and drops
scales that were quantized. Its way back (0.50) leaves the rounded scales in the kernel's order: a checkpoint that is
saved after the first token holds other weights, and nothing says so. And no gradient goes through rearranged weights.
So the scales are kept, for a quarter to half a bit a weight, and put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARTS = ("absmax", "state2", "offset", "nested")


def keep_scales() -> None:
    """Make bitsandbytes keep the scales of what it rearranges from now on, for all models of this process."""
    from bitsandbytes.nn import modules

    pack, unpack = modules._convert_weight_packed_for_cpu, modules._convert_weight_packed_for_cpu_inverse  # noqa: SLF001 - there is no public way
    if hasattr(pack, "__wrapped__"):
        return

    def keeping(weight: Any, state: Any, *block: int) -> tuple[Any, Any]:
        kept = {name: getattr(state, name, None) for name in _PARTS}
        weight, state = pack(weight, state, *block)
        state.kept_scales = kept
        return weight, state

    def restoring(weight: Any, state: Any, *block: int) -> tuple[Any, Any]:
        kept = vars(state).pop("kept_scales", None)
        if kept is not None:
            state.original_nested = False  # else it would quantize the rounded scales anew
        weight, state = unpack(weight, state, *block)
        for name, value in (kept or {}).items():
            setattr(state, name, value)
        return weight, state

    keeping.__wrapped__, restoring.__wrapped__ = pack, unpack  # type: ignore[attr-defined]
    modules._convert_weight_packed_for_cpu = keeping  # noqa: SLF001 - likewise
    modules._convert_weight_packed_for_cpu_inverse = restoring  # noqa: SLF001 - likewise


def unpack(model: Any) -> None:
    """Put a model's 4-bit weights back as a checkpoint holds them; they are rearranged again when they run.

    Args:
        model: A loaded model, with or without 4-bit weights.
    """
    linear = (m for m in model.modules() if type(m).__module__.startswith("bitsandbytes."))  # PEFT's are around them
    packed = [m for m in linear if getattr(_state(m), "packing_format_for_cpu", False)]
    if not packed:
        return
    from bitsandbytes.nn import modules

    for module in packed:
        weight = module.weight
        weight.data, weight.quant_state = modules._convert_weight_packed_for_cpu_inverse(weight.data, _state(module))  # noqa: SLF001 - see above
        module.quant_state = weight.quant_state


def kept_tensors(state: Any) -> Iterator[Any]:
    """The tensors that are kept beside a rearranged weight.

    Args:
        state: Its ``quant_state``.
    """
    kept = getattr(state, "kept_scales", None)
    if kept is not None:
        yield from (kept["absmax"], kept["offset"])
        if kept["state2"] is not None:
            yield from (kept["state2"].absmax, kept["state2"].code)


def _state(module: Any) -> Any:
    return getattr(getattr(module, "weight", None), "quant_state", None)
