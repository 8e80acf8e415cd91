"""What fits: one model on one machine in every precision, side by side."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.hardware import Machine
from workbench.model import refuses_unknown
from workbench.placement import Placement, longest_context, place
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.skeleton import read_skeleton
from workbench.speed import Speed, predict_speed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.precision import Precision
    from workbench.recipe import Recipe

# From the most exact to the smallest; fp4 is left out because nf4 is as small and keeps more.
_LADDER: tuple[Precision, ...] = (FullPrecision(), Int8(), FourBit(double_quant=False), FourBit())
_VERDICTS = ("fits", "offloads", "does_not_fit")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One precision of a model on a machine.

    Attributes:
        precision: Which.
        placement: Where everything goes, with verdict and memory.
        speed: The estimated decoding speed; None where there is no estimate.
        longest_context: Tokens with which the same map still works, at the recipe's batch size and within what the
            model allows; 0 if none does, None while the cache is unknown.
    """

    precision: Precision
    placement: Placement
    speed: Speed | None = field(default=None)
    longest_context: int | None = field(default=None)


@refuses_unknown
def what_fits(
    recipe: Recipe, *, machine: Machine | None = None, precisions: Sequence[Precision] | None = None
) -> tuple[Fit, ...]:
    """Place a model in several precisions and put the best first.

    What fits comes before what offloads and what does not fit; among equals the more exact comes first.

    Args:
        recipe: The model, strategy, budgets and workload; a custom map is replaced by ``"auto"``.
        machine: For which machine; None is this one as it is now.
        precisions: Which to compare, the most exact first; None is full precision, int8, nf4 and nf4 with double
            quantization, as far as their library is installed.

    Returns:
        One entry for each precision.

    Raises:
        ValueError: If the recipe cannot be placed at all; the sentence says what to do.
    """
    machine = machine or Machine.detect()
    skeleton = read_skeleton(recipe.model)
    if recipe.strategy == "custom":
        recipe = recipe.with_(strategy="auto", device_map=None)
    if precisions is None:
        quantized = skeleton.quantized_as is not None  # then it is what it is
        ladder = (FullPrecision(),) if quantized else _LADDER
        precisions = [p for p in ladder if p.package is None or importlib.util.find_spec(p.package) is not None]
    found = []
    for precision in precisions:
        placement = place(recipe.with_(precision=precision), machine=machine, skeleton=skeleton)
        found.append(
            Fit(
                precision=precision,
                placement=placement,
                speed=predict_speed(placement, skeleton),
                longest_context=longest_context(placement, skeleton),
            )
        )
    return tuple(
        sorted(found, key=lambda fit: _VERDICTS.index(fit.placement.verdict))
    )  # stable: the order given decides
