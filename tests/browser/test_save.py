"""Skip modules are chosen by clicking, the preview follows, and what is loaded is saved and loaded again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from test_main_job import WAIT_MS, button, open_tab, part, verdict

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Lab

pytestmark = pytest.mark.browser

LOGITS = """
import torch
def logits():
    with torch.inference_mode():
        return bench.session.model((torch.arange(40) * 7 % 500)[None]).logits.clone()
"""


def total(lab: Lab) -> int:
    lab.wait_python("bench._state.settle(0)", timeout=60)
    size: int = lab.evaluate("bench.placement.total_bytes")
    return size


def test_modules_are_picked_saved_and_loaded_again(lab: Lab, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = f"wb.Recipe(model={str(tiny_llama)!r}, workload=wb.Workload(context_length=128))"
    lab.open([f"import workbench as wb\nbench = wb.Workbench({recipe})\nbench"])
    lab.run_all()
    verdict(lab, "Fits")
    part(lab, "wb-precision").get_by_role("button", name="int8").click()
    lab.wait_python("bench.recipe.precision.method", lambda method: method == "int8")
    before = total(lab)

    # By full name, in the list: one 64 x 128 matrix stays bfloat16 in place of int8 with a scale for each of 64 rows.
    part(lab, "wb-skip-modules").get_by_text("Single modules: 1 of 15 stay as they are").click()
    part(lab, "wb-skip-find input").fill("layers.1.*down")
    options = part(lab, "wb-skip-list option")
    lab.page.wait_for_function("() => document.querySelectorAll('.wb-skip-list option').length === 1")
    options.first.click()
    down = "model.layers.1.mlp.down_proj"
    assert lab.wait_python("bench.recipe.precision.skip_modules", bool) == ("lm_head", down)
    assert total(lab) - before == 2 * 64 * 128 - (64 * 128 + 4 * 64)
    # And by kind, with a button: two more of 32 x 64.
    part(lab, "wb-skip").get_by_role("button", name="k_proj x2").click()
    lab.wait_python("bench.recipe.precision.skip_modules", lambda names: names == ("lm_head", down, "k_proj"))
    chosen = total(lab)
    assert chosen - before == 64 * 128 - 4 * 64 + 2 * (32 * 64 - 4 * 32)
    part(lab, "wb-skip-modules").get_by_text("Single modules: 4 of 15 stay as they are").wait_for()

    button(lab, "wb-load").click()
    part(lab, "wb-load-report").filter(has_text="Loaded as previewed").wait_for(timeout=WAIT_MS)
    lab.execute(f"{LOGITS}\nfirst = logits()")
    folder = tmp_path / "saved"
    part(lab, "wb-save-folder input").fill(str(folder))
    part(lab, "wb-save-folder input").press("Tab")
    button(lab, "wb-save").click()
    part(lab, "wb-save-said").filter(has_text="Saved").wait_for(timeout=WAIT_MS)
    button(lab, "wb-save-open").click()
    part(lab, "wb-stored").filter(has_text="bitsandbytes int8").wait_for(timeout=WAIT_MS)
    assert total(lab) == chosen
    button(lab, "wb-load").click()
    lab.wait_python("str(bench.session and bench.session.recipe.model)", lambda name: name == str(folder), timeout=60)
    assert lab.evaluate("bench.session.load_report.matches and torch.equal(first, logits())")

    open_tab(lab, "Outliers")
    button(lab, "wb-outliers-measure").click()
    part(lab, "wb-outliers-chart .main-svg").first.wait_for(timeout=WAIT_MS)
    open_tab(lab, "Adapter")
    part(lab, "wb-adapter-texts textarea").fill("What is it? => A test.")
    part(lab, "wb-adapter-steps input").fill("5")
    part(lab, "wb-adapter-steps input").press("Tab")
    part(lab, "wb-adapter-plan").filter(has_text="Training takes").wait_for(timeout=WAIT_MS)
    button(lab, "wb-adapter-train").click()
    part(lab, "wb-adapter-report").filter(has_text="the loss went from").wait_for(timeout=WAIT_MS)
    part(lab, "wb-adapter-chart .main-svg").first.wait_for(timeout=WAIT_MS)
    assert lab.evaluate("bench.session.adapters.active") == "adapter"
