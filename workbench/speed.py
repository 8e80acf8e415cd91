"""How fast a placement loads and decodes: an estimate from bandwidths, better once they have been measured.

A token takes a fixed time for each module that is called, and the time to read each weight once from where it is kept.
Small matrices are read more slowly than large ones. Weights on disk that the budget lets stay in memory once they are
read cost nothing more; the others are brought in anew for each token. A load maps what it can; it takes time for what
has to be read, converted, quantized or copied.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import time
import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.model import ModelRef, cache_folder, refuses_unknown
from workbench.offload import streamed_share
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.quantize_4bit import fast_quantization
from workbench.sizes import sizes_of
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from workbench.placement import Placement
    from workbench.precision import Precision
    from workbench.skeleton import Skeleton

# For hypothetical machines; no GPU was ever measured by us.
PCIE_BYTES_PER_S = 12e9  # pageable copies over PCIe 4 x16, as accelerate makes them
_GPU_MODULE_SECONDS = 15e-6  # launching a module's kernels from Python
_EFFICIENCY = 0.7  # of a data sheet's bandwidth that a matrix-vector product commonly reaches
GPU_BYTES_PER_S, CPU_BYTES_PER_S, DISK_BYTES_PER_S = 500e9, 20e9, 1e9  # where a machine does not say
_MIB = 2**20
# Mapping a file's pages and letting them go again, where the budget keeps them from staying: measured with the demo
# model (benchmarks/speed.py). A file that has just been written is quicker, so it is not measured with one.
_STREAMED_BYTES_PER_S = 2.5e9
_FROM_DISK_SECONDS = 0.05  # for a load to find what waits in the files; measured likewise


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What this machine's CPU was measured to do.

    Attributes:
        token_seconds: What ``generate`` takes for itself around each decode step.
        module_seconds: For each leaf module that is called in a decode step.
        quantized_seconds: The same for each quantized one, by method, on top.
        small_bytes_per_s: Reading matrices of about 1 MiB; by dtype or method.
        large_bytes_per_s: Reading matrices of 32 MiB and more; by dtype or method.
        load_seconds: What a load takes for itself.
        load_tensor_seconds: For each tensor that is loaded.
        convert_bytes_per_s: Writing weights in another dtype than the checkpoint's.
        quantize_weights_per_s: By method.
        flops_per_s: Multiplying a prompt's tokens with a matrix, by dtype.
    """

    token_seconds: float
    module_seconds: float
    small_bytes_per_s: dict[str, float]
    large_bytes_per_s: dict[str, float]
    load_seconds: float
    load_tensor_seconds: float
    convert_bytes_per_s: float
    quantized_seconds: dict[str, float]
    quantize_weights_per_s: dict[str, float]
    flops_per_s: dict[str, float] = field(default_factory=dict)

    @property
    def makes_sense(self) -> bool:
        """Whether no time is negative and every rate is one: a file may be of another version, or damaged."""
        for name, value in asdict(self).items():
            numbers = value.values() if isinstance(value, dict) else (value,)
            if any(n < 0 or (n == 0 and name.endswith("_per_s")) for n in numbers):
                return False
        return True

    def read_seconds(self, size_bytes: int, kind: str) -> float:
        """Seconds to multiply by one matrix of so many bytes, in a dtype or quantized with a method."""
        dtype = kind if kind in self.large_bytes_per_s else "bfloat16"
        share = min(1.0, max(0.0, math.log2(max(size_bytes, 1) / _MIB) / 5))
        small, large = self.small_bytes_per_s[dtype], self.large_bytes_per_s[dtype]
        return float(size_bytes / (small ** (1 - share) * large**share))


