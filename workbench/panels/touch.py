"""Hands on the picture: layers are moved in it, limits dragged, steps undone."""

from __future__ import annotations

import threading
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
from traitlets import Dict

from workbench.hardware import device_label, format_bytes
from workbench.panels.devices import largest_gib, set_budget, slider_step
from workbench.panels.look import button, classed, html
from workbench.panels.moving import History, moved_map, tied_with
from workbench.panels.picture import overlay
from workbench.panels.state import NOT_FINISHED, as_sentence
from workbench.reasons import why

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.hardware import DeviceId
    from workbench.panels.picture import ChartSpec
    from workbench.panels.state import State


class Touch(anywidget.AnyWidget):
    """A transparent layer over the figure, which has none of the keyboard and little of the mouse.

    Attributes:
        picture: Where everything is, as :func:`workbench.panels.picture.overlay` says it.
        limit: What a hand drags: {"device": label, "gib": size, "nth": number}. Nobody is told of an equal trait, and a
            limit may be dragged to the same place again: each time has another number.
        live: Device label to (bytes, what to say): memory as it is now.
    """

    _esm = Path(__file__).with_name("touch.js")
    picture = Dict().tag(sync=True)
    limit = Dict().tag(sync=True)
    live = Dict().tag(sync=True)


class Hands:
    """What hands do in the picture, and the row of buttons below it.

    Attributes:
        touch: The layer over the figure.
        bar: The buttons, and the line that says what was done.
        history: The way back.
        on_stale: Called when a page says that its figure is not what it should be.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.on_stale: Callable[[], None] = lambda: None
        self._asked: str | None = None
        self._thinking: threading.Thread | None = None
        self.history = History(state)
        self.touch = classed(Touch(), "wb-touch")
        self.undo = button("Undo", "wb-undo", "Undo the last change (Ctrl+Z in the picture)")
        self.redo = button("Redo", "wb-redo", "Do again what was undone (Ctrl+Y in the picture)")
        self.auto = button("Back to auto", "wb-auto", 'Let the strategy "auto" place every layer again')
        self.pin = button("Pin", "wb-pin", "Keep this placement to compare the next ones with")
        for each in (self.undo, self.redo, self.auto, self.pin):
            each.add_class("wb-tool")
        self.kinds = classed(
            w.ToggleButton(description="Kinds", tooltip="Show what layers are made of", layout=w.Layout(width="auto")),
            "wb-kinds",
            "wb-tool",
        )
        self._said = html("wb-hand-said")
        tools = classed(w.Box([self.undo, self.redo, self.auto, self.pin, self.kinds]), "wb-row", "wb-tools")
        self.bar = w.VBox([tools, self._said])
        self.touch.on_msg(self._on_message)
        self.touch.observe(state.guarded("preview", self._drag_limit), "limit")
        self.undo.on_click(state.guarded("preview", lambda _: self._travel("undo")))
        self.redo.on_click(state.guarded("preview", lambda _: self._travel("redo")))
        self.auto.on_click(state.guarded("preview", self._back_to_auto))
        self.pin.on_click(state.guarded("preview", self._pin))
        state.observe(self._show, ["recipe", "machine", "placement", "pinned"])
        self._say("Click a layer to move it; drag a limit line.")
        self._show()

    def close(self) -> None:
        """Wait for an answer that is being worked out."""
        if self._thinking is not None:
            self._thinking.join()

    def draw(self, spec: ChartSpec, width_px: int) -> None:
        """Put the layer where the figure now is, which is so wide; 0 if it is as wide as its place."""
        devices = self._state.machine.devices
        steps = {d.label: (largest_gib(d.total_bytes), slider_step(d.total_bytes)) for d in devices}
        picture = {**overlay(spec, steps), "width": width_px}
        if picture != self.touch.picture:
            self.touch.picture = picture

    def move(self, layers: list[str], device: DeviceId) -> None:
        """Move layers, and what is tied to them, to a device; the map becomes ``"custom"``.

        Raises:
            ValueError: If that cannot be meant; nothing is changed then.
        """
        state = self._state
        with state.lock:
            placement, skeleton = state.placement, state.skeleton
            if placement is None or skeleton is None or not state.is_current:
                raise ValueError(NOT_FINISHED)
            device_map = moved_map(placement, skeleton, layers, device)
            state.update(strategy="custom", device_map=device_map)
            moved = tied_with(layers, skeleton)
            sizes = {layer.name: layer.bytes_after for layer in state.placement.layers}
        span = moved[0] if len(moved) == 1 else f"{len(moved)} layers"
        also = f" ({', '.join(name for name in moved if name not in layers)} is tied and came along)"
        total = format_bytes(sum(sizes[name] for name in moved))
        self._say(
            f"Moved {span} ({total}) to {device_label(device)}{also if len(moved) > len(set(layers)) else ''}. "
            f"{state.placement.summary}"
        )

    def _on_message(self, _: object, content: dict[str, Any], __: object) -> None:
        self._state.guarded("preview", self._obey)(content)

    def _obey(self, content: dict[str, Any]) -> None:
        if "move" in content:
            self.move([str(name) for name in content["move"]], self._device(str(content["device"])))
        elif "undo" in content:
            self._travel("undo")
        elif "redo" in content:
            self._travel("redo")
        elif "stale" in content:
            self.on_stale()
        elif "why" in content:
            self._explain(str(content["why"]))

    def _device(self, label: str) -> DeviceId:
        devices = self._state.machine.devices
        found: DeviceId | None = next((d.id for d in devices if d.label == label), None)
        if found is None:
            raise ValueError(f"There is no {label} here: there is {', '.join(d.label for d in devices)}.")
        return found

    def _drag_limit(self, change: dict[str, Any]) -> None:
        wanted = change["new"]
        if wanted:
            device = self._state.machine.device(self._device(wanted["device"]))
            set_budget(self._state, device, f"{round(float(wanted['gib']), 6):g}GiB")

    def _travel(self, word: str) -> None:
        changed = self.history.undo() if word == "undo" else self.history.redo()
        self._show()
        self._say(f"{'Undone' if word == 'undo' else 'Done again'}: {changed}.")

    def _back_to_auto(self, _: object) -> None:
        self._state.update(strategy="auto", device_map=None)
        self._say("Back to auto.")

    def _pin(self, _: object) -> None:
        state = self._state
        if state.pinned is not None:
            state.pin(None)
            self._say("Nothing is pinned any more.")
        elif state.placement is None or not state.is_current:
            raise ValueError(NOT_FINISHED)
        else:
            state.pin(state.placement)
            self._say("Pinned: what changes from here on is in the Compare tab, and drawn as outlines.")

    def _explain(self, layer: str) -> None:
        """Say why a layer is where it is; that is found out by planning some twenty times, so beside everything."""
        self._asked = layer
        self._say("Finding out ...")
        if self._thinking is None or not self._thinking.is_alive():
            self._thinking = threading.Thread(target=self._find_out, name="workbench-why", daemon=True)
            self._thinking.start()

    def _find_out(self) -> None:
        while (layer := self._asked) is not None:
            placement, skeleton = self._state.placement, self._state.skeleton
            try:
                reason = why(placement, layer, skeleton=skeleton)
                said = f"{layer}: {reason.sentence}" + (f" {reason.advice}" if reason.advice else "")
            except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
                said = as_sentence(error)
            if self._asked == layer:
                self._asked = None
                self._say(said)

    def _say(self, sentence: str) -> None:
        self._said.value = f'<div role="status" aria-live="polite">{escape(sentence)}</div>'

    def _show(self, _: object = None) -> None:
        state = self._state
        for control, when in (
            (self.undo, bool(self.history.done)),
            (self.redo, bool(self.history.undone)),
            (self.auto, state.recipe.strategy != "auto"),
            (self.pin, state.placement is not None),
        ):
            if control.disabled == when:
                control.disabled = not when
        word = "Pin" if state.pinned is None else "Unpin"
        if self.pin.description != word:
            self.pin.description = word
