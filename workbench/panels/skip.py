"""A list of the model's real linear modules, in which those that stay unquantized are selected."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.casts import covers, left_alone
from workbench.panels.look import classed, text_field
from workbench.precision import GPTQ

if TYPE_CHECKING:
    from workbench.panels.state import State

_ROWS = 8


class ModulePicker:
    """Shows every linear module by its full name; picking and dropping them writes ``skip_modules``.

    Args:
        state: The state.

    Attributes:
        box: What is shown: closed at first.
        find: What the list is narrowed to.
        modules: The list.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._shown: Any = None  # what the list was made from
        self._showing = False
        self.find = text_field(
            "Find",
            "wb-skip-find",
            "mlp, layers.3, lm_head, or a pattern",
            "Show only modules whose name has this in it; a regular expression works too",
            live=True,
        )
        self.modules = classed(
            w.SelectMultiple(
                description="Left as they are",
                rows=_ROWS,
                tooltip="The selected modules stay unquantized. Ctrl or Cmd and a click picks and drops one",
            ),
            "wb-skip-list",
            "wb-wide",
            "wb-stack",
        )
        self.box = classed(w.Accordion([w.VBox([self.find, self.modules])]), "wb-skip-modules")
        self.box.selected_index = None
        self._title(0, 0)
        self.modules.observe(self._pick, "value")
        self.find.observe(self._show, "value")
        state.observe(self._show, ["recipe", "skeleton"])
        self._show()

    def _title(self, left: int, whole: int) -> None:
        self.box.set_title(0, f"Single modules: {left} of {whole} stay as they are")

    def _show(self, _: object = None) -> None:
        skeleton, precision = self._state.skeleton, self._state.recipe.precision
        if skeleton is None:
            return
        skips, wanted = getattr(precision, "skip_modules", ()), self.find.value.strip()
        key = (id(skeleton), isinstance(precision, GPTQ), skips, wanted)
        if key == self._shown:
            return
        self._shown = key
        left = left_alone(skeleton, precision)
        names = tuple(name for name in skeleton.linear_modules if _matches(wanted, name))
        self._showing = True
        try:
            if self.modules.options != names:
                self.modules.value = ()  # first: the browser looks up what is selected among the new ones
                self.modules.options = names
            self.modules.value = tuple(name for name in names if name in left)
        finally:
            self._showing = False
        self._title(len(left), len(skeleton.linear_modules))

    def _pick(self, change: Any) -> None:
        if self._showing:
            return
        self._state.guarded("precision", lambda: self._write(set(change["new"])))()
        self._shown = None  # a refused choice is put back
        self._show()

    def _write(self, selected: set[str]) -> None:
        with self._state.lock:
            skeleton, precision = self._state.skeleton, self._state.recipe.precision
            if skeleton is None or not hasattr(precision, "skip_modules"):
                return
            before = left_alone(skeleton, precision)
            listed = set(self.modules.options)
            dropped, added = (before & listed) - selected, selected - before
            usual = () if isinstance(precision, GPTQ) else skeleton.default_skips
            names: list[str] = []
            for name in precision.skip_modules or usual:
                covered = [module for module in skeleton.linear_modules if covers(name, module)]
                # A pattern that covers what was dropped gives way to the names of all else that it covers.
                names += [m for m in covered if m not in dropped] if dropped & set(covered) else [name]
            names += [name for name in skeleton.linear_modules if name in added]
            wanted = tuple(dict.fromkeys(names))
            if not wanted and usual and dropped:
                raise ValueError(f"With none named, transformers itself leaves {', '.join(usual)} alone.")
            self._state.update(precision=dataclasses.replace(precision, skip_modules=wanted))


def _matches(wanted: str, name: str) -> bool:
    if not wanted or wanted in name:
        return True
    try:
        return re.search(wanted, name) is not None
    except re.error:  # half a pattern, while it is typed
        return False
