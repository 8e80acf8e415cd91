"""How many tokens a second a placement will give: an estimate from bandwidths, better once they have been measured.

A token takes a fixed time for each module that is called, and the time to read each weight once from where it is kept.
Small matrices are read more slowly than large ones. Weights that wait on disk are fetched by accelerate tensor by
tensor, and each time the header of the file is read, which takes longer the more tensors the file holds.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from workbench.model import cache_folder, refuses_unknown
from workbench.precision import FourBit, FullPrecision, Int8

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from workbench.placement import Placement
    from workbench.skeleton import Skeleton

# For hypothetical machines; no GPU was ever measured by us.
_PCIE_BYTES_PER_S = 12e9  # pageable copies over PCIe 4 x16, as accelerate makes them
_GPU_MODULE_SECONDS = 15e-6  # launching a module's kernels from Python
_EFFICIENCY = 0.7  # of a data sheet's bandwidth that a matrix-vector product commonly reaches
_MIB = 2**20


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What this machine's CPU was measured to do.

    Attributes:
        token_seconds: What ``generate`` takes for itself around each decode step.
        module_seconds: For each leaf module that is called in a decode step.
        small_bytes_per_s: Reading matrices of about 1 MiB; by dtype.
        large_bytes_per_s: Reading matrices of 32 MiB and more; by dtype.
        fetch_seconds: For each tensor that accelerate fetches from disk.
        header_seconds: The same for each tensor that the fetched one's file holds.
        disk_bytes_per_s: Copying fetched tensors, with the file in the page cache.
    """

    token_seconds: float
    module_seconds: float
    small_bytes_per_s: dict[str, float]
    large_bytes_per_s: dict[str, float]
    fetch_seconds: float
    header_seconds: float
    disk_bytes_per_s: float

    def read_seconds(self, size_bytes: int, dtype: str) -> float:
        """Seconds to multiply by one matrix of so many bytes."""
        dtype = dtype if dtype in self.large_bytes_per_s else "bfloat16"
        share = min(1.0, max(0.0, math.log2(max(size_bytes, 1) / _MIB) / 5))
        small, large = self.small_bytes_per_s[dtype], self.large_bytes_per_s[dtype]
        return float(size_bytes / (small ** (1 - share) * large**share))


