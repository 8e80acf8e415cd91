"""What a checkpoint that is already quantized says of itself, and what its files hold.

Its config names a method. For those whose modules transformers puts into the tree before it reads weights, and whose
library is here, the tree is built so; for the others the headers of the safetensors files give every tensor's size,
over the Hub by range requests of a few kilobytes. Where a method has no kernel, transformers turns the weights back
into full precision while it loads them, and then that is what is previewed.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.kernels import quietly
from workbench.precision import GPTQ, FourBit, Int8

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.hardware import Machine
    from workbench.model import Source
    from workbench.precision import Precision

_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "fp8": "fp8",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "mxfp4",
    "quanto": "quanto",
    "torchao": "torchao",
}
# The methods whose modules are put into the tree before weights are read, and the packages that this takes.
_BUILT = {
    "awq": ("gptqmodel", "optimum"),
    "bitsandbytes": ("bitsandbytes",),
    "fp8": (),
    "gptq": ("gptqmodel", "optimum"),
}
# What a load takes besides transformers, as far as pip has it.
PACKAGES = {
    "awq": "gptqmodel optimum",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gguf": "gguf",
    "gptq": "gptqmodel optimum",
    "mxfp4": "kernels",
    "torchao": "torchao",
}
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
# GPUs that are older than a method's kernels: compute capability under 8.9 for fp8, under 7.5 for mxfp4.
_BEFORE_TURING = r"\b(P100|P40|P4|V100|K80|M60|M40|TITAN|GTX 10\d\d)\b"
_BEFORE_ADA = _BEFORE_TURING + r"|\b(T4|A100|A30|A40|A16|A10G?|A2|RTX A\d+|RTX [23]0\d\d|GTX 16\d\d)\b"
_BEFORE_AMPERE = _BEFORE_TURING + r"|\b(T4|GTX 16\d\d|RTX 20\d\d|Quadro RTX)\b"


def before_ampere(gpu: str) -> bool:
    """Whether a GPU, by its name, is one that computes no bfloat16."""
    return re.search(_BEFORE_AMPERE, gpu) is not None


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
        skipped = tuple(options.get("llm_int8_skip_modules") or ())
        if method == "bitsandbytes" and options.get("load_in_8bit"):
            return Int8(threshold=options.get("llm_int8_threshold", 6.0), skip_modules=skipped)
        if method == "bitsandbytes":
            return FourBit(
                quant_type=options.get("bnb_4bit_quant_type", "fp4"),
                double_quant=bool(options.get("bnb_4bit_use_double_quant", False)),
                compute_dtype=str(options.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
                quant_storage=str(options.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."),
                skip_modules=skipped,
            )
    except ValueError:  # options that only others know
        return None
    return None


def is_built(options: Mapping[str, Any]) -> bool:
    """Whether the module tree can be built as it will be loaded; else the files' headers have to do."""
    packages = _BUILT.get(method_of(options))
    return packages is not None and all(importlib.util.find_spec(package) for package in packages)


def unpacked_because(options: Mapping[str, Any], machine: Machine) -> str | None:
    """Why transformers turns the weights back into full precision while it loads them on a machine; None if not so."""
    method = method_of(options)
    if method not in ("fp8", "mxfp4", "compressed-tensors"):
        return None
    if options.get("dequantize"):
        return "its config asks for it"
    if method == "compressed-tensors":
        return None
    gpus = [device for device in machine.devices if isinstance(device.id, int)]
    if not gpus:
        return f"{method} runs on GPUs only"
    name = gpus[0].name  # transformers, too, asks the first
    if re.search(_BEFORE_ADA if method == "fp8" else _BEFORE_TURING, name):
        return f"{name} is too old for {method}"
    if method == "mxfp4" and machine.is_here and importlib.util.find_spec("kernels") is None:
        return "mxfp4 needs `pip install kernels`"
    return None


def not_loadable_because(options: Mapping[str, Any]) -> str | None:
    """Why transformers cannot load such a checkpoint on this machine, in its own words; None if it can."""
    return _ask_quantizer(json.dumps(dict(options), sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _ask_quantizer(options: str) -> str | None:
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with quietly():
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(json.loads(options)), pre_quantized=True)
            quantizer.validate_environment(device_map={"": "cpu"})
    except Exception as error:  # noqa: BLE001 - a library for each method, each with errors of its own
        return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
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
    # The same weights may lie beside them in the maker's own form: original/..., consolidated.safetensors.
    files = [f.name for f in source.weight_files if f.name.endswith(".safetensors") and "/" not in f.name]
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    files = [name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)] or files
    if not files:
        raise ValueError(f"{source.title} has no safetensors files whose headers could be read.")
    return tuple(tensor for name in files for tensor in tensors_in(source, name))


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a local safetensors file: for each tensor its ``dtype``, ``shape`` and ``data_offsets`` (bytes).

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(min(size, _LONGEST_HEADER)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error}): fetch the file again.") from None
    header.pop("__metadata__", None)
    return header


def tensors_in(source: Source, name: str) -> list[StoredTensor]:
    """Every tensor in one of a model's safetensors files, from its header alone.

    Raises:
        ValueError: If the file cannot be read.
    """
    if source.is_local:
        return [
            StoredTensor(
                name=key,
                size_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                elements=math.prod(entry["shape"]),
                dtype=entry["dtype"],
            )
            for key, entry in read_header(Path(source.location) / name).items()
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
            elements=math.prod(info.shape),
            dtype=str(info.dtype),
        )
        for key, info in parsed.tensors.items()
    ]


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
