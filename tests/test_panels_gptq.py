"""What the panels offer for GPTQ checkpoints: weight files, a config by hand, kernels, and a form for the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub_uploads import UploadHub
from played_page import click, find, send, wait_for

import workbench as wb

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKLOAD = wb.Workload(context_length=128)


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder with two sets of weights under names of their own, and without a config."""
    made = tmp_path_factory.mktemp("names") / "odd"
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.GPTQ(group_size=32), workload=WORKLOAD)
    wb.quantize(recipe, made, calibration=wb.CalibrationText(samples=2, sequence_length=32), evaluation=None)
    (made / "quantize_config.json").unlink()
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    (made / "config.json").write_text(json.dumps(config))
    shutil.copy(made / "model.safetensors", made / "second.safetensors")
    (made / "model.safetensors").rename(made / "first.safetensors")
    return made


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[wb.Workbench]:
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(tmp_path / "cache"))
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "512MB"}, workload=WORKLOAD))
    assert made._state.settle(60)
    yield made
    made.close()
    if made.session is not None:
        made.session.unload()


def shown(widget: Any) -> bool:
    return bool(widget.layout.display is None)


def problem(bench: wb.Workbench) -> str:
    return str(bench._state.problems.get("model", ""))


def test_names_configs_and_kernels(bench: wb.Workbench, folder: Path, tiny_llama: Path) -> None:
    weights, files, kernel = find(bench, "wb-basename"), find(bench, "wb-files"), find(bench, "wb-kernel")
    assert not shown(weights)
    assert files.selected_index is None
    assert not shown(bench._model._kernel.box)

    send(find(bench, "wb-model"), value=str(folder))
    assert bench._state.settle(60)
    assert "has several sets of weights" in problem(bench)
    assert bench.recipe.model.name == str(tiny_llama)
    assert files.selected_index == 0
    assert shown(weights)
    assert weights._options_labels == ("found by itself", "first", "second")

    send(weights, index=2)
    assert bench._state.settle(60)
    assert problem(bench) == ""
    assert bench.recipe.model == wb.ModelRef(name=str(folder), model_basename="second")
    assert "GPTQ 4-bit" in find(bench, "wb-stored").value

    send(find(bench, "wb-quantize-config"), value='{"bits": 8, "group_size": 32}')
    assert bench._state.settle(60)
    assert "says 8 bits" in problem(bench)
    send(find(bench, "wb-quantize-config"), value="{")
    assert "cannot be read" in problem(bench)
    stated = {"bits": 4, "group_size": 32, "damp_percent": 0.2}
    send(find(bench, "wb-quantize-config"), value=json.dumps(stated))
    assert bench._state.settle(60)
    assert problem(bench) == ""
    assert bench.recipe.model.quantize_options == stated

    wait_for(lambda: len(kernel.choices) > 1)
    choices = {choice["name"]: choice for choice in kernel.choices}
    assert choices["auto"]["usable"]
    assert choices["torch"]["usable"]
    assert not choices["exllama_v1"]["usable"]
    assert "no ExLlama v1 any more" in choices["exllama_v1"]["reason"]
    assert "The fastest that is right here" in find(bench, "wb-kernel-note").value
    send(kernel, value="torch")
    assert bench._state.settle(60)
    assert bench.recipe.precision.backend == "torch"
    assert "TorchLinear" in find(bench, "wb-kernel-note").value
    click(find(bench, "wb-load"))
    wait_for(lambda: not bench._state.activity)
    assert "Loaded as previewed" in find(bench, "wb-load-report").value
    assert type(bench.session.model.model.layers[0].mlp.up_proj).__name__ == "TorchLinear"
    send(kernel, value="auto")
    assert bench.recipe.precision == wb.FullPrecision()

    send(find(bench, "wb-model"), value=str(tiny_llama))
    assert bench._state.settle(60)
    assert not shown(bench._model._kernel.box)
    assert not shown(weights)
    assert find(bench, "wb-quantize-config").value == ""
    assert bench.recipe.model == wb.ModelRef(name=str(tiny_llama))
    for name, says in (("~nobody-of-that-name/x", "cannot be looked at"), ("x" * 300, "x" * 40)):
        send(find(bench, "wb-model"), value=name)
        assert bench._state.settle(60)
        assert says in problem(bench)
        send(find(bench, "wb-context"), value=100 + len(name))  # everything else goes on
        assert bench.recipe.workload.context_length == 100 + len(name)


PUSH = """
import json, sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[3])
from played_page import wait_for
import workbench as wb
from workbench.panels.look import whole_tree
from workbench.panels.push import PushControls
from workbench.panels.state import State

state = State(wb.Recipe(model=sys.argv[1]), None)
push = PushControls(state)
push.offer(sys.argv[1])
said = []
for content in json.loads(sys.argv[2]):
    push.form._handle_custom_msg(content, [])
    wait_for(lambda: not state.activity)
    said.append([state.problems.get("push", ""), push._said.value])
kept = [part.get_state() for part in whole_tree(push.box)]
print(json.dumps({"said": said, "name": push.form.name, "busy": push.form.busy, "kept": repr(kept)}))
"""


def test_a_folder_goes_to_the_hub_and_the_token_is_kept_nowhere(tiny_llama: Path, tmp_path: Path) -> None:
    """The real client against the stand-in, in a process of its own; the message is the one that the page sends."""
    token = "hf_of_this_test"  # noqa: S105 - opens nothing but the server in this test
    messages = [
        {"repo_id": " ", "private": True, "token": token},
        {"repo_id": "tiny-gptq", "private": True, "token": token},
        {"repo_id": "org/open", "private": False, "token": token},
        {"repo_id": "org/other", "private": True, "token": ""},
    ]
    with UploadHub(tmp_path / "uploads", token=token) as hub:
        command = [sys.executable, "-c", PUSH, str(tiny_llama), json.dumps(messages), str(Path(__file__).parent)]
        done = subprocess.run(
            command, env=hub.env(tmp_path / "cache", token=None), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert "Name the repository" in found["said"][0][0]
        for (sentence, said), name in zip(found["said"][1:3], ("tester/tiny-gptq", "org/open"), strict=True):
            assert sentence == ""
            assert f'href="{hub.endpoint}/{name}"' in said
        assert hub.is_private("tester/tiny-gptq")
        assert not hub.is_private("org/open")
        came = {p.name for p in (tmp_path / "uploads" / "org" / "open").iterdir()}
        assert {"model.safetensors", "config.json", "README.md"} <= came
        assert "huggingface_hub.login()" in found["said"][3][0]  # without a token there is nobody to write as
        assert found["name"] == "tiny-llama"
        assert not found["busy"]
        assert token not in found["kept"]
        assert token not in done.stderr
