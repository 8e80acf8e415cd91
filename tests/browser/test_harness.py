from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.browser

SLIDER = """
import ipywidgets as w
slider = w.IntSlider(value=40, min=0, max=100, description="share")
slider.add_class("wb-share")
slider
"""


def test_a_slider_moves_python_by_keyboard_and_by_mouse_and_survives_a_reload(lab: Lab) -> None:
    lab.open([SLIDER])
    lab.run_all()
    lab.page.locator(".wb-share .noUi-handle").press("ArrowRight")
    assert lab.wait_python("slider.value", lambda value: value != 40) == 41

    lab.drag_slider(".wb-share", 0.75)
    lab.wait_python("slider.value", lambda value: 73 <= value <= 77)

    lab.reload()
    readout = lab.page.locator(".wb-share .widget-readout")
    readout.wait_for()
    assert int(readout.inner_text()) == lab.evaluate("slider.value")
    lab.page.locator(".wb-share .noUi-handle").press("Home")
    assert lab.wait_python("slider.value", lambda value: value < 70) == 0


def test_the_kernel_holds_the_checkout_and_answers_with_plain_values(lab: Lab) -> None:
    lab.open(["limits = {0: '20GiB', 'cpu': None}\nlate = []"])
    lab.run_all()
    assert lab.evaluate("limits") == {0: "20GiB", "cpu": None}
    assert lab.evaluate("__import__('os').environ['HF_HUB_OFFLINE']") == "1"
    import workbench

    assert lab.evaluate("__import__('workbench').__path__[0]") == next(iter(workbench.__path__))
    lab.execute("import threading; threading.Timer(0.2, late.append, (1,)).start()")
    assert lab.wait_python("late") == [1]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        lab.evaluate("1 / 0")
    with pytest.raises(ValueError, match="is no literal"):
        lab.evaluate("object()")
    with pytest.raises(TimeoutError, match=r"late is still \[1\]"):
        lab.wait_python("late", lambda value: len(value) > 1, timeout=0.2)


def test_what_goes_wrong_in_the_page_fails_the_test(lab: Lab) -> None:
    lab.open(["1 / 0"])
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        lab.run_all()
    lab.assert_clean()

    with lab.page.expect_console_message():
        lab.page.evaluate("console.error('planted')")
    with pytest.raises(AssertionError, match="planted"):
        lab.assert_clean()
    lab.console_errors.clear()

    with lab.page.expect_event("requestfailed"):
        lab.page.evaluate("fetch('http://elsewhere.invalid/').catch(() => null)")
    with pytest.raises(AssertionError, match=r"elsewhere\.invalid"):
        lab.assert_clean()
    lab.console_errors.clear()
    lab.foreign_requests.clear()


def test_the_theme_and_the_size_of_the_page_can_be_set(lab: Lab) -> None:
    lab.open(["1"])
    background = "() => getComputedStyle(document.body).getPropertyValue('--jp-layout-color1').trim()"
    light = lab.page.evaluate(background)
    lab.set_theme("dark")
    lab.page.wait_for_function(f"light => ({background})() !== light", arg=light)
    lab.set_theme("light")
    lab.page.wait_for_function(f"light => ({background})() === light", arg=light)
    lab.set_viewport(800, 600)
    assert lab.page.evaluate("[innerWidth, innerHeight]") == [800, 600]
