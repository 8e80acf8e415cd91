"""Loading: Workbench beside plain ``from_pretrained`` with the same map and config, in one run.

    python benchmarks/loading.py                 # the demo model and a random Llama of 1.1 billion parameters
    python benchmarks/loading.py --models demo --rounds 3

Run it while nothing else is busy, on a disk with 5 GB free. Times are medians over interleaved rounds, the files in the
page cache; both engines load in the same thread. Peak memory is what the process grows by at most while it loads: all
resident pages, those of the mapped checkpoint among them, and the anonymous ones alone. "again" is a second load, from
the weights that the first has quantized and kept. The last table is the quantizing alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes  # noqa: F401 - defines the operator
import torch
from offload import make_llama
from transformers import AutoModelForCausalLM, logging

import workbench as wb
from workbench import loading
from workbench.model import fetch_demo_model
from workbench.quantize_4bit import fast_quantization
from workbench.session import give_back, in_worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

CASES = {
    "bfloat16": wb.FullPrecision(),
    "float32": wb.FullPrecision(dtype="float32"),
    "int8": wb.Int8(),
    "nf4, double": wb.FourBit(),
    "nf4": wb.FourBit(double_quant=False),
    "fp4": wb.FourBit(quant_type="fp4", double_quant=False),
}
STATUS = Path("/proc/self/status")


def status_bytes(name: str) -> int:
    """A line of this process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most that this process grows by while the block lasts, in bytes: in all, and anonymous pages alone."""

    def __enter__(self) -> Self:
        """Begin anew."""
        gc.collect()
        give_back()
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.anonymous_before = status_bytes("VmRSS"), status_bytes("RssAnon")
        self.anonymous_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.anonymous_bytes = max(self.anonymous_bytes, status_bytes("RssAnon") - self.anonymous_before)

    def __exit__(self, *_: object) -> None:
        """Take the peaks."""
        self._over.set()
        self._thread.join()
        self.all_bytes = status_bytes("VmHWM") - self.before


def plain(folder: Path, precision: Any) -> Any:
    """What people write."""
    dtype = precision.dtype_of("bfloat16")
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        device_map={"": "cpu"},
        use_safetensors=True,
        quantization_config=precision.to_config(dtype),
    )


def measure(load: Callable[[], Any]) -> tuple[float, int, int]:
    """Load once and let go: seconds, peak bytes, peak anonymous bytes."""
    with Peak() as peak:
        started = time.perf_counter()
        loaded = in_worker(load)
        seconds = time.perf_counter() - started
    if isinstance(loaded, wb.Session):
        loaded.unload()
    del loaded
    return seconds, peak.all_bytes, peak.anonymous_bytes


def table(name: str, folder: Path, rounds: int) -> None:
    """One model."""
    print(f"\n{name}")
    print(f"{'':13}{'seconds':^32} {'peak, MB':^22} {'anonymous peak, MB':^22} {'again':>7}")
    heads = f"{'plain':>7} {'ours':>7} {'ratio':>6}"
    print(f"{'':13}{heads} {'slower':>9} {heads} {heads}")
    for case, precision in CASES.items():
        recipe = wb.Recipe(model=str(folder), precision=precision)
        engines: dict[str, Callable[[], Any]] = {
            "plain": lambda precision=precision: plain(folder, precision),
            "ours": lambda recipe=recipe: wb.load(recipe, keep_quantized=False),
        }
        for load in engines.values():  # what is done once for a process
            measure(load)
        found: dict[str, list[tuple[float, int, int]]] = {engine: [] for engine in engines}
        for turn in range(rounds):
            for engine in sorted(engines, reverse=bool(turn % 2)):
                found[engine].append(measure(engines[engine]))
        middle = {e: [statistics.median(column) for column in zip(*rows, strict=True)] for e, rows in found.items()}
        again = ""
        if precision.package:
            wb.load(recipe).unload()
            again = (
                f"{statistics.median(measure(lambda recipe=recipe: wb.load(recipe))[0] for _ in range(rounds)):7.2f}"
            )
            wb.empty_kept_weights()
        a, b = middle["plain"], middle["ours"]
        times = f"{a[0]:7.2f} {b[0]:7.2f} {b[0] / a[0]:6.2f} {a[0] / b[0]:8.1f}x"
        sizes = " ".join(f"{a[i] / 1e6:7.0f} {b[i] / 1e6:7.0f} {b[i] / max(a[i], 1):6.2f}" for i in (1, 2))
        print(f"{case:13}{times} {sizes} {again}", flush=True)


def quantizing(rounds: int) -> None:
    """The operator of bitsandbytes against ours, on one matrix of 11.5 million weights."""
    print(f"\n{'quantizing':13}{'million weights a second':^24}\n{'':13}{'bitsandbytes':>12} {'ours':>7} {'faster':>7}")
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("nf4", "fp4"):
            weight = (0.02 * torch.randn(5632, 2048)).to(dtype)

            def work(weight: Any = weight, kind: str = kind) -> tuple[float, Any]:
                started = time.perf_counter()
                made = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, kind, torch.uint8)
                return time.perf_counter() - started, made

            theirs, ours = [], []
            for _ in range(rounds + 1):
                theirs.append(in_worker(work))
                with fast_quantization():
                    ours.append(in_worker(work))
            assert all(torch.equal(x, y) for x, y in zip(theirs[0][1], ours[0][1], strict=True))
            rates = [weight.numel() / statistics.median(t for t, _ in each[1:]) / 1e6 for each in (theirs, ours)]
            name = f"{kind} {str(dtype).removeprefix('torch.')}"
            print(f"{name:13} {rates[0]:11.0f} {rates[1]:7.0f} {rates[1] / rates[0]:6.1f}x", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "1.1B"], choices=["demo", "1.1B"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {packages}")
    loading._WORTH_KEEPING_SECONDS = 0.0  # noqa: SLF001 - so that the demo model is kept too
    with tempfile.TemporaryDirectory() as folder:
        demo = fetch_demo_model()
        os.environ["WORKBENCH_CACHE_DIR"] = f"{folder}/cache"
        if "demo" in options.models:
            table("demo model (135M, bfloat16 checkpoint)", demo, options.rounds)
        if "1.1B" in options.models:
            table("random Llama (1.1B, bfloat16 checkpoint)", make_llama(Path(folder) / "llama"), options.rounds)
    quantizing(options.rounds)


if __name__ == "__main__":
    main()