# Of the two-core machine on which Workbench is made: a stand-in until a machine has been measured itself.
_TYPICAL = Calibration(
    token_seconds=1e-3,
    module_seconds=35e-6,
    small_bytes_per_s={"bfloat16": 11e9, "float32": 11e9},
    large_bytes_per_s={"bfloat16": 20e9, "float32": 23e9},
    load_seconds=0.03,
    load_tensor_seconds=0.2e-3,
    convert_bytes_per_s=2e9,
    quantized_seconds={"int8": 100e-6, "4bit": 20e-6},
    quantize_weights_per_s={"int8": 150e6, "4bit": 250e6},
    flops_per_s={"bfloat16": 300e9, "float32": 80e9},
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An estimate of the decoding speed.

    Attributes:
        tokens_per_second: For one sequence at a short context.
        calibrated: Whether it rests on measurements of this machine; else on data sheets or a typical machine.
        prefill_tokens_per_second: Of a long prompt; None where nothing is known of it (GPUs).
    """

    tokens_per_second: float
    calibrated: bool
    prefill_tokens_per_second: float | None = None

    def first_token_seconds(self, prompt_tokens: int) -> float | None:
        """How long the first token after a prompt takes; None where nothing is known of it."""
        if self.prefill_tokens_per_second is None:
            return None
        return 1 / self.tokens_per_second + prompt_tokens / self.prefill_tokens_per_second


def predict_speed(placement: Placement, skeleton: Skeleton) -> Speed | None:
    """Estimate how fast a placement decodes one sequence at a short context.

    Args:
        placement: Where everything is; of this machine or of a hypothetical one.
        skeleton: Its model.

    Returns:
        The estimate; None where something has no room, and for methods of which we know no timing: int8 on a GPU,
        GPTQ on a CPU.
    """
    skeleton = skeleton.on(placement.machine)
    precision = placement.precision
    gpus = [d for d in placement.device_map.values() if d not in ("cpu", "disk")]
    unknown = isinstance(precision, Int8) if gpus else not isinstance(precision, (FullPrecision, Int8, FourBit))
    if placement.unplaced or unknown or (not gpus and skeleton.is_packed_otherwise):
        return None
    known = known_calibration() if placement.machine.is_here else None
    cpu = known or _TYPICAL
    profile = _profile_of(skeleton, placement.recipe.precision)
    disk = _disk_bytes_per_s(placement)
    streamed = 1.0 if gpus or "disk" not in placement.device_map.values() else streamed_share(placement)
    runs_on = placement.runs_on
    seconds = cpu.token_seconds
    for layer in placement.layers:
        part = profile[layer.name]
        fetched = sum(tensor.size_bytes for tensor in part.tensors)  # the whole, whatever part of it is read then
        if gpus:
            bandwidth = placement.machine.device(runs_on[layer.name]).bandwidth_bytes_per_s
            if bandwidth is None:
                return None
            reads = sum(tensor.size_bytes * tensor.share for tensor in part.tensors)
            seconds += part.modules * _GPU_MODULE_SECONDS + reads / (bandwidth * _EFFICIENCY)
            seconds += fetched / PCIE_BYTES_PER_S if layer.device in ("cpu", "disk") else 0
        else:
            seconds += part.modules * cpu.module_seconds
            for tensor in part.tensors:
                kind = precision.method if tensor.quantized else placement.dtype
                seconds += cpu.read_seconds(int(tensor.size_bytes * tensor.share), kind)
                seconds += cpu.quantized_seconds[kind] if tensor.quantized else 0
        if layer.device == "disk":
            seconds += fetched * streamed / (_STREAMED_BYTES_PER_S if disk is None else disk)
    prefill = None
    if not gpus:
        flops = cpu.flops_per_s or _TYPICAL.flops_per_s
        weights = sum(tensor.weights * tensor.share for part in profile.values() for tensor in part.tensors)
        prefill = flops.get(placement.dtype, flops["float32"]) / (2 * weights)
    return Speed(tokens_per_second=1 / seconds, calibrated=known is not None, prefill_tokens_per_second=prefill)


def predict_load_seconds(placement: Placement, skeleton: Skeleton) -> float | None:
    """Estimate how long a load takes, with the files on this machine already.

    Args:
        placement: Where everything is; of this machine or of a hypothetical one.
        skeleton: Its model.

    Returns:
        Seconds; None where something has no room or nothing is known of the method. A disk whose speed is not known
        counts as one whose files are in memory already.
    """
    skeleton = skeleton.on(placement.machine)
    precision = placement.precision
    known = isinstance(precision, (FullPrecision, Int8, FourBit)) and not skeleton.is_packed_otherwise
    if placement.unplaced or not known:
        return None
    here = placement.machine.is_here
    cpu = (known_calibration() if here else None) or _TYPICAL
    profile = _profile_of(skeleton, placement.recipe.precision)
    disk = _disk_bytes_per_s(placement)
    packed = skeleton.quantized_as is not None and skeleton.unpacked_because is None  # and is read as it stays
    seconds = cpu.load_seconds + (_FROM_DISK_SECONDS if "disk" in placement.device_map.values() else 0)
    for layer in placement.layers:
        part = profile[layer.name]
        read_bytes = layer.bytes_after if packed else layer.bytes_before
        seconds += len(part.tensors) * cpu.load_tensor_seconds
        if layer.device == "disk":  # it is only noted where it lies
            continue
        on_gpu = layer.device != "cpu"
        converted = placement.dtype != skeleton.dtype
        quantized = not packed and any(tensor.quantized for tensor in part.tensors)
        # What a CPU keeps as it is in the file is mapped, and read when it is first used.
        if disk is not None and (on_gpu or converted or quantized):
            seconds += read_bytes / disk
        if on_gpu:
            seconds += read_bytes / PCIE_BYTES_PER_S
            continue
        for tensor in part.tensors:
            if quantized and tensor.quantized:
                seconds += tensor.weights / cpu.quantize_weights_per_s[precision.method]
            elif converted:
                seconds += tensor.size_bytes / cpu.convert_bytes_per_s
    return seconds


def _disk_bytes_per_s(placement: Placement) -> float | None:
    """What the machine says of its disk, if it has one and it is known."""
    return next((d.bandwidth_bytes_per_s for d in placement.machine.devices if d.id == "disk"), None)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A parameter: its bytes after the load, how many weights it has, and the share of it that a token reads."""

    size_bytes: int
    weights: int
    share: float
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class _Profile:
    """A block: the leaf modules that are called, and its parameters."""

    modules: int
    tensors: tuple[_Tensor, ...]


_profiles: weakref.WeakKeyDictionary[Skeleton, dict[Precision, dict[str, _Profile]]] = weakref.WeakKeyDictionary()


def _profile_of(skeleton: Skeleton, precision: Precision) -> dict[str, _Profile]:
    known = _profiles.setdefault(skeleton, {})
    if precision not in known:
        known[precision] = _profile(skeleton, precision)
    return known[precision]


def _profile(skeleton: Skeleton, precision: Precision) -> dict[str, _Profile]:
    sizes = sizes_of(skeleton, precision)
    module = skeleton.plain_model().module
    config = skeleton.config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    used_whole = set(skeleton.tied.values())  # a head that is tied to the embedding reads all of it
    parameters = dict(module.named_parameters())
    modules = dict(module.named_modules())

    def share(name: str) -> float:
        plain = parameters.get(name)
        fused = plain is not None and plain.dim() == 3 and plain.shape[0] == experts
        if experts and (fused or re.search(r"\.experts\.\d+\.", name)):
            return float(min(1.0, chosen / experts))
        # One row of a table is looked up.
        owner = type(modules.get(name.rpartition(".")[0])).__name__
        return 0.0 if owner.endswith("Embedding") and name not in used_whole else 1.0

    grouped: dict[str, list[_Tensor]] = {block.name: [] for block in skeleton.blocks}
    for tensor in sizes.tensors:
        if tensor.is_buffer and not tensor.quantized:
            continue
        plain = parameters.get(tensor.name)
        grouped[sizes.block_of[tensor.name]].append(
            _Tensor(
                size_bytes=tensor.after_bytes,
                weights=tensor.before_bytes if plain is None else plain.numel(),
                share=share(tensor.name),
                quantized=tensor.quantized,
            )
        )
    return {
        name: _Profile(
            modules=sum(1 for m in modules[name].modules() if next(m.children(), None) is None), tensors=tuple(tensors)
        )
        for name, tensors in grouped.items()
    }


# --- measuring a machine ----------------------------------------------------------------------------------------------


def _calibration_file() -> Path:
    import torch

    return cache_folder() / f"calibration-torch-{torch.__version__}-{os.cpu_count()}-cores.json"


def known_calibration() -> Calibration | None:
    """What :func:`calibrate` has measured on this machine, or None."""
    file = _calibration_file()
    try:
        return _read_calibration(file, file.stat().st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=4)
def _read_calibration(file: Path, changed_ns: int) -> Calibration | None:  # noqa: ARG001 - a changed file is another one
    """Every move of a slider asks for it, so it is read only when it has changed."""
    try:
        found = Calibration(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.makes_sense else None


def calibrate() -> Calibration:
    """Measure this machine's CPU and keep the result for later estimates. Takes some ten seconds.

    Decodes with tiny models made on the spot; run it while nothing else is busy.

    Returns:
        What was measured.
    """
    from workbench.session import in_worker

    found = in_worker(_measure)
    file = _calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(found)), encoding="utf-8")
    partial.replace(file)
    return found


