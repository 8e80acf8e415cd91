"""Why a layer is where it is, and the smallest change of a budget that would bring it to a faster device."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from workbench.hardware import DeviceId, device_label, format_bytes
from workbench.model import refuses_unknown
from workbench.placement import Placement, attempts
from workbench.precision import FourBit, Int8
from workbench.skeleton import read_skeleton
from workbench.verdict import Advice, as_said

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.placement import Layer
    from workbench.skeleton import Skeleton
    from workbench.verdict import Attempt

_BALANCED = ("auto", "balanced", "balanced_low_0")


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a layer is where it is.

    Attributes:
        layer: Its name.
        device: Where it is kept; None if it has no room.
        sentence: The step that decided it, with numbers.
        advice: The smallest change of one device's budget that brings the layer to a faster device, or None if it is
            on the fastest already or no budget alone would do.
        short_bytes: For each faster device that was tried, how much more budget it would take.
    """

    layer: str
    device: DeviceId | None
    sentence: str
    advice: Advice | None = None
    short_bytes: Mapping[DeviceId, int] = field(default_factory=dict)


@refuses_unknown
def why(placement: Placement, layer: str, *, skeleton: Skeleton | None = None) -> Reason:
    """Say why a layer is where it is. Plans some twenty times, so for the largest models it takes a second.

    Args:
        placement: Of any machine.
        layer: Name of one of ``placement.layers``.
        skeleton: The placement's model, if it is already there; None reads it.

    Raises:
        ValueError: If there is no such layer.
    """
    found = {each.name: each for each in placement.layers}
    if layer not in found:
        close = difflib.get_close_matches(layer, found, n=3, cutoff=0.3)
        raise ValueError(f"There is no layer {layer!r}; close are {', '.join(map(repr, close or list(found)[:3]))}.")
    this = found[layer]
    order = list(placement.memory)
    faster = order[: order.index(this.device)] if this.device is not None else order
    if placement.recipe.strategy == "custom":
        where = "cpu" if this.device is None else this.device
        return _reason(this, f"Your device_map puts it on {device_label(where)}.")
    if not faster:
        return _reason(this, f"It is on {device_label(order[0])}, the first device that was offered, which has room.")
    skeleton = (skeleton or read_skeleton(placement.recipe.model)).on(placement.machine)
    attempt = attempts(placement.recipe.precision, placement.machine, skeleton, measure=False)
    # The last of the faster devices is what the layer just missed; more room on the first moves everything up.
    tried = dict.fromkeys((faster[-1], faster[0]))
    short = {device: _short(placement, this, device, order, attempt) for device in tried}
    known = {device: size for device, size in short.items() if size is not None}
    if not known:
        return _reason(this, _unmoved(placement, faster[-1]))
    device = min(known, key=lambda d: known[d])
    limits: dict[DeviceId, int | str] = {d: m.limit_bytes for d, m in placement.memory.items()}
    wanted = as_said(placement.memory[device].limit_bytes + known[device], up=True)
    capacity = placement.memory[device].capacity_bytes
    advice = None
    if wanted <= capacity:
        change = f"from {format_bytes(placement.memory[device].limit_bytes)} to {format_bytes(wanted)}"
        advice = Advice(f"Raise {device_label(device)} {change}.", max_memory={**limits, device: wanted})
    return Reason(
        layer=layer,
        device=this.device,
        sentence=_sentence(placement, this, device, known[device], capacity),
        advice=advice,
        short_bytes=MappingProxyType(known),
    )


def _reason(layer: Layer, sentence: str) -> Reason:
    return Reason(layer=layer.name, device=layer.device, sentence=sentence)


def _short(placement: Placement, layer: Layer, device: DeviceId, order: list[DeviceId], attempt: Attempt) -> int | None:
    """How many more bytes of budget bring a layer to a faster device; None if none do."""
    limits = {d: m.limit_bytes for d, m in placement.memory.items()}
    now = order.index(layer.device) if layer.device is not None else len(order)

    def moves(more_bytes: int) -> bool:
        try:
            tried = attempt(placement.recipe.with_(max_memory={**limits, device: limits[device] + more_bytes}))
        except ValueError:  # what transformers itself cannot plan
            return False
        home = next(each.device for each in tried.layers if each.name == layer.name)
        return home is not None and order.index(home) < now

    unit = 2**20 if placement.total_bytes >= 2**30 else 2**10 if placement.total_bytes >= 2**20 else 1
    # Room for all of it, for a second largest layer, and for the tenth that is kept free under bitsandbytes.
    high = 2 * placement.total_bytes // unit + 1
    if not moves(high * unit):
        return None
    low = 0
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if moves(middle * unit) else (middle, high)
    return high * unit


def _sentence(placement: Placement, layer: Layer, device: DeviceId, short_bytes: int, capacity_bytes: int) -> str:
    memory, recipe = placement.memory[device], placement.recipe
    kept = [f"{format_bytes(memory.weight_bytes)} are taken"]
    offers = [d for d in placement.memory if d in ("cpu", "disk")]
    largest = max(each.bytes_after for each in placement.layers)
    if device == next(iter(placement.memory)) and offers and device not in offers:
        kept.append(f"room for the largest layer that may wait ({format_bytes(largest)}) is kept")
    if isinstance(placement.precision, (Int8, FourBit)) and recipe.strategy != "packed":
        kept.append("transformers keeps a tenth free under bitsandbytes")
    text = (
        f"{device_label(device)} is short by {format_bytes(short_bytes)}: of its {format_bytes(memory.limit_bytes)}, "
        f"{', '.join(kept)}, and this layer takes {format_bytes(layer.bytes_after)}."
    )
    if memory.limit_bytes + short_bytes > capacity_bytes:
        text += f" That is more than the {format_bytes(capacity_bytes)} that {device_label(device)} has to give."
    return text


def _unmoved(placement: Placement, device: DeviceId) -> str:
    strategy = placement.recipe.strategy
    gpus = [d for d in placement.memory if d not in ("cpu", "disk")]
    if strategy in _BALANCED and len(gpus) > 1 and device in gpus:
        return (
            f'strategy="{strategy}" gives each GPU a like share of the model, however much it may take: '
            '"sequential" and "packed" fill the first ones.'
        )
    return f"No budget of {device_label(device)} alone would bring it there."
