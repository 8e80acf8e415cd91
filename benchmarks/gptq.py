"""Quantize one model by three routes with the same calibration: Workbench, transformers' GPTQConfig, and gptqmodel.

    python benchmarks/gptq.py [--layers 6] [--rounds 2]

Each run is a process of its own, the routes take turns, and a time runs from loading the model to the saved folder;
imports are not counted. On a machine that does other things as well, compare the processor time: it counts what all
threads of a run have used. The perplexity is that of the saved folder, loaded with transformers, on held-back text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUTES = ("workbench", "transformers", "gptqmodel")


def shortened(folder: Path, layers: int, target: Path) -> Path:
    """The model with fewer layers, for a shorter run; the time goes with the layers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def run(route: str, folder: Path, out: Path, text: Any) -> tuple[float, float]:
    """Quantize by one route; return the seconds and the processor seconds."""
    import torch
    from transformers import AutoTokenizer

    import workbench as wb
    from workbench.calibration import calibration_sequences
    from workbench.kernels import import_gptqmodel

    import_gptqmodel()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = calibration_sequences(text, tokenizer)
    rows = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in ids
    ]
    if route == "workbench":
        recipe = wb.Recipe(model=str(folder), precision=wb.GPTQ(group_size=64))
        started, used = time.perf_counter(), time.process_time()
        wb.quantize(recipe, out, calibration=text, evaluation=None)
        return time.perf_counter() - started, time.process_time() - used
    started, used = time.perf_counter(), time.process_time()
    if route == "transformers":
        from transformers import AutoModelForCausalLM, GPTQConfig

        config = GPTQConfig(bits=4, group_size=64, dataset=rows, tokenizer=tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
        )
        # The calibration tensors stand in the config, which is saved as JSON.
        model.config.quantization_config.dataset = None
        model.hf_quantizer.quantization_config.dataset = None
        model.save_pretrained(out)
    else:
        from gptqmodel import GPTQModel, QuantizeConfig

        model = GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=64, damp_percent=0.1))
        flat = [{name: tensor[0] for name, tensor in row.items()} for row in rows]
        model.quantize(flat, batch_size=8, tokenizer=tokenizer)
        model.save(str(out))
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    tokenizer.save_pretrained(out)
    return seconds, processor


def measure(folder: Path, text: Any) -> float:
    """Perplexity of a folder on text that is not calibration text."""
    import workbench as wb
    from workbench.calibration import evaluation_sequences
    from workbench.gptq import perplexity

    session = wb.load(wb.Recipe(model=str(folder)))
    sequences = evaluation_sequences(wb.CalibrationText(), session.tokenizer, text, 8, 512)
    found = perplexity(session.model, sequences)
    session.unload()
    return found


def main() -> None:
    """Run the routes in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; the demo model if left out")
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--route", choices=ROUTES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import workbench as wb

    text = wb.CalibrationText(samples=arguments.samples, sequence_length=arguments.length)
    if arguments.route:
        seconds, processor = run(arguments.route, arguments.model, arguments.out, text)
        found = {"seconds": seconds, "processor": processor, "perplexity": measure(arguments.out, text)}
        print(json.dumps(found))
        return
    folder = arguments.model or wb.fetch_demo_model()
    rounds: dict[str, list[dict[str, float]]] = {route: [] for route in ROUTES}
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.layers:
            folder = shortened(folder, arguments.layers, Path(temporary) / "model")
        for turn in range(arguments.rounds):
            for route in ROUTES:
                out = Path(temporary) / f"{route}-{turn}"
                command = [sys.executable, __file__, "--model", str(folder), "--route", route, "--out", str(out)]
                command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                rounds[route].append(json.loads(done.stdout.splitlines()[-1]))
                print(route, rounds[route][-1], flush=True)
        original = measure(folder, text)
    best = {r: {k: min(row[k] for row in rows) for k in rows[0]} for r, rows in rounds.items()}
    ours = best["workbench"]
    print("\n| route | seconds | | processor seconds | | perplexity | |\n|---|---|---|---|---|---|---|")
    for route, row in best.items():
        shares = [f"{row[k]:.1f} | {row[k] / ours[k]:.2f} x" for k in ("seconds", "processor")]
        print(f"| {route} | {' | '.join(shares)} | {row['perplexity']:.3f} | {row['perplexity'] / original - 1:+.1%} |")
    print(f"| original | | | | | {original:.3f} | |")


if __name__ == "__main__":
    main()
