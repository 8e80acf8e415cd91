"""What would be: the context grown until something spills, and one device's budget swept. Numbers, and their SVG."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from workbench.hardware import device_label, format_bytes
from workbench.panels.picture import device_colour
from workbench.placement import attempts, longest_context
from workbench.speed import predict_speed
from workbench.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workbench.hardware import DeviceId
    from workbench.placement import Placement, Verdict
    from workbench.skeleton import Skeleton

_SWEEP_POINTS = 25
_MOST_TOKENS = 1 << 17  # shown where a model names no limit
_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 206, 56, 68, 18, 42
_LABEL_PX = 16
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How full devices get as the context grows, with every layer where it is.

    Attributes:
        tokens: Context lengths, rising.
        used_bytes: Device to what it needs at each of them.
        capacity_bytes: Device to what it has to give.
        longest: The most tokens with which this map works; 0 if none does.
        limit: What the model allows; None if it does not say.
        now: The context that is asked for.
        full_first: The device that is overfull just past ``longest``; None if the model's own limit comes first.
    """

    tokens: tuple[int, ...]
    used_bytes: dict[DeviceId, tuple[int, ...]]
    capacity_bytes: dict[DeviceId, int]
    longest: int
    limit: int | None
    now: int
    full_first: DeviceId | None

    @property
    def sentence(self) -> str:
        """What there is to see."""
        if self.longest == 0:
            return "No context works with this map."
        if self.full_first is None:
            return f"This map works up to {self.longest:,} tokens, which is all that the model allows."
        return f"This map works up to {self.longest:,} tokens; then {device_label(self.full_first)} is overfull."


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """What one budget comes to.

    Attributes:
        budget_bytes: The budget.
        tokens_per_second: Estimated; None where nothing can run.
        resident: Share of the weights that is kept on GPUs (without any, in RAM), 0 to 1.
        verdict: As :class:`workbench.placement.Placement` has it.
    """

    budget_bytes: int
    tokens_per_second: float | None
    resident: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One device's budget from nothing to all that it has, the others' as they are.

    Attributes:
        device: Whose.
        strategy: With which layers were spread; a custom map moves with no budget, so it is ``"auto"`` then.
        points: By rising budget; the present one is among them.
        now: Index of the present one.
    """

    device: DeviceId
    strategy: str
    points: tuple[SweepPoint, ...]
    now: int


class MovedOn(Exception):  # noqa: N818 - it is an outcome, no error
    """Nobody wants this answer any more."""


def context_growth(
    placement: Placement, skeleton: Skeleton, moved_on: Callable[[], bool] = lambda: False
) -> Growth | None:
    """Grow the context with every layer where it is.

    Args:
        placement: With a known cache.
        skeleton: Its model.
        moved_on: Asked between steps; true gives up.

    Returns:
        The growth; None while the cache is unknown or something has no room at all.

    Raises:
        MovedOn: If ``moved_on`` said so.
    """
    skeleton = skeleton.on(placement.machine)
    longest = longest_context(placement, skeleton)
    if longest is None or placement.unplaced:
        return None
    limit = skeleton.context_length
    recipe = placement.recipe
    end = limit or max(_MOST_TOKENS, 2 * longest)
    lengths = sorted({min(end, 2**power) for power in range(7, max(8, math.ceil(math.log2(end)) + 1))} | {end})
    attempt = attempts(recipe.precision, placement.machine, skeleton, measure=False)

    def at(tokens: int) -> Placement:
        if moved_on():
            raise MovedOn
        workload = dataclasses.replace(recipe.workload, context_length=tokens)
        return attempt(recipe.with_(workload=workload), placement.device_map)

    tried = [at(tokens) for tokens in lengths]
    full_first = None
    if longest < end:
        over = at(longest + 1).memory
        full_first = min(over, key=lambda device: over[device].free_bytes)
    return Growth(
        tokens=tuple(lengths),
        used_bytes={device: tuple(each.memory[device].used_bytes for each in tried) for device in placement.memory},
        capacity_bytes={device: memory.capacity_bytes for device, memory in placement.memory.items()},
        longest=longest,
        limit=limit,
        now=recipe.workload.context_length,
        full_first=full_first,
    )


def sweep_budget(
    placement: Placement, skeleton: Skeleton, device: DeviceId, moved_on: Callable[[], bool] = lambda: False
) -> Sweep:
    """Try one device's budget from nothing to all that it has.

    Args:
        placement: The present one.
        skeleton: Its model.
        device: One of the placement's.
        moved_on: Asked between steps; true gives up.

    Raises:
        MovedOn: If ``moved_on`` said so.
        ValueError: If the device is none of the placement's.
    """
    if device not in placement.memory:
        raise ValueError(f"The budget does not offer {device!r}: tick the device first.")
    skeleton, recipe = skeleton.on(placement.machine), placement.recipe
    if recipe.strategy == "custom":
        recipe = recipe.with_(strategy="auto", device_map=None)
    budgets: dict[DeviceId, int | str] = {d: memory.limit_bytes for d, memory in placement.memory.items()}
    present, all_of_it = placement.memory[device].limit_bytes, placement.memory[device].capacity_bytes
    # Beyond what the whole model takes twice over nothing changes, and what changes would be a line at the edge.
    top = max(present, min(all_of_it, 2 * placement.total_bytes))
    steps = sorted({top * i // (_SWEEP_POINTS - 1) for i in range(_SWEEP_POINTS)} | {present})
    attempt = attempts(recipe.precision, placement.machine, skeleton, measure=False)
    points = []
    for budget in steps:
        if moved_on():
            raise MovedOn
        try:
            tried = attempt(recipe.with_(max_memory={**budgets, device: budget}))
        except ValueError:  # what transformers itself cannot plan
            points.append(SweepPoint(budget_bytes=budget, tokens_per_second=None, resident=0.0, verdict="does_not_fit"))
            continue
        verdict, _ = judge(tried, skeleton)
        speed = None if verdict == "does_not_fit" else predict_speed(tried, skeleton)
        points.append(
            SweepPoint(
                budget_bytes=budget,
                tokens_per_second=None if speed is None else speed.tokens_per_second,
                resident=resident_share(tried),
                verdict=verdict,
            )
        )
    return Sweep(device=device, strategy=recipe.strategy, points=tuple(points), now=steps.index(present))


def resident_share(placement: Placement) -> float:
    """Share of the weights that is kept on GPUs; on a machine without any, in RAM. 0 to 1."""
    gpus = [device for device in placement.memory if device not in ("cpu", "disk")]
    homes = gpus or ["cpu"]
    kept = sum(layer.bytes_after for layer in placement.layers if layer.device in homes)
    return kept / max(1, placement.total_bytes)


# --- as pictures ------------------------------------------------------------------------------------------------------


def growth_svg(growth: Growth) -> str:
    """Draw it: a line for each device, as a share of what it has."""
    used = {
        device: [size / max(1, growth.capacity_bytes[device]) for size in sizes]
        for device, sizes in growth.used_bytes.items()
        if max(sizes)
    }
    highest = min(2.0, 1.1 * max([1e-6, *(max(shares) for shares in used.values())]))
    low, high = math.log2(growth.tokens[0]), math.log2(growth.tokens[-1])

    def x(tokens: float) -> float:
        return _across((math.log2(max(tokens, growth.tokens[0])) - low) / max(1e-9, high - low))

    def y(share: float) -> float:
        return _up(min(share, highest) / highest)

    parts = [_axes("context length in tokens"), _text(_LEFT - 4, y(0) + 4, "0 %", "end")]
    if highest >= 1:
        parts.append(_line([(x(growth.tokens[0]), y(1)), (x(growth.tokens[-1]), y(1))], "wb-svg-limit"))
        parts.append(_text(_LEFT - 4, y(1) + 4, "100 %", "end"))
    else:
        parts.append(_text(_LEFT - 4, y(highest / 1.1) + 4, f"{100 * highest / 1.1:.2g} %", "end"))
    for index, (device, shares) in enumerate(used.items()):
        places = [(x(tokens), y(share)) for tokens, share in zip(growth.tokens, shares, strict=True)]
        parts.append(_line(places, "wb-svg-line", device_colour(device), _DASHES[index % len(_DASHES)]))
    ends = sorted((y(shares[-1]), device_label(device)) for device, shares in used.items())
    lowest = float(_TOP - _LABEL_PX)
    for place, label in ends:
        lowest = max(place + 4, lowest + _LABEL_PX)
        parts.append(_text(_WIDE - _RIGHT + 4, lowest, label))
    named = growth.tokens[:: max(1, math.ceil(len(growth.tokens) / 6))]
    parts += [
        _text(x(tokens), _HIGH - _BOTTOM + 16, _short_count(tokens), "middle" if tokens > named[0] else "start")
        for tokens in named
    ]
    if 0 < growth.longest < growth.tokens[-1]:
        at = x(growth.longest)
        parts.append(_line([(at, _TOP), (at, _HIGH - _BOTTOM)], "wb-svg-mark"))
        anchor = "end" if at > _WIDE * 0.55 else "start"
        parts.append(_text(at + (-4 if anchor == "end" else 4), _TOP + 9, f"spills past {growth.longest:,}", anchor))
    at = x(growth.now)
    parts.append(_line([(at, _HIGH - _BOTTOM), (at, _HIGH - _BOTTOM - 8)], "wb-svg-now"))
    for device, shares in used.items():
        share = _between(growth.tokens, shares, growth.now)
        parts.append(f'<circle cx="{at:.1f}" cy="{y(share):.1f}" r="4" fill="{device_colour(device)}"/>')
    return _svg(parts, f"Memory against context length. {growth.sentence}")


def sweep_svg(sweep: Sweep) -> str:
    """Draw it: predicted tokens a second and the share that stays on the GPUs, over the budget."""
    top = max(point.budget_bytes for point in sweep.points) or 1
    fastest = max([p.tokens_per_second or 0.0 for p in sweep.points]) * 1.1 or 1.0
    colour = device_colour(sweep.device)

    def x(budget_bytes: int) -> float:
        return _across(budget_bytes / top)

    parts = [_axes(f"budget of {device_label(sweep.device)}")]
    # Where it begins or ends to fit lies somewhere between two points.
    budgets = [point.budget_bytes for point in sweep.points]
    edges = [0, *((a + b) // 2 for a, b in itertools.pairwise(budgets)), top]
    parts += [
        f'<rect class="wb-svg-bad" x="{x(a):.1f}" y="{_TOP}" '
        f'width="{x(b) - x(a):.1f}" height="{_HIGH - _TOP - _BOTTOM}"/>'
        for (a, b), point in zip(itertools.pairwise(edges), sweep.points, strict=True)
        if point.verdict == "does_not_fit"
    ]
    resident = [(x(p.budget_bytes), _up(p.resident)) for p in sweep.points if p.verdict != "does_not_fit"]
    speed = [
        (x(p.budget_bytes), _up(p.tokens_per_second / fastest)) for p in sweep.points if p.tokens_per_second is not None
    ]
    parts.append(_line(resident, "wb-svg-line", "currentColor", "4 3"))
    parts.append(_line(speed, "wb-svg-line", colour))
    parts.append(_text(_LEFT - 4, _up(1 / 1.1) + 4, f"{fastest / 1.1:.3g}", "end"))
    parts.append(_text(_LEFT - 4, _up(0) + 4, "0", "end"))
    parts.append(_text(_LEFT - 4, _TOP - 4, "tok/s", "end"))
    parts.append(_text(_WIDE - _RIGHT + 4, _up(1) + 4, "100 %"))
    parts.append(_text(_WIDE - _RIGHT + 4, _up(0) + 4, "0 %"))
    for share in (0.0, 0.5, 1.0):
        anchor = "middle" if 0 < share < 1 else "start" if share == 0 else "end"
        parts.append(_text(_across(share), _HIGH - _BOTTOM + 16, format_bytes(round(top * share)), anchor))
    now = sweep.points[sweep.now]
    parts.append(_line([(x(now.budget_bytes), _TOP), (x(now.budget_bytes), _HIGH - _BOTTOM)], "wb-svg-now"))
    if now.tokens_per_second is not None:
        cy = _up(now.tokens_per_second / fastest)
        parts.append(f'<circle cx="{x(now.budget_bytes):.1f}" cy="{cy:.1f}" r="4.5" fill="{colour}"/>')
    return _svg(parts, sweep_sentence(sweep))


def sweep_sentence(sweep: Sweep) -> str:
    """What there is to see in a sweep."""
    now = sweep.points[sweep.now]
    speed = "cannot run" if now.tokens_per_second is None else f"est. {now.tokens_per_second:.3g} tok/s"
    said = f"At {format_bytes(now.budget_bytes)} of {device_label(sweep.device)}: {speed}, {now.resident:.0%} resident."
    able = [p for p in sweep.points if p.tokens_per_second is not None]
    if able:
        best = max(able, key=lambda p: (p.tokens_per_second or 0.0, -p.budget_bytes))
        said += f" Fastest from {format_bytes(best.budget_bytes)} on: est. {best.tokens_per_second:.3g} tok/s."
    return said


def _between(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """The value at ``x`` of the line through points."""
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=False), strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * max(0, x - x0) / (x1 - x0)
    return ys[-1]


def _across(share: float) -> float:
    return _LEFT + share * (_WIDE - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return _HIGH - _BOTTOM - share * (_HIGH - _TOP - _BOTTOM)


def _axes(below: str) -> str:
    frame = f'<path class="wb-svg-axis" d="M{_LEFT} {_TOP}V{_HIGH - _BOTTOM}H{_WIDE - _RIGHT}V{_TOP}"/>'
    return frame + _text(_across(0.5), _HIGH - 6, below, "middle")


def _line(points: Sequence[tuple[float, float]], name: str, colour: str = "", dash: str = "") -> str:
    if not points:
        return ""
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    look = (f' stroke="{colour}"' if colour else "") + (f' stroke-dasharray="{dash}"' if dash else "")
    return f'<polyline class="{name}" points="{path}"{look}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], said: str) -> str:
    opening = f'<svg class="wb-svg" viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escape(said)}">'
    return f"{opening}{''.join(parts)}</svg>"


def _short_count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"
