"""Load, Generate and Code, with a tiny model that is really loaded and really answers."""

from __future__ import annotations

import json
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from played_page import choose, click, find, send, wait_for

import workbench as wb
from workbench.panels import run as run_module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def bench(tiny_llama: Path) -> Iterator[wb.Workbench]:
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "512MB"}))
    assert made._state.settle(60)
    yield made
    made.close()
    if made.session is not None:
        made.session.unload()


@pytest.fixture
def loaded(bench: wb.Workbench) -> wb.Workbench:
    click(find(bench, "wb-load"))
    idle(bench)
    assert bench.session is not None
    return bench


def idle(bench: wb.Workbench) -> None:
    def over() -> bool:
        with bench._state.lock:  # which is held until every panel has been told
            return not bench._state.activity

    wait_for(over)


def enabled(bench: wb.Workbench) -> set[str]:
    names = ("wb-load", "wb-cancel", "wb-unload", "wb-generate", "wb-stop")
    return {name for name in names if not find(bench, name).disabled}


def answer_at_length(bench: wb.Workbench) -> None:
    """Start an answer that does not end by itself, and wait for its first words."""
    assert bench.session is not None
    bench.session.model.generation_config.eos_token_id = None
    # Text comes in whole words, and the likeliest tokens of random weights never make a space.
    send(find(bench, "wb-sampling"), value=True)
    send(find(bench, "wb-top-k"), value=0)
    send(find(bench, "wb-top-p"), value=1.0)
    send(find(bench, "wb-temperature"), value=5.0)
    send(find(bench, "wb-max-new-tokens"), value=1900)
    words = threading.Event()
    bench._generate.answer.observe(lambda _: words.set(), "text")
    click(find(bench, "wb-generate"))
    assert words.wait(60)


def test_load_shows_what_was_foretold_beside_what_is_there(bench: wb.Workbench) -> None:
    assert enabled(bench) == {"wb-load"}
    click(find(bench, "wb-load"))
    idle(bench)
    session = bench.session
    assert session is not None
    assert session.recipe == bench.recipe
    assert enabled(bench) == {"wb-load", "wb-unload", "wb-generate"}
    report = find(bench, "wb-load-report").value
    assert "Loaded as previewed" in report
    # 279,168 bytes by the fixture's own count of its parameters, and two buffers of 8 rotary frequencies in float32.
    assert report.count('title="279,232 bytes"') == 2
    assert find(bench, "wb-load-progress").value == 1000

    send(find(bench, "wb-memory-text-cpu"), value="400MB")
    assert "differs" in find(bench, "wb-differs").value
    send(find(bench, "wb-memory-text-cpu"), value="512MB")
    assert find(bench, "wb-differs").value == ""

    model = session.model
    click(find(bench, "wb-unload"))
    idle(bench)
    assert bench.session is None
    assert session.model is None
    assert model is not None
    assert enabled(bench) == {"wb-load"}
    assert find(bench, "wb-load-report").value == ""


