from __future__ import annotations

from typing import Any

import pytest

import workbench as wb
from workbench.precision import precision_from_dict, precision_to_dict


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: wb.Int8(threshold=20.5), "threshold is a number from 0 to 20"),
        (lambda: wb.Int8(threshold=-1), "threshold is a number from 0 to 20"),
        (lambda: wb.Int8(threshold=True), "threshold is a number from 0 to 20"),
        (lambda: wb.Int8(threshold=float("nan")), "threshold is a number from 0 to 20"),
        (lambda: wb.Int8(skip_modules="lm_head"), "skip_modules is a sequence of module names"),
        (lambda: wb.FourBit(quant_type="nf5"), "quant_type is one of 'nf4', 'fp4', not 'nf5'"),
        (lambda: wb.FourBit(compute_dtype="int8"), "compute_dtype is one of"),
        (lambda: wb.FourBit(quant_storage="int4"), "quant_storage is one of 'uint8', 'float16'"),
        (lambda: wb.FourBit(double_quant=1), "double_quant is True or False, not 1"),
        (lambda: wb.Int8(has_fp16_weight="no"), "has_fp16_weight is True or False, not 'no'"),
        (lambda: wb.FullPrecision(dtype="float8"), "dtype is one of 'auto', 'float32'"),
    ],
)
def test_options_out_of_range(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_unknown_options_list_the_valid_ones() -> None:
    with pytest.raises(TypeError, match=r"Int8 has no option 'treshold'. Did you mean 'threshold'\? Valid options: .*"):
        wb.Int8(treshold=6.0)
    with pytest.raises(TypeError, match="Valid options: quant_type, double_quant, compute_dtype, quant_storage, skip"):
        wb.FourBit(group_size=64)


def test_int8_bytes_by_hand() -> None:
    # 3 x 4 int8 values and 3 float32 row scales
    assert wb.Int8().quantized_bytes((3, 4)) == 3 * 4 + 3 * 4


def test_four_bit_bytes_by_hand() -> None:
    # 576 x 1536 = 884,736 weights: half as many bytes; 13,824 blocks of 64; a table of 16 float32
    plain = wb.FourBit(double_quant=False).quantized_bytes((576, 1536))
    assert plain == 442_368 + 4 * 13_824 + 64
    # double: one byte a block, 54 nested blocks of 256 with float32, their table of 256 float32, the float32 offset
    double = wb.FourBit().quantized_bytes((576, 1536))
    assert double == 442_368 + 13_824 + 4 * 54 + 64 + 1024 + 4
    # blocks that are not full count whole: 65 weights are 33 bytes and 2 blocks
    assert wb.FourBit(double_quant=False).quantized_bytes((1, 65)) == 33 + 8 + 64


def test_config_says_what_the_options_say() -> None:
    config = wb.Int8(threshold=3, skip_modules=("lm_head", "q_proj"), fp32_cpu_offload=True).to_config("bfloat16")
    assert config.load_in_8bit
    assert config.llm_int8_threshold == 3.0
    assert config.llm_int8_skip_modules == ["lm_head", "q_proj"]
    assert config.llm_int8_enable_fp32_cpu_offload
    four = wb.FourBit(quant_type="fp4", double_quant=False).to_config("float16")
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", False)
    assert str(four.bnb_4bit_compute_dtype) == "torch.float16"
    assert four.llm_int8_skip_modules is None
    assert wb.FullPrecision().to_config("float16") is None


@pytest.mark.parametrize(
    "precision",
    [
        wb.Int8(threshold=3.5, skip_modules=("lm_head",), fp32_cpu_offload=True),
        wb.FourBit(quant_type="fp4", double_quant=False, compute_dtype="float16", skip_modules=("lm_head",)),
        wb.Int8(has_fp16_weight=True),
        wb.FourBit(quant_storage="bfloat16"),
    ],
)
def test_exported_lines_make_the_same_config(precision: wb.Int8 | wb.FourBit) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    scope: dict[str, Any] = {"torch": torch, "BitsAndBytesConfig": BitsAndBytesConfig}
    exec("\n".join(precision.to_python("bfloat16")), scope)  # noqa: S102 - running it is the point
    assert scope["quantization_config"].to_dict() == precision.to_config("bfloat16").to_dict()


@pytest.mark.parametrize("precision", [wb.FullPrecision(dtype="float16"), wb.Int8(threshold=1), wb.FourBit()])
def test_round_trip(precision: Any) -> None:
    assert precision_from_dict(precision_to_dict(precision)) == precision


def test_unknown_method() -> None:
    offered = "'full', 'int8', '4bit', 'gptq', 'torchao', 'hqq'"
    with pytest.raises(ValueError, match=f"precision.method is one of {offered}, not 'int3'"):
        precision_from_dict({"method": "int3"})
