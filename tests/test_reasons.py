"""A layer's reason names a change that brings it to a faster device, and no smaller one does."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from workbench.hardware import Machine
from workbench.placement import Placement, place
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.reasons import why
from workbench.recipe import Recipe
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EIGHT = Machine.preset("8x A100 80 GB")


def placed(folder: Path, budgets: dict[Any, int | str], **choices: Any) -> Placement:
    recipe = Recipe(model=str(folder), max_memory=budgets, workload=Workload(context_length=16), **choices)
    return place(recipe, machine=EIGHT, measure=False, advice=False)


def home(placement: Placement, layer: str) -> int:
    """How far down the devices a layer is; what has no room is past the last."""
    order = list(placement.memory)
    device = next(each.device for each in placement.layers if each.name == layer)
    return len(order) if device is None else order.index(device)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3"])
def test_the_change_that_is_named_is_the_smallest(name: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(name)
    chance = random.Random(5)  # noqa: S311 - the same cases each time, no secret
    total = placed(folder, {0: "1GiB"}).total_bytes
    moved = 0
    for _ in range(8):
        budgets: dict[Any, Any] = {d: int(chance.uniform(0.1, 0.7) * total) for d in (0, 1, "cpu")}
        precision = chance.choice([FullPrecision(), Int8(fp32_cpu_offload=True), FourBit(fp32_cpu_offload=True)])
        strategy = chance.choice(["auto", "sequential", "packed"])
        placement = placed(folder, budgets, precision=precision, strategy=strategy)
        for layer in (placement.layers[0].name, placement.layers[-1].name, placement.layers[3].name):
            reason = why(placement, layer)
            assert reason.layer == layer
            assert reason.sentence.endswith(".")
            for device, short in reason.short_bytes.items():
                more = placed(
                    folder, {**budgets, device: budgets[device] + short}, precision=precision, strategy=strategy
                )
                assert home(more, layer) < home(placement, layer), reason
                less = placed(
                    folder, {**budgets, device: budgets[device] + short - 1}, precision=precision, strategy=strategy
                )
                assert home(less, layer) >= home(placement, layer), reason
                moved += 1
            if reason.advice is not None:
                followed = place(reason.advice.apply(placement.recipe), machine=EIGHT, measure=False, advice=False)
                assert home(followed, layer) < home(placement, layer), reason
    assert moved > 5


def test_reasons_in_words(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    total = placed(folder, {0: "1GiB"}).total_bytes
    whole = placed(folder, {0: "1GiB", 1: "1GiB"})
    last = whole.layers[-1].name
    assert "has room" in why(whole, whole.layers[0].name).sentence
    assert "gives each GPU a like share" in why(whole, last).sentence
    assert why(whole, last).advice is None

    spilled = placed(folder, {0: total // 2, "cpu": "1GiB"}, strategy="sequential")
    reason = why(spilled, last)
    assert reason.device == "cpu"
    assert reason.sentence.startswith("cuda:0 is short by ")
    assert "room for the largest layer" in reason.sentence

    mine = placed(folder, {0: "1GiB", "cpu": "1GiB"}, strategy="custom", device_map={"": "cpu"})
    assert why(mine, last).sentence == "Your device_map puts it on cpu."
    mine = placed(folder, {0: "1GiB", "cpu": "1GiB"}, strategy="custom", device_map={"": 0})
    assert why(mine, last).sentence == "Your device_map puts it on cuda:0."
    with pytest.raises(ValueError, match=r"no layer .model.layers.99.; close are"):
        why(whole, "model.layers.99")
