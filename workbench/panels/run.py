"""The Load and Generate panels: what the worker does, and what comes of it."""

from __future__ import annotations

import threading
import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.hardware import Machine, device_label, format_bytes
from workbench.loading import load
from workbench.panels.job import Job
from workbench.panels.look import Log, classed, html, problem_line, visible
from workbench.panels.state import as_sentence
from workbench.session import worker
from workbench.show import rate
from workbench.speed import predict_speed

if TYPE_CHECKING:
    from workbench.panels.state import State
    from workbench.session import Session

_APART_SECONDS = 0.05  # between messages to the browser: more than 20 a second only fill queues
_SYNC_SECONDS = 1.0  # between whole copies of a growing answer, for pages that are opened later


class LoadPanel:
    """Loads what the preview shows, and gives it back.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._job = Job(state, "load", cancelled="Loading was cancelled; nothing is loaded.", tip="How much is loaded")
        self.load = classed(
            w.Button(description="Load", button_style="primary", tooltip="Load the model exactly as the preview shows"),
            "wb-load",
        )
        self.cancel = classed(w.Button(description="Cancel", tooltip="Stop loading"), "wb-cancel")
        self.unload = classed(w.Button(description="Unload", tooltip="Give the model's memory back"), "wb-unload")
        self._differs = html("wb-note", "wb-differs")
        self._report = html("wb-load-report")
        buttons = classed(w.HBox([self.load, self.cancel, self.unload]), "wb-row")
        self.box = w.VBox(
            [buttons, problem_line(state, "load"), self._job.bar, self._job.text, self._differs, self._report]
        )
        self.load.on_click(state.guarded("load", self._start))
        self.cancel.on_click(lambda _: self._job.cancel.set())  # waits for nothing, not even for the lock
        self.unload.on_click(state.guarded("load", self._unload))
        state.observe(self._show, ["activity", "session", "recipe", "machine", "placement"])
        state.observe(self._show_report, "session")
        self._show()

    def close(self) -> None:
        """Cancel a load that is going on and wait for it."""
        self._job.close()

    def _start(self, _: object) -> None:
        state = self._state
        with state.lock:
            recipe, machine, skeleton = state.recipe, state.machine, state.skeleton
            if machine.name in Machine.presets():
                raise ValueError(f"The preview is for {machine.name}, which is not here: pick This machine to load.")
            if not state.is_current or skeleton is None:
                raise ValueError("The preview is not finished: wait until it shows where the layers go.")
            state.begin("loading")
        job = self._job

        def work() -> None:
            state.hold(load(recipe, machine=machine, progress=job.progress, cancel=job.cancel))

        job.start(work, prepare=self._forget_report)

    def _forget_report(self) -> None:
        self._report.value = ""

    def _unload(self, _: object) -> None:
        session = self._state.session
        if session is None:
            raise ValueError("Nothing is loaded.")
        self._state.begin("unloading")
        self._job.running = worker().submit(self._give_back, session)

    def _give_back(self, session: Session) -> None:
        try:
            self._state.hold(None)
            session.unload()
            self._job.say("Unloaded.", 0.0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            self._state.report("load", as_sentence(error))
        finally:
            self._state.end()

    def _show(self, _: object = None) -> None:
        state = self._state
        idle, session = not state.activity, state.session
        elsewhere = state.machine.name in Machine.presets()
        _enable(self.load, when=idle and state.placement is not None and not elsewhere)
        _enable(self.cancel, when=state.activity == "loading")
        _enable(self.unload, when=idle and session is not None)
        differs = session is not None and session.recipe != state.recipe
        note = (
            "The loaded model differs from what the preview shows: press Load to load that instead." if differs else ""
        )
        if elsewhere:
            note = f"The preview is for {escape(state.machine.name)}: pick This machine to load."
        if self._differs.value != note:
            self._differs.value = note

    def _show_report(self, _: object = None) -> None:
        session = self._state.session
        self._report.value = "" if session is None else load_report_html(session)


def load_report_html(session: Session) -> str:
    """What was loaded, predicted against measured, as HTML."""
    report = session.load_report
    rows = []
    for device, memory in session.placement.memory.items():
        measured = report.measured_bytes.get(device, 0)
        if memory.weight_bytes or measured:
            off = measured - memory.weight_bytes
            rows.append(
                f"<tr><td>{device_label(device)}</td>{_cell(memory.weight_bytes)}{_cell(measured)}"
                f'<td class="wb-number">{f"{off:+,} bytes" if off else "none"}</td></tr>'
            )
    table = (
        '<table><tr><th>Weights on</th><th class="wb-number">predicted</th><th class="wb-number">measured</th>'
        f'<th class="wb-number">difference</th></tr>{"".join(rows)}</table>'
    )
    word = "✓ Loaded as previewed" if report.matches else "≠ Loaded, but not as previewed"
    lines = "".join(f"<div>{escape(line)}</div>" for line in report.lines)
    return (
        f'<div role="status"><b>{word}</b> in {report.seconds:.1f} s.</div>{table}<div class="wb-scroll">{lines}</div>'
    )


def _cell(size_bytes: int) -> str:
    return f'<td class="wb-number" title="{size_bytes:,} bytes">{format_bytes(size_bytes)}</td>'


def _enable(widget: Any, *, when: bool) -> None:
    if widget.disabled == when:
        widget.disabled = not when


class GeneratePanel:
    """Talks to the loaded model; the answer streams in and can be stopped.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._reader: threading.Thread | None = None
        self._halt = threading.Event()
        self.prompt = classed(
            w.Textarea(
                description="Prompt",
                value="What is the capital of France?",
                rows=3,
                tooltip="What to ask the model",
            ),
            "wb-prompt",
            "wb-wide",
            "wb-stack",
        )
        self.system = classed(
            w.Text(
                description="System",
                placeholder="optional, e.g. You answer in one sentence.",
                tooltip="The system prompt, for models whose chat template has one",
            ),
            "wb-system",
            "wb-wide",
        )
        self.most = _number("New tokens", 64, "wb-max-new-tokens", "At most so many new tokens")
        self.sample = classed(
            w.Checkbox(
                description="Sampling", indent=False, tooltip="Draw tokens by chance; off takes the likeliest each time"
            ),
            "wb-sampling",
        )
        self.sampling = {
            "temperature": _number("Temperature", 0.7, "wb-temperature", "Higher is more random; above 0"),
            "top_p": _number(
                "Top p", 0.95, "wb-top-p", "Draw from the likeliest tokens that make up this share; 0 to 1"
            ),
            "top_k": _number("Top k", 50, "wb-top-k", "Draw from so many likeliest tokens; 0 is all"),
            "repetition_penalty": _number("Repetition", 1.0, "wb-repetition", "Above 1.0 repeats less"),
            "seed": _number("Seed", 0, "wb-seed", "The same seed gives the same answer"),
        }
        self._sampling_box = classed(w.HBox(list(self.sampling.values())), "wb-row")
        self.generate = classed(
            w.Button(description="Generate", button_style="primary", tooltip="Ask the model"), "wb-generate"
        )
        self.stop = classed(w.Button(description="Stop", tooltip="Stop in mid-answer"), "wb-stop")
        self._stats = html("wb-stats", "wb-note")
        self.answer = classed(Log(label="Answer"), "wb-answer", "wb-wide")
        self.box = w.VBox(
            [
                self.prompt,
                self.system,
                classed(w.HBox([self.most, self.sample]), "wb-row"),
                self._sampling_box,
                classed(w.HBox([self.generate, self.stop]), "wb-row"),
                problem_line(state, "generate"),
                self.answer,
                self._stats,
            ]
        )
        self.generate.on_click(state.guarded("generate", self._start))
        self.stop.on_click(self._stop)  # waits for nothing, not even for the lock
        self.sample.observe(self._show, "value")
        state.observe(self._show, ["activity", "session"])
        self._show()

    def close(self) -> None:
        """Stop an answer that is going on and wait for its end."""
        self._stop(None)
        if self._reader is not None:
            self._reader.join()

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": self.most.value, "system": self.system.value.strip() or None}
        if self.sample.value:
            options["do_sample"] = True
            options.update({name: control.value for name, control in self.sampling.items()})
        return options

    def _start(self, _: object) -> None:
        state = self._state
        prompt = self.prompt.value
        if not prompt.strip():
            raise ValueError("Type a prompt first.")
        if self.most.value < 1:
            raise ValueError("New tokens is a whole number of at least 1.")
        with state.lock:
            session = state.session
            if session is None:
                raise ValueError("Load a model first, in the Load tab.")
            state.begin("generating")
        try:
            self._halt.clear()
            self.answer.text, self._stats.value = "", "The prompt is being read ..."
            # This thread only passes pieces on; all torch work is the worker's.
            reader = threading.Thread(
                target=self._read, args=(session, prompt, self._options()), name="workbench-stream", daemon=True
            )
            self._reader = reader
            reader.start()
        except BaseException:
            state.end()
            raise

    def _read(self, session: Session, prompt: str, options: dict[str, Any]) -> None:
        text, unsent, sent_at, synced_at = "", "", 0.0, time.monotonic()
        try:
            for piece in session.stream(prompt, **options):
                if self._halt.is_set():  # again: the first time may have come before there was anything to stop
                    session.stop()
                text, unsent, now = text + piece, unsent + piece, time.monotonic()
                if now - sent_at >= _APART_SECONDS:
                    self.answer.add(unsent)
                    unsent, sent_at = "", now
                if now - synced_at >= _SYNC_SECONDS:
                    self.answer.text, unsent, synced_at = text, "", now
            self._stats.value = _stats_line(session)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            self._stats.value = ""
            self._state.report("generate", as_sentence(error))
        finally:
            self.answer.text = text
            self._state.end()

    def _stop(self, _: object) -> None:
        self._halt.set()
        session = self._state.session
        if session is not None:
            session.stop()

    def _show(self, _: object = None) -> None:
        state = self._state
        _enable(self.generate, when=not state.activity and state.session is not None)
        _enable(self.stop, when=state.activity == "generating")
        visible(self._sampling_box, when=self.sample.value)
        if state.session is None and not state.activity and not self.answer.text:
            self._stats.value = "Load a model first, in the Load tab."
        elif self._stats.value.startswith("Load a model"):
            self._stats.value = ""


def _number(label: str, value: float, name: str, tip: str) -> Any:
    kind = w.IntText if isinstance(value, int) else w.FloatText
    return classed(kind(description=label, value=value, tooltip=tip), name, "wb-short")


def _stats_line(session: Session) -> str:
    stats = session.last_stats
    if stats is None:
        return ""
    parts = [f"{stats.new_tokens} new tokens for {stats.prompt_tokens} of prompt"]
    if stats.tokens_per_second:
        predicted = predict_speed(session.placement, session.skeleton)
        beside = "" if predicted is None else f" (estimated {rate(predicted)})"
        parts.append(f"{stats.tokens_per_second:.1f} tok/s{beside}")
    parts.append(f"first token after {stats.first_token_seconds:.2f} s")
    return " · ".join(parts) + (" · stopped" if stats.stopped else "")
