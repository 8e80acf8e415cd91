"""Decoding with layers on disk: Workbench's offload beside accelerate's, on the same maps, in one run.

    python benchmarks/offload.py                 # the demo model and a random Llama of 1.1 billion parameters
    python benchmarks/offload.py --models demo --rounds 3

Run it while nothing else is busy, on a disk with 3 GB free. All rates are medians over interleaved rounds: in each,
every engine decodes the same number of tokens after a short prompt.

- warm: the checkpoint is in the system's page cache.
- cap: likewise, but the budget has room for half of the layers only, and what is behind is let go.
- cold: the pages of each layer on disk are dropped from the page cache once it and the next have run, for both
  engines, so that every token reads all of them from the disk (how much it really read is shown). Workbench has room
  for three layers.
- cold, cap: Workbench has room for half of the layers; accelerate knows no such thing.

The physical limit is what no engine can exceed: warm, the speed with everything in memory; cold, the bytes that were
read over the speed at which the disk gives them, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, logging

import workbench as wb
from workbench.hardware import format_bytes
from workbench.model import fetch_demo_model
from workbench.offload import attach
from workbench.offload_pages import MappedFile
from workbench.session import in_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE_BYTES = 4 * 2**20
HUGE_BYTES = 2 * 2**20
THREADS = 4


def make_llama(folder: Path) -> Path:
    """Write a random Llama of 1.1 billion parameters in bfloat16: 2.2 GB."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    model.save_pretrained(folder)
    return folder


def device_map(layers: int, on_disk: int) -> dict[str, str]:
    """Embedding, head and the first layers on the CPU, the last ones on disk."""
    ends = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    first = layers - on_disk
    return {
        **dict.fromkeys(ends, "cpu"),
        **{f"model.layers.{i}": "disk" if i >= first else "cpu" for i in range(layers)},
    }


