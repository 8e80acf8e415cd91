"""What is drawn of a placement, in plain data: a bar per device, a block per layer, and what goes between devices."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from workbench.hardware import device_label, format_bytes
from workbench.precision import element_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.hardware import DeviceId
    from workbench.placement import Layer, Placement
    from workbench.skeleton import Skeleton

# Okabe and Ito's colours, which colour-blind people can tell apart, and three more for machines with many GPUs. Each
# device has a hatching as well; docs/look.md states the contrasts.
_GPU_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#8C6BD1", "#A6761D", "#44AA99")
_GPU_PATTERNS = ("", "/", "\\", "|", "+", "", "/", "\\")
_OTHER_COLOURS = {"mps": "#0072B2", "cpu": "#009E73", "disk": "#8A8D91"}
_OTHER_PATTERNS = {"mps": "", "cpu": ".", "disk": "-"}
_NO_ROOM_COLOUR, _NO_ROOM_PATTERN = "#D55E00", "x"
NO_ROOM = "no room"

# What fills a bar, in the order in which it is stacked, and the hatching that tells it apart without colour.
KINDS = (
    ("weights", ""),
    ("KV cache", "/"),
    ("activations (est.)", "x"),
    ("room to fetch layers", "."),
    ("free", ""),
    ("kept back", "-"),
)
FREE = [kind for kind, _ in KINDS].index("free")
_FREE_ALPHA, _PART_ALPHA = 0.16, 0.4

# What a layer is made of, in the order in which it is stacked: colour and hatching (after Tol's muted colours).
MODULE_KINDS = {
    "embedding": ("#DDCC77", ""),
    "attention": ("#88CCEE", "/"),
    "MLP": ("#CC6677", ""),
    "experts": ("#AA4499", "\\"),
    "norm": ("#8877CC", ""),
    "head": ("#228833", "-"),
    "other": ("#999999", "."),
}

BAR_PX, LAYERS_PX, TOP_PX, GAP_PX, BOTTOM_PX, LEFT_PX, RIGHT_PX = 42, 150, 4, 34, 44, 44, 18
_MOST_TICKS, _TICK_PX = 10, 48
_NARROW_PX = 520  # below that texts above bars are cut short


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One device.

    Attributes:
        label: "cuda:0", "cpu", ...
        colour: The device's own, "#rrggbb".
        part_bytes: One for each of ``KINDS``; what is unknown counts as 0 here and is said in ``text``.
        kept_for: What the last of them is for.
        limit_bytes: The budget, which bounds the weights.
        capacity_bytes: What the device has to give, which bounds everything together.
        measured_bytes: Weights that are really there, once this is loaded; else None.
        pinned_bytes: What the pinned placement takes of the device; None without one.
        text: What stands above the bar; the only markup in it is bold.
    """

    label: str
    colour: str
    part_bytes: tuple[int, ...]
    kept_for: str
    limit_bytes: int
    capacity_bytes: int
    measured_bytes: int | None
    pinned_bytes: int | None
    text: str

    @property
    def width_bytes(self) -> int:
        """What the whole width stands for: what is free on the device, or what is asked of it if that is more."""
        asked = max(self.limit_bytes, sum(self.part_bytes), 1)
        return max(asked, self.pinned_bytes or 0, self.measured_bytes or 0)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer.

    Attributes:
        name: Its module's name.
        tick: How the axis names it.
        device_label: Where it is, or "no room".
        colour: That device's.
        pattern: That device's hatching.
        size_bytes: Its bytes in the chosen precision.
        kind_bytes: The same for each of ``MODULE_KINDS``; empty unless it was asked for.
        pinned_bytes: Its bytes in the pinned placement; None without one.
        tied_to: The layer whose tensor it shares; empty if it shares none.
        whole: Whether its class must stay on one device.
        hover: All about it.
    """

    name: str
    tick: str
    device_label: str
    colour: str
    pattern: str
    size_bytes: int
    kind_bytes: tuple[int, ...]
    pinned_bytes: int | None
    tied_to: str
    whole: bool
    hover: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Layers in a row that are kept on one device.

    Attributes:
        first: Index of the first one.
        last: Index of the last one.
        device_label: Where they are.
        colour: That device's.
        fetched_bytes: Weights that are brought to where they run for every token; 0 if they run where they are kept.
        text: The same in words.
    """

    first: int
    last: int
    device_label: str
    colour: str
    fetched_bytes: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A place where the hidden state goes on to another device.

    Attributes:
        after: Index of the layer that it comes from.
        token_bytes: How much that is for each token of one sequence; None if the model does not say its width.
        text: The same in words.
    """

    after: int
    token_bytes: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """All that is drawn, in plain data.

    Attributes:
        bars: A bar for each device of the budget.
        blocks: A block for each layer, in execution order.
        runs: The same layers, taken together where they share a device.
        crossings: Where data goes from one device to another between layers.
        ticks: Which blocks are named below the axis.
        unit: "GiB" or "MiB", for the heights of the blocks.
        unit_bytes: What one of it is.
    """

    bars: tuple[Bar, ...]
    blocks: tuple[Block, ...]
    runs: tuple[Run, ...]
    crossings: tuple[Crossing, ...]
    ticks: tuple[int, ...]
    unit: str
    unit_bytes: int

    @property
    def height_px(self) -> int:
        """It depends on the number of devices alone, so that nothing jumps while a slider moves."""
        return chart_height(len(self.bars))


def chart_height(device_count: int) -> int:
    """How many pixels the picture of a machine is high."""
    return TOP_PX + device_count * BAR_PX + GAP_PX + LAYERS_PX + BOTTOM_PX


def device_colour(device: DeviceId | None) -> str:
    """A device's own colour as "#rrggbb"; None stands for no room anywhere."""
    if device is None:
        return _NO_ROOM_COLOUR
    return _GPU_COLOURS[device % len(_GPU_COLOURS)] if isinstance(device, int) else _OTHER_COLOURS[device]


