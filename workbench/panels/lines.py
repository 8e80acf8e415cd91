"""Plotly's lines over layers or steps, as wide as their place and in the page's own ink."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.panels.look import classed, close_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.panels.look import Page

# Okabe and Ito's, which colour-blind people can tell apart; symbols and dashes do it without colour.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8D91")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True, kw_only=True)
class LinesSpec:
    """What a figure of lines shows; plain data.

    Attributes:
        series: Name to a value for each place on the horizontal axis; None leaves a gap.
        x: The places; None counts from 0.
        x_title: What they are.
        y_title: What the values are.
        y_format: How the values are written, as d3 has it (".2%"); empty leaves it to plotly.
        tick_format: The same for the numbers along the axis; empty is as the values.
        logarithmic: Whether the vertical axis is.
        levels: Name to a height at which a line is drawn straight across.
    """

    series: Mapping[str, Sequence[float | None]]
    x_title: str
    y_title: str
    x: Sequence[float] | None = None
    y_format: str = ""
    tick_format: str = ""
    logarithmic: bool = False
    levels: Mapping[str, float] | None = None

    @property
    def places(self) -> list[float]:
        """The places on the horizontal axis."""
        return list(self.x if self.x is not None else range(max(map(len, self.series.values()), default=0)))


class LinesView:
    """Shows one figure at a time, or none. It is made anew for each: an old one does not forget its lines.

    Args:
        page: What the page is like; it stands in a box as wide as this one.
        name: A CSS class.
        height_px: Of the figure.

    Attributes:
        box: What is shown.
        figure: Plotly's, or None.
        failed: Why there is none though there should be one; empty else.
    """

    def __init__(self, page: Page, name: str, height_px: int = 320) -> None:
        self._page, self._height_px = page, height_px
        self._spec: LinesSpec | None = None
        self.figure: Any = None
        self.failed = ""
        self.box: Any = classed(w.Box([]), name)
        page.observe(lambda _: self.show(self._spec), "dark")
        page.observe(self._fit, "width_px")

    def show(self, spec: LinesSpec | None) -> None:
        """Show a figure in place of the last; None shows none."""
        old, self.figure, self._spec, self.failed = self.figure, None, spec, ""
        if spec is not None:
            try:
                self.figure = lines_figure(spec, dark=self._page.dark, height_px=self._height_px)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with plotly, words will do
                self.failed = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self._fit()
        self.box.children = () if self.figure is None else (self.figure,)  # after it was made: Colab needs that
        if old is not None:
            close_tree(old)

    def update(self, spec: LinesSpec) -> None:
        """Show more of the same lines, in the figure that is there."""
        if self.figure is None or self._spec is None or list(spec.series) != list(self._spec.series):
            self.show(spec)
            return
        self._spec = spec
        places = spec.places
        with self.figure.batch_update():
            for trace, values in zip(self.figure.data, spec.series.values(), strict=False):
                trace.x, trace.y = places[: len(values)], list(values)
        # What a page that is reloaded later reads; see chart.py.
        self.figure._trait_values["_widget_data"] = deepcopy(self.figure._data)  # noqa: SLF001 - as in chart.py

    def _fit(self, _: object = None) -> None:
        """Make the figure as wide as its place, on the page that is open and on one that comes later."""
        figure = self.figure
        self.box.layout.height = None if figure is None else f"{self._height_px}px"
        if figure is not None:
            figure.layout.width = self._page.width_px or None
            figure._trait_values["_widget_layout"] = deepcopy(figure._layout_obj._props)  # noqa: SLF001 - as in chart.py


def lines_figure(spec: LinesSpec, *, dark: bool, height_px: int = 320) -> Any:
    """Plotly's figure of lines.

    Args:
        spec: What it shows.
        dark: For a dark page.
        height_px: Its height.
    """
    import plotly.graph_objects as go

    ink, grid = ("#d9d9d9", "rgba(255,255,255,0.14)") if dark else ("#2b2b2b", "rgba(0,0,0,0.12)")
    places = spec.places
    value = f"%{{y:{spec.y_format}}}" if spec.y_format else "%{y}"
    looks = zip(spec.series.items(), cycle(_COLOURS), cycle(_SYMBOLS), cycle(_DASHES), strict=False)
    lines = [
        go.Scatter(
            x=places[: len(values)], y=list(values), name=name, mode="lines+markers", connectgaps=False,
            line={"color": colour, "dash": dash, "width": 1.5}, marker={"symbol": symbol, "size": 6},
            hovertemplate=f"{spec.x_title} %{{x}}, {name}: {value}<extra></extra>",
        )
        for (name, values), colour, symbol, dash in looks
    ]  # fmt: skip
    ends = [places[0], places[-1]] if places else []
    for name, height in (spec.levels or {}).items():
        line = {"color": ink, "dash": "longdash", "width": 1.2}
        lines.append(go.Scatter(x=ends, y=[height] * len(ends), name=name, mode="lines", line=line, hoverinfo="name+y"))
    vertical = {"title": {"text": spec.y_title}, "fixedrange": True, "gridcolor": grid, "zerolinecolor": grid}
    if spec.tick_format or spec.y_format:
        vertical["tickformat"] = spec.tick_format or spec.y_format
    vertical |= {"type": "log", "dtick": 1} if spec.logarithmic else {"rangemode": "tozero"}
    figure = go.FigureWidget(
        data=lines,
        layout={
            "template": "none", "height": height_px, "autosize": True, "dragmode": False,
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": ink, "size": 12, "family": "system-ui, -apple-system, Segoe UI, sans-serif"},
            "margin": {"t": 8, "b": 44, "l": 56, "r": 8}, "showlegend": True,
            "xaxis": {"title": {"text": spec.x_title}, "fixedrange": True, "zeroline": False, "gridcolor": grid,
                      "tickformat": "d", "dtick": max(1, len(places) // 10)},
            "yaxis": vertical,
        },
    )  # fmt: skip
    figure._config = {"displayModeBar": False}  # noqa: SLF001 - plotly's only way to set it
    return figure
