"""Which parameters are kept as what: what ``dtype="auto"`` is, what is quantized, what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.precision import GPTQ, FourBit, FullPrecision, Int8
from workbench.sizes import sizes_of

if TYPE_CHECKING:
    from workbench.precision import Precision
    from workbench.skeleton import Skeleton


def conversions(skeleton: Skeleton, precision: Precision) -> tuple[str, ...]:
    """What becomes of a model's parameters when it is loaded in a precision.

    Args:
        skeleton: The model.
        precision: The precision.

    Returns:
        Sentences; none for a checkpoint that is quantized already, which stays as it is.

    Raises:
        ValueError: If the precision's library is missing.
    """
    if skeleton.quantized_as is not None:
        return ()
    own, kept = skeleton.dtype, skeleton.meta_model(precision).dtype
    tensors = [t for t in sizes_of(skeleton, precision).tensors if not t.is_buffer]
    quantized = sum(t.quantized for t in tensors)
    numbers = {name: parameter.numel() for name, parameter in skeleton.meta_model(precision).module.named_parameters()}
    narrow = kept != "float32"
    upcast = sum(narrow and not t.quantized and t.after_bytes == 4 * numbers.get(t.name, 0) for t in tensors)
    rest = len(tensors) - quantized - upcast
    stated = getattr(skeleton.config, "dtype", None) is not None
    lines = [f'dtype="auto" is {own} here, as its {"config says" if stated else "weights are"}.']
    if quantized:
        lines.append(f"{_many(quantized, 'weight')} {_become(precision)}.")
    if rest:
        what = "other parameter" if quantized else "parameter"
        one = rest == 1
        change = f"{'is' if one else 'are'} cast from {own} to {kept}"
        if kept == own:
            change = f"{'stays' if one else 'stay'} {own}"
        lines.append(f"{_many(rest, what)} {change}.")
    if upcast:
        lines.append(f"Kept in float32, whatever is asked for: {_many(upcast, 'parameter')}.")
    if isinstance(precision, FourBit):
        compute = own if precision.compute_dtype == "auto" else precision.compute_dtype
        asked = "auto" if precision.compute_dtype == "auto" else "as chosen"
        lines.append(f"4-bit weights are multiplied in {compute} ({asked}).")
    elif isinstance(precision, Int8):
        outliers = "; columns with outliers are multiplied in 16 bits" if precision.threshold else ""
        lines.append(f"Inputs of int8 modules are cast to float16 and rounded to 8 bits{outliers}.")
    return tuple(lines)


def left_alone(skeleton: Skeleton, precision: Precision) -> set[str]:
    """The linear modules that stay unquantized: those that ``skip_modules`` names, or else transformers' own choice."""
    skips = getattr(precision, "skip_modules", ())
    if skips:
        return {name for name in skeleton.linear_modules if any(covers(skip, name) for skip in skips)}
    if isinstance(precision, GPTQ):  # the decoder layers alone, whatever is named
        inside = tuple(f"{block}." for block in skeleton.decoder_blocks)
        return {name for name in skeleton.linear_modules if not name.startswith(inside)}
    return set(skeleton.default_skips)


def covers(skip: str, name: str) -> bool:
    """Whether an entry of ``skip_modules`` means a module, as transformers reads it."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, [skip])


def _become(precision: Precision) -> str:
    if isinstance(precision, Int8):
        return "become int8, with a float32 scale for each row"
    if isinstance(precision, FourBit):
        scale = "an 8-bit" if precision.double_quant else "a float32"
        return f"become {precision.quant_type}, two to a byte ({precision.quant_storage}), with {scale} scale for 64"
    if isinstance(precision, (GPTQ, FullPrecision)):
        return f"become {precision.label}"
    return f"become {precision.label}, whatever their own type"


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
