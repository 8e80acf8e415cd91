"""A real JupyterLab and a page in it, for tests that click as a person does and then ask the kernel what it holds."""

from __future__ import annotations

import ast
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import nbformat
import platformdirs
from jupyter_client.blocking import BlockingKernelClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from playwright.sync_api import Browser, ConsoleMessage, Request, WebSocket

REPOSITORY = Path(__file__).parents[2]
LOCAL_HOSTS = {"127.0.0.1", "localhost"}
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A machine with a network must behave like one without: whatever looks further than this machine finds nothing.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
START_TIMEOUT_S = 120.0
_NUMBERS = itertools.count(1)

# The status line of JupyterLab says "idle" before the kernel can be asked anything, so the objects behind it are read.
_READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    if (!kernel || kernel.connectionStatus !== "connected" || kernel.status !== "idle") return false;
    return Promise.all([panel.context.ready, panel.sessionContext.ready, kernel.info]).then(() => true);
}"""
_REQUEST = """async ([code, expressions, seconds]) => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({
        code, user_expressions: expressions, silent: true, store_history: false, allow_stdin: false,
        stop_on_error: false,
    });
    const late = new Promise(resolve => setTimeout(resolve, seconds * 1000, null));
    const reply = await Promise.race([future.done, late]);
    return reply && reply.content;
}"""
_CELL_ERRORS = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .flatMap(cell => cell.model.outputs?.toJSON() ?? [])
    .filter(output => output.output_type === "error")
    .map(output => output.traceback.join("\\n"))"""


