"""torchao and hqq: exact bytes, and what they say where they do not run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import workbench as wb
from workbench.sizes import measure_weights

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.precision import Precision

SMALL = wb.Workload(context_length=128)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install torchao"
)


def test_torchao_bytes_by_hand() -> None:
    # 64 x 128: a value each; for each row a float32 scale and an int8 zero point
    assert wb.TorchAO().quantized_bytes((64, 128)) == 64 * 128 + 64 * (4 + 1)
    assert wb.TorchAO(group_size=64).quantized_bytes((64, 128)) == 64 * 128 + 2 * 64 * (4 + 1)
    # 12 x 1,000 is filled up to 16 x 1,024: half a byte a value, and two bfloat16 for each 128 of a row
    assert wb.TorchAO(bits=4).quantized_bytes((12, 1000)) == 16 * 1024 // 2 + 16 * 8 * 2 * 2


def test_hqq_bytes_by_hand() -> None:
    # 256 x 128 in 512 groups of 64; a scale and a zero point in the model's own type for each
    assert wb.HQQ().quantized_bytes((256, 128)) == 256 * 128 // 2 + 512 * 2 * 2
    assert wb.HQQ(bits=8).quantized_bytes((256, 128), "float32") == 256 * 128 + 512 * 2 * 4
    # ten values of 3 bits in a word: 52 rows of 64 words
    assert wb.HQQ(bits=3).quantized_bytes((256, 128)) == 52 * 64 * 4 + 512 * 2 * 2


@needs_torchao
@pytest.mark.parametrize(
    "precision", [wb.TorchAO(), wb.TorchAO(group_size=32, skip_modules=("lm_head", "k_proj", "model.layers.1.mlp"))]
)
def test_torchao_is_what_was_previewed_and_reloads(precision: wb.TorchAO, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), precision=precision, workload=SMALL)
    session = wb.load(recipe)
    assert session.load_report.matches, session.load_report.lines
    left = {name.rpartition(".")[0] for name, p in session.model.named_parameters() if type(p) is torch.nn.Parameter}
    linear = set(session.skeleton.linear_modules)
    skipped = {"lm_head"}
    if precision.skip_modules:
        skipped |= {f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}
        skipped |= {f"model.layers.1.mlp.{name}_proj" for name in ("up", "gate", "down")}
    assert left & linear == skipped
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        before = session.model(ids).logits.clone()
    assert measure_weights(session.model) == session.load_report.measured_bytes
    again = wb.load(wb.Recipe(model=str(session.save(tmp_path / "made")), workload=SMALL))
    with torch.inference_mode():
        assert torch.equal(again.model(ids).logits, before)
    assert again.skeleton.quantized_as == "torchao"
    assert again.load_report.measured_bytes == session.load_report.measured_bytes
    again.unload()
    session.unload()


@needs_torchao
def test_torchao_says_paris(demo_model: Path) -> None:
    session = wb.load(wb.Recipe(model=str(demo_model), precision=wb.TorchAO()))
    assert session.load_report.matches, session.load_report.lines
    assert "Paris" in session.generate("What is the capital of France?", max_new_tokens=8)
    session.unload()


@needs_torchao
@pytest.mark.parametrize(
    "precision", [wb.TorchAO(skip_modules=("lm_head",)), wb.TorchAO(group_size=64), wb.TorchAO(bits=4)]
)
def test_torchao_exported_lines_make_the_same_config(precision: wb.TorchAO) -> None:
    from transformers import TorchAoConfig

    scope: dict[str, Any] = {"TorchAoConfig": TorchAoConfig}
    exec("\n".join([*precision.imports, *precision.to_python("bfloat16")]), scope)  # noqa: S102 - running it is the point
    assert scope["quantization_config"].to_dict() == precision.to_config("bfloat16").to_dict()


@needs_torchao
def test_torchao_int4_is_refused_where_it_does_not_run(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.TorchAO(bits=4), workload=SMALL)
    placement = wb.place(recipe)
    assert placement.verdict == "does_not_fit"
    assert placement.summary.startswith(
        "Does not fit: it cannot be loaded so: torchao's int4 kernels run on NVIDIA GPUs"
    )
    ranked = wb.what_fits(recipe, precisions=[recipe.precision, wb.FullPrecision()])
    assert [fit.precision for fit in ranked] == [wb.FullPrecision(), recipe.precision]
    with pytest.raises(ValueError, match=r"groups of 128 cannot be loaded .*: torchao's int4 kernels run on"):
        wb.load(recipe)
    machine = wb.Machine.preset("RTX 4090")
    on_gpu = wb.place(recipe.with_(max_memory={0: "1GiB"}), machine=machine)
    assert on_gpu.verdict == "fits"
    assert on_gpu.dtype == "bfloat16"
    # By hand: each of the 14 matrices is filled up to 1,024 inputs: outputs * (512 + 8 groups * 4) bytes.
    outputs = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    assert on_gpu.total_bytes == outputs * (512 + 32) + 2 * 512 * 64 * 2 + 5 * 64 * 2 + 2 * 8 * 4
    with pytest.raises(ValueError, match=r"group_size is one of None, 32, 64, 128, 256, not -1"):
        wb.TorchAO(bits=4, group_size=-1)
    with pytest.raises(ValueError, match="bits is one of 8, 4, not 2"):
        wb.TorchAO(bits=2)


HQQ_PROGRAM = """
import sys, logging
import torch
import workbench as wb
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

