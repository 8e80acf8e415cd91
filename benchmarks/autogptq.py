"""Check both directions against AutoGPTQ 0.7.1 itself: it reads what Workbench writes, Workbench reads what it writes.

    python benchmarks/autogptq.py --model FOLDER [--environment FOLDER]

AutoGPTQ does not run with transformers 5, so the script makes an environment of its own (some 2 GB, once) and starts
itself in it. AutoGPTQ quantizes with CUDA only; here it packs weights that are rounded to nearest, with its own
classes, and saves them with its own method. The model is a small Llama with a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ["torch==2.13.0", "transformers==4.47.1", "datasets<3.3", "numpy<2.3", "peft==0.14.0", "setuptools<81"]
AUTOGPTQ = "auto-gptq==0.7.1"
VARIANTS = {
    "4-bit, groups of 32": {"bits": 4, "group_size": 32},
    "4-bit, act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "4-bit, asymmetric": {"bits": 4, "group_size": 32, "sym": False},
    "4-bit, per channel": {"bits": 4, "group_size": -1},
    "4-bit, asymmetric, per channel": {"bits": 4, "group_size": -1, "sym": False},
    "4-bit, asymmetric, act-order": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "3-bit": {"bits": 3, "group_size": 32},
    "3-bit, asymmetric, act-order": {"bits": 3, "group_size": 32, "sym": False, "desc_act": True},
    "8-bit": {"bits": 8, "group_size": 32},
    "8-bit, asymmetric, per channel": {"bits": 8, "group_size": -1, "sym": False},
    "2-bit": {"bits": 2, "group_size": 32},
}
TOLERANCE = 0.05
TEXT = (
    "You may reproduce and distribute copies of the Work or Derivative Works thereof in any medium, with or without "
    "modifications, and in Source or Object form, provided that You meet the following conditions."
)


def make_environment(folder: Path) -> Path:
    """Install AutoGPTQ and what it runs with; return the environment's Python."""
    python = folder / "bin" / "python"
    if (folder / "ready").is_file():
        return python
    print(f"making {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *PACKAGES, "accelerate", "sentencepiece", "rouge", "gekko", "wheel"], check=True)
    subprocess.run(
        [*install, "--no-deps", "--no-build-isolation", AUTOGPTQ],
        check=True,
        env={**os.environ, "BUILD_CUDA_EXT": "0"},
    )
    (folder / "ready").touch()
    return python


def probe(base: str) -> list[int]:
    """The tokens of ordinary text: on gibberish every token is about as likely as the next."""
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"])


def logits_of(model: Any, ids: list[int]) -> Any:
    """The logits of all probe positions in float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


# --- inside AutoGPTQ's environment ------------------------------------------------------------------------------------


def autogptq_model(folder: str) -> Any:
    """Load a folder with AutoGPTQ on the CPU."""
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        folder,
        device="cpu",
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
    ).model


def inside(work: Path, base: str) -> None:
    """Read what Workbench wrote, and write the same variants."""
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling._utils import pack_model
    from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = probe(base)
    for number, (title, options) in enumerate(VARIANTS.items()):
        ours = work / f"ours-{number}"
        model = autogptq_model(str(ours))
        torch.save(logits_of(model, ids), work / f"ours-{number}.autogptq.pt")

        theirs = work / f"theirs-{number}"
        model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float16)
        config = BaseQuantizeConfig(damp_percent=0.01, **options)
        quantizers = {}
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                scale, zero, g_idx, weight = round_to_nearest(module.weight.data.float(), options, number)
                module.weight.data = weight.half()
                quantizers[f"model.layers.{name}"] = (None, scale, zero, g_idx)
        pack_model(
            model,
            quantizers,
            bits=config.bits,
            group_size=config.group_size,
            use_triton=False,
            use_cuda_fp16=True,
            desc_act=config.desc_act,
            force_layer_back_to_cpu=True,
        )
        wrapped = LlamaGPTQForCausalLM(model, True, config)
        wrapped.save_quantized(str(theirs), use_safetensors=True)
        AutoTokenizer.from_pretrained(base).save_pretrained(theirs)
        model = autogptq_model(str(theirs))
        torch.save(logits_of(model, ids), work / f"theirs-{number}.autogptq.pt")
        print(f"AutoGPTQ: {title}", flush=True)


def round_to_nearest(weight: Any, options: dict[str, Any], seed: int) -> tuple[Any, Any, Any, Any]:
    """Scales and zero points (out, groups), the group of each input, and the rounded weight."""
    import torch

    inputs = weight.shape[1]
    size = inputs if options["group_size"] == -1 else options["group_size"]
    g_idx = torch.arange(inputs) // size
    if options.get("desc_act"):
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
    top = 2 ** options["bits"] - 1
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        part = weight[:, g_idx == group]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        if options.get("sym", True):
            high = torch.maximum(low.abs(), high)
            low = -high
        scale = ((high - low) / top).clamp(min=1e-6).half().float()
        # AutoGPTQ stores zero points less one, and has no room for 0.
        zero = torch.full_like(scale, (top + 1) // 2) if options.get("sym", True) else (-low / scale).round()
        scales.append(scale)
        zeros.append(zero.clamp(1, top))
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    values = (weight / scale[:, g_idx]).round() + zero[:, g_idx]
    return scale, zero, g_idx.int(), scale[:, g_idx] * (values.clamp(0, top) - zero[:, g_idx])


# --- in this environment ----------------------------------------------------------------------------------------------


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a small Llama in full precision")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "autogptq-environment")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments.inside, arguments.model)
        return
    python = make_environment(arguments.environment)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    import workbench as wb

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text = wb.CalibrationText(samples=16, sequence_length=128)
        for number, options in enumerate(VARIANTS.values()):
            recipe = wb.Recipe(model=arguments.model, precision=wb.GPTQ(**options))
            wb.quantize(recipe, work / f"ours-{number}", calibration=text, evaluation=None)
        command = [str(python), __file__, "--model", arguments.model, "--inside", str(work)]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])

        print(
            "\n| folder | read by | largest difference of a logit | arg-maxes equal | kernel |\n|---|---|---|---|---|"
        )
        wrong = []
        ids = probe(arguments.model)
        for number, title in enumerate(VARIANTS):
            for writer, reader in (("ours", "AutoGPTQ"), ("theirs", "Workbench")):
                workload = wb.Workload(context_length=len(ids))
                session = wb.load(wb.Recipe(model=str(work / f"{writer}-{number}"), workload=workload))
                got = logits_of(session.model, ids)
                kernel = next(line for line in session.load_report.lines if line.startswith("Kernel"))
                session.unload()
                want = torch.load(work / f"{writer}-{number}.autogptq.pt")
                difference = float((got - want).abs().max())
                same = int((got.argmax(-1) == want.argmax(-1)).sum())
                name = f"{title}, written by {'Workbench' if writer == 'ours' else 'AutoGPTQ'}"
                print(
                    f"| {name} | {reader} | {difference:.4f} | {same} of {len(ids)} | {kernel.split()[1]} |", flush=True
                )
                if difference > TOLERANCE or same < len(ids):
                    wrong.append(name)
    print(json.dumps({"tolerance": TOLERANCE, "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
