"""A quantized folder goes to the Hub: the real client against the stand-in, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from hub_uploads import UploadHub

import workbench as wb
from workbench.model import find_model
from workbench.upload import push_folder

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "hf_of_the_tests"  # noqa: S105 - opens nothing but the server in this file
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # huggingface_hub's own, when it uploads
from workbench.model import find_model
from workbench.upload import push_folder

answers = []
for folder, repo_id, options in json.loads(sys.argv[1]):
    try:
        answers.append(push_folder(find_model(folder), repo_id, **options))
    except ValueError as error:
        answers.append(f"ValueError: {error}")
print(json.dumps(answers))
"""


def push(hub: UploadHub, cache: Path, jobs: list[Any], *, token: str | None = TOKEN) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(jobs)]
    done = subprocess.run(command, env=hub.env(cache, token=token), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upload") / "tiny-gptq"
    text = wb.CalibrationText(samples=2, sequence_length=32)
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.GPTQ(group_size=32))
    wb.quantize(recipe, folder, calibration=text, evaluation=None)
    return folder


def test_push(quantized: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with UploadHub(tmp_path / "uploads", token=TOKEN, repos={"tester/public": tiny_llama}) as hub:
        answers = push(
            hub,
            tmp_path / "cache",
            [
                (str(quantized), "tiny-gptq", {}),
                (str(quantized), "org/open", {"private": False}),
                (str(quantized), "tester/public", {}),
                (str(quantized), "a/b/c", {}),
            ],
        )
        assert answers[:2] == [f"{hub.endpoint}/tester/tiny-gptq", f"{hub.endpoint}/org/open"]
        assert "tester/public exists and is public: name another repository, or say private=False" in answers[2]
        assert "is no name for a repository" in answers[3]
        assert hub.is_private("tester/tiny-gptq")
        assert not hub.is_private("org/open")
        for repo_id in ("tester/tiny-gptq", "org/open"):
            came = {p.name: p.read_bytes() for p in (tmp_path / "uploads" / repo_id).iterdir()}
            assert came == {p.name: p.read_bytes() for p in quantized.iterdir()}
        assert "model.safetensors" in came
        hub.read_only = True
        refused = push(hub, tmp_path / "cache", [(str(quantized), "org/new", {})])
        assert "does not let this token write to org/new" in refused[0]
        unknown = push(hub, tmp_path / "empty", [(str(quantized), "org/new", {})], token=None)
        assert "huggingface_hub.login()" in unknown[0]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (type("ConnectError", (Exception,), {})(TOKEN), r"The Hub cannot be reached \(ConnectError\): check the conn"),
        (PermissionError(13, "Permission denied", "/x/model.safetensors"), "/x/model.safetensors cannot be read"),
        (UnicodeEncodeError("ascii", TOKEN, 0, 1, "ordinal not in range"), "A token is plain letters"),
        (ValueError("Take another."), "Take another."),
    ],
)
def test_what_goes_wrong_is_a_sentence_without_the_token(
    error: Exception, sentence: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised where it would come: no connection is an error of the HTTP library of the day, of no kind of its own."""
    from huggingface_hub import HfApi

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(ValueError, match=sentence) as caught:
        push_folder(find_model(str(tiny_llama)), "tiny", token=f" {TOKEN}\n")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_only_folders(tiny_llama: Path, tmp_path: Path) -> None:
    with UploadHub(tmp_path / "uploads", token=TOKEN, repos={"org/tiny": tiny_llama}) as hub:
        answers = push(hub, tmp_path / "cache", [("org/tiny", "org/other", {})])
        assert "org/tiny is on the Hub already: quantize it into a folder and push that" in answers[0]
