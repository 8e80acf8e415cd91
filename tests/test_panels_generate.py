"""Chat, many prompts, caches and several loaded models, with a tiny model that really answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from played_page import click, find, send, wait_for

import workbench as wb
from workbench import loading, weight_cache
from workbench.panels import run as run_module
from workbench.panels.look import whole_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def loaded(tiny_llama: Path) -> Iterator[wb.Workbench]:
    bench = wb.Workbench(wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "512MB"}))
    assert bench._state.settle(60)
    bench.session = wb.load(bench.recipe)
    send(find(bench, "wb-max-new-tokens"), value=6)
    yield bench
    sessions = bench._state.sessions
    bench.close()
    for session in sessions:
        session.unload()


def idle(bench: wb.Workbench) -> None:
    def over() -> bool:
        with bench._state.lock:  # which is held until every panel has been told
            return not bench._state.activity

    wait_for(over)


def choose(control: Any, label: str) -> None:
    labels = [option[0] if isinstance(option, tuple) else option for option in control.options]
    send(control, index=labels.index(label))


def say(bench: wb.Workbench, text: str, button: str = "wb-generate") -> str:
    send(find(bench, "wb-prompt"), value=text)
    click(find(bench, button))
    idle(bench)
    assert bench._state.problems.get("generate", "") == ""
    return str(bench._generate.answer.text)


def buttons(bench: wb.Workbench, name: str) -> list[Any]:
    return [part for part in whole_tree(bench) if name in getattr(part, "_dom_classes", ())]


def test_a_conversation_can_be_edited_and_its_answers_made_anew(loaded: wb.Workbench) -> None:
    session, panel = loaded.session, loaded._generate
    assert session is not None
    choose(find(loaded, "wb-mode"), "Chat")
    assert find(loaded, "wb-generate").description == "Send"
    field, answer = find(loaded, "wb-prompt"), panel.answer
    answer.observe(lambda _: send(field, value="what is typed meanwhile"), "text")
    first = say(loaded, "hello <b>there</b>")
    assert field.value == "what is typed meanwhile"
    answer.unobserve_all("text")
    send(find(loaded, "wb-beams"), value=0)
    send(field, value="a message that fails")
    click(find(loaded, "wb-generate"))
    idle(loaded)
    assert (field.value, answer.text) == ("a message that fails", first)
    send(find(loaded, "wb-beams"), value=1)
    chat = session.chat()
    assert first == "".join(chat.send("hello <b>there</b>", max_new_tokens=6))
    second = say(loaded, "and then")
    assert second == "".join(chat.send("and then", max_new_tokens=6))
    assert field.value == ""
    assert "known from the last turn" in find(loaded, "wb-stats").value
    shown = [part.value for part in buttons(loaded, "wb-said-text")]
    assert len(shown) == 3  # two of the user and the first answer; the last one stands where it streams
    assert "hello &lt;b&gt;there&lt;/b&gt;" in shown[0]

    click(find(loaded, "wb-regenerate"))
    idle(loaded)
    assert panel.answer.text == second

    edit = buttons(loaded, "wb-edit")[0]
    click(edit)
    assert find(loaded, "wb-prompt").value == "hello <b>there</b>"
    assert find(loaded, "wb-prompt").description == "In place of what you said"
    assert say(loaded, "hello <b>there</b>") == first
    assert len(buttons(loaded, "wb-said-text")) == 1

    click(find(loaded, "wb-clear-chat"))
    assert buttons(loaded, "wb-said-text") == []
    assert panel.answer.text == ""
    assert say(loaded, "hello <b>there</b>") == first


def test_many_prompts_are_answered_line_by_line(loaded: wb.Workbench) -> None:
    session = loaded.session
    assert session is not None
    choose(find(loaded, "wb-mode"), "Many prompts")
    text = say(loaded, "hello\n\nand another one\n")
    answers = [answer.strip() for answer in session.answers(["hello", "and another one"], max_new_tokens=6)]
    assert text == f"hello\n→ {answers[0]}\n\nand another one\n→ {answers[1]}\n\n"


def test_a_context_that_will_be_full_is_said_before(loaded: wb.Workbench) -> None:
    note = find(loaded, "wb-context-use")
    send(find(loaded, "wb-prompt"), value="hello")
    assert "6 new ones of 2,048." in note.value
    send(find(loaded, "wb-prompt"), value="abcd" * 1200)
    assert "more than the model allows" in note.value
    click(find(loaded, "wb-generate"))
    idle(loaded)
    assert "say when_full" in loaded._state.problems["generate"]
    choose(find(loaded, "wb-when-full"), "cut the beginning")
    assert "cut the beginning" in note.value
    click(find(loaded, "wb-generate"))
    idle(loaded)
    assert loaded._state.problems["generate"] == ""
    assert loaded.session is not None
    assert loaded.session.last_stats is not None
    assert loaded.session.last_stats.prompt_tokens <= 2042


def test_the_cache_is_chosen_with_its_bytes_in_the_preview(loaded: wb.Workbench) -> None:
    assert loaded.placement is not None
    full = loaded.placement.kv_cache_bytes
    choose(find(loaded, "wb-cache"), "quantized")
    assert loaded.recipe.workload.cache == "quantized"
    assert loaded.placement is not None
    assert loaded.placement.kv_cache_bytes == (full or 0) // 2
    assert find(loaded, "wb-differs").value == ""  # that needs no other load
    assert say(loaded, "hello")
    choose(find(loaded, "wb-cache"), "offloaded")
    loaded._state.settle()
    assert loaded.placement.verdict == "does_not_fit"
    assert "no layer runs on one" in loaded.placement.summary


def test_the_code_follows_what_is_chosen_here(loaded: wb.Workbench) -> None:
    send(find(loaded, "wb-tabs"), selected_index=list(loaded._tabs.titles).index("Code"))
    send(find(loaded, "wb-stop-strings"), value="END | \\n")
    send(find(loaded, "wb-beams"), value=2)
    code = find(loaded, "wb-code").code
    assert "max_new_tokens=6, do_sample=False, num_beams=2, stop_strings=['END', '\\n'], tokenizer=tokenizer)" in code
    send(find(loaded, "wb-beams"), value=0)
    assert find(loaded, "wb-code").code == code  # what cannot be is said when it is used
    click(find(loaded, "wb-generate"))
    idle(loaded)
    assert "num_beams is a whole number" in loaded._state.problems["generate"]


def test_a_second_model_beside_the_first_helps_or_answers_or_goes(loaded: wb.Workbench) -> None:
    first = loaded.session
    assert first is not None
    assert buttons(loaded, "wb-unload-one") == []
    send(find(loaded, "wb-beside"), value=True)
    choose(find(loaded, "wb-precision"), "nf4")
    loaded._state.settle()
    click(find(loaded, "wb-load"))
    idle(loaded)
    second = loaded.session
    assert second is not None
    assert second is not first
    assert first.model is not None
    assert loaded._state.sessions == (first, second)
    assert len(buttons(loaded, "wb-unload-one")) == 2

    plain = say(loaded, "hello")
    assistant = find(loaded, "wb-assistant")
    send(assistant, index=1)
    assert assistant.label == "tiny-llama, full precision"
    assert assistant.value is first
    assert say(loaded, "hello") == plain

    click(buttons(loaded, "wb-talk-to")[0])
    assert loaded.session is first
    click(buttons(loaded, "wb-unload-one")[0])  # the one that is talked to stands last
    idle(loaded)
    assert second.model is None
    assert loaded.session is first
    assert loaded._state.sessions == (first,)
    assert buttons(loaded, "wb-unload-one") == []


def test_what_does_not_fit_offers_ways_out(loaded: wb.Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    way_out = find(loaded, "wb-load-anyway")
    assert way_out.layout.display == "none"
    real, asked = run_module.load, []

    def short(recipe: wb.Recipe, *, anyway: bool, **options: Any) -> wb.Session:
        asked.append((recipe.precision, anyway))
        if recipe.precision == wb.FullPrecision() and not anyway:
            from workbench.verdict import Advice

            raise wb.DoesNotFit("Too little.", advice=[Advice("Load it in int8.", precision=wb.Int8())], can_try=True)
        return real(recipe, **options)

    monkeypatch.setattr(run_module, "load", short)
    click(find(loaded, "wb-load"))
    idle(loaded)
    assert loaded._state.problems["load"] == "Too little."
    assert loaded.session is None
    assert way_out.layout.display is None
    click(way_out)
    idle(loaded)
    assert loaded.session is not None
    assert way_out.layout.display == "none"
    click(find(loaded, "wb-load"))
    idle(loaded)
    (change,) = buttons(loaded, "wb-load-changed")
    assert change.tooltip == "Load it in int8."
    click(change)
    idle(loaded)
    assert loaded.recipe.precision == wb.Int8()
    assert loaded.session is not None
    assert [anyway for _, anyway in asked] == [False, True, False, False]


def test_kept_weights_are_shown_and_can_be_dropped(
    loaded: wb.Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(loading, "_WORTH_KEEPING_SECONDS", 0.0)
    monkeypatch.setattr(loading, "key_of", weight_cache.key_of)
    choose(find(loaded, "wb-precision"), "nf4")
    loaded._state.settle()
    click(find(loaded, "wb-load"))
    idle(loaded)
    assert "tiny-llama in nf4 + double quantization" in find(loaded, "wb-kept").value
    click(find(loaded, "wb-kept-empty"))
    assert wb.kept_weights() == ()
    assert loaded._load._kept_row.layout.display == "none"
