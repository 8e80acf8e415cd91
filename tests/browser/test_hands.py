"""Hands in the picture, as a person has them: each action is done in the page, and Python is asked what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from test_main_job import WAIT_MS, button, open_tab, part, settled

if TYPE_CHECKING:
    from lab import Lab
    from playwright.sync_api import Locator

pytestmark = pytest.mark.browser

CELL = """
import workbench as wb
bench = wb.Workbench(
    wb.Recipe(strategy="sequential", max_memory={0: "150MiB", "cpu": "4GiB"}), wb.Machine.preset("RTX 4090")
)
bench
"""
HOMES = "[layer.device for layer in bench.placement.layers]"


@pytest.fixture
def lab(shared: Lab) -> Lab:
    """In place of a page for each test."""
    return shared


def start(lab: Lab, cell: str = CELL) -> None:
    show(lab, cell)
    part(lab, "wb-chart .main-svg").first.wait_for(timeout=WAIT_MS)
    lab.wait_python("bench._state.settle(0)", timeout=90)
    settled(lab)
    part(lab, "wb-chart").scroll_into_view_if_needed()


def show(page: Lab, cell: str) -> None:
    """Run a cell in a page that other tests have used; ``bench`` is shown in place of theirs."""
    page.execute(f"before, cell = globals().get('bench'), {cell!r}")
    page.run_all()
    page.execute("if before is not None: before.close()")


def middle(lab: Lab, index: int) -> tuple[float, float]:
    """Where a layer's block is on the screen."""
    box = lab.page.locator(".wb-block").nth(index).bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.8


def menu(lab: Lab, device: str) -> Locator:
    return lab.page.get_by_role("menuitem", name=f"Move to {device}")


def homes(lab: Lab, *indices: int, are: Any) -> None:
    lab.wait_python(HOMES, lambda found: all(found[i] == are for i in indices))


def drawn(lab: Lab) -> None:
    """The figure and the layer over it show what Python holds."""
    colours = lab.evaluate("[block.colour for block in bench._preview._spec(bench.placement).blocks]")
    lab.page.wait_for_function(
        """colours => {
            const traces = document.querySelector(".wb-chart .js-plotly-plot").data;
            const shown = traces.find((trace) => trace.name === "layers").marker.color;
            return JSON.stringify(Array.from(shown)) === JSON.stringify(colours);
        }""",
        arg=colours,
    )


def test_layers_are_moved_by_mouse_and_steps_undone(lab: Lab) -> None:
    start(lab)
    before = lab.evaluate(HOMES)
    assert before[3] == 0
    lab.page.mouse.move(*middle(lab, 3))
    tip = lab.page.locator(".wb-tip")
    tip.wait_for()
    assert "model.layers.2" in tip.inner_text()
    assert f"{lab.evaluate('bench.placement.layers[3].bytes_after'):,} bytes" in tip.inner_text()

    # One block, by its menu.
    lab.page.mouse.click(*middle(lab, 3))
    menu(lab, "cpu").click()
    homes(lab, 3, are="cpu")
    assert lab.evaluate("bench.recipe.strategy") == "custom"
    drawn(lab)
    part(lab, "wb-hand-said").filter(has_text="Moved model.layers.2").wait_for()

    # A range: click, then shift-click.
    lab.page.mouse.click(*middle(lab, 5))
    lab.page.keyboard.press("Escape")
    lab.page.keyboard.down("Shift")
    lab.page.mouse.click(*middle(lab, 8))
    lab.page.keyboard.up("Shift")
    assert lab.page.locator('.wb-block[aria-selected="true"]').count() == 4
    menu(lab, "cpu").click()
    homes(lab, 5, 6, 7, 8, are="cpu")

    # A range: dragged over.
    lab.page.mouse.move(*middle(lab, 5))
    lab.page.mouse.down()
    lab.page.mouse.move(*middle(lab, 7), steps=5)
    lab.page.mouse.up()
    menu(lab, "cuda:0").click()
    homes(lab, 5, 6, 7, are=0)
    homes(lab, 8, are="cpu")
    assert [lab.evaluate(HOMES)[i] for i in (0, 1, 2, 4)] == [before[i] for i in (0, 1, 2, 4)]
    drawn(lab)

    # The code follows, and every step goes back.
    open_tab(lab, "Code")
    part(lab, "wb-code-text").filter(has_text="'model.layers.7': 'cpu'").wait_for()
    for _ in range(3):
        part(lab, "wb-undo").click()
    lab.wait_python("bench.recipe.strategy", lambda word: word == "sequential")
    assert lab.evaluate(HOMES) == before
    for _ in range(3):
        part(lab, "wb-redo").click()
    homes(lab, 8, are="cpu")
    part(lab, "wb-auto").click()
    lab.wait_python("bench.recipe.strategy", lambda word: word == "auto")
    assert lab.evaluate("bench.recipe.device_map") is None
    drawn(lab)


