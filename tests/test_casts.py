"""What becomes of the parameters, said and seen; and which modules are left alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb
from workbench.casts import conversions, left_alone

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workbench.precision import Precision

SMALL = wb.Workload(context_length=128)


@pytest.mark.parametrize(
    ("precision", "said", "dtypes"),
    [
        # 21 parameters: the embedding, the head, a last norm, and in each of two layers seven matrices and two norms
        (wb.FullPrecision(), ["21 parameters stay bfloat16"], {"bfloat16": 21}),
        (wb.FullPrecision(dtype="float32"), ["21 parameters are cast from bfloat16 to float32"], {"float32": 21}),
        (
            wb.Int8(skip_modules=("lm_head", "k_proj")),
            ["12 weights become int8, with a float32 scale for each row", "9 other parameters stay bfloat16"],
            {"int8": 12, "bfloat16": 9},
        ),
        (
            wb.FourBit(quant_storage="float16", compute_dtype="float32"),
            [
                "14 weights become nf4, two to a byte (float16), with an 8-bit scale",
                "multiplied in float32 (as chosen)",
            ],
            {"float16": 14, "bfloat16": 7},
        ),
    ],
)
def test_said_and_seen(precision: Precision, said: list[str], dtypes: dict[str, int], tiny_llama: Path) -> None:
    lines = conversions(wb.read_skeleton(str(tiny_llama)), precision)
    assert lines[0] == 'dtype="auto" is bfloat16 here, as its config says.'
    for sentence in said:
        assert any(sentence in line for line in lines), lines
    session = wb.load(wb.Recipe(model=str(tiny_llama), precision=precision, workload=SMALL))
    found = Counter(str(p.dtype).removeprefix("torch.") for p in session.model.parameters())
    session.unload()
    assert found == dtypes


def test_what_stays_in_float32_is_said(tiny_model: Callable[[str], Path]) -> None:
    skeleton = wb.read_skeleton(str(tiny_model("ernie-moe")))  # routers that are float32 whatever is asked for
    assert any(line.startswith("Kept in float32") for line in conversions(skeleton, wb.FullPrecision()))


def test_left_alone(tiny_llama: Path) -> None:
    skeleton: Any = wb.read_skeleton(str(tiny_llama))
    assert left_alone(skeleton, wb.Int8()) == {"lm_head"}
    assert left_alone(skeleton, wb.GPTQ()) == {"lm_head"}
    named = left_alone(skeleton, wb.Int8(skip_modules=("lm_head", "model.layers.1.mlp", "v_proj")))
    assert named == {
        "lm_head",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
        *(f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)),
    }


def test_a_compute_type_that_a_gpu_does_not_have(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), workload=SMALL, max_memory={0: "1GiB"})
    old, new = wb.Machine.preset("Colab T4"), wb.Machine.preset("L4")
    chosen = recipe.with_(precision=wb.FourBit(compute_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"compute_dtype='bfloat16' is not for Tesla T4, .*: take 'float16'"):
        wb.place(chosen, machine=old)
    assert wb.place(chosen, machine=new).verdict == "fits"
    assert wb.place(recipe.with_(precision=wb.FourBit(compute_dtype="float16")), machine=old).verdict == "fits"
