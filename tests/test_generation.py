"""What can be chosen for an answer, chat with its cache, many prompts, and the threads it is computed with."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb
from workbench.generation import Prefix, TextStream, cut_at
from workbench.session import worker
from workbench.threads import SpareThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Iterator[wb.Session]:
    """The demo model in float32, in which the cache of one turn and a computation anew agree to the token."""
    session = wb.load(wb.Recipe(model=str(demo_model), precision=wb.FullPrecision(dtype="float32")))
    yield session
    session.unload()


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Iterator[wb.Session]:
    session = wb.load(wb.Recipe(model=str(tiny_llama)))
    yield session
    session.unload()


def stats(session: wb.Session) -> wb.GenerationStats:
    assert session.last_stats is not None
    return session.last_stats


def fed(tokenizer: Any, text: str, stops: list[str]) -> tuple[list[str], TextStream]:
    import torch

    stream = TextStream(tokenizer, stops)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    return list(stream), stream


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hello there, world.", "Füße, 你好 and 🙂🙃", "one\n\n  two\tthree"])
def test_pieces_make_up_the_text(demo: wb.Session, text: str) -> None:
    pieces, _ = fed(demo.tokenizer, text, [])
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["three"], "one two "),
        (["e two"], "on"),
        (["x", "four", "thr"], "one two "),
        (["fourth"], "one two three four"),
    ],
)
def test_an_answer_ends_before_a_stop_string_wherever_tokens_part(
    tiny: wb.Session, stops: list[str], left: str
) -> None:
    pieces, stream = fed(tiny.tokenizer, "one two three four", stops)  # tokens of one letter or two
    assert "".join(pieces) == left == cut_at("one two three four", stops)
    assert stream.found == (left != "one two three four")


def test_a_stop_string_ends_the_generation(demo: wb.Session) -> None:
    whole = demo.generate(FRANCE, max_new_tokens=12)
    assert demo.generate(FRANCE, max_new_tokens=12, stop_strings=["Paris"]) == whole.partition("Paris")[0]
    assert stats(demo).new_tokens < 8


# --- choices ----------------------------------------------------------------------------------------------------------


def test_beams_give_what_transformers_gives_in_one_piece(demo: wb.Session) -> None:
    prompt = "Name three colours."
    inputs = demo._encode(prompt, None)
    ids = demo.model.generate(**inputs, max_new_tokens=10, do_sample=False, num_beams=3)[0]
    expected = demo.tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert list(demo.stream(prompt, max_new_tokens=10, num_beams=3)) == [expected]
    assert stats(demo).new_tokens <= 10


def test_min_p_of_one_is_greedy(tiny: wb.Session) -> None:
    drawn = tiny.generate("hello", max_new_tokens=8, do_sample=True, min_p=1.0, temperature=5.0, top_k=0, seed=3)
    assert drawn == tiny.generate("hello", max_new_tokens=8)


def test_options_can_come_as_one_object(tiny: wb.Session) -> None:
    options = wb.GenerationOptions(max_new_tokens=5)
    assert tiny.generate("hello", options=options) == tiny.generate("hello", max_new_tokens=5)
    tiny.generate("hello", options=options, max_new_tokens=3)
    assert stats(tiny).new_tokens <= 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_p": 2}, "min_p is a number from 0 to 1"),
        ({"num_beams": 0}, "num_beams is a whole number of at least 1"),
        ({"stop_strings": [""]}, "stop_strings are texts"),
        ({"seed": -1}, "seed is a whole number"),
        ({"when_full": "later"}, "when_full is one of 'refuse', 'stop', 'cut', not 'later'"),
        ({"options": 3}, "options is a GenerationOptions, not int"),
    ],
)
def test_bad_options(tiny: wb.Session, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny.generate("hello", **options)


@pytest.mark.parametrize("cache", ["static", "quantized"])
def test_other_caches_answer(tiny_llama: Path, cache: str) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), workload=wb.Workload(cache=cache))
    session = wb.load(recipe)
    assert session.generate("hello", max_new_tokens=6)
    plain, other = wb.place(wb.Recipe(model=str(tiny_llama))), session.placement
    # 2 layers of 2 heads of 16 for keys and values: 256 bytes a token in bf16, for 2,048 tokens; half of it in fp8.
    assert plain.kv_cache_bytes == 2048 * 256
    assert other.kv_cache_bytes == (2048 * 128 if cache == "quantized" else 2048 * 256)
    session.unload()


def test_a_cache_that_cannot_be_is_refused_with_a_sentence(tiny_llama: Path, tiny_model: Callable[[str], Path]) -> None:
    recipe = wb.Recipe(model=str(tiny_llama), workload=wb.Workload(cache="offloaded"))
    for strategy in ("auto", "packed"):
        placement = wb.place(recipe.with_(strategy=strategy))
        assert placement.verdict == "does_not_fit"
        assert "waits on the CPU for a GPU, and no layer runs on one: take cache='dynamic'" in placement.summary
        assert [wb.place(advice.apply(recipe)).verdict for advice in placement.advice or ()] == ["fits"]
    with pytest.raises(ValueError, match="no layer runs on one"):
        wb.load(recipe)
    with pytest.raises(ValueError, match=r"No quantized cache is made for .*sliding_attention"):
        wb.place(wb.Recipe(model=str(tiny_model("gemma3")), workload=wb.Workload(cache="quantized", context_length=64)))
    with pytest.raises(ValueError, match="cache is one of 'dynamic', 'static', 'quantized', 'offloaded', not 'fast'"):
        wb.Workload(cache="fast")


def test_an_offloaded_cache_is_counted_on_the_cpu(tiny_llama: Path) -> None:
    machine = wb.Machine.preset("RTX 4090")
    recipe = wb.Recipe(
        model=str(tiny_llama), max_memory={0: "1GiB", "cpu": "1GiB"}, workload=wb.Workload(cache="offloaded")
    )
    left_out = wb.place(recipe.with_(max_memory={0: "1GiB"}), machine=machine)
    assert left_out.summary == "Does not fit: an offloaded cache waits on the CPU, which max_memory leaves out."
    assert {wb.place(a.apply(left_out.recipe), machine=machine).verdict for a in left_out.advice or ()} == {"fits"}
    memory = wb.place(recipe, machine=machine).memory
    assert memory["cpu"].kv_cache_bytes == 2048 * 256
    assert memory[0].kv_cache_bytes == 2048 * 256  # two layers are on the GPU at a time, and it has no more


def test_the_exported_program_generates_so(demo: wb.Session) -> None:
    options = wb.GenerationOptions(
        max_new_tokens=9, do_sample=True, temperature=0.5, min_p=0.1, seed=7, stop_strings=["\n"], num_beams=2
    )
    recipe = demo.recipe.with_(workload=wb.Workload(cache="static"))
    code = recipe.to_python(demo.placement, options)
    assert "torch.manual_seed(7)\noutput = model.generate(**inputs, max_new_tokens=9, do_sample=True, " in code
    assert (
        "num_beams=2, temperature=0.5, min_p=0.1, stop_strings=['\\n'], tokenizer=tokenizer, "
        "cache_implementation='static', disable_compile=True)" in code
    )


def test_the_exported_program_says_the_same(demo: wb.Session, tmp_path: Path) -> None:
    options = wb.GenerationOptions(max_new_tokens=12, do_sample=True, temperature=1.5, top_k=0, seed=11)
    expected = demo.generate(FRANCE, options=options)
    script = tmp_path / "exported.py"
    script.write_text(demo.recipe.to_python(demo.placement, options), encoding="utf-8")
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == expected.strip()


# --- many prompts -----------------------------------------------------------------------------------------------------


def test_many_prompts_are_answered_as_one_by_one(demo: wb.Session) -> None:
    prompts = [FRANCE, "What is the capital of Germany, and of which country is it the capital?", "Say hi."]
    found = list(demo.answers(prompts, max_new_tokens=8))
    assert found == [demo.generate(prompt, max_new_tokens=8) for prompt in prompts]


def test_many_prompts_stay_within_what_was_counted(tiny: wb.Session) -> None:
    longest = 0
    real = tiny.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal longest
        longest = max(longest, kwargs["input_ids"].shape[0])
        return real(*args, **kwargs)

    tiny.model.forward = watched
    try:
        recipe = tiny.recipe
        tiny.recipe = recipe.with_(workload=wb.Workload(context_length=100))
        length = tiny.context_use("hello", max_new_tokens=5).total_tokens
        assert len(list(tiny.answers(["hello"] * 9, max_new_tokens=5))) == 9
        assert longest == 100 // length
    finally:
        tiny.model.forward, tiny.recipe = real, recipe
    with pytest.raises(ValueError, match="Give a list of prompts"):
        tiny.answers("hello")


# --- the context ------------------------------------------------------------------------------------------------------


def test_a_full_context(tiny: wb.Session) -> None:
    """The model allows 2,048 tokens; the tokenizer makes one of two letters."""
    text = "abcd" * 1010
    use = tiny.context_use(text, max_new_tokens=100)
    assert use.overflows
    assert "more than the model allows" in str(use)
    with pytest.raises(ValueError, match="say when_full='stop' or 'cut'"):
        tiny.generate(text, max_new_tokens=100)
    tiny.model.generation_config.eos_token_id, eos = None, tiny.model.generation_config.eos_token_id
    try:
        tiny.generate(text, max_new_tokens=100, when_full="stop")
        assert stats(tiny).new_tokens == 2048 - use.prompt_tokens
        tiny.generate(text, max_new_tokens=100, when_full="cut")
        assert stats(tiny).new_tokens == 100
        assert stats(tiny).prompt_tokens in range(1940, 1949)
    finally:
        tiny.model.generation_config.eos_token_id = eos
    with pytest.raises(ValueError, match="leave no room in the 2,048"):
        tiny.generate("abcd" * 2000, when_full="stop")


def test_what_exceeds_the_preview_alone_is_said(tiny: wb.Session) -> None:
    recipe = tiny.recipe
    tiny.recipe = recipe.with_(workload=wb.Workload(context_length=64))
    try:
        assert "more than the 64 that the preview counted memory for" in str(tiny.context_use("hello " * 20))
    finally:
        tiny.recipe = recipe


# --- chat -------------------------------------------------------------------------------------------------------------


def test_a_turn_goes_on_from_the_last_one_and_says_the_same(demo: wb.Session) -> None:
    chat = demo.chat(system="You answer in one sentence.")
    story = "Here is a story. " + "The fox ran over the hill and the dog ran after it. " * 50
    "".join(chat.send(story + "What ran first?", max_new_tokens=10))
    for question in ("Who ran after it?", "Was it a hill?"):
        said = "".join(chat.send(question, max_new_tokens=10))
        quick = stats(demo)
        anew = demo.chat(system="You answer in one sentence.")
        anew.messages = chat.messages[:-2]
        assert "".join(anew.send(question, max_new_tokens=10)) == said
        slow = stats(demo)
        assert quick.prompt_tokens == slow.prompt_tokens > 250
        assert slow.reused_tokens == 0
        assert quick.reused_tokens > 0.9 * quick.prompt_tokens
        assert quick.first_token_seconds <= slow.first_token_seconds / 4
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_answers_can_be_made_anew_and_messages_be_edited(tiny: wb.Session) -> None:
    chat = tiny.chat()
    first = "".join(chat.send("hello", max_new_tokens=6))
    "".join(chat.send("and then", max_new_tokens=6))
    assert "".join(chat.edit(0, "hello", max_new_tokens=6)) == first
    assert [m["content"] for m in chat.messages] == ["hello", first]
    assert "".join(chat.regenerate(max_new_tokens=6)) == first
    assert stats(tiny).reused_tokens == stats(tiny).prompt_tokens - 1
    drawn = {
        "".join(chat.regenerate(max_new_tokens=6, do_sample=True, temperature=5.0, top_k=0, seed=seed))
        for seed in range(3)
    }
    assert len(drawn) == 3
    assert len(chat.messages) == 2
    with pytest.raises(ValueError, match="Only what the user said can be edited: message 0, not 1"):
        chat.edit(1, "no")
    chat.clear()
    assert chat.messages == []
    with pytest.raises(ValueError, match="Nothing has been said yet"):
        chat.regenerate()
    with pytest.raises(ValueError, match="Say something first"):
        chat.send(" ")


def test_a_stopped_answer_counts_and_an_error_does_not(tiny: wb.Session) -> None:
    chat = tiny.chat()
    stream = chat.send("hello", max_new_tokens=1500)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    before = list(chat.messages)
    with pytest.raises(ValueError, match="more than the 2,048"):
        chat.send("abcd" * 2000)
    assert chat.messages == before


def test_a_full_conversation_leaves_out_its_oldest_turns(tiny: wb.Session) -> None:
    chat = tiny.chat(system="be brief")
    chat.messages = [
        {"role": role, "content": f"{number} " + "abcd" * 150} for number in range(8) for role in ("user", "assistant")
    ]
    assert chat.context_use("next").overflows
    use = chat.context_use("next", when_full="cut", max_new_tokens=5)
    assert not use.overflows
    assert use.cut_turns > 0
    assert f"the oldest {use.cut_turns} turns are left out" in str(use)
    "".join(chat.send("next", when_full="cut", max_new_tokens=5))
    assert stats(tiny).prompt_tokens == use.prompt_tokens
    assert len(chat.messages) == 18  # what is left out is not forgotten


@pytest.mark.parametrize("name", ["gemma3", "granitemoehybrid"])
def test_windows_and_states_that_cannot_go_back_are_computed_anew(
    tiny_model: Callable[[str], Path], tiny_llama: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    session = wb.load(
        wb.Recipe(
            model=str(tiny_model(name)),
            precision=wb.FullPrecision(dtype="float32"),
            workload=wb.Workload(context_length=64),
        )
    )
    session.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    chat = session.chat()
    for turn in range(3):
        said = "".join(chat.send(f"turn {turn}", max_new_tokens=4))
        anew = session.chat()
        anew.messages = chat.messages[:-2]
        assert "".join(anew.send(f"turn {turn}", max_new_tokens=4)) == said
    session.unload()


def test_a_chat_s_cache_goes_with_the_model(tiny_llama: Path) -> None:
    session = wb.load(wb.Recipe(model=str(tiny_llama)))
    chat = session.chat()
    "".join(chat.send("hello", max_new_tokens=3))
    assert chat._prefix.cache is not None
    session.unload()
    assert chat._prefix.cache is None
    with pytest.raises(ValueError, match="unloaded: load it again"):
        chat.send("again")


def test_a_prefix_is_used_once() -> None:
    prefix = Prefix()
    assert prefix.take([1, 2, 3]) == (None, 0)
    prefix.ids, prefix.cache = [5, 6], object()
    assert prefix.take([1, 2]) == (None, 0)  # nothing in common
    assert prefix.cache is None


# --- an assistant, and threads ----------------------------------------------------------------------------------------


def test_an_assistant_changes_the_time_and_not_the_answer(demo: wb.Session, demo_model: Path, tiny: wb.Session) -> None:
    helper = wb.load(wb.Recipe(model=str(demo_model), precision=wb.FourBit()))
    plain = demo.generate(FRANCE, max_new_tokens=12)
    assert demo.generate(FRANCE, max_new_tokens=12, assistant=helper) == plain
    assert stats(demo).new_tokens == 8
    assert demo.generate(FRANCE, max_new_tokens=4, assistant=tiny) == demo.generate(FRANCE, max_new_tokens=4)
    helper.unload()
    for bad in (helper, demo):
        with pytest.raises(ValueError, match="The assistant is another model"):
            demo.generate(FRANCE, assistant=bad)
    with pytest.raises(ValueError, match="An assistant works with one beam"):
        demo.generate(FRANCE, assistant=tiny, num_beams=2)


def test_threads_make_room_for_other_programs_and_come_back() -> None:
    import torch

    spin = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2 * torch.get_num_threads())]
    try:

        def look() -> tuple[int, int, int]:
            before = torch.get_num_threads()
            with SpareThreads() as spare:
                tick = threading.Event()
                for _ in range(40):
                    tick.wait(0.05)
                    spare.look()
                    if spare.threads == 1:
                        break
                return before, spare.threads, torch.get_num_threads()

        before, spared, set_to = worker().submit(look).result()
        assert spared == set_to == 1
        assert worker().submit(torch.get_num_threads).result() == before
    finally:
        for other in others:
            other.kill()
            other.wait()