# Of the two-core machine on which Workbench is made: a stand-in until a machine has been measured itself.
_TYPICAL = Calibration(
    token_seconds=1e-3,
    module_seconds=35e-6,
    small_bytes_per_s={"bfloat16": 11e9, "float32": 11e9},
    large_bytes_per_s={"bfloat16": 20e9, "float32": 23e9},
    fetch_seconds=0.2e-3,
    header_seconds=2e-6,
    disk_bytes_per_s=13e9,
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An estimate of the decoding speed.

    Attributes:
        tokens_per_second: For one sequence at a short context.
        calibrated: Whether it rests on measurements of this machine; else on data sheets or a typical machine.
    """

    tokens_per_second: float
    calibrated: bool


def predict_speed(placement: Placement, skeleton: Skeleton) -> Speed | None:
    """Estimate how fast a placement decodes one sequence at a short context.

    Args:
        placement: Where everything is; of this machine or of a hypothetical one.
        skeleton: Its model.

    Returns:
        The estimate; None where something has no room, for int8, whose time is not that of reading its bytes, and for
        4-bit weights on a CPU, which nobody has measured.
    """
    precision = placement.recipe.precision
    gpus = [d for d in placement.device_map.values() if d not in ("cpu", "disk")]
    if placement.unplaced or isinstance(precision, Int8) or (isinstance(precision, FourBit) and not gpus):
        return None
    known = known_calibration() if placement.machine.name == "This machine" else None
    cpu = known or _TYPICAL
    if skeleton not in _profiles:
        _profiles[skeleton] = _profile(skeleton)
    profile = _profiles[skeleton]
    tensors_in_file = sum(len(p.tensors) for p in profile.values()) / max(1, len(skeleton.source.weight_files))
    seconds = cpu.token_seconds
    for layer in placement.layers:
        part = profile[layer.name]
        shrunk = layer.bytes_after / max(1, layer.bytes_before)
        reads = [size * shrunk * share for size, share in part.tensors]
        fetched = sum(size for size, _ in part.tensors) * shrunk  # the whole, whatever part of it is read then
        if gpus:
            runs_on = gpus[0] if layer.device in ("cpu", "disk") else layer.device
            bandwidth = None if runs_on is None else placement.machine.device(runs_on).bandwidth_bytes_per_s
            if bandwidth is None:
                return None
            seconds += part.modules * _GPU_MODULE_SECONDS + sum(reads) / (bandwidth * _EFFICIENCY)
            seconds += fetched / _PCIE_BYTES_PER_S if layer.device in ("cpu", "disk") else 0
        else:
            seconds += part.modules * cpu.module_seconds
            seconds += sum(cpu.read_seconds(int(size), placement.dtype) for size in reads)
        if layer.device == "disk":
            seconds += len(part.tensors) * (cpu.fetch_seconds + tensors_in_file * cpu.header_seconds)
            disk = placement.machine.device("disk").bandwidth_bytes_per_s
            seconds += fetched / (cpu.disk_bytes_per_s if disk is None else disk)
    return Speed(tokens_per_second=1 / seconds, calibrated=known is not None)


@dataclass(frozen=True, kw_only=True)
class _Profile:
    """A block: leaf modules that are called, and for each tensor its bytes and the share of it that a token reads."""

    modules: int
    tensors: tuple[tuple[int, float], ...]


_profiles: weakref.WeakKeyDictionary[Skeleton, dict[str, _Profile]] = weakref.WeakKeyDictionary()


def _profile(skeleton: Skeleton) -> dict[str, _Profile]:
    module = skeleton.meta_model(FullPrecision()).module
    config = skeleton.config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    used_whole = set(skeleton.tied.values())  # a head that is tied to the embedding reads all of it

    def share(name: str, tensor: Any, owner: Any) -> float:
        if experts and tensor.dim() == 3 and tensor.shape[0] == experts:
            return float(min(1.0, chosen / experts))
        # One row of a table is looked up.
        return 0.0 if type(owner).__name__.endswith("Embedding") and name not in used_whole else 1.0

    found = {}
    for block in skeleton.blocks:
        part = module.get_submodule(block.name)
        tensors = [
            (tensor.nbytes, share(f"{block.name}.{name}", tensor, part.get_submodule(name.rpartition(".")[0])))
            for name, tensor in part.named_parameters()
            if f"{block.name}.{name}" not in skeleton.tied
        ]
        leaves = sum(1 for m in part.modules() if next(m.children(), None) is None)
        found[block.name] = _Profile(modules=leaves, tensors=tuple(tensors))
    return found


# --- measuring a machine ----------------------------------------------------------------------------------------------


def _calibration_file() -> Path:
    import torch

    return cache_folder() / f"calibration-torch-{torch.__version__}-{os.cpu_count()}-cores.json"


def known_calibration() -> Calibration | None:
    """What :func:`calibrate` has measured on this machine, or None."""
    try:
        return Calibration(**json.loads(_calibration_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def calibrate() -> Calibration:
    """Measure this machine's CPU and keep the result for later estimates. Takes some ten seconds.

    Decodes with tiny models made on the spot, in memory and offloaded to disk; run it while nothing else is busy.

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
        fast, slow = narrow[8].step_seconds("cpu"), narrow[24].step_seconds("cpu")
        module_seconds = (slow - fast) / (narrow[24].leaves - narrow[8].leaves)
        small, large = {}, {}
        for dtype in ("bfloat16", "float32"):
            extra = wide.step_seconds("cpu", dtype) - narrow[8].step_seconds("cpu", dtype)
            small[dtype] = (wide.size_bytes(dtype) - narrow[8].size_bytes(dtype)) / extra
            large[dtype] = _large_bytes_per_s(getattr(torch, dtype))
        fetch = {n: (tiny.step_seconds("disk") - tiny.step_seconds("cpu")) / tiny.tensors for n, tiny in narrow.items()}
        header_seconds = max(0.0, (fetch[24] - fetch[8]) / (narrow[24].tensors - narrow[8].tensors))
        fetch_seconds = fetch[8] - header_seconds * narrow[8].tensors
        copying = wide.step_seconds("disk") - wide.step_seconds("cpu") - wide.tensors * fetch[8]
        token_seconds = max(0.0, narrow[8].generate_seconds() - fast)
    return Calibration(
        token_seconds=token_seconds,
        module_seconds=module_seconds,
        small_bytes_per_s=small,
        large_bytes_per_s=large,
        fetch_seconds=fetch_seconds,
        header_seconds=header_seconds,
        # Copies that vanish in the noise are as fast as memory.
        disk_bytes_per_s=wide.size_bytes("bfloat16") / max(copying, wide.size_bytes("bfloat16") / large["bfloat16"]),
    )


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

    def size_bytes(self, dtype: str) -> int:
        return self._elements * (4 if dtype == "float32" else 2)

    def step_seconds(self, device: str, dtype: str = "bfloat16") -> float:
        """The time of a decode step with all weights on one device."""
        import torch

        with self._loaded(device, dtype) as model:
            ids = torch.zeros((1, 16), dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True).past_key_values
            return _quick([_timed(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True)) for _ in range(24)])

    def generate_seconds(self) -> float:
        """The time that a token takes in ``generate``."""
        import torch

        ids = torch.zeros((1, 16), dtype=torch.long)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        with self._loaded("cpu", "bfloat16") as model:
            short, long = (
                _quick([_timed(lambda n=n: model.generate(ids, max_new_tokens=n, **options)) for _ in range(6)])
                for n in (8, 24)
            )
        return (long - short) / 16

    @contextmanager
    def _loaded(self, device: str, dtype: str) -> Iterator[Any]:
        import torch
        from transformers import AutoModelForCausalLM, LlamaForCausalLM, logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with tempfile.TemporaryDirectory() as folder:
                LlamaForCausalLM(self._config).to(torch.bfloat16).save_pretrained(folder)
                model = AutoModelForCausalLM.from_pretrained(
                    folder, device_map={"": device}, dtype=getattr(torch, dtype), offload_folder=f"{folder}/offload"
                )
                self.tensors = sum(1 for _ in model.parameters())
                self.leaves = sum(1 for m in model.modules() if next(m.children(), None) is None)
                self._elements = sum(p.numel() for p in model.parameters())
                yield model
        finally:
            logging.set_verbosity(verbosity)


def _quick(seconds: list[float]) -> float:
    """The quickest quarter's upper end: other programs only add."""
    return sorted(seconds)[len(seconds) // 4]
