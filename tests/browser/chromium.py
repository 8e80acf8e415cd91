"""Find a Chromium for the browser tests; run as a script, get one where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """Path of a Chromium that starts: WORKBENCH_CHROMIUM, else one on the PATH, else playwright's own; or None."""
    if named := os.environ.get("WORKBENCH_CHROMIUM"):
        if not _starts(named):
            raise ValueError(f"WORKBENCH_CHROMIUM names {named!r}, which does not start: name a Chromium, or unset it.")
        return named
    candidates = [found for name in NAMES if (found := shutil.which(name))]
    return next(filter(_starts, [*candidates, *_playwrights_own()]), None)


def get() -> str | None:
    """Like find(), but installs one where there is none: playwright's, else the system's package manager's."""
    if found := find():
        return found
    playwright = [sys.executable, "-m", "playwright"]
    _try([*playwright, "install", "chromium"])
    if found := find():
        return found
    sudo = _sudo()
    apt_get = shutil.which("apt-get")
    if sudo is None or apt_get is None:
        return None
    if _playwrights_own():  # it is there and does not start: libraries are missing
        _try([*sudo, *playwright, "install-deps", "chromium"])
        if found := find():
            return found
    _try([*sudo, apt_get, "update"])
    _try([*sudo, apt_get, "install", "--yes", "--no-install-recommends", "chromium"])
    return find()


def _starts(executable: str) -> bool:
    """Whether it runs: a file alone says little, distributions ship placeholders and libraries may be missing."""
    try:
        done = subprocess.run([executable, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and b"Chrom" in done.stdout


def _playwrights_own() -> list[str]:
    """Where playwright keeps its own Chromium, if it has one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return [path] if Path(path).exists() else []


def _sudo() -> list[str] | None:
    """What to put before a command of the package manager; None where it may not be called without a password."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    return [sudo, "-n"] if sudo and _try([sudo, "-n", "true"]) else None


def _try(command: list[str]) -> bool:
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    chromium = get()
    if chromium is None:
        sys.exit(
            "The browser tests need Chromium, and none could be installed here: install chromium or google-chrome with "
            "your system's package manager, or set WORKBENCH_CHROMIUM to the path of one."
        )
    sys.stdout.write(f"The browser tests use {chromium}\n")