def _measure() -> Calibration:
    import torch

    narrow = {layers: _Tiny(layers=layers, hidden=64) for layers in (8, 24)}
    wide = _Tiny(layers=8, hidden=512)
    with torch.no_grad():
        fast, slow = narrow[8].step_seconds(), narrow[24].step_seconds()
        module_seconds = max(0.0, slow - fast) / (narrow[24].leaves - narrow[8].leaves)
        small, large = {}, {}
        for dtype in ("bfloat16", "float32"):
            extra = wide.step_seconds(dtype) - narrow[8].step_seconds(dtype)
            large[dtype] = _large_bytes_per_s(getattr(torch, dtype))
            small[dtype] = _rate(wide.size_bytes(dtype) - narrow[8].size_bytes(dtype), extra)
        token_seconds = max(0.0, narrow[8].generate_seconds() - fast)
        loads = {n: tiny.load_seconds["bfloat16"] for n, tiny in narrow.items()}
        load_tensor_seconds = max(0.0, (loads[24] - loads[8]) / (narrow[24].tensors - narrow[8].tensors))
        converting = wide.load_seconds["float32"] - wide.load_seconds["bfloat16"]
        quantized = {method: _quantized(precision) for method, precision in _bitsandbytes().items()}
    return Calibration(
        token_seconds=token_seconds,
        module_seconds=module_seconds,
        small_bytes_per_s=small | {method: found.small_bytes_per_s for method, found in quantized.items()},
        large_bytes_per_s=large | {method: found.large_bytes_per_s for method, found in quantized.items()},
        load_seconds=max(0.0, loads[8] - narrow[8].tensors * load_tensor_seconds),
        load_tensor_seconds=load_tensor_seconds,
        convert_bytes_per_s=_rate(wide.size_bytes("float32"), converting),
        quantized_seconds=_TYPICAL.quantized_seconds | {m: found.call_seconds for m, found in quantized.items()},
        quantize_weights_per_s=_TYPICAL.quantize_weights_per_s | {m: f.weights_per_s for m, f in quantized.items()},
        flops_per_s={dtype: _flops_per_s(getattr(torch, dtype)) for dtype in ("bfloat16", "float32")},
    )