def device_pattern(device: DeviceId | None) -> str:
    """A device's own hatching, as plotly names it."""
    if device is None:
        return _NO_ROOM_PATTERN
    return _GPU_PATTERNS[device % len(_GPU_PATTERNS)] if isinstance(device, int) else _OTHER_PATTERNS[device]


def chart_spec(
    placement: Placement,
    *,
    width_px: int = 0,
    skeleton: Skeleton | None = None,
    kinds: Mapping[str, Mapping[str, int]] | None = None,
    pinned: Placement | None = None,
    measured: Mapping[DeviceId, int] | None = None,
) -> ChartSpec:
    """Work out what is drawn for a placement.

    Args:
        placement: What is to be seen.
        width_px: How much room there is, for as many names below the axis; 0 if that is unknown.
        skeleton: Its model, for ties, blocks that stay whole, and what goes between devices.
        kinds: Layer name to the bytes of each of ``MODULE_KINDS`` in it, to show what layers are made of.
        pinned: Another placement to stand behind this one.
        measured: Device to weight bytes that were found there after a load of this very placement.
    """
    highest = max((layer.bytes_after for layer in placement.layers), default=0)
    unit, unit_bytes = ("GiB", 2**30) if highest >= 0.1 * 2**30 else ("MiB", 2**20)
    ties = _ties(skeleton)
    whole = frozenset() if skeleton is None else skeleton.no_split_classes
    before = {} if pinned is None else {layer.name: layer for layer in pinned.layers}
    blocks = tuple(
        Block(
            name=layer.name,
            tick=_short(layer.name),
            device_label=_label(layer.device),
            colour=device_colour(layer.device),
            pattern=device_pattern(layer.device),
            size_bytes=layer.bytes_after,
            kind_bytes=() if kinds is None else _kind_bytes(layer, kinds.get(layer.name, {})),
            pinned_bytes=before[layer.name].bytes_after if layer.name in before else None,
            tied_to=ties.get(layer.name, ""),
            whole=layer.class_name in whole,
            hover=_layer_hover(
                layer, ties.get(layer.name, ""), before.get(layer.name), whole=layer.class_name in whole
            ),
        )
        for layer in placement.layers
    )
    return ChartSpec(
        bars=tuple(
            _bar(placement, device, pinned, measured, brief=0 < width_px < _NARROW_PX) for device in placement.memory
        ),
        blocks=blocks,
        runs=_runs(placement),
        crossings=_crossings(placement, skeleton),
        ticks=_ticks([block.tick for block in blocks], width_px or 700),
        unit=unit,
        unit_bytes=unit_bytes,
    )


def _bar(
    placement: Placement,
    device: DeviceId,
    pinned: Placement | None,
    measured: Mapping[DeviceId, int] | None,
    *,
    brief: bool,
) -> Bar:
    memory = placement.memory[device]
    known = (memory.weight_bytes, memory.kv_cache_bytes or 0, memory.activation_bytes or 0, memory.reserved_bytes)
    text = f"<b>{device_label(device)}</b> {format_bytes(memory.used_bytes)} of {format_bytes(memory.capacity_bytes)}"
    if memory.limit_bytes != memory.capacity_bytes:
        text += f" · limit {'' if brief else 'for weights '}{format_bytes(memory.limit_bytes)}"
    if memory.kv_cache_bytes is None and not brief:
        text += " · KV cache still to be measured"
    found = None if measured is None else measured.get(device, 0)
    if found is not None and (found or memory.weight_bytes):
        off = found - memory.weight_bytes
        told = f"{off:+,} bytes" if off else "as foretold"
        text += f" · {told}" if brief else f" · weights measured {format_bytes(found)} ({told})"
    before = None if pinned is None else pinned.memory.get(device)
    whole = placement.machine.device(device)
    return Bar(
        label=device_label(device),
        colour=device_colour(device),
        part_bytes=(*known, max(0, memory.free_bytes), min(whole.reserved_bytes, whole.free_bytes)),
        kept_for=whole.reserved_for,
        limit_bytes=memory.limit_bytes,
        capacity_bytes=memory.capacity_bytes,
        measured_bytes=found,
        pinned_bytes=None if pinned is None else (before.used_bytes if before else 0),
        text=text,
    )


