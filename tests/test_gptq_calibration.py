"""Calibration text: where it comes from, how much of it there is, and that nothing is measured with it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb
from workbench.calibration import calibration_sequences, evaluation_sequences, offline_paragraphs

if TYPE_CHECKING:
    from pathlib import Path

PROSE = "The quick brown fox jumps over the lazy dog while the rain falls on the roof. " * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def test_offline_text_is_cut_in_two() -> None:
    calibration, held_back = offline_paragraphs()
    assert sum(map(len, calibration)) > 200_000
    assert sum(map(len, held_back)) > 50_000
    plain = {" ".join(p.split()) for p in calibration}
    assert not plain & {" ".join(p.split()) for p in held_back}


def test_sequences(tokenizer: Any) -> None:
    text = wb.CalibrationText(samples=5, sequence_length=64)
    found = calibration_sequences(text, tokenizer)
    assert [len(ids) for ids in found] == [64] * 5
    assert found == calibration_sequences(text, tokenizer)
    assert found != calibration_sequences(wb.CalibrationText(samples=5, sequence_length=64, seed=1), tokenizer)
    assert len({tuple(ids) for ids in found}) == 5


def test_every_kind_of_source(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"body": PROSE + str(i), "n": i} for i in range(4)]
    (tmp_path / "a.txt").write_text("\n".join(row["body"] for row in rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    sources = [
        [row["body"] for row in rows],
        *(str(tmp_path / f"a.{end}") for end in ("txt", "jsonl", "json", "parquet")),
    ]
    for source in sources:
        text = wb.CalibrationText(source=source, column="body", samples=3, sequence_length=32)
        assert len(calibration_sequences(text, tokenizer)) == 3


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"shorter than one sequence of 512 tokens: give more text, 32,768 tokens"):
        calibration_sequences(wb.CalibrationText(source=["a few words"]), tokenizer)
    text = wb.CalibrationText(source=[PROSE], samples=1000, sequence_length=64)
    with pytest.raises(
        ValueError, match=r"enough for \d+ sequences of 64 tokens, not for 1,000: give about [\d,]+ tok"
    ):
        calibration_sequences(text, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"body": "x"}', "has no column 'text' with text; its columns are: body"),
        ("a.jsonl", "no json", "is no JSONL"),
        ("a.csv", "x", r"ends in \.txt, \.md, \.jsonl"),
        ("a.parquet", "x", "is no parquet file"),
        ("a.txt", "  \n ", "is empty"),
    ],
)
def test_bad_files(tokenizer: Any, tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        calibration_sequences(wb.CalibrationText(source=str(tmp_path / name)), tokenizer)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"source": 7}, "Calibration text is 'offline', 'c4'"),
        ({"source": []}, "Calibration text is 'offline', 'c4'"),
        ({"source": " "}, "Name calibration text"),
        ({"samples": 0}, "samples is a whole number of at least 1"),
        ({"sequence_length": 2}, "sequence_length is a whole number of at least 8"),
        ({"seed": "x"}, "seed is a whole number"),
    ],
)
def test_bad_choices(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wb.CalibrationText(**options)


def test_unknown_source(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"There is no file somewhere\.txt, and it is no data set"):
        calibration_sequences(wb.CalibrationText(source="somewhere.txt"), tokenizer)


@pytest.mark.parametrize("source", ["c4", "wikitext2", "org/name"])
def test_the_hub_cannot_be_reached(tokenizer: Any, source: str) -> None:
    with pytest.raises(ValueError, match=f"The data set '{source}' cannot be read from the Hub .* or use 'offline'"):
        calibration_sequences(wb.CalibrationText(source=source), tokenizer)


def test_nothing_is_measured_with_calibration_text(tokenizer: Any) -> None:
    held_back = offline_paragraphs()[1]
    leaky = wb.CalibrationText(source=held_back[: len(held_back) // 2], samples=4000, sequence_length=32)
    found = evaluation_sequences(wb.CalibrationText(), tokenizer, leaky, count=10_000, length=64)
    text = " ".join(tokenizer.decode([i for ids in found for i in ids]).split())
    assert " ".join(held_back[0].split()) not in text
    assert " ".join(held_back[-2].split()) in text
    with pytest.raises(ValueError, match=r"evaluation text is calibration text as well.* more or other"):
        evaluation_sequences(leaky, tokenizer, leaky, count=2, length=64)


@pytest.mark.parametrize("kind", ["given", "a.txt"])
def test_one_large_source_for_both(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    texts = [f"Paragraph {i} says: {PROSE}" for i in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    source: Any = texts if kind == "given" else str(tmp_path / kind)
    text = wb.CalibrationText(source=source, samples=40, sequence_length=64)
    known = calibration_sequences(text, tokenizer)
    found = evaluation_sequences(text, tokenizer, text, count=8, length=64)
    assert (len(known), len(found)) == (40, 8)
    told, measured = ({n for s in ids for n in re.findall(r"ph (\d+)", tokenizer.decode(s))} for ids in (known, found))
    assert told
    assert measured
    assert not told & measured
