from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb
from workbench.quantize_4bit import fast_quantization, quantize

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = [(1,), (3, 5), (64,), (65,), (7, 64), (5, 7, 9), (333, 333), (1000, 64)]


def bitsandbytes_own(weight: Any, quant_type: str, storage: Any) -> tuple[Any, Any]:
    import bitsandbytes  # noqa: F401 - defines the operator
    import torch

    found: tuple[Any, Any] = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, quant_type, storage)
    return found


def weights(kind: str, shape: tuple[int, ...]) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    found = 0.02 * torch.randn(shape, generator=generator)
    flat = found.view(-1)
    if kind == "zeros":
        flat[::3] = 0
        flat[:64] = 0
    elif kind == "infinite":
        flat[-1] = float("inf")
    elif kind == "no-number":
        flat[0] = float("nan")
    elif kind == "tiny":
        found *= 1e-38
    elif kind == "even":  # many fall on bounds between codes
        found = torch.round(torch.rand(shape, generator=generator) * 32 - 16) / 16
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: str, quant_type: str) -> None:
    import torch

    with ThreadPoolExecutor(2) as pool:
        for shape in SHAPES:
            for kind in ("normal", "zeros", "infinite", "no-number", "tiny", "even"):
                weight = weights(kind, shape).to(getattr(torch, dtype))
                storages = [torch.uint8, torch.bfloat16] if weight.numel() % 4 == 0 else [torch.uint8]
                for storage in storages:
                    codes, scales = bitsandbytes_own(weight, quant_type, storage)
                    ours, our_scales = quantize(weight, 64, quant_type, storage, pool=pool)
                    assert (ours.shape, ours.dtype) == (codes.shape, codes.dtype)
                    assert torch.equal(ours.view(torch.uint8), codes.view(torch.uint8)), (shape, kind)
                    assert torch.equal(our_scales.nan_to_num(-1), scales.nan_to_num(-1)), (shape, kind)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_bfloat16_beside_every_bfloat16_scale(quant_type: str) -> None:
    """All values of bfloat16 from 1e-4 on, of both signs, in blocks scaled by each of its 128 mantissas."""
    import torch

    values = torch.arange(32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[(values.float() <= 2) & (values.float() > 1e-4)]
    for mantissa in range(128):
        scale = 1 + mantissa / 128
        within = values[values.float() <= scale]
        both = torch.cat((within, -within))
        both = both[: both.numel() // 63 * 63].view(-1, 63)
        weight = torch.cat((torch.full((len(both), 1), scale, dtype=torch.bfloat16), both), dim=1)
        codes, scales = bitsandbytes_own(weight, quant_type, torch.uint8)
        ours, our_scales = quantize(weight, 64, quant_type, torch.uint8)
        assert torch.equal(ours, codes)
        assert torch.equal(our_scales, scales)


def tensors_of(model: Any) -> dict[str, Any]:
    """Every tensor of a model, quantization state included."""
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = tensor.data
        state = getattr(tensor, "quant_state", None)
        for part, value in ({} if state is None else state.as_dict(packed=False)).items():
            found[f"{name}.{part}"] = value
    return found


def assert_same_tensors(model: Any, other: Any) -> None:
    import torch

    ours, theirs = tensors_of(model), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


@pytest.mark.parametrize(
    "precision", [wb.FourBit(), wb.FourBit(quant_type="fp4", double_quant=False)], ids=["nf4-double", "fp4"]
)
def test_a_loaded_model_is_bit_for_bit_the_one_of_from_pretrained(tiny_llama: Path, precision: wb.FourBit) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=precision.to_config("bfloat16"),
    )
    session = wb.load(wb.Recipe(model=str(tiny_llama), precision=precision))
    assert_same_tensors(session.model, plain)
    session.unload()


def test_bitsandbytes_is_as_it_was_afterwards() -> None:
    import torch

    def has_kernel() -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU"))

    with fast_quantization():
        assert has_kernel()
    assert not has_kernel()
    with pytest.raises(RuntimeError, match="enough"), fast_quantization(_refuse):
        bitsandbytes_own(torch.ones(64, 64), "nf4", torch.uint8)
    assert not has_kernel()


def _refuse() -> None:
    raise RuntimeError("enough")
