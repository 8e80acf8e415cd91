"""What the weights are after the first forward: foretold, and counted on models that have run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from architectures import save_model

import workbench as wb
from workbench.first_forward import bytes_once_run, repacks_4bit, unrunnable_modules
from workbench.sizes import measure_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
AVX = pytest.mark.skipif(not repacks_4bit(), reason="this CPU has no AVX512-BF16, so bitsandbytes repacks nothing")


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    yield
    gc.collect()


def recipe(folder: Path | str, precision: Any) -> wb.Recipe:
    return wb.Recipe(
        model=str(folder),
        precision=precision,
        max_memory={"cpu": "4GiB"},
        workload=wb.Workload(context_length=16),
    )


def run_once(session: wb.Session) -> dict[Any, int]:
    with torch.inference_mode():
        session.model(torch.arange(8)[None])
    return measure_weights(session.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "precision",
    [
        wb.FourBit(),
        wb.FourBit(double_quant=False),
        wb.FourBit(quant_type="fp4", compute_dtype="float32"),
        wb.Int8(),
        wb.Int8(has_fp16_weight=True),
        wb.FullPrecision(),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])  # gpt2 and qwen2 have biases
def test_the_bytes_after_the_first_forward_are_foretold(model_type: str, precision: Any, tmp_path: Path) -> None:
    save_model(model_type, tmp_path)
    session = wb.load(recipe(tmp_path, precision))
    foretold = bytes_once_run(session.placement, session.skeleton)
    assert session.load_report.matches
    assert foretold == run_once(session)
    assert foretold == run_once(session)  # and stay so
    if isinstance(precision, wb.FourBit):
        assert (foretold != session.load_report.measured_bytes) == repacks_4bit()
    session.unload()


@AVX
def test_worked_out_by_hand(tiny_llama: Path) -> None:
    # A layer of the tiny Llama in nf4 (see test_sizes.py): q, o 4,096 weights, k, v 2,048, gate, up, down 8,192. Each
    # keeps all that was loaded; a scale for 64 weights in the kernel's order takes 2 bytes more.
    placement = wb.place(recipe(tiny_llama, wb.FourBit(double_quant=False)))
    scales = 2 * (2 * 4096 + 2 * 2048 + 3 * 8192) // 64
    once = bytes_once_run(placement, wb.read_skeleton(str(tiny_llama)))
    assert once == {"cpu": placement.total_bytes + 2 * scales}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder made by AutoGPTQ 0.7.1 is not beside this checkout")
@pytest.mark.parametrize("backend", ["auto", "torch", "torch_aten", "torch_fused", "torch_int8"])
def test_gptq_kernels(backend: str) -> None:
    session = wb.load(recipe(SHARED / "autogptq-4bit-32g", wb.GPTQ(group_size=32, backend=backend)))
    foretold = bytes_once_run(session.placement, session.skeleton)
    assert session.load_report.matches, session.load_report.lines
    assert foretold == run_once(session)
    assert foretold != session.load_report.measured_bytes
    session.unload()


@AVX
@pytest.mark.filterwarnings("ignore")
def test_matrices_that_cannot_be_repacked_are_named(tmp_path: Path) -> None:
    save_model("mamba", tmp_path)  # projections of 8 inputs, and of 40 outputs
    chosen = recipe(tmp_path, wb.FourBit())
    skeleton = wb.read_skeleton(str(tmp_path))
    named = unrunnable_modules(skeleton, chosen.precision)
    assert {name.rpartition(".")[2] for name in named} == {"x_proj", "dt_proj"}
    (advice,) = (a for a in wb.place(chosen, skeleton=skeleton).advice if "skip_modules" in a)
    assert f"cannot compute {named[0]} and {len(named) - 1} more in 4 bits" in advice
    better = advice.apply(chosen)
    assert unrunnable_modules(skeleton, better.precision) == ()
    assert not any("skip_modules" in a for a in wb.place(better, skeleton=skeleton).advice)
    session = wb.load(chosen)
    linear = [name for name, child in session.model.named_modules() if type(child).__name__ == "Linear4bit"]
    failed = []
    for name in linear:
        child = session.model.get_submodule(name)
        try:
            with torch.inference_mode():
                child(torch.zeros(1, child.in_features, dtype=torch.bfloat16))
        except (AssertionError, RuntimeError):
            failed.append(name)
    assert tuple(failed) == named
    session.unload()
    session = wb.load(better)
    assert bytes_once_run(session.placement, session.skeleton) == run_once(session)
    session.unload()


def test_another_machines_cpu_is_not_known(tiny_llama: Path) -> None:
    skeleton = wb.read_skeleton(str(tiny_llama))
    box = wb.Machine.preset("Kaggle 2x T4")
    chosen = recipe(tiny_llama, wb.FourBit())
    assert bytes_once_run(wb.place(chosen, machine=box), skeleton) is None
    placement = wb.place(chosen.with_(max_memory={0: "1GiB"}), machine=box)
    assert bytes_once_run(placement, skeleton) == {0: placement.total_bytes}
