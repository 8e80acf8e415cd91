from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hub_server import HubServer

import workbench as wb
from workbench.model import find_model, refuses_unknown

if TYPE_CHECKING:
    from pathlib import Path


def test_references() -> None:
    assert wb.ModelRef.parse("org/name@v1") == wb.ModelRef(name="org/name", revision="v1")
    assert wb.ModelRef.parse(" demo ") == wb.ModelRef(name="demo")
    assert str(wb.ModelRef.parse("org/name@v1")) == "org/name@v1"


def test_a_folder_with_an_at_sign_is_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model@home"
    shutil.copytree(tiny_llama, folder)
    assert wb.ModelRef.parse(str(folder)).revision is None
    assert find_model(str(folder)).title == "model@home"


def test_what_is_found_of_a_folder(tiny_llama: Path) -> None:
    source = find_model(str(tiny_llama))
    assert source.is_local
    assert source.licence == "apache-2.0"
    assert [f.name for f in source.weight_files] == ["model.safetensors"]
    assert source.weight_files[0].size_bytes == (tiny_llama / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./no/such/folder/at/all", "There is no folder ./no/such/folder/at/all"),
        ("two words", "There is no folder two words"),
    ],
)
def test_names_that_mean_nothing(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wb.read_skeleton(name)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config.json"):
        wb.read_skeleton(str(tmp_path))


def test_a_file(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="is a file; name the folder"):
        wb.read_skeleton(str(tiny_llama / "config.json"))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{ not json", "config.json cannot be read"),
        ("{}", "config.json of .* cannot be used"),
        ('{"model_type": "no-such-type"}', "config.json of .* cannot be used"),
        ('{"model_type": "vit"}', "is of type 'vit', which is no causal language model"),
        ('{"model_type": "clip"}', "is of type 'clip', which is no causal language model"),
        (
            '{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}',
            r"cannot be used: .*hidden size \(65\) is not a multiple",
        ),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}',
            r"needs Python code that comes with it.*trust_remote_code=True",
        ),
    ],
)
def test_configs_that_cannot_be_used(tmp_path: Path, config: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        wb.read_skeleton(str(tmp_path))


def test_offline_and_not_in_the_cache() -> None:
    with pytest.raises(ValueError, match=r"The Hub cannot be asked for 'org/absent'.*name a local folder or 'demo'"):
        wb.read_skeleton("org/absent")


def run_with_hub(hub: HubServer, cache: Path, code: str) -> dict[str, object]:
    """Run code in a process whose Hub is the local server; it prints JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code], env=hub.env(cache), capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_a_hub_model_is_previewed_without_its_weights_and_then_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    with HubServer(repos={"org/tiny": tiny_llama}) as hub:
        preview = run_with_hub(
            hub,
            tmp_path,
            "import json, workbench as wb\n"
            "skeleton = wb.read_skeleton('org/tiny')\n"
            "placement = wb.place(wb.Recipe(model='org/tiny'))\n"
            "print(json.dumps([skeleton.source.revision, skeleton.source.licence, placement.total_bytes]))",
        )
        assert preview[:2] == [hub.sha("org/tiny"), "apache-2.0"]  # type: ignore[index]
        assert hub.sent_bytes(".safetensors") == 0
        steps = run_with_hub(
            hub,
            tmp_path,
            "import json, workbench as wb\n"
            "steps = []\n"
            "session = wb.load(wb.Recipe(model='org/tiny'), progress=steps.append)\n"
            "text = session.generate('Hello', max_new_tokens=3)\n"
            "downloads = [s for s in steps if s.stage == 'download']\n"
            "stages = list(dict.fromkeys(s.stage for s in steps))\n"
            "print(json.dumps([stages, max(s.done for s in downloads), session.load_report.matches]))",
        )
        size = (tiny_llama / "model.safetensors").stat().st_size
        assert steps == [["resolve", "download", "read", "check"], size, True]
        assert hub.sent_bytes(".safetensors") == size


def test_a_download_can_be_cancelled(tiny_llama: Path, tmp_path: Path) -> None:
    """The Hub sends slowly; the load is cancelled when the first bytes have come, long before the last."""
    code = (
        "import json, threading, workbench as wb\n"
        "cancel = threading.Event()\n"
        "def progress(step):\n"
        "    if step.stage == 'download' and step.done: cancel.set()\n"
        "try: wb.load(wb.Recipe(model='org/big'), progress=progress, cancel=cancel); print('\"loaded\"')\n"
        "except wb.Cancelled: print('\"cancelled\"')\n"
    )
    folder = tmp_path / "big"
    shutil.copytree(tiny_llama, folder)
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {**load_file(folder / "model.safetensors"), "padding": torch.zeros(30_000_000, dtype=torch.uint8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with HubServer(repos={"org/big": folder}, bytes_per_s=5_000_000) as hub:
        assert run_with_hub(hub, tmp_path / "cache", code) == "cancelled"
        assert hub.sent_bytes(".safetensors") < 30_000_000


def test_hub_errors_are_sentences(tiny_llama: Path, tmp_path: Path) -> None:
    code = (
        "import json, workbench as wb\n"
        "found = {}\n"
        "for name in ('org/absent', 'org/tiny@nowhere', 'org/gated'):\n"
        "    try: wb.read_skeleton(name)\n"
        "    except ValueError as error: found[name] = str(error)\n"
        "print(json.dumps(found))"
    )
    with HubServer(repos={"org/tiny": tiny_llama, "org/gated": tiny_llama}, gated={"org/gated"}) as hub:
        found = run_with_hub(hub, tmp_path, code)
    assert "The Hub has no model 'org/absent'" in str(found["org/absent"])
    assert "has no revision 'nowhere'" in str(found["org/tiny@nowhere"])
    assert "is gated: accept its terms" in str(found["org/gated"])
    assert "huggingface_hub.login()" in str(found["org/gated"])


def test_a_token_appears_nowhere(tiny_llama: Path, tmp_path: Path) -> None:
    token = "hf_" + "s3cret" * 5
    code = (
        "import workbench as wb\n"
        "recipe = wb.Recipe(model='org/private')\n"
        "placement = wb.place(recipe)\n"
        "print(recipe.to_json(), recipe.to_python(placement), placement, wb.read_skeleton('org/private').source)\n"
        "try: wb.read_skeleton('org/absent')\n"
        "except ValueError as error: print(error)\n"
    )
    with HubServer(repos={"org/private": tiny_llama}, private={"org/private"}, token=token) as hub:
        result = subprocess.run(
            [sys.executable, "-c", code], env=hub.env(tmp_path, token=token), capture_output=True, text=True, check=True
        )
    assert "no model 'org/absent'" in result.stdout
    assert token not in result.stdout + result.stderr


def test_demo_is_the_original_where_the_hub_has_it(tiny_llama: Path, tmp_path: Path) -> None:
    original = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with HubServer(repos={original: tiny_llama}) as hub:  # a stand-in for its files; the name is what counts
        code = "import json, workbench as wb; print(json.dumps(wb.read_skeleton('demo').source.location))"
        assert run_with_hub(hub, tmp_path, code) == original


def test_demo_says_what_it_is(demo_model: Path) -> None:
    source = find_model("demo")
    assert source.location == str(demo_model)
    assert "dequantized from Q4_1" in source.title
    assert "dequantized from Q4_1" in (demo_model / "README.md").read_text(encoding="utf-8")
    assert source.licence == "apache-2.0"


def test_a_killed_conversion_leaves_nothing_half_made(tmp_path: Path) -> None:
    """Kill a real conversion as soon as it has begun to write, then look at what is there."""
    import os

    code = "import workbench as wb; wb.fetch_demo_model()"
    env = {**os.environ, "WORKBENCH_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    wait = threading.Event()
    while not any(".partial-" in path.name for path in tmp_path.iterdir()):
        assert process.poll() is None, "the conversion ended before it could be killed"
        assert time.monotonic() < deadline
        wait.wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert wb.fetch_demo_model().is_dir()  # and the user's own copy is still there


def test_unknown_keywords_of_functions() -> None:
    @refuses_unknown
    def cook(*, salt: int = 0, pepper: int = 0) -> int:
        return salt + pepper

    assert cook(salt=1, pepper=2) == 3
    with pytest.raises(
        TypeError, match=r"cook has no option 'peper'. Did you mean 'pepper'\? Valid options: salt, pepper"
    ):
        cook(peper=1)


def test_a_hub_that_refuses_the_connection_is_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    code = (
        "import json, workbench as wb\n"
        "try: wb.read_skeleton('org/tiny')\n"
        "except ValueError as error: print(json.dumps({'said': str(error)}))\n"
    )
    with HubServer(repos={"org/tiny": tiny_llama}) as hub:
        env = hub.env(tmp_path)
    # The server is gone: nothing listens there any more.
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "The Hub cannot be asked for 'org/tiny'" in json.loads(result.stdout.splitlines()[-1])["said"]
