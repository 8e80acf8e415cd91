"""The Load panel: what is loaded, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.adapters import check_all_here
from workbench.hardware import device_label, format_bytes
from workbench.load_guard import DoesNotFit, unloadable_because
from workbench.loading import load
from workbench.model import check_weights
from workbench.panels.job import Job
from workbench.panels.look import classed, close_tree, html, problem_line, visible
from workbench.panels.state import NOT_FINISHED, as_sentence
from workbench.precision import GPTQ
from workbench.session import worker
from workbench.weight_cache import empty, kept_weights

if TYPE_CHECKING:
    from workbench.panels.state import State
    from workbench.recipe import Recipe
    from workbench.session import Session


class LoadPanel:
    """Loads what the preview shows, and gives it back.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._job = Job(state, "load", cancelled="Loading was cancelled.", tip="How much is loaded")
        self.load = classed(
            w.Button(description="Load", button_style="primary", tooltip="Load the model exactly as the preview shows"),
            "wb-load",
        )
        self.cancel = classed(w.Button(description="Cancel", tooltip="Stop loading"), "wb-cancel")
        self.unload = classed(w.Button(description="Unload", tooltip="Give the model's memory back"), "wb-unload")
        self.beside = classed(
            w.Checkbox(
                description="Keep loaded models",
                indent=False,
                tooltip="Load beside the models that are loaded, if there is room; else they are unloaded first",
            ),
            "wb-beside",
        )
        self.anyway = classed(
            w.Button(description="Load anyway", tooltip="It may be slow, or the system may end this kernel"),
            "wb-load-anyway",
        )
        self._way_out = classed(w.HBox([self.anyway]), "wb-row")
        self._loaded = classed(w.VBox([]), "wb-loaded")
        self._kept = html("wb-note", "wb-kept")
        self.empty = classed(
            w.Button(description="Empty", tooltip="Delete the quantized weights that are kept for later loads"),
            "wb-kept-empty",
            "wb-tool",
        )
        self._kept_row = classed(w.HBox([self._kept, self.empty]), "wb-row")
        self._differs = html("wb-note", "wb-differs")
        self._report = html("wb-load-report")
        buttons = classed(w.HBox([self.load, self.cancel, self.unload, self.beside]), "wb-row")
        self.box = w.VBox(
            [
                buttons,
                problem_line(state, "load"),
                self._way_out,
                self._job.bar,
                self._job.text,
                self._loaded,
                self._differs,
                self._report,
                self._kept_row,
            ]
        )
        self.load.on_click(state.guarded("load", lambda _: self._start()))
        self.anyway.on_click(state.guarded("load", lambda _: self._start(anyway=True)))
        self.cancel.on_click(self._cancel)
        self.empty.on_click(state.guarded("load", self._empty))
        self.unload.on_click(state.guarded("load", self._unload))
        # "doing" last: an equal placement that answers a new question is announced by nothing else.
        state.observe(self._show, ["activity", "session", "recipe", "machine", "skeleton", "placement", "doing"])
        state.observe(self._drop_question, ["recipe", "machine"])
        state.observe(self._show_report, "session")
        state.observe(self._show_loaded, ["sessions", "session", "activity"])
        state.observe(self._show_kept, "activity")
        self._offer(None)
        self._show()
        self._show_loaded()
        self._show_kept()

    def close(self) -> None:
        """Cancel a load that is going on and wait for it."""
        self._job.close()

    def _start(self, *, anyway: bool = False) -> None:
        state = self._state
        with state.lock:
            why = why_not_load(state)  # before a loaded model is unloaded for it
            if why:
                raise ValueError(why)
            recipe, machine = state.recipe, state.machine
            check_weights(state.skeleton.source)
            if recipe.adapters:
                check_all_here(state.placement)
            state.begin("loading")
        job = self._job

        def work() -> None:
            state.hold(load(recipe, machine=machine, progress=job.progress, cancel=job.cancel, anyway=anyway))

        job.start(work, prepare=self._forget, beside=self.beside.value, failed=self._offer)

    def _forget(self) -> None:
        self._report.value = ""
        self._offer(None)

    def _cancel(self, _: object) -> None:
        self._job.cancel.set()  # waits for nothing, not even for the lock
        doing = self._job.doing
        if self._state.activity and doing:
            self._job.say(f"Stopping. It waits for the end of a step: {doing}", None)

    def _drop_question(self, _: object) -> None:
        """What went wrong with other choices is no answer to these."""
        self._state.report("load", "")
        if self._way_out.layout.display is None:
            self._offer(None)

    def _offer(self, error: Exception | None) -> None:
        """Offer ways out of what went wrong, as buttons; None takes them away."""
        fits = error if isinstance(error, DoesNotFit) else None
        old = self._way_out.children[1:]
        changes = [advice for advice in fits.advice if advice.changes][:2] if fits else []
        self._way_out.children = [self.anyway, *(self._follow(advice) for advice in changes)]
        close_tree(*old)
        visible(self.anyway, when=fits is not None and fits.can_try)
        visible(self._way_out, when=bool(changes) or (fits is not None and fits.can_try))

    def _follow(self, advice: Any) -> Any:
        button = classed(
            w.Button(description="Change and load", tooltip=str(advice), layout={"width": "auto"}), "wb-load-changed"
        )

        def follow(_: object) -> None:
            self._state.replace(advice.apply(self._state.recipe))
            self._state.settle()
            self._start()

        button.on_click(self._state.guarded("load", follow))
        return button

    def _empty(self, _: object) -> None:
        empty()
        self._show_kept()

    def _show_kept(self, _: object = None) -> None:
        kept = kept_weights()
        visible(self._kept_row, when=bool(kept))
        if kept:
            names = ", ".join(sorted({f"{each.title} in {each.precision}" for each in kept}))
            size = format_bytes(sum(each.size_bytes for each in kept))
            self._kept.value = f"Kept on disk to load at once: {escape(names)} ({size})."

    def _show_loaded(self, _: object = None) -> None:
        """A line for each model that is loaded, where there are several."""
        state, old = self._state, self._loaded.children
        rows = [self._loaded_row(session) for session in state.sessions] if len(state.sessions) > 1 else []
        self._loaded.children = rows
        close_tree(*old)

    def _loaded_row(self, session: Session) -> Any:
        state = self._state
        homes = ", ".join(
            f"{format_bytes(size)} on {device_label(device)}"
            for device, size in session.load_report.measured_bytes.items()
        )
        now = session is state.session
        line = f"{session.skeleton.source.title}, {session.placement.precision.label}: {homes}"
        talk = classed(
            w.Button(description="Talk to", tooltip="Generate with this model", disabled=now or bool(state.activity)),
            "wb-talk-to",
            "wb-tool",
        )
        drop = classed(
            w.Button(description="Unload", tooltip="Give this model's memory back", disabled=bool(state.activity)),
            "wb-unload-one",
            "wb-tool",
        )
        talk.on_click(state.guarded("load", lambda _: state.hold(session)))
        drop.on_click(state.guarded("load", lambda _: self._drop(session)))
        shown = f"<b>{escape(line)}</b>" if now else escape(line)
        return classed(w.HBox([talk, drop, html("wb-note", value=shown)]), "wb-row")

    def _unload(self, _: object) -> None:
        session = self._state.session
        if session is None:
            raise ValueError("Nothing is loaded.")
        self._drop(session)

    def _drop(self, session: Session) -> None:
        self._state.begin("unloading")
        self._job.running = worker().submit(self._give_back, session)

    def _give_back(self, session: Session) -> None:
        try:
            self._state.forget(session)
            session.unload()
            self._job.say("Unloaded.", 0.0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            self._state.report("load", as_sentence(error))
        finally:
            self._state.end()

    def _show(self, _: object = None) -> None:
        state = self._state
        idle, session, why = not state.activity, state.session, why_not_load(state)
        enable(self.load, when=not why)
        enable(self.cancel, when=state.activity == "loading")
        enable(self.unload, when=idle and session is not None)
        differs = session is not None and session.recipe != _with_cache_of(state.recipe, session.recipe)
        note = escape(why) if idle else ""
        if differs and not note:
            note = "The loaded model differs from what the preview shows: press Load to load that instead."
        if self._differs.value != note:
            self._differs.value = note

    def _show_report(self, _: object = None) -> None:
        session = self._state.session
        self._report.value = "" if session is None else load_report_html(session)


def why_not_load(state: State) -> str:
    """Why what the preview shows cannot be loaded now, as a sentence; empty if it can, as far as that is known."""
    skeleton, placement = state.skeleton, state.placement
    if state.activity:
        return f"Workbench is {state.activity}: wait for it, or stop it first."
    if not state.is_here:
        return f"The preview is for {state.machine.name}, which is not here: pick This machine to load."
    if skeleton is None or placement is None or not state.is_current:
        return NOT_FINISHED
    title = skeleton.source.title
    if not skeleton.has_weights:
        return f"{title} has no weight files: it can be planned for, not loaded."
    if isinstance(state.recipe.precision, GPTQ) and skeleton.quantized_as is None:
        return f"{title} is not quantized yet, and GPTQ is not done while loading: quantize it in the Quantize tab."
    return unloadable_because(placement, skeleton) or ""


def _with_cache_of(recipe: Recipe, loaded: Recipe) -> Recipe:
    """A recipe with another's kind of cache, which needs no other load."""
    return recipe.with_(workload=replace(recipe.workload, cache=loaded.workload.cache))


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


def enable(widget: Any, *, when: bool) -> None:
    """Let a control be used, or not."""
    if widget.disabled == when:
        widget.disabled = not when
