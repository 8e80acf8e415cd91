"""What a load says while it goes on, what it keeps, what it refuses, and what is left when it is stopped."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from test_quantize_4bit import assert_same_tensors

import workbench as wb
from workbench import load_guard, loading, weight_cache
from workbench.session import worker

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Quantized weights are kept, however fast they were made, in a folder of this test's own."""
    monkeypatch.setattr(loading, "_WORTH_KEEPING_SECONDS", 0.0)
    monkeypatch.setattr(loading, "key_of", weight_cache.key_of)
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def loaded_linears() -> int:
    """How many linear modules with real weights are alive, in whichever session."""
    import torch

    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) is torch.nn.Linear and not o.weight.is_meta)


def sharded(folder: Path, target: Path) -> Path:
    """The same model in three files or more."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="100kB")
    return target


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [wb.FullPrecision(), wb.FourBit()], ids=["read", "quantize"])
def test_progress_counts_bytes_and_files(tiny_llama: Path, tmp_path: Path, precision: Any) -> None:
    folder = sharded(tiny_llama, tmp_path / "sharded")
    files = len(list(folder.glob("*.safetensors")))
    steps: list[wb.Progress] = []
    wb.load(wb.Recipe(model=str(folder), precision=precision), progress=steps.append).unload()
    stages = list(dict.fromkeys(step.stage for step in steps))
    stage = "quantize" if precision == wb.FourBit() else "read"
    assert stages == ["resolve", stage, "check"]
    reading = [step for step in steps if step.stage == stage]
    assert len(reading) == 21  # 2 layers of 9 tensors, embedding, norm and head
    done = [step.done for step in reading]
    assert done == sorted(done)
    # 279,168 bytes of parameters and two buffers of rotary frequencies that no file holds
    assert {step.total for step in reading} == {279_232}
    assert done[-1] <= 279_168
    assert files > 2
    assert reading[-1].text.endswith(f"file {files} of {files}")


def test_time_left_is_said_after_a_moment() -> None:
    from workbench.load_progress import _left

    now = time.perf_counter()
    assert _left(now, 10, 100) == ""
    assert _left(now - 10, 50, 100) == ", 10 s left"
    assert _left(now - 100, 10, 100) == ", 15 min left"
    assert _left(now - 10, 0, 100) == ""


def test_a_cancel_in_the_middle_of_a_weight_is_heard(demo_model: Path) -> None:
    """Cancelled when quantizing begins; the first weight alone would take a while, its pieces do not."""
    cancel = threading.Event()
    set_at: list[float] = []

    def progress(step: wb.Progress) -> None:
        if step.stage == "quantize" and not set_at and step.done > 60_000_000:
            cancel.set()
            set_at.append(time.perf_counter())

    with pytest.raises(wb.Cancelled):
        wb.load(wb.Recipe(model=str(demo_model), precision=wb.FourBit()), progress=progress, cancel=cancel)
    assert time.perf_counter() - set_at[0] < 1.0


# --- the tokenizer, and the model's own ------------------------------------------------------------------------------


def test_the_tokenizer_is_read_when_it_is_needed(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "mute")
    for file in folder.glob("token*"):
        file.unlink()
    session = wb.load(wb.Recipe(model=str(folder)))
    assert session.tokenizer is None
    with pytest.raises(ValueError, match="mute came without a tokenizer"):
        session.generate("hello")
    session.unload()
    (folder / "tokenizer.json").write_text("{}")
    tokenizer, why = loading.read_tokenizer(wb.read_skeleton(str(folder)))
    assert tokenizer is None
    assert why.startswith("The tokenizer of mute cannot be read (")


def test_linears_of_others_are_still_initialized(tiny_llama: Path) -> None:
    import torch

    with loading._spared_from_random_numbers():
        real, meta = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, device="meta")
    assert 0 < real.weight.abs().sum() < 64
    assert meta.weight.is_meta


# --- kept weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [wb.FourBit(), wb.Int8()], ids=["nf4", "int8"])
def test_a_second_load_takes_what_the_first_has_quantized(tiny_llama: Path, keeps: Path, precision: Any) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), precision=precision)
    first = wb.load(recipe)
    assert any("are kept for the next load" in line for line in first.load_report.lines)
    (kept,) = wb.kept_weights()
    assert (kept.title, kept.precision, kept.folder.parent) == ("tiny-llama", precision.label, keeps)
    assert kept.size_bytes == sum(f.stat().st_size for f in kept.folder.iterdir() if f.name != "workbench.json")
    steps: list[wb.Progress] = []
    second = wb.load(recipe, progress=steps.append)
    assert "quantize" not in {step.stage for step in steps}
    assert any("were kept from an earlier load" in line for line in second.load_report.lines)
    assert second.load_report.matches
    assert second.model.name_or_path == first.model.name_or_path == str(tiny_llama)
    assert_same_tensors(second.model, first.model)
    assert second.generate("hello", max_new_tokens=5) == first.generate("hello", max_new_tokens=5)
    first.unload()
    assert wb.empty_kept_weights() == kept.size_bytes
    assert wb.kept_weights() == ()
    assert second.generate("hello", max_new_tokens=5)  # what is mapped stays
    second.unload()


def test_what_is_kept_and_damaged_is_made_anew(tiny_llama: Path, keeps: Path) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.FourBit())
    first = wb.load(recipe)
    expected = first.generate("hello", max_new_tokens=5)
    weights = next(keeps.glob("*/model.safetensors"))
    size = weights.stat().st_size
    for damage, said in ((b"\xff" * size, "kept from an earlier load were damaged"), (b"", "kept for the next load")):
        weights.unlink()  # the model before this one has it mapped
        weights.write_bytes(damage)
        session = wb.load(recipe)
        assert any(said in line for line in session.load_report.lines), session.load_report.lines
        assert session.generate("hello", max_new_tokens=5) == expected
        assert weights.stat().st_size == size
        session.unload()
    first.unload()


def test_other_choices_and_other_files_are_others(tiny_llama: Path, tmp_path: Path, keeps: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "mine")
    for precision in (wb.FourBit(), wb.FourBit(quant_type="fp4"), wb.FourBit(skip_modules=("lm_head", "down_proj"))):
        wb.load(wb.Recipe(model=str(folder), precision=precision)).unload()
    assert len(wb.kept_weights()) == 3
    wb.load(wb.Recipe(model=str(folder), precision=wb.FourBit())).unload()
    assert len(wb.kept_weights()) == 3
    stat = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    wb.load(wb.Recipe(model=str(folder), precision=wb.FourBit())).unload()
    assert len(wb.kept_weights()) == 4
    wb.load(wb.Recipe(model=str(folder)))  # nothing to keep
    wb.load(wb.Recipe(model=str(folder), precision=wb.Int8()), keep_quantized=False)
    assert len(wb.kept_weights()) == 4
    assert keeps.is_dir()


def test_what_was_not_used_for_longest_goes_first(
    tiny_llama: Path, keeps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [wb.FourBit(), wb.FourBit(quant_type="fp4"), wb.Int8()]
    for age, precision in zip((3, 2), kinds, strict=False):
        wb.load(wb.Recipe(model=str(tiny_llama), precision=precision)).unload()
        newest = wb.kept_weights()[0]
        os.utime(newest.folder, (age, age))
    used = wb.load(wb.Recipe(model=str(tiny_llama), precision=kinds[0]))  # used again: now the other one is older
    used.unload()
    held = sum(kept.size_bytes for kept in wb.kept_weights())
    monkeypatch.setattr(weight_cache, "MOST_BYTES", held + 100_000)
    wb.load(wb.Recipe(model=str(tiny_llama), precision=kinds[2])).unload()
    assert [kept.precision for kept in wb.kept_weights()] == ["int8", "nf4 + double quantization"]
    monkeypatch.setattr(weight_cache, "MOST_BYTES", 1)
    report = wb.load(wb.Recipe(model=str(tiny_llama), precision=wb.FourBit(double_quant=False))).load_report
    assert not any("kept" in line for line in report.lines)


# --- the guard --------------------------------------------------------------------------------------------------------


def test_what_is_free_now_counts_and_can_be_passed_over(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that is found is the real one with less free: nothing else brings that about at will."""
    recipe = wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "1GiB"})
    seen = wb.Machine.detect()
    import dataclasses

    cpu = dataclasses.replace(seen.device("cpu"), free_bytes=500_000)
    full = dataclasses.replace(seen, devices=tuple(cpu if d.id == "cpu" else d for d in seen.devices))
    monkeypatch.setattr(wb.Machine, "detect", classmethod(lambda _, **__: full))
    with pytest.raises(wb.DoesNotFit, match=r"cpu has 0.5 MB|cpu has .* free now, but .* anyway=True") as caught:
        wb.load(recipe, machine=seen)
    assert caught.value.can_try
    session = wb.load(recipe, machine=seen, anyway=True)
    assert session.load_report.matches
    session.unload()


