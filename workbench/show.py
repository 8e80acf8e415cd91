"""A placement for people and for programs: a table of plain text, static HTML, plain data.

The three say the same: they are written from the same rows. The HTML has neither scripts nor links, takes its text
colour from what is around it, and as a page of its own follows the browser's light or dark.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from html import escape
from typing import TYPE_CHECKING, Any

from workbench.hardware import device_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from workbench.hardware import DeviceId
    from workbench.placement import DeviceMemory, Layer, Placement
    from workbench.speed import Speed

WORDS = {"fits": "fits", "offloads": "offloads", "does_not_fit": "does not fit"}
_VERSION = 1
_GIB = 2**30
_HEAD = ("GiB", "weights", "KV cache", "activations", "reserve", "free", "limit")
_LEGEND = (
    "Activations are an estimate. reserve: room to bring the largest offloaded layer here.",
    "free: what is left of what the device has to give. limit: max_memory, which bounds the weights.",
)
# Colours that the colour-blind can tell apart, on white as on black; in the order of the table's columns.
_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#8A8D91")
_VERDICT_MARKS = {"fits": ("✓", "#009E73"), "offloads": ("⇅", "#E69F00"), "does_not_fit": ("✗", "#D55E00")}


def as_text(placement: Placement, *, speed: Speed | None = None) -> str:
    """A placement as plain text, some eighty columns wide where the sentences are short.

    Args:
        placement: Which.
        speed: The estimate to show with it; None shows none.

    Returns:
        Lines without a final newline: what was planned, the verdict, memory for each device in GiB, which layers are
        where, and what to do about it.
    """
    blocks = [
        [_title(placement), placement.summary, *_speed_line(speed)],
        [*table(_HEAD, _memory_rows(placement)).splitlines(), *_LEGEND],
        table(("layers", ""), _layer_rows(placement), left=2).splitlines(),
    ]
    if placement.advice:
        blocks.append(["advice", *(f"- {sentence}" for sentence in placement.advice)])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def as_html(placement: Placement, *, speed: Speed | None = None) -> str:
    """A placement as a piece of HTML, for a notebook or to be put into a page.

    Args:
        placement: Which.
        speed: The estimate to show with it; None shows none.
    """
    mark, colour = _VERDICT_MARKS[placement.verdict]
    head = [f"<th>{_HEAD[0]}</th>"]
    for index, name in enumerate(_HEAD[1:]):
        swatch = f'<i style="background:{_COLOURS[index]}"></i>' if index < len(_COLOURS) else ""
        head.append(f'<th scope="col">{swatch}{name}</th>')
    bars = [_bar(device, memory) for device, memory in placement.memory.items()]
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{"</td><td>".join((*map(escape, cells), bar))}</td></tr>'
        for (name, *cells), bar in zip(_memory_rows(placement), [*bars, ""], strict=True)
    ]
    layers = (
        f'<tr><th scope="row">{escape(where)}</th><td>{escape(names)}</td></tr>'
        for where, names in _layer_rows(placement)
    )
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in placement.advice or ())
    return "\n".join(
        (
            f'<div class="wb-placement">{_STYLE}',
            f"<p><b>{escape(_title(placement))}</b></p>",
            f'<p class="wb-verdict" style="border-color:{colour}">{mark} {escape(placement.summary)}</p>',
            *(f"<p>{escape(line)}</p>" for line in _speed_line(speed)),
            f'<table class="wb-memory"><thead><tr>{"".join(head)}<th></th></tr></thead><tbody>',
            *rows,
            f"</tbody></table><p><small>{' '.join(_LEGEND)}</small></p>",
            '<table class="wb-layers"><tbody>',
            *layers,
            "</tbody></table>",
            *((f"<ul>{advice}</ul>",) if advice else ()),
            "</div>",
        )
    )


def as_page(placement: Placement, *, speed: Speed | None = None) -> str:
    """The same as :func:`as_html`, as a page of its own that needs nothing else."""
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(_title(placement))}</title>",
            "<style>:root { color-scheme: light dark; } body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem;",
            "font: 15px/1.5 system-ui, sans-serif; color: CanvasText; background: Canvas; }</style>",
            f"</head><body><main>{as_html(placement, speed=speed)}</main></body></html>\n",
        )
    )


def as_data(placement: Placement, *, speed: Speed | None = None) -> dict[str, Any]:
    """A placement as plain data that JSON can hold; every size is in bytes and named so.

    Args:
        placement: Which.
        speed: The estimate to put in; None leaves ``tokens_per_second`` None.
    """
    return {
        "workbench_placement": _VERSION,
        "machine": placement.machine.name,
        "verdict": placement.verdict,
        "summary": placement.summary,
        "advice": None if placement.advice is None else [str(sentence) for sentence in placement.advice],
        "precision": placement.precision.label,
        "dtype": placement.dtype,
        "total_bytes": placement.total_bytes,
        "kv_cache_bytes": placement.kv_cache_bytes,
        "tokens_per_second": None if speed is None else speed.tokens_per_second,
        "memory": {
            str(device): {**dataclasses.asdict(memory), "free_bytes": memory.free_bytes}
            for device, memory in placement.memory.items()
        },
        "device_map": dict(placement.device_map),
        "unplaced": list(placement.unplaced),
        "layers": [dataclasses.asdict(layer) for layer in placement.layers],
        "recipe": json.loads(placement.recipe.to_json()),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Columns of plain text, numbers to the right.

    Args:
        head: What stands over each column.
        rows: As many cells each.
        left: So many columns, the first ones, are set to the left.

    Returns:
        Lines without trailing spaces or a final newline.
    """
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def rate(speed: Speed | None) -> str:
    """Tokens per second with two digits that mean something; "?" where there is no estimate."""
    if speed is None:
        return "?"
    per_second = speed.tokens_per_second
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.2g}"


