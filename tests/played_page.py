"""Plays the browser to ipywidgets: finds controls as a page does, and sends the messages that a page sends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from workbench.panels.look import whole_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    import workbench as wb


def send(widget: Any, **state: Any) -> None:
    """What the browser sends when a control is used."""
    data = {"method": "update", "state": state, "buffer_paths": []}
    widget._handle_msg({"content": {"data": data}, "buffers": []})


def click(button: Any) -> None:
    """What the browser sends when a button is pressed; as there, one that is disabled sends nothing."""
    assert not button.disabled
    button._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "click"}}}, "buffers": []})


def choose(dropdown: Any, label: str) -> None:
    send(dropdown, index=list(dropdown.options).index(label))


def find(bench: wb.Workbench, name: str) -> Any:
    """The one control with a CSS class."""
    (found,) = {part for part in whole_tree(bench) if name in getattr(part, "_dom_classes", ())}
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
