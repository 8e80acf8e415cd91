"""The plotly figure of a picture. Nothing else imports plotly."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from workbench.panels.picture import (
    BOTTOM_PX,
    GAP_PX,
    KINDS,
    LAYERS_PX,
    LEFT_PX,
    MODULE_KINDS,
    RIGHT_PX,
    TOP_PX,
    alpha,
    both,
)

if TYPE_CHECKING:
    from workbench.panels.picture import ChartSpec


def _faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _bars(spec: ChartSpec) -> list[tuple[object, ...]]:
    """What plotly draws of the bars."""
    return [(bar.label, bar.part_bytes, bar.kept_for, bar.width_bytes) for bar in spec.bars]


class Chart:
    """The one plotly figure of a workbench, made once and updated in place.

    Making the first one in a process takes seconds (plotly is imported): do it in the background.

    Attributes:
        figure: The ``FigureWidget``.
    """

    def __init__(self) -> None:
        import plotly.graph_objects as go

        bars = [
            go.Bar(
                orientation="h", name=kind, width=0.42, xaxis="x", yaxis="y", hoverinfo="text",
                marker={"pattern": {"fillmode": "replace", "size": 6, "solidity": 0.35}},
                hoverlabel={"align": "left"},
            )
            for kind, _ in KINDS
        ]  # fmt: skip
        # The mouse over the layers is the overlay's, which tells the keyboard's user the same.
        below = {"xaxis": "x2", "yaxis": "y2", "hoverinfo": "skip"}
        hatched = {"fillmode": "overlay", "size": 7, "solidity": 0.18, "fgopacity": 0.45}
        outline = {"width": 0.7, "color": "#808080"}  # 3.9 to 1 on white and 4.1 on dark, for yellow and light blue
        layers = go.Bar(name="layers", marker={"line": outline, "pattern": hatched}, **below)
        pinned = go.Bar(
            name="pinned", visible=False, marker={"color": "rgba(0,0,0,0)", "line": {"width": 1.2}}, **below
        )
        kinds = [
            go.Bar(
                name=kind, visible=False, marker={"color": colour, "line": outline, "pattern": hatched}, **below
            )
            for kind, (colour, _) in MODULE_KINDS.items()
        ]  # fmt: skip
        fixed = {"fixedrange": True, "zeroline": False}
        self.figure = go.FigureWidget(
            data=[*bars, layers, pinned, *kinds],
            layout={
                "template": "none", "barmode": "overlay", "bargap": 0.12, "showlegend": False, "dragmode": False,
                "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "autosize": True,
                "margin": {"t": TOP_PX, "b": BOTTOM_PX, "l": LEFT_PX, "r": RIGHT_PX, "pad": 0},
                "xaxis": {**fixed, "range": [0, 1.004], "visible": False, "domain": [0, 1], "anchor": "y"},
                "yaxis": {**fixed, "visible": False, "anchor": "x"},
                "xaxis2": {
                    **fixed, "domain": [0, 1], "anchor": "y2", "showgrid": False, "ticks": "outside", "ticklen": 3,
                    "tickangle": 0, "title": {"text": "layers, in the order in which they run", "standoff": 6},
                },
                "yaxis2": {**fixed, "anchor": "x2", "rangemode": "tozero", "nticks": 4, "ticklabelposition": "outside"},
            },
        )  # fmt: skip
        self.figure._config = {"displayModeBar": False}  # noqa: SLF001 - plotly's only way to set it
        self._spec: ChartSpec | None = None
        self._look: tuple[object, ...] | None = None

    def show(self, spec: ChartSpec, *, dark: bool, width_px: int = 0) -> None:
        """Draw, in one message to the browser, or in none if nothing of it changed.

        Limits and the texts above bars are the overlay's: while a limit is dragged little else moves, and plotly takes
        as long for a little as for everything.

        Args:
            spec: What.
            dark: For a dark page.
            width_px: How wide; 0 leaves it to plotly.
        """
        fig, before = self.figure, self._spec
        look = (spec.height_px, width_px, spec.ticks, len(spec.blocks), spec.unit, dark)
        bars = before is None or _bars(before) != _bars(spec)
        layers = before is None or before.blocks != spec.blocks
        self._spec = spec
        if not bars and not layers and look == self._look:
            return
        with fig.batch_update():
            # Assigning costs time even where nothing changes, and while a slider moves most of it stays.
            if before is None or [bar.label for bar in before.bars] != [bar.label for bar in spec.bars]:
                self._draw_devices(spec)
            if bars:
                self._draw_bars(spec)
            if layers:
                self._draw_layers(spec)
            if look != self._look:
                self._lay_out(spec, dark=dark, width_px=width_px)
        self._look = look
        # batch_update tells the browser, but a page that is reloaded later reads these two, and would find the figure
        # as it was made. They are set behind the traits' backs: the open page has drawn it all already.
        fig._trait_values["_widget_data"] = deepcopy(fig._data)  # noqa: SLF001 - there is no public way; a test guards it
        fig._trait_values["_widget_layout"] = deepcopy(fig._layout_obj._props)  # noqa: SLF001 - likewise

    def _draw_devices(self, spec: ChartSpec) -> None:
        """Which rows there are, and what they are filled with."""
        rows = list(range(len(spec.bars)))
        for (kind, shape), trace in zip(KINDS, self.figure.data, strict=False):
            # In a hatched bar the first colour is the lines'.
            faded = [_faded(bar.colour, alpha(kind)) for bar in spec.bars]
            trace.y = rows
            trace.marker.color = [bar.colour for bar in spec.bars] if shape else faded
            trace.marker.pattern.bgcolor = faded
            # A list: plotly.js takes a lone "/" for an empty regular expression.
            trace.marker.pattern.shape = [shape] * len(rows)

    def _draw_bars(self, spec: ChartSpec) -> None:
        """How far everything reaches, as a share of each row's whole width."""
        left = [0.0] * len(spec.bars)
        for index, (kind, _) in enumerate(KINDS):
            trace = self.figure.data[index]
            shares = [bar.part_bytes[index] / bar.width_bytes for bar in spec.bars]
            trace.x, trace.base = shares, left
            trace.hovertext = [
                f"<b>{bar.label}</b> {kind}: {both(bar.part_bytes[index])}"
                + (f", for {bar.kept_for}" if kind == "kept back" else "")
                for bar in spec.bars
            ]
            left = [a + b for a, b in zip(left, shares, strict=True)]

    def _draw_layers(self, spec: ChartSpec) -> None:
        layers, pinned, *kinds = self.figure.data[len(KINDS) :]
        places = list(range(len(spec.blocks)))
        by_kind = any(block.kind_bytes for block in spec.blocks)
        layers.visible = not by_kind
        layers.x = places
        layers.y = [block.size_bytes / spec.unit_bytes for block in spec.blocks]
        # Plain colour strings: numbers with a colour scale take several times as long in the browser.
        layers.marker.color = [block.colour for block in spec.blocks]
        layers.marker.pattern.shape = [block.pattern for block in spec.blocks]
        before = [block.pinned_bytes for block in spec.blocks]
        if any(size is not None for size in before):
            pinned.x, pinned.y = places, [(size or 0) / spec.unit_bytes for size in before]
            pinned.marker.color = ["rgba(0,0,0,0)"] * len(places)  # a lone one gives way to plotly's own colours
            pinned.visible = True
        elif pinned.visible:
            pinned.visible = False
        base = [0.0] * len(places)
        for index, trace in enumerate(kinds):
            if by_kind:
                heights = [block.kind_bytes[index] / spec.unit_bytes for block in spec.blocks]
                trace.x, trace.y, trace.base, trace.visible = places, heights, base, any(heights)
                trace.marker.pattern.shape = [list(MODULE_KINDS.values())[index][1]] * len(places)
                base = [a + b for a, b in zip(base, heights, strict=True)]
            elif trace.visible:
                trace.visible = False

    def _lay_out(self, spec: ChartSpec, *, dark: bool, width_px: int) -> None:
        layout, inner_px = self.figure.layout, spec.height_px - TOP_PX - BOTTOM_PX
        layout.height, layout.width = spec.height_px, width_px or None
        layout.yaxis.range = [len(spec.bars) - 0.5, -0.62]
        layout.yaxis.domain = [(LAYERS_PX + GAP_PX) / inner_px, 1]
        layout.yaxis2.domain = [0, LAYERS_PX / inner_px]
        layout.yaxis2.title.text = spec.unit
        layout.yaxis2.title.standoff = 4
        layout.yaxis2.title.font.size = layout.xaxis2.title.font.size = 12
        layout.xaxis2.range = [-0.6, len(spec.blocks) - 0.4]
        layout.xaxis2.tickvals = list(spec.ticks)
        layout.xaxis2.ticktext = [spec.blocks[i].tick for i in spec.ticks]
        ink, grid = ("#d9d9d9", "rgba(255,255,255,0.14)") if dark else ("#2b2b2b", "rgba(0,0,0,0.12)")
        layout.font = {"color": ink, "size": 12, "family": "system-ui, -apple-system, Segoe UI, sans-serif"}
        layout.yaxis2.gridcolor = layout.xaxis2.tickcolor = grid
        self.figure.data[len(KINDS) + 1].marker.line.color = ink