def ask(connection_file: Path, expression: str) -> str:
    """What a kernel says that an expression is, in writing.

    Raises:
        TimeoutError: It is busy.
        AssertionError: Something raised.
    """
    client = BlockingKernelClient(connection_file=str(connection_file))
    client.load_connection_file()
    client.start_channels()
    try:
        reply: Any = client.execute("", silent=True, user_expressions={"it": expression}, reply=True, timeout=30)
    finally:
        client.stop_channels()
    it = reply["content"].get("user_expressions", {}).get("it", {})
    assert it.get("status") == "ok", reply["content"]
    return str(it["data"]["text/plain"])


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(folder: Path) -> dict[str, str]:
    """The environment of a server whose home, settings and runtime files lie in a folder."""
    return {
        **os.environ,
        "HOME": str(folder),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_CONFIG_PATH": str(REPOSITORY / "binder"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
        # The demo model is found although HOME is another one; models are never asked for outside.
        "WORKBENCH_CACHE_DIR": os.environ.get("WORKBENCH_CACHE_DIR")
        or platformdirs.user_cache_dir("llm-device-workbench", appauthor=False),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


class JupyterServer:
    """A JupyterLab server of its own: its settings, runtime files and notebooks lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "notebooks"
        self.log_file = folder / "jupyterlab.log"
        self.token = "browser-test"  # noqa: S105 - for a server that only this machine reaches
        self._settings = folder / "settings"
        self.runtime = folder / "runtime"
        notifications = self._settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        for each in (self.root, self.runtime, notifications.parent):
            each.mkdir(parents=True)
        notifications.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
        port = free_port()
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
            "--JupyterNotebookApp.expose_app_in_browser=True",  # Notebook 7 is served by the same
            *("--ip=127.0.0.1", f"--port={port}", f"--ServerApp.root_dir={self.root}"),
            f"--IdentityProvider.token={self.token}",
            # Should the tests be killed, nobody is left to stop it.
            *("--ServerApp.shutdown_no_activity_timeout=900", "--MappingKernelManager.cull_idle_timeout=900"),
        ]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment(folder) | {"JUPYTERLAB_SETTINGS_DIR": str(self._settings)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the tests, and they end the server
            )
        self.url = ""

    def wait(self) -> None:
        """Return once it answers; the port is read from its own runtime file, as it takes the next one if need be.

        Raises:
            RuntimeError: It ended, or did not answer in START_TIMEOUT_S; the message ends with its log.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            for file in self.runtime.glob("jpserver-*.json"):
                try:
                    self.url = json.loads(file.read_text())["url"].rstrip("/")
                    self.request("GET", "/api/status")
                except (ValueError, OSError):  # half written; not listening yet
                    continue
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"JupyterLab did not start:\n{self.log()}")

    def log(self, lines: int = 60) -> str:
        """The end of what the server and its kernels printed."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def request(self, method: str, path: str) -> Any:
        """The server's REST interface: the decoded answer, or None where it has no body."""
        asked = urllib.request.Request(  # noqa: S310 - an http address of our own
            self.url + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310
            body = answer.read()
        return json.loads(body) if body else None

    def forget(self) -> None:
        """End every session with its kernel (they outlive the page) and go back to the default theme."""
        for session in self.request("GET", "/api/sessions"):
            self.request("DELETE", f"/api/sessions/{session['id']}")
        (self._settings / "@jupyterlab/apputils-extension/themes.jupyterlab-settings").unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server and, through it, its kernels."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Lab:
    """One browser page with one notebook in it, and its kernel."""

    def __init__(self, server: JupyterServer, browser: Browser) -> None:
        self.server = server
        self.console_errors: list[str] = []
        self.foreign_requests: list[str] = []
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.context.on("request", self._on_request)
        self.context.on("console", self._on_console)
        self.context.on("weberror", lambda error: self.console_errors.append(str(error.error)))
        self.page = self.context.new_page()
        self.page.on("websocket", self._on_websocket)

    def open(self, notebook: Path | Sequence[str], *, folder: str = "") -> None:
        """Open a notebook of this page's own and return when its kernel can be asked.

        Args:
            notebook: A notebook file, which is copied, or the source of each code cell.
            folder: Keep the file's own name, in a folder of this name; else it gets a number.
        """
        if isinstance(notebook, Path):
            content = nbformat.read(notebook, as_version=4)
        else:
            content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in notebook])
        # A notebook that names no kernel makes JupyterLab ask for one.
        content.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
        name = f"test-{next(_NUMBERS)}.ipynb"
        if folder and isinstance(notebook, Path):
            name = f"{folder}/{notebook.name}"
            (self.server.root / folder).mkdir()
        nbformat.write(content, self.server.root / name)
        self.page.goto(f"{self.server.url}/lab/tree/{quote(name)}?reset&token={self.server.token}")
        self.wait_ready()

    def close(self) -> None:
        """Leave the page and end its kernel."""
        self.context.close()
        self.server.forget()

    def reload(self) -> None:
        """Save the notebook, load the page anew, and return when the kernel, which kept running, can be asked again."""
        self.command("docmanager:save")
        self.page.reload()
        self.wait_ready()

    def run_all(self) -> None:
        """Run every cell and return when all have ended.

        Raises:
            AssertionError: A cell raised; the message is its traceback.
        """
        self.command("notebook:run-all-cells")
        errors = self.page.evaluate(_CELL_ERRORS)
        assert not errors, "\n".join(errors)

    def command(self, name: str, **arguments: Any) -> None:
        """Carry out a JupyterLab command, as its menus do, and return when it is done."""
        self.page.evaluate(
            "async ([name, args]) => { await window.jupyterapp.commands.execute(name, args); }", [name, arguments]
        )

    def set_theme(self, theme: str) -> None:
        """Switch JupyterLab to its "dark" or its "light" theme."""
        self.command("apputils:change-theme", theme={"dark": "JupyterLab Dark", "light": "JupyterLab Light"}[theme])
        self.page.locator(f"body[data-jp-theme-light={'true' if theme == 'light' else 'false'}]").wait_for(
            state="attached"
        )

    def set_viewport(self, width: int, height: int) -> None:
        """Resize the page, in CSS pixels."""
        self.page.set_viewport_size({"width": width, "height": height})

    def execute(self, code: str, timeout: float = 30.0) -> None:
        """Run statements in the kernel, beside the notebook: no cell, no output, no number.

        Raises:
            RuntimeError: They raised.
            TimeoutError: The kernel did not answer in `timeout` seconds.
        """
        self._ask(code, {}, timeout)

    def evaluate(self, expression: str, timeout: float = 30.0) -> Any:
        """What the kernel says an expression is worth: anything that Python can print and read back.

        Raises:
            RuntimeError: It raised.
            TimeoutError: The kernel did not answer in `timeout` seconds: it is busy with a cell, say.
            ValueError: Its repr() is no literal: ask for one of its fields, or for str() of it.
        """
        shown = self._ask("", {"value": f"repr({expression})"}, timeout)
        written = ast.literal_eval(shown)
        try:
            return ast.literal_eval(written)
        except (ValueError, SyntaxError):
            raise ValueError(f"{expression} is no literal but {written}") from None

    def wait_python(self, expression: str, predicate: Callable[[Any], object] = bool, timeout: float = 30.0) -> Any:
        """Ask the kernel until `predicate` holds for the expression's value, and return that value.

        Raises:
            TimeoutError: It did not hold in `timeout` seconds; the message says the last value.
        """
        deadline = time.monotonic() + timeout
        while not predicate(value := self.evaluate(expression, timeout)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is still {value!r} after {timeout} s")
            self.page.wait_for_timeout(25)  # unlike time.sleep it lets the page's events in
        return value

    def drag_slider(self, selector: str, fraction: float, handle: int = 0) -> None:
        """Drag the handle of an ipywidgets slider, found by a class of its own, to a fraction of its track (0 to 1)."""
        slider = self.page.locator(selector)
        knob = slider.locator(".noUi-handle").nth(handle)
        knob.scroll_into_view_if_needed()  # the mouse can only be where the window is
        grip, track = knob.bounding_box(), slider.locator(".noUi-base").bounding_box()
        assert grip, f"{selector} has no handle on the screen"
        assert track, f"{selector} has no track on the screen"
        x, y = grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + fraction * track["width"], y, steps=8)
        self.page.mouse.up()

    def assert_clean(self) -> None:
        """Hold the page to it: no error in the console, and no request left the machine."""
        assert not self.console_errors, "the browser's console has errors:\n" + "\n".join(self.console_errors)
        assert not self.foreign_requests, "requests left the machine:\n" + "\n".join(self.foreign_requests)

    def wait_ready(self) -> None:
        """Return when the notebook is on the page and its kernel can be asked."""
        self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").first.wait_for(timeout=60_000)
        self.page.wait_for_function(_READY, timeout=60_000)

    def _ask(self, code: str, expressions: dict[str, str], timeout: float) -> str:
        reply = self.page.evaluate(_REQUEST, [code, expressions, timeout])
        if reply is None:
            raise TimeoutError(f"the kernel did not answer in {timeout} s: {code or expressions}")
        for part in (reply, *reply.get("user_expressions", {}).values()):
            if part["status"] != "ok":
                raise RuntimeError(
                    f"{part.get('ename')}: {part.get('evalue')}\n" + "\n".join(part.get("traceback", ()))
                )
        return str(reply["user_expressions"]["value"]["data"]["text/plain"]) if expressions else ""

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.console_errors.append(f"{message.text} ({message.location.get('url')})")

    def _on_request(self, request: Request) -> None:
        self._check(request.url)

    def _on_websocket(self, websocket: WebSocket) -> None:
        self._check(websocket.url)

    def _check(self, url: str) -> None:
        where = urlsplit(url)
        if where.scheme not in {"data", "blob"} and where.hostname not in LOCAL_HOSTS:
            self.foreign_requests.append(url)
