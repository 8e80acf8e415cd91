"""The Quantize panel: GPTQ from calibration text to a folder, and from there on."""

from __future__ import annotations

import dataclasses
import itertools
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.gptq import quantize
from workbench.model import ModelRef
from workbench.panels.ahead import AheadView
from workbench.panels.calibration import CalibrationControls
from workbench.panels.job import Job
from workbench.panels.look import button, classed, html, problem_line, text_field, visible
from workbench.panels.push import PushControls
from workbench.panels.quantized import QuantizedView, worst_modules
from workbench.panels.state import NOT_FINISHED, bind
from workbench.precision import GPTQ, FullPrecision

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.gptq import QuantizeReport
    from workbench.panels.look import Page
    from workbench.panels.state import State
    from workbench.recipe import Recipe


class QuantizePanel:
    """Makes a GPTQ folder of the model, and says what came of it.

    Args:
        state: The state.
        page: What the page is like.
        in_view: Whether anyone is looking.

    Attributes:
        box: What is shown.
        report: Of the last quantization, once it is finished.
    """

    def __init__(self, state: State, page: Page, in_view: Callable[[], bool] = lambda: True) -> None:
        self._state = state
        self._job = Job(
            state, "quantize", cancelled="Quantizing was cancelled; nothing is left of it.", tip="How much is done"
        )
        self._suggested = ""
        self._asked: Recipe | None = None
        self.report: QuantizeReport | None = None
        self.calibration = CalibrationControls(state)
        self.ahead = AheadView(state, self.calibration.amount, in_view)
        self.push = PushControls(state)
        self.output = text_field("Output folder", "wb-output", "a new folder", "Where the quantized model is saved")
        self._where = html("wb-note", "wb-output-path")
        self.overwrite = classed(
            w.Checkbox(description="Overwrite", indent=False, tooltip="Replace the output folder if it exists"),
            "wb-overwrite",
        )
        self.quantize = button("Quantize", "wb-quantize", "Save the model, quantized, in the output folder", "primary")
        self.cancel = button("Cancel", "wb-quantize-cancel", "Stop after the module that is being quantized")
        self._why = html("wb-note", "wb-quantize-why")
        self.open = button("Open the result", "wb-open-result", "Make the quantized folder the model")
        self.skip = button("Skip the worst modules", "wb-skip-worst", "Add what changed most to skip_modules")
        self._view = QuantizedView(page)
        self._knobs = _knobs(state)
        self._after = w.VBox([self._view.box, classed(w.HBox([self.open, self.skip]), "wb-row"), self.push.box])
        self.box = w.VBox(
            [
                self.calibration.box,
                self._knobs,
                self.output,
                self._where,
                self.overwrite,
                self.ahead.box,
                classed(w.HBox([self.quantize, self.cancel]), "wb-row"),
                self._why,
                problem_line(state, "quantize"),
                self._job.bar,
                self._job.text,
                self._after,
            ]
        )
        self.quantize.on_click(state.guarded("quantize", self._start))
        self.cancel.on_click(self._stop)  # waits for nothing, not even for the lock
        self.open.on_click(state.guarded("quantize", self._open))
        self.skip.on_click(state.guarded("quantize", self._skip_worst))
        self.output.observe(self._show, "value")
        for control in (self.calibration.samples, self.calibration.length):
            control.observe(self.ahead.refresh, "value")
        self.ahead.on_plan = self._show
        # "doing" last: an equal placement that answers a new question is announced by nothing else.
        state.observe(self._show, ["activity", "session", "recipe", "machine", "skeleton", "placement", "doing"])
        self._show()

    def close(self) -> None:
        """Cancel a quantization that is going on and wait for it."""
        self._job.close()
        self.ahead.close()

    def refresh(self, _: object = None) -> None:
        """Work out what is to be seen, now that somebody is looking."""
        self.ahead.refresh()

    # The run.

    def _start(self, _: object) -> None:
        state, text, folder = self._state, self.calibration.text(), self._folder()
        overwrite = bool(self.overwrite.value)
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:  # said before a loaded model is unloaded for it
            raise ValueError(f"{folder} exists: name a new folder, or tick Overwrite to replace it.")
        with state.lock:
            why = self._why_not()
            if why:
                raise ValueError(why)
            recipe, machine = state.recipe, state.machine
            state.begin("quantizing")
        job = self._job

        def work() -> None:
            report = quantize(
                recipe,
                folder,
                calibration=text,
                overwrite=overwrite,
                machine=machine,
                progress=job.progress,
                cancel=job.cancel,
            )
            self._take(recipe, report)

        job.start(work, prepare=lambda: self._take(None, None))

    def _stop(self, _: object) -> None:
        self._job.cancel.set()
        self._job.say("Stopping after this module ...", None)

    # What comes of it.

    def _take(self, recipe: Recipe | None, report: QuantizeReport | None) -> None:
        with self._state.lock:
            self._asked, self.report = recipe, report
            self._view.show(report)
            if report is not None:
                self.push.offer(report.folder)
            self._show()

    def _open(self, _: object) -> None:
        if self.report is None:
            raise ValueError("Nothing has been quantized yet.")
        self._state.take_model(ModelRef(name=self.report.folder), precision=FullPrecision())

    def _skip_worst(self, _: object) -> None:
        with self._state.lock:
            precision = self._state.recipe.precision
            if self.report is None or not isinstance(precision, GPTQ):
                raise ValueError("Pick gptq under Precision first: its skip_modules are what this adds to.")
            names = dict.fromkeys((*precision.skip_modules, *(m.name for m in worst_modules(self.report))))
            self._state.update(precision=dataclasses.replace(precision, skip_modules=tuple(names)))

    # What the controls show.

    def _folder(self) -> Path:
        return Path(self.output.value.strip() or self._suggested).expanduser().absolute()

    def _why_not(self) -> str:
        """Why nothing can be quantized now, as a sentence; empty if it can."""
        state = self._state
        skeleton, precision = state.skeleton, state.recipe.precision
        if state.activity:
            return f"Workbench is {state.activity}: wait for it, or stop it first."
        if not state.is_here:
            return f"The preview is for {state.machine.name}: pick This machine to quantize."
        if skeleton is None or not state.is_current:
            return NOT_FINISHED
        if skeleton.quantized_as is not None:
            return f"{skeleton.source.title} is quantized already ({skeleton.quantized_as}): pick the original model."
        if not isinstance(precision, GPTQ):
            return f"Pick gptq under Precision to quantize; it is {precision.label} now."
        if not skeleton.has_weights:
            return f"{skeleton.source.title} has no weight files: it can be planned for, not quantized."
        plan = self.ahead.plan
        return plan.summary if plan is not None and plan.verdict == "does_not_fit" else ""

    def _show(self, _: object = None) -> None:
        with self._state.lock:
            state, why = self._state, self._why_not()
            busy = state.activity == "quantizing"
            self.quantize.disabled, self.cancel.disabled = bool(why), not busy
            if not why and state.session is not None:
                why = "The loaded model is unloaded first: there may be no room for two."
            self._why.value = "" if busy else escape(why)
            self._suggest()
            visible(self._after, when=self.report is not None)
            precision = state.recipe.precision
            visible(self._knobs, when=isinstance(precision, GPTQ))
            same = self._asked is not None and self._asked.model == state.recipe.model and isinstance(precision, GPTQ)
            worst = {m.name for m in worst_modules(self.report)} if self.report else set()
            self.skip.disabled = not same or worst <= set(getattr(precision, "skip_modules", ()))

    def _suggest(self) -> None:
        """Suggest a folder that is new, unless another was typed."""
        skeleton, precision = self._state.skeleton, self._state.recipe.precision
        if skeleton is not None and isinstance(precision, GPTQ) and self._state.activity != "quantizing":
            before, self._suggested = self._suggested, suggested_folder(skeleton.source.title, precision)
            if self.output.value.strip() in ("", before):
                self.output.value = self._suggested
        named = self.output.value.strip() or self._suggested
        self._where.value = f"In {escape(str(self._folder()))}" if named else ""