def test_layers_are_moved_by_keyboard_alone(lab: Lab) -> None:
    start(lab)
    layers = lab.page.get_by_role("listbox", name="Layers")
    cells = lab.page.locator(".jp-Cell").count()
    layers.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight"):
        layers.press(key)
    active = layers.get_attribute("aria-activedescendant")
    assert (
        lab.page.locator(f"#{active}").get_attribute("aria-label", timeout=2000).startswith("model.layers.3 on cuda:0")
    )
    spoken = lab.page.locator('.wb-said[aria-live="polite"]')
    assert spoken.inner_text() == "3 layers, model.layers.1 to model.layers.3 selected"
    layers.press("c")
    homes(lab, 2, 3, 4, are="cpu")
    heard = lab.page.locator('.wb-hand-said [aria-live="polite"]')
    heard.filter(has_text="Moved 3 layers").wait_for()
    layers.press("0")
    homes(lab, 2, 3, 4, are=0)
    layers.press("Control+z")
    homes(lab, 2, 3, 4, are="cpu")
    layers.press("Control+y")
    homes(lab, 2, 3, 4, are=0)
    layers.press("Enter")
    first = menu(lab, "cuda:0")
    first.wait_for()
    lab.page.keyboard.press("ArrowDown")
    lab.page.keyboard.press("Enter")
    homes(lab, 2, 3, 4, are="cpu")
    # d and x are JupyterLab's own keys for cells.
    layers.press("d")
    part(lab, "wb-error").filter(has_text="tick the device first").wait_for()
    layers.press("x")
    layers.press("Escape")
    assert lab.page.locator('.wb-block[aria-selected="true"]').count() == 0
    assert lab.page.locator(".jp-Cell").count() == cells


def test_a_limit_is_dragged_in_the_chart_and_by_keys(lab: Lab) -> None:
    start(lab)
    limit = lab.page.get_by_role("slider", name="Limit for weights on cpu")
    grip = limit.bounding_box()
    assert grip
    x, y = grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2
    lab.page.mouse.move(x, y)
    lab.page.mouse.down()
    lab.page.mouse.move(x + 200, y, steps=12)
    lab.page.mouse.up()
    # The handle, the slider on the left and Python agree on where it was let go.
    said = float(limit.get_attribute("aria-valuenow") or 0)
    assert said > 8
    lab.wait_python("float(bench.recipe.max_memory['cpu'].removesuffix('GiB'))", lambda gib: abs(gib - said) < 0.01)
    slider = part(lab, "wb-memory-cpu .noUi-handle")
    lab.page.wait_for_function(
        "gib => Math.abs(document.querySelector('.wb-memory-cpu .noUi-handle').getAttribute('aria-valuetext') - gib)"
        " < 0.01",
        arg=said,
    )
    assert slider.count() == 1
    limit.press("Home")
    lab.wait_python("bench.recipe.max_memory['cpu']", lambda size: size == "0GiB")
    limit.press("ArrowRight")
    lab.wait_python("bench.recipe.max_memory['cpu']", lambda size: size == "0.1GiB")
    assert limit.get_attribute("aria-valuetext") == "102 MiB"
    slider.press("ArrowRight")  # and the other way round
    lab.page.wait_for_function(
        "() => document.querySelector('.wb-limit-cpu').getAttribute('aria-valuetext') === '205 MiB'"
    )


