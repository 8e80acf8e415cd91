from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from workbench.hardware import Device, Machine
from workbench.panels.chart import Chart
from workbench.panels.picture import (
    KINDS,
    MODULE_KINDS,
    chart_height,
    chart_spec,
    device_colour,
    device_pattern,
    overlay,
    spec_as_html,
)
from workbench.placement import DeviceMemory, Layer, Placement
from workbench.precision import FullPrecision
from workbench.recipe import Recipe

GIB = 2**30


def device(name: int | str, total_gib: int = 8) -> Device:
    return Device(
        id=name,
        name="memory",
        total_bytes=(total_gib + 1) * GIB,
        free_bytes=(total_gib + 1) * GIB,
        reserved_bytes=GIB,
        reserved_for="allocator slack",
        bandwidth_bytes_per_s=None,
        source="made up",
    )


def placement(layer_count: int = 4, *, homeless: int = 0, kv_cache_bytes: int | None = GIB // 2) -> Placement:
    """A model of 1 GiB embedding, 0.5 GiB layers and a tiny norm: half its layers on GPU 0, half on the CPU."""
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(layer_count)), "model.norm", "lm_head"]
    sizes = [GIB, *(GIB // 2 for _ in range(layer_count)), 100, GIB]
    devices = [0 if i <= len(names) // 2 else "cpu" for i in range(len(names) - homeless)] + [None] * homeless
    layers = tuple(
        Layer(name=name, class_name="Part", device=where, bytes_before=2 * size, bytes_after=size, quantized=True)
        for name, size, where in zip(names, sizes, devices, strict=True)
    )
    memory = {
        where: DeviceMemory(
            weight_bytes=sum(layer.bytes_after for layer in layers if layer.device == where),
            kv_cache_bytes=kv_cache_bytes if where == 0 else kv_cache_bytes and 0,
            activation_bytes=None if kv_cache_bytes is None else 10,
            reserved_bytes=GIB // 4 if where == 0 else 0,
            limit_bytes=4 * GIB,
            capacity_bytes=8 * GIB,
        )
        for where in (0, "cpu")
    }
    return Placement(
        device_map={layer.name: layer.device for layer in layers if layer.device is not None},
        layers=layers,
        memory=memory,
        verdict="does_not_fit" if homeless else "offloads",
        summary="Made by hand.",
        advice=(),
        unplaced=tuple(layer.name for layer in layers if layer.device is None),
        dtype="bfloat16",
        precision=FullPrecision(),
        total_bytes=sum(sizes),
        kv_cache_bytes=kv_cache_bytes,
        machine=Machine(devices=(device(0), device("cpu"))),
        recipe=Recipe(),
    )


def test_a_bar_stacks_what_a_device_holds_up_to_what_it_has() -> None:
    gpu, cpu = chart_spec(placement()).bars
    # GPU 0 has the embedding and layers 0 to 2: 1 + 3 * 0.5 = 2.5 GiB; 8 - 2.5 - 0.5 - 10 bytes - 0.25 is free.
    assert dict(zip([kind for kind, _ in KINDS], gpu.part_bytes, strict=True)) == {
        "weights": 5 * GIB // 2,
        "KV cache": GIB // 2,
        "activations (est.)": 10,
        "room to fetch layers": GIB // 4,
        "free": 8 * GIB - 5 * GIB // 2 - GIB // 2 - 10 - GIB // 4,
        "kept back": GIB,
    }
    assert gpu.kept_for == "allocator slack"
    assert (gpu.width_bytes, gpu.limit_bytes) == (9 * GIB, 4 * GIB)
    assert gpu.text == "<b>cuda:0</b> 3.3 GiB of 8.0 GiB · limit for weights 4.0 GiB"
    assert cpu.label == "cpu"


def test_what_is_unknown_is_said_and_not_drawn() -> None:
    gpu, _ = chart_spec(placement(kv_cache_bytes=None)).bars
    assert gpu.part_bytes[1:3] == (0, 0)
    assert gpu.text.endswith("KV cache still to be measured")


def test_a_bar_that_is_overfull_shrinks_its_limit_and_has_nothing_free() -> None:
    full = placement()
    over = dataclasses.replace(full.memory[0], weight_bytes=10 * GIB)
    gpu, _ = chart_spec(dataclasses.replace(full, memory={**full.memory, 0: over})).bars
    assert gpu.part_bytes[-2:] == (0, GIB)
    assert gpu.width_bytes == sum(gpu.part_bytes) > gpu.capacity_bytes > gpu.limit_bytes


def test_a_block_per_layer_in_order_with_its_devices_colour_and_exact_bytes_on_hover() -> None:
    spec = chart_spec(placement(homeless=2))
    assert [block.tick for block in spec.blocks] == ["embed", "0", "1", "2", "3", "norm", "head"]
    assert [block.device_label for block in spec.blocks] == ["cuda:0"] * 4 + ["cpu"] + ["no room"] * 2
    assert [block.colour for block in spec.blocks] == [
        *[device_colour(0)] * 4,
        device_colour("cpu"),
        *[device_colour(None)] * 2,
    ]
    assert (spec.unit, spec.unit_bytes) == ("GiB", GIB)
    assert "1.0 GiB (1,073,741,824 bytes), quantized<br>before: 2.0 GiB (2,147,483,648 bytes)" in spec.blocks[0].hover
    assert "no device that was offered has room" in spec.blocks[-1].hover


def test_colours_are_a_devices_own_and_all_different() -> None:
    colours = [device_colour(which) for which in (*range(8), "cpu", "disk", None)]
    assert len(set(colours)) == len(colours)
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours)


@pytest.mark.parametrize("layer_count", [1, 12, 30, 80, 126])
@pytest.mark.parametrize("width_px", [330, 760])
def test_the_axis_names_the_ends_and_never_more_than_there_is_room_for(layer_count: int, width_px: int) -> None:
    spec = chart_spec(placement(layer_count), width_px=width_px)
    blocks = len(spec.blocks)
    assert spec.ticks[0] == 0
    assert spec.ticks[-1] == blocks - 1
    apart_px = [(b - a) * width_px / blocks for a, b in zip(spec.ticks, spec.ticks[1:], strict=False)]
    assert min(apart_px) >= 30
    if layer_count >= 12:
        assert len(spec.ticks) >= 4
        numbers = [int(spec.blocks[i].tick) for i in spec.ticks[1:-1]]
        assert len({b - a for a, b in itertools.pairwise(numbers)}) <= 1


def test_the_height_depends_on_the_number_of_devices_alone() -> None:
    assert chart_spec(placement(4)).height_px == chart_spec(placement(126, homeless=9)).height_px == chart_height(2)


def test_the_plain_picture_has_every_bar_and_block_and_escapes_names() -> None:
    nasty = placement()
    layers = (dataclasses.replace(nasty.layers[0], name="<script>"), *nasty.layers[1:])
    text = spec_as_html(chart_spec(dataclasses.replace(nasty, layers=layers)))
    assert text.count('class="wb-plain-bar"') == 2
    assert text.count('style="height:') == 1 + len(nasty.layers)
    assert "<script>" not in text


def test_one_figure_is_updated_in_place_and_a_page_that_comes_later_reads_what_it_shows() -> None:
    chart = Chart()
    figure = chart.figure
    chart.show(chart_spec(placement(4)), dark=False)
    chart.show(chart_spec(placement(30, homeless=3), width_px=640), dark=True, width_px=640)
    state = figure.get_state()
    traces = {trace["name"]: trace for trace in state["_widget_data"]}
    assert chart.figure is figure
    assert set(traces) == {*(kind for kind, _ in KINDS), "layers", "pinned", *MODULE_KINDS}
    assert len(traces["layers"]["y"]) == 33
    assert traces["layers"]["marker"]["color"][-3:] == [device_colour(None)] * 3
    assert traces["layers"]["marker"]["pattern"]["shape"][-4:] == [".", "x", "x", "x"]
    assert traces["KV cache"]["marker"]["pattern"]["shape"] == ["/", "/"]
    assert state["_widget_layout"]["width"] == 640
    assert state["_widget_layout"]["font"]["color"] == "#d9d9d9"
    # Parts lie end to end: each bar's base is where the one before it ends.
    for before, after in itertools.pairwise(KINDS):
        ends = [base + x for base, x in zip(traces[before[0]]["base"], traces[before[0]]["x"], strict=True)]
        assert traces[after[0]]["base"] == pytest.approx(ends)
    for part in (figure.layout, figure):
        if hasattr(part, "close"):
            part.close()


def test_what_is_measured_stands_on_what_was_foretold_with_the_difference_named() -> None:
    weights = placement().memory[0].weight_bytes
    gpu, cpu = chart_spec(placement(), measured={0: weights + 1000, "cpu": placement().memory["cpu"].weight_bytes}).bars
    assert gpu.measured_bytes == weights + 1000
    assert gpu.text.endswith("weights measured 2.5 GiB (+1,000 bytes)")
    assert cpu.text.endswith("(as foretold)")
    assert chart_spec(placement()).bars[0].measured_bytes is None


def test_a_pinned_placement_is_a_ghost_of_bars_and_blocks() -> None:
    before = placement()
    moved = tuple(dataclasses.replace(layer, device="cpu", bytes_after=GIB) for layer in before.layers)
    spec = chart_spec(dataclasses.replace(before, layers=moved), pinned=before)
    assert [bar.pinned_bytes for bar in spec.bars] == [before.memory[d].used_bytes for d in (0, "cpu")]
    assert [block.pinned_bytes for block in spec.blocks] == [layer.bytes_after for layer in before.layers]
    assert "pinned: 1.0 GiB (1,073,741,824 bytes) on cuda:0" in spec.blocks[0].hover
    assert "pinned" not in chart_spec(before, pinned=before).blocks[0].hover


def test_runs_say_what_is_fetched_for_every_token() -> None:
    first, second = chart_spec(placement()).runs
    # Embedding and layers 0 to 2 on GPU 0; layer 3, norm and head wait on the CPU.
    assert (first.first, first.last, first.device_label, first.fetched_bytes) == (0, 3, "cuda:0", 0)
    assert (second.first, second.last, second.fetched_bytes) == (4, 6, GIB // 2 + 100 + GIB)
    assert second.text.endswith("on cpu, brought to cuda:0 for every token")
    assert chart_spec(placement()).crossings == ()  # all of it runs on GPU 0


def test_the_layer_over_the_figure_has_everything_in_the_same_order() -> None:
    spec = chart_spec(placement(homeless=1))
    picture: dict[str, Any] = overlay(spec, {"cuda:0": (8.0, 0.05), "cpu": (8.0, 0.05)})
    assert picture["names"] == [block.name for block in spec.blocks]
    assert picture["homes"][-1] == "no room"
    tops = [bar["top"] for bar in picture["bars"]]
    assert tops == sorted(tops)
    assert [bar["limit_bytes"] for bar in picture["bars"]] == [4 * GIB, 4 * GIB]
    assert picture["texts"] == [bar.text for bar in spec.bars]
    assert tops[-1] + picture["bar_height"] < picture["layers_top"]
    assert picture["layers_top"] + picture["layers_height"] < spec.height_px


def test_kinds_add_up_to_the_layer() -> None:
    kinds = {"model.layers.0": {"attention": 1, "MLP": 2}}
    spec = chart_spec(placement(), kinds=kinds)
    parts = dict(zip(MODULE_KINDS, spec.blocks[1].kind_bytes, strict=True))
    assert sum(parts.values()) == spec.blocks[1].size_bytes
    assert parts["MLP"] == pytest.approx(2 * parts["attention"], abs=2)
    assert dict(zip(MODULE_KINDS, spec.blocks[0].kind_bytes, strict=True))["other"] == GIB


def test_a_narrow_picture_says_less_above_its_bars() -> None:
    wide, narrow = (chart_spec(placement(kv_cache_bytes=None), width_px=px).bars[0].text for px in (900, 330))
    assert narrow == "<b>cuda:0</b> 2.8 GiB of 8.0 GiB · limit 4.0 GiB"
    assert len(wide) > len(narrow)


def test_every_device_has_a_hatching_beside_its_colour() -> None:
    looks = [(device_colour(which), device_pattern(which)) for which in (*range(8), "cpu", "disk", None)]
    assert len(set(looks)) == len(looks)
    assert len({pattern for _, pattern in (looks[0], looks[1], looks[-3], looks[-2], looks[-1])}) == 5


def test_plotly_has_nothing_to_do_while_only_a_limit_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    chart, sent = Chart(), []
    before = placement()
    chart.show(chart_spec(before), dark=False)
    monkeypatch.setattr(chart.figure, "_send_update_msg", lambda *_, **__: sent.append("update"))
    memory = {
        where: dataclasses.replace(each, limit_bytes=each.limit_bytes + GIB) for where, each in before.memory.items()
    }
    chart.show(chart_spec(dataclasses.replace(before, memory=memory)), dark=False)
    assert sent == []
    memory[0] = dataclasses.replace(memory[0], kv_cache_bytes=GIB)
    chart.show(chart_spec(dataclasses.replace(before, memory=memory)), dark=False)
    assert sent == ["update"]
    chart.figure.close()
