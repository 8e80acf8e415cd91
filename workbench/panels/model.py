"""The Model panel: which model, and what was found of it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.hardware import format_bytes
from workbench.model import DEMO, ModelRef
from workbench.panels.gptq import FilesControls, KernelControls
from workbench.panels.look import classed, count, html, panel, problem_line

if TYPE_CHECKING:
    from workbench.panels.state import State
    from workbench.skeleton import Skeleton

_MOST_RECENT = 12


class ModelPanel:
    """A field for the model's name and the facts about the model.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.name = classed(
            w.Combobox(
                description="Model",
                options=[DEMO],
                placeholder="demo, org/name, org/name@revision, or a folder",
                tooltip="The demo model, a Hub id such as org/name, or a folder; press Enter to look it up",
                continuous_update=False,
                ensure_option=False,
            ),
            "wb-model",
            "wb-wide",
        )
        self._facts = html("wb-note", "wb-model-facts")
        self._kernel = KernelControls(state)
        files = FilesControls(state, self.name)
        self.box = panel("Model", [self.name, problem_line(state, "model"), self._facts, self._kernel.box, files.box])
        state.observe(self._show_name, "recipe")
        state.observe(self._show_facts, "skeleton")
        self.name.observe(self._pick, "value")
        self._show_name()
        self._show_facts()

    def close(self) -> None:
        """End the background thread."""
        self._kernel.close()

    def _show_name(self, _: object = None) -> None:
        # A name that was refused stays in the field, to be mended; the sentence below says that it is not used.
        if not self._state.problems.get("model"):
            self.name.value = str(self._state.recipe.model)

    def _pick(self, change: Any) -> None:
        with self._state.lock:
            if change["new"] != str(self._state.recipe.model):
                self._state.guarded("model", self._change)(change["new"])
            elif self._state.problems.get("model"):
                self._state.report("model", "")

    def _change(self, text: str) -> None:
        self._state.take_model(ModelRef.parse(text))

    def _show_facts(self, _: object = None) -> None:
        skeleton = self._state.skeleton
        if skeleton is None:
            self._facts.value = (
                "What it is made of is being read; the first time takes some seconds (torch is imported)."
            )
            return
        self._facts.value = model_facts(skeleton)
        known = str(self._state.recipe.model)
        if known not in self.name.options:
            self.name.options = (*self.name.options, known)[-_MOST_RECENT:]


def model_facts(skeleton: Skeleton) -> str:
    """What is known of a model, as HTML."""
    source = skeleton.source
    number = skeleton.parameter_count
    facts = [
        f'<span title="{number:,} parameters, tied ones once">{count(number)} parameters</span>',
        f"{skeleton.layer_count} layers",
        skeleton.dtype,
        f"context {skeleton.context_length:,}" if skeleton.context_length else "context not stated",
    ]
    if source.weight_files:
        total = sum(file.size_bytes for file in source.weight_files)
        number = len(source.weight_files)
        files = f"{number} weight file{'' if number == 1 else 's'}, "
        facts.append(f'<span title="{total:,} bytes">{files}{format_bytes(total)}</span>')
    else:
        facts.append("no weight files: it can be planned for, not loaded")
    facts.append(f"licence {escape(source.licence)}" if source.licence else "licence not stated")
    rows = "".join(
        f'<tr><td>{escape(file.name)}</td><td class="wb-number" title="{file.size_bytes:,} bytes">'
        f"{format_bytes(file.size_bytes)}</td></tr>"
        for file in source.files
    )
    listing = (
        f'<details><summary>Files</summary><div class="wb-scroll"><table>{rows}</table></div></details>' if rows else ""
    )
    where = escape(source.location) + (f" at {escape(source.revision[:12])}" if source.revision else "")
    return (
        f'<div title="{where}"><b>{escape(source.title)}</b> ({escape(skeleton.architecture)})</div>'
        f"<div>{' · '.join(facts)}</div>{listing}"
    )