def _flops_per_s(dtype: Any) -> float:
    """Multiply 256 tokens by a matrix as large as those of a small model."""
    import torch

    rows, columns, tokens = 1536, 1536, 256
    x, weight = torch.ones((tokens, columns), dtype=dtype), torch.ones((rows, columns), dtype=dtype)
    torch.nn.functional.linear(x, weight)
    seconds = _quick([_timed(lambda: torch.nn.functional.linear(x, weight)) for _ in range(12)])
    return 2.0 * rows * columns * tokens / seconds


def _bitsandbytes() -> dict[str, Int8 | FourBit]:
    """The methods to measure; none without their library."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    return {precision.method: precision for precision in (Int8(), FourBit())}


@dataclass(frozen=True, kw_only=True)
class _Quantized:
    call_seconds: float
    small_bytes_per_s: float
    large_bytes_per_s: float
    weights_per_s: float


def _quantized(precision: Int8 | FourBit) -> _Quantized:
    """Time one layer of bitsandbytes in three sizes."""
    import bitsandbytes
    import torch

    def layer(out: int, into: int) -> Any:
        if isinstance(precision, Int8):
            made = bitsandbytes.nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            made = bitsandbytes.nn.Linear4bit(into, out, bias=False, compute_dtype=torch.bfloat16)
        return made.to(torch.bfloat16)

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    calls, sizes = [], []
    weights_per_s = 0.0
    for out, into in ((64, 64), (1024, 1024), (8192, 4096)):
        made, x = layer(out, into), torch.ones((1, into), dtype=torch.bfloat16)
        with fast_quantization():
            weights_per_s = out * into / _timed(lambda made=made: made.to("cpu"))  # of the last, the largest
        made(x)
        calls.append(_quick([_timed(lambda made=made, x=x: made(x)) for _ in range(12)]))
        sizes.append(precision.quantized_bytes((out, into)))
    return _Quantized(
        call_seconds=calls[0],
        small_bytes_per_s=_rate(sizes[1], calls[1] - calls[0]),
        large_bytes_per_s=_rate(sizes[2], calls[2] - calls[0]),
        weights_per_s=weights_per_s,
    )


def _rate(size_bytes: int, seconds: float) -> float:
    """Bytes a second; a difference that vanishes in the noise, or worse, counts as faster than any memory."""
    return size_bytes / max(seconds, size_bytes / 1e12)


def _large_bytes_per_s(dtype: Any) -> float:
    import torch

    weight = torch.ones((8192, 8192), dtype=dtype)
    vector = torch.ones(8192, dtype=dtype)
    return float(weight.nbytes / min(_timed(lambda: torch.nn.functional.linear(vector, weight)) for _ in range(6)))


def _timed(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class _Tiny:
    """A Llama with random weights whose decode steps are timed."""

    def __init__(self, *, layers: int, hidden: int) -> None:
        from transformers import LlamaConfig

        self._config = LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        self.tensors, self.leaves, self._elements = 0, 0, 0
        self.load_seconds: dict[str, float] = {}  # the quickest load in a dtype

    def size_bytes(self, dtype: str) -> int:
        return self._elements * (4 if dtype == "float32" else 2)

    def step_seconds(self, dtype: str = "bfloat16") -> float:
        """The time of a decode step."""
        import torch

        with self._loaded(dtype) as model:
            ids = torch.zeros((1, 16), dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True).past_key_values
            return _quick([_timed(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True)) for _ in range(24)])

    def generate_seconds(self) -> float:
        """The time that a token takes in ``generate``."""
        import torch

        ids = torch.zeros((1, 16), dtype=torch.long)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        with self._loaded("bfloat16") as model:
            short, long = (
                _quick([_timed(lambda n=n: model.generate(ids, max_new_tokens=n, **options)) for _ in range(6)])
                for n in (8, 24)
            )
        return (long - short) / 16

    @contextmanager
    def _loaded(self, dtype: str) -> Iterator[Any]:
        import torch
        from transformers import LlamaForCausalLM, logging

        from workbench.loading import load
        from workbench.recipe import Recipe

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with tempfile.TemporaryDirectory() as folder:
                LlamaForCausalLM(self._config).to(torch.bfloat16).save_pretrained(folder)
                recipe = Recipe(
                    model=ModelRef(name=folder),
                    precision=FullPrecision(dtype=dtype),
                    workload=Workload(context_length=64),
                )
                load(recipe).unload()  # what is done once for a model
                session = load(recipe)
                took = session.load_report.seconds
                self.load_seconds[dtype] = min(took, self.load_seconds.get(dtype, took))
                model = session.model
                self.tensors = sum(1 for _ in model.parameters())
                self.leaves = sum(1 for m in model.modules() if next(m.children(), None) is None)
                self._elements = sum(p.numel() for p in model.parameters())
                yield model
                session.unload()
        finally:
            logging.set_verbosity(verbosity)


def _quick(seconds: list[float]) -> float:
    """The quickest quarter's upper end: other programs only add."""
    return sorted(seconds)[len(seconds) // 4]
