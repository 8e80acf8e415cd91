"""Generating: Workbench beside plain ``generate``, turns of a chat, caches, an assistant, and a busy machine.

    python benchmarks/generate.py
    python benchmarks/generate.py --rounds 5 --tokens 48

Run it while nothing else is busy: what it measures under load it brings about itself. The demo model; medians over
interleaved rounds; plain ``generate`` runs in the same thread as ours.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import logging

import workbench as wb
from workbench.session import in_worker

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "Tell me a long story about a king and his horse."
STORY = "The king rode over the hill, and the horse was tired, and the road was long. "
SPIN = "while True: pass"


def plain_seconds(session: wb.Session, tokens: int) -> float:
    """``generate`` as people call it."""
    inputs = session._encode(PROMPT, None)  # noqa: SLF001 - the same prompt

    def work() -> float:
        started = time.perf_counter()
        session.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - started

    return in_worker(work)


def our_seconds(session: wb.Session, tokens: int) -> float:
    """The same as a stream of text."""
    config, session.model.generation_config.min_new_tokens = session.model.generation_config, tokens
    started = time.perf_counter()
    for _ in session.stream(PROMPT, max_new_tokens=tokens):
        pass
    config.min_new_tokens = None
    return time.perf_counter() - started


def interleaved(rounds: int, *engines: Callable[[], float]) -> list[float]:
    """The median of each engine, after one turn that does not count."""
    found: list[list[float]] = [[] for _ in engines]
    for turn in range(rounds + 1):
        order = list(zip(found, engines, strict=True))
        for times, engine in reversed(order) if turn % 2 else order:
            times.append(engine())
    return [statistics.median(times[1:]) for times in found]


def streaming(precisions: dict[str, Any], rounds: int, tokens: int, title: str) -> None:
    """Our stream beside plain ``generate``."""
    print(f"\n{title}\n{'':10} {'plain tok/s':>12} {'ours tok/s':>12} {'ours/plain':>11} {'threads':>8}")
    for name, precision in precisions.items():
        session = wb.load(wb.Recipe(precision=precision))
        a, b = interleaved(rounds, lambda: plain_seconds(session, tokens), lambda: our_seconds(session, tokens))  # noqa: B023 - called at once
        threads = session.last_stats.threads
        print(f"{name:10} {tokens / a:12.1f} {tokens / b:12.1f} {a / b:11.3f} {threads:8}", flush=True)
        session.unload()


def turns(session: wb.Session, rounds: int) -> None:
    """The second turn with the first one's cache, and computed anew."""
    print(f"\nsecond turn{'':4} {'tokens':>7} {'anew, s':>9} {'cached, s':>10} {'ratio':>7}")
    for sentences in (10, 40, 100):
        first = session.chat()
        "".join(first.send(STORY * sentences + "What was tired?", max_new_tokens=8))

        def second(*, cached: bool, first: Any = first) -> float:
            chat = first
            if not cached:
                chat = session.chat()
                chat.messages = list(first.messages)
            said = chat.messages
            "".join(chat.send("And the road?", max_new_tokens=2))
            chat.messages = said
            return session.last_stats.first_token_seconds

        anew, cached = interleaved(rounds, lambda: second(cached=False), lambda: second(cached=True))
        count = session.last_stats.prompt_tokens
        print(f"{'':14} {count:7} {anew:9.3f} {cached:10.3f} {cached / anew:7.2f}", flush=True)


def caches(rounds: int, tokens: int) -> None:
    """Bytes of the preview, and speed."""
    print(f"\n{'cache':10} {'preview, MB':>12} {'tok/s':>7}")
    for kind in ("dynamic", "static", "quantized"):
        session = wb.load(wb.Recipe(workload=wb.Workload(context_length=8192, cache=kind)))
        (seconds,) = interleaved(rounds, lambda: our_seconds(session, tokens))  # noqa: B023 - likewise
        print(f"{kind:10} {session.placement.kv_cache_bytes / 1e6:12.0f} {tokens / seconds:7.1f}", flush=True)
        session.unload()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", nargs="+", default=["stream", "turns", "caches", "busy"])
    options = parser.parse_args()
    logging.set_verbosity_error()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {packages}")
    precisions = {"bfloat16": wb.FullPrecision(), "int8": wb.Int8(), "nf4": wb.FourBit()}
    if "stream" in options.only:
        streaming(precisions, options.rounds, options.tokens, "streaming")
    if "turns" in options.only:
        session = wb.load(wb.Recipe())
        turns(session, options.rounds)
        session.unload()
    if "caches" in options.only:
        caches(options.rounds, options.tokens)
    if "busy" in options.only:
        cores = os.cpu_count() or 1
        others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(cores)]
        try:
            title = f"streaming beside {cores} other busy programs"
            streaming(precisions, max(3, options.rounds // 2), options.tokens // 3, title)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
