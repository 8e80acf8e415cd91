"""The demo model, quantized once for real: it still knows its capitals, and says so in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import workbench as wb

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


@pytest.fixture(scope="session")
def quantized_demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, wb.QuantizeReport]:
    folder = tmp_path_factory.mktemp("demo") / "demo-gptq"
    recipe = wb.Recipe(model=str(demo_model), precision=wb.GPTQ(bits=4, group_size=64))
    text = wb.CalibrationText(samples=32, sequence_length=256)
    return folder, wb.quantize(recipe, folder, calibration=text)


def test_quality(quantized_demo: tuple[Path, wb.QuantizeReport]) -> None:
    _, report = quantized_demo
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert report.perplexity_after < 1.2 * report.perplexity_before
    assert report.after_bytes < 0.45 * report.before_bytes
    assert len(report.modules) == 210
    assert all(m.tokens == 32 * 256 for m in report.modules)


def test_in_a_fresh_process(quantized_demo: tuple[Path, wb.QuantizeReport]) -> None:
    folder, report = quantized_demo
    done = subprocess.run([sys.executable, "-c", ASK, str(folder)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in found["answer"]
    assert found["matches"], found["lines"]
    # What was measured while quantizing is what the kernel computes with the saved weights.
    assert found["perplexity"] == pytest.approx(report.perplexity_after, rel=0.01)
