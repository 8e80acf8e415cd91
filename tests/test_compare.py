from __future__ import annotations

from typing import TYPE_CHECKING

import workbench as wb
from workbench.compare import longest_context

if TYPE_CHECKING:
    from pathlib import Path


def eight_billion(folder: Path) -> str:
    """An 8B Llama: config only."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return str(folder)


def test_best_first_on_a_card_that_is_too_small_for_full_precision(tmp_path: Path) -> None:
    recipe = wb.Recipe(model=eight_billion(tmp_path))
    fits = wb.what_fits(recipe, machine=wb.Machine.preset("RTX 3060 12 GB"))
    labels = [(fit.precision.label, fit.placement.verdict) for fit in fits]
    assert labels[0] == ("int8", "fits")
    assert labels[-1] == ("full precision", "does_not_fit")
    assert [fit.placement.recipe.with_(precision=recipe.precision) for fit in fits] == [recipe] * len(fits)


def test_the_longest_context_is_the_longest(tmp_path: Path) -> None:
    machine = wb.Machine.preset("RTX 3060 12 GB")
    recipe = wb.Recipe(model=eight_billion(tmp_path), precision=wb.FourBit())
    placement = wb.place(recipe, machine=machine)
    longest = longest_context(placement, wb.read_skeleton(recipe.model))
    assert longest is not None
    assert 2048 < longest < 131_072
    fixed = recipe.with_(strategy="custom", device_map=placement.device_map)

    def verdict(tokens: int) -> str:
        return wb.place(fixed.with_(workload=wb.Workload(context_length=tokens)), machine=machine).verdict

    assert verdict(longest) == "fits"
    assert verdict(longest + 1) == "does_not_fit"
    waits = wb.place(recipe.with_(workload=wb.Workload(cache="offloaded")), machine=machine)
    assert (longest_context(waits, wb.read_skeleton(recipe.model)) or 0) > longest


def test_a_model_that_always_fits_is_bounded_by_itself(tiny_llama: Path) -> None:
    fits = wb.what_fits(wb.Recipe(model=str(tiny_llama)), precisions=[wb.FullPrecision(), wb.FourBit()])
    assert [fit.precision for fit in fits] == [wb.FullPrecision(), wb.FourBit()]
    assert {fit.longest_context for fit in fits} == {2048}


def test_nothing_fits(tiny_llama: Path) -> None:
    fits = wb.what_fits(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "1KiB"}))
    assert {fit.placement.verdict for fit in fits} == {"does_not_fit"}
    assert {fit.longest_context for fit in fits} == {0}
    assert {fit.speed for fit in fits} == {None}


def test_a_custom_map_is_planned_anew(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), strategy="custom", device_map={"": "disk"})
    assert {fit.placement.verdict for fit in wb.what_fits(recipe)} == {"fits"}
