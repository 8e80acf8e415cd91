"""What to do about a verdict: sentences, each with a button that follows it where a program can."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import ipywidgets as w

from workbench.panels.look import classed, html, visible

if TYPE_CHECKING:
    from workbench.panels.state import State
    from workbench.verdict import Advice


class AdviceList:
    """Rows that are made once and then filled anew, so that nothing flickers while a slider is dragged.

    Attributes:
        box: What is shown.
        buttons: One for each row, shown or not.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._texts: list[w.HTML] = []
        self.buttons: list[w.Button] = []
        self._rows: list[w.Box] = []
        self._advice: tuple[Advice, ...] = ()
        self._nothing = html("wb-note", value="Advice appears here where there is any.")
        self.box = classed(w.VBox([self._nothing]), "wb-advice")
        state.observe(self._show, "placement")
        self._show()

    def _show(self, _: object = None) -> None:
        placement = self._state.placement
        # While it is still being tried out, what was advised last stays and may be pressed: it is checked anew then.
        if placement is None or placement.advice is None:
            return
        self._advice = placement.advice
        visible(self._nothing, when=not self._advice)
        while len(self._rows) < len(self._advice):
            self._add_row()
        for index, row in enumerate(self._rows):
            shown = index < len(self._advice)
            visible(row, when=shown)
            if shown:
                advice = self._advice[index]
                text = f"<div>{escape(advice)}</div>"
                if self._texts[index].value != text:
                    self._texts[index].value = text
                visible(self.buttons[index], when=bool(advice.changes))
                self.buttons[index].tooltip = f"Do it: {advice}"

    def _add_row(self) -> None:
        index = len(self._rows)
        text = html("wb-advice-text")
        button = classed(w.Button(description="Apply"), "wb-apply")
        button.on_click(self._state.guarded("preview", lambda _: self._apply(index)))
        self._texts.append(text)
        self.buttons.append(button)
        self._rows.append(classed(w.HBox([button, text]), "wb-advice-row"))
        self.box.children = (self._nothing, *self._rows)

    def _apply(self, index: int) -> None:
        with self._state.lock:
            recipe = self._state.recipe
            wanted = self._advice[index].apply(recipe)
            names = ("precision", "strategy", "max_memory", "device_map", "workload")
            self._state.update(**{name: getattr(wanted, name) for name in names})