def test_what_has_no_place_cannot_be_tried(tiny_llama: Path) -> None:
    with pytest.raises(wb.DoesNotFit) as caught:
        wb.load(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "100KiB"}), anyway=True)
    assert not caught.value.can_try
    assert caught.value.advice[0].changes
    placement = wb.place(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "100KiB"}))
    said = str(load_guard.after_running_out(placement, wb.read_skeleton(str(tiny_llama)), "It"))
    assert said.startswith("It ran out of memory. ")  # nobody had said that it fits


def test_pickles_that_wait_on_a_full_disk(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny_llama, tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    seen, usage = wb.Machine.detect(), shutil.disk_usage(folder)
    monkeypatch.setattr(load_guard.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    reference = wb.ModelRef(name=str(folder), allow_pickle=True)
    recipe = wb.Recipe(model=reference, strategy="custom", device_map={"": "disk"})
    with pytest.raises(wb.DoesNotFit, match="because the checkpoint's own files are pickles: make room"):
        wb.load(recipe, machine=seen)


def test_memory_that_runs_out_is_given_back_and_a_way_out_is_named(tiny_llama: Path) -> None:
    """In the middle of the load more is asked for than any machine has: torch's own error, where it would come."""
    import torch

    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.FullPrecision(dtype="float32"))
    before = loaded_linears()

    def progress(step: wb.Progress) -> None:
        if step.stage == "read" and step.done > 200_000:
            torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(wb.DoesNotFit) as caught:
        wb.load(recipe, progress=progress)
    said = str(caught.value)
    assert said.startswith(
        "Loading tiny-llama ran out of memory, though the preview said that it fits. Load it in int8"
    )
    assert caught.value.advice[0].apply(recipe).precision == wb.Int8()
    assert loaded_linears() == before
    session = wb.load(recipe)
    session.unload()


def test_an_answer_that_runs_out_of_memory_leaves_a_session_that_works(tiny_llama: Path) -> None:
    import torch

    session = wb.load(wb.Recipe(model=str(tiny_llama)))
    expected = session.generate("hello", max_new_tokens=4)
    hook = session.model.model.layers[1].register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(wb.DoesNotFit, match="The answer ran out of memory"):
        session.generate("hello", max_new_tokens=4)
    hook.remove()
    assert session.generate("hello", max_new_tokens=4) == expected
    session.unload()


# --- interrupts -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals as POSIX has them")
def test_an_interrupt_at_fifty_random_moments(tiny_llama: Path) -> None:
    """Ctrl-C while a model is loaded, talks and is unloaded; each time everything works afterwards."""
    recipe = wb.Recipe(model=str(tiny_llama), precision=wb.FourBit())
    session = wb.load(recipe)
    expected = session.generate("hello", max_new_tokens=4)
    session.unload()
    threads = {thread.name for thread in threading.enumerate()}
    draw = random.Random(0)  # noqa: S311 - moments, no secrets
    interrupted = 0
    for _ in range(50):
        timer = threading.Timer(draw.uniform(0.0, 0.25), signal.raise_signal, [signal.SIGINT])
        loaded: wb.Session | None = None
        try:
            timer.start()
            while True:
                loaded = wb.load(recipe)
                loaded.generate("hello", max_new_tokens=20)
                loaded.unload()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            timer.join()
            worker().submit(lambda: None).result(timeout=60)  # whatever it was at is over
            if loaded is not None:
                loaded.unload()
    assert interrupted == 50
    session = wb.load(recipe)
    assert session.generate("hello", max_new_tokens=4) == expected
    session.unload()
    del session, loaded
    gc.collect()
    assert {thread.name for thread in threading.enumerate()} <= threads | {"workbench-torch_0"}
