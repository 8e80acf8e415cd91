"""What the KV cache and the activations are for, and what they come to: context length and batch size.

The cost is read off the model's own forward at a few lengths (rehearsal.py); docs/cache.md says how and how exactly.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.model import refuses_unknown
from workbench.rehearsal import Rehearsal, Run

if TYPE_CHECKING:
    from collections.abc import Sequence


CACHES = ("dynamic", "static", "quantized", "offloaded")


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Workload:
    """How the model will be used.

    Attributes:
        context_length: Tokens of prompt and answer together, for each sequence.
        batch_size: Sequences at a time.
        cache: ``"dynamic"`` grows with each token; ``"static"`` is as large from the beginning as it will be;
            ``"quantized"`` takes a byte for each number (fp8), and time; ``"offloaded"`` waits on the CPU while a GPU
            computes.
    """

    context_length: int = 2048
    batch_size: int = 1
    cache: str = "dynamic"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is no whole number of at least 1.
        """
        for name in ("context_length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, not {value!r}.")
        if self.cache not in CACHES:
            raise ValueError(f"cache is one of {', '.join(map(repr, CACHES))}, not {self.cache!r}.")

    def cache_refused_because(self, config: Any, *, gpu: bool) -> str | None:
        """Why ``transformers`` cannot keep this kind of cache, as a sentence that says what to take; None if it can.

        Args:
            config: The model's config.
            gpu: Whether layers run on a GPU.
        """
        if self.cache == "offloaded" and not gpu:
            return "An offloaded cache waits on the CPU for a GPU, and no layer runs on one: take cache='dynamic'."
        if self.cache in ("quantized", "offloaded") and config.is_encoder_decoder:
            return f"An encoder-decoder has no {self.cache} cache: take cache='dynamic'."
        if self.cache == "quantized":
            from transformers.cache_utils import get_layer_types_and_kwargs

            kinds = set(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]) - {"full_attention"}
            if kinds:
                return f"No quantized cache is made for {', '.join(sorted(kinds))}: take cache='dynamic'."
        return None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bytes as a function of the context length, from a few lengths at which they were measured.

    Attributes:
        points: (tokens, bytes), at least two, by rising length. Between two of them the parabola through the nearest
            three holds, kept within the two; beyond the last, where a layer that the model has to step through was too
            slow to be followed, the line through the last two.
    """

    points: tuple[tuple[int, int], ...]

    def at(self, tokens: int) -> int:
        """Bytes at a length."""
        lengths = [length for length, _ in self.points]
        right = bisect.bisect_left(lengths, tokens)
        if right < len(lengths) and lengths[right] == tokens:
            return self.points[right][1]
        if right in (0, len(lengths)):
            (x0, y0), (x1, y1) = self.points[:2] if right == 0 else self.points[-2:]
            return max(0, round(y0 + (y1 - y0) / (x1 - x0) * (tokens - x0)))
        first = max(0, min(right - 2, len(lengths) - 3))
        near = self.points[first : first + 3]
        low, high = sorted((self.points[right - 1][1], self.points[right][1]))
        return min(high, max(low, round(_lagrange(near, tokens))))

    def scaled(self, factor: int) -> Curve:
        """The same with ``factor`` times the bytes."""
        return Curve(points=tuple((tokens, factor * size) for tokens, size in self.points))


def _lagrange(points: Sequence[tuple[int, int]], x: int) -> float:
    """The value at ``x`` of the polynomial through all points."""
    total = 0.0
    for i, (xi, yi) in enumerate(points):
        term = float(yi)
        for j, (xj, _) in enumerate(points):
            if i != j:
                term *= (x - xj) / (xi - xj)
        total += term
    return total


def _at(curves: Sequence[tuple[str, Curve]], workload: Workload) -> dict[str, int]:
    shared = {id(curve): curve for _, curve in curves}  # layers of a kind have one
    sizes = {key: workload.batch_size * curve.at(workload.context_length) for key, curve in shared.items()}
    return {name: sizes[id(curve)] for name, curve in curves}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one sequence costs beside the weights, as functions of its length.

    Attributes:
        cache: For each layer of the KV cache (offset, slope, ceiling), in bytes, bytes a token, bytes: a layer holds
            ``min(offset + slope * tokens, ceiling)``; the ceiling is what a sliding window comes to, None without one.
        is_exact: Whether that gave the cache at every length that was measured, up to the model's longest or, where a
            layer is too slow to be followed there, past every window that its config names.
        prefill: For each block the peak of live activations while it runs in the prefill of a prompt.
        kept: For each decoder layer what it keeps after the prefill of a prompt beyond its share of the cache: a
            sliding window's layer is a view of the whole prompt's until the next token. Empty if no layer does.
        decode: For each block the peak of live activations while it runs in the step that makes the last token.
        element_bytes: Of one number in the cache.
    """

    cache: tuple[tuple[int, float, int | None], ...]
    element_bytes: int = 2
    is_exact: bool = True
    prefill: tuple[tuple[str, Curve], ...] = ()
    kept: tuple[tuple[str, Curve], ...] = ()
    decode: tuple[tuple[str, Curve], ...] = ()

    def cache_bytes(self, workload: Workload) -> tuple[int, ...]:
        """KV cache bytes for each cache layer when the context is full."""
        tokens, batch = workload.context_length, workload.batch_size
        full = ((round(offset + slope * tokens), ceiling) for offset, slope, ceiling in self.cache)
        sizes = (batch * (size if ceiling is None else min(size, ceiling)) for size, ceiling in full)
        shrunk = self.element_bytes if workload.cache == "quantized" else 1
        return tuple(size // shrunk for size in sizes)

    def cache_by_block(self, workload: Workload, decoder_blocks: Sequence[str]) -> dict[str, int]:
        """The same for each decoder layer; a cache that is not cut by layers is spread over them evenly."""
        shares = self.cache_bytes(workload)
        if len(shares) == len(decoder_blocks):
            return dict(zip(decoder_blocks, shares, strict=True))
        count, total = max(1, len(decoder_blocks)), sum(shares)
        return {name: total // count + (index < total % count) for index, name in enumerate(decoder_blocks)}

    def activation_bytes(self, workload: Workload) -> dict[str, int]:
        """Estimated peak of live activations in bytes while each block runs, for a prompt that fills the context."""
        peaks = _at(self.prefill, workload)
        for name, step in self.decode_bytes(workload).items():
            peaks[name] = max(peaks[name], step)
        return peaks

    def kept_bytes(self, workload: Workload) -> dict[str, int]:
        """Bytes that each layer keeps after that prompt beyond its share of the cache, where it is not nothing.

        On a device they add up over its layers, and come on top of the largest of its activations.
        """
        return _at(self.kept, workload)

    def decode_bytes(self, workload: Workload) -> dict[str, int]:
        """Estimated peak of live activations in bytes while each block runs for one more token at a full context."""
        peaks = _at(self.decode, workload)
        if workload.cache == "quantized" and self.cache:
            # A layer's keys are there in the model's dtype, and its values twice in float32, when it reads them.
            whole = max(self.cache_bytes(workload)) * self.element_bytes
            peaks = {name: size + whole // 2 + 4 * whole // self.element_bytes for name, size in peaks.items()}
        return peaks

    def scaled(self, factor: int) -> Cost:
        """The same model in a dtype with ``factor`` times as many bytes an element."""
        return replace(
            self,
            cache=tuple((factor * o, factor * s, None if c is None else factor * c) for o, s, c in self.cache),
            element_bytes=factor * self.element_bytes,
            prefill=_scaled(self.prefill, factor),
            kept=_scaled(self.kept, factor),
            decode=_scaled(self.decode, factor),
        )


def _scaled(curves: Sequence[tuple[str, Curve]], factor: int) -> tuple[tuple[str, Curve], ...]:
    shared = {id(curve): curve.scaled(factor) for _, curve in curves}
    return tuple((name, shared[id(curve)]) for name, curve in curves)


# The first three lengths tell each cache layer's line and whether the model steps through its tokens. They are odd, so
# that a layer which keeps a summary of every so many tokens does not pass for a line.
_SHORT = (9, 27, 129)
_BETWEEN = (1025, 8193)
_LONGEST = 1 << 20  # where a model names no limit
_MOST_STEPS = 10_000  # operators that a long run may take beyond those of a short one
_MOST_SECONDS = 1.2  # of this thread, for all runs together


def measure_cost(
    module: Any, block_names: Sequence[str], decoder_blocks: Sequence[str], *, context_length: int | None = None
) -> Cost | None:
    """Run a model's own forward on the ``meta`` device to see what cache and activations it makes.

    Nothing is computed, and of decoder layers that are alike one runs, so the size of the model hardly matters. The
    cache is exact for any architecture that fills one (sliding windows, latent attention, states) unless
    :attr:`Cost.is_exact` says otherwise; the activations are those of this forward with fused attention, an estimate:
    kernels take scratch memory of their own. It takes about a second of this thread's time at most.

    Args:
        module: A causal language model on ``meta``, not quantized.
        block_names: The blocks to which peaks are attributed.
        decoder_blocks: Those of them that have a share in the cache, in order.
        context_length: The most tokens that the model allows; None if it does not say.

    Returns:
        The cost of one sequence, or None if the model cannot be run on ``meta``.
    """
    longest = min(context_length or _LONGEST, _LONGEST)
    with Rehearsal(module, block_names, decoder_blocks, seconds=_MOST_SECONDS) as rehearsal:
        runs = _climb(rehearsal, longest)
    if len(runs) < 2:
        return None
    return replace(_fit(runs, _widest_window(module, longest)), element_bytes=module.dtype.itemsize)


def _climb(rehearsal: Rehearsal, longest: int) -> list[Run]:
    """Run prompts of rising length, as far as the model can be followed."""
    room = max(1, longest - 2)  # for the two tokens of the decode steps
    runs: list[Run] = []

    def attempt(tokens: int, *, step: bool = False) -> None:
        if tokens > room or any(run.tokens == tokens for run in runs):
            return
        most = None
        if len(runs) > 1:
            # A model that steps through its tokens takes operators for each: one that would take too many is let be.
            before, last = runs[-2:]
            a_token = (last.operators - before.operators) / (last.tokens - before.tokens)
            most = 2 * last.operators + _MOST_STEPS
            if tokens > _SHORT[-1] and last.operators + a_token * (tokens - last.tokens) > most:
                return
        try:
            runs.append(rehearsal.run(tokens, step=step, most_operators=most))
        except Exception:  # noqa: BLE001 - models from anywhere; a length at which one cannot be run is left out
            return

    for tokens in _SHORT if room > _SHORT[-1] else (max(1, room // 4), max(1, room // 2)):
        attempt(tokens, step=tokens != _SHORT[0])
    if runs:
        attempt(room, step=True)
        for tokens in _BETWEEN:
            attempt(tokens, step=tokens == _BETWEEN[-1])
    return sorted(runs, key=lambda run: run.tokens)


def _fit(runs: list[Run], widest: int) -> Cost:
    """Turn what was measured at a few lengths into functions of the length."""
    lines = [_line(points) for points in zip(*([(r.tokens, size) for size in r.cache] for r in runs), strict=True)]
    # Only a run that went past a window shows it.
    seen = runs[-1].tokens >= widest or all(slope == 0 for (_, slope, _), _ in lines)

    shared: dict[Any, Curve] = {}

    def curves(sizes: list[tuple[int, dict[str, int]]]) -> tuple[tuple[str, Curve], ...]:
        names = sizes[0][1] if len(sizes) > 1 else ()
        points = {name: tuple((tokens, by[name]) for tokens, by in sizes) for name in names}
        return tuple((name, shared.setdefault(p, Curve(points=p))) for name, p in points.items())

    kept = curves([(run.tokens, run.kept) for run in runs])
    return Cost(
        cache=tuple(line for line, _ in lines),
        is_exact=seen and all(fits for _, fits in lines) and all(run.is_whole for run in runs),
        prefill=curves([(run.tokens, run.prefill) for run in runs]),
        kept=tuple((name, curve) for name, curve in kept if any(size for _, size in curve.points)),
        decode=curves([(run.tokens + 2, run.step) for run in runs if run.step]),
    )


def _line(points: Sequence[tuple[int, int]]) -> tuple[tuple[int, float, int | None], bool]:
    """Return (offset, slope, ceiling) of a cache layer and whether it holds at all the lengths."""
    (x0, y0), (x1, y1) = points[:2]
    last, top = points[-1]
    slope = (y1 - y0) / (x1 - x0)
    offset = round(y0 - slope * x0)
    ceiling = top if top < round(offset + slope * last) else None
    if all(y == min(round(offset + slope * x), top) for x, y in points):
        return (offset, slope, ceiling), True
    (x0, y0), (x1, y1) = points[-2:]  # not a line: the long run counts most
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    return (round(y1 - slope * x1), slope, None), False


def _widest_window(module: Any, longest: int) -> int:
    """The largest number that the config gives to a window or a chunk; no cache levels off beyond it."""
    config = module.config.get_text_config(decoder=True)
    values = [v for name, v in vars(config).items() if re.search("window|chunk|local", name)]
    return max((v for v in values if isinstance(v, int) and v < longest), default=0)