def suggested_folder(title: str, precision: GPTQ) -> str:
    """A folder that does not exist in the current directory, named after the model: "Llama-gptq-4bit-128g"."""
    stem = re.sub(r"[^\w.-]+", "-", title.rpartition("/")[2]).strip("-.") or "model"
    group = "" if precision.group_size == -1 else f"-{precision.group_size}g"
    name = f"{stem}-gptq-{precision.bits}bit{group}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in names if not Path(each).exists())


def _knobs(state: State) -> Any:
    """GPTQ's knobs that most people leave alone, folded away."""
    damp = w.BoundedFloatText(
        description="Damping", min=0.001, max=0.999, step=0.01, value=0.1,
        tooltip="damp_percent: added to the Hessian's diagonal, as a share of its mean; more is steadier",
    )  # fmt: skip
    sequential = w.Checkbox(
        description="True sequential", indent=False, value=True,
        tooltip="true_sequential: each module of a layer sees the output of those that are rounded already",
    )  # fmt: skip
    layout = w.Dropdown(
        description="Format", options=(("gptq (v1, which everything reads)", "gptq"),
                                       ("gptq_v2 (old loaders misread it)", "gptq_v2")),
        tooltip="How zero points are stored: AutoGPTQ and other old loaders read v1 alone",
    )  # fmt: skip
    for control, option in ((damp, "damp_percent"), (sequential, "true_sequential"), (layout, "format")):
        # A control of another method has nothing to say: it keeps what it shows.
        bind(
            control,
            state,
            "quantize",
            show=lambda control=control, option=option: getattr(state.recipe.precision, option, control.value),  # type: ignore[misc]
            write=lambda value, option=option: state.update(  # type: ignore[misc]
                precision=dataclasses.replace(state.recipe.precision, **{option: value})
            ),
        )
    inside = [
        classed(damp, "wb-damp", "wb-short"),
        classed(sequential, "wb-true-sequential"),
        classed(layout, "wb-format", "wb-wide"),
    ]
    box = classed(w.Accordion([w.VBox(inside)], titles=("More of GPTQ",)), "wb-knobs", "wb-gptq-knobs")
    box.selected_index = None
    return box
