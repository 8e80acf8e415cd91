"""The Generate panel: one prompt, a conversation, or many prompts, answered by the loaded model."""

from __future__ import annotations

import dataclasses
import threading
import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.generation import WHEN_FULL, GenerationOptions
from workbench.panels.chat import History
from workbench.panels.look import Log, classed, html, number_field, problem_line, text_field, visible
from workbench.panels.run import enable
from workbench.panels.state import NO_MODEL, as_sentence, bind
from workbench.show import rate
from workbench.speed import predict_speed
from workbench.workload import CACHES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workbench.chat import Chat
    from workbench.panels.state import State
    from workbench.session import Session

_APART_SECONDS = 0.05  # between messages to the browser: more than 20 a second only fill queues
_SYNC_SECONDS = 1.0  # between whole copies of a growing answer, for pages that are opened later
_MODES = {"One prompt": "prompt", "Chat": "chat", "Many prompts": "many"}
_FULL = {
    "refuse": "say so",
    "stop": "end the answer there",
    "cut": "cut the beginning",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_NOBODY = "none"


class GeneratePanel:
    """Talks to the loaded model; the answer streams in and can be stopped.

    Attributes:
        box: What is shown.
        answer: The last answer.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._reader: threading.Thread | None = None
        self._halt = threading.Event()
        self._chat: Chat | None = None
        self._chat_session: Session | None = None
        self._editing: int | None = None
        self._make_controls()
        self._history = History(self._begin_edit)
        self._use = html("wb-note", "wb-context-use")
        self._stats = html("wb-stats", "wb-note")
        self.answer = classed(Log(label="Answer"), "wb-answer", "wb-wide")
        self._sampling_box = classed(w.HBox([self.numbers[name] for name in _SAMPLING]), "wb-row")
        more = w.Accordion(
            [
                w.VBox(
                    [
                        classed(w.HBox([self.numbers["repetition_penalty"], self.numbers["num_beams"]]), "wb-row"),
                        self.stop_strings,
                        self.cache,
                        self.when_full,
                        self.assistant,
                    ]
                )
            ],
            selected_index=None,
        )
        more.set_title(0, "More: stop strings, beams, cache, a full context, an assistant")
        self.box = w.VBox(
            [
                self.mode,
                self._history.box,
                self.prompt,
                self.system,
                classed(w.HBox([self.numbers["max_new_tokens"], self.sample]), "wb-row"),
                self._sampling_box,
                classed(more, "wb-knobs"),
                self._use,
                classed(w.HBox([self.generate, self.stop, self.again, self.clear]), "wb-row"),
                problem_line(state, "generate"),
                self.answer,
                self._stats,
            ]
        )
        self.generate.on_click(state.guarded("generate", self._start))
        self.again.on_click(state.guarded("generate", self._start_again))
        self.clear.on_click(state.guarded("generate", self._clear))
        self.stop.on_click(self._stop)  # waits for nothing, not even for the lock
        for control in (self.sample, self.mode, self.stop_strings, self.when_full, *self.numbers.values()):
            control.observe(self._tell, "value")
        for control in (self.prompt, self.system, self.mode, self.when_full, self.numbers["max_new_tokens"]):
            control.observe(self._show_use, "value")
        self.sample.observe(self._show, "value")
        self.mode.observe(self._show, "value")
        state.observe(self._show, ["activity", "session", "sessions"])
        state.observe(self._show_use, ["activity", "session"])
        self._show()

    def _make_controls(self) -> None:
        state = self._state
        self.mode = classed(
            w.ToggleButtons(
                description="Mode",
                options=list(_MODES.items()),
                tooltips=["Ask once", "A conversation with its history", "One prompt in each line, answered together"],
            ),
            "wb-mode",
            "wb-unseen-label",
        )
        self.prompt = classed(
            w.Textarea(
                description="Prompt", value="What is the capital of France?", rows=3, tooltip="What to ask the model"
            ),
            "wb-prompt",
            "wb-wide",
            "wb-stack",
        )
        self.system = text_field(
            "System",
            "wb-system",
            "optional, e.g. You answer in one sentence.",
            "The system prompt, for models whose chat template has one",
            live=True,
        )
        self.sample = classed(
            w.Checkbox(
                description="Sampling", indent=False, tooltip="Draw tokens by chance; off takes the likeliest each time"
            ),
            "wb-sampling",
        )
        self.numbers = {
            "max_new_tokens": number_field("New tokens", 64, "wb-max-new-tokens", "At most so many new tokens"),
            "temperature": number_field("Temperature", 0.7, "wb-temperature", "Higher is more random; above 0"),
            "top_p": number_field(
                "Top p", 0.95, "wb-top-p", "Draw from the likeliest tokens that make up this share; 0 to 1"
            ),
            "top_k": number_field("Top k", 50, "wb-top-k", "Draw from so many likeliest tokens; 0 is all"),
            "min_p": number_field(
                "Min p", 0.0, "wb-min-p", "Only tokens this share as likely as the likeliest; 0 is all"
            ),
            "seed": number_field("Seed", 0, "wb-seed", "The same seed gives the same answer"),
            "repetition_penalty": number_field("Repetition", 1.0, "wb-repetition", "Above 1.0 repeats less"),
            "num_beams": number_field("Beams", 1, "wb-beams", "Follow so many answers at once and give the likeliest"),
        }
        self.stop_strings = text_field(
            "Stop at", "wb-stop-strings", "e.g. User: | END", "The answer ends before any of these; | parts them"
        )
        self.cache = _choice("Cache", {name: name for name in CACHES}, "wb-cache", "How the KV cache is kept")
        bind(
            self.cache,
            state,
            "generate",
            show=lambda: state.recipe.workload.cache,
            write=lambda value: state.update(workload=dataclasses.replace(state.recipe.workload, cache=value)),
        )
        self.when_full = _choice(
            "When full", {_FULL[name]: name for name in WHEN_FULL}, "wb-when-full", "If the context cannot hold it all"
        )
        self.assistant = _choice(
            "Assistant", {_NOBODY: None}, "wb-assistant", "A smaller loaded model that guesses ahead"
        )
        self.generate = classed(
            w.Button(description="Generate", button_style="primary", tooltip="Ask the model"), "wb-generate"
        )
        self.stop = classed(w.Button(description="Stop", tooltip="Stop in mid-answer"), "wb-stop")
        self.again = classed(
            w.Button(description="Regenerate", tooltip="Answer the last message anew"), "wb-regenerate"
        )
        self.clear = classed(w.Button(description="Clear", tooltip="Forget the conversation"), "wb-clear-chat")

    def close(self) -> None:
        """Stop an answer that is going on and wait for its end."""
        self._stop(None)
        if self._reader is not None:
            self._reader.join()

    # What was chosen.

    def options(self) -> GenerationOptions:
        """The choices, as the controls show them.

        Raises:
            ValueError: If one is out of range.
        """
        names = ("max_new_tokens", "repetition_penalty", "num_beams", *(_SAMPLING if self.sample.value else ()))
        stops = [text.strip().replace("\\n", "\n") for text in self.stop_strings.value.split("|")]
        return GenerationOptions(
            do_sample=self.sample.value,
            stop_strings=[text for text in stops if text],
            when_full=self.when_full.value,
            **{name: self.numbers[name].value for name in names},
        )

    def _tell(self, _: object) -> None:
        """Let the exported program follow."""
        try:
            self._state.choose(self.options())
        except ValueError:  # said when it is used
            return

    def _conversation(self, session: Session) -> Chat:
        if self._chat is None or self._chat_session is not session:
            messages = [] if self._chat is None else self._chat.messages
            self._chat, self._chat_session = session.chat(), session
            self._chat.messages = messages  # another model may go on with it
        self._chat.system = self.system.value.strip() or None
        return self._chat

    # What is asked.

    def _start(self, _: object) -> None:
        prompt, mode = self.prompt.value, self.mode.value
        if not prompt.strip():
            raise ValueError("Type a prompt first.")
        options, editing = self.options(), self._editing

        def ask(session: Session, assistant: Session | None) -> Iterator[str]:
            system = self.system.value.strip() or None
            if mode == "many":
                prompts = [line.strip() for line in prompt.splitlines() if line.strip()]
                return _listed(prompts, session.answers(prompts, system=system, options=options))
            if mode == "prompt":
                return session.stream(prompt, system=system, assistant=assistant, options=options)
            chat = self._conversation(session)
            if editing is None:
                return chat.send(prompt, assistant=assistant, options=options)
            return chat.edit(editing, prompt, assistant=assistant, options=options)

        self._ask(ask, (prompt, editing) if mode == "chat" else None)

    def _start_again(self, _: object) -> None:
        options = self.options()
        self._ask(
            lambda session, assistant: self._conversation(session).regenerate(assistant=assistant, options=options)
        )

    def _ask(
        self, ask: Callable[[Session, Session | None], Iterator[str]], sent: tuple[str, int | None] | None = None
    ) -> None:
        """Ask the loaded model; a message that is ``sent`` makes room for the next, and comes back if it fails."""
        state = self._state
        session = state.begin_with_model("generating")
        try:
            self._halt.clear()
            self.answer.text, self._stats.value = "", "The prompt is being read ..."
            # The preview's choice of cache counts, whatever it was when the model was loaded.
            workload = dataclasses.replace(session.recipe.workload, cache=state.recipe.workload.cache)
            session.recipe = session.recipe.with_(workload=workload)
            # This thread only passes pieces on; all torch work is the worker's.
            reader = threading.Thread(
                target=self._read,
                args=(session, lambda: ask(session, self.assistant.value), sent),
                name="workbench-stream",
                daemon=True,
            )
            self._reader = reader
            if sent is not None:  # now: what is in the field later is the next message
                self.prompt.value, self._editing = "", None
            reader.start()
        except BaseException:
            self._put_back(sent)
            state.end()
            raise

    def _put_back(self, sent: tuple[str, int | None] | None) -> None:
        if sent is not None and not self.prompt.value:
            self.prompt.value, self._editing = sent

    def _read(self, session: Session, ask: Callable[[], Iterator[str]], sent: tuple[str, int | None] | None) -> None:
        text, unsent, sent_at, synced_at = "", "", 0.0, time.monotonic()
        before = session.last_stats
        try:
            for piece in ask():
                if self._halt.is_set():  # again: the first time may have come before there was anything to stop
                    session.stop()
                if not text:
                    self._stats.value = "Answering ..."
                text, unsent, now = text + piece, unsent + piece, time.monotonic()
                if now - sent_at >= _APART_SECONDS:
                    self.answer.add(unsent)
                    unsent, sent_at = "", now
                if now - synced_at >= _SYNC_SECONDS:
                    self.answer.text, unsent, synced_at = text, "", now
            self._stats.value = "" if session.last_stats is before else _stats_line(session)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            self._stats.value = ""
            self._put_back(sent)
            self._state.report("generate", as_sentence(error))
        finally:
            self.answer.text = text
            self._state.end()

    def _stop(self, _: object) -> None:
        self._halt.set()
        session = self._state.session
        if session is not None:
            session.stop()

    def _begin_edit(self, index: int, text: str) -> None:
        self._editing = None if self._editing == index else index
        self.prompt.value = text if self._editing is not None else ""
        self._show()

    def _clear(self, _: object) -> None:
        if self._chat is not None:
            self._chat.clear()
        self._editing, self.answer.text, self._stats.value = None, "", ""
        self._show()

    # What is shown.

    def _show(self, _: object = None) -> None:
        state, mode = self._state, self.mode.value
        idle = not state.activity and state.session is not None
        said = [] if self._chat is None or mode != "chat" else self._chat.messages
        enable(self.generate, when=idle)
        enable(self.stop, when=state.activity == "generating")
        enable(self.again, when=idle and bool(said))
        enable(self.clear, when=not state.activity and bool(said))
        for control in (self.again, self.clear, self._history.box):
            visible(control, when=mode == "chat")
        visible(self._sampling_box, when=self.sample.value)
        if not state.activity:
            self._history.show(said)
        others = _named([session for session in state.sessions if session is not state.session])
        if list(self.assistant.options) != [(_NOBODY, None), *others]:
            self.assistant.options = [(_NOBODY, None), *others]
        visible(self.assistant, when=bool(others))
        label = {"prompt": "Prompt", "chat": "Message", "many": "Prompts, one in each line"}[mode]
        self.prompt.description = "In place of what you said" if self._editing is not None and mode == "chat" else label
        self.generate.description = "Send" if mode == "chat" else "Generate"
        if state.session is None and not state.activity and not self.answer.text:
            self._stats.value = NO_MODEL
        elif self._stats.value == NO_MODEL:
            self._stats.value = ""

    def _show_use(self, _: object = None) -> None:
        """Say how much of the context it would take, before it is asked."""
        state, text = self._state, self.prompt.value
        session = state.session
        if state.activity or session is None or session.model is None:
            return
        try:
            options = self.options()
            if self.mode.value == "chat":
                use = self._conversation(session).context_use(text, options=options)
            else:
                longest = max(text.splitlines(), key=len, default="") if self.mode.value == "many" else text
                system = self.system.value.strip() or None
                use = session.context_use(longest or " ", system=system, max_new_tokens=options.max_new_tokens)
            said = str(use)
            if use.overflows:
                said = f"<b>{said}</b> When it is full: {_FULL[options.when_full]} (see More)."
        except ValueError as error:
            said = escape(as_sentence(error))
        if self._use.value != said:
            self._use.value = said


def _named(sessions: list[Session]) -> list[tuple[str, Session]]:
    """Each with a name of its own."""
    names = [f"{session.skeleton.source.title}, {session.placement.precision.label}" for session in sessions]
    twice = {name for name in names if names.count(name) > 1}
    numbered = [f"{name} ({number})" if name in twice else name for number, name in enumerate(names, start=1)]
    return list(zip(numbered, sessions, strict=True))


def _listed(prompts: list[str], answers: Iterator[str]) -> Iterator[str]:
    for prompt, answer in zip(prompts, answers, strict=False):
        yield f"{prompt}\n→ {answer.strip()}\n\n"


def _choice(label: str, options: dict[str, Any], name: str, tip: str) -> Any:
    return classed(w.Dropdown(description=label, options=list(options.items()), tooltip=tip), name, "wb-wide")


def _stats_line(session: Session) -> str:
    stats = session.last_stats
    if stats is None:
        return ""
    predicted = predict_speed(session.placement, session.skeleton)
    parts = [f"{stats.new_tokens} new tokens for {stats.prompt_tokens} of prompt"]
    if stats.reused_tokens:
        parts[0] += f" ({stats.reused_tokens} of them known from the last turn)"
    if stats.tokens_per_second:
        beside = "" if predicted is None else f" (estimated {rate(predicted)})"
        parts.append(f"{stats.tokens_per_second:.1f} tok/s{beside}")
    first = f"first token after {stats.first_token_seconds:.2f} s"
    foretold = None if predicted is None else predicted.first_token_seconds(stats.prompt_tokens - stats.reused_tokens)
    parts.append(first + ("" if foretold is None else f" (estimated {foretold:.2f} s)"))
    parts.append(f"prompt at {stats.prefill_tokens_per_second:.0f} tok/s")
    if stats.threads < stats.most_threads:
        parts.append(f"{stats.threads} of {stats.most_threads} threads, because other programs keep cores busy")
    return " · ".join(parts) + (" · stopped" if stats.stopped else "")
