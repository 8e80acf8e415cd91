"""The Code panel: the choices as plain Python to take away, and as a file to come back with."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.panels.look import CodeView, classed, html, problem_line
from workbench.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.panels.state import State

_MOST_BYTES = 10**6  # a recipe with a map of every module of the largest model is a tenth of that


class CodePanel:
    """Exported Python; recipe download and upload.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State, *, in_view: Callable[[], bool]) -> None:
        self._state = state
        self._in_view = in_view
        self.view = classed(CodeView(), "wb-code")
        self.upload = classed(
            w.FileUpload(
                accept=".json",
                multiple=False,
                description="Upload recipe",
                tooltip="Take over the choices of a saved recipe",
            ),
            "wb-recipe-upload",
        )
        self._said = html("wb-note")
        self.box = w.VBox([self.view, self.upload, self._said, problem_line(state, "code")])
        self.upload.observe(self._take, "value")
        state.observe(self.refresh, ["recipe", "placement", "generation"])

    def refresh(self, _: object = None) -> None:
        """Write the code anew, if anyone is looking."""
        state = self._state
        if not self._in_view():
            return
        placement = state.placement if state.is_current else None
        try:
            code = state.recipe.to_python(placement, state.generation)
        except ValueError as error:
            code = f"# {error}"
        if (code, state.recipe.to_json()) != (self.view.code, self.view.recipe_json):
            with self.view.hold_sync():
                self.view.code, self.view.recipe_json = code, state.recipe.to_json()

    def _take(self, change: Any) -> None:
        if change["new"]:
            self._state.guarded("code", self._read)(change["new"])
            self._forget()

    def _read(self, value: Any) -> None:
        self._said.value = ""
        # ipywidgets 8 gives a tuple of files, 7 a dict of them by name.
        name, file = next(iter(value.items())) if isinstance(value, dict) else (value[0]["name"], value[0])
        content = bytes(file["content"])
        if len(content) > _MOST_BYTES:
            raise ValueError(f"{name} is too large for a recipe: choose a file that Download recipe has saved.")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{name} is no text: choose a recipe file that Download recipe has saved.") from None
        self._state.replace(Recipe.from_json(text))
        self._said.value = f"Took over the choices of {escape(str(name))}."

    def _forget(self) -> None:
        """Make the same file choosable again."""
        if isinstance(self.upload.value, dict):
            self.upload.value.clear()
        else:
            self.upload.value = ()