def duration(seconds: float) -> str:
    """A time to wait, as coarse as an estimate of it is: "0.4 s", "12 s", "4 min"."""
    if seconds >= 100:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1g} s"


def layer_ranges(layers: Iterable[Layer]) -> str:
    """Name layers in execution order, numbered ones as ranges: ``"model.embed_tokens, model.layers.0-15"``."""
    runs: list[list[str]] = []
    for layer in layers:
        prefix, _, number = layer.name.rpartition(".")
        if runs and number.isdecimal() and runs[-1][-1] == f"{prefix}.{int(number) - 1}":
            runs[-1].append(layer.name)
        else:
            runs.append([layer.name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs)


def _title(placement: Placement) -> str:
    recipe, label = placement.recipe, placement.precision.label
    precision = label if label == placement.dtype else f"{label} ({placement.dtype})"
    workload = f"context {recipe.workload.context_length:,}, batch {recipe.workload.batch_size:,}"
    return f"{recipe.model}: {precision}, {workload}, {recipe.strategy}, on {placement.machine.name}"


def _speed_line(speed: Speed | None) -> list[str]:
    if speed is None:
        return []
    grounds = "measurements of this machine" if speed.calibrated else "data sheets and a typical machine"
    return [f"Decodes about {rate(speed)} tok/s, one sequence at a short context (estimate from {grounds})."]


def _gib(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "?"
    shown = f"{size_bytes / _GIB:,.2f}"
    # What is there, however little, must not read like nothing.
    return "<0.01" if size_bytes > 0 and shown == "0.00" else shown.replace("-0.00", "0.00")


def _parts(memory: DeviceMemory) -> tuple[int | None, ...]:
    return memory.weight_bytes, memory.kv_cache_bytes, memory.activation_bytes, memory.reserved_bytes


def _memory_rows(placement: Placement) -> list[tuple[str, ...]]:
    rows = [
        (device_label(device), *map(_gib, (*_parts(memory), memory.free_bytes, memory.limit_bytes)))
        for device, memory in placement.memory.items()
    ]
    return [*rows, ("model", _gib(placement.total_bytes), _gib(placement.kv_cache_bytes), "", "", "", "")]


def _layer_rows(placement: Placement) -> list[tuple[str, str]]:
    """Where, and which layers, in the order of the devices; what has no room comes last."""
    waiting = {layer.name for layer in placement.waiting}
    runs_on = placement.runs_on

    def where(layer: Layer) -> str:
        if layer.device is None:
            return "no room"
        fetched = f", fetched to run on {device_label(runs_on[layer.name])}" if layer.name in waiting else ""
        return device_label(layer.device) + fetched

    devices: list[DeviceId | None] = [*placement.memory, None]
    ordered = sorted(placement.layers, key=lambda layer: devices.index(layer.device))
    return [(place, layer_ranges(layers)) for place, layers in itertools.groupby(ordered, key=where)]


def _bar(device: DeviceId, memory: DeviceMemory) -> str:
    whole_bytes = max(memory.capacity_bytes, memory.used_bytes, 1)
    pieces = "".join(
        f'<i style="background:{colour};width:{100 * (size_bytes or 0) / whole_bytes:.2f}%"></i>'
        for colour, size_bytes in zip(_COLOURS, _parts(memory), strict=True)
    )
    says = f"{device_label(device)}: {_gib(memory.used_bytes)} of {_gib(memory.capacity_bytes)} GiB used"
    return f'<span class="wb-bar" role="img" aria-label="{says}" title="{says}">{pieces}</span>'


_STYLE = """<style>
.wb-placement { overflow-x: auto; font-variant-numeric: tabular-nums; }
.wb-placement p { margin: .4em 0; }
.wb-placement .wb-verdict { border-left: 4px solid; padding-left: .6em; }
.wb-placement table { border-collapse: collapse; margin: .6em 0; }
.wb-placement :is(th, td) {
  padding: .2em .8em .2em 0; border-bottom: 1px solid rgba(127, 127, 127, .35); vertical-align: top;
}
.wb-placement .wb-memory :is(th, td) { text-align: right; white-space: nowrap; }
.wb-placement .wb-memory :is(th, td):first-child, .wb-placement .wb-layers :is(th, td) { text-align: left; }
.wb-placement .wb-layers th { white-space: nowrap; }
.wb-placement th i { display: inline-block; width: .7em; height: .7em; margin-right: .3em; }
.wb-placement .wb-bar {
  display: flex; width: 14em; height: 1em; margin-top: .2em; border: 1px solid rgba(127, 127, 127, .6);
}
.wb-placement .wb-bar i { display: block; height: 100%; }
</style>"""
