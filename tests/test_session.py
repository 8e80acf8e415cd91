from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import workbench as wb
from workbench.session import worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FRANCE = "What is the capital of France?"

PRECISIONS = {
    "full": wb.FullPrecision(),
    "float32": wb.FullPrecision(dtype="float32"),
    "int8": wb.Int8(),
    "int8-skips": wb.Int8(threshold=0, skip_modules=("lm_head", "down_proj")),
    "nf4": wb.FourBit(double_quant=False),
    "nf4-double": wb.FourBit(),
    "fp4": wb.FourBit(quant_type="fp4"),
}


@pytest.fixture(scope="session")
def demo_session(demo_model: Path) -> Iterator[wb.Session]:
    """The demo model in full precision, shared by tests that leave it as it is."""
    session = wb.load(wb.Recipe(model=str(demo_model)))
    yield session
    session.unload()


@pytest.fixture(scope="session")
def tiny_session(tiny_llama: Path) -> Iterator[wb.Session]:
    session = wb.load(wb.Recipe(model=str(tiny_llama)))
    yield session
    session.unload()


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_answers_and_is_what_was_previewed(demo_model: Path, name: str) -> None:
    recipe = wb.Recipe(model=str(demo_model), precision=PRECISIONS[name])
    placement = wb.place(recipe)
    session = wb.load(recipe)
    try:
        assert "Paris" in session.generate(FRANCE, max_new_tokens=20)
        report = session.load_report
        assert report.matches, report.lines
        assert report.measured_bytes == {d: m.weight_bytes for d, m in placement.memory.items()}
        assert session.placement.device_map == placement.device_map == {"": "cpu"}
    finally:
        session.unload()


@pytest.mark.parametrize(
    "options",
    [
        {"max_memory": {"cpu": "200MiB", "disk": "10GiB"}},
        {"strategy": "custom", "device_map": {"": "disk"}},
        {
            "strategy": "custom",
            "device_map": {
                "model.embed_tokens": "cpu",
                "model.layers": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "cpu",
            },
        },
    ],
    ids=["budget", "all", "layers"],
)
def test_layers_on_disk(demo_model: Path, options: dict[str, Any]) -> None:
    session = wb.load(wb.Recipe(model=str(demo_model), **options))
    try:
        assert session.placement.verdict == "offloads"
        assert session.load_report.matches, session.load_report.lines
        assert dict(session.model.hf_device_map) == session.placement.device_map
        assert session.load_report.measured_bytes["disk"] > 0
        assert "Paris" in session.generate(FRANCE, max_new_tokens=8)
    finally:
        session.unload()


def test_streaming_gives_the_same_text_in_pieces(demo_session: wb.Session) -> None:
    pieces = list(demo_session.stream("Count from one to ten.", max_new_tokens=24))
    assert len(pieces) > 5
    assert "".join(pieces) == demo_session.generate("Count from one to ten.", max_new_tokens=24)
    stats = demo_session.last_stats
    assert stats is not None
    assert 1 < stats.new_tokens <= 24
    assert stats.first_token_seconds > 0
    assert stats.tokens_per_second > 0
    assert not stats.stopped


def test_streaming_matches_plain_generate(demo_session: wb.Session) -> None:
    inputs = demo_session._encode(FRANCE, None)
    ids = demo_session.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    plain = demo_session.tokenizer.decode(ids, skip_special_tokens=True)
    assert demo_session.generate(FRANCE, max_new_tokens=12) == plain


def test_stop_takes_effect_within_a_token(tiny_session: wb.Session) -> None:
    stream = tiny_session.stream("hello", max_new_tokens=1500)
    first = next(stream)
    tiny_session.stop()
    rest = list(stream)
    stats = tiny_session.last_stats
    assert stats is not None
    assert first
    assert stats.stopped
    assert stats.new_tokens < 1500
    assert len("".join(rest)) < 1500
    assert tiny_session.generate("again", max_new_tokens=3)  # a stop is for one generation


def test_leaving_the_loop_stops_the_generation(tiny_session: wb.Session) -> None:
    stream = tiny_session.stream("hello", max_new_tokens=1500)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    worker().submit(lambda: None).result(timeout=60)  # the worker is free again
    assert tiny_session.last_stats is not None
    assert tiny_session.last_stats.stopped


