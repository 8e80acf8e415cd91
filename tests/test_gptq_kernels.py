"""Which kernels there are, which are right, and which one is taken."""

from __future__ import annotations

import os

import pytest
import torch

import workbench as wb
from workbench import kernels
from workbench.kernels import backends, choose_backend, import_gptqmodel, library_backend
from workbench.precision import GPTQ_BACKENDS

SHAPES = [(64, 128), (128, 64)]
needs_cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


def test_importing_leaves_the_environment_alone() -> None:
    before = {name: os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")}
    import_gptqmodel()
    assert {name: os.environ.get(name) for name in before} == before


@needs_cpu_only
def test_every_choice_has_a_sentence() -> None:
    found = backends(wb.GPTQ(group_size=32), SHAPES)
    assert {b.name for b in found} == set(GPTQ_BACKENDS)
    assert found[0].name == "auto"
    by_name = {b.name: b for b in found}
    assert by_name["torch"].usable
    assert by_name["torch"].error is not None
    assert by_name["torch"].error < 0.001
    for name in ("triton", "exllama_v2", "marlin", "machete", "bitblas"):
        assert not by_name[name].usable
        assert "runs on CUDA" in by_name[name].reason
        assert "on the cpu" in by_name[name].reason
    assert "no ExLlama v1 any more" in by_name["exllama_v1"].reason


def test_a_wrong_kernel_is_found_and_not_used() -> None:
    """gptqmodel's fused kernel is wrong with zero points of its own; when it is mended this test says so."""
    precision = wb.GPTQ(group_size=-1, sym=False)
    fused = next(b for b in backends(precision, SHAPES) if b.name == "torch_fused")
    assert not fused.usable
    assert fused.error is not None
    assert fused.error > 0.3
    backend, lines = choose_backend(precision, SHAPES, devices=["cpu"], dtype="float16")
    assert backend == "gptq_torch"
    assert any("TorchFusedLinear multiplies WRONG" in line and "It is not used" in line for line in lines)
    with pytest.raises(ValueError, match=r"backend='torch_fused' cannot be used: .* WRONG .* Take backend='auto'"):
        choose_backend(
            wb.GPTQ(group_size=-1, sym=False, backend="torch_fused"), SHAPES, devices=["cpu"], dtype="float16"
        )


def test_a_kernel_that_fails_says_why_and_gets_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [torch.OutOfMemoryError("no memory left"), RuntimeError("no such instruction")]

    class Failing:
        def __init__(self, *_: object, **__: object) -> None:
            raise failures.pop(0)

    monkeypatch.setattr(kernels, "_candidate", lambda *_, **__: (Failing, ""))
    for reason in ("no memory left", "no such instruction", "no such instruction"):
        found = next(kernels._tried(wb.GPTQ(group_size=32), ((64, 128),), ("cpu",), "float16", adapters=False))
        assert (found.usable, found.reason) == (False, f"Failing cannot run here: {reason}.")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("group_size", "desc_act"), [(32, False), (32, True), (-1, False)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_there_is_always_a_right_one(bits: int, group_size: int, dtype: str, *, sym: bool, desc_act: bool) -> None:
    precision = wb.GPTQ(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    backend, lines = choose_backend(precision, [(64, 64)], devices=["cpu"], dtype=dtype)
    assert backend in {library_backend(name) for name in GPTQ_BACKENDS}
    assert lines[0].startswith("Kernel: ")


def test_auto_is_as_exact_as_the_model() -> None:
    precision = wb.GPTQ(group_size=32)
    backend, lines = choose_backend(precision, SHAPES, devices=["cpu"], dtype="float16")
    assert backend != "gptq_torch_aten"
    assert any("computes more coarsely than float16" in line for line in lines)
    assert choose_backend(precision, SHAPES, devices=["cpu"], dtype="bfloat16")[0] == "gptq_torch_aten"
    coarse = wb.GPTQ(group_size=32, backend="torch_aten")
    assert choose_backend(coarse, SHAPES, devices=["cpu"], dtype="float16")[0] == "gptq_torch_aten"


def test_exllama_wants_all_of_the_model_on_gpus() -> None:
    found = backends(wb.GPTQ(), SHAPES, devices=[0, "cpu"], check=False)
    assert "needs the whole model on GPUs" in next(b for b in found if b.name == "exllama_v2").reason


def test_adapters_switch_off_kernels_without_gradients() -> None:
    on_gpu = {b.name: b for b in backends(wb.GPTQ(), SHAPES, devices=[0], adapters=True, check=False)}
    for name in ("exllama_v2", "marlin"):
        assert not on_gpu[name].usable
        assert f"{name} is switched off for adapters" in on_gpu[name].reason
    here = {b.name: b.usable for b in backends(wb.GPTQ(), SHAPES, adapters=True, check=False)}
    assert here["torch"]
    assert not here["torch_int8"]
    with pytest.raises(ValueError, match=r"'torch_int8' cannot be used: torch_int8 is switched off for adapters"):
        choose_backend(wb.GPTQ(backend="torch_int8"), SHAPES, devices=["cpu"], dtype="bfloat16", adapters=True)


def test_shapes_decide() -> None:
    found = {b.name: b for b in backends(wb.GPTQ(group_size=256), [(64, 512)])}
    assert not found["torch_fused"].usable
    assert "256" in found["torch_fused"].reason
    assert found["torch"].usable


def test_names() -> None:
    with pytest.raises(ValueError, match="backend is one of 'auto', 'torch'"):
        wb.GPTQ(backend="exlama")
