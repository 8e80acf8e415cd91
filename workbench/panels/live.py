"""Memory as it is, beside memory as it was foretold, while something goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil

from workbench.hardware import device_label, format_bytes

if TYPE_CHECKING:
    from workbench.panels.state import State

_EVERY_SECONDS = 0.7  # a number that changes faster is not read by anyone


def memory_now() -> dict[str, tuple[int, str]]:
    """What is in use now, device label by device label.

    Returns:
        Bytes, and the same in words: what torch has on each GPU, with what all programs have there where nvidia-ml-py
        is installed, and what this process has in RAM (Python and libraries too).
    """
    ram_bytes = int(psutil.Process().memory_info().rss)
    found = {"cpu": (ram_bytes, f"now {format_bytes(ram_bytes)} in this process")}
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        size_bytes = int(torch.cuda.memory_allocated(index))
        said = f"now {format_bytes(size_bytes)}"
        # Not mem_get_info, which would make a context, and that costs memory, on GPUs that nothing runs on.
        with contextlib.suppress(Exception):  # not installed, or a driver that does not answer
            said += f", all programs {format_bytes(int(torch.cuda.device_memory_used(index)))}"
        found[device_label(index)] = size_bytes, said
    if torch.backends.mps.is_available():
        size_bytes = int(torch.mps.current_allocated_memory())
        found["mps"] = size_bytes, f"now {format_bytes(size_bytes)}"
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
        thread = self._thread
        if thread is not None:
            thread.join()

    def _follow(self, _: object) -> None:
        with self._lock:
            if self._state.activity and self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="workbench-live", daemon=True)
                self._thread.start()
            if self._state.session is None and not self._state.activity:
                self._touch.live = {}

    def _watch(self) -> None:
        while True:
            self._show()
            stopped = self._stop.wait(_EVERY_SECONDS)
            with self._lock:  # or something could begin just as this gives up
                if stopped or not self._state.activity:
                    self._thread = None
                    break
        if not stopped:
            self._show()  # once more when it is over

    def _show(self) -> None:
        found = {label: list(now) for label, now in memory_now().items()}
        with self._lock:
            if self._state.session is not None or self._state.activity:
                self._touch.live = found
