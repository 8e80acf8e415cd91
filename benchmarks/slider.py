"""From a slider's movement in the browser to the redrawn chart, for a model of 671 billion parameters.

Measured in a real JupyterLab: how soon the workbench shows at all; single steps by key, each waited for; and five
seconds of dragging, in which every redrawing is compared with the moment at which the slider stood where the chart now
shows it. Times are the page's own.

``python benchmarks/slider.py`` prints the distributions; it needs Chromium, as the browser tests do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "browser"))

import chromium
from lab import CHROMIUM_FLAGS, JupyterServer, Lab
from playwright.sync_api import sync_playwright

PAINTS, STEPS, DRAG_SECONDS = 3, 60, 5.0
_CELL = """
import tempfile, transformers, workbench as wb
folder = tempfile.mkdtemp()
transformers.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16").save_pretrained(folder)
budgets = {**dict.fromkeys(range(8), "60GiB"), "cpu": "1900GiB"}
bench = wb.Workbench(wb.Recipe(model=folder, max_memory=budgets), wb.Machine.preset("8x A100 80 GB"))
bench
"""
# What the slider says and what the chart shows, each with the time at which it did.
_RECORD = """() => {
    const plot = document.querySelector(".wb-chart .js-plotly-plot");
    const handle = document.querySelector(".wb-memory-cuda-0 .noUi-handle");
    const texts = document.querySelector(".wb-texts");
    // The limits and texts of the layer over the figure, once the figure's bars are those that belong to them.
    const shown = () => {
        const bars = Array.from(plot.data.find((trace) => trace.name === "weights").x);
        const right = [...texts.children].every((line, row) => Math.abs(line.dataset.weights - bars[row]) < 1e-6);
        return right && Number(/limit (?:for weights )?([\\d.]+) GiB/.exec(texts.children[0].textContent)?.[1]);
    };
    const said = () => Number(Number(handle.getAttribute("aria-valuetext")).toFixed(1));
    const record = window.record = { moves: [], draws: [] };
    new MutationObserver(() => {
        const value = said();
        if (record.moves.at(-1)?.[1] !== value) record.moves.push([performance.now(), value]);
    }).observe(handle, { attributes: true, attributeFilter: ["aria-valuetext"] });
    const note = () => {
        const value = shown();
        if (value === false) return;
        requestAnimationFrame(() => {
            if (record.draws.at(-1)?.[1] !== value) record.draws.push([performance.now(), value]);
        });
    };
    plot.on("plotly_afterplot", note);
    new MutationObserver(note).observe(texts, { childList: true, subtree: true, characterData: true });
}"""
# From running the only cell of a notebook to all controls on the screen, and on to the figure.
_FIRST_PAINT = """async () => {
    const began = performance.now();
    window.jupyterapp.commands.execute("notebook:run-all-cells");
    const seen = (selector) => new Promise((done) => {
        const look = () => {
            if (document.querySelector(selector)?.getBoundingClientRect().height) done(performance.now() - began);
            else requestAnimationFrame(look);
        };
        look();
    });
    return [await seen(".wb-root button.wb-load"), await seen(".wb-root .wb-chart .main-svg")];
}"""
_CAUGHT_UP = "() => record.draws.length && record.moves.length && record.draws.at(-1)[1] === record.moves.at(-1)[1]"


def lags(record: dict[str, Any]) -> list[tuple[float, float]]:
    """For each redrawing its time, and how long ago the slider stood where it shows, both in ms."""
    found = []
    for drawn_at, value in record["draws"]:
        moved = [at for at, said in record["moves"] if said == value and at <= drawn_at]
        if moved:
            found.append((drawn_at, drawn_at - moved[-1]))
    return found


def told(name: str, values: list[float]) -> str:
    """A distribution in a line."""
    if len(values) < 2:
        return f"{name}: {len(values)} values"
    ranks = statistics.quantiles(values, n=20, method="inclusive")
    return (
        f"{name}: n={len(values)}, least {min(values):.0f}, median {statistics.median(values):.0f}, "
        f"p95 {ranks[18]:.0f}, most {max(values):.0f} ms"
    )


def first_paint(lab: Lab) -> None:
    """Print how long the workbench takes to show in a kernel that has imported nothing."""
    lab.open(["import workbench as wb\nbench = wb.Workbench()\nbench"])
    controls, figure = lab.page.evaluate(_FIRST_PAINT)
    print(f"first paint {controls:.0f} ms after the cell is run, the figure after {figure:.0f} ms")


def measure(lab: Lab) -> None:
    """Open the workbench on the large model, move its first slider, and print what came of it."""
    lab.open([_CELL])
    lab.run_all()
    lab.page.locator(".wb-chart .main-svg").first.wait_for(timeout=180_000)
    lab.wait_python("bench._state.settle(0)", timeout=180)
    handle = lab.page.locator(".wb-memory-cuda-0 .noUi-handle")
    handle.scroll_into_view_if_needed()
    lab.page.evaluate(_RECORD)

    handle.focus()
    for _ in range(STEPS):
        handle.press("ArrowRight")
        lab.page.wait_for_function(_CAUGHT_UP, polling=10, timeout=60_000)
    steps = [lag for _, lag in lags(lab.page.evaluate("() => record"))]
    print(told("single steps, movement to redrawn chart", steps))

    lab.wait_python("bench._state.settle(0)", timeout=180)
    lab.page.evaluate("() => { record.moves.length = record.draws.length = 0; }")
    grip, track = handle.bounding_box(), lab.page.locator(".wb-memory-cuda-0 .noUi-base").bounding_box()
    assert grip
    assert track
    y = grip["y"] + grip["height"] / 2
    lab.page.mouse.move(grip["x"] + grip["width"] / 2, y)
    lab.page.mouse.down()
    began = time.monotonic()
    while (share := (time.monotonic() - began) / DRAG_SECONDS) < 1:
        to_and_fro = abs(((share * 3) % 2) - 1)  # three sweeps
        lab.page.mouse.move(track["x"] + (0.15 + 0.7 * to_and_fro) * track["width"], y)
        lab.page.wait_for_timeout(8)
    lab.page.mouse.up()
    lab.page.wait_for_function(_CAUGHT_UP, timeout=60_000)
    record = lab.page.evaluate("() => record")
    dragged = lags(record)
    print(told(f"dragging for {DRAG_SECONDS:.0f} s, {len(record['moves'])} movements", [lag for _, lag in dragged]))
    first = dragged[0][0]
    for second in range(int(DRAG_SECONDS)):
        part = [lag for at, lag in dragged if second <= (at - first) / 1000 < second + 1]
        print(told(f"  second {second + 1}", part))
    last = record["draws"][-1][0] - record["moves"][-1][0]
    print(f"after the last movement the chart was right in {last:.0f} ms")


def plan_ms(lab: Lab) -> float:
    """What planning alone takes in that kernel, now: the median of twenty, in ms."""
    lab.execute(
        "import time, statistics\n"
        "def once(i):\n"
        "    recipe = bench.recipe.with_(max_memory={**budgets, 0: f'{40 + i}GiB'})\n"
        "    began = time.perf_counter()\n"
        "    wb.place(recipe, machine=bench.machine, skeleton=bench._state.skeleton, measure=False, advice=False)\n"
        "    return 1000 * (time.perf_counter() - began)\n",
        timeout=60,
    )
    return float(lab.evaluate("statistics.median([once(i) for i in range(20)])", timeout=120))


def main() -> None:
    """Measure, and say how busy the machine was."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    executable = chromium.find()
    if executable is None:
        sys.exit("This needs Chromium: `make test` gets one, or set WORKBENCH_CHROMIUM.")
    server = JupyterServer(Path(tempfile.mkdtemp()))
    server.wait()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
            print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
            for _ in range(PAINTS):
                lab = Lab(server, browser)
                first_paint(lab)
                lab.close()
            lab = Lab(server, browser)
            measure(lab)
            print(f"of which planning takes {plan_ms(lab):.0f} ms (median)")
            print(f"load average {os.getloadavg()[0]:.1f}")
            lab.assert_clean()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
