"""What was said in a conversation, with a button at each thing that can be said otherwise."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.panels.look import classed, close_tree, html

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.answering import Messages


class History:
    """The turns of a chat; the last answer is shown elsewhere, where it streams.

    Args:
        edit: Called with the number and the text of a message that is to be said otherwise.

    Attributes:
        box: What is shown.
    """

    def __init__(self, edit: Callable[[int, str], None]) -> None:
        self._edit = edit
        self._shown: Messages = []
        self.box: Any = classed(w.VBox([]), "wb-history")

    def show(self, messages: Messages) -> None:
        """Show messages, all but an answer at the end."""
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages == self._shown:
            return
        self._shown, old = list(messages), self.box.children
        self.box.children = [self._row(index, message) for index, message in enumerate(messages)]
        close_tree(*old)

    def _row(self, index: int, message: dict[str, str]) -> Any:
        asked = message["role"] == "user"
        who = "You" if asked else "Model"
        text = html("wb-said-text", value=f"<div><b>{who}:</b> {escape(message['content'])}</div>")
        if not asked:
            return text
        button = classed(
            w.Button(description="Edit", tooltip=f"Say something else here: {message['content'][:60]}"),
            "wb-edit",
            "wb-tool",
        )
        button.on_click(lambda _: self._edit(index, message["content"]))
        return classed(w.HBox([button, text]), "wb-advice-row")
