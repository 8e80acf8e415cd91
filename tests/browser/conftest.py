from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import chromium
import pytest
from lab import CHROMIUM_FLAGS, JupyterServer, Lab
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the browser last: its event loop stays with the thread until the end, and asyncio.run() refuses a second."""
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    server = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = chromium.find()
    assert executable, "no Chromium found: `make test` gets one, or set WORKBENCH_CHROMIUM"
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=list(CHROMIUM_FLAGS))
        yield instance
        instance.close()


@pytest.fixture(scope="module")
def one_page(jupyter_server: JupyterServer, browser: Browser) -> Iterator[Lab]:
    """A page for all tests of a file: the cell is run again for each, in a kernel that has done its imports."""
    page = Lab(jupyter_server, browser)
    page.open(["exec(cell)\nbench"])
    yield page
    page.close()


@pytest.fixture
def lab(
    request: pytest.FixtureRequest, jupyter_server: JupyterServer, browser: Browser, tmp_path: Path
) -> Iterator[Lab]:
    """A page of this test's own."""
    page = Lab(jupyter_server, browser)
    try:
        with held_to_it(page, request.node, tmp_path):
            yield page
    finally:
        page.close()


@pytest.fixture
def shared(request: pytest.FixtureRequest, one_page: Lab, tmp_path: Path) -> Iterator[Lab]:
    """The page of the whole file, for one of its tests."""
    with held_to_it(one_page, request.node, tmp_path):
        yield one_page


@contextmanager
def held_to_it(page: Lab, test: pytest.Item, folder: Path) -> Iterator[None]:
    """Errors in the page's console or a request that left the machine fail the test; a failed one is told of."""
    try:
        yield
        if test.stash.get(FAILED, False):
            page.page.screenshot(path=folder / "failed.png")
            print(f"Screenshot: {folder / 'failed.png'}\nConsole errors: {page.console_errors}")
            print(f"JupyterLab's log:\n{page.server.log()}")
        page.assert_clean()
    finally:
        page.console_errors.clear()
        page.foreign_requests.clear()
