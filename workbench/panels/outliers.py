"""The Outliers panel: what goes into the layers for a prompt, against int8's threshold."""

from __future__ import annotations

import dataclasses
from html import escape
from typing import TYPE_CHECKING

import ipywidgets as w

from workbench.int8_outliers import DEFAULT_THRESHOLD, outliers
from workbench.panels.job import Job
from workbench.panels.lines import LinesSpec, LinesView
from workbench.panels.look import classed, html, problem_line, threshold_slider, visible
from workbench.panels.state import NO_MODEL
from workbench.precision import Int8

if TYPE_CHECKING:
    from workbench.int8_outliers import OutlierReport
    from workbench.panels.look import Page
    from workbench.panels.state import State


class OutliersPanel:
    """Reads a prompt with the loaded model and shows magnitudes and int8's cost for each layer.

    Args:
        state: The state.
        page: What the page is like.

    Attributes:
        box: What is shown.
        report: Of the last prompt, or None.
        magnitudes: The chart of them.
        shares: The chart of what is multiplied in 16 bits.
    """

    def __init__(self, state: State, page: Page) -> None:
        self._state = state
        self._job = Job(state, "outliers", cancelled="Stopped.", tip="Whether the prompt has been read")
        self.report: OutlierReport | None = None
        self.prompt = classed(
            w.Textarea(
                description="Prompt",
                value="What is the capital of France?",
                rows=2,
                tooltip="Text like that which the model will be used for: other text has other outliers",
            ),
            "wb-outliers-prompt",
            "wb-wide",
            "wb-stack",
        )
        self.threshold = threshold_slider(
            "wb-outliers-threshold",
            "Columns that reach this magnitude are multiplied in 16 bits; moving it asks nothing anew",
            DEFAULT_THRESHOLD,
        )
        self.measure = classed(
            w.Button(description="Measure", button_style="primary", tooltip="Read the prompt and note the magnitudes"),
            "wb-outliers-measure",
        )
        self.take = classed(
            w.Button(
                description="Use this threshold",
                tooltip="Make int8 with this threshold the precision; load again to run with it",
                layout=w.Layout(width="auto"),
            ),
            "wb-outliers-take",
        )
        self._why = html("wb-note", "wb-outliers-why")
        self._text = html("wb-outliers-report")
        self.magnitudes = LinesView(page, "wb-outliers-chart", 300)
        self.shares = LinesView(page, "wb-outliers-shares", 220)
        self._after = w.VBox([self.threshold, self._text, self.magnitudes.box, self.shares.box, self.take])
        note = (
            "int8 multiplies columns with large numbers in 16 bits, all others in 8. Few such columns cost little and "
            "keep the model's quality; here is how many there are, for a loaded model and a prompt."
        )
        self.box = w.VBox(
            [
                html("wb-note", value=note),
                self.prompt,
                self.measure,
                self._why,
                problem_line(state, "outliers"),
                self._job.bar,
                self._job.text,
                self._after,
            ]
        )
        visible(self._job.bar, when=False)  # it would jump from nothing to all
        self.measure.on_click(state.guarded("outliers", self._start))
        self.take.on_click(state.guarded("outliers", self._take))
        self.threshold.observe(state.guarded("outliers", self._show_report), "value")
        state.observe(self._show, ["activity", "session", "recipe"])
        self._show()

    def close(self) -> None:
        """Wait for what is going on."""
        self._job.close()

    def _start(self, _: object) -> None:
        session = self._state.begin_with_model("measuring outliers")
        prompt = self.prompt.value

        def work() -> None:
            self.report = outliers(session, prompt)
            precision = session.placement.precision
            if isinstance(precision, Int8) and precision.threshold:
                self.threshold.value = precision.threshold
            self._show_report()

        self._job.start(work, beside=True)

    def _take(self, _: object) -> None:
        with self._state.lock:
            precision = self._state.recipe.precision
            kept = precision if isinstance(precision, Int8) else Int8()
            self._state.update(precision=dataclasses.replace(kept, threshold=self.threshold.value))

    def _show_report(self, _: object = None) -> None:
        report = self.report
        visible(self._after, when=report is not None)
        if report is None:
            return
        report = dataclasses.replace(report, threshold=float(self.threshold.value))
        magnitudes, shares = outlier_specs(report)
        self.magnitudes.show(magnitudes)
        self.shares.update(shares)
        failed = self.magnitudes.failed
        lines = [*report.lines, *([f"Plotly's figure could not be made ({failed})."] if failed else [])]
        self._text.value = f'<div role="status">{"<br>".join(map(escape, lines))}</div>' + outliers_as_html(report)

    def _show(self, _: object = None) -> None:
        state = self._state
        why = "" if state.session is not None else NO_MODEL
        self.measure.disabled = bool(why) or bool(state.activity)
        quantized = state.skeleton is not None and state.skeleton.quantized_as is not None
        self.take.disabled = bool(state.activity) or quantized
        if self._why.value != why:
            self._why.value = why
        visible(self._after, when=self.report is not None)


def outlier_specs(report: OutlierReport) -> tuple[LinesSpec, LinesSpec]:
    """What the two charts show: magnitudes over the layers, and the share that is multiplied in 16 bits."""
    layers = report.layers
    levels = {f"threshold {report.threshold:g}": report.threshold} if report.threshold else {}
    magnitudes = LinesSpec(
        series={
            "largest": [report.largest(layer) for layer in layers],
            "half of the columns stay below": [report.typical(layer) for layer in layers],
        },
        x=layers,
        x_title="layer",
        y_title="magnitude",
        y_format=".3g",
        logarithmic=True,
        levels=levels,
    )
    shares = LinesSpec(
        series={"multiplied in 16 bits": [report.share(layer=layer) for layer in layers]},
        x=layers,
        x_title="layer",
        y_title="share",
        y_format=".1%",
    )
    return magnitudes, shares


def outliers_as_html(report: OutlierReport) -> str:
    """The same as a table."""
    head = "".join(f'<th class="wb-number">{name}</th>' for name in ("layer", "largest", "half below", "in 16 bits"))
    rows = "".join(
        f'<tr><td class="wb-number">{layer}</td><td class="wb-number">{report.largest(layer):.4g}</td>'
        f'<td class="wb-number">{report.typical(layer):.2g}</td>'
        f'<td class="wb-number">{report.share(layer=layer):.2%}</td></tr>'
        for layer in report.layers
    )
    return (
        '<details><summary>As a table</summary><div class="wb-scroll" tabindex="0" role="region" '
        f'aria-label="Outliers in each layer"><table><tr>{head}</tr>{rows}</table></div></details>'
    )