def _label(device: DeviceId | None) -> str:
    return NO_ROOM if device is None else device_label(device)


def _ties(skeleton: Skeleton | None) -> dict[str, str]:
    """Layer name to the name of the layer that it shares a tensor with, both ways."""
    ties: dict[str, str] = {}
    if skeleton is None:
        return ties
    for copy, original in skeleton.tied.items():
        ends = [
            next((b.name for b in skeleton.blocks if name.startswith(f"{b.name}.")), "") for name in (copy, original)
        ]
        if all(ends) and ends[0] != ends[1]:
            ties.setdefault(ends[0], ends[1])
            ties.setdefault(ends[1], ends[0])
    return ties


def _kind_bytes(layer: Layer, kinds: Mapping[str, int]) -> tuple[int, ...]:
    """What a layer is made of, adding up to its bytes: what cannot be told (a layer left unquantized) is shared out."""
    known = sum(kinds.values())
    if not known:
        return tuple(layer.bytes_after if kind == "other" else 0 for kind in MODULE_KINDS)
    sizes = [round(kinds.get(kind, 0) * layer.bytes_after / known) for kind in MODULE_KINDS]
    largest = sizes.index(max(sizes))
    sizes[largest] += layer.bytes_after - sum(sizes)
    return tuple(sizes)


def _runs(placement: Placement) -> tuple[Run, ...]:
    waiting = {layer.name for layer in placement.waiting}
    runs_on, runs, first = placement.runs_on, [], 0
    for device, group in itertools.groupby(placement.layers, key=lambda layer: layer.device):
        layers = list(group)
        size = sum(layer.bytes_after for layer in layers)
        fetched = size if layers[0].name in waiting else 0
        span = layers[0].name if len(layers) == 1 else f"{layers[0].name} to {layers[-1].name}"
        text = f"{span}: {both(size)} on {_label(device)}"
        if fetched:
            text += f", brought to {_label(runs_on[layers[0].name])} for every token"
        run = Run(
            first=first,
            last=first + len(layers) - 1,
            device_label=_label(device),
            colour=device_colour(device),
            fetched_bytes=fetched,
            text=text,
        )
        runs.append(run)
        first += len(layers)
    return tuple(runs)


def _crossings(placement: Placement, skeleton: Skeleton | None) -> tuple[Crossing, ...]:
    width = None
    if skeleton is not None:
        text_config = skeleton.config.get_text_config(decoder=True)
        width = getattr(text_config, "hidden_size", None) or getattr(text_config, "n_embd", None)
    size = width and width * element_bytes(placement.dtype)
    index = {layer.name: i for i, layer in enumerate(placement.layers)}
    found = []
    for (before, a), (_, b) in itertools.pairwise(placement.runs_on.items()):
        if a != b:
            amount = "" if size is None else f"{both(size)} a token "
            text = f"hidden state: {amount}from {device_label(a)} to {device_label(b)} after {before}"
            found.append(Crossing(after=index[before], token_bytes=size, text=text))
    return tuple(found)


def _layer_hover(layer: Layer, tied_to: str, pinned: Layer | None, *, whole: bool) -> str:
    where = "no device that was offered has room" if layer.device is None else f"on {device_label(layer.device)}"
    lines = [
        f"<b>{escape(layer.name)}</b> ({escape(layer.class_name)})",
        where,
        f"{both(layer.bytes_after)}{', quantized' if layer.quantized else ''}",
    ]
    if layer.bytes_before != layer.bytes_after:
        lines.append(f"before: {both(layer.bytes_before)}")
    if tied_to:
        lines.append(f"tied to {escape(tied_to)}: one tensor, so they move together")
    if whole:
        lines.append("stays whole on one device")
    if pinned is not None and (pinned.device, pinned.bytes_after) != (layer.device, layer.bytes_after):
        lines.append(f"pinned: {both(pinned.bytes_after)} on {_label(pinned.device)}")
    return "<br>".join(lines)


def both(size_bytes: int) -> str:
    """A size for people, and exactly."""
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
    apart = max(1, math.ceil(count * _TICK_PX / width_px))  # blocks that a name takes
    chosen = [0] if count else []
    if count > 1:
        chosen.append(count - 1)
    for i in numbered:
        if int(names[i]) % step == 0 and all(abs(i - other) >= apart for other in chosen):
            chosen.append(i)
    return tuple(sorted(chosen))


