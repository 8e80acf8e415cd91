"""As many torch threads as this machine has cores to spare at the moment.

torch shares out every small step of a token over its threads and waits for the last of them. Where another program
holds one of the cores, all wait for it thousands of times a token: on two busy cores one thread was measured to be 5
to 30 times as fast as two.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_LOOK_SECONDS = 0.25  # the system counts time in hundredths of a second: less would be guessing
_RUNNABLE = Path("/proc/loadavg")


class SpareThreads:
    """Sets torch's threads for the calling thread while the block lasts, and puts them back.

    Attributes:
        threads: How many there are now.
        most: How many there were, and will be again.
    """

    def __enter__(self) -> Self:
        """Begin with what can be seen at once: how many threads are waiting for a core."""
        import torch

        self.most = self.threads = torch.get_num_threads()
        self._cores = os.cpu_count() or 1
        self._before = _times()
        self._set(self._cores - _others_running())
        return self

    def __exit__(self, *_: object) -> None:
        """Put the threads back."""
        self._set(self.most)

    def look(self) -> None:
        """Look again, if the last look is a moment old: between two tokens, from the same thread."""
        now, others_before = time.perf_counter(), self._before
        if now - others_before[0] < _LOOK_SECONDS:
            return
        self._before = _times()
        elapsed = self._before[0] - others_before[0]
        self._set(round(self._cores - (self._before[1] - others_before[1]) / elapsed))

    def _set(self, spare: int) -> None:
        import torch

        threads = min(self.most, max(1, spare))
        if threads != self.threads:
            torch.set_num_threads(threads)
            self.threads = threads


def _times() -> tuple[float, float]:
    """Now, and the seconds for which other programs have kept cores busy, from an arbitrary beginning."""
    import psutil

    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # A guest's time is in the user's already.
    inside = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return time.perf_counter(), sum(times) - inside - idle - own.user - own.system


def _others_running() -> int:
    """How many threads run or wait for a core, this one left out; 0 where the system does not say."""
    try:
        running = _RUNNABLE.read_text(encoding="ascii").split()[3].partition("/")[0]
    except (OSError, IndexError):
        return 0
    return max(0, int(running) - 1)
