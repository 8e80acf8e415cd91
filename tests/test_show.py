from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

import workbench as wb
from workbench.hardware import Device, device_label
from workbench.placement import Layer
from workbench.show import as_data, as_html, as_page, as_text, duration, layer_ranges, rate, table

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


def device(id_: int | str, size_bytes: int) -> Device:
    return Device(
        id=id_,
        name=f"device {id_}",
        total_bytes=size_bytes,
        free_bytes=size_bytes,
        reserved_bytes=0,
        reserved_for="nothing",
        bandwidth_bytes_per_s=10**9,
        source="made up",
    )


@pytest.fixture(scope="module")
def machine() -> wb.Machine:
    devices = (device(0, 512 * MIB), device("cpu", 1024 * MIB), device("disk", 4096 * MIB))
    return wb.Machine(name="<small> & old", devices=devices)


@pytest.fixture(scope="module")
def offloading(tiny_llama: Path, machine: wb.Machine) -> wb.Placement:
    """The first layer on the GPU, the second in RAM, the rest on disk."""
    device_map = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.layers.0": 0,
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "lm_head": "disk",
    }
    recipe = wb.Recipe(model=str(tiny_llama), strategy="custom", device_map=device_map)
    return wb.place(recipe, machine=machine)


def memory_lines(text: str) -> dict[str, list[str]]:
    lines = text.split("\n\n")[1].splitlines()[1:-2]  # between the head and the legend
    return {name: cells for name, *cells in map(str.split, lines)}


def test_the_table_says_what_the_placement_holds(offloading: wb.Placement) -> None:
    lines = memory_lines(as_text(offloading))
    for id_, memory in offloading.memory.items():
        weights, cache, activations, reserve, free, limit = lines[device_label(id_)]
        # A tiny model: a few hundred KiB are shown as there, and only what is nothing as 0.
        assert (weights == "<0.01") == (memory.weight_bytes > 0)
        assert (cache == "0.00") == (memory.kv_cache_bytes == 0)
        assert (activations == "0.00") == (memory.activation_bytes == 0)
        assert (reserve == "0.00") == (memory.reserved_bytes == 0)
        assert free == f"{memory.free_bytes / 2**30:.2f}"
        assert limit == f"{memory.limit_bytes / 2**30:.2f}"
    assert [lines[label][-1] for label in ("cuda:0", "cpu", "disk")] == ["0.50", "1.00", "4.00"]


def test_sizes_in_gib(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    # Worked out by hand, in bfloat16: an embedding and a head of 32,768 x 4,096 make 2 x 0.25 GiB, a layer has 4
    # projections of 4,096 x 4,096 and 3 of 4,096 x 16,384: 4 x 32 MiB + 3 x 128 MiB = 0.5 GiB, eight of them 4 GiB.
    # Its cache holds 2 x 4,096 values a token: 16 KiB, in eight layers 128 KiB, for 8,192 tokens 1 GiB.
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=16_384,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    recipe = wb.Recipe(model=str(tmp_path), workload=wb.Workload(context_length=8192))
    text = as_text(wb.place(recipe, machine=wb.Machine.preset("RTX 4090")))
    assert memory_lines(text)["cuda:0"][:2] == ["4.50", "1.00"]
    assert memory_lines(text)["model"] == ["4.50", "1.00"]


def test_every_layer_has_its_place(offloading: wb.Placement) -> None:
    assert offloading.verdict == "offloads"
    layers = as_text(offloading).split("\n\n")[2].splitlines()
    assert [line.split("  ")[0] for line in layers] == [
        "layers",
        "cuda:0",
        "cpu, fetched to run on cuda:0",
        "disk, fetched to run on cuda:0",
    ]
    named = [name for line in layers[1:] for name in line.split("  ")[-1].strip().split(", ")]
    assert sorted(named) == sorted(layer.name for layer in offloading.layers)


def test_what_has_no_room_and_what_to_do(tiny_llama: Path, machine: wb.Machine) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "200KiB"})
    placement = wb.place(recipe, machine=machine)
    text = as_text(placement)
    assert placement.summary in text
    assert "\nno room  " in text
    assert placement.advice
    for sentence in placement.advice:
        assert f"\n- {sentence}" in text


