"""The main job in Notebook 7 and in Voila, with JupyterLab's clicks; Python is asked through the kernel itself."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from lab import START_TIMEOUT_S, JupyterServer, Lab, ask, environment, free_port
from played_page import wait_for
from test_main_job import NOTEBOOK, QUESTION, WAIT_MS, button, open_tab, part, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def newest(runtime: Path) -> Path:
    """The connection file of a server's newest kernel."""
    return max(runtime.rglob("kernel-*.json"), key=lambda path: path.stat().st_mtime_ns)


def main_job(lab: Lab, runtime: Path) -> None:
    part(lab, "wb-chart .main-svg").first.wait_for(timeout=WAIT_MS)
    verdict(lab, "Fits")
    part(lab, "wb-precision").get_by_role("button", name="int8").click()
    lab.drag_slider(".wb-memory-cpu", 0.0)
    verdict(lab, "Does not fit")
    lab.drag_slider(".wb-memory-cpu", 0.4)
    verdict(lab, "Fits")
    button(lab, "wb-load").click()
    part(lab, "wb-load-report").filter(has_text="Loaded as previewed").wait_for(timeout=WAIT_MS)
    open_tab(lab, "Generate")
    part(lab, "wb-prompt textarea").fill(QUESTION)
    button(lab, "wb-generate").click()
    lab.page.get_by_role("log", name="Answer").filter(has_text="Paris").wait_for(timeout=WAIT_MS)
    part(lab, "wb-stats").filter(has_text="tok/s").wait_for(timeout=WAIT_MS)
    assert (
        ask(newest(runtime), "(bench.recipe.precision.method, bench.session.load_report.matches)") == "('int8', True)"
    )


def test_in_notebook_7(browser: Browser, tmp_path: Path) -> None:
    # A server of its own: one that has served Notebook refuses JupyterLab files of the same name.
    server = JupyterServer(tmp_path)
    server.wait()
    page = Lab(server, browser)
    try:
        shutil.copy(NOTEBOOK, server.root)
        page.page.goto(f"{server.url}/notebooks/{NOTEBOOK.name}?token={server.token}")
        page.wait_ready()
        page.console_errors.clear()  # Notebook's own page has one, with no cell run
        page.page.get_by_role("menuitem", name="Run", exact=True).click()
        page.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        main_job(page, server.runtime)
    finally:
        page.close()
        server.stop()
    page.assert_clean()


def answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


@pytest.fixture
def voila(tmp_path: Path) -> Iterator[str]:
    """``voila notebooks/workbench.ipynb``, as one types it; the address that it is at."""
    port = free_port()
    command = [sys.executable, "-m", "voila", str(NOTEBOOK), "--no-browser", f"--port={port}"]
    (tmp_path / "runtime").mkdir()
    command.append(f"--Voila.connection_dir_root={tmp_path / 'runtime'}")
    with (tmp_path / "voila.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(tmp_path), cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(port) or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, (tmp_path / "voila.log").read_text()
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


def test_in_voila(lab: Lab, voila: str, tmp_path: Path) -> None:
    lab.page.goto(voila)
    main_job(lab, tmp_path / "runtime")
    assert lab.page.get_by_text("import workbench").count() == 0  # no code is shown
    lab.page.goto("about:blank")  # before the server goes
    # Two things of Voila's: it asks for an icon font, and tries Notebook's extension, which is not made for it.
    for seen in (lab.console_errors, lab.foreign_requests):
        seen[:] = [each for each in seen if "fontawesome" not in each and "@jupyter-notebook/lab-extension" not in each]
