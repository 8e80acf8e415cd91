"""Saves the loaded model as a folder, under the Load tab."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import ipywidgets as w

from workbench.hardware import format_bytes
from workbench.model import ModelRef
from workbench.panels.job import Job
from workbench.panels.look import classed, html, problem_line, text_field, visible
from workbench.panels.push import PushControls
from workbench.precision import FullPrecision

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.panels.state import State


class SavePanel:
    """Writes what is loaded, quantized weights as they are.

    Args:
        state: The state.

    Attributes:
        box: What is shown while a model is loaded.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._saved: Path | None = None
        self._job = Job(state, "save", cancelled="", tip="How much is written")
        self.folder = text_field(
            "Save to", "wb-save-folder", "a new folder", "The folder loads later, here or without Workbench"
        )
        self.overwrite = classed(
            w.Checkbox(description="Overwrite", indent=False, tooltip="Replace the folder if it exists"),
            "wb-save-overwrite",
        )
        self.save = classed(
            w.Button(description="Save", tooltip="Write the loaded model with its tokenizer: quantized weights packed"),
            "wb-save",
        )
        self.open = classed(
            w.Button(
                description="Open the saved model", tooltip="Make the folder the model", layout=w.Layout(width="auto")
            ),
            "wb-save-open",
        )
        self._said = html("wb-note", "wb-save-said")
        self.push = PushControls(state, "save-push")
        self.box = w.VBox(
            [
                self.folder,
                classed(w.HBox([self.save, self.overwrite]), "wb-row"),
                problem_line(state, "save"),
                self._job.bar,
                self._job.text,
                self._said,
                self.open,
                self.push.box,
            ]
        )
        visible(self._job.bar, when=False)  # it would jump from nothing to all
        self.save.on_click(state.guarded("save", self._start))
        self.open.on_click(state.guarded("save", self._open))
        state.observe(self._show, ["activity", "session"])
        self._show()

    def close(self) -> None:
        """Wait for what is going on."""
        self._job.close()

    def _start(self, _: object) -> None:
        state, named, overwrite = self._state, self.folder.value.strip(), bool(self.overwrite.value)
        if not named:
            raise ValueError("Name a folder to save to.")
        session = state.begin_with_model("saving")

        def work() -> None:
            self._take(session.save(named, overwrite=overwrite))

        self._job.start(work, prepare=lambda: self._take(None), beside=True)

    def _take(self, folder: Path | None) -> None:
        self._saved = folder
        self._said.value = ""
        if folder is not None:
            size = sum(file.stat().st_size for file in folder.iterdir())
            self._said.value = f'<div role="status">✓ Saved ({format_bytes(size)}): {escape(str(folder))}</div>'
            self.push.offer(str(folder))
        self._show()

    def _open(self, _: object) -> None:
        if self._saved is None:
            raise ValueError("Save the model first.")
        # What is quantized stays so.
        self._state.take_model(ModelRef(name=str(self._saved)), precision=FullPrecision(), adapters=())

    def _show(self, _: object = None) -> None:
        state = self._state
        visible(self.box, when=state.session is not None or self._saved is not None)
        self.save.disabled = bool(state.activity) or state.session is None
        self.open.disabled = bool(state.activity)
        for after in (self.open, self.push.box):
            visible(after, when=self._saved is not None)
