"""accelerate's own knobs: each does to the map, the load and the exported code what it does there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from workbench.hardware import Machine
from workbench.loading import load
from workbench.placement import place
from workbench.recipe import Recipe
from workbench.skeleton import read_skeleton
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHORT = Workload(context_length=16)
EIGHT = Machine.preset("8x A100 80 GB")


def recipe(folder: Path, max_memory: dict[Any, Any], **choices: Any) -> Recipe:
    return Recipe(**{"model": str(folder), "max_memory": max_memory, "workload": SHORT, **choices})


def built(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_a_fallback_is_accelerates(tmp_path: Path) -> None:
    from accelerate import infer_auto_device_map
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2
    ).save_pretrained(tmp_path)
    model = built(tmp_path)
    layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    embedding_bytes = model.lm_head.weight.nbytes
    # The embedding is larger than the first GPU has left beside the room for a fetched layer.
    budgets: dict[Any, int] = {0: embedding_bytes + 4 * layer_bytes, 1: 3 * embedding_bytes, "cpu": 10**9}
    asked = recipe(tmp_path, budgets, strategy="sequential", fallback_allocation=True)
    with_fallback = place(asked, machine=EIGHT)
    without = place(asked.with_(fallback_allocation=False), machine=EIGHT)

    expected = infer_auto_device_map(
        model, max_memory=dict(budgets), no_split_module_classes=model._no_split_modules, fallback_allocation=True
    )
    assert with_fallback.device_map == dict(expected)
    assert with_fallback.memory[0].weight_bytes > without.memory[0].weight_bytes == 0
    # transformers has no argument for it, so the exported program holds the map itself.
    assert "device_map = {" in asked.with_(max_memory={"cpu": 10**9}).to_python()


def test_classes_that_may_be_split_are_split(tiny_model: Callable[[str], Path]) -> None:
    from transformers.integrations.accelerate import infer_auto_device_map

    folder = tiny_model("llama")
    model = built(folder)
    total = sum(p.nbytes for p in model.parameters())
    budgets: dict[Any, int] = {0: total // 2, 1: total // 2, "cpu": 2 * total}
    asked = recipe(folder, budgets, strategy="sequential", no_split_module_classes=["LlamaAttention", "LlamaMLP"])
    placement = place(asked, machine=EIGHT)

    expected = infer_auto_device_map(
        model, max_memory=dict(budgets), no_split_module_classes={"LlamaAttention", "LlamaMLP"}
    )
    assert placement.device_map == dict(expected)
    assert any(name.endswith(("self_attn", "mlp")) for name in placement.device_map)
    # What was planned may be asked for: the same knob allows it.
    custom = asked.with_(strategy="custom", device_map=placement.device_map)
    assert place(custom, machine=EIGHT).device_map == placement.device_map
    with pytest.raises(ValueError, match="must stay on one device"):
        place(custom.with_(no_split_module_classes=None), machine=EIGHT)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers_are_where_they_were_previewed(
    offload_buffers: bool,  # noqa: FBT001 - a parameter of the test
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tiny_model("deepseek-v3")  # its routers have a buffer that the checkpoint holds
    blocks = [block.name for block in read_skeleton(str(folder)).blocks]
    device_map = {name: "disk" if ".layers." in name else "cpu" for name in blocks}
    asked = recipe(
        folder,
        {"cpu": "1GiB", "disk": "1GiB"},
        strategy="custom",
        device_map=device_map,
        offload_buffers=offload_buffers,
        offload_folder=str(tmp_path / "offloaded"),
    )
    session = load(asked, offload="accelerate")  # which is whose knob it is
    try:
        assert session.load_report.matches, session.load_report.lines
        kept = {b.device.type for name, b in session.model.named_buffers() if name.endswith("e_score_correction_bias")}
        assert kept == ({"meta"} if offload_buffers else {"cpu"})
    finally:
        session.unload()
    code = asked.to_python()
    assert ("offload_buffers=True" in code) == offload_buffers
    assert f"offload_folder={str(tmp_path / 'offloaded')!r}" in code


def test_knobs_travel_in_the_recipe() -> None:
    asked = Recipe(
        no_split_module_classes=["LlamaMLP"], fallback_allocation=True, offload_buffers=True, offload_folder="somewhere"
    )
    assert Recipe.from_json(asked.to_json()) == asked
    assert asked.no_split_module_classes == ("LlamaMLP",)


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"no_split_module_classes": "LlamaMLP"}, "is a list such as"),
        ({"fallback_allocation": 1}, "is True or False"),
        ({"offload_buffers": "yes"}, "is True or False"),
        ({"offload_folder": ""}, "is the path of a folder"),
    ],
)
def test_knobs_that_cannot_be_meant(choices: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(**choices)
