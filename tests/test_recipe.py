from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb

if TYPE_CHECKING:
    from pathlib import Path

RECIPES = [
    wb.Recipe(),
    wb.Recipe(
        model="org/name@v2",
        precision=wb.Int8(threshold=3, skip_modules=("lm_head",)),
        strategy="sequential",
        max_memory={0: "10GiB", "cpu": 20},
        workload=wb.Workload(context_length=64, batch_size=3),
    ),
    wb.Recipe(
        model=wb.ModelRef(name="a/b", trust_remote_code=True),
        precision=wb.FourBit(quant_type="fp4"),
        strategy="custom",
        device_map={"model": 1, "lm_head": "disk"},
    ),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_pickle_and_copy_round_trip(recipe: wb.Recipe) -> None:
    for twin in (wb.Recipe.from_json(recipe.to_json()), pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):  # noqa: S301 - our own bytes
        assert twin == recipe
        assert hash(twin) == hash(recipe)
        assert twin.to_json() == recipe.to_json()


def test_budgets_keep_gpu_numbers_as_numbers() -> None:
    twin = wb.Recipe.from_json(RECIPES[1].to_json())
    assert dict(twin.max_memory or {}) == {0: "10GiB", "cpu": 20}
    assert dict(wb.Recipe(max_memory={"cuda:1": "1GiB", "0": 5}).max_memory or {}) == {1: "1GiB", 0: 5}


def test_the_order_of_keys_makes_no_other_recipe() -> None:
    one = wb.Recipe(max_memory={0: 1, 1: 2, "cpu": 3})
    other = wb.Recipe(max_memory={"cpu": 3, "cuda:1": 2, "0": 1})
    assert (one, hash(one), one.to_json()) == (other, hash(other), other.to_json())

    names = ["lm_head", "model.layers.10", "model.layers.2", "model.embed_tokens"]
    mine, turned = (
        wb.Recipe(strategy="custom", device_map=dict.fromkeys(order, 0)) for order in (names, sorted(names))
    )
    assert (mine, hash(mine), mine.to_json()) == (turned, hash(turned), turned.to_json())
    assert list(json.loads(mine.to_json())["device_map"])[2:] == ["model.layers.2", "model.layers.10"]
    for twin in (mine, mine.with_(offload_buffers=True), copy.deepcopy(mine)):
        assert list(twin.device_map or {}) == names  # as the loader is given it


@pytest.mark.parametrize(
    ("max_memory", "device"),
    [
        ({"cpu": "1GiB"}, '"cpu"'),
        ({"cpu": "1GiB", 3: "1GiB", 1: "1GiB"}, '"cuda:1"'),
        ({"mps": "1GiB"}, '"mps"'),
        (None, '"cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"'),
    ],
)
def test_the_exported_prompt_goes_where_the_model_runs(max_memory: Any, device: str, tiny_llama: Path) -> None:
    code = wb.Recipe(model=str(tiny_llama), max_memory=max_memory).to_python()
    assert f"\ninputs = inputs.to({device})\n" in code


def test_recipes_cannot_be_changed() -> None:
    recipe = RECIPES[1]
    with pytest.raises(FrozenInstanceError):
        recipe.strategy = "auto"  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        recipe.max_memory[0] = "99GiB"  # type: ignore[index]
    budgets: dict[Any, Any] = {0: "1GiB"}
    kept = wb.Recipe(max_memory=budgets)
    budgets[0] = "2GiB"
    assert dict(kept.max_memory or {}) == {0: "1GiB"}


def test_with_changes_one_choice() -> None:
    changed = RECIPES[1].with_(strategy="balanced")
    assert changed.strategy == "balanced"
    assert changed.with_(strategy="sequential") == RECIPES[1]
    with pytest.raises(TypeError, match=r"Recipe has no option 'stratgy'. Did you mean 'strategy'"):
        RECIPES[1].with_(stratgy="auto")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strategy": "best"}, "strategy is one of 'auto', 'balanced'"),
        ({"strategy": "custom"}, "needs a device_map"),
        ({"device_map": {"": 0}}, 'A device_map needs strategy="custom"'),
        ({"strategy": "custom", "device_map": {}}, "device_map is a dict"),
        ({"max_memory": {0: "lots"}}, "'lots' is no size of memory"),
        ({"max_memory": {0: -1}}, "cannot be negative"),
        ({"max_memory": {"cpu": "10gb"}}, 'write "10GB"'),
        ({"max_memory": {}}, "max_memory is a dict"),
        ({"max_memory": {"0": "1GiB", "cuda:0": "2GiB"}}, "max_memory names cuda:0 twice"),
        ({"max_memory": {1.5: "1GiB"}}, "A device is a GPU's number"),
        ({"model": ""}, "Name a model"),
        ({"model": 7}, "named by text or a ModelRef"),
        ({"precision": "int8"}, r"precision is one of FullPrecision\(\), .*, TorchAO\(\), HQQ\(\), not"),
        ({"workload": 2048}, "workload is Workload"),
    ],
)
def test_bad_choices(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wb.Recipe(**options)


@pytest.mark.parametrize("value", [0, -5, 1.5, True, "2048"])
def test_bad_workloads(value: Any) -> None:
    with pytest.raises(ValueError, match="context_length is a whole number of at least 1"):
        wb.Workload(context_length=value)
    with pytest.raises(ValueError, match="batch_size is a whole number of at least 1"):
        wb.Workload(batch_size=value)


def test_unknown_choices_list_the_valid_ones() -> None:
    valid = "model, precision, strategy, max_memory, device_map, workload"
    with pytest.raises(TypeError, match=f"Valid options: {valid}"):
        wb.Recipe(quantization="int8")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not json", "it is no JSON"),
        ("[]", 'no "workbench_recipe" version'),
        ('{"workbench_recipe": 99}', "has version 99"),
        ('{"workbench_recipe": 1}', "cannot be read"),
    ],
)
def test_bad_json(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wb.Recipe.from_json(text)


def test_json_with_an_unknown_choice() -> None:
    data = json.loads(wb.Recipe().to_json())
    data["colour"] = "red"
    with pytest.raises(ValueError, match="Recipe has no option 'colour'"):
        wb.Recipe.from_json(json.dumps(data))


def run_exported(code: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Run an exported program in a fresh process; return its device map and its answer's token ids."""
    assert "workbench" not in re.sub(r"MODEL = .*", "", code).lower()
    probe = (
        "\nimport json\n"
        "ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()\n"
        "devices = {str(p.device) for p in model.parameters()}\n"
        "found = getattr(model, 'hf_device_map', None) or {'': devices.pop()}\n"
        "print(json.dumps([found, ids]))\n"
    )
    program = folder / "exported.py"
    program.write_text(code + probe, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(program)], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found, ids = json.loads(result.stdout.splitlines()[-1])
    return found, ids


_DISK = {"max_memory": {"cpu": "200MiB", "disk": "10GiB"}}
_TINY_DISK = {"max_memory": {"cpu": "160KiB", "disk": "1GiB"}}


@pytest.mark.parametrize(
    ("model", "options", "with_placement"),
    [
        ("demo_model", {}, True),
        ("demo_model", {"precision": wb.Int8()}, True),
        ("tiny_llama", {"precision": wb.FourBit()}, True),
        ("demo_model", _DISK, True),
        ("tiny_llama", {"strategy": "custom", "device_map": {"": "disk"}}, True),
        ("tiny_llama", {}, False),
        ("tiny_llama", _TINY_DISK, False),
    ],
    ids=["full", "int8", "nf4", "disk", "all-disk", "full-by-strategy", "disk-by-strategy"],
)
def test_exported_python_does_the_same(
    model: str, tmp_path: Path, options: dict[str, Any], request: pytest.FixtureRequest, *, with_placement: bool
) -> None:
    workload = wb.Workload(context_length=64)
    recipe = wb.Recipe(model=str(request.getfixturevalue(model)), workload=workload, **options)
    session = wb.load(recipe)
    try:
        prompt = session._encode("What is the capital of France?", None)
        expected = session.model.generate(**prompt.to("cpu"), max_new_tokens=20, do_sample=False)[0].tolist()
        found, ids = run_exported(recipe.to_python(session.placement if with_placement else None), tmp_path)
    finally:
        session.unload()
    assert found == session.placement.device_map
    assert len(set(found.values())) == (2 if "max_memory" in options else 1)
    assert ids == expected


def test_exported_map_is_the_map() -> None:
    from workbench.recipe import _write_map

    device_map: dict[str, Any] = {
        "model.embed_tokens": 0,
        **{f"model.layers.{i}": 0 for i in range(12)},
        **{f"model.layers.{i}": 1 for i in range(12, 14)},
        **{f"model.layers.{i}": "cpu" for i in range(14, 30)},
        "lm_head": "disk",
    }
    lines = _write_map(device_map)
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)  # noqa: S102 - running it is the point
    assert scope["device_map"] == device_map
    assert len(lines) == 8  # two runs of layers are ranges, two layers are too few for one
