"""Long work of a panel: in the worker's thread, with a bar, a line of text, and a way to stop it."""

from __future__ import annotations

import threading
import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.panels.look import classed, html
from workbench.panels.state import as_sentence
from workbench.session import Cancelled, worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from workbench.panels.state import State
    from workbench.session import Progress

_APART_SECONDS = 0.05  # between messages to the browser: more than 20 a second only fill queues
_STEPS = 1000


class Job:
    """One piece of work at a time. A loaded model goes first: there may be no room for two.

    Args:
        state: The state.
        panel: Where errors are shown.
        cancelled: What is said of work that was cancelled.
        tip: The bar's tooltip.

    Attributes:
        bar: How much is done.
        text: What is being done.
        cancel: Set it to stop the work.
        running: The work, or the last one.
    """

    def __init__(self, state: State, panel: str, *, cancelled: str, tip: str) -> None:
        self._state, self._panel, self._cancelled = state, panel, cancelled
        self._told: tuple[float, str] = (0.0, "")  # when progress was last shown, and of which stage
        self.cancel = threading.Event()
        self.doing = ""  # the last step, in words
        self.running: Future[None] | None = None
        bar = w.IntProgress(min=0, max=_STEPS, tooltip=tip)
        self.bar: Any = classed(bar, "wb-progress", f"wb-{panel}-progress")
        self.text: Any = html("wb-note", f"wb-{panel}-text")

    def start(
        self,
        work: Callable[[], None],
        prepare: Callable[[], None] = lambda: None,
        *,
        beside: bool = False,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """Work for the activity that has been begun; it ends with the work, also if that cannot even start.

        Args:
            work: Done in the worker's thread.
            prepare: Done here, before.
            beside: Leave loaded models where they are.
            failed: Told of an error, before it is shown.
        """
        try:
            self.cancel, self.doing = threading.Event(), ""
            prepare()
            self.running = worker().submit(self._run, work, failed, beside=beside)
        except BaseException:
            self._state.end()
            raise

    def close(self) -> None:
        """Cancel what is going on and wait for it."""
        self.cancel.set()
        if self.running is not None:
            self.running.exception()

    def _run(self, work: Callable[[], None], failed: Callable[[Exception], None], *, beside: bool) -> None:
        state = self._state
        try:
            self.say("Starting ...", 0.0)
            while not beside and (before := state.session) is not None:
                state.hold(None)
                before.unload()
            work()
            self.say("", 1.0)
        except Cancelled:
            self.say(self._cancelled, 0.0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            self.say("", 0.0)
            failed(error)
            state.report(self._panel, as_sentence(error))
        finally:
            state.end()

    def progress(self, progress: Progress) -> None:
        """Show how far it is, unless that was shown a moment ago."""
        now, (told_at, stage) = time.monotonic(), self._told
        minor = progress.stage == stage and progress.done != progress.total and now - told_at < _APART_SECONDS
        if minor or self.cancel.is_set():
            return
        self._told, self.doing = (now, progress.stage), progress.text
        self.say(progress.text, progress.done / progress.total if progress.total else None)

    def say(self, text: str, share: float | None) -> None:
        """Show a text, and how much is done (0 to 1; None leaves the bar as it is)."""
        if share is not None:
            self.bar.value = int(_STEPS * share)
        self.text.value = f'<div role="status">{escape(text)}</div>' if text else ""
