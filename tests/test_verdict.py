"""The verdict says in numbers what is the matter, and what it advises works."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import transformers

from workbench.hardware import Device, Machine, parse_bytes
from workbench.placement import Placement, place
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.recipe import Recipe
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workbench.verdict import Advice

BIG = 2**40
PRESETS = ("Colab T4", "Kaggle 2x T4", "2x RTX 4090", "16 GB laptop", "8x A100 80 GB", "A100 40 GB")


def machine(**free_bytes: int) -> Machine:
    """Devices by name (``gpu0``, ``cpu``, ``disk``) with what each has to give."""
    return Machine(
        devices=tuple(
            Device(
                id=int(name.removeprefix("gpu")) if name.startswith("gpu") else name,
                name=name,
                total_bytes=BIG,
                free_bytes=free,
                reserved_bytes=0,
                reserved_for="",
                bandwidth_bytes_per_s=None,
                source="",
            )
            for name, free in free_bytes.items()
        )
    )


def placed(folder: Path, max_memory: Any, on: Machine | None = None, **choices: Any) -> Placement:
    recipe = Recipe(
        **{"model": str(folder), "max_memory": max_memory, "workload": Workload(context_length=16), **choices}
    )
    return place(recipe, machine=on or machine(gpu0=BIG, gpu1=BIG, cpu=BIG, disk=BIG))


def kib(size_bytes: int) -> str:
    return f"{-(-size_bytes // 1024)} KiB"


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of models of real size; nothing of them but the config exists."""
    configs = {
        "llama-7b": transformers.LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16"),
        "gemma3": transformers.Gemma3TextConfig(architectures=["Gemma3ForCausalLM"], dtype="bfloat16"),
        "mixtral-8x7b": transformers.MixtralConfig(architectures=["MixtralForCausalLM"], dtype="bfloat16"),
    }
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp("configs") / name
        config.save_pretrained(folders[name])
    return folders


def test_fits_says_where_and_how_full(tiny_model: Callable[[str], Path]) -> None:
    placement = placed(tiny_model("llama"), {0: "1GiB"}, machine(gpu0=2**30, cpu=BIG))

    assert placement.verdict == "fits"
    assert placement.summary == f"Fits on cuda:0 ({kib(placement.memory[0].used_bytes)} of 1.0 GiB)."
    assert placement.advice == ()


def test_offloads_says_what_waits_where(tiny_model: Callable[[str], Path]) -> None:
    placement = placed(tiny_model("llama"), {0: 250_000, "cpu": "1GiB"})

    first, last = placement.waiting[0], placement.waiting[-1]
    size = kib(sum(layer.bytes_after for layer in placement.waiting))
    assert placement.verdict == "offloads"
    assert placement.summary == f"Offloads: {first.name} to {last.name} ({size}) waits on cpu and is fetched to run."

    # More RAM brings nothing to where it runs.
    full = placed(tiny_model("llama"), {0: 250_000, "cpu": "1GiB"}, machine(gpu0=250_000, cpu=BIG))
    assert full.verdict == "offloads"
    assert not [text for text in full.advice or () if text.startswith("Raise cpu")]


def test_a_map_that_goes_back_and_forth_is_named(tiny_llama: Path) -> None:
    back = {"model": 0, "model.layers.1": 1, "lm_head": "cpu"}  # what waits on the CPU runs on the first GPU
    placement = placed(tiny_llama, None, strategy="custom", device_map=back)
    assert [text for text in placement.advice or () if "hands the hidden states over 2 times, where 1 would do" in text]


