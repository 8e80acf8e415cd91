"""The main job within Binder's memory: JupyterLab and its kernel in a cgroup of 2 GB, driven by a real browser.

    python benchmarks/binder.py [--python ENVIRONMENT/bin/python] [--gib 2] [--precision int8 --precision nf4]

Needs root and a memory controller (cgroup v1 or v2) that may be written to, and Chromium. The browser is outside, as a
visitor's is. Prints, for each step, what was resident that the kernel cannot take back (anonymous memory of all
processes together), sampled 20 times a second, and at the end whether the limit ever ended a process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "browser"))

import chromium
from lab import CHROMIUM_FLAGS, REPOSITORY, JupyterServer, Lab
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

_MIB = 2**20
_WAIT_MS = 600_000  # on a machine that others use as well


class Cgroup:
    """A group of processes with a limit on their memory.

    Args:
        limit_bytes: What they may use together; past it the kernel ends one of them.
    """

    def __init__(self, limit_bytes: int) -> None:
        root = Path("/sys/fs/cgroup")
        self._v2 = (root / "cgroup.controllers").exists()
        if self._v2:
            (root / "cgroup.subtree_control").write_text("+memory")
        self._root = root if self._v2 else root / "memory"
        self.folder = self._root / "workbench-binder"
        self.folder.mkdir(exist_ok=True)
        (self.folder / ("memory.max" if self._v2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        own = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
        self._home = next(path for _, controllers, path in own if ("memory" in controllers.split(",")) != self._v2)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in the group for a while: what is started meanwhile stays in it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._root / self._home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))

    def held_bytes(self) -> int:
        """What cannot be taken back: all but the pages of files."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(stat["anon"]) if self._v2 else int(stat["total_rss"])

    def used_bytes(self) -> int:
        """Everything, cached pages of files as well."""
        name = "memory.current" if self._v2 else "memory.usage_in_bytes"
        return int((self.folder / name).read_text())

    def killed(self) -> int:
        """How many processes the limit has ended."""
        name = "memory.events" if self._v2 else "memory.oom_control"
        return int(dict(line.split() for line in (self.folder / name).read_text().splitlines())["oom_kill"])

    def remove(self) -> None:
        """Remove the group, which must be empty by now."""
        self.folder.rmdir()


class Watch(threading.Thread):
    """Looks at a group 20 times a second.

    Args:
        group: Which.
    """

    def __init__(self, group: Cgroup) -> None:
        super().__init__(daemon=True)
        self._group, self._over = group, threading.Event()
        self.peak_bytes = 0
        self._step, self._step_peak, self._began = "", 0, time.perf_counter()
        self.start()

    def run(self) -> None:
        """Sample until it is told to end."""
        while not self._over.wait(0.05):
            held = self._group.held_bytes()
            self.peak_bytes, self._step_peak = max(self.peak_bytes, held), max(self._step_peak, held)

    def step(self, name: str) -> None:
        """End a step, with its numbers, and begin another."""
        now = time.perf_counter()
        if self._step:
            print(f"{self._step:34} {now - self._began:6.1f} s   peak {self._step_peak / _MIB:6.0f} MiB", flush=True)
        self._step, self._step_peak, self._began = name, self._group.held_bytes(), now

    def end(self) -> None:
        """Stop looking."""
        self.step("")
        self._over.set()
        self.join()


def main() -> None:
    """Run the main job once for each precision, in one kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the environment to try (default: this one)")
    parser.add_argument("--gib", type=float, default=2.0, help="the limit (default: %(default)s)")
    parser.add_argument("--precision", action="append", help="as on its button; may be given again (int8, then nf4)")
    options = parser.parse_args()

    group = Cgroup(int(options.gib * 2**30))
    watch = Watch(group)
    folder = Path(tempfile.mkdtemp(prefix="workbench-binder-"))
    sys.executable = options.python  # which the server is started with
    watch.step("server")
    with group.inside():
        server = JupyterServer(folder)
    try:
        server.wait()
        executable = chromium.find()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
            watch.step("page, kernel, workbench visible")
            lab = Lab(server, browser)
            lab.open(REPOSITORY / "notebooks" / "workbench.ipynb", folder="binder")
            part(lab.page, "verdict").wait_for(timeout=_WAIT_MS)
            watch.step("first preview complete")
            part(lab.page, "verdict").filter(has_text="Fits").wait_for(timeout=_WAIT_MS)
            lab.wait_python("bench._state.settle(0)", timeout=_WAIT_MS / 1000)
            print(lab.evaluate("str(bench.machine.device('cpu'))"))
            for precision in options.precision or ["int8", "nf4"]:
                run(lab, watch, precision)
            browser.close()
    finally:
        watch.end()
        server.stop()
    print(f"Peak {watch.peak_bytes / _MIB:.0f} MiB of {options.gib * 1024:.0f}; ended by the limit: {group.killed()}.")
    for _ in range(100):  # processes end in their own time
        if not (group.folder / "cgroup.procs").read_text():
            break
        time.sleep(0.1)
    group.remove()


def part(page: Page, name: str) -> object:
    """A part of the workbench, by its class."""
    return page.locator(f".wb-root .wb-{name}")


def run(lab: Lab, watch: Watch, precision: str) -> None:
    """Choose, load, ask, unload, as a person does it."""
    page = lab.page
    watch.step(f"{precision}: preview")
    part(page, "precision").get_by_role("button", name=precision, exact=True).click()
    lab.wait_python("bench._state.settle(0)", timeout=_WAIT_MS / 1000)
    print(f"  {lab.evaluate('bench.placement.summary')}")
    watch.step(f"{precision}: load")
    page.get_by_role("tab", name="Load", exact=True).click()
    page.locator("button.wb-load:enabled").click()
    part(page, "load-report").filter(has_text="Loaded as previewed").wait_for(timeout=_WAIT_MS)
    watch.step(f"{precision}: answer")
    page.get_by_role("tab", name="Generate", exact=True).click()
    page.locator("button.wb-generate:enabled").click()
    asked = "bench.session.last_stats is not None and not bench._state.activity"
    lab.wait_python(asked, timeout=_WAIT_MS / 1000)
    page.get_by_role("log", name="Answer").filter(has_text="Paris").wait_for(timeout=_WAIT_MS)
    watch.step(f"{precision}: unload")
    page.get_by_role("tab", name="Load", exact=True).click()
    page.locator("button.wb-unload:enabled").click()
    part(page, "load-text").filter(has_text="Unloaded").wait_for(timeout=_WAIT_MS)


if __name__ == "__main__":
    main()
