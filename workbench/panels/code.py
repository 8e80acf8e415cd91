"""The Code panel: the choices as plain Python to take away, and as a file to come back with."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.panels.look import CodeView, classed, html, problem_line
from workbench.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.model import ModelRef
    from workbench.panels.state import State

_LEAVES = ("trust_remote_code", "allow_pickle")  # what a model's author may do here
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
        # "doing" last: an equal placement that answers a new question is announced by nothing else.
        state.observe(self.refresh, ["recipe", "machine", "placement", "generation", "problems", "doing"])

    def refresh(self, _: object = None) -> None:
        """Write the code anew, if anyone is looking."""
        state = self._state
        if not self._in_view():
            return
        with state.lock:
            recipe, placement, current = state.recipe, state.placement, state.is_current
        if not current:  # writing it would read the model here, where everything waits for it
            wrong = state.problems.get("model") or state.problems.get("preview")
            code = f"# {wrong or 'The preview is being worked out.'}"
        else:
            try:
                code = recipe.to_python(placement, state.generation)
            except ValueError as error:
                code = f"# {error}"
        if (code, recipe.to_json()) != (self.view.code, self.view.recipe_json):
            with self.view.hold_sync():
                self.view.code, self.view.recipe_json = code, recipe.to_json()

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
        recipe, said = _without_leave(Recipe.from_json(text), self._state.recipe.model)
        try:
            self._state.replace(recipe)
        except ValueError as error:
            raise ValueError(f"{error}{said}") from None
        self._said.value = escape(f"Took over the choices of {name}.{said}")

    def _forget(self) -> None:
        """Make the same file choosable again."""
        if isinstance(self.upload.value, dict):
            self.upload.value.clear()
        else:
            self.upload.value = ()


def _without_leave(recipe: Recipe, present: ModelRef) -> tuple[Recipe, str]:
    """Switch off what a recipe from a file would let a model's author do here, and say so.

    The file may come from anybody, and reading such a model runs what is in it. Only for the present model what was
    allowed before stays allowed.
    """
    model = recipe.model
    same = (model.name, model.revision) == (present.name, present.revision)
    off: dict[str, Any] = {n: False for n in _LEAVES if getattr(model, n) and not (same and getattr(present, n))}
    if not off:
        return recipe, ""
    revision = "" if model.revision is None else f"revision={model.revision!r}, "
    said = (
        f" {' and '.join(off)} switched off: a file does not decide what may run here. If you trust its author, "
        f"run bench.recipe = bench.recipe.with_(model=wb.ModelRef(name={model.name!r}, {revision}"
        f"{', '.join(f'{name}=True' for name in off)})) in a cell, then upload the file again."
    )
    return recipe.with_(model=replace(model, **off)), said
