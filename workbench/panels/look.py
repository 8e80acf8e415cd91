"""What the panels share of HTML, CSS and JavaScript: one stylesheet and three small browser-side widgets."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
from traitlets import Bool, Int, Unicode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workbench.panels.state import State

STYLE = """<style>
.wb-root {
  --wb-ink: var(--jp-ui-font-color1, CanvasText); --wb-soft: var(--jp-ui-font-color2, GrayText);
  --wb-line: var(--jp-border-color2, rgba(127,127,127,.35)); --wb-ground: var(--jp-layout-color1, Canvas);
  --wb-raised: var(--jp-layout-color2, rgba(127,127,127,.08));
  --wb-good: #00795a; --wb-warn: #9a6200; --wb-bad: #b84a00; --wb-focus: var(--jp-brand-color1, #0072B2);
  container: wb / inline-size; color: var(--wb-ink); width: 100%; box-sizing: border-box; overflow: visible;
  padding: 2px; font-size: 13px;
}
body[data-jp-theme-light="false"] .wb-root { --wb-good: #3ecf9f; --wb-warn: #f2b134; --wb-bad: #ff8a4c; }
.wb-root *, .wb-root *::before { box-sizing: border-box; }
.wb-root .wb-columns {
  display: grid; grid-template-columns: minmax(0, 1fr); gap: 12px; width: 100%; overflow: visible;
}
@container wb (min-width: 860px) {
  .wb-root .wb-columns { grid-template-columns: minmax(310px, 370px) minmax(0, 1fr); }
}
.wb-root .wb-column { width: 100%; min-width: 0; gap: 12px; overflow: visible; }
.wb-root .wb-panel {
  border: 1px solid var(--wb-line); border-radius: 6px; background: var(--wb-ground); padding: 8px 12px 10px;
  width: 100%;
  min-width: 0; overflow: visible;
}
.wb-root .widget-html, .wb-root .widget-html-content { min-width: 0; max-width: 100%; height: auto; line-height: 1.45; }
.wb-root .widget-html { margin: 0; width: 100%; }
.wb-root .wb-title .widget-html-content { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.wb-root .wb-note .widget-html-content { color: var(--wb-soft); font-size: 12px; overflow-wrap: anywhere; }
.wb-root .wb-model-facts b { color: var(--wb-ink); }
.wb-root .wb-note summary { cursor: pointer; }
.wb-root :is(.wb-note, .wb-load-report, .wb-quantize-report, .wb-compare-table) table {
  border-collapse: collapse; margin: 4px 0; font-size: 12px;
}
.wb-root .wb-note td { padding: 1px 10px 1px 0; vertical-align: top; }
.wb-root :is(.wb-load-report, .wb-quantize-report, .wb-compare-table) :is(th, td) {
  padding: 2px 14px 2px 0; text-align: left;
}
.wb-root .wb-compare-table .widget-html-content { overflow-x: auto; }
.wb-root :is(.wb-quantize-report, .wb-compare-table) :is(td, th).wb-number { text-align: right; }
.wb-root .wb-quantize-report .widget-html-content { overflow-wrap: anywhere; }
.wb-root .wb-quantize-report summary { cursor: pointer; }
.wb-root .wb-speed { color: var(--wb-soft); font-size: 13px; white-space: nowrap; }
.wb-root .wb-number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wb-root .wb-scroll { overflow: auto; max-height: 180px; }
.wb-root .wb-error .widget-html-content {
  border-left: 3px solid var(--wb-bad); padding: 4px 8px; margin: 4px 0; background: var(--wb-raised);
  overflow-wrap: anywhere;
}
.wb-root .wb-row {
  display: flex; flex-flow: row wrap; align-items: center; gap: 4px 8px; width: 100%; overflow: visible;
}
.wb-root .wb-wide { width: 100%; max-width: 100%; margin: 2px 0; }
.wb-root .wb-wide > .widget-label { width: 108px; flex: 0 0 108px; text-align: left; }
.wb-root .wb-wide > select, .wb-root .wb-wide > input { min-width: 0; }
.wb-root .widget-checkbox, .wb-root .widget-button { margin: 2px 0; }
.wb-root .wb-device {
  display: grid; grid-template-columns: 70px minmax(0, 1fr) 84px; align-items: center; gap: 0 6px; width: 100%;
  margin: 2px 0 4px; overflow: visible;
}
.wb-root .wb-device > * { width: 100%; margin: 0; min-width: 0; }
.wb-root .wb-device .wb-note { grid-column: 1 / -1; }
.wb-root .wb-device .wb-note .widget-html-content { padding-left: 20px; font-size: 11px; line-height: 1.3; }
.wb-root .wb-device .widget-checkbox { width: auto; height: 28px; display: flex; align-items: center; }
.wb-root .widget-checkbox label { display: flex; align-items: center; gap: 6px; overflow: visible; padding: 0; }
.wb-root .widget-checkbox input { margin: 0; }
.wb-root .wb-device .widget-checkbox label { font-weight: 600; white-space: nowrap; }
.wb-root .wb-unseen-label > .widget-label {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; margin: 0;
}
.wb-root .wb-unseen-label { position: relative; }
.wb-root .wb-device .widget-slider .slider-container { margin: 0 8px; }
.wb-root .wb-method .widget-toggle-buttons, .wb-root .wb-method.widget-toggle-buttons { width: 100%; }
.wb-root .wb-method .widget-toggle-button { width: auto; min-width: 52px; flex: 1 1 auto; margin: 0 4px 4px 0; }
.wb-root .wb-method > div { flex-wrap: wrap; width: 100%; }
.wb-root .wb-skip { display: flex; flex-flow: row wrap; gap: 4px; width: 100%; overflow: visible; }
.wb-root .wb-skip .widget-toggle-button {
  width: auto; height: 24px; line-height: 22px; padding: 0 8px; margin: 0; font-size: 12px;
}
.wb-root .widget-toggle-button.mod-active { box-shadow: inset 0 0 0 2px var(--wb-focus); font-weight: 600; }
.wb-root .wb-verdict .widget-html-content { font-size: 15px; min-height: 24px; overflow-wrap: anywhere; }
.wb-root .wb-fits b { color: var(--wb-good); } .wb-root .wb-offloads b { color: var(--wb-warn); }
.wb-root .wb-does_not_fit b { color: var(--wb-bad); }
.wb-root .wb-doing .widget-html-content { color: var(--wb-soft); font-size: 12px; min-height: 18px; }
.wb-root .wb-old { opacity: .55; }
.wb-root .wb-chart, .wb-root .wb-chart > *, .wb-root .wb-page {
  width: 100%; min-width: 0; overflow: hidden; margin: 0;
}
.wb-root .wb-page { height: 0; }
.wb-root .wb-chart { position: relative; overflow: visible; }
.wb-root .wb-touch { position: absolute; inset: 0; width: auto; margin: 0; overflow: visible; pointer-events: none; }
.wb-touch > :is(.wb-marks, .wb-limits) { position: absolute; top: 0; height: 0; }
.wb-touch > :is(.wb-strip, .wb-blocks) { position: absolute; }
.wb-touch .wb-blocks { pointer-events: auto; cursor: pointer; touch-action: pan-y; border-radius: 3px; }
.wb-touch .wb-block {
  position: absolute; inset-block: 0; border: 0 solid var(--wb-ink); text-align: center; font: 600 12px/1 monospace;
  color: var(--wb-ink); pointer-events: none;
}
.wb-touch .wb-whole::after {
  content: ""; position: absolute; inset: auto 6% -3px; border-bottom: 2px solid var(--wb-soft);
}
.wb-touch .wb-chosen {
  position: absolute; inset-block: -2px; background: color-mix(in srgb, var(--wb-focus) 16%, transparent);
  outline: 2px solid var(--wb-focus); border-radius: 2px; pointer-events: none;
}
.wb-touch .wb-limit { position: absolute; width: 18px; margin-left: -9px; cursor: ew-resize; pointer-events: auto; touch-action: none; }
.wb-touch .wb-limit::after {
  content: ""; position: absolute; inset: 0 7px; border-radius: 2px; background: var(--wb-ink); opacity: .0;
}
.wb-touch .wb-limit:is(:hover, :focus-visible, .wb-held)::after { opacity: 1; }
.wb-touch .wb-run {
  position: absolute; top: 0; height: 17px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
  font-size: 11px; line-height: 14px; padding: 0 3px; border-bottom: 3px solid var(--wb-run); color: var(--wb-soft);
  pointer-events: auto; border-right: 1px solid var(--wb-ground);
}
.wb-touch .wb-crossing {
  position: absolute; top: 0; font-size: 11px; line-height: 14px; white-space: nowrap; transform: translateX(-50%);
  background: var(--wb-ground); color: var(--wb-ink); padding: 0 2px; pointer-events: auto;
}
.wb-touch .wb-ghost { position: absolute; border: 1.5px dashed var(--wb-ink); opacity: .8; }
.wb-touch .wb-measured { position: absolute; width: 0; margin-left: -1px; border-left: 2px dotted var(--wb-ink); }
.wb-touch .wb-live { position: absolute; width: 0; border-left: 2px solid var(--wb-bad); transition: left .4s; }
.wb-touch .wb-live::after {
  content: attr(data-text); position: absolute; left: 4px; top: 0; white-space: nowrap; font-size: 11px;
  color: var(--wb-ink); background: color-mix(in srgb, var(--wb-ground) 78%, transparent); padding: 0 3px;
}
.wb-touch .wb-live-left::after { left: auto; right: 4px; }
.wb-touch :is(.wb-tip, .wb-menu) {
  position: absolute; z-index: 5; background: var(--wb-ground); color: var(--wb-ink); border: 1px solid var(--wb-soft);
  border-radius: 4px; box-shadow: 0 2px 8px rgba(0,0,0,.25); font-size: 12px; max-width: 96%;
}
.wb-touch .wb-tip { padding: 4px 8px; line-height: 1.4; pointer-events: none; }
.wb-touch .wb-menu { pointer-events: auto; padding: 4px 0; min-width: 190px; }
.wb-touch .wb-menu-title { padding: 2px 10px 4px; color: var(--wb-soft); overflow-wrap: anywhere; }
.wb-touch .wb-menu-item {
  display: flex; width: 100%; gap: 14px; justify-content: space-between; padding: 5px 10px; border: 0;
  border-left: 4px solid transparent; background: none; color: inherit; font: inherit; text-align: left; cursor: pointer;
}
.wb-touch .wb-menu-item:is(:hover, :focus) { background: var(--wb-raised); outline: none; text-decoration: underline; }
.wb-touch .wb-menu-note { color: var(--wb-soft); white-space: nowrap; }
.wb-touch .wb-said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.wb-root .wb-tools { margin-top: 6px; }
.wb-root .wb-tool { height: 26px; line-height: 24px; padding: 0 10px; font-size: 12px; margin: 0; flex: none; }
.wb-root .wb-hand-said { flex: 1 1 220px; width: auto; }
.wb-root .wb-hand-said .widget-html-content { color: var(--wb-soft); font-size: 12px; min-height: 20px; }
.wb-tree .wb-tree-search { width: 100%; max-width: 340px; padding: 4px 8px; font: inherit; color: var(--wb-ink);
  background: var(--wb-ground); border: 1px solid var(--wb-line); border-radius: 3px; }
.wb-tree .wb-tree-rows { max-height: 340px; overflow: auto; margin-top: 2px; }
.wb-tree .wb-tree-row {
  display: grid; grid-template-columns: minmax(0, 1fr) minmax(64px, 130px) 76px 76px; gap: 8px; padding: 1px 6px;
  font-size: 12px; line-height: 1.6; cursor: default;
}
.wb-tree .wb-tree-names { color: var(--wb-soft); margin-top: 6px; }
.wb-tree .wb-tree-names span:nth-child(n + 3), .wb-tree .wb-tree-size { text-align: right; font-variant-numeric: tabular-nums; }
.wb-tree .wb-tree-name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.wb-tree .wb-tree-homes { overflow: hidden; white-space: nowrap; }
.wb-tree .wb-tree-home { margin-right: 8px; }
.wb-tree .wb-tree-home::before {
  content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 4px; background: var(--wb-run);
}
.wb-tree .wb-tree-rows .wb-tree-row:hover, .wb-tree .wb-tree-rows:focus .wb-tree-at { background: var(--wb-raised); }
.wb-tree .wb-tree-rows:focus .wb-tree-at { outline: 1px solid var(--wb-focus); outline-offset: -1px; }
.wb-tree .wb-tree-note { color: var(--wb-soft); font-size: 12px; min-height: 18px; }
.wb-root .wb-key .widget-html-content {
  display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--wb-soft);
}
.wb-root .wb-key i {
  display: inline-block; width: 14px; height: 10px; margin-right: 5px; border: 1px solid var(--wb-soft);
  vertical-align: -1px;
}
.wb-root .wb-advice-row { align-items: flex-start; gap: 0 8px; margin: 2px 0; overflow: visible; width: 100%; }
.wb-root .wb-advice-text { flex: 1 1 0; min-width: 0; margin: 0; }
.wb-root .wb-advice-text .widget-html-content { line-height: 1.4; overflow-wrap: anywhere; padding-top: 3px; }
.wb-root .wb-advanced .jupyter-widget-Collapse-header, .wb-root .wb-advanced .p-Collapse-header {
  background: none; border: none; padding: 4px 0; color: var(--wb-soft); font-size: 12px;
}
.wb-root .wb-advanced .jupyter-widget-Collapse-contents { padding: 4px 0 0; border: none; background: none; }
.wb-root .wb-apply { width: auto; height: 24px; line-height: 22px; flex: none; padding: 0 10px; font-size: 12px; }
.wb-root .wb-plain-text { font-size: 12px; margin-top: 4px; } .wb-root .wb-plain-bar { display: flex; height: 18px; }
.wb-root .wb-plain-bar span { flex: none; min-width: 0; }
.wb-root .wb-plain-layers { display: flex; align-items: flex-end; gap: 1px; margin-top: 20px; }
.wb-root .wb-plain-layers span { flex: 1 1 0; min-width: 0; }
.wb-root .wb-tabs { width: 100%; min-width: 0; }
.wb-root .wb-tabs .widget-tab-contents { min-height: 250px; padding: 10px 12px; overflow: visible; }
.wb-root .wb-tabs .widget-box { overflow: visible; }
.wb-root select:not([multiple]) {
  background-image: linear-gradient(45deg, transparent 50%, #888 50%),
    linear-gradient(135deg, #888 50%, transparent 50%);
  background-size: 5px 5px; background-position: right 10px center, right 5px center; background-repeat: no-repeat;
}
.wb-root textarea { resize: vertical; }
.wb-root .wb-stack > .widget-label { width: 100%; flex: none; text-align: left; }
.wb-root .wb-stack { flex-direction: column; align-items: stretch; height: auto; }
.wb-root .wb-short { width: 230px; max-width: 100%; margin: 2px 0; }
.wb-root .wb-short > .widget-label { width: 118px; flex: 0 0 118px; text-align: left; }
.wb-root .wb-log {
  border: 1px solid var(--wb-line); border-radius: 4px; background: var(--wb-raised); padding: 8px 10px;
  min-height: 96px; max-height: 340px; overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.5; font-family: var(--jp-content-font-family, inherit); font-size: 14px;
}
.wb-root .wb-code-text {
  border: 1px solid var(--wb-line); border-radius: 4px; background: var(--wb-raised); color: var(--wb-ink);
  margin: 0 0 8px; padding: 8px 10px; max-height: 340px; overflow: auto; white-space: pre;
  font: 12px/1.5 var(--jp-code-font-family, monospace);
}
.wb-root .wb-code button {
  height: 28px; padding: 0 12px; margin: 0 8px 4px 0; border: 1px solid var(--wb-line); border-radius: 3px;
  cursor: pointer;
  background: var(--jp-layout-color2, ButtonFace); color: var(--wb-ink); font-size: 13px;
}
.wb-root .wb-code button:hover { border-color: var(--wb-focus); }
.wb-root :focus-visible { outline: 2px solid var(--wb-focus); outline-offset: 1px; }
.wb-root .wb-progress { width: 100%; margin: 4px 0; }
</style>"""


class Page(anywidget.AnyWidget):
    """Tells what the page is like where this stands, and when that changes. It shows nothing.

    Plotly follows neither by itself: it knows nothing of the notebook's theme, and a figure that was drawn before its
    place had a width keeps a width of its own. On the way it names the sliders' handles
    for screen readers, and lets tooltips of labels that are not seen be seen.

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
      let waiting = 0;
      const begin = () => {
        const root = el.closest(".wb-root");
        if (!root) { waiting = requestAnimationFrame(begin); return; }
        namer.observe(root, { childList: true, subtree: true, attributes: true, attributeFilter: ["title"] });
        name();
      };
      begin();
      return () => {
        cancelAnimationFrame(waiting);
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
