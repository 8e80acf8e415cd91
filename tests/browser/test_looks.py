"""What it looks like: two of the pictures in docs/screens, and axe-core over the workbench's own part of the page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import axe_playwright_python
import pytest
from PIL import Image
from screens import SIZES, cell_of, pictures, smaller
from test_hands import show
from test_main_job import WAIT_MS, open_tab, part, settled

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("state", ["offloads", "error"])
def test_pictures_are_as_wide_as_their_page_and_differ_by_theme(shared: Lab, state: str) -> None:
    show(shared, cell_of(state))
    found = {}
    for name, png in pictures(shared, state):
        picture = Image.open(io.BytesIO(smaller(png))).convert("L")
        found[name.removeprefix(f"{state}-")] = picture
    assert list(found) == ["light-narrow", "light-wide", "dark-narrow", "dark-wide"]
    for name, picture in found.items():
        width = SIZES[name.partition("-")[2]]
        assert width - 250 < picture.width <= width
        corner = picture.getpixel((8, 8))
        assert isinstance(corner, int)
        assert (corner > 200) == name.startswith("light")
    assert found["light-narrow"].height > 1.5 * found["light-wide"].height


_SERIOUS = """async () => (await axe.run(".wb-root", { resultTypes: ["violations"] })).violations
    .filter((each) => ["serious", "critical"].includes(each.impact))
    .flatMap((each) => each.nodes.map((node) => `${each.id}: ${node.html.slice(0, 160)}`))"""


def test_axe_finds_nothing_serious(shared: Lab) -> None:
    lab = shared
    show(lab, "import workbench as wb\nbench = wb.Workbench()")
    part(lab, "wb-chart .main-svg").first.wait_for(timeout=WAIT_MS)
    lab.wait_python("bench._state.settle(0)", timeout=90)
    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js")
    lab.page.evaluate(axe.read_text(encoding="utf-8"))
    lab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    tabs, found = part(lab, "wb-tabs").get_by_role("tab").all_inner_texts(), []
    assert {"Load", "Layers", "What if", "Code"} <= set(tabs)
    for size, width in SIZES.items():
        lab.set_viewport(width, 1000)
        settled(lab)
        for theme in ("light", "dark"):
            lab.set_theme(theme)
            for tab in tabs:
                open_tab(lab, tab)
                if tab == "What if":
                    part(lab, "wb-sweep svg").wait_for(timeout=WAIT_MS)
                found += [f"{size}, {theme}, {tab}: {each}" for each in lab.page.evaluate(_SERIOUS)]
    assert found == [], "\n".join(dict.fromkeys(found))
