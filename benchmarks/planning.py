"""How long planning takes: for each move of a slider, beside the libraries' own planners, and up to the first preview.

    python benchmarks/planning.py [--moves 15] [--starts 3]

Prints Markdown. Nothing is downloaded or loaded: the models are configs in a temporary folder. The goals are those of
an interactive preview: a move under 5 ms for 8B and under 30 ms for 671B, a first preview under 1.5 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
# title -> (config class, its options, machine, goal in milliseconds for a move)
MODELS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "Llama 8B": ("LlamaConfig", LLAMA_8B, "2x RTX 4090", 5),
    "DeepSeek-V3 671B": ("DeepseekV3Config", {}, "8x A100 80 GB", 30),
}
FIRST_PREVIEW = """
import json, sys, time
import torch
start = time.perf_counter()
if sys.argv[3] == "imported":
    import transformers
    import transformers.modeling_utils, transformers.models.auto.modeling_auto
    transformers.AutoConfig.from_pretrained(sys.argv[1])
    getattr(transformers, sys.argv[4])
    start = time.perf_counter()
import workbench as wb
machine = wb.Machine.preset(sys.argv[2])
placement = wb.place(wb.Recipe(model=sys.argv[1]), machine=machine, advice=False)
assert placement.kv_cache_bytes is not None
print(json.dumps(time.perf_counter() - start))
"""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moves", type=int, default=15)
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {version('torch')}, ", end="")
    print(f"transformers {version('transformers')}, accelerate {version('accelerate')}\n")
    with tempfile.TemporaryDirectory(prefix="planning-") as made:
        folders = {title: save_config(title, Path(made)) for title in MODELS}
        print("Median milliseconds for a move of a slider, the skeleton built; in brackets the slowest move.\n")
        print(f"| model | {' | '.join(CONTENDERS)} | goal |\n|---|{'---:|' * (len(CONTENDERS) + 1)}")
        for title, folder in folders.items():
            print(f"| {title} | {' | '.join(moves(title, folder, options.moves))} | {MODELS[title][3]} |", flush=True)
        print("\nSeconds to the first preview, cache and activations included, in a fresh process:\n")
        print("| model | torch imported | transformers' model code imported, too | goal |\n|---|---:|---:|---:|")
        for title, folder in folders.items():
            cells = [first_preview(title, folder, how, options.starts) for how in ("torch", "imported")]
            print(f"| {title} | {' | '.join(cells)} | 1.5 |", flush=True)


def save_config(title: str, folder: Path) -> Path:
    """Save a config as it would come from the Hub."""
    import transformers

    class_name, values, _, _ = MODELS[title]
    architecture = class_name.replace("Config", "ForCausalLM")
    config = getattr(transformers, class_name)(**values, dtype="bfloat16", architectures=[architecture])
    config.save_pretrained(folder / class_name)
    return folder / class_name


def moves(title: str, folder: Path, count: int) -> list[str]:
    """Time each contender on the same budgets, one after the other for each move."""
    import workbench as wb

    machine = wb.Machine.preset(MODELS[title][2])
    skeleton = wb.read_skeleton(str(folder))
    module = skeleton.meta_model(wb.FullPrecision()).module
    gpus = [device.id for device in machine.devices if device.id not in ("cpu", "disk")]
    planners = {name: make(folder, machine, skeleton, module) for name, make in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in planners}
    for move in range(count + 2):
        share = 0.95 - 0.6 * move / (count + 2)  # the first GPU's slider goes down
        devices = [d for d in machine.devices if d.id != "disk"]  # accelerate's balancing does not know the disk
        budgets = {d.id: int(d.budget_bytes * (share if d.id == gpus[0] else 0.95)) for d in devices}
        for name, plan in planners.items():
            start = time.perf_counter()
            plan(budgets)
            times[name].append(1000 * (time.perf_counter() - start))
    return [f"{statistics.median(t[2:]):.1f} ({max(t[2:]):.0f})" for t in times.values()]  # two moves warm up


def ours(**choices: Any) -> Callable[..., Callable[[dict[Any, int]], Any]]:
    """Place with some choices."""

    def make(folder: Path, machine: Any, skeleton: Any, _module: Any) -> Callable[[dict[Any, int]], Any]:
        import workbench as wb

        advice = choices.get("advice", False)
        recipe = wb.Recipe(model=str(folder), **{k: v for k, v in choices.items() if k != "advice"})

        def plan(budgets: dict[Any, int]) -> Any:
            return wb.place(
                recipe.with_(max_memory=budgets), machine=machine, skeleton=skeleton, measure=True, advice=advice
            )

        return plan

    return make


def of_transformers(_folder: Path, _machine: Any, _skeleton: Any, module: Any) -> Callable[[dict[Any, int]], Any]:
    """What ``from_pretrained`` calls for ``device_map="auto"``."""
    from transformers.integrations.accelerate import _get_device_map

    return lambda budgets: _get_device_map(module, "auto", dict(budgets), None)


def of_accelerate(_folder: Path, _machine: Any, _skeleton: Any, module: Any) -> Callable[[dict[Any, int]], Any]:
    """The recipe of accelerate's documentation."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    no_split = list(module._no_split_modules or ())  # noqa: SLF001 - as its documentation has it

    def plan(budgets: dict[Any, int]) -> Any:
        balanced = get_balanced_memory(module, dict(budgets), no_split_module_classes=no_split)
        return infer_auto_device_map(module, balanced, no_split_module_classes=no_split)

    return plan


CONTENDERS: dict[str, Callable[..., Callable[[dict[Any, int]], Any]]] = {
    "`place`, auto": ours(),
    "with advice": ours(advice=True),
    "`place`, packed": ours(strategy="packed"),
    "transformers": of_transformers,
    "accelerate": of_accelerate,
}


def first_preview(title: str, folder: Path, how: str, starts: int) -> str:
    """Start so many processes and time each one's first preview."""
    class_name, _, machine, _ = MODELS[title]
    command = [sys.executable, "-c", FIRST_PREVIEW, str(folder), machine, how]
    command.append(class_name.replace("Config", "ForCausalLM"))
    seconds = []
    for _ in itertools.repeat(None, starts):
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        seconds.append(json.loads(done.stdout.splitlines()[-1]))
    return f"{statistics.median(seconds):.2f}"


if __name__ == "__main__":
    main()
