"""The picture of a placement: a bar per device and a block per layer. Nothing else imports plotly."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from workbench.hardware import device_label, format_bytes

if TYPE_CHECKING:
    from workbench.hardware import DeviceId
    from workbench.placement import Layer, Placement

# Okabe and Ito's colours, which colour-blind people can tell apart, and three more for machines with many GPUs.
_GPU_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#8C6BD1", "#A6761D", "#44AA99")
_OTHER_COLOURS = {"mps": "#0072B2", "cpu": "#009E73", "disk": "#8A8D91"}
_NO_ROOM_COLOUR = "#D55E00"
_NO_ROOM = "no room"

# What fills a bar, in the order in which it is stacked, and the hatching that tells it apart without colour.
KINDS = (("weights", ""), ("KV cache", "/"), ("activations (est.)", "x"), ("reserved", "."), ("free", ""))
_FREE_ALPHA, _PART_ALPHA = 0.16, 0.4

_BAR_PX, _LAYERS_PX, _TOP_PX, _GAP_PX, _BOTTOM_PX = 42, 150, 4, 22, 44
_MOST_TICKS, _TICK_PX = 10, 48


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One device.

    Attributes:
        label: "cuda:0", "cpu", ...
        colour: The device's own, "#rrggbb".
        part_bytes: One for each of ``KINDS``; what is unknown counts as 0 here and is said in ``text``.
        limit_bytes: The budget, which bounds the weights.
        capacity_bytes: What the device has to give, which bounds everything together.
        text: What stands above the bar; the only markup in it is bold.
    """

    label: str
    colour: str
    part_bytes: tuple[int, ...]
    limit_bytes: int
    capacity_bytes: int
    text: str

    @property
    def width_bytes(self) -> int:
        """What the whole width stands for: what the device has, or what is asked of it if that is more."""
        return max(self.capacity_bytes, self.limit_bytes, sum(self.part_bytes), 1)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer.

    Attributes:
        name: Its module's name.
        tick: How the axis names it.
        device_label: Where it is, or "no room".
        colour: That device's.
        size_bytes: Its bytes in the chosen precision.
        hover: All about it.
    """

    name: str
    tick: str
    device_label: str
    colour: str
    size_bytes: int
    hover: str


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """All that is drawn, in plain data.

    Attributes:
        bars: A bar for each device of the budget.
        blocks: A block for each layer, in execution order.
        ticks: Which blocks are named below the axis.
        unit: "GiB" or "MiB", for the heights of the blocks.
        unit_bytes: What one of it is.
    """

    bars: tuple[Bar, ...]
    blocks: tuple[Block, ...]
    ticks: tuple[int, ...]
    unit: str
    unit_bytes: int

    @property
    def height_px(self) -> int:
        """It depends on the number of devices alone, so that nothing jumps while a slider moves."""
        return chart_height(len(self.bars))


def chart_height(device_count: int) -> int:
    """How many pixels the picture of a machine is high."""
    return _TOP_PX + device_count * _BAR_PX + _GAP_PX + _LAYERS_PX + _BOTTOM_PX


def device_colour(device: DeviceId | None) -> str:
    """A device's own colour as "#rrggbb"; None stands for no room anywhere."""
    if device is None:
        return _NO_ROOM_COLOUR
    return _GPU_COLOURS[device % len(_GPU_COLOURS)] if isinstance(device, int) else _OTHER_COLOURS[device]


def chart_spec(placement: Placement, *, width_px: int = 0) -> ChartSpec:
    """Work out what is drawn for a placement.

    Args:
        placement: What is to be seen.
        width_px: How much room there is, for as many names below the axis; 0 if that is unknown.
    """
    bars = []
    for device, memory in placement.memory.items():
        known = (memory.weight_bytes, memory.kv_cache_bytes or 0, memory.activation_bytes or 0, memory.reserved_bytes)
        text = (
            f"<b>{device_label(device)}</b> {format_bytes(memory.used_bytes)} of {format_bytes(memory.capacity_bytes)}"
        )
        if memory.limit_bytes != memory.capacity_bytes:
            text += f" · limit for weights {format_bytes(memory.limit_bytes)}"
        if memory.kv_cache_bytes is None:
            text += " · KV cache still to be measured"
        bars.append(
            Bar(
                label=device_label(device),
                colour=device_colour(device),
                part_bytes=(*known, max(0, memory.free_bytes)),
                limit_bytes=memory.limit_bytes,
                capacity_bytes=memory.capacity_bytes,
                text=text,
            )
        )
    highest = max((layer.bytes_after for layer in placement.layers), default=0)
    unit, unit_bytes = ("GiB", 2**30) if highest >= 0.1 * 2**30 else ("MiB", 2**20)
    blocks = tuple(
        Block(
            name=layer.name,
            tick=_short(layer.name),
            device_label=_NO_ROOM if layer.device is None else device_label(layer.device),
            colour=device_colour(layer.device),
            size_bytes=layer.bytes_after,
            hover=_layer_hover(layer),
        )
        for layer in placement.layers
    )
    ticks = _ticks([block.tick for block in blocks], width_px or 700)
    return ChartSpec(bars=tuple(bars), blocks=blocks, ticks=ticks, unit=unit, unit_bytes=unit_bytes)