def spec_as_html(spec: ChartSpec) -> str:
    """The same picture without plotly: what is shown until plotly is there, and instead of it where it cannot be."""
    across = f"left:{LEFT_PX}px;right:{RIGHT_PX}px"
    bar_px = bar_height_px(len(spec.bars))
    rows = []
    for row, bar in enumerate(spec.bars):
        top = bar_top_px(row, len(spec.bars))
        parts = "".join(
            f'<span title="{escape(kind)}: {size:,} bytes" style="width:{100 * size / bar.width_bytes:.2f}%;'
            f'background:{bar.colour};opacity:{alpha(kind)}"></span>'
            for (kind, _), size in zip(KINDS, bar.part_bytes, strict=True)
        )
        rows.append(
            f'<div class="wb-plain-text" style="top:{top - 18:.1f}px;{across}">{bar.text}</div>'
            f'<div class="wb-plain-bar" style="top:{top:.1f}px;height:{bar_px:.1f}px;{across}">{parts}</div>'
        )
    highest = max((block.size_bytes for block in spec.blocks), default=1) or 1
    blocks = "".join(
        f'<span title="{escape(b.name)} on {escape(b.device_label)}: {b.size_bytes:,} bytes" '
        f'style="height:{max(2, 100 * b.size_bytes / highest):.0f}%;background:{b.colour}"></span>'
        for b in spec.blocks
    )
    top = layers_top_px(len(spec.bars))
    return (
        f'<div class="wb-plain-picture" style="height:{spec.height_px}px">{"".join(rows)}'
        f'<div class="wb-plain-layers" style="top:{top}px;height:{LAYERS_PX}px;{across}">{blocks}</div></div>'
    )


def bar_height_px(rows: int) -> float:
    """How thick a device's bar is."""
    return 0.42 * rows * BAR_PX / (rows + 0.12)


def bar_top_px(row: int, rows: int) -> float:
    """Where a device's bar begins, from the top of the figure."""
    return TOP_PX + (row + 0.62 - 0.21) * rows * BAR_PX / (rows + 0.12)


def layers_top_px(rows: int) -> int:
    """Where the layers' part begins, from the top of the figure."""
    return TOP_PX + rows * BAR_PX + GAP_PX


def alpha(kind: str) -> float:
    """How opaque a part of a bar is."""
    return {"weights": 1.0, "free": _FREE_ALPHA, "kept back": _FREE_ALPHA}.get(kind, _PART_ALPHA)


def overlay(spec: ChartSpec, steps_gib: Mapping[str, tuple[float, float]]) -> dict[str, object]:
    """What the transparent layer over the figure needs, which takes the mouse and the keyboard.

    Places along the axes are shares of the plot's width and pixels from its top, so that no width has to be known.

    Args:
        spec: What is drawn.
        steps_gib: For each device label the largest limit and the step in which it moves, both in GiB.
    """
    rows, count = len(spec.bars), len(spec.blocks)
    return {
        "left": LEFT_PX,
        "right": RIGHT_PX,
        "layers_top": layers_top_px(rows),
        "layers_height": LAYERS_PX,
        "bar_height": bar_height_px(rows),
        "texts": [bar.text for bar in spec.bars],
        "bars": [
            {
                "label": bar.label,
                "colour": bar.colour,
                "top": bar_top_px(row, rows),
                "width_bytes": bar.width_bytes,
                "limit_bytes": bar.limit_bytes,
                "weights": bar.part_bytes[0] / bar.width_bytes,
                "most_gib": steps_gib[bar.label][0],
                "step_gib": steps_gib[bar.label][1],
                "pinned": None if bar.pinned_bytes is None else bar.pinned_bytes / bar.width_bytes,
                "measured": None if bar.measured_bytes is None else bar.measured_bytes / bar.width_bytes,
                "free": format_bytes(bar.part_bytes[FREE]),
            }
            for row, bar in enumerate(spec.bars)
        ],
        "names": [block.name for block in spec.blocks],
        "homes": [block.device_label for block in spec.blocks],
        "sizes": [format_bytes(block.size_bytes) for block in spec.blocks],
        "tips": [block.hover for block in spec.blocks],
        "tied": [i for i, block in enumerate(spec.blocks) if block.tied_to],
        "whole": [i for i, block in enumerate(spec.blocks) if block.whole],
        "count": count,
        "runs": [
            [
                run.first,
                run.last,
                run.device_label,
                run.colour,
                run.fetched_bytes and format_bytes(run.fetched_bytes),
                run.text,
            ]
            for run in spec.runs
        ],
        "crossings": [
            [c.after, "" if c.token_bytes is None else format_bytes(c.token_bytes), c.text] for c in spec.crossings
        ],
    }