def test_what_if_compare_and_the_tree(lab: Lab) -> None:
    start(lab)
    part(lab, "wb-pin").click()
    lab.wait_python("bench._state.pinned is not None")
    open_tab(lab, "What if")
    part(lab, "wb-sweep").get_by_role("img", name="At 150 MiB of cuda:0: est.").wait_for(timeout=WAIT_MS)
    context = lab.page.get_by_role("slider", name="Context")
    context.press("ArrowLeft")
    lab.wait_python("bench.recipe.workload.context_length", lambda tokens: tokens == 1984)
    part(lab, "wb-precision").get_by_role("button", name="nf4").click()
    lab.wait_python("bench.recipe.precision.method", lambda method: method == "4bit")
    open_tab(lab, "Compare")
    part(lab, "wb-pinned").filter(has_text="nf4").wait_for(timeout=WAIT_MS)
    # A ghost on each bar, as wide as Python says; and behind each layer its size as it was.
    ghosts = lab.page.locator(".wb-ghost")
    lab.wait_python("bench._state.settle(0)", timeout=90)
    shares = lab.evaluate("[bar['pinned'] for bar in bench._preview.hands.touch.picture['bars']]")
    lab.page.wait_for_function(
        """shares => {
            const seen = [...document.querySelectorAll(".wb-ghost")].map((each) => parseFloat(each.style.width));
            return seen.length === shares.length
                && seen.every((wide, i) => Math.abs(wide - 100 * shares[i] / 1.004) < 0.1);
        }""",
        arg=shares,
    )
    assert ghosts.count() == 2
    before = lab.evaluate("[layer.bytes_after for layer in bench._state.pinned.layers]")
    outlines = lab.page.evaluate(
        """() => {
            const traces = document.querySelector(".wb-chart .js-plotly-plot").data;
            const trace = traces.find((each) => each.name === "pinned");
            return trace.visible && Array.from(trace.y);
        }"""
    )
    assert outlines == pytest.approx([size / 2**20 for size in before])
    part(lab, "wb-pin").filter(has_text="Unpin").click()
    lab.wait_python("bench._state.pinned is None")
    ghosts.first.wait_for(state="detached")

    open_tab(lab, "Layers")
    lab.page.get_by_role("tree").wait_for()
    lab.page.get_by_role("treeitem", name="model, cuda:0").first.wait_for()
    lab.page.get_by_label("Search modules").fill("layers.29.mlp.up")
    lab.page.get_by_role("treeitem", name="model.layers.29.mlp.up_proj,").first.wait_for()
    lab.wait_python("bench._layers.tree.search", lambda text: text == "layers.29.mlp.up")
    assert lab.page.get_by_role("treeitem").count() < 10
    lab.page.get_by_label("Search modules").fill("")
    lab.page.get_by_role("treeitem").nth(5).wait_for(state="detached")
    tree = lab.page.get_by_role("tree")
    tree.focus()
    tree.press("Home")
    tree.press("ArrowRight")
    lab.page.get_by_role("treeitem", name="model.layers,").wait_for()
    assert lab.evaluate("bench._layers.tree.opened") == ["model"]


def test_a_machine_of_ones_own_and_the_context_at_which_it_spills(lab: Lab) -> None:
    start(lab)
    part(lab, "wb-own").get_by_text("A machine of your own").click()
    for name, number in (("gpus", "1"), ("gpu-gib", "1.5"), ("ram-gib", "16")):
        field = part(lab, f"wb-own-{name} input")
        field.fill(number)
        field.press("Tab")
    part(lab, "wb-own-use").click()
    lab.wait_python("bench.machine.name", lambda name: name == "My machine")
    assert lab.evaluate("[(d.id, d.total_bytes) for d in bench.machine.devices][:2]") == [
        (0, 3 * 2**29),
        ("cpu", 16 * 2**30),
    ]
    assert part(lab, "wb-machine select").input_value().replace("\xa0", " ") == "My machine"
    lab.wait_python(
        "(bench._state.settle(0), bench.placement.verdict)", lambda told: told == (True, "fits"), timeout=90
    )
    open_tab(lab, "What if")
    growth = part(lab, "wb-growth")
    growth.get_by_text("spills past").wait_for(timeout=WAIT_MS)
    lab.execute("from workbench.panels.curves import context_growth")
    longest = lab.evaluate("context_growth(bench.placement, bench._state.skeleton).longest")
    assert 2048 < longest < 8192
    assert growth.get_by_role("img", name=f"up to {longest:,} tokens; then cuda:0 is overfull").count() == 1
    mark, now = (growth.locator(f".wb-svg-{name}").bounding_box() for name in ("mark", "now"))
    assert mark
    assert now
    assert mark["x"] > now["x"]
    # The context grown past that mark: Python finds that it does not fit.
    lab.page.get_by_role("slider", name="Context").press("End")
    lab.wait_python("bench.recipe.workload.context_length", lambda tokens: tokens == 8192)
    lab.wait_python("bench.placement.verdict", lambda word: word == "does_not_fit")
    part(lab, "wb-verdict").filter(has_text="cuda:0 is short by").wait_for()
    # Another device's budget is swept on demand.
    lab.page.get_by_label("Budget of").select_option("cpu")
    part(lab, "wb-sweep").get_by_role("img", name="of cpu:").wait_for(timeout=WAIT_MS)


