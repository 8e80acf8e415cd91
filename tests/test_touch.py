"""Hands in the picture, without a browser: the messages that the layer over the figure sends."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from played_page import choose, click, find, send, wait_for

import workbench as wb
from workbench.panels.moving import moved_map, tied_with
from workbench.sizes import sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GIB = 2**30
TINY = ["llama", "llama-tied", "gpt2", "qwen3-moe", "mixtral", "gemma3", "falcon", "deepseek-v3"]


def device(name: int | str, total_bytes: int = 16 * GIB) -> wb.Device:
    return wb.Device(
        id=name,
        name="Memory",
        total_bytes=total_bytes,
        free_bytes=total_bytes,
        reserved_bytes=0,
        reserved_for="nothing",
        bandwidth_bytes_per_s=10**11,
        source="made up",
    )


BOX = wb.Machine(name="box", devices=(device(0), device(1), device("cpu"), device("disk")))


@pytest.fixture
def bench(tiny_llama: Path) -> Iterator[wb.Workbench]:
    budgets = {0: "1GiB", 1: "1GiB", "cpu": "4GiB"}
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama), strategy="sequential", max_memory=budgets), BOX)
    wait_for(lambda: made._preview.chart is not None and made._state.settle(60))
    yield made
    made.close()


def tell(bench: wb.Workbench, **content: Any) -> None:
    """What the layer over the figure sends."""
    data = {"method": "custom", "content": content}
    find(bench, "wb-touch")._handle_msg({"content": {"data": data}, "buffers": []})


def said(bench: wb.Workbench) -> str:
    return str(find(bench, "wb-hand-said").value)


def homes(bench: wb.Workbench) -> dict[str, Any]:
    assert bench.placement is not None
    return {layer.name: layer.device for layer in bench.placement.layers}


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_moved_map_is_whole_and_moves_nothing_else(name: str, tiny_model: Callable[[str], Path]) -> None:
    recipe = wb.Recipe(model=str(tiny_model(name)), workload=wb.Workload(context_length=64))
    skeleton = wb.read_skeleton(recipe.model)
    before = wb.place(recipe, machine=BOX, skeleton=skeleton, measure=False, advice=False)
    wanted = [skeleton.decoder_blocks[0], skeleton.blocks[0].name]
    device_map = moved_map(before, skeleton, wanted, "cpu")
    after = wb.place(
        recipe.with_(strategy="custom", device_map=device_map), machine=BOX, skeleton=skeleton, measure=False
    )
    moved = set(tied_with(wanted, skeleton))
    assert {layer.name for layer in after.layers if layer.device == "cpu"} >= moved
    kept = {layer.name: layer.device for layer in before.layers if layer.name not in moved}
    assert {layer.name: layer.device for layer in after.layers if layer.name in kept} == kept
    assert not any(b.startswith(f"{a}.") for a, b in itertools.permutations(device_map, 2))
    assert after.total_bytes == sum(t.after_bytes for t in sizes_of(skeleton, recipe.precision).tensors)


def test_what_is_tied_comes_along(tiny_model: Callable[[str], Path]) -> None:
    skeleton = wb.read_skeleton(str(tiny_model("llama-tied")))
    assert tied_with(["lm_head"], skeleton) == ("model.embed_tokens", "lm_head")
    assert tied_with(["model.norm"], skeleton) == ("model.norm",)
    with pytest.raises(ValueError, match=r"has no layer 'model\.nothing'"):
        tied_with(["model.nothing"], skeleton)


def test_what_had_no_room_goes_to_the_last_device(tiny_llama: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), max_memory={0: 200_000})
    skeleton = wb.read_skeleton(recipe.model)
    before = wb.place(recipe, machine=BOX, skeleton=skeleton, measure=False, advice=False)
    assert before.unplaced
    device_map = moved_map(before, skeleton, ["model.layers.0"], 0)
    assert set(device_map.values()) == {0}
    after = wb.place(recipe.with_(strategy="custom", device_map=device_map), machine=BOX, skeleton=skeleton)
    assert (after.verdict, after.unplaced) == ("does_not_fit", ())
    with pytest.raises(ValueError, match="tick the device"):
        moved_map(before, skeleton, ["model.layers.0"], 1)


# --- the panel --------------------------------------------------------------------------------------------------------


def test_a_moved_range_makes_the_map_custom_and_says_so(bench: wb.Workbench) -> None:
    tell(bench, move=["model.layers.0", "model.layers.1"], device="cuda:1")
    assert bench.recipe.strategy == "custom"
    assert [homes(bench)[f"model.layers.{i}"] for i in (0, 1)] == [1, 1]
    assert find(bench, "wb-strategy").value == "custom"
    assert "Moved 2 layers" in said(bench)
    assert "to cuda:1" in said(bench)
    assert 'aria-live="polite"' in said(bench)
    assert homes(bench)["lm_head"] == 0
    assert "'model.layers.1': 1" in bench.recipe.to_python(bench.placement)


def test_undo_and_redo_walk_through_every_choice(bench: wb.Workbench) -> None:
    start = bench.recipe
    undo, redo = find(bench, "wb-undo"), find(bench, "wb-redo")
    assert (undo.disabled, redo.disabled) == (True, True)
    tell(bench, move=["lm_head"], device="cpu")
    tell(bench, move=["lm_head"], device="cuda:1")
    choose(find(bench, "wb-precision"), "int8")
    steps = [bench.recipe]
    for _ in range(3):
        click(undo)
        steps.append(bench.recipe)
    assert steps[1].precision == wb.FullPrecision()
    assert [step.device_map and step.device_map["lm_head"] for step in steps] == [1, 1, "cpu", None]
    assert bench.recipe == start
    assert undo.disabled
    tell(bench, redo=True)
    click(redo)
    assert bench.recipe == steps[1]
    send(find(bench, "wb-memory-cpu"), value=3.0)
    assert redo.disabled
    assert not undo.disabled


def test_a_drag_is_one_step_and_another_machine_begins_anew(bench: wb.Workbench) -> None:
    start, slider = bench.recipe, find(bench, "wb-memory-cuda-0")
    for gib in (1.5, 2.0, 2.5, 3.0):
        send(slider, value=gib)
    click(find(bench, "wb-undo"))
    assert bench.recipe == start
    choose(find(bench, "wb-machine"), "2x RTX 4090")
    assert find(bench, "wb-undo").disabled  # its devices have the same names, but they are others
    with pytest.raises(ValueError, match="nothing to undo"):
        bench._preview.hands.history.undo()


def test_back_to_auto_is_one_click(bench: wb.Workbench) -> None:
    auto = find(bench, "wb-auto")
    choose(find(bench, "wb-strategy"), "auto")
    assert auto.disabled
    before = homes(bench)
    tell(bench, move=["model.layers.1"], device="cpu")
    click(auto)
    assert (bench.recipe.strategy, bench.recipe.device_map) == ("auto", None)
    assert homes(bench) == before


def test_a_dragged_limit_is_the_sliders(bench: wb.Workbench) -> None:
    touch = find(bench, "wb-touch")
    send(touch, limit={"device": "cpu", "gib": 2.5})
    assert dict(bench.recipe.max_memory or {})["cpu"] == "2.5GiB"
    assert find(bench, "wb-memory-cpu").value == 2.5
    assert find(bench, "wb-memory-text-cpu").value == "2.5 GiB"
    bars = {bar["label"]: bar for bar in touch.picture["bars"]}
    assert bars["cpu"]["limit_bytes"] == 5 * GIB // 2
    send(find(bench, "wb-memory-cpu"), value=3.0)
    send(touch, limit={"device": "cpu", "gib": 2.5, "nth": 1})
    send(find(bench, "wb-memory-cpu"), value=3.0)
    send(touch, limit={"device": "cpu", "gib": 2.5, "nth": 2})  # to the same place again
    assert find(bench, "wb-memory-cpu").value == 2.5
    send(touch, limit={"device": "cuda:7", "gib": 1})
    assert "no cuda:7" in bench._state.problems["preview"]


def test_what_cannot_be_moved_is_refused_in_a_sentence(bench: wb.Workbench) -> None:
    before = bench.recipe
    tell(bench, move=["model.layers.0"], device="disk")
    assert "tick the device" in bench._state.problems["preview"]
    tell(bench, move=["model.layers.99"], device="cpu")
    assert "no layer" in bench._state.problems["preview"]
    assert bench.recipe == before
    tell(bench, move=["model.layers.0"], device="cpu")
    assert bench._state.problems["preview"] == ""


def test_why_is_answered_beside_everything(bench: wb.Workbench) -> None:
    tell(bench, why="lm_head")
    wait_for(lambda: "lm_head: It is on cuda:0" in said(bench))


def test_the_layer_over_the_figure_knows_every_block_and_limit(bench: wb.Workbench) -> None:
    picture = find(bench, "wb-touch").picture
    assert bench.placement is not None
    assert picture["names"] == [layer.name for layer in bench.placement.layers]
    assert picture["homes"] == ["cuda:0"] * len(picture["names"])
    assert [bar["label"] for bar in picture["bars"]] == ["cuda:0", "cuda:1", "cpu"]
    assert all(bar["most_gib"] == 16 for bar in picture["bars"])
    assert picture["count"] == len(picture["tips"])
    tell(bench, move=["model.layers.1"], device="cuda:1")
    picture = find(bench, "wb-touch").picture
    # 64 wide in bfloat16, from GPU 0 to GPU 1 and back.
    assert [text for _, _, text in picture["crossings"]] == [
        "hidden state: 1 KiB (128 bytes) a token from cuda:0 to cuda:1 after model.layers.0",
        "hidden state: 1 KiB (128 bytes) a token from cuda:1 to cuda:0 after model.layers.1",
    ]
    assert [(first, last, label) for first, last, label, *_ in picture["runs"]][1] == (2, 2, "cuda:1")


def test_kinds_are_shown_on_demand(bench: wb.Workbench) -> None:
    chart = bench._preview.chart
    assert chart is not None
    seen = {trace.name for trace in chart.figure.data if trace.visible is not False}
    assert "layers" in seen
    assert "attention" not in seen
    send(find(bench, "wb-kinds"), value=True)
    traces = {trace.name: trace for trace in chart.figure.data if trace.visible is not False}
    assert {"embedding", "attention", "MLP", "norm", "head"} <= set(traces)
    assert "layers" not in traces
    # A layer's attention is 12,288 and its MLP 24,576 parameters in bfloat16.
    assert traces["attention"].y[1] * 2**20 == pytest.approx(24_576)
    assert traces["MLP"].y[1] * 2**20 == pytest.approx(49_152)
    assert "attention" in find(bench, "wb-key").value
    send(find(bench, "wb-kinds"), value=False)
    assert {trace.name for trace in chart.figure.data if trace.visible is not False} == seen


def test_a_pinned_placement_stands_behind_and_in_a_table(bench: wb.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("workbench.panels.compare.read_skeleton")  # no model is read anew when something moves
    click(find(bench, "wb-pin"))
    assert "nothing differs" in find(bench, "wb-pinned").value
    tell(bench, move=["model.layers.0"], device="cpu")
    table = find(bench, "wb-pinned").value
    assert "<td>Strategy</td><td>sequential</td><td>custom</td>" in table
    assert "<td>1: model.layers.0</td>" in table
    # 36,864 + 128 parameters in bfloat16.
    assert "+73,984 bytes" in table
    chart = bench._preview.chart
    assert chart is not None
    assert next(trace for trace in chart.figure.data if trace.name == "pinned").visible
    click(find(bench, "wb-pin"))
    assert not next(trace for trace in chart.figure.data if trace.name == "pinned").visible
    assert "Pin a placement" in find(bench, "wb-pinned").value


def test_a_machine_of_ones_own_is_planned_for_and_found_again(bench: wb.Workbench) -> None:
    send(find(bench, "wb-own-gpus"), value=3)
    send(find(bench, "wb-own-gpu-gib"), value=10.0)
    click(find(bench, "wb-own-use"))
    assert bench.machine.name == "My machine"
    assert [d.label for d in bench.machine.devices] == ["cuda:0", "cuda:1", "cuda:2", "cpu", "disk"]
    assert bench.machine.device(2).budget_bytes == 9 * GIB
    choose(find(bench, "wb-machine"), "2x RTX 4090")
    choose(find(bench, "wb-machine"), "My machine")
    assert bench.machine.device(2).total_bytes == 10 * GIB
    choose(find(bench, "wb-machine"), "box")
    assert bench.machine is BOX
    choose(find(bench, "wb-strategy"), "custom")
    bench.recipe = kept = bench.recipe.with_(max_memory={0: "1GiB", "cpu": "4GiB"})
    bench.machine = wb.Machine(name="a second box", devices=BOX.devices)
    assert bench.recipe == kept  # a machine from a cell is new in the list, and leaves budgets and map alone
    assert find(bench, "wb-machine").value == "a second box"


def test_a_page_whose_figure_is_not_what_it_should_be_gets_it_anew(
    bench: wb.Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    chart = bench._preview.chart
    assert chart is not None
    sent: list[Any] = []
    monkeypatch.setattr(chart.figure, "send_state", sent.append)
    holder, seen = find(bench, "wb-chart"), []
    holder.observe(lambda change: seen.append(len(change["new"])), "children")
    tell(bench, stale=True)
    assert sent == [["_widget_data", "_widget_layout"]]
    assert seen == [1, 2]
    assert find(bench, "wb-touch").picture["texts"] == [bar.text for bar in bench._preview._spec(bench.placement).bars]


def test_where_there_are_no_widgets_the_same_facts_stand_still(bench: wb.Workbench) -> None:
    assert bench.placement is not None
    bundle = bench._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == bench.model_id
    assert bundle["text/plain"].endswith(bench.placement.summary)
    assert bench.placement._repr_html_() in bundle["text/html"]
    assert "still picture" in bundle["text/html"]