for dtype in (torch.bfloat16, torch.float32):
    for bits in (8, 4, 3, 2, 1):
        for group in (32, 64):
            linear = torch.nn.Linear(128, 256, bias=False, dtype=dtype)
            config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
            made = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
            parts = [made.W_q, *(v for v in made.meta.values() if isinstance(v, torch.Tensor))]
            found = sum(p.numel() * p.element_size() for p in parts)
            said = wb.HQQ(bits=bits, group_size=group).quantized_bytes((256, 128), str(dtype).removeprefix("torch."))
            assert said == found, (bits, group, dtype, said, found)
            assert made(torch.zeros(1, 128, dtype=dtype)).shape == (1, 256)

recipe = wb.Recipe(model=sys.argv[1], precision=wb.HQQ(), workload=wb.Workload(context_length=128))
plain = wb.place(recipe.with_(precision=wb.FullPrecision()))
placement = wb.place(recipe)
shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
saved = sum(2 * a * b - wb.HQQ().quantized_bytes((a, b)) for a, b in shapes)
assert placement.total_bytes == plain.total_bytes - 2 * saved, placement.total_bytes
print(placement.summary)
try:
    wb.load(recipe)
except ValueError as error:
    print(error)
gpu = wb.place(recipe.with_(max_memory={0: "1GiB"}), machine=wb.Machine.preset("RTX 4090"))
print(gpu.summary)
print(recipe.to_python())
"""


@pytest.mark.skipif(
    not os.environ.get("WORKBENCH_HQQ"),
    reason="hqq is not beside: pip install --no-deps --target DIR hqq einops termcolor, and set WORKBENCH_HQQ=DIR",
)
def test_hqq_bytes_are_those_of_its_own_modules(tiny_llama: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.environ["WORKBENCH_HQQ"]}
    command = [sys.executable, "-c", HQQ_PROGRAM, str(tiny_llama)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Does not fit: it cannot be loaded so: transformers loads HQQ on GPUs only." in done.stdout
    assert "HQQ 4-bit, groups of 64 cannot be loaded as the preview has it" in done.stdout
    assert "says that HQQ is not available yet" in done.stdout
    assert "quantization_config = HqqConfig(nbits=4, group_size=64, axis=1)" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("hqq") is not None, reason="hqq is installed here")
def test_hqq_is_asked_for(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="HQQ 4-bit, groups of 64 needs hqq: run `pip install hqq`"):
        wb.place(wb.Recipe(model=str(tiny_llama), precision=wb.HQQ(), workload=SMALL))


@pytest.mark.parametrize("precision", [wb.TorchAO(bits=4, group_size=32), wb.HQQ(bits=3, skip_modules=("lm_head",))])
def test_round_trip(precision: Precision) -> None:
    recipe = wb.Recipe(precision=precision)
    assert wb.Recipe.from_json(recipe.to_json()) == recipe
