"""The demo model, as the notebook quantizes it: it still knows its capitals, and says so in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

ASK = """
import json, sys
import workbench as wb
from workbench.calibration import evaluation_sequences
from workbench.gptq import perplexity
from workbench.session import in_worker

session = wb.load(wb.Recipe(model=sys.argv[1]))
text = wb.CalibrationText()
sequences = evaluation_sequences(text, session.tokenizer, text, 8, 512)
print(json.dumps({
    "answer": session.generate("What is the capital of France?", max_new_tokens=20),
    "matches": session.load_report.matches,
    "lines": session.load_report.lines,
    "perplexity": in_worker(lambda: perplexity(session.model, sequences)),
}))
"""


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantize_report.json").read_text())
    return found


def test_quality(gptq_lesson: tuple[str, Path]) -> None:
    found = report(gptq_lesson[1])
    assert (found["precision"]["bits"], found["precision"]["group_size"]) == (4, 64)
    assert found["perplexity_after"] < 1.2 * found["perplexity_before"]
    assert found["after_bytes"] < 0.45 * found["before_bytes"]
    assert len(found["modules"]) == 210
    assert all(module["tokens"] == 32 * 256 for module in found["modules"])


def test_in_a_fresh_process(gptq_lesson: tuple[str, Path]) -> None:
    folder = gptq_lesson[1]
    done = subprocess.run([sys.executable, "-c", ASK, str(folder)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in found["answer"]
    assert found["matches"], found["lines"]
    # What was measured while quantizing is what the kernel computes with the saved weights.
    assert found["perplexity"] == pytest.approx(report(folder)["perplexity_after"], rel=0.01)