def test_columns_stand_under_each_other(offloading: wb.Placement) -> None:
    lines = as_text(offloading).split("\n\n")[1].splitlines()[:4]
    assert len({len(line) for line in lines}) == 1
    assert table(("a", "bb"), [("ccc", "1"), ("d", "22")]) == "a    bb\nccc   1\nd    22"


def test_what_is_unknown_is_no_number(tmp_path: Path, machine: wb.Machine) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # no other test measures this one
    recipe = wb.Recipe(model=str(tmp_path))
    placement = wb.place(recipe, machine=machine, measure=False, advice=False)
    lines = memory_lines(as_text(placement))
    assert lines["cuda:0"][1:3] == ["?", "?"]
    assert lines["model"][1] == "?"
    assert "advice" not in as_text(placement)
    assert as_data(placement)["kv_cache_bytes"] is None


def test_ranges() -> None:
    def layers(*names: str) -> list[Layer]:
        return [
            Layer(name=name, class_name="X", device=0, bytes_before=1, bytes_after=1, quantized=False) for name in names
        ]

    assert layer_ranges(layers("embed", *(f"h.{i}" for i in range(8, 12)), "norm")) == "embed, h.8-11, norm"
    assert layer_ranges(layers("h.0", "h.2", "h.3")) == "h.0, h.2-3"
    assert layer_ranges(layers("encoder.0", "decoder.1")) == "encoder.0, decoder.1"
    assert layer_ranges([]) == ""


def test_a_speed_is_shown_as_the_estimate_that_it_is(offloading: wb.Placement) -> None:
    measured = wb.Speed(tokens_per_second=12.34, calibrated=True)
    guessed = wb.Speed(tokens_per_second=0.0512, calibrated=False)
    assert "about 12 tok/s" in as_text(offloading, speed=measured)
    assert "measurements of this machine" in as_text(offloading, speed=measured)
    assert "about 0.051 tok/s" in as_html(offloading, speed=guessed)
    assert "data sheets" in as_html(offloading, speed=guessed)
    assert "tok/s" not in as_text(offloading)
    assert rate(None) == "?"
    assert as_data(offloading, speed=measured)["tokens_per_second"] == 12.34


def test_a_wait_is_told_as_coarsely_as_it_is_known() -> None:
    assert [duration(seconds) for seconds in (0.43, 3.2, 9.6, 12.4, 250)] == ["0.4 s", "3 s", "10 s", "12 s", "4 min"]


class Page(HTMLParser):
    """What is in a page: tags with attributes, text, and whether every tag is closed by its own."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_else(offloading: wb.Placement) -> None:
    page = Page(as_page(offloading))
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "a"})
    source = as_page(offloading)
    assert "url(" not in source
    assert "@import" not in source
    assert not any(name.startswith("on") or name == "src" for _, attributes in page.tags for name in attributes)
    assert "color-scheme: light dark" in source


def test_html_says_what_the_text_says(offloading: wb.Placement) -> None:
    page = Page(as_html(offloading))
    cells = [text.strip() for text in page.text]
    for line in memory_lines(as_text(offloading)).values():
        assert all(cell in cells for cell in line)
    assert any(offloading.summary in cell for cell in cells)
    assert any("<small> & old" in cell for cell in cells)  # escaped, and so read back as it was
    bars = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert [bar.partition(":")[0] for bar in bars if bar] == ["cuda", "cpu", "disk"]


def test_data_is_json_and_holds_the_recipe(offloading: wb.Placement) -> None:
    data = json.loads(json.dumps(as_data(offloading)))
    assert data["verdict"] == "offloads"
    assert data["device_map"] == offloading.device_map
    assert data["memory"]["0"]["weight_bytes"] == offloading.memory[0].weight_bytes
    assert sum(layer["bytes_after"] for layer in data["layers"]) == offloading.total_bytes
    assert wb.Recipe.from_json(json.dumps(data["recipe"])) == offloading.recipe


def test_a_notebook_and_a_terminal_show_it(offloading: wb.Placement) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from rich.console import Console

    shown, _ = InteractiveShell().display_formatter.format(offloading)
    assert shown == {"text/plain": as_text(offloading), "text/html": as_html(offloading)}
    assert offloading._repr_html_() == as_html(offloading)
    assert f"{offloading}" == as_text(offloading)
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(offloading)
    assert [line.rstrip() for line in capture.get().splitlines()] == as_text(offloading).splitlines()
    assert repr(offloading).startswith("Placement(device_map=")