def read_bytes() -> int:
    """What this process has had read from disk so far."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line).split()[1])


class Dropper:
    """Drops the pages of layers on disk from the page cache, behind a model that runs."""

    def __init__(self, folder: Path, session: wb.Session, layers: range) -> None:
        self.files = [MappedFile(str(path)) for path in sorted(folder.glob("*.safetensors"))]
        for i in layers:
            before = layers[(i - layers.start - 1) % len(layers)]
            places = list(self.places(f"model.layers.{before}."))
            session.model.model.layers[i].register_forward_hook(lambda *_, places=places: self.drop(places))

    def places(self, prefix: str) -> Iterator[tuple[MappedFile, int, int]]:
        """Where a layer lies, rounded to huge pages: of those that are cut nothing would be dropped."""
        for file in self.files:
            entries = [entry for name, entry in file.entries.items() if name.startswith(prefix)]
            if entries:
                low, high = min(entry[2] for entry in entries), max(entry[3] for entry in entries)
                yield file, low - low % HUGE_BYTES, min(high + -high % HUGE_BYTES, file.size_bytes)

    def drop(self, places: list[tuple[MappedFile, int, int]]) -> None:
        """Forward hook."""
        for file, low, high in places:
            file.release(low, high, drop=True)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class DiskSpeed:
    """How fast the disk gives a file that is not in memory: pieces of 4 MiB, read by four threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[float] = []

    def measure(self) -> None:
        """Read at most 1 GiB."""
        descriptor = os.open(self.path, os.O_RDONLY)
        size = min(os.fstat(descriptor).st_size, 2**30)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        pieces = iter(range(0, size, PIECE_BYTES))
        lock = threading.Lock()

        def read() -> None:
            buffer = mmap.mmap(-1, PIECE_BYTES)
            while True:
                with lock:
                    start = next(pieces, None)
                if start is None:
                    return
                os.preadv(descriptor, [buffer], start)

        threads = [threading.Thread(target=read) for _ in range(THREADS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seen.append(size / (time.perf_counter() - started))
        os.close(descriptor)

    @property
    def bytes_per_s(self) -> float:
        """The median."""
        return statistics.median(self.seen)


@dataclass
class Engine:
    """Something that decodes, and how fast it did in each round."""

    session: wb.Session
    offload: Any = None
    dropper: Dropper | None = None
    rates: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)  # bytes a token

    def decode(self, tokens: int) -> None:
        """Decode in the worker thread, greedily and without a tokenizer."""

        def run() -> tuple[float, float]:
            model = self.session.model
            with torch.no_grad():
                out = model(torch.arange(1, 9)[None], use_cache=True)
                started, before = time.perf_counter(), read_bytes()
                for _ in range(tokens):
                    ids = out.logits[:, -1:].argmax(-1)
                    out = model(ids, past_key_values=out.past_key_values, use_cache=True)
                return tokens / (time.perf_counter() - started), (read_bytes() - before) / tokens

        rate, read = in_worker(run)
        self.rates.append(rate)
        self.reads.append(read)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return statistics.median(self.rates)

    @property
    def read_bytes(self) -> float:
        """What a token had read from disk."""
        return statistics.median(self.reads)

    def close(self) -> None:
        """Give everything back."""
        if self.dropper is not None:
            self.dropper.close()
        if self.offload is not None:
            self.offload.close()
        self.session.unload()


class Case:
    """One model with one map."""

    def __init__(self, folder: Path, on_disk: Callable[[int], int]) -> None:
        self.skeleton = wb.read_skeleton(wb.Recipe(model=str(folder)).model)
        self.folder = folder
        self.layers = len(self.skeleton.decoder_blocks)
        self.on_disk = on_disk(self.layers)
        plain = wb.place(self.recipe(None))
        self.cpu_bytes = plain.memory["cpu"].weight_bytes
        self.disk_bytes = plain.memory["disk"].weight_bytes
        self.layer_bytes = self.disk_bytes // self.on_disk

    def recipe(self, layers_in_memory: int | None) -> wb.Recipe:
        """The map with room for some of the layers on disk; None for all."""
        budget = None
        if layers_in_memory is not None:
            budget = {"cpu": self.cpu_bytes + layers_in_memory * self.layer_bytes, "disk": "100GiB"}
        return wb.Recipe(
            model=str(self.folder),
            strategy="custom",
            device_map=device_map(self.layers, self.on_disk),
            max_memory=budget,
            workload=wb.Workload(context_length=256),
        )

    def in_memory(self) -> Engine:
        """Everything on the CPU."""
        return Engine(wb.load(wb.Recipe(model=str(self.folder), workload=wb.Workload(context_length=256))))

    def ours(self, layers_in_memory: int | None, *, cold: bool = False) -> Engine:
        """Workbench's offload."""
        session = wb.load(self.recipe(layers_in_memory), offload="accelerate")
        offload, lines = attach(session.model, session.placement, None, drop_behind=False)
        print("   ", *lines)
        return Engine(session, offload, self.dropper(session) if cold else None)

    def theirs(self, *, cold: bool = False) -> Engine:
        """Accelerate's hooks."""
        session = wb.load(self.recipe(None), offload="accelerate")
        return Engine(session, None, self.dropper(session) if cold else None)

    def dropper(self, session: wb.Session) -> Dropper:
        """For the cold states."""
        return Dropper(self.folder, session, range(self.layers - self.on_disk, self.layers))


def rounds(engines: dict[str, Engine], count: int, tokens: dict[str, int], disk: DiskSpeed | None = None) -> None:
    """Let the engines take turns; the first round warms up and is not counted."""
    for turn in range(count + 1):
        for name, engine in engines.items():
            if disk is not None and name == "accelerate":
                disk.measure()
            engine.decode(tokens[name])
        if turn == 0:
            for engine in engines.values():
                engine.rates.clear()
                engine.reads.clear()


def run(title: str, folder: Path, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """All states of one model."""
    rows = []
    fast, slow = options.tokens, max(2, options.tokens // 4)
    for share, on_disk in (("all", lambda n: n), ("half", lambda n: n // 2)):
        case = Case(folder, on_disk)
        print(f"{title}, {share} of {case.layers} layers on disk: {format_bytes(case.disk_bytes)} of a token")
        capped = max(3, case.on_disk // 2)
        engines = {
            "memory": case.in_memory(),
            "ours": case.ours(None),
            "cap": case.ours(capped),
            "accelerate": case.theirs(),
        }
        rounds(engines, options.rounds, dict.fromkeys(engines, fast) | {"accelerate": slow})
        memory, theirs = engines["memory"].rate, engines["accelerate"].rate
        for state, name in (("warm", "ours"), (f"cap {capped}", "cap")):
            ours = engines[name].rate
            row = (title, share, state, f"{ours:.2f}", f"{theirs:.2f}", f"{memory:.2f} (memory)")
            rows.append(
                (*row, f"{100 * ours / memory:.0f} %", f"{100 * theirs / memory:.0f} %", f"{ours / theirs:.2f}")
            )
        for engine in engines.values():
            engine.close()

        disk = DiskSpeed(folder / "model.safetensors")
        engines = {"ours": case.ours(3, cold=True), "accelerate": case.theirs(cold=True)}
        rounds(engines, options.rounds, dict.fromkeys(engines, slow), disk)
        theirs, theirs_read = engines["accelerate"].rate, engines["accelerate"].read_bytes
        cold = [("cold", engines["ours"].rate, engines["ours"].read_bytes)]
        for engine in engines.values():
            engine.close()
        # Alone: what it keeps mapped cannot be dropped for the others either.
        engines = {"cap": case.ours(capped, cold=True)}
        rounds(engines, options.rounds, {"cap": slow})
        cold.append((f"cold, cap {capped}", engines["cap"].rate, engines["cap"].read_bytes))
        engines["cap"].close()
        for state, ours, ours_read in cold:
            print(f"    {state}: {ours_read / 1e6:.0f} MB read for each token, {theirs_read / 1e6:.0f} by accelerate")
            their_limit = disk.bytes_per_s / theirs_read
            of_disk = f"{100 * ours * ours_read / disk.bytes_per_s:.0f} %"
            row = (title, share, state, f"{ours:.2f}", f"{theirs:.2f}", f"{disk.bytes_per_s / ours_read:.2f} (disk)")
            rows.append((*row, of_disk, f"{100 * theirs / their_limit:.0f} %", f"{ours / theirs:.2f}"))
        print(f"    the disk: {disk.bytes_per_s / 1e9:.2f} GB/s (median of {len(disk.seen)})")
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,1.1B", help="demo, 1.1B, or both with a comma")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24, help="for each engine and round; a quarter where it is slow")
    parser.add_argument("--folder", help="where the random model is kept for the next time; default: a temporary one")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}; torch {version('torch')}, ", end=""
    )
    print(f"transformers {version('transformers')}, accelerate {version('accelerate')}\n")
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        if "demo" in options.models:  # a copy: pages that another program has mapped cannot be dropped
            rows += run("demo", Path(shutil.copytree(fetch_demo_model(), f"{temporary}/demo")), options)
        if "1.1B" in options.models:
            folder = Path(options.folder or temporary) / "llama-1.1b"
            if not folder.exists():
                make_llama(folder)
                os.sync()
            rows += run("1.1B", folder, options)
    head = ("model", "on disk", "state", "Workbench tok/s", "accelerate tok/s", "limit tok/s", "of the limit")
    print("\n| " + " | ".join((*head, "accelerate of it", "against accelerate")) + " |\n" + "|---" * 9 + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
