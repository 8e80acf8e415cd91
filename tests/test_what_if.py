"""Curves and trees: what they show, without a browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from played_page import find, send, wait_for
from test_touch import BOX, GIB, device

import workbench as wb
from workbench.panels.compare import differences
from workbench.panels.curves import MovedOn, context_growth, growth_svg, resident_share, sweep_budget, sweep_svg
from workbench.panels.tree import kind_of, kinds_by_block, module_tree, visible_rows
from workbench.panels.what_if import Latest
from workbench.sizes import sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 2**20


def small(name: int | str, size_bytes: int) -> wb.Device:
    return device(name, size_bytes)


def test_the_context_grows_until_a_device_is_overfull(tiny_llama: Path) -> None:
    # 279,168 bytes of weights, and 256 bytes of cache a token: 2 layers x (key, value) x 2 heads x 16 x 2 bytes.
    machine = wb.Machine(name="tight", devices=(small(0, 700_000), small("cpu", GIB)))
    recipe = wb.Recipe(model=str(tiny_llama), max_memory={0: 700_000}, workload=wb.Workload(context_length=256))
    skeleton = wb.read_skeleton(recipe.model)
    placement = wb.place(recipe, machine=machine, skeleton=skeleton)
    growth = context_growth(placement, skeleton)
    assert growth is not None
    quantized = recipe.with_(workload=wb.Workload(context_length=256, cache="quantized"))
    half = context_growth(wb.place(quantized, machine=machine, skeleton=skeleton), skeleton)
    assert half is not None
    assert half.used_bytes[0][-1] <= growth.used_bytes[0][-1] - 2048 * 128  # a byte a number, as the preview has it
    assert (growth.tokens[0], growth.tokens[-1], growth.now, growth.limit) == (128, 2048, 256, 2048)
    assert 256 < growth.longest < 2048
    assert growth.full_first == 0
    assert f"up to {growth.longest:,} tokens; then cuda:0 is overfull" in growth.sentence
    assert list(growth.used_bytes[0]) == sorted(growth.used_bytes[0])
    at = growth.tokens.index(256)
    assert growth.used_bytes[0][at] == placement.memory[0].used_bytes
    svg = growth_svg(growth)
    assert f"spills past {growth.longest:,}" in svg
    assert "100 %" in svg
    assert ">cuda:0<" in svg
    with pytest.raises(MovedOn):
        context_growth(placement, skeleton, lambda: True)


def test_a_context_that_never_spills_is_said_to_be_the_models(tiny_llama: Path) -> None:
    skeleton = wb.read_skeleton(str(tiny_llama))
    placement = wb.place(wb.Recipe(model=str(tiny_llama)), machine=BOX, skeleton=skeleton)
    growth = context_growth(placement, skeleton)
    assert growth is not None
    assert growth.sentence == "This map works up to 2,048 tokens, which is all that the model allows."
    assert "spills" not in growth_svg(growth)
    unknown = wb.place(wb.Recipe(model=str(tiny_llama)), machine=BOX, skeleton=skeleton, measure=False)
    if unknown.kv_cache_bytes is None:  # else an earlier test has measured it
        assert context_growth(unknown, skeleton) is None


def test_a_swept_budget_goes_from_nothing_to_all_and_marks_the_present(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), max_memory={0: 220_000, "cpu": "1GiB"})
    skeleton = wb.read_skeleton(recipe.model)
    placement = wb.place(recipe, machine=BOX, skeleton=skeleton)
    assert 0 < resident_share(placement) < 1
    sweep = sweep_budget(placement, skeleton, 0)
    assert sweep.points[0].budget_bytes == 0
    assert sweep.points[sweep.now].budget_bytes == 220_000
    assert sweep.points[sweep.now].resident == pytest.approx(resident_share(placement))
    assert sweep.points[-1].resident == 1.0
    shares = [point.resident for point in sweep.points]
    assert shares == sorted(shares)
    speeds = [point.tokens_per_second for point in sweep.points if point.tokens_per_second is not None]
    assert speeds[-1] == max(speeds)
    svg = sweep_svg(sweep)
    assert "budget of cuda:0" in svg
    assert len(re.findall("<circle", svg)) == 1
    with pytest.raises(ValueError, match="tick the device"):
        sweep_budget(placement, skeleton, "disk")
    with pytest.raises(MovedOn):
        sweep_budget(placement, skeleton, 0, lambda: True)


def test_the_latest_job_is_done_and_older_ones_are_given_up() -> None:
    done: list[str] = []
    latest = Latest("workbench-test")
    for name in "abc":
        latest.ask(lambda _, name=name: done.append(name))  # type: ignore[misc]
    wait_for(lambda: done)
    gone: list[bool] = []

    def slow(moved_on: Callable[[], bool]) -> None:
        done.append("slow")
        wait_for(moved_on)
        gone.append(moved_on())

    latest.ask(slow)
    wait_for(lambda: "slow" in done)
    latest.ask(lambda _: done.append("last"))
    wait_for(lambda: "last" in done)
    assert done == ["c", "slow", "last"]
    assert gone == [True]
    latest.close()


def test_the_panel_works_only_when_it_is_seen(tiny_llama: Path) -> None:
    bench = wb.Workbench(wb.Recipe(model=str(tiny_llama), max_memory={0: "1GiB", "cpu": "1GiB"}), BOX)
    try:
        assert bench.placement is not None
        assert find(bench, "wb-sweep").value == ""
        send(bench._tabs, selected_index=bench._tabs.titles.index("What if"))
        wait_for(lambda: "<svg" in find(bench, "wb-sweep").value)
        assert "<svg" in find(bench, "wb-growth").value
        slider = find(bench, "wb-what-if-context")
        assert 2**slider.max == 2048
        send(slider, value=1000.0)
        assert bench.recipe.workload.context_length == 1024
        assert find(bench, "wb-context").value == 1024
        wait_for(lambda: bench._what_if._done[0] == bench.recipe)
    finally:
        bench.close()


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.self_attention.query_key_value.weight", "attention"),
        ("model.layers.0.self_attn.q_a_layernorm.weight", "norm"),
        ("model.layers.0.mlp.gate_proj.weight", "MLP"),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "experts"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("transformer.ln_f.weight", "norm"),
        ("lm_head.weight", "head"),
        ("backbone.layers.0.mixer.A_log", "other"),
    ],
)
def test_what_a_tensor_is_part_of(tensor: str, kind: str) -> None:
    assert kind_of(tensor) == kind


def test_the_tree_adds_up_and_folds_long_lists(tiny_model: Callable[[str], Path]) -> None:
    skeleton = wb.read_skeleton(str(tiny_model("qwen3-moe")))
    precision = wb.FourBit()
    sizes = sizes_of(skeleton, precision)
    root = module_tree(sizes)
    workload = wb.Workload(context_length=64)
    recipe = wb.Recipe(model=str(tiny_model("qwen3-moe")), precision=precision, workload=workload)
    placement = wb.place(recipe, machine=BOX)
    assert root.after_bytes == placement.total_bytes
    assert root.before_bytes == sum(layer.bytes_before for layer in placement.layers)
    kinds = kinds_by_block(sizes)
    assert {layer.name: layer.bytes_after for layer in placement.layers if layer.bytes_after} == {
        name: sum(parts.values()) for name, parts in kinds.items() if sum(parts.values())
    }
    rows, more = visible_rows(root, (), "", placement.device_map)
    assert (more, [row["path"] for row in rows]) == (0, ["model", "lm_head"])
    opened = ["model", "model.layers", "model.layers.0"]
    paths = [row["path"] for row in visible_rows(root, opened, "", placement.device_map)[0]]
    assert "model.layers.0.mlp" in paths
    assert "model.layers.0.mlp.gate" not in paths
    found = visible_rows(root, (), "layers.1.mlp", placement.device_map)[0]
    assert [row["path"] for row in found] == ["model", "model.layers", "model.layers.1", "model.layers.1.mlp"]


class _Tensor:
    def __init__(self, name: str) -> None:
        self.name, self.before_bytes, self.after_bytes = name, 4, 1


class _Sizes:
    """What a model with unfused experts would have: 61 layers of 256."""

    tensors = tuple(
        _Tensor(f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")
        for layer in range(61)
        for expert in range(256)
    )


def test_many_experts_are_opened_group_by_group() -> None:
    root = module_tree(_Sizes())  # type: ignore[arg-type]
    layers = visible_rows(root, ["model", "model.layers"], "", {"": 0})[0]
    assert [row["label"] for row in layers[2:]] == ["0 to 15", "16 to 31", "32 to 47", "48 to 60"]
    opened = ["model", "model.layers", "model.layers.16 to 31", "model.layers.17", "model.layers.17.mlp"]
    rows, more = visible_rows(root, [*opened, "model.layers.17.mlp.experts"], "", {"": 0})
    assert sum(row["label"].startswith(("0 to", "16 to", "240 to")) for row in rows) == 5
    assert len(rows) < 60
    assert more == 0
    every = visible_rows(root, (), "up_proj", {"": 0})
    assert len(every[0]) == 400
    assert every[1] > 0
    assert all(row["homes"] == [["cuda:0", "#0072B2"]] for row in rows)


def test_differences_name_what_differs_and_nothing_else(tiny_llama: Path) -> None:
    recipe: Any = wb.Recipe(model=str(tiny_llama), max_memory={0: "1GiB", "cpu": "1GiB"})
    pinned = wb.place(recipe, machine=BOX)
    assert differences(pinned, pinned) == []
    now = wb.place(recipe.with_(precision=wb.FourBit(), max_memory={0: "1GiB"}), machine=BOX)
    rows = {what: (a, b, off) for what, a, b, off in differences(pinned, now)}
    assert rows["Precision"][:2] == (pinned.precision.label, now.precision.label)
    assert rows["cpu limit"] == ("1.0 GiB", "not used", "")
    assert rows["Weights"][2] == f"{now.total_bytes - pinned.total_bytes:+,} bytes"
    assert "Verdict" not in rows
