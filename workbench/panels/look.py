"""What the panels share of HTML, CSS and JavaScript: one stylesheet and three small browser-side widgets."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
from traitlets import Bool, Int, Unicode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workbench.panels.state import State

STYLE = f"<style>{Path(__file__).with_name('style.css').read_text(encoding='utf-8')}</style>"


class Page(anywidget.AnyWidget):
    """Tells what the page is like where this stands, and when that changes. It shows nothing.

    Plotly follows neither by itself: it knows nothing of the notebook's theme, and a figure that was drawn before its
    place had a width keeps a width of its own. On the way it names the sliders' handles
    for screen readers, lets tooltips of labels that are not seen be seen, and keeps keys from JupyterLab that are meant
    for what is read here.

    Attributes:
        dark: Whether the notebook is dark.
        width_px: How wide the place is; 0 while that is unknown.
    """

    _esm = """
    export default { render({ model, el }) {
      el.style.cssText = "width: 100%; height: 0; margin: 0; overflow: hidden;";
      const tell = (name, value) => {
        if (value !== model.get(name)) { model.set(name, value); model.save_changes(); }
      };
      const look = () => {
        const said = document.body.dataset.jpThemeLight;
        tell("dark", said === undefined ? matchMedia("(prefers-color-scheme: dark)").matches : said === "false");
      };
      const watcher = new MutationObserver(look);
      watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
      look();
      const ruler = new ResizeObserver(() => { if (el.clientWidth) tell("width_px", el.clientWidth); });
      ruler.observe(el);
      // ipywidgets leaves the handles of its sliders without a name, and puts tooltips on labels, seen or not.
      const name = () => {
        for (const handle of document.querySelectorAll(".wb-root .noUi-handle:not([aria-label])")) {
          const label = handle.closest(".widget-slider")?.querySelector("label")?.textContent;
          if (label) handle.setAttribute("aria-label", label);
        }
        for (const control of document.querySelectorAll(".wb-root .wb-unseen-label")) {
          const tip = control.querySelector("label")?.title ?? "";
          if (tip && control.title !== tip) control.title = tip;
        }
      };
      const namer = new MutationObserver(name);
      // JupyterLab's own keys (x cuts a cell) must not be meant where there is nothing to type, but something to read.
      const keep = (event) => {
        const here = event.target.matches("[tabindex='0'], .wb-code button, .wb-kernel select, .wb-push *");
        if (here && !event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
      };
      let waiting = 0, root = null;
      const begin = () => {
        root = el.closest(".wb-root");
        if (!root) { waiting = requestAnimationFrame(begin); return; }
        root.addEventListener("keydown", keep);
        namer.observe(root, { childList: true, subtree: true, attributes: true, attributeFilter: ["title"] });
        name();
      };
      begin();
      return () => {
        cancelAnimationFrame(waiting);
        root?.removeEventListener("keydown", keep);
        for (const each of [watcher, ruler, namer]) each.disconnect();
      };
    } };
    """
    dark = Bool(default_value=False).tag(sync=True)
    width_px = Int(default_value=0).tag(sync=True)


class Log(anywidget.AnyWidget):
    """Text that grows: what is added travels alone, and ``text`` has all of it for a page that comes later."""

    _esm = """
    export default { render({ model, el }) {
      const box = document.createElement("div");
      box.className = "wb-log";
      box.tabIndex = 0;
      box.setAttribute("role", "log");
      box.setAttribute("aria-live", "polite");
      box.setAttribute("aria-label", model.get("label"));
      const follow = (change) => {
        const near = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
        change();
        if (near) box.scrollTop = box.scrollHeight;
      };
      const whole = () => follow(() => {
        if (box.textContent !== model.get("text")) box.textContent = model.get("text");
      });
      const more = (message) => follow(() => box.append(message.add));
      model.on("change:text", whole);
      model.on("msg:custom", more);
      whole();
      el.append(box);
      return () => { model.off("change:text", whole); model.off("msg:custom", more); };
    } };
    """
    text = Unicode().tag(sync=True)
    label = Unicode().tag(sync=True)

    def add(self, piece: str) -> None:
        """Append text on the pages that are open now."""
        self.send({"add": piece})


class CodeView(anywidget.AnyWidget):
    """Code with a button that copies it and one that downloads the recipe it was made from."""

    _esm = """
    export default { render({ model, el }) {
      const text = document.createElement("pre");
      text.className = "wb-code-text";
      text.tabIndex = 0;
      text.setAttribute("role", "region");
      text.setAttribute("aria-label", "Python code");
      const button = (label, title, name) => {
        const made = document.createElement("button");
        made.type = "button"; made.textContent = label; made.title = title; made.className = name;
        return made;
      };
      const copy = button("Copy code", "Copy the code to the clipboard", "wb-copy");
      const save = button("Download recipe", "Save the choices as a JSON file", "wb-recipe-download");
      const said = document.createElement("span");
      said.setAttribute("role", "status");
      const show = () => { text.textContent = model.get("code"); said.textContent = ""; };
      const byHand = () => {
        const range = document.createRange();
        range.selectNodeContents(text);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        let done = false;
        try { done = document.execCommand("copy"); } catch { done = false; }
        said.textContent = done ? "Copied." : "Selected: press Ctrl+C or Cmd+C to copy.";
      };
      copy.onclick = async () => {
        try {
          await navigator.clipboard.writeText(model.get("code"));
          said.textContent = "Copied.";
        } catch { byHand(); }
      };
      save.onclick = () => {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([model.get("recipe_json")], { type: "application/json" }));
        link.download = "workbench-recipe.json";
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      };
      model.on("change:code", show);
      show();
      el.append(text, copy, save, said);
      return () => model.off("change:code", show);
    } };
    """
    code = Unicode().tag(sync=True)
    recipe_json = Unicode().tag(sync=True)


def classed(widget: Any, *names: str) -> Any:
    """Give a widget CSS classes, and return it."""
    for name in names:
        widget.add_class(name)
    return widget


def html(*names: str, value: str = "") -> Any:
    """A piece of HTML with CSS classes."""
    return classed(w.HTML(value=value), *names)


def text_field(label: str, name: str, example: str, tip: str, *, live: bool = False) -> Any:
    """A line of text with a label, an example while it is empty, and a tooltip; ``live`` tells of every letter."""
    field = w.Text(description=label, placeholder=example, tooltip=tip, continuous_update=live)
    return classed(field, name, "wb-wide")


def number_field(label: str, value: float, name: str, tip: str) -> Any:
    """A number with a label and a tooltip, whole if its first value is."""
    kind = w.IntText if isinstance(value, int) else w.FloatText
    return classed(kind(description=label, value=value, tooltip=tip), name, "wb-short")


def threshold_slider(name: str, tip: str, value: float) -> Any:
    """int8's threshold."""
    slider = w.FloatSlider(
        description="Threshold", min=0.0, max=20.0, step=0.5, value=value, readout_format=".1f", tooltip=tip
    )
    return classed(slider, name, "wb-wide")


