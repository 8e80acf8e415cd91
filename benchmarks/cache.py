"""Predicted KV cache and activations against what a real process holds, on the CPU.

    python benchmarks/cache.py

Loads small models with random weights, one for each way in which caches differ, and the demo model; runs a prompt and
one more token; and prints a Markdown table. Each model has a process of its own. "Live" is the most that the tensors
which exist at once take, weights excluded; "resident" is by how much the process grew, where that is enough to tell.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# name -> (what it stands for, lengths)
MODELS = {
    "llama": ("full attention", (200, 500)),
    "gpt2": ("learned positions", (200, 500)),
    "mistral": ("a window of 200", (100, 500)),
    "gemma2": ("a window of 80 in every other layer", (200, 500)),
    "gemma3": ("a window of 80 in five layers of six", (200, 500)),
    "qwen3-moe": ("experts", (200, 500)),
    "deepseek-v3": ("latent attention, experts", (200, 500)),
    "granitemoehybrid": ("Mamba states and attention", (200, 500)),
    "mamba": ("states alone, a step a token", (200, 500)),
    "demo": ("SmolLM2-135M-Instruct", (512, 2048, 4096)),
}
MIB = 2**20
TELLING_BYTES = 16 * MIB  # less growth of the process is lost in what its allocator holds


def main() -> None:
    """Print the table, or with a name the rows of one model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS)
    name = parser.parse_args().model
    if name:
        measure(name)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, no GPU; torch {version('torch')}, ", end="")
    print(f"transformers {version('transformers')}. Predicted / measured, in bytes; resident in MiB.\n")
    print(
        "| model | tokens | KV cache | live in the prefill | error | live in a decode step | error | resident | error |"
    )
    print("|---|---:|---|---|---:|---|---:|---|---:|")
    for each in MODELS:
        done = subprocess.run([sys.executable, __file__, "--model", each], check=True, capture_output=True, text=True)
        print(done.stdout, end="", flush=True)


def measure(name: str) -> None:
    """Print a row for each length."""
    import torch
    from transformers import AutoModelForCausalLM

    import workbench as wb
    from workbench.placement import _cost

    title, lengths = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="cache-") as made:
        folder = make(name, Path(made))
        skeleton = wb.read_skeleton(str(folder))
        cost = _cost(skeleton, wb.FullPrecision(), measure=True)
        assert cost is not None
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        model(torch.full((1, 64), 7), use_cache=True)  # the first run warms pools and kernels
    for tokens in lengths:
        work = wb.Workload(context_length=tokens)
        cache_bytes = sum(cost.cache_bytes(work))
        prefill_bytes = cache_bytes + max(cost.activation_bytes(work).values()) + sum(cost.kept_bytes(work).values())
        step_bytes = cache_bytes + max(cost.decode_bytes(work).values())

        reset_peak()
        before = resident_bytes("VmRSS")
        output = run(model, tokens)
        grown = resident_bytes("VmHWM") - before
        found = "past_key_values" if output.get("past_key_values") is not None else "cache_params"
        real_cache = sum(t.numel() * t.element_size() for t in tensors(output[found], set()) if t.dim() > 1)
        del output
        with Live(model) as live:
            output = run(model, tokens)
        real_prefill = live.peak_bytes
        # The first step still has what the prompt left behind: the second is like all that follow.
        output = run(model, tokens - 2)
        run(model, 1, **{found: output[found]})
        with Live(model, output[found]) as live:
            run(model, 1, **{found: output[found]})
        same = "exact" if cache_bytes == real_cache else "DIFFERENT"
        resident = f"{prefill_bytes / MIB:.0f} / {grown / MIB:.0f} | {error(prefill_bytes, grown)}"
        print(
            f"| {name}: {title} | {tokens:,} | {cache_bytes:,} / {real_cache:,}: {same} "
            f"| {prefill_bytes:,} / {real_prefill:,} | {error(prefill_bytes, real_prefill)} "
            f"| {step_bytes:,} / {live.peak_bytes:,} | {error(step_bytes, live.peak_bytes)} "
            f"| {resident if prefill_bytes > TELLING_BYTES else ' | '} |"
        )


def make(name: str, folder: Path) -> Path:
    """A folder with the model."""
    if name == "demo":
        import workbench as wb

        return wb.fetch_demo_model()
    from architectures import save_model, tiny_config
    from tiny_models import TINY_MODELS, make_tiny_model

    if name in TINY_MODELS:
        make_tiny_model(name, folder)
    else:
        save_model(name, folder)
        config = tiny_config(name)
        if hasattr(config, "sliding_window"):
            config.sliding_window = 80
        config.save_pretrained(folder)
    return folder


def run(model: Any, count: int, **options: Any) -> Any:
    """Run so many tokens as ``generate`` does."""
    import inspect

    import torch

    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.no_grad():
        return model(torch.full((1, count), 7), use_cache=True, **options)


def error(predicted: int, measured: int) -> str:
    """By how much the prediction is off."""
    return f"{100 * (predicted / measured - 1):+.1f} %"


def tensors(value: Any, seen: set[int]) -> list[Any]:
    """Every tensor inside a cache, each once."""
    import torch

    if id(value) in seen or callable(value):
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    inside: Any = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
    inside = value.values() if isinstance(value, dict) else inside
    return [tensor for one in inside for tensor in tensors(one, seen)]


def resident_bytes(field: str) -> int:
    """What the kernel says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Give back what the allocator holds, and let the kernel take the peak anew from now on."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Live:
    """Adds up the storages that exist at once, those of a cache among them and weights excluded."""

    def __init__(self, model: Any, cache: Any = None) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}
        self.peak_bytes = 0

        def keep(values: list[Any]) -> None:
            for tensor in values:
                storage = tensor.untyped_storage()
                if storage._cdata not in sizes and storage.data_ptr() not in weights:  # noqa: SLF001 - its identity
                    sizes[storage._cdata] = storage.nbytes()  # noqa: SLF001 - likewise
                    weakref.finalize(storage, sizes.pop, storage._cdata)  # noqa: SLF001 - likewise
            self.peak_bytes = max(self.peak_bytes, sum(sizes.values()))

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                keep([leaf for leaf in tree_leaves(result) if hasattr(leaf, "untyped_storage")])
                return result

        keep(tensors(cache, set()) if cache is not None else [])
        self._mode = Count()

    def __enter__(self) -> Live:  # noqa: PYI034 - typing.Self came with Python 3.11
        """Begin."""
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """End."""
        self._mode.__exit__(*exception)


if __name__ == "__main__":
    main()