def test_quantized_layers_do_not_wait_unless_they_may_be_kept_unquantized(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    budget = {0: 200_000, "cpu": "1GiB"}
    placement = placed(folder, budget, precision=Int8())

    first, last = placement.waiting[0].name, placement.waiting[-1].name
    assert placement.verdict == "does_not_fit"
    assert placement.summary == (
        f"Does not fit: {first} to {last} would wait on cpu, where bitsandbytes does not quantize unless "
        "fp32_cpu_offload is on."
    )
    assert "Set fp32_cpu_offload=True to keep those modules unquantized." in placement.advice

    keeping = placed(folder, budget, precision=Int8(fp32_cpu_offload=True))
    assert keeping.verdict == "offloads"
    assert keeping.device_map == placement.device_map
    for layer in keeping.layers:
        decoder = layer.class_name == "LlamaDecoderLayer"
        assert layer.quantized == (decoder and layer.device == 0)
        # Worked out in test_sizes.py.
        assert layer.bytes_after == (39_168 if layer.quantized else layer.bytes_before)
    # What does not fit as int8 on the CPU alone may go there as int8: nothing waits without a GPU.
    assert placed(folder, {"cpu": "1GiB"}, precision=Int8()).verdict == "fits"


def test_one_device_could_take_it_all(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    # 287,936 bytes in int8, under which transformers uses nine tenths of a budget: 270,000.
    placement = placed(folder, {0: 300_000, "cpu": "1GiB"}, precision=Int8())

    assert placement.verdict == "does_not_fit"
    (advice,) = (text for text in placement.advice if text.startswith("All of it"))
    whole = placed(folder, {0: 300_000, "cpu": "1GiB"}, precision=Int8(), strategy="custom", device_map={"": 0})
    assert whole.verdict == "fits"
    assert whole.total_bytes == 287_936
    used = kib(whole.memory[0].used_bytes)
    assert (
        advice == f'All of it would fit on cuda:0 ({used} of 1024.0 GiB): strategy="custom" with device_map={{"": 0}}.'
    )


def test_what_waits_on_disk_needs_a_device_that_runs_it(tiny_model: Callable[[str], Path]) -> None:
    for budget in ({"disk": "1GiB"}, {0: 1000, "disk": "1GiB"}):
        placement = placed(tiny_model("llama"), budget)
        assert placement.device_map == {"": "disk"}
        assert placement.verdict == "does_not_fit"
        assert placement.summary == (
            "Does not fit: what waits on disk would run on the CPU, which max_memory leaves out."
        )
        assert 'Add "cpu" to max_memory to let layers wait in RAM.' in placement.advice
    assert placed(tiny_model("llama"), {"cpu": "1MiB", "disk": "1GiB"}).verdict == "fits"


def test_a_budget_past_what_is_there_is_named(tiny_model: Callable[[str], Path]) -> None:
    placement = placed(tiny_model("llama"), {0: "20GiB"}, machine(gpu0=2**30, cpu=BIG))

    assert placement.verdict == "fits"
    assert placement.advice[0] == (
        "The budget of cuda:0 (20.0 GiB) is more than the 1.0 GiB that it has to give: lower it."
    )


@pytest.mark.parametrize(("name", "share"), [("mixtral", "%"), ("falcon", "100 %")])
def test_a_method_that_leaves_most_of_a_model_alone_is_named(
    name: str, share: str, tiny_model: Callable[[str], Path]
) -> None:
    summary = placed(tiny_model(name), {0: "1GiB"}, precision=FourBit()).summary

    what = "experts" if name == "mixtral" else "weights"
    assert re.search(
        rf"\. \d+ % of this model are {what} that bitsandbytes does not quantize: as nf4 .* it takes", summary
    )
    assert share in summary
    assert "%" not in placed(tiny_model(name), {0: "1GiB"}).summary


def test_smaller_precisions_are_offered_where_they_would_help(full_size: dict[str, Path]) -> None:
    # 6.7 billion weights: 12.6 GiB in bfloat16; the T4 has 13.8 GiB to give in all.
    on = Machine.preset("Colab T4")
    placement = placed(full_size["llama-7b"], {0: "10GiB"}, on)
    assert placement.verdict == "does_not_fit"
    assert "int8 would take 6.5 GiB in place of 12.6 GiB." in placement.advice
    assert placed(full_size["llama-7b"], {0: "10GiB"}, on, precision=Int8()).verdict == "fits"


def test_rounding_does_not_break_the_advice(tiny_model: Callable[[str], Path]) -> None:
    """Budgets are said in whole KiB: each that is advised has to work as it is said, for any budget near it."""
    for limit in range(300_000, 301_100, 100):
        placement = placed(tiny_model("llama"), {0: limit}, machine(gpu0=BIG, cpu=100_000))
        advised = [text for text in placement.advice if text.startswith("Raise cuda:0")]
        assert advised, placement.summary
        assert apply(advised[0], placement).verdict == "fits"


def apply(advice: Advice, placement: Placement) -> Placement | None:
    """What comes of following a piece of advice to the letter, as its button does; None if there is nothing to try."""
    recipe, on = placement.recipe, placement.machine
    limits: dict[Any, Any] = {device: memory.limit_bytes for device, memory in placement.memory.items()}
    devices = {device.label: device.id for device in on.devices}
    size = r"([\d.]+ [KMG]iB)"
    if advice.startswith("Raise "):
        changes = re.findall(rf"(\S+) from {size} to {size}", advice)
        assert changes
        recipe = recipe.with_(max_memory={**limits, **{devices[d]: parse_bytes(to) for d, _, to in changes}})
    elif advice.startswith("Lower the budget of "):
        changes = re.findall(rf"of (\S+) to at most {size}", advice)
        assert changes
        recipe = recipe.with_(max_memory={**limits, **{devices[d]: parse_bytes(to) for d, to in changes}})
    elif match := re.match(r'Add "(\w+)" to max_memory', advice):
        recipe = recipe.with_(max_memory={**limits, match[1]: on.device(match[1]).budget_bytes})
    elif match := re.search(r'device_map=\{"": (\S+)\}', advice):
        home = match[1].strip("'")
        recipe = recipe.with_(strategy="custom", device_map={"": int(home) if home.isdecimal() else home})
    elif match := re.match(r"A context of ([\d,]+) tokens would fit", advice):
        recipe = recipe.with_(workload=replace(recipe.workload, context_length=int(match[1].replace(",", ""))))
    elif match := re.match(r'strategy="(\w+)"', advice):
        recipe = recipe.with_(strategy=match[1])
    elif advice.startswith("Set fp32_cpu_offload=True"):
        assert not isinstance(recipe.precision, FullPrecision)
        recipe = recipe.with_(precision=replace(recipe.precision, fp32_cpu_offload=True))
    else:
        return None
    assert advice.apply(placement.recipe) == recipe, advice
    return place(recipe, machine=on)


def test_all_advice_works(full_size: dict[str, Path]) -> None:
    chance = random.Random(3)  # noqa: S311 - the same cases each time, no secret
    followed: dict[str, int] = {}
    verdicts = set()
    for _ in range(250):
        on = Machine.preset(chance.choice(PRESETS))
        offered = [device for device in on.devices if chance.random() < 0.6] or [on.devices[0]]
        recipe = Recipe(
            model=str(full_size[chance.choice(list(full_size))]),
            precision=chance.choice([FullPrecision(), Int8(), FourBit(), FourBit(fp32_cpu_offload=True)]),
            strategy=chance.choice(["auto", "balanced", "sequential"]),
            max_memory={device.id: int(device.budget_bytes * chance.uniform(0.05, 1)) for device in offered},
            workload=Workload(context_length=chance.choice([128, 2048]), batch_size=chance.choice([1, 1, 8, 64])),
        )
        placement = place(recipe, machine=on)
        verdicts.add(placement.verdict)
        for advice in placement.advice:
            after = apply(advice, placement)
            if after is None:
                continue
            kind = advice.split()[0]
            followed[kind] = followed.get(kind, 0) + 1
            wanted = ("fits",) if kind == "All" else ("fits", "offloads")
            assert after.verdict in wanted, f"{recipe}\n{placement.summary}\n{advice}\n-> {after.summary}"
            if kind == "Raise" and placement.verdict == "offloads":
                assert sum(x.bytes_after for x in after.waiting) < sum(x.bytes_after for x in placement.waiting), advice

    assert verdicts == {"fits", "offloads", "does_not_fit"}
    assert set(followed) >= {"Raise", "Lower", "Add", "A", "Set", "All", 'strategy="packed"'}, followed