def button(label: str, name: str, tip: str, style: str = "") -> Any:
    """A button as wide as its label, with a tooltip; ``style`` is "primary" for the one that is meant to be pressed."""
    made = w.Button(description=label, tooltip=tip, button_style=style, layout=w.Layout(width="auto"))
    return classed(made, name)


def panel(title: str, children: Iterable[Any], *names: str) -> Any:
    """A titled box."""
    heading = html("wb-title", value=f'<div role="heading" aria-level="3">{escape(title)}</div>')
    return classed(w.VBox([heading, *children]), "wb-panel", *names)


def problem_line(state: State, name: str) -> Any:
    """The line in which a panel says what went wrong; it takes no room while nothing did."""
    line = html("wb-error")

    def show(_: object = None) -> None:
        sentence = state.problems.get(name, "")
        line.value = f'<div role="alert">{escape(sentence)}</div>' if sentence else ""
        visible(line, when=bool(sentence))

    state.observe(show, "problems")
    show()
    return line


def visible(widget: Any, *, when: bool) -> None:
    """Show or hide a widget."""
    wanted = None if when else "none"
    if widget.layout.display != wanted:
        widget.layout.display = wanted


def whole_tree(widget: Any) -> Iterator[Any]:
    """Every widget that a widget is made of, layouts and styles included, itself last."""
    for name in widget.keys:
        value = getattr(widget, name)
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, w.Widget):
                yield from whole_tree(part)
    yield widget


def close_tree(*widgets: Any) -> None:
    """Close widgets with everything that they are made of, in the browser too."""
    for widget in widgets:
        for part in list(whole_tree(widget)):
            part.close()


def count(number: int) -> str:
    """A large count in three digits: 135M, 7.24B, 671B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
