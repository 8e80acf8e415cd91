"""What a checkpoint that is already quantized says of itself, and what its files hold.

Its config names a method. For those that we know and whose library is here, the module tree is built as it will be
loaded; for the others the headers of the safetensors files give every tensor's size, over the Hub by range requests of
a few kilobytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.precision import GPTQ, FourBit, Int8

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.model import Source
    from workbench.precision import Precision

_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "fp8": "fp8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "mxfp4",
    "quanto": "quanto",
    "torchao": "torchao",
}
# Bytes an element, as safetensors names types; F4 and F6 are packed, and count by what their shapes say.
_ELEMENT_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8.0),
    **dict.fromkeys(("F32", "I32", "U32"), 4.0),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2.0),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1.0),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 0.75),
    "F4": 0.5,
}


def as_dict(options: Any) -> dict[str, Any]:
    """A ``quantization_config`` as a dict, however transformers holds it."""
    return dict(options) if isinstance(options, dict) else dict(options.to_dict())


def method_of(options: Mapping[str, Any]) -> str:
    """The method's name as transformers spells it."""
    method = options.get("quant_method")
    if method is None:  # configs of old: bitsandbytes' needed no name
        method = "bitsandbytes" if options.get("load_in_8bit") or options.get("load_in_4bit") else "gptq"
    return str(getattr(method, "value", method)).lower()


def describe(options: Mapping[str, Any]) -> str:
    """A ``quantization_config`` in a few words: "GPTQ 4-bit, groups of 128"."""
    method = method_of(options)
    stored = stored_precision(options)
    if stored is not None:
        return stored.label if isinstance(stored, GPTQ) else f"bitsandbytes {stored.label}"
    words = [_NAMES.get(method, method)]
    bits = options.get("bits") or options.get("w_bit")
    if isinstance(bits, int):
        words[0] += f" {bits}-bit"
    group = options.get("group_size") or options.get("q_group_size")
    if isinstance(group, int) and group > 0:
        words.append(f"groups of {group}")
    if isinstance(options.get("format"), str):
        words.append(options["format"])
    return ", ".join(words)


def stored_precision(options: Mapping[str, Any]) -> Precision | None:
    """The same as one of our precisions; None for a method that we have none for."""
    method = method_of(options)
    try:
        if method == "gptq":
            return GPTQ.from_config(options)
        if method == "bitsandbytes" and options.get("load_in_8bit"):
            return Int8(threshold=options.get("llm_int8_threshold", 6.0))
        if method == "bitsandbytes":
            return FourBit(
                quant_type=options.get("bnb_4bit_quant_type", "fp4"),
                double_quant=bool(options.get("bnb_4bit_use_double_quant", False)),
            )
    except ValueError:  # options that only others know
        return None
    return None


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint: its name there, its bytes in the file, and the elements that its shape counts."""

    name: str
    size_bytes: int
    elements: int
    dtype: str


def stored_tensors(source: Source) -> tuple[StoredTensor, ...]:
    """Every tensor in a model's safetensors files, from their headers alone.

    Raises:
        ValueError: If a file cannot be read, or there is none.
    """
    files = [f.name for f in source.weight_files if f.name.endswith(".safetensors")]
    if not files:
        raise ValueError(f"{source.title} has no safetensors files whose headers could be read.")
    return tuple(tensor for name in files for tensor in _read_header(source, name))


def _read_header(source: Source, name: str) -> list[StoredTensor]:
    if source.is_local:
        import json

        try:
            with (Path(source.location) / name).open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            raise ValueError(f"{name} of {source.title} is damaged ({error}): fetch the file again.") from None
        header.pop("__metadata__", None)
        return [
            StoredTensor(
                name=key,
                size_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                elements=_product(entry["shape"]),
                dtype=entry["dtype"],
            )
            for key, entry in header.items()
        ]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError

    try:
        parsed = HfApi().parse_safetensors_file_metadata(source.location, name, revision=source.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError, OSError) as error:
        raise ValueError(f"The header of {name} of {source.title} cannot be read: {type(error).__name__}.") from None
    return [
        StoredTensor(
            name=key,
            size_bytes=int(info.data_offsets[1] - info.data_offsets[0]),
            elements=_product(info.shape),
            dtype=str(info.dtype),
        )
        for key, info in parsed.tensors.items()
    ]


def _product(shape: Any) -> int:
    found = 1
    for size in shape:
        found *= int(size)
    return found


_SUFFIXES = re.compile(
    r"\.(weight_packed|weight_scale(_inv)?|weight_zero_point|weight_shape|weight_g_idx|qweight|qzeros|scales|g_idx|"
    r"input_scale|output_scale|activation_scale|absmax|quant_map|nested_absmax|nested_quant_map|"
    r"quant_state\.\w+|weight_format|SCB|W_q|meta|_data|_scale|qdata|scale|zero_point)$"
)


def owner_of(tensor: str) -> str:
    """The module that a stored tensor belongs to: the part of its name before what a method adds."""
    while (shorter := _SUFFIXES.sub("", tensor)) != tensor:
        tensor = shorter
    return tensor.removesuffix(".weight").removesuffix(".bias")