def test_sampling_is_repeatable_with_a_seed_and_leaves_torch_s_own_alone(tiny_session: wb.Session) -> None:
    import torch

    state = torch.random.get_rng_state()
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "top_k": 0}
    first, second, other = (tiny_session.generate("abc", seed=seed, **options) for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_system_prompt_is_used(demo_session: wb.Session) -> None:
    with_system = demo_session._encode("Hi", "You are a pirate.")["input_ids"][0]
    assert "You are a pirate." in demo_session.tokenizer.decode(with_system)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number of at least 1"),
        ({"temperature": 0}, "temperature is a number of at least"),
        ({"top_p": 1.5}, "top_p is a number from 1e-06 to 1"),
        ({"top_k": -1}, "top_k is a whole number of at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is a number"),
        ({"max_new_tokens": 2048}, r"more than the 2,048 that the model allows"),
    ],
)
def test_bad_generation_options(tiny_session: wb.Session, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_session.generate("hello", **options)


def test_unknown_generation_options_list_the_valid_ones(tiny_session: wb.Session) -> None:
    with pytest.raises(
        TypeError, match=r"'temprature'. Did you mean 'temperature'\? Valid options: max_new_tokens, do_sample"
    ):
        tiny_session.generate("hello", temprature=1.0)


def test_an_empty_prompt(tiny_session: wb.Session) -> None:
    with pytest.raises(ValueError, match="Give a prompt"):
        tiny_session.generate("")


def test_unload_gives_the_memory_back(demo_model: Path) -> None:
    # float32 of a bf16 checkpoint: half a GB that is anonymous memory and no mapping of the file
    process = psutil.Process()
    recipe = wb.Recipe(model=str(demo_model), precision=wb.FullPrecision(dtype="float32"))
    wb.load(recipe).unload()  # imports and pools that stay are paid for here
    before = process.memory_info().rss
    session = wb.load(recipe)
    session.generate("Hello", max_new_tokens=2)
    loaded = process.memory_info().rss
    parameter = weakref.ref(session.model.model.embed_tokens.weight)
    session.unload()
    assert parameter() is None
    assert session.model is None
    assert loaded - before > 400 << 20
    assert process.memory_info().rss - before < 100 << 20
    with pytest.raises(ValueError, match="unloaded: load it again"):
        session.generate("Hello")
    session.unload()  # twice is no error


def test_unload_of_an_offloaded_model(demo_model: Path) -> None:
    session = wb.load(wb.Recipe(model=str(demo_model), max_memory={"cpu": "200MiB", "disk": "10GiB"}))
    session.generate("Hello", max_new_tokens=2)
    folder = session._offload_folder.name
    parameter = weakref.ref(session.model.model.layers[0].mlp.up_proj.weight)
    session.unload()
    assert parameter() is None
    from pathlib import Path

    assert not Path(folder).exists()


def loaded_linears() -> int:
    """How many linear modules with real weights are alive, in whichever session."""
    import torch

    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) is torch.nn.Linear and not o.weight.is_meta)


def test_progress_and_cancel(demo_model: Path) -> None:
    cancel = threading.Event()
    steps: list[wb.Progress] = []

    def progress(step: wb.Progress) -> None:
        steps.append(step)
        if step.stage == "quantize" and step.done > 100_000_000:
            cancel.set()

    before = loaded_linears()
    started = time.perf_counter()
    with pytest.raises(wb.Cancelled):
        wb.load(wb.Recipe(model=str(demo_model), precision=wb.FourBit()), progress=progress, cancel=cancel)
    assert time.perf_counter() - started < 60
    assert steps[0].stage == "resolve"
    assert steps[-1].stage == "quantize"
    assert 100_000_000 < steps[-1].done < 110_000_000  # no weight of it has 10 MB
    assert steps[-1].total == 269_030_272  # the whole model, in bytes
    assert steps[-1].text.startswith("quantizing ")
    assert loaded_linears() == before


def test_loading_blocks_no_other_thread(demo_model: Path) -> None:
    """While the worker loads, this thread goes on: it counts, and the longest gap is far below the load's time."""
    future = worker().submit(wb.load, wb.Recipe(model=str(demo_model), precision=wb.FourBit()))
    gaps, last = [], time.perf_counter()
    tick = threading.Event()
    while not future.done():
        tick.wait(0.005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    future.result().unload()
    assert len(gaps) > 20
    assert max(gaps) < 1.0


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_truncated_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors of cut is damaged or cut short"):
        wb.load(wb.Recipe(model=str(folder)))


def test_a_corrupt_header(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path / "bad")
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 200 + file.read_bytes()[200:])
    with pytest.raises(ValueError, match=r"model.safetensors of bad is damaged or cut short"):
        wb.load(wb.Recipe(model=str(folder)))


def test_a_config_without_weights(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert wb.place(wb.Recipe(model=str(tmp_path))).verdict == "fits"
    with pytest.raises(ValueError, match="has a config but no weights"):
        wb.load(wb.Recipe(model=str(tmp_path)))


def test_pickles_only_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = copy_of(tiny_llama, tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only as pickles \(pytorch_model.bin\).*allow_pickle=True"):
        wb.load(wb.Recipe(model=str(folder)))
    session = wb.load(wb.Recipe(model=wb.ModelRef(name=str(folder), allow_pickle=True)))
    assert session.load_report.matches
    session.unload()


def test_missing_weights_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_llama, tmp_path / "holes")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    session = wb.load(wb.Recipe(model=str(folder)))
    assert any(
        "1 weights are not in the checkpoint and are RANDOM: model.layers.1.mlp.up_proj" in line
        for line in session.load_report.lines
    )
    session.unload()


def test_what_does_not_fit_is_refused_before_the_load(demo_model: Path) -> None:
    steps: list[wb.Progress] = []
    with pytest.raises(ValueError, match=r"Does not fit: .* has no room\. .*Raise cpu from 150 MiB to"):
        wb.load(wb.Recipe(model=str(demo_model), max_memory={"cpu": "150MiB"}), progress=steps.append)
    assert {s.stage for s in steps} == {"resolve"}


def test_more_than_the_machine_has_is_refused(demo_model: Path) -> None:
    workload = wb.Workload(context_length=8192, batch_size=1_000_000)
    with pytest.raises(ValueError, match="Does not fit: cpu is short by"):
        wb.load(wb.Recipe(model=str(demo_model), workload=workload))


def test_a_preview_for_another_machine_is_not_loaded(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="The preview is for 'RTX 4090', not for this machine"):
        wb.load(wb.Recipe(model=str(tiny_llama)), machine=wb.Machine.preset("RTX 4090"))


def test_int8_with_modules_on_disk_is_refused_with_what_would_work(demo_model: Path) -> None:
    recipe = wb.Recipe(model=str(demo_model), precision=wb.Int8(), max_memory={"cpu": "150MiB", "disk": "10GiB"})
    with pytest.raises(ValueError, match="where bitsandbytes does not quantize unless fp32_cpu_offload is on"):
        wb.load(recipe)
