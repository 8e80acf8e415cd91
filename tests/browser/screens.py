"""Pictures of the workbench in eight states, dark and light, narrow and wide.

``python tests/browser/screens.py docs/screens`` makes all of them; names after the folder make those states alone.
Loading and quantizing are set up rather than caught in the act: they would be over before the fourth picture.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import chromium
import numpy as np
from lab import CHROMIUM_FLAGS, JupyterServer, Lab
from PIL import Image
from playwright.sync_api import sync_playwright

from workbench.model import fetch_demo_model

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_MS = 120_000
SIZES = {"narrow": 480, "wide": 1280}
_HERE = "bench = wb.Workbench()"
_THERE = """
import transformers
transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=4096, intermediate_size=14336, vocab_size=128256,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
).save_pretrained("Llama-8B")
workload = wb.Workload(context_length=8192, batch_size=4)
recipe = wb.Recipe(model="./Llama-8B", strategy="sequential", max_memory={budgets}, workload=workload)
bench = wb.Workbench(recipe, wb.Machine.preset("2x RTX 4090"))
"""
_OFFLOADS = _THERE.format(budgets="{0: '8GiB', 1: '5GiB', 'cpu': '40GiB'}")
_FULL = _THERE.format(budgets="{0: '8GiB', 1: '5GiB'}")
_EMPTY = (
    "from workbench.panels.state import State\n"
    "begin, State.start = State.start, lambda state: None\n"
    f"{_HERE}\nState.start = begin\nState.close = lambda state: None"
)
# State -> what the cell makes, what is done then in the kernel, and the tab that is open.
STATES = {
    "empty": (_EMPTY, "", "Load"),
    "fits": (_HERE, "bench._preview.hands.kinds.value = True", "Layers"),
    "offloads": (
        _OFFLOADS,
        """
bench._state.pin(bench.placement)
bench.recipe = bench.recipe.with_(max_memory={0: '6GiB', 1: '8GiB', 'cpu': '40GiB'})
bench._state.settle(60)
""",
        "What if",
    ),
    "does-not-fit": (_FULL, "", "Compare"),
    "loading": (
        _HERE,
        "bench._state.begin('loading'); bench._load._job.say('Reading weights: 118 of 272', 118 / 272)",
        "Load",
    ),
    "generating": (_HERE, "bench.session = wb.load(bench.recipe)", "Generate"),
    "quantizing": (
        "bench = wb.Workbench(wb.Recipe(precision=wb.GPTQ(group_size=64)))",
        """
bench._state.settle(60)
bench._quantize.output.value = 'SmolLM2-gptq'
bench._state.begin('quantizing')
bench._quantize._where.layout.display = 'none'  # a folder of this machine
bench._quantize._job.say('Layer 12 of 30: mlp.down_proj', 12 / 30)
""",
        "Quantize",
    ),
    "error": (_HERE, "bench._state.update(model='SmolLM3-135M'); bench._state.settle(60)", "Compare"),
}


def shoot(lab: Lab, state: str) -> Iterator[tuple[str, bytes]]:
    """Bring a page into a state and take its four pictures.

    Yields:
        The picture's name ("fits-dark-narrow") and the PNG.
    """
    lab.open([f"{cell_of(state)}\nbench"])
    lab.run_all()
    yield from pictures(lab, state)


def cell_of(state: str) -> str:
    """The program that begins a state; ``bench`` is to be shown."""
    return f"import workbench as wb\n{STATES[state][0]}"


def pictures(lab: Lab, state: str) -> Iterator[tuple[str, bytes]]:
    """The same for a page on which the state's cell has run."""
    _, then, tab = STATES[state]
    root = lab.page.locator(".wb-root")
    root.wait_for(timeout=WAIT_MS)
    if state != "empty":
        lab.page.locator(".wb-chart .main-svg").first.wait_for(timeout=WAIT_MS)
        lab.wait_python("bench._state.settle(0)", timeout=120)
    lab.execute(then, timeout=120)
    lab.page.get_by_role("tab", name=tab, exact=True).click()
    if state == "generating":
        lab.page.locator(".wb-prompt textarea").fill("Write a very long story about a king and his seven daughters.")
        lab.page.locator(".wb-max-new-tokens input").fill("4000")
        lab.page.locator(".wb-max-new-tokens input").press("Tab")
        lab.page.locator("button.wb-generate:enabled").click()
        lab.page.wait_for_function("() => document.querySelector('.wb-log').textContent.length > 200", timeout=WAIT_MS)
    if tab == "What if":
        lab.page.locator(".wb-sweep svg").wait_for(timeout=WAIT_MS)
    if tab == "Layers":
        lab.execute("bench._layers.tree.opened = ['model', 'model.layers', 'model.layers.0 to 15', 'model.layers.1']")
        lab.page.get_by_role("treeitem").nth(8).wait_for(timeout=WAIT_MS)
    lab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    for theme in ("light", "dark"):
        lab.set_theme(theme)
        for size, width in SIZES.items():
            lab.set_viewport(width, 2600)
            _rest(lab, state)
            yield f"{state}-{theme}-{size}", root.screenshot(scale="css")
    if state == "generating":
        lab.page.locator("button.wb-stop:enabled").click()
        lab.wait_python("bench._state.activity", lambda activity: activity == "", timeout=120)


def _rest(lab: Lab, state: str) -> None:
    """Wait until the page is laid out for its size and theme."""
    lab.page.mouse.move(1, 1)
    if state != "empty":
        lab.page.wait_for_function(
            """() => {
                const plot = document.querySelector(".wb-chart .js-plotly-plot");
                const dark = document.body.dataset.jpThemeLight === "false";
                return Math.abs(document.querySelector(".wb-chart").clientWidth - plot.layout.width) <= 1
                    && (plot.layout.font.color === "#d9d9d9") === dark;
            }""",
            timeout=WAIT_MS,
        )
    lab.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def smaller(png: bytes) -> bytes:
    """The same picture in its 256 most frequent colours: a third of the bytes, and flat areas stay as they are."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    colours, which, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    palette = colours[np.argsort(-counts, kind="stable")[:256]]
    nearest = (((colours[:, None].astype(int) - palette) ** 2).sum(-1)).argmin(1)
    picture = Image.fromarray(nearest[which].reshape(pixels.shape[:2]).astype(np.uint8), "P")
    picture.putpalette(palette.tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def main(folder: str, *states: str) -> None:
    """Make the pictures."""
    executable = chromium.find()
    if executable is None:
        sys.exit("The pictures need Chromium: `make test` gets one, or set WORKBENCH_CHROMIUM.")
    # What this machine has measured, and what its user keeps, is nothing for a picture.
    cache, demo = Path(tempfile.mkdtemp()), fetch_demo_model()
    (cache / demo.name).symlink_to(demo)
    os.environ["WORKBENCH_CACHE_DIR"] = str(cache)
    server = JupyterServer(Path(tempfile.mkdtemp()))
    server.wait()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
            for state in states or STATES:
                lab = Lab(server, browser)
                for name, png in shoot(lab, state):
                    (Path(folder) / f"{name}.png").write_bytes(smaller(png))
                lab.close()
                lab.assert_clean()
                sys.stdout.write(f"{state}\n")
    finally:
        server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
