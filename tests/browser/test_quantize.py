"""GPTQ as a person does it, in a real JupyterLab on a tiny model: look ahead, cancel, quantize, read, open, load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab import REPOSITORY
from test_main_job import WAIT_MS, button, open_tab, part

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Lab

pytestmark = pytest.mark.browser

TOKEN = "hf_typed_by_a_test"  # noqa: S105 - opens nothing
CELLS = """
import sys
sys.path.insert(0, {tests!r})
import workbench as wb
bench = wb.Workbench(wb.Recipe(
    model={model!r}, max_memory={{"cpu": "512MB"}}, workload=wb.Workload(context_length=128),
))
bench
"""


def fill(lab: Lab, name: str, value: str) -> None:
    field = part(lab, f"{name} input")
    field.fill(value)
    field.press("Tab")


def test_quantize_from_the_first_look_to_the_loaded_folder(lab: Lab, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    lab.open([CELLS.format(model=str(tiny_llama), tests=str(REPOSITORY / "tests"))])
    lab.run_all()
    lab.wait_python("bench._state.settle(0)", timeout=90)
    open_tab(lab, "Quantize")
    part(lab, "wb-quantize-why").filter(has_text="Pick gptq under Precision").wait_for(timeout=WAIT_MS)
    part(lab, "wb-precision").get_by_role("button", name="gptq").click()
    lab.wait_python("bench.recipe.precision.method", lambda method: method == "gptq")
    part(lab, "wb-group-size select").select_option("32")
    plan = part(lab, "wb-quantize-plan")
    plan.filter(has_text="✓ Fits: all of it is on cpu.").wait_for(timeout=WAIT_MS)
    assert "work, estimated" in plan.inner_text()

    # So much text that there is time to press Cancel, which leaves nothing.
    fill(lab, "wb-output", str(folder))
    fill(lab, "wb-sequence-length", "512")
    button(lab, "wb-quantize").click()
    part(lab, "wb-quantize-text").filter(has_text="model.layers.").wait_for(timeout=WAIT_MS)
    assert lab.evaluate("bench._state.activity") == "quantizing"
    button(lab, "wb-quantize-cancel").click()
    part(lab, "wb-quantize-text").filter(has_text="Quantizing was cancelled").wait_for(timeout=WAIT_MS)
    assert list(tmp_path.glob("*out*")) == []

    fill(lab, "wb-samples", "8")
    fill(lab, "wb-sequence-length", "64")
    lab.execute(
        "told = []\n"
        "bar, text = bench._quantize._job.bar, bench._quantize._job.text\n"
        "bar.observe(lambda change: told.append(change['new']), 'value')"
    )
    button(lab, "wb-quantize").click()
    report = part(lab, "wb-quantize-report")
    report.filter(has_text="✓ Quantized").wait_for(timeout=WAIT_MS)
    told = lab.evaluate("told")
    assert told == sorted(told)
    assert any(0 < value < 1000 for value in told)
    assert told[-1] == 1000
    made = lab.evaluate("[bench._quantize.report.folder, [m.name for m in bench._quantize.report.worst(2)]]")
    assert made[0] == str(folder)
    assert all(name in report.inner_text() for name in made[1])
    assert "Perplexity" in report.inner_text()
    chart = part(lab, "wb-quantize-chart .js-plotly-plot")
    chart.locator(".main-svg").first.wait_for(timeout=WAIT_MS)
    assert chart.evaluate("plot => plot.data.length") == 7  # a line for each kind of module

    # A token that is typed goes along with the press of the button, and is in no notebook that is saved.
    form = part(lab, "wb-push-form")
    form.get_by_label("Repository").fill("a/b/c")
    form.get_by_label("Token").fill(TOKEN)
    form.get_by_role("button", name="Push to the Hub").click()
    lab.page.get_by_role("alert").filter(has_text="is no name for a repository").wait_for(timeout=WAIT_MS)
    assert form.get_by_label("Token").input_value() == ""
    assert form.get_by_label("Private").is_checked()
    lab.command("docmanager:save")
    saved = [path.read_text() for path in lab.server.root.rglob("*.ipynb")]
    assert not any(TOKEN in text for text in saved)

    button(lab, "wb-skip-worst").click()
    lab.wait_python("bench.recipe.precision.skip_modules", lambda names: list(names) == made[1])
    button(lab, "wb-open-result").click()
    part(lab, "wb-stored").filter(has_text="quantized already: GPTQ 4-bit").wait_for(timeout=WAIT_MS)
    kernel = lab.page.get_by_role("combobox", name="Kernel")
    lab.page.wait_for_function("() => document.querySelectorAll('.wb-kernel option:disabled').length > 3")
    greyed = kernel.locator("option:disabled").all_inner_texts()
    assert any(text.startswith("exllama_v1: gptqmodel has no ExLlama v1") for text in greyed)
    kernel.select_option("torch")
    lab.wait_python("bench.recipe.precision.backend", lambda name: name == "torch")
    open_tab(lab, "Load")
    button(lab, "wb-load").click()
    part(lab, "wb-load-report").filter(has_text="Loaded as previewed").wait_for(timeout=WAIT_MS)
    assert "TorchLinear" in part(lab, "wb-load-report").inner_text()