LARGE = """
import tempfile, transformers, workbench as wb
folder = tempfile.mkdtemp()
transformers.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16").save_pretrained(folder)
bench = wb.Workbench(wb.Recipe(model=folder), wb.Machine.preset("8x A100 80 GB"))
bench
"""


def test_experts_are_opened_on_demand(lab: Lab) -> None:
    start(lab, LARGE)
    open_tab(lab, "Layers")
    path, opened = "", []
    for part_of in ("model", "layers", "0 to 15", "3", "mlp", "experts"):
        opened.append(f"{path}.{part_of}".removeprefix("."))
        lab.page.get_by_role("treeitem", name=f"{opened[-1]},").click()
        lab.wait_python("bench._layers.tree.opened", lambda paths: paths == opened)
        if " to " not in part_of:
            path = opened[-1]
    # 256 experts of two projections of 2,048 x 7,168 each, in bfloat16: 14 GiB.
    lab.page.get_by_role("treeitem", name="model.layers.3.mlp.experts.gate_up_proj,").filter(
        has_text="14.0 GiB"
    ).wait_for()
    assert 20 < lab.page.get_by_role("treeitem").count() < 60
    part(lab, "wb-kinds").click()
    lab.page.wait_for_function(
        """() => {
            const traces = document.querySelector(".wb-chart .js-plotly-plot").data;
            const experts = traces.find((trace) => trace.name === "experts");
            return experts.visible === true && experts.y[4] > 21;
        }"""
    )
    assert lab.evaluate("bench._preview.hands.kinds.value")


def test_measured_stands_on_predicted_and_memory_moves_while_it_talks(lab: Lab) -> None:
    start(lab, "import workbench as wb\nbench = wb.Workbench()\nbench")
    assert lab.page.locator(".wb-live, .wb-measured").count() == 0
    button(lab, "wb-load").click()
    lab.page.locator(".wb-measured").wait_for(state="attached", timeout=WAIT_MS)
    weights = lab.evaluate("bench.session.load_report.measured_bytes['cpu']")
    assert weights == lab.evaluate("bench.placement.memory['cpu'].weight_bytes")
    traces = "document.querySelector('.wb-chart .js-plotly-plot').data"
    lab.page.locator(".wb-bar-text").filter(has_text="(as foretold)").wait_for()
    ends, stands = lab.page.evaluate(
        f"() => [100 * {traces}[0].x[0] / 1.004, parseFloat(document.querySelector('.wb-measured').style.left)]"
    )
    assert stands == pytest.approx(ends, abs=0.01)

    open_tab(lab, "Generate")
    part(lab, "wb-prompt textarea").fill("Write a very long story about a king and his seven daughters.")
    part(lab, "wb-max-new-tokens input").fill("4000")
    part(lab, "wb-max-new-tokens input").press("Tab")
    button(lab, "wb-generate").click()
    lab.wait_python("bench._state.activity", lambda activity: activity == "generating")
    # Whatever memory the process takes meanwhile shows in the picture.
    place = "parseFloat(document.querySelector('.wb-live').style.left)"
    wide = lab.evaluate("bench._preview.hands.touch.picture['bars'][0]['width_bytes']")
    before = lab.page.evaluate(f"() => {place}")
    lab.execute("ballast = b'x' * (300 * 2**20)")
    lab.page.wait_for_function(f"far => {place} > far", arg=before + 100 * 250 * 2**20 / wide, timeout=WAIT_MS)
    assert lab.evaluate("bench._state.activity") == "generating"
    button(lab, "wb-stop").click()
    lab.wait_python("bench._state.activity", lambda activity: activity == "")
    lab.wait_python("bench._preview._live._thread is None")
    size, said = lab.evaluate("bench._preview.hands.touch.live['cpu']")
    lab.page.wait_for_function("said => document.querySelector('.wb-live').title === said", arg=said)
    assert said.endswith("in this process")
    assert lab.page.evaluate(f"() => {place}") == pytest.approx(100 * size / wide / 1.004, abs=0.01)
    open_tab(lab, "Load")
    button(lab, "wb-unload").click()
    lab.page.locator(".wb-live").wait_for(state="detached", timeout=WAIT_MS)
    assert lab.evaluate("bench._preview.hands.touch.live") == {}
