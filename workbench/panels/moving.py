"""Layers moved by hand, and the way back: maps made from a placement, undo and redo."""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from typing import TYPE_CHECKING

from workbench.recipe import Recipe
from workbench.sizes import device_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workbench.hardware import DeviceId
    from workbench.panels.state import State
    from workbench.placement import Placement
    from workbench.skeleton import Skeleton

_SAME_GESTURE_SECONDS = 0.8
_MOST_STEPS = 100


def tied_with(layers: Iterable[str], skeleton: Skeleton) -> tuple[str, ...]:
    """The layers, and those that share a tensor with one of them, in execution order.

    Args:
        layers: Names of blocks.
        skeleton: Their model.

    Raises:
        ValueError: If there is no such layer.
    """
    known = [block.name for block in skeleton.blocks]
    wanted = set(layers)
    unknown = wanted - set(known)
    if unknown:
        raise ValueError(f"{skeleton.architecture} has no layer {min(unknown)!r}: pick one of the chart's.")
    pairs = [
        {name for name in known if any(tensor.startswith(f"{name}.") for tensor in pair)}
        for pair in skeleton.tied.items()
    ]
    grown = True
    while grown:
        more = set().union(*(pair for pair in pairs if pair & wanted)) - wanted
        wanted |= more
        grown = bool(more)
    return tuple(name for name in known if name in wanted)


def moved_map(placement: Placement, skeleton: Skeleton, layers: Iterable[str], device: DeviceId) -> dict[str, DeviceId]:
    """Make the device map in which some layers are elsewhere, and everything else is where it was.

    What had no room goes to the last device that is offered, so that the map is whole: its bar then shows how far it
    is overfull.

    Args:
        placement: Where everything is.
        skeleton: Its model.
        layers: Names of blocks; what is tied to one of them comes along.
        device: Where to.

    Returns:
        A map without overlaps, in execution order.

    Raises:
        ValueError: If there is no such layer, or the device is none of the budget's.
    """
    if device not in placement.memory:
        raise ValueError(f"The budget does not offer {device!r}: tick the device first.")
    moving = set(tied_with(layers, skeleton))
    before, rest = placement.device_map, list(placement.memory)[-1]
    result: dict[str, DeviceId] = {}
    for block in skeleton.blocks:
        inside = {name: home for name, home in before.items() if name.startswith(f"{block.name}.")}
        if block.name in moving:
            result[block.name] = device
        elif inside:
            result.update(inside)
        else:
            home = device_of(block.name, before)
            result[block.name] = rest if home is None else home
    for tensor in sizes_of(skeleton.on(placement.machine), placement.recipe.precision).tensors:
        if not tensor.is_buffer and device_of(tensor.name, result) is None:  # it hangs on no block
            home = device_of(tensor.name, before)
            result[tensor.name] = rest if home is None else home
    return result


class History:
    """What the choices were before, and what they were before that was undone.

    A drag is one step: changes of the same one choice in quick succession count as one. Another model or another
    machine begins anew, for maps name layers and budgets name devices.

    Attributes:
        done: Recipes to go back to, the last one first to be taken.
        undone: Recipes to go forward to.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.RLock()
        self._travelling = False
        self._last: tuple[tuple[str, ...], float] = ((), 0.0)
        self._devices = [(d.id, d.total_bytes) for d in state.machine.devices]
        self.done: list[Recipe] = []
        self.undone: list[Recipe] = []
        state.observe(self._note, "recipe")
        state.observe(self._begin_anew, "machine")

    def undo(self) -> str:
        """Go back one step.

        Returns:
            What that changed, in words.

        Raises:
            ValueError: If there is nothing to undo.
        """
        return self._travel(self.done, self.undone, "undo")

    def redo(self) -> str:
        """Go forward again.

        Returns:
            What that changed, in words.

        Raises:
            ValueError: If there is nothing to redo.
        """
        return self._travel(self.undone, self.done, "redo")

    def _travel(self, source: list[Recipe], target: list[Recipe], word: str) -> str:
        with self._state.lock:
            if not source:
                raise ValueError(f"There is nothing to {word}.")
            now, wanted = self._state.recipe, source[-1]
            self._travelling = True
            try:
                self._state.update(**{f.name: getattr(wanted, f.name) for f in fields(Recipe)})
            finally:
                self._travelling = False
            source.pop()
            target.append(now)
            self._last = ((), 0.0)
            return ", ".join(name.replace("_", " ") for name in _changed(now, wanted))

    def _note(self, change: dict[str, Recipe]) -> None:
        if self._travelling:
            return
        before, after = change["old"], change["new"]
        if before.model != after.model:
            self.done.clear()
            self.undone.clear()
            return
        names, now = _changed(before, after), time.monotonic()
        dragged = names in (("max_memory",), ("precision",), ("workload",))
        goes_on = dragged and names == self._last[0] and now - self._last[1] < _SAME_GESTURE_SECONDS
        self._last = (names, now)
        self.undone.clear()
        if not goes_on or not self.done:
            self.done.append(before)
            del self.done[:-_MOST_STEPS]

    def _begin_anew(self, _: object) -> None:
        devices = [(d.id, d.total_bytes) for d in self._state.machine.devices]
        if devices != self._devices:
            self._devices = devices
            self.done.clear()
            self.undone.clear()


def _changed(before: Recipe, after: Recipe) -> tuple[str, ...]:
    return tuple(f.name for f in fields(Recipe) if getattr(before, f.name) != getattr(after, f.name))
