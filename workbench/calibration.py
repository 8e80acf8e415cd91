"""Text to calibrate a quantization with, text to measure it with, and the second is never part of the first."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.model import refuses_unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OFFLINE = "offline"
_HUB_SETS = {
    "c4": ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
}
_PROSE = (".txt", ".md")
_FILE_KINDS = (*_PROSE, ".jsonl", ".json", ".parquet")
EVALUATION_LENGTH = 512  # tokens of a sequence to measure with
_HELD_BACK = 0.2  # of the offline text, for measuring
_CHARACTERS_PER_TOKEN = 6  # more than any tokenizer needs for prose, so that one reading of a data set is enough


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Which text, and how much of it.

    Attributes:
        source: ``"offline"`` (English prose from Python's own documentation, which is always there), ``"c4"`` or
            ``"wikitext2"`` (from the Hub), a ``.txt``, ``.md``, ``.jsonl`` or ``.parquet`` file, a data set on the Hub
            (``"org/name"`` or ``"org/name:config"``), or the texts themselves.
        column: The column that holds the text, in JSONL, parquet and data sets.
        split: Of a data set on the Hub.
        samples: How many sequences.
        sequence_length: Tokens of each.
        seed: Which sequences, out of those that there are.
    """

    source: str | tuple[str, ...] = OFFLINE
    column: str = "text"
    split: str = "train"
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ValueError: If one cannot be meant.
        """
        if not isinstance(self.source, str):
            texts = tuple(self.source) if isinstance(self.source, (list, tuple)) else ()
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    "Calibration text is 'offline', 'c4', 'wikitext2', a file, a data set on the Hub or a list of "
                    f"strings, not {type(self.source).__name__}."
                )
            object.__setattr__(self, "source", texts)
        elif not self.source.strip():
            raise ValueError("Name calibration text: 'offline', 'c4', 'wikitext2', a file or a data set on the Hub.")
        for name, low in (("samples", 1), ("sequence_length", 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is a whole number of at least {low}, not {value!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is a whole number, not {self.seed!r}.")  # noqa: TRY004 - one kind of error for bad input

    @classmethod
    def parse(cls, value: Any) -> CalibrationText:
        """Read a source where a whole :class:`CalibrationText` may stand as well; None is the offline text.

        Raises:
            ValueError: If it is none of what ``source`` may be.
        """
        if isinstance(value, CalibrationText):
            return value
        return cls() if value is None else cls(source=str(value) if isinstance(value, Path) else value)

    @property
    def label(self) -> str:
        """The source and the amount in a few words."""
        source = self.source if isinstance(self.source, str) else f"{len(self.source)} given texts"
        if source == OFFLINE:
            source = "Python's documentation (offline)"
        return f"{self.samples} x {self.sequence_length} tokens of {source}, seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report; given texts are counted, not repeated."""
        source = self.source if isinstance(self.source, str) else f"{len(self.source)} given texts"
        return {
            "source": source,
            "column": self.column,
            "split": self.split,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }


def calibration_sequences(text: CalibrationText, tokenizer: Any) -> list[list[int]]:
    """Tokenize calibration text into sequences of one length.

    Args:
        text: Which text and how much.
        tokenizer: The model's.

    Returns:
        ``samples`` lists of ``sequence_length`` token ids that do not overlap, drawn with the seed.

    Raises:
        ValueError: If the text cannot be read or is too short; the sentence says how much is enough.
    """
    return _draw(_sequences(_read(text), tokenizer, text.sequence_length), text)


def evaluation_sequences(
    text: CalibrationText, tokenizer: Any, calibration: CalibrationText, count: int, length: int
) -> list[list[int]]:
    """Tokenize text to measure a model with, without anything that it was calibrated with.

    Args:
        text: Which text; its own ``samples`` and ``sequence_length`` do not matter here.
        tokenizer: The model's.
        calibration: What the model was calibrated with.
        count: At most so many sequences.
        length: Tokens of each.

    Returns:
        Up to ``count`` lists of ``length`` token ids; one shorter list if the text is shorter than that.

    Raises:
        ValueError: If the text cannot be read, or nothing is left of it.
    """
    known = "\n".join(_plain(t) for t in _read(calibration))
    pieces = offline_paragraphs()[1] if text.source == OFFLINE else _pieces(text)
    # Of one source for both, what comes after that which was read to calibrate.
    new = _enough((piece for piece in pieces if _plain(piece) not in known), count * length)
    if not new:
        raise ValueError(
            "Nothing is left to measure with: all of the evaluation text is calibration text as well. Give more or "
            "other text to measure with, fewer samples to calibrate with, or evaluation=None."
        )
    texts = ["\n\n".join(new)]
    sequences = _sequences(texts, tokenizer, length)
    if sequences:
        return sequences[:count]
    ids = _tokens(texts, tokenizer)
    return [ids] if len(ids) > 1 else []