def test_a_load_can_be_cancelled_and_everything_else_works_meanwhile(
    bench: wb.Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, real, threads = threading.Event(), run_module.load, []

    def held(recipe: wb.Recipe, **options: Any) -> wb.Session:
        threads.append(threading.current_thread().name)
        options["progress"](wb.Progress(stage="read", done=1, total=4, text="reading <weights> 1 of 4"))
        began.set()
        assert options["cancel"].wait(60)
        return real(recipe, **options)

    monkeypatch.setattr(run_module, "load", held)
    click(find(bench, "wb-load"))
    assert began.wait(60)
    assert threads[0].startswith("workbench-torch")
    assert enabled(bench) == {"wb-cancel"}
    assert find(bench, "wb-load-progress").value == 250
    assert "reading &lt;weights&gt; 1 of 4" in find(bench, "wb-load-text").value
    send(find(bench, "wb-memory-text-cpu"), value="300MB")
    assert bench.placement is not None
    assert bench.placement.memory["cpu"].limit_bytes == 300_000_000
    click(find(bench, "wb-cancel"))
    idle(bench)
    assert bench.session is None
    assert "cancelled" in find(bench, "wb-load-text").value
    assert enabled(bench) == {"wb-load"}


def bare(model: Path, folder: Path) -> Path:
    """The same model without its weights."""
    shutil.copytree(model, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder / "bare"


def test_what_cannot_be_loaded_says_why(bench: wb.Workbench, tiny_llama: Path, tmp_path: Path) -> None:
    send(find(bench, "wb-memory-text-cpu"), value="100KiB")
    assert bench.placement is not None
    assert bench.placement.verdict == "does_not_fit"
    click(find(bench, "wb-load"))
    idle(bench)
    assert bench._state.problems["load"].startswith("Does not fit")
    assert bench.session is None
    send(find(bench, "wb-memory-text-cpu"), value="512MB")
    assert bench._state.problems["load"] == ""  # it was about other choices

    choose(find(bench, "wb-machine"), "RTX 4090")
    assert "pick This machine" in find(bench, "wb-differs").value
    assert enabled(bench) == set()
    click(find(bench, "wb-own-use"))
    assert "for My machine, which is not here" in find(bench, "wb-differs").value
    assert enabled(bench) == set()
    choose(find(bench, "wb-machine"), "This machine")
    assert bench._state.settle(60)
    assert enabled(bench) == {"wb-load"}

    bench.session = session = wb.load(bench.recipe)
    choose(find(bench, "wb-precision"), "gptq")
    assert bench._state.settle(60)
    assert "quantize it in the Quantize tab" in find(bench, "wb-differs").value
    with pytest.raises(ValueError, match="is not quantized yet"):
        bench._load._start()
    bench.recipe = bench.recipe.with_(precision=wb.FullPrecision(), model=str(bare(tiny_llama, tmp_path)))
    assert "has no weight files" in find(bench, "wb-differs").value
    assert enabled(bench) == {"wb-unload", "wb-generate"}
    assert session.model is not None  # nothing was unloaded for what cannot be


def test_an_answer_streams_in_few_messages_and_is_the_sessions_own(loaded: wb.Workbench) -> None:
    session, answer, pieces = loaded.session, loaded._generate.answer, []
    assert session is not None
    real_send = answer.send
    answer.send = lambda content, *_: (pieces.append(content["add"]), real_send(content))
    send(find(loaded, "wb-prompt"), value="Hello <b>there</b>")
    send(find(loaded, "wb-max-new-tokens"), value=60)
    began = time.monotonic()
    click(find(loaded, "wb-generate"))
    assert enabled(loaded) <= {"wb-stop"}
    idle(loaded)
    seconds = time.monotonic() - began
    assert answer.text == session.generate("Hello <b>there</b>", max_new_tokens=60)
    assert answer.text.startswith("".join(pieces[:1]))
    assert 1 <= len(pieces) <= 1 + 20 * seconds
    assert session.last_stats is not None
    stats = find(loaded, "wb-stats").value
    assert f"{session.last_stats.new_tokens} new tokens" in stats
    assert "tok/s" in stats
    assert "first token after" in stats


def test_an_answer_can_be_stopped_and_the_next_one_given(loaded: wb.Workbench) -> None:
    session = loaded.session
    assert session is not None
    answer_at_length(loaded)
    click(find(loaded, "wb-stop"))
    idle(loaded)
    assert session.last_stats is not None
    assert session.last_stats.stopped
    assert session.last_stats.new_tokens < 1900
    assert find(loaded, "wb-stats").value.endswith("stopped")
    send(find(loaded, "wb-sampling"), value=False)
    send(find(loaded, "wb-max-new-tokens"), value=5)
    click(find(loaded, "wb-generate"))
    idle(loaded)
    assert session.last_stats.new_tokens == 5


def test_sampling_controls_show_when_they_count_and_bad_values_are_said(loaded: wb.Workbench) -> None:
    panel = loaded._generate
    assert panel._sampling_box.layout.display == "none"
    send(find(loaded, "wb-sampling"), value=True)
    assert panel._sampling_box.layout.display is None
    send(find(loaded, "wb-max-new-tokens"), value=12)
    texts = []
    for seed in (1, 1, 2):
        send(find(loaded, "wb-seed"), value=seed)
        click(find(loaded, "wb-generate"))
        idle(loaded)
        texts.append(panel.answer.text)
    assert texts[0] == texts[1] != texts[2]
    send(find(loaded, "wb-temperature"), value=0.0)
    click(find(loaded, "wb-generate"))
    idle(loaded)
    assert "temperature" in loaded._state.problems["generate"]
    send(find(loaded, "wb-prompt"), value="  ")
    click(find(loaded, "wb-generate"))
    assert loaded._state.problems["generate"] == "Type a prompt first."
    assert enabled(loaded) == {"wb-load", "wb-unload", "wb-generate"}


def test_a_session_from_a_cell_can_be_talked_to(bench: wb.Workbench) -> None:
    session = wb.load(bench.recipe)
    bench.session = session
    assert enabled(bench) == {"wb-load", "wb-unload", "wb-generate"}
    send(find(bench, "wb-max-new-tokens"), value=3)
    click(find(bench, "wb-generate"))
    idle(bench)
    assert session.last_stats is not None
    assert session.last_stats.new_tokens <= 3
    with pytest.raises(ValueError, match=r"wb\.load"):
        bench.session = session.model


def test_closing_in_mid_answer_stops_it(loaded: wb.Workbench) -> None:
    session = loaded.session
    assert session is not None
    answer_at_length(loaded)
    loaded.close()
    assert session.last_stats is not None
    assert session.last_stats.stopped


def test_the_code_is_written_when_it_is_looked_at(bench: wb.Workbench, tiny_llama: Path, tmp_path: Path) -> None:
    view, tabs = find(bench, "wb-code"), find(bench, "wb-tabs")
    assert view.code == ""
    send(tabs, selected_index=bench._tabs.titles.index("Code"))
    assert bench.placement is not None
    assert view.code == bench.recipe.to_python(bench.placement)
    assert repr(str(tiny_llama)) in view.code
    with bench._state.lock:  # the planner has to wait
        send(find(bench, "wb-model"), value=str(tmp_path))
        assert view.code == "# The preview is being worked out."
    wait_for(lambda: repr(str(tiny_llama)) in view.code)  # nothing is there, so the last model is
    choose(find(bench, "wb-precision"), "nf4")
    bench._state.settle()
    assert "BitsAndBytesConfig" in view.code
    assert wb.Recipe.from_json(view.recipe_json) == bench.recipe


def upload(bench: wb.Workbench, name: str, content: bytes) -> None:
    file = {"name": name, "type": "application/json", "size": len(content), "last_modified": 0}
    control = find(bench, "wb-recipe-upload")
    data = {"method": "update", "state": {"value": [file]}, "buffer_paths": [["value", 0, "content"]]}
    control._handle_msg({"content": {"data": data}, "buffers": [memoryview(content)]})
    assert not control.value  # the same file can be chosen again


def test_a_recipe_comes_back_from_its_file(bench: wb.Workbench) -> None:
    recipe = bench.recipe.with_(precision=wb.Int8(threshold=4.0), workload=wb.Workload(batch_size=2))
    upload(bench, "saved.json", recipe.to_json().encode())
    assert bench._state.problems.get("code", "") == ""
    assert bench.recipe == recipe
    assert find(bench, "wb-batch").value == 2

    trusting = recipe.with_(model=wb.ModelRef(name=recipe.model.name, trust_remote_code=True, allow_pickle=True))
    upload(bench, "from-somebody.json", trusting.to_json().encode())
    assert bench.recipe == recipe  # a file allows nothing by itself
    said = bench._code._said.value
    assert "trust_remote_code and allow_pickle switched off" in said
    assert "trust_remote_code=True, allow_pickle=True)" in said
    bench.recipe = bench.recipe.with_(model=trusting.model)
    upload(bench, "from-somebody.json", trusting.to_json().encode())
    assert bench.recipe == trusting


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{}", "no recipe"),
        (b"\xff\xfe", "no text"),
        (b"[", "no JSON"),
        (json.dumps({"workbench_recipe": 99}).encode(), "version 99"),
        (b" " * 1_000_001, "too large"),
    ],
)
def test_a_file_that_is_no_recipe_changes_nothing(bench: wb.Workbench, content: bytes, says: str) -> None:
    before = bench.recipe
    upload(bench, "other.json", content)
    assert says in bench._state.problems["code"]
    assert bench.recipe == before


def test_compare_shows_every_precision_and_takes_one_over(bench: wb.Workbench) -> None:
    click(find(bench, "wb-compare"))
    wait_for(lambda: not find(bench, "wb-compare").disabled)
    table = find(bench, "wb-fits-table").value
    for label in ("full precision", "int8", "nf4", "nf4 + double quantization"):
        assert f"<td>{label}</td>" in table
    assert table.count("✓ Fits") == 4
    uses = {button.description: button for button in find(bench, "wb-use-precision").children}
    click(uses["Use int8"])
    assert bench.recipe.precision == wb.Int8()
    assert find(bench, "wb-compare-note").value == ""  # another precision is another row, not another question
    send(find(bench, "wb-context"), value=64)
    assert "compare again" in find(bench, "wb-compare-note").value


def test_what_goes_wrong_while_comparing_is_shown(bench: wb.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr("workbench.panels.compare.what_fits", broken)
    click(find(bench, "wb-compare"))
    wait_for(lambda: not find(bench, "wb-compare").disabled)
    assert bench._state.problems["compare"] == "no such luck"
