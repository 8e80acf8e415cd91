"""The pages about methods: their worked examples are worked again, and their programs run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parent.parent / "docs"
ROW = re.compile(r"^\| `(wb\.\w+\(.*\))` \| ([\d,]+) \|$", re.MULTILINE)
UP_PROJ = (1536, 576)


def text(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def session(demo_model: Path) -> Iterator[wb.Session]:
    made = wb.load(wb.Recipe(model=str(demo_model), precision=wb.Int8()))
    yield made
    made.unload()


@pytest.mark.parametrize("page", ["int8", "four-bit", "precisions"])
def test_bytes_of_the_demo_model(page: str, demo_model: Path) -> None:
    rows = ROW.findall(text(page))
    assert len(rows) > 2
    for written, size in rows:
        precision = eval(written, {"wb": wb})  # noqa: S307 - our own page
        if importlib.util.find_spec(precision.package or "workbench") is None:
            continue
        placement = wb.place(wb.Recipe(model=str(demo_model), precision=precision), measure=False, advice=False)
        assert f"{placement.total_bytes:,}" == size, written


@pytest.mark.parametrize(
    ("page", "precision"),
    [
        ("int8", wb.Int8()),
        ("four-bit", wb.FourBit(double_quant=False)),
        ("four-bit", wb.FourBit()),
        ("precisions", wb.TorchAO()),
        ("precisions", wb.TorchAO(bits=4)),
        ("precisions", wb.HQQ()),
    ],
)
def test_bytes_of_one_weight(page: str, precision: Any) -> None:
    size = precision.quantized_bytes(UP_PROJ)
    assert f"{size:,} bytes" in text(page)
    bits = 8 * size / (UP_PROJ[0] * UP_PROJ[1])
    if page == "four-bit":
        assert f"{bits:.3f} bits" in text(page)


def test_outliers_of_the_demo_model(session: wb.Session) -> None:
    report = wb.outliers(session, "What is the capital of France?")
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) % \|$", text("int8"), re.MULTILINE)
    assert len(rows) == 4
    for threshold, percent in rows:  # processors round bfloat16 products differently
        assert 100 * report.share(float(threshold)) == pytest.approx(float(percent), rel=0.1)
    worst = max(report.modules, key=lambda m: m.largest)
    assert f"`{worst.name}`" in text("int8")
    assert worst.largest == pytest.approx(3100, rel=0.1)


def test_memory_of_a_training(session: wb.Session) -> None:
    page = text("adapters")
    assert f"{4 * 8 * sum(UP_PROJ):,} bytes" in page
    pairs = [("Capital of France?", "Paris, said the owl.")] * 4
    options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("everything", {}),
        ("`gradient_checkpointing=True`", {"gradient_checkpointing": True}),
        ("`layers=range(22, 30)`", {"layers": range(22, 30)}),
    )
    for label, chosen in options:
        plan = session.plan_training(pairs, r=8, **chosen)
        assert plan.tokens == 41
        assert plan.activation_bytes is not None
        row = f"| {label} | {plan.adapter_bytes:,} | {plan.activation_bytes / 2**20:.0f} MiB |"
        assert row in page, row


def test_their_programs_run(demo_model: Path, tmp_path: Path) -> None:
    """One after the other, in one process."""
    programs = [
        re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
        for page in ("int8", "four-bit", "adapters")
    ]
    assert [len(found) for found in programs] == [1, 1, 1]
    program = "\n".join(found[0] + "session.unload()\n" for found in programs)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Paris") == 2
    assert "of the multiplications are in 16 bits" in done.stdout
    assert "Training takes" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-int8", "demo-nf4", "owl"]
    assert wb.read_skeleton(str(tmp_path / "demo-nf4")).quantized_as == "bitsandbytes nf4 + double quantization"
