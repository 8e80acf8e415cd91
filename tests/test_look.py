"""The figures in docs/look.md are those of the colours that are drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workbench.panels.picture import MODULE_KINDS, device_colour, device_pattern

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "look.md").read_text(encoding="utf-8")
CSS = (ROOT / "workbench" / "panels" / "style.css").read_text(encoding="utf-8")
WHITE, DARK = "#FFFFFF", "#212121"
HATCHINGS = {"none": "", "vertical": "|"}
DEVICES = {
    **{f"cuda:{i}": i for i in range(8)},
    "cuda:0, mps": 0,
    "cpu": "cpu",
    "disk": "disk",
    "no room": None,
}


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """WCAG 2's contrast ratio, 1 to 21."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| ([^|]+) \| (#\w{6}) \| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    return {name: rest for name, *rest in rows}


def test_the_ratio_is_the_one_that_everybody_computes() -> None:
    assert contrast("#000000", WHITE) == pytest.approx(21)
    assert contrast("#767676", WHITE) == pytest.approx(4.54, abs=0.005)


def test_every_colour_is_stated_with_its_hatching_and_its_contrast() -> None:
    stated = table()
    drawn = {name: (device_colour(DEVICES[name]), device_pattern(DEVICES[name])) for name in stated if name in DEVICES}
    assert len(drawn) == 11
    drawn |= MODULE_KINDS
    assert set(stated) == set(drawn)
    for name, (colour, hatching, on_white, on_dark) in stated.items():
        assert (colour, HATCHINGS.get(hatching, hatching)) == drawn[name], name
        assert float(on_white) == pytest.approx(contrast(colour, WHITE), abs=0.06), name
        assert float(on_dark) == pytest.approx(contrast(colour, DARK), abs=0.06), name
    assert device_colour("mps") == device_colour(0)


def test_what_is_weak_on_one_ground_has_an_outline_that_is_not() -> None:
    for ground in (WHITE, DARK):
        assert contrast("#808080", ground) >= 3  # what WCAG asks of graphics
    assert '"color": "#808080"' in (ROOT / "workbench" / "panels" / "chart.py").read_text(encoding="utf-8")
    assert "#808080 (3.9 to 1 on white, 4.1 to 1 on dark)" in TEXT


@pytest.mark.parametrize("name", ["good", "warn", "bad"])
def test_words_in_colour_can_be_read_on_both_grounds(name: str) -> None:
    light, dark = re.findall(rf"--wb-{name}: (#\w{{6}})", CSS)
    assert contrast(light, WHITE) >= 4.5
    assert contrast(dark, DARK) >= 4.5
    assert f"| {light} | {dark} |" in TEXT
