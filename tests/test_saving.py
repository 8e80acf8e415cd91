"""Saved and loaded again: the same logits to the bit, whether it had run before it was saved or not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hub_uploads import UploadHub

import workbench as wb
from workbench import weight_cache
from workbench.four_bit import unpack
from workbench.session import in_worker

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "hf_of_the_tests"  # noqa: S105 - opens nothing but the server in this file
IDS = (torch.arange(40) * 7 % 500)[None]
PRECISIONS = {
    "float32": wb.FullPrecision(dtype="float32"),
    "int8": wb.Int8(),
    "int8-skips": wb.Int8(threshold=3.0, skip_modules=("lm_head", "model.layers.0.mlp")),
    "nf4": wb.FourBit(double_quant=False),
    "nf4-double": wb.FourBit(skip_modules=("lm_head", "q_proj")),
    "fp4": wb.FourBit(quant_type="fp4", quant_storage="bfloat16"),
}


def logits(session: wb.Session) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = session.model(IDS).logits.clone()
    return found


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_same_to_the_bit(name: str, tiny_llama: Path, tmp_path: Path, load: Any) -> None:
    precision: Any = PRECISIONS[name]
    session = load(tiny_llama, precision=precision)
    fresh = session.save(tmp_path / "fresh")
    before = logits(session)
    used = session.save(tmp_path / "used")
    assert (used / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()
    assert torch.equal(logits(session), before)  # saving changed nothing

    again = load(used)
    assert again.load_report.matches, again.load_report.lines
    assert again.load_report.measured_bytes == session.load_report.measured_bytes
    assert torch.equal(logits(again), before)
    assert again.generate("Hello", max_new_tokens=8) == session.generate("Hello", max_new_tokens=8)
    names = {path.name for path in used.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} < names
    assert wb.Recipe.from_json((used / "recipe.json").read_text()) == session.recipe
    if precision.package is not None:
        assert again.skeleton.stored == precision if name.startswith("int8") else again.skeleton.stored is not None
        assert again.placement.precision.skip_modules == precision.skip_modules
        kinds = [type(m).__name__ for _, m in again.model.named_modules() if hasattr(m, "weight")]
        assert kinds == [type(m).__name__ for _, m in session.model.named_modules() if hasattr(m, "weight")]
        twice = again.save(tmp_path / "twice")
        assert (twice / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()


def test_plain_save_pretrained_is_right_after_a_run_too(tiny_llama: Path, tmp_path: Path, load: Any) -> None:
    """On some CPUs bitsandbytes alone would write other weights then; a model loaded here is spared that."""
    session = load(tiny_llama, precision=wb.FourBit(double_quant=False))
    before = logits(session)
    session.model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), before)


def test_unpacked_weights_are_those_that_were_loaded(tiny_llama: Path, load: Any) -> None:
    session = load(tiny_llama, precision=wb.FourBit())
    before = {k: v.clone() for k, v in session.model.state_dict().items()}
    logits(session)
    unpack(session.model)
    after = session.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_half_done_is_left(
    tiny_llama: Path, tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load(tiny_llama, precision=wb.Int8())
    folder = session.save(tmp_path / "made")
    kept = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"made exists: name a new folder, or say overwrite=True"):
        session.save(folder)
    (folder / "config.json").with_name("mine.txt").write_text("x")
    session.save(folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert (folder / "config.json").read_bytes() == kept

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session.tokenizer, "save_pretrained", fail)
    with pytest.raises(ValueError, match=r"The disk with .* is full; nothing was left there: make room"):
        session.save(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (folder / "config.json").read_bytes() == kept

    caught = threading.Event()

    def interrupt(*_: Any, **__: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert caught.wait(60)

    monkeypatch.setattr(session.tokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.save(folder, overwrite=True)
    caught.set()
    in_worker(lambda: None)  # what was being written when the interrupt came
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (folder / "recipe.json").is_file()


def test_a_full_disk(tiny_llama: Path, small_disk: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors says it, which knows kinds of errors of its own."""
    session = load(tiny_llama)
    session.adapters.load(trained(session, small_disk.parent / "french"))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - session.adapters.list()[0].size_bytes))
    with pytest.raises(ValueError, match=r"The disk with .* is full"):
        session.adapters.save("french", small_disk / "adapter")
    session.adapters.remove("french")
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free + filler.stat().st_size - 283_000))
    with pytest.raises(ValueError, match=r"The disk with .* is full"):
        session.save(small_disk / "made")
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(small_disk / "cache"))
    monkeypatch.setattr(weight_cache, "_MOST_OF_FREE", 1.0)
    assert not weight_cache.keep("key", session.model, title="", precision="", size_bytes=1000)
    assert list((small_disk / "cache" / "quantized").iterdir()) == []
    assert not list(small_disk.glob(".*"))


def trained(session: wb.Session, folder: Path) -> Path:
    """An adapter that has learnt as good as nothing."""
    session.train_adapter(["Some text."], name="french", steps=1, folder=folder)
    session.adapters.remove("french")
    return folder


def test_the_original_is_never_replaced(
    tiny_llama: Path, tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is read through links, because its weights have a name of their own."""
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_llama, tmp_path / "mine" / "tiny")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    weights = folder / "weights.safetensors"
    session = load(folder, precision=wb.FourBit())
    assert session.skeleton.source.location != str(folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    for target, verb in ((folder, "is"), (linked, "is"), (folder.parent, "holds")):
        with pytest.raises(ValueError, match=f"{target.name} {verb} the model itself: name another folder"):
            session.save(target, overwrite=True)
    assert weights.is_file()
    assert session.save(folder / "saved")  # below it is beside its files


def test_what_cannot_be_saved(tiny_llama: Path, tmp_path: Path, load: Any) -> None:
    with pytest.raises(ValueError, match="is the model itself: name another folder"):
        load(tiny_llama).save(tiny_llama, overwrite=True)
    (tmp_path / "file").write_text("x")
    session = load(tiny_llama, precision=wb.Int8(has_fp16_weight=True))
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        load(tiny_llama).save(tmp_path / "file")
    with pytest.raises(ValueError, match="has_fp16_weight keeps the weights in 16 bits"):
        session.save(tmp_path / "new")
    session.unload()
    with pytest.raises(ValueError, match="unloaded: load it again"):
        session.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


PROGRAM = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # huggingface_hub's own, when it uploads
import torch
import workbench as wb

def logits(session):
    with torch.inference_mode():
        return session.model((torch.arange(40) * 7 % 500)[None]).logits

recipe = wb.Recipe(model=sys.argv[1], precision=wb.FourBit(), workload=wb.Workload(context_length=128))
session = wb.load(recipe)
before = logits(session)
url = session.push_to_hub("tester/tiny-nf4")
again = wb.load(recipe.with_(model="tester/tiny-nf4", precision=wb.FullPrecision()))
print(json.dumps([url, again.load_report.matches, again.skeleton.quantized_as, torch.equal(logits(again), before)]))
"""


def test_push_and_load_from_the_hub(tiny_llama: Path, tmp_path: Path) -> None:
    with UploadHub(tmp_path / "uploads", token=TOKEN) as hub:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tiny_llama)],
            env=hub.env(tmp_path / "cache", token=TOKEN),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said == [f"{hub.endpoint}/tester/tiny-nf4", True, "bitsandbytes nf4 + double quantization", True]
        assert hub.is_private("tester/tiny-nf4")
