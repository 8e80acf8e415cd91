"""The real clients against the stand-in Hub, each in a process of its own as the library needs it."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hub_server import HubServer

TOKEN = "hf_of_the_tests"  # noqa: S105  # opens nothing but the server in this file

CLIENT = """
import json, os, sys
from huggingface_hub import HfApi, get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub import errors

def failure(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return "no error"

api = HfApi()
answer = {}
"""


def ask(hub: HubServer, cache: Path, script: str, *, token: str | None = None) -> Any:
    """Run a script in a fresh interpreter that talks to `hub`; what it leaves in `answer` comes back."""
    program = f"{CLIENT}\n{textwrap.dedent(script)}\nprint(json.dumps(answer))"
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=hub.env(cache, token=token), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fetch(
    address: str, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Ask without a client library: no redirect followed, nothing retried."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


@pytest.fixture(scope="module")
def sharded_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama again, its weights in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_tiny_llama_is_what_its_docstring_says(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.bfloat16"}
    assert model.num_parameters() == 139_584
    assert sum(parameter.nbytes for parameter in model.parameters()) == 279_168
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.max_position_embeddings == 2048
    assert len(tokenizer) == 512
    assert all(tokenizer.decode([token]) for token in range(512))
    text = "What is the capital of France? Ça, 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<s>user: hi</s>\nassistant: "
    prompt = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (1, prompt.input_ids.shape[1] + 4)


def test_this_process_cannot_reach_the_hub() -> None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert get_token() is None
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("org/tiny")


def test_transformers_loads_config_tokenizer_and_model(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    script = """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        answer["layers"] = AutoConfig.from_pretrained("org/tiny").num_hidden_layers
        answer["template"] = AutoTokenizer.from_pretrained("org/tiny").chat_template is not None
        answer["missing"] = failure(AutoConfig.from_pretrained, "org/none")
        answer["gated"] = failure(AutoConfig.from_pretrained, "org/gated")
        model = AutoModelForCausalLM.from_pretrained("org/tiny", dtype="auto")
        answer["sum"] = model.lm_head.weight.double().sum().item()
    """
    with HubServer(repos={"org/tiny": tiny_llama, "org/gated": tiny_llama}, gated={"org/gated"}) as hub:
        answer = ask(hub, tmp_path / "cache", script)

    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    assert answer == {
        "layers": 2,
        "template": True,
        "missing": "OSError",
        "gated": "OSError",
        "sum": local.lm_head.weight.double().sum().item(),
    }
    assert hub.sent_bytes("/model.safetensors") == (tiny_llama / "model.safetensors").stat().st_size


def test_config_and_tokenizer_need_no_weights(tiny_llama: Path, tmp_path: Path) -> None:
    script = """
        from transformers import AutoConfig, AutoTokenizer

        answer["layers"] = AutoConfig.from_pretrained("org/tiny").num_hidden_layers
        answer["template"] = bool(AutoTokenizer.from_pretrained("org/tiny").chat_template)
    """
    with HubServer(repos={"org/tiny": tiny_llama}) as hub:
        answer = ask(hub, tmp_path / "cache", script)

    assert answer == {"layers": 2, "template": True}
    assert hub.sent_bytes("/config.json") > 0
    assert hub.sent_bytes(".safetensors") == 0
    assert not [request for request in hub.requests if request.host == "cdn"]


def test_model_info_and_listings(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nested"
    shutil.copytree(tiny_llama, folder)
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "log with space.txt").write_text("ok", encoding="utf-8")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("not content", encoding="utf-8")
    script = """
        info = api.model_info("org/tiny", files_metadata=True)
        answer["info"] = [info.id, info.sha, info.private, info.gated, info.card_data.license, info.pipeline_tag]
        answer["tags"] = info.tags
        answer["parameters"] = info.safetensors.parameters
        answer["sizes"] = {file.rfilename: file.size for file in info.siblings}
        answer["lfs"] = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
        answer["plain"] = [file.size for file in api.model_info("org/tiny").siblings]
        expanded = api.model_info("org/tiny", expand=["safetensors"])
        answer["expanded"] = [expanded.safetensors.total, expanded.sha, expanded.siblings]
        answer["top"] = [entry.path for entry in api.list_repo_tree("org/tiny")]
        answer["all"] = [entry.path for entry in api.list_repo_tree("org/tiny", recursive=True)]
        answer["below"] = [entry.path for entry in api.list_repo_tree("org/tiny", "runs/first")]
        answer["nowhere"] = failure(lambda: list(api.list_repo_tree("org/tiny", "nowhere")))
        answer["paths"] = [entry.path for entry in api.get_paths_info("org/tiny", ["config.json", "runs", "nowhere"])]
        answer["files"] = api.list_repo_files("org/tiny")
        answer["odd name"] = open(hf_hub_download("org/tiny", "runs/first/log with space.txt")).read()
    """
    with HubServer(repos={"org/tiny": folder}) as hub:
        answer = ask(hub, tmp_path / "cache", script)
        sha = hub.sha("org/tiny")

    files = {path.relative_to(tiny_llama).as_posix(): path.stat().st_size for path in tiny_llama.rglob("*")}
    files["runs/first/log with space.txt"] = 2
    assert answer["info"] == ["org/tiny", sha, False, False, "apache-2.0", "text-generation"]
    assert {"transformers", "safetensors", "llama", "tiny", "license:apache-2.0"} <= set(answer["tags"])
    assert answer["parameters"] == {"BF16": 139_584}
    assert answer["sizes"] == files
    assert list(answer["lfs"]) == ["model.safetensors"]
    assert set(answer["plain"]) == {None}
    assert answer["expanded"] == [139_584, None, None]
    assert set(answer["top"]) == {path for path in files if "/" not in path} | {"runs"}
    assert set(answer["all"]) == {*files, "runs", "runs/first"}
    assert answer["below"] == ["runs/first/log with space.txt"]
    assert answer["nowhere"] == "RemoteEntryNotFoundError"
    assert answer["paths"] == ["config.json", "runs"]
    assert set(answer["files"]) == set(files)
    assert answer["odd name"] == "ok"


def test_downloads_are_the_files_and_are_cached(tiny_llama: Path, tmp_path: Path) -> None:
    script = """
        answer["folder"] = snapshot_download("org/tiny")
        answer["file"] = hf_hub_download("org/tiny", "config.json")
    """
    with HubServer(repos={"org/tiny": tiny_llama}) as hub:
        first = ask(hub, tmp_path / "cache", script)
        once_bytes = hub.sent_bytes(".safetensors")
        assert ask(hub, tmp_path / "cache", script) == first
        again_bytes = hub.sent_bytes(".safetensors")

    for path in tiny_llama.iterdir():
        assert (Path(first["folder"]) / path.name).read_bytes() == path.read_bytes()
    assert Path(first["file"]) == Path(first["folder"]) / "config.json"
    assert Path(first["folder"]).name == hub.sha("org/tiny")
    assert once_bytes == again_bytes == (tiny_llama / "model.safetensors").stat().st_size


def test_safetensors_headers_cost_less_than_the_files(tiny_llama: Path, sharded_llama: Path, tmp_path: Path) -> None:
    # The client asks for the first 100,001 bytes of each file, which must not become the whole file.
    script = """
        whole = get_safetensors_metadata("org/tiny")
        answer["whole"] = [whole.parameter_count, whole.sharded, len(whole.weight_map)]
        answer["ranged"] = get_safetensors_metadata("org/shards").parameter_count
        answer["not safetensors"] = failure(get_safetensors_metadata, "org/empty")
    """
    empty = tmp_path / "empty"
    empty.mkdir()
    with HubServer(repos={"org/tiny": tiny_llama, "org/shards": sharded_llama, "org/empty": empty}) as hub:
        answer = ask(hub, tmp_path / "cache", script)

    # 2 embeddings, 9 tensors in each of 2 layers, the last norm.
    assert answer["whole"] == [{"BF16": 139_584}, False, 21]
    assert answer["ranged"] == {"BF16": 139_584}
    assert answer["not safetensors"] == "NotASafetensorsRepoError"
    assert hub.sent_bytes("/model.safetensors") == 100_001 < (tiny_llama / "model.safetensors").stat().st_size
    ranged = [request for request in hub.requests if request.host == "cdn"]
    assert {request.range for request in ranged} == {"bytes=0-100000"}
    assert {request.status for request in ranged} == {206}


def test_what_is_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    script = """
        answer["repo"] = failure(api.model_info, "org/none")
        answer["repo without org"] = failure(api.model_info, "none")
        answer["file of no repo"] = failure(hf_hub_download, "org/none", "config.json")
        answer["dataset"] = failure(api.dataset_info, "org/tiny")
        answer["revision"] = failure(api.model_info, "org/tiny", revision="none")
        answer["file of no revision"] = failure(hf_hub_download, "org/tiny", "config.json", revision="none")
        answer["file"] = failure(hf_hub_download, "org/tiny", "none.json")
        answer["token"] = failure(api.whoami)
        answer["exists"] = [api.repo_exists("org/tiny"), api.repo_exists("org/none")]
        answer["exists"].append(api.file_exists("org/tiny", "none.json"))
    """
    with HubServer(repos={"org/tiny": tiny_llama}, token=TOKEN) as hub:
        anonymous = ask(hub, tmp_path / "anonymous", script)
        known = ask(hub, tmp_path / "known", script, token=TOKEN)

    expected = {
        "repo": "RepositoryNotFoundError",
        "repo without org": "RepositoryNotFoundError",
        "file of no repo": "RepositoryNotFoundError",
        "dataset": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "file of no revision": "RevisionNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "exists": [True, False, False],
    }
    assert anonymous == expected | {"token": "LocalTokenNotFoundError"}
    assert known == expected | {"token": "no error"}


def test_private_gated_and_wrong_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    script = """
        answer["private"] = failure(api.model_info, "org/private")
        answer["gated page"] = api.model_info("org/gated").gated
        answer["gated"] = failure(hf_hub_download, "org/gated", "config.json")
        answer["gated weights"] = failure(hf_hub_download, "org/gated", "model.safetensors")
        answer["not granted"] = failure(hf_hub_download, "org/asked", "config.json")
        answer["auth check"] = failure(api.auth_check, "org/asked")
        answer["user"] = failure(api.whoami)
    """
    folders = dict.fromkeys(["org/private", "org/gated", "org/asked"], tiny_llama)
    gated = {"org/gated", "org/asked"}
    with HubServer(repos=folders, private={"org/private"}, gated=gated, granted={"org/gated"}, token=TOKEN) as hub:
        anonymous = ask(hub, tmp_path / "anonymous", script)
        before = len(hub.requests)
        assert not any(request.authorized for request in hub.requests)
        known = ask(hub, tmp_path / "known", script, token=TOKEN)
        later = hub.requests[before:]
        wrong = ask(hub, tmp_path / "wrong", "answer = failure(api.model_info, 'org/gated')", token="hf_wrong")  # noqa: S106

    assert anonymous == {
        "private": "RepositoryNotFoundError",
        "gated page": "manual",
        "gated": "GatedRepoError",
        "gated weights": "GatedRepoError",
        "not granted": "GatedRepoError",
        "auth check": "GatedRepoError",
        "user": "LocalTokenNotFoundError",
    }
    assert known == {
        "private": "no error",
        "gated page": "manual",
        "gated": "no error",
        "gated weights": "no error",
        "not granted": "GatedRepoError",
        "auth check": "GatedRepoError",
        "user": "no error",
    }
    assert wrong == "HfHubHTTPError"
    assert all(request.authorized for request in later if request.host == "hub")
    assert [request.authorized for request in later if request.host == "cdn"] == [False]  # no token leaves the hub


def test_revisions_are_commits_of_their_content(tiny_llama: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(tiny_llama, older)
    (older / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    same = tmp_path / "same"
    shutil.copytree(tiny_llama, same)
    script = """
        def kind(revision):
            return json.load(open(hf_hub_download("org/tiny", "config.json", revision=revision)))["model_type"]

        sha = api.model_info("org/tiny", revision="v0/first").sha
        answer["kinds"] = [kind(None), kind("main"), kind("v0/first"), kind(sha)]
        answer["sha"] = api.model_info("org/tiny", revision=sha).sha
        answer["tags"] = {tag.name: tag.target_commit for tag in api.list_repo_refs("org/tiny").tags}
    """
    repos = {"org/tiny": tiny_llama, "org/same": same}
    with HubServer(repos=repos, revisions={"org/tiny": {"v0/first": older}}) as hub:
        answer = ask(hub, tmp_path / "cache", script)

    assert answer["kinds"] == ["llama", "llama", "gpt2", "gpt2"]
    assert answer["sha"] == hub.sha("org/tiny", "v0/first") != hub.sha("org/tiny")
    assert answer["tags"] == {"v0/first": answer["sha"]}
    assert hub.sha("org/same") == hub.sha("org/tiny")
    assert len(answer["sha"]) == 40


@pytest.mark.parametrize(
    ("asked", "status", "content_range", "part"),
    [
        (None, 200, None, slice(0, 10)),
        ("bytes=0-3", 206, "bytes 0-3/10", slice(0, 4)),
        ("bytes=4-", 206, "bytes 4-9/10", slice(4, 10)),
        ("bytes=-3", 206, "bytes 7-9/10", slice(7, 10)),
        ("bytes=8-99", 206, "bytes 8-9/10", slice(8, 10)),
        ("bytes=10-12", 416, "bytes */10", None),
        ("bytes=0-1,4-5", 200, None, slice(0, 10)),
    ],
)
def test_ranges(tmp_path: Path, asked: str | None, status: int, content_range: str | None, part: slice | None) -> None:
    content = b"0123456789"
    (tmp_path / "notes.txt").write_bytes(content)
    headers = {"Range": asked} if asked else {}
    with HubServer(repos={"org/notes": tmp_path}) as hub:
        got = fetch(hub.endpoint, "/org/notes/resolve/main/notes.txt", headers=headers)
        head = fetch(hub.endpoint, "/org/notes/resolve/main/notes.txt", headers=headers, method="HEAD")

    assert (got[0], got[1]["Content-Range"]) == (status, content_range) == (head[0], head[1]["Content-Range"])
    assert head[2] == b""
    assert head[1]["Content-Length"] == got[1]["Content-Length"] == str(len(got[2]))
    if part is not None:
        assert got[2] == content[part]
        assert got[1]["Accept-Ranges"] == "bytes"
    assert [(request.method, request.range, request.status) for request in hub.requests] == [
        ("GET", asked, status),
        ("HEAD", asked, status),
    ]
    assert [request.sent_bytes for request in hub.requests] == [len(got[2]), 0]


def test_weights_are_redirected_with_their_size_and_hash(tiny_llama: Path) -> None:
    import hashlib

    content = (tiny_llama / "model.safetensors").read_bytes()
    with HubServer(repos={"org/tiny": tiny_llama}) as hub:
        status, headers, body = fetch(hub.endpoint, "/org/tiny/resolve/main/model.safetensors", method="HEAD")
        location = headers["Location"]
        delivered = fetch(location, urlsplit(location).path)[2]

    assert (status, body) == (302, b"")
    assert urlsplit(location).netloc != urlsplit(hub.endpoint).netloc
    assert headers["X-Linked-Size"] == str(len(content))
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert headers["X-Repo-Commit"] == hub.sha("org/tiny")
    assert delivered == content


def test_a_slow_download_can_be_watched_and_sped_up(tiny_llama: Path, tmp_path: Path) -> None:
    weights_bytes = (tiny_llama / "model.safetensors").stat().st_size
    result: list[str] = []

    def download() -> None:
        result.append(ask(hub, tmp_path / "cache", 'answer = hf_hub_download("org/tiny", "model.safetensors")'))

    # At this speed it would take three quarters of an hour.
    with HubServer(repos={"org/tiny": tiny_llama}, bytes_per_s=100) as hub:
        client = threading.Thread(target=download)
        client.start()
        hub.wait_until(lambda: hub.sent_bytes(".safetensors") > 0)
        assert hub.sent_bytes(".safetensors") < weights_bytes
        hub.bytes_per_s = None
        client.join()

    assert Path(result[0]).read_bytes() == (tiny_llama / "model.safetensors").read_bytes()


def test_closing_cuts_a_running_download_and_leaves_no_thread(tiny_llama: Path) -> None:
    threads = set(threading.enumerate())
    with HubServer(repos={"org/tiny": tiny_llama}, bytes_per_s=100) as hub:
        location = fetch(hub.endpoint, "/org/tiny/resolve/main/model.safetensors")[1]["Location"]
        connection = http.client.HTTPConnection(urlsplit(location).netloc, timeout=60)
        connection.request("GET", urlsplit(location).path)
        response = connection.getresponse()
        assert response.read(1)
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    connection.close()

    assert set(threading.enumerate()) == threads
    assert hub.sent_bytes(".safetensors") < (tiny_llama / "model.safetensors").stat().st_size


def test_waiting_in_vain_says_what_was_asked(tmp_path: Path) -> None:
    with HubServer(repos={"org/empty": tmp_path}) as hub:
        fetch(hub.endpoint, "/api/models/org/empty")
        with pytest.raises(TimeoutError, match="/api/models/org/empty"):
            hub.wait_until(lambda: False, timeout_s=0)


def test_a_broken_repository_is_served_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with HubServer(repos={"org/broken": tmp_path}) as hub:
        status, _, body = fetch(hub.endpoint, "/api/models/org/broken")

    info = json.loads(body)
    assert status == 200
    assert [file["rfilename"] for file in info["siblings"]] == ["config.json", "model.safetensors"]
    assert info["config"] == {}
    assert "safetensors" not in info


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write it as 'org/name'"):
        HubServer(repos={"tiny": tmp_path})
    with pytest.raises(ValueError, match="is not a folder"):
        HubServer(repos={"org/tiny": tmp_path / "none"})
    with pytest.raises(ValueError, match="add it to repos"):
        HubServer(repos={"org/tiny": tmp_path}, gated={"org/other"})
    with pytest.raises(ValueError, match="at least 1"):
        HubServer(repos={"org/tiny": tmp_path}, bytes_per_s=0)