def offline_paragraphs() -> tuple[list[str], list[str]]:
    """English prose that every Python has: paragraphs to calibrate with, and others to measure with.

    The topics quote each other, so paragraphs and not topics are told apart, and each is taken once.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            paragraphs.setdefault(_plain(paragraph), paragraph.strip("\n"))
    paragraphs.pop("", None)
    texts = list(paragraphs.values())
    cut = round(len(texts) * (1 - _HELD_BACK))
    return texts[:cut], texts[cut:]


def _plain(text: str) -> str:
    return " ".join(text.split())


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(text: CalibrationText) -> list[str]:
    found = _enough(_pieces(text), text.samples * text.sequence_length)
    if not found:
        raise ValueError(f"The calibration text {text.source if isinstance(text.source, str) else ''} is empty.")
    # Paragraphs of one text are one text again.
    return ["\n\n".join(found)] if _is_prose(text.source) else found


def _enough(pieces: Iterable[str], tokens: int) -> list[str]:
    """Pieces with something in them, until there is a choice of twice as many tokens as are wanted."""
    found, length = [], 0
    for piece in pieces:
        if piece and piece.strip():
            found.append(piece)
            length += len(piece)
            if length >= 2 * tokens * _CHARACTERS_PER_TOKEN:
                break
    return found


def _is_prose(source: str | tuple[str, ...]) -> bool:
    """Whether it is a text file, whose pieces are paragraphs."""
    return isinstance(source, str) and source.lower().endswith(_PROSE) and Path(source).expanduser().is_file()


def _pieces(text: CalibrationText) -> Iterable[str]:
    """All of the text, row by row or paragraph by paragraph, as long as somebody reads on."""
    source = text.source
    if not isinstance(source, str):
        texts: Iterable[str] = source
    elif source == OFFLINE:
        texts = ["\n\n".join(offline_paragraphs()[0])]
    elif Path(source).expanduser().is_file():
        texts = _read_file(Path(source).expanduser(), text.column)
    elif source in _HUB_SETS or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        texts = _read_hub(text)
    else:
        raise ValueError(
            f"There is no file {source}, and it is no data set: give 'offline', 'c4', 'wikitext2', a file "
            f"({', '.join(_FILE_KINDS)}), a data set as 'org/name', or a list of strings."
        )
    return texts


def _read_file(path: Path, column: str) -> Iterable[str]:
    kind = path.suffix.lower()
    if kind not in _FILE_KINDS:
        raise ValueError(f"{path.name} is no calibration file: it ends in {', '.join(_FILE_KINDS)}.")
    try:
        if kind in _PROSE:
            return re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        if kind == ".parquet":
            return _read_parquet(path, column)
        rows = _json_rows(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as calibration text: {error}") from None
    return [_cell(row, column, path.name) for row in rows]


def _json_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() == ".json":
            data = json.loads(text)
            return data if isinstance(data, list) else [data]
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no {path.suffix[1:].upper()}: {error}") from None


def _cell(row: Any, column: str, name: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise ValueError(f"{name} has no column {column!r} with text; its columns are: {columns}.")  # noqa: TRY004 - likewise
    return str(row[column])


def _read_parquet(path: Path, column: str) -> Iterable[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise ValueError("Reading a parquet file needs pyarrow: run `pip install pyarrow`.") from None
    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path.name} is no parquet file: {error}") from None
    if column not in table.schema_arrow.names:
        raise ValueError(
            f"{path.name} has no column {column!r}; its columns are: {', '.join(table.schema_arrow.names)}."
        )
    return (str(cell) for batch in table.iter_batches(columns=[column]) for cell in batch.column(0).to_pylist() if cell)


def _read_hub(text: CalibrationText) -> Iterable[str]:
    source = str(text.source)
    name, _, config = source.partition(":")
    files = None
    if source in _HUB_SETS:
        name, known_config, files = _HUB_SETS[source]
        config = known_config or ""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ValueError(
            f"Calibrating with {source!r} needs the datasets library: run `pip install datasets`, or use 'offline'."
        ) from None
    try:
        rows = load_dataset(name, config or None, data_files=files, split=text.split, streaming=True)
        first = next(iter(rows), None)
    except Exception as error:  # noqa: BLE001 - the library raises what its many readers raise
        raise ValueError(
            f"The data set {source!r} cannot be read from the Hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check its name and the connection, or use 'offline'."
        ) from None
    if first is None:
        return []
    _cell(first, text.column, source)
    return (str(row[text.column]) for row in rows if row[text.column])


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """One stream of tokens, with the end-of-text token between the texts where the tokenizer has one."""
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for one in texts:
        if stream and isinstance(end, int):
            stream.append(end)
        # The whole text at once is longer than the model reads, which is no mistake here.
        stream.extend(tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"])
    return stream


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text: models lean on seeing it first."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("a")["input_ids"][:1] == [start] else []


def _sequences(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    prefix = _prefix(tokenizer)
    stream = _tokens(texts, tokenizer)
    step = length - len(prefix)
    starts = range(0, len(stream) - step + 1, step)
    return [prefix + stream[start : start + step] for start in starts]


def _draw(sequences: list[list[int]], text: CalibrationText) -> list[list[int]]:
    have, length = len(sequences), text.sequence_length
    if have == 0:
        raise ValueError(
            f"The calibration text is shorter than one sequence of {length:,} tokens: give more text, "
            f"{text.samples * length:,} tokens for {text.samples} sequences, or lower sequence_length."
        )
    if have < text.samples:
        raise ValueError(
            f"The calibration text is enough for {have:,} sequences of {length:,} tokens, not for {text.samples:,}: "
            f"give about {(text.samples - have) * length:,} tokens more, or lower samples to {have:,}."
        )
    return random.Random(text.seed).sample(sequences, text.samples)  # noqa: S311 - nobody is to be kept from guessing


def fitted(text: CalibrationText, context_length: int | None) -> CalibrationText:
    """The same text in sequences that the model can read."""
    if context_length is None or text.sequence_length <= context_length:
        return text
    return replace(text, sequence_length=context_length)
