"""What a quantization came to, as a table, a list of the worst modules, and plotly's lines of error over the layers."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.hardware import format_bytes
from workbench.panels.lines import LinesSpec, LinesView
from workbench.panels.look import html

if TYPE_CHECKING:
    from workbench.gptq import ModuleReport, QuantizeReport
    from workbench.panels.look import Page

_MOST_WORST = 5


class QuantizedView:
    """Shows one report at a time, or none.

    Args:
        page: What the page is like; it stands in a box as wide as this one.

    Attributes:
        box: What is shown.
    """

    def __init__(self, page: Page) -> None:
        self._text = html("wb-quantize-report")
        self._chart = LinesView(page, "wb-quantize-chart")
        self.box = w.VBox([self._text, self._chart.box])

    @property
    def figure(self) -> Any:
        """Plotly's, or None."""
        return self._chart.figure

    def show(self, report: QuantizeReport | None) -> None:
        """Show a report, with a figure of its own."""
        self._chart.show(None if report is None else error_spec(error_series(report)))
        self._text.value = "" if report is None else report_as_html(report, self._chart.failed)


def worst_modules(report: QuantizeReport) -> tuple[ModuleReport, ...]:
    """The tenth of the modules that changed most, five at most: leaving more alone saves little error."""
    return report.worst(min(_MOST_WORST, 1 + len(report.modules) // 10))


def error_series(report: QuantizeReport) -> dict[str, list[float | None]]:
    """The error of each kind of module in each layer; of the experts of a layer, the worst one's."""
    series: dict[str, list[float | None]] = {}
    for kind, errors in report.layer_errors().items():
        name = re.sub(r"\.\d+(?=\.|$)", ".*", kind)
        pairs = zip(series.get(name, [None] * len(errors)), errors, strict=True)
        series[name] = [max((e for e in pair if e is not None), default=None) for pair in pairs]
    return series


def error_spec(series: dict[str, list[float | None]]) -> LinesSpec:
    """Lines of error over the layers, one for each kind of module.

    Args:
        series: As :func:`error_series` gives it.
    """
    return LinesSpec(series=series, x_title="layer", y_title="output error", y_format=".2%", tick_format=".1%")


def report_as_html(report: QuantizeReport, without_figure: str = "") -> str:
    """A report as HTML.

    Args:
        report: The report.
        without_figure: Why there is no figure, so that the table of errors is open; empty if there is one.
    """
    change = report.after_bytes / report.before_bytes - 1
    rows = [_row("Weights", _size(report.before_bytes), _size(report.after_bytes), f"{change:+.0%}")]
    before, after = report.perplexity_before, report.perplexity_after
    if before is not None and after is not None:
        rows.append(_row("Perplexity", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}"))
    head = "".join(f'<th class="wb-number">{name}</th>' for name in ("before", "after", "change"))
    worst = "".join(
        f'<tr><td>{escape(m.name)}</td><td class="wb-number">{m.error:.2%}</td></tr>' for m in worst_modules(report)
    )
    notes = "".join(f"<div>{escape(line)}</div>" for line in report.lines[1:])  # the first is the table's sizes
    missing = f"<div>Plotly's figure could not be made ({escape(without_figure)}).</div>" if without_figure else ""
    return (
        f'<div role="status"><b>✓ Quantized</b> ({escape(report.precision.label)}) in {report.seconds:.1f} s: '
        f"{escape(report.folder)}</div><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
        f'<table class="wb-worst"><tr><th>Changed most</th><th class="wb-number">output error</th></tr>{worst}</table>'
        "<div>Skipping them leaves them as they are: less error, more room. Then quantize again.</div>"
        f'<div class="wb-scroll">{notes}</div>{missing}'
        f"<details{' open' if without_figure else ''}><summary>Output error in each layer</summary>"
        f'<div class="wb-scroll" tabindex="0" role="region" aria-label="Output error in each layer">'
        f"{_errors_as_html(error_series(report))}</div></details>"
    )


def _errors_as_html(series: dict[str, list[float | None]]) -> str:
    head = "".join(f'<th class="wb-number">{escape(kind)}</th>' for kind in series)
    rows = (
        f'<tr><td class="wb-number">{layer}</td>'
        + "".join(f'<td class="wb-number">{"" if e is None else f"{e:.2%}"}</td>' for e in errors)
        + "</tr>"
        for layer, errors in enumerate(zip(*series.values(), strict=True))
    )
    return f'<table><tr><th class="wb-number">layer</th>{head}</tr>{"".join(rows)}</table>'


def _row(name: str, *cells: str) -> str:
    return f"<tr><td>{name}</td>" + "".join(f'<td class="wb-number">{cell}</td>' for cell in cells) + "</tr>"


def _size(size_bytes: int) -> str:
    return f'<span title="{size_bytes:,} bytes">{format_bytes(size_bytes)}</span>'
