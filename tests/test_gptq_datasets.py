"""Calibration text from the Hub: the real download code, in a process of its own, against the stand-in."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hub_datasets import DatasetHub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from transformers import AutoTokenizer
import workbench as wb
from workbench.calibration import calibration_sequences

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for options in json.loads(sys.argv[2]):
    text = wb.CalibrationText(samples=3, sequence_length=256, **options)
    try:
        answers.append([tokenizer.decode(ids) for ids in calibration_sequences(text, tokenizer)])
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
WIKITEXT_CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files: [{split: train, path: wikitext-103-raw-v1/train-*}]
- config_name: wikitext-2-raw-v1
  data_files: [{split: train, path: wikitext-2-raw-v1/train-*}]
---
"""


def prose(about: str) -> list[str]:
    return [f"Sentence {number} of what {about} has to say about the weather." for number in range(120)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatasetHub]:
    import pyarrow as pa
    from pyarrow import parquet

    home = tmp_path_factory.mktemp("data-sets")
    c4, wikitext, notes = home / "c4", home / "wikitext", home / "notes"
    (c4 / "en").mkdir(parents=True)
    for part, about in ((0, "c4"), (1, "another part")):
        lines = "\n".join(json.dumps({"text": text, "url": "http://a.b"}) for text in prose(about))
        (c4 / "en" / f"c4-train.{part:05d}-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))
    for name, about in (("wikitext-2-raw-v1", "wikitext2"), ("wikitext-103-raw-v1", "another configuration")):
        (wikitext / name).mkdir(parents=True)
        table = pa.table({"text": ["", *prose(about)]})
        parquet.write_table(table, wikitext / name / "train-00000-of-00001.parquet")
    (wikitext / "README.md").write_text(WIKITEXT_CARD)
    (notes / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"title": "none", "body": text} for text in prose(f"the {split} split")]
        (notes / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    repos = {"allenai/c4": c4, "Salesforce/wikitext": wikitext, "org/notes": notes}
    with DatasetHub(repos=repos) as server:
        yield server


def ask(hub: DatasetHub, tiny_llama: Path, cache: Path, *options: dict[str, Any]) -> list[Any]:
    command = [sys.executable, "-c", PROGRAM, str(tiny_llama), json.dumps(options)]
    done = subprocess.run(command, env=hub.env(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_texts_of_the_hub(hub: DatasetHub, tiny_llama: Path, tmp_path: Path) -> None:
    c4, wikitext, notes, tests, missing, unknown = ask(
        hub,
        tiny_llama,
        tmp_path / "cache",
        {"source": "c4"},
        {"source": "wikitext2"},
        {"source": "org/notes", "column": "body"},
        {"source": "org/notes", "column": "body", "split": "test"},
        {"source": "org/notes"},
        {"source": "org/nothing"},
    )
    for found, about in ((c4, "c4"), (wikitext, "wikitext2"), (notes, "the train split"), (tests, "the test split")):
        assert len(found) == 3
        assert any(f"what {about} has to say" in text for text in found)
        assert "another" not in " ".join(found)
    # Of c4 one file is fetched, out of a thousand.
    assert hub.sent_bytes("c4-train.00000-of-01024.json.gz")
    assert not hub.sent_bytes("c4-train.00001-of-01024.json.gz")
    assert missing == "org/notes has no column 'text' with text; its columns are: title, body."
    assert unknown.startswith("The data set 'org/nothing' cannot be read from the Hub (")
    assert unknown.endswith("check its name and the connection, or use 'offline'.")
