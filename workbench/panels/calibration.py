"""The part of the Quantize panel that says which text a quantization is guided by."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.calibration import OFFLINE, CalibrationText, fitted
from workbench.panels.look import classed, html, number_field, text_field, visible

if TYPE_CHECKING:
    from workbench.panels.state import State

_FILE, _HUB = "file", "hub"
_SOURCES = (
    ("Python's documentation (offline)", OFFLINE),
    ("C4 (from the Hub)", "c4"),
    ("WikiText-2 (from the Hub)", "wikitext2"),
    ("A file", _FILE),
    ("A data set on the Hub", _HUB),
)
_WITH_COLUMNS = (".jsonl", ".json", ".parquet")


class CalibrationControls:
    """Source and amount of the calibration text.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        usual = CalibrationText()
        self.source = classed(
            w.Dropdown(
                description="Calibration",
                options=_SOURCES,
                tooltip="Which text guides the rounding; best is one like what the model will be used for",
            ),
            "wb-calibration",
            "wb-wide",
        )
        self.file = text_field(
            "File", "wb-calibration-file", "texts.jsonl", "A .txt, .md, .jsonl, .json or .parquet file"
        )
        self.dataset = text_field(
            "Data set", "wb-calibration-dataset", "org/name or org/name:config", "What the Hub calls it"
        )
        self.split = text_field("Split", "wb-calibration-split", usual.split, "Which part of the data set")
        self.column = text_field("Column", "wb-calibration-column", usual.column, "The column that holds the text")
        self.split.value, self.column.value = usual.split, usual.column
        self.samples = number_field("Samples", usual.samples, "wb-samples", "How many sequences of text")
        self.length = number_field(
            "Sequence length", usual.sequence_length, "wb-sequence-length", "Tokens of each of them"
        )
        self.seed = number_field("Seed", usual.seed, "wb-quantize-seed", "The same seed takes the same sequences")
        self._amount = html("wb-note", "wb-calibration-amount")
        numbers = classed(w.HBox([self.samples, self.length, self.seed]), "wb-row")
        self.box = w.VBox(
            [self.source, self.file, self.dataset, self.split, self.column, numbers, self._amount],
        )
        for control in (self.source, self.file, self.samples, self.length):
            control.observe(self._show, "value")
        state.observe(self._show, "skeleton")
        self._show()

    def text(self) -> CalibrationText:
        """What the controls say.

        Raises:
            ValueError: If that cannot be meant.
        """
        kind = self.source.value
        source = kind
        if kind == _FILE:
            source = self.file.value.strip()
            if not source:
                raise ValueError("Name the file that holds the calibration text.")
            if not Path(source).expanduser().is_file():  # else a path of two parts would be looked up on the Hub
                raise ValueError(f"There is no file {source}: name one on the machine that this notebook runs on.")
        elif kind == _HUB:
            source = self.dataset.value.strip()
            if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
                raise ValueError("Name the data set as the Hub does: org/name, or org/name:config.")
        options: dict[str, Any] = {}  # what is not shown has no say
        if self._has_columns() and self.column.value.strip():
            options["column"] = self.column.value.strip()
        if kind == _HUB and self.split.value.strip():
            options["split"] = self.split.value.strip()
        return CalibrationText(
            source=source,
            samples=self.samples.value,
            sequence_length=self.length.value,
            seed=self.seed.value,
            **options,
        )

    def amount(self) -> CalibrationText:
        """How much text there will be, whatever its source.

        Raises:
            ValueError: If that cannot be meant.
        """
        return CalibrationText(samples=self.samples.value, sequence_length=self.length.value)

    def _has_columns(self) -> bool:
        kind, name = self.source.value, self.file.value.strip().lower()
        return bool(kind == _HUB or (kind == _FILE and name.endswith(_WITH_COLUMNS)))

    def _show(self, _: object = None) -> None:
        visible(self.file, when=self.source.value == _FILE)
        visible(self.dataset, when=self.source.value == _HUB)
        visible(self.split, when=self.source.value == _HUB)
        visible(self.column, when=self._has_columns())
        samples, length, skeleton = self.samples.value, self.length.value, self._state.skeleton
        note = f"{samples:,} x {length:,} = {samples * length:,} tokens of text guide the rounding."
        try:
            cut = fitted(self.amount(), None if skeleton is None else skeleton.context_length).sequence_length
            if cut < length:
                note = f"The model reads {cut:,} tokens at a time: so long are the {samples:,} sequences."
        except ValueError as error:
            note = str(error)
        self._amount.value = escape(note)
