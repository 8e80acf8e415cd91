"""Memory as it is, beside memory as it was foretold, while something goes on."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil

from workbench.hardware import device_label, format_bytes

if TYPE_CHECKING:
    from workbench.panels.state import State

_EVERY_SECONDS = 0.7  # a number that changes faster is not read by anyone


def memory_now() -> dict[str, int]:
    """Bytes in use now: what torch has on each GPU, and what this process has in RAM (Python and libraries too)."""
    torch = sys.modules.get("torch")
    found = {"cpu": int(psutil.Process().memory_info().rss)}
    if torch is None:
        return found
    if torch.cuda.is_available():
        found |= {device_label(i): int(torch.cuda.memory_allocated(i)) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = int(torch.mps.current_allocated_memory())
    return found


class Live:
    """Shows memory in the picture while a model is loaded or talks, and for as long as it stays loaded.

    Args:
        state: Says what goes on.
        touch: The layer over the figure; its ``live`` is written.
    """

    def __init__(self, state: State, touch: Any) -> None:
        self._state, self._touch = state, touch
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        state.observe(self._follow, ["activity", "session"])

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self, _: object) -> None:
        with self._lock:
            if self._state.activity and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._watch, name="workbench-live", daemon=True)
                self._thread.start()
        if self._state.session is None and not self._state.activity:
            self._touch.live = {}

    def _watch(self) -> None:
        while True:
            busy = bool(self._state.activity)
            self._show()  # once more when it is over
            if not busy or self._stop.wait(_EVERY_SECONDS):
                return

    def _show(self) -> None:
        if self._state.session is None and not self._state.activity:
            return
        self._touch.live = {
            label: [size, f"now {format_bytes(size)}{' in this process' if label == 'cpu' else ''}"]
            for label, size in memory_now().items()
        }