def _layer_hover(layer: Layer) -> str:
    where = "no device that was offered has room" if layer.device is None else f"on {device_label(layer.device)}"
    lines = [
        f"<b>{escape(layer.name)}</b> ({escape(layer.class_name)})",
        where,
        f"{_both(layer.bytes_after)}{', quantized' if layer.quantized else ''}",
    ]
    if layer.bytes_before != layer.bytes_after:
        lines.append(f"before: {_both(layer.bytes_before)}")
    return "<br>".join(lines)


def _both(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes:,} bytes)"


def _short(name: str) -> str:
    """A module's name for the axis: a layer's number, or what the last part of the name begins with."""
    last = name.rpartition(".")[2]
    if last.isdecimal():
        return last
    for short in ("embed", "norm", "head"):
        if short in last:
            return short
    return {"wte": "embed", "wpe": "position", "ln_f": "norm"}.get(last, last[:8])


def _ticks(names: list[str], width_px: int) -> tuple[int, ...]:
    """Which blocks to name: the ends, and layers at round numbers with room between them."""
    count = len(names)
    numbered = [i for i, name in enumerate(names) if name.isdecimal()]
    most = max(1, min(_MOST_TICKS, width_px // _TICK_PX))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(numbered) / s <= most)
    apart = max(1, count * _TICK_PX // width_px)  # blocks that a name takes
    chosen = [0] if count else []
    if count > 1:
        chosen.append(count - 1)
    for i in numbered:
        if int(names[i]) % step == 0 and all(abs(i - other) >= apart for other in chosen):
            chosen.append(i)
    return tuple(sorted(chosen))


def spec_as_html(spec: ChartSpec) -> str:
    """The same picture without plotly: what is shown until plotly is there, and instead of it where it cannot be."""
    rows = []
    for bar in spec.bars:
        parts = "".join(
            f'<span title="{escape(kind)}: {size:,} bytes" style="width:{100 * size / bar.width_bytes:.2f}%;'
            f'background:{bar.colour};opacity:{_alpha(kind)}"></span>'
            for (kind, _), size in zip(KINDS, bar.part_bytes, strict=True)
        )
        rows.append(f'<div class="wb-plain-text">{bar.text}</div><div class="wb-plain-bar">{parts}</div>')
    highest = max((block.size_bytes for block in spec.blocks), default=1) or 1
    blocks = "".join(
        f'<span title="{escape(b.name)} on {escape(b.device_label)}: {b.size_bytes:,} bytes" '
        f'style="height:{max(2, 100 * b.size_bytes / highest):.0f}%;background:{b.colour}"></span>'
        for b in spec.blocks
    )
    return f'{"".join(rows)}<div class="wb-plain-layers" style="height:{_LAYERS_PX}px">{blocks}</div>'


def _alpha(kind: str) -> float:
    return {"weights": 1.0, "free": _FREE_ALPHA}.get(kind, _PART_ALPHA)


def _faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


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
        limits = go.Scatter(
            mode="markers", name="limit", xaxis="x", yaxis="y", hoverinfo="text",
            marker={"symbol": "line-ns-open", "size": 15, "line": {"width": 2.5}}, cliponaxis=False,
        )  # fmt: skip
        texts = go.Scatter(
            mode="text", name="text", xaxis="x", yaxis="y", hoverinfo="skip", textposition="middle right",
            cliponaxis=False,
        )  # fmt: skip
        layers = go.Bar(
            name="layers", xaxis="x2", yaxis="y2", hoverinfo="text", hoverlabel={"align": "left"},
            marker={"line": {"width": 0}},
        )  # fmt: skip
        fixed = {"fixedrange": True, "zeroline": False}
        self.figure = go.FigureWidget(
            data=[*bars, limits, texts, layers],
            layout={
                "template": "none", "barmode": "overlay", "bargap": 0.12, "showlegend": False, "dragmode": False,
                "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "autosize": True,
                "margin": {"t": _TOP_PX, "b": _BOTTOM_PX, "l": 44, "r": 18, "pad": 0},
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
        """Draw, in one message to the browser.

        Args:
            spec: What.
            dark: For a dark page.
            width_px: How wide; 0 leaves it to plotly.
        """
        fig, before = self.figure, self._spec
        look = (spec.height_px, width_px, spec.ticks, len(spec.blocks), spec.unit, dark)
        if (spec, look) == (before, self._look):
            return
        with fig.batch_update():
            # Assigning costs time even where nothing changes, and while a slider moves most of it stays.
            if before is None or [bar.label for bar in before.bars] != [bar.label for bar in spec.bars]:
                self._draw_devices(spec)
            self._draw_bars(spec)
            if before is None or before.blocks != spec.blocks:
                self._draw_layers(spec)
            if look != self._look:
                self._lay_out(spec, dark=dark, width_px=width_px)
        self._spec, self._look = spec, look
        # batch_update tells the browser, but a page that is reloaded later reads these two, and would find the figure
        # as it was made. They are set behind the traits' backs: the open page has drawn it all already.
        fig._trait_values["_widget_data"] = deepcopy(fig._data)  # noqa: SLF001 - there is no public way; a test guards it
        fig._trait_values["_widget_layout"] = deepcopy(fig._layout_obj._props)  # noqa: SLF001 - likewise

    def _draw_devices(self, spec: ChartSpec) -> None:
        """Which rows there are, and what they are filled with."""
        rows = list(range(len(spec.bars)))
        for (kind, shape), trace in zip(KINDS, self.figure.data, strict=False):
            # In a hatched bar the first colour is the lines'.
            faded = [_faded(bar.colour, _alpha(kind)) for bar in spec.bars]
            trace.y = rows
            trace.marker.color = [bar.colour for bar in spec.bars] if shape else faded
            trace.marker.pattern.bgcolor = faded
            # A list: plotly.js takes a lone "/" for an empty regular expression.
            trace.marker.pattern.shape = [shape] * len(rows)
        limits, texts, _ = self.figure.data[len(KINDS) :]
        limits.y, texts.y, texts.x = rows, [row - 0.42 for row in rows], [0.0] * len(rows)

    def _draw_bars(self, spec: ChartSpec) -> None:
        """How far everything reaches, as a share of each row's whole width."""
        left = [0.0] * len(spec.bars)
        for index, (kind, _) in enumerate(KINDS):
            trace = self.figure.data[index]
            shares = [bar.part_bytes[index] / bar.width_bytes for bar in spec.bars]
            trace.x, trace.base = shares, left
            trace.hovertext = [f"<b>{bar.label}</b> {kind}: {_both(bar.part_bytes[index])}" for bar in spec.bars]
            left = [a + b for a, b in zip(left, shares, strict=True)]
        limits, texts, _ = self.figure.data[len(KINDS) :]
        limits.x = [bar.limit_bytes / bar.width_bytes for bar in spec.bars]
        limits.hovertext = [f"<b>{bar.label}</b> limit: {_both(bar.limit_bytes)}" for bar in spec.bars]
        texts.text = [bar.text for bar in spec.bars]

    def _draw_layers(self, spec: ChartSpec) -> None:
        layers = self.figure.data[-1]
        layers.x = list(range(len(spec.blocks)))
        layers.y = [block.size_bytes / spec.unit_bytes for block in spec.blocks]
        # Plain colour strings: numbers with a colour scale take several times as long in the browser.
        layers.marker.color = [block.colour for block in spec.blocks]
        layers.marker.pattern.shape = ["x" if block.device_label == _NO_ROOM else "" for block in spec.blocks]
        layers.hovertext = [block.hover for block in spec.blocks]

    def _lay_out(self, spec: ChartSpec, *, dark: bool, width_px: int) -> None:
        layout, inner_px = self.figure.layout, spec.height_px - _TOP_PX - _BOTTOM_PX
        layout.height, layout.width = spec.height_px, width_px or None
        layout.yaxis.range = [len(spec.bars) - 0.5, -0.62]
        layout.yaxis.domain = [(_LAYERS_PX + _GAP_PX) / inner_px, 1]
        layout.yaxis2.domain = [0, _LAYERS_PX / inner_px]
        layout.yaxis2.title.text = spec.unit
        layout.yaxis2.title.standoff = 4
        layout.yaxis2.title.font.size = layout.xaxis2.title.font.size = 12
        layout.xaxis2.range = [-0.6, len(spec.blocks) - 0.4]
        layout.xaxis2.tickvals = list(spec.ticks)
        layout.xaxis2.ticktext = [spec.blocks[i].tick for i in spec.ticks]
        ink, grid = ("#d9d9d9", "rgba(255,255,255,0.14)") if dark else ("#2b2b2b", "rgba(0,0,0,0.12)")
        layout.font = {"color": ink, "size": 12, "family": "system-ui, -apple-system, Segoe UI, sans-serif"}
        layout.yaxis2.gridcolor = layout.xaxis2.tickcolor = grid
        limits = self.figure.data[len(KINDS)]
        limits.marker.line.color = limits.marker.color = ink
