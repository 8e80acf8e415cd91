"""What a quantization came to, as a table, a list of the worst modules, and plotly's lines of error over the layers."""

from __future__ import annotations

import re
from copy import deepcopy
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.hardware import format_bytes
from workbench.panels.look import classed, close_tree, html

if TYPE_CHECKING:
    from workbench.gptq import ModuleReport, QuantizeReport
    from workbench.panels.look import Page

_MOST_WORST = 5
_HEIGHT_PX = 320
# Okabe and Ito's, which colour-blind people can tell apart; symbols and dashes do it without colour.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8D91")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


class QuantizedView:
    """Shows one report at a time, or none.

    Args:
        page: What the page is like; it stands in a box as wide as this one.

    Attributes:
        box: What is shown.
        figure: Plotly's, or None.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self._report: QuantizeReport | None = None
        self.figure: Any = None
        self._text = html("wb-quantize-report")
        self._holder = classed(w.Box([]), "wb-quantize-chart")
        self.box = w.VBox([self._text, self._holder])
        page.observe(lambda _: self.show(self._report), "dark")
        page.observe(self._fit, "width_px")

    def show(self, report: QuantizeReport | None) -> None:
        """Show a report, with a figure of its own: a new run is rare, and an old figure does not forget its lines."""
        old, self.figure, self._report, failed = self.figure, None, report, ""
        if report is not None:
            try:
                self.figure = error_figure(error_series(report), dark=self._page.dark)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with plotly, the table will do
                failed = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self._fit()
        self._holder.children = () if self.figure is None else (self.figure,)  # after it was made: Colab needs that
        self._text.value = "" if report is None else report_as_html(report, failed)
        if old is not None:
            close_tree(old)

    def _fit(self, _: object = None) -> None:
        """Make the figure as wide as its place, on the page that is open and on one that comes later."""
        figure = self.figure
        self._holder.layout.height = None if figure is None else f"{_HEIGHT_PX}px"
        if figure is not None:
            figure.layout.width = self._page.width_px or None
            figure._trait_values["_widget_layout"] = deepcopy(figure._layout_obj._props)  # noqa: SLF001 - as in chart.py


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


def error_figure(series: dict[str, list[float | None]], *, dark: bool) -> Any:
    """Plotly's lines of error over the layers, a line for each kind of module.

    Args:
        series: As :func:`error_series` gives it.
        dark: For a dark page.
    """
    import plotly.graph_objects as go

    ink, grid = ("#d9d9d9", "rgba(255,255,255,0.14)") if dark else ("#2b2b2b", "rgba(0,0,0,0.12)")
    looks = zip(series.items(), cycle(_COLOURS), cycle(_SYMBOLS), cycle(_DASHES), strict=False)
    lines = [
        go.Scatter(
            x=list(range(len(errors))), y=errors, name=kind, mode="lines+markers", connectgaps=False,
            line={"color": colour, "dash": dash, "width": 1.5}, marker={"symbol": symbol, "size": 6},
            hovertemplate="layer %{x}, " + kind + ": %{y:.2%}<extra></extra>",
        )
        for (kind, errors), colour, symbol, dash in looks
    ]  # fmt: skip
    figure = go.FigureWidget(
        data=lines,
        layout={
            "template": "none", "height": _HEIGHT_PX, "autosize": True, "dragmode": False,
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": ink, "size": 12, "family": "system-ui, -apple-system, Segoe UI, sans-serif"},
            "margin": {"t": 8, "b": 44, "l": 56, "r": 8}, "showlegend": True,
            "xaxis": {"title": {"text": "layer"}, "fixedrange": True, "zeroline": False, "gridcolor": grid,
                      "tickformat": "d", "dtick": max(1, len(next(iter(series.values()))) // 10)},
            "yaxis": {"title": {"text": "output error"}, "fixedrange": True, "rangemode": "tozero",
                      "tickformat": ".1%", "gridcolor": grid, "zerolinecolor": grid},
        },
    )  # fmt: skip
    figure._config = {"displayModeBar": False}  # noqa: SLF001 - plotly's only way to set it
    return figure


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
