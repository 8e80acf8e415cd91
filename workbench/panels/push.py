"""A form that puts a folder on the Hub. The token goes straight to the upload and is never a widget's state."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
from traitlets import Bool, Unicode

from workbench.model import find_model
from workbench.panels.look import classed, html, problem_line
from workbench.upload import push_folder

if TYPE_CHECKING:
    from workbench.panels.state import State


class PushForm(anywidget.AnyWidget):
    """Name, privacy, token and a button, in the browser: all of it arrives in one message when the button is pressed.

    ipywidgets would keep what is typed as state, which notebooks save in plain text.

    Attributes:
        busy: Whether the button is to be pressed now.
        name: The repository that is suggested.
    """

    _esm = """
    export default { render({ model, el }) {
      const make = (tag, settings) => Object.assign(document.createElement(tag), settings);
      const field = (label, control) => {
        const made = make("label", { className: "wb-push-field" });
        made.append(make("span", { textContent: label }), control);
        return made;
      };
      const repo = make("input", { type: "text", placeholder: "org/name or name", spellcheck: false });
      const open = make("input", { type: "checkbox", checked: true });
      const token = make("input", {
        type: "password", autocomplete: "off", placeholder: "that of huggingface_hub.login()",
        title: "A token with write access; used once, stored nowhere",
      });
      const button = make("button", { type: "button", textContent: "Push to the Hub", className: "wb-push-button" });
      const suggest = () => { if (!repo.value) repo.value = model.get("name"); };
      const show = () => { button.disabled = model.get("busy"); };
      button.onclick = () => {
        model.send({ repo_id: repo.value, private: open.checked, token: token.value });
        token.value = "";
      };
      model.on("change:busy", show);
      model.on("change:name", suggest);
      show(); suggest();
      el.append(field("Repository", repo), field("Private", open), field("Token", token), button);
      return () => { model.off("change:busy", show); model.off("change:name", suggest); };
    } };
    """
    busy = Bool(default_value=False).tag(sync=True)
    name = Unicode().tag(sync=True)


class PushControls:
    """Puts one folder on the Hub.

    Args:
        state: The state.
        name: Of what it says went wrong.

    Attributes:
        box: What is shown.
        folder: What is put there.
        form: What is filled in.
    """

    def __init__(self, state: State, name: str = "push") -> None:
        self._state, self._name = state, name
        self._thread: threading.Thread | None = None
        self.folder = ""
        self.form: Any = classed(PushForm(), "wb-push")
        self._said = html("wb-note", "wb-push-text")
        self.box = classed(w.VBox([self.form, problem_line(state, name), self._said]), f"wb-{name}-form")
        self.form.on_msg(lambda _widget, content, _buffers: state.guarded(name, self._start)(content))
        state.observe(self._show, "activity")
        self._show()

    def offer(self, folder: str) -> None:
        """Put this folder there when the button is pressed."""
        self.folder, self.form.name, self._said.value = (
            folder,
            folder.rstrip("/\\").replace("\\", "/").rpartition("/")[2],
            "",
        )

    def _show(self, _: object = None) -> None:
        self.form.busy = bool(self._state.activity)

    def _start(self, content: dict[str, Any]) -> None:
        repo_id = str(content.get("repo_id") or "").strip()
        if not repo_id:
            raise ValueError("Name the repository: org/name, or a name alone for one of your own.")
        private, token = content.get("private") is not False, content.get("token") or None
        self._state.begin("pushing")
        self._said.value = f'<div role="status">Uploading to {escape(repo_id)} ...</div>'
        # Not the worker: nothing here is torch's, and a loaded model stays loaded.
        self._thread = threading.Thread(
            target=self._state.guarded(self._name, self._push),
            args=(repo_id, private, token),
            name="workbench-push",
            daemon=True,
        )
        self._thread.start()

    def _push(self, repo_id: str, private: bool, token: str | None) -> None:  # noqa: FBT001 - a thread's arguments
        said = ""
        try:
            url = push_folder(find_model(self.folder), repo_id, private=private, token=token)
            link = escape(url)
            said = f'<div role="status">✓ On the Hub: <a href="{link}" target="_blank">{link}</a></div>'
        finally:
            self._said.value = said
            self._state.end()
