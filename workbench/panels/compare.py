"""The Compare panel: what fits, in every precision, side by side."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.compare import what_fits
from workbench.hardware import device_label, format_bytes
from workbench.panels.look import classed, close_tree, html, problem_line
from workbench.panels.preview import VERDICTS
from workbench.panels.state import as_sentence
from workbench.show import rate
from workbench.skeleton import read_skeleton
from workbench.speed import predict_speed

if TYPE_CHECKING:
    from workbench.compare import Fit
    from workbench.hardware import Machine
    from workbench.panels.state import State
    from workbench.placement import Placement
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton


class ComparePanel:
    """A table of precisions, best first, each of which one button takes over.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._asked: tuple[Recipe, Machine] | None = None
        self._thread: threading.Thread | None = None
        self.compare = classed(
            w.Button(
                description="Compare precisions",
                button_style="primary",
                tooltip="Plan this model on this machine in every precision",
                layout=w.Layout(width="auto"),
            ),
            "wb-compare",
        )
        self._note = html("wb-note", "wb-compare-note")
        self._table = html("wb-compare-table", "wb-fits-table")
        self._uses = classed(w.HBox([]), "wb-row", "wb-use-precision")
        self._pinned = html("wb-compare-table", "wb-pinned")
        self.box = w.VBox(
            [self._pinned, self.compare, problem_line(state, "compare"), self._note, self._table, self._uses]
        )
        state.observe(self._show_pinned, ["pinned", "placement"])
        self._show_pinned()
        self.compare.on_click(state.guarded("compare", self._start))
        state.observe(self._show_age, ["recipe", "machine"])

    def close(self) -> None:
        """Wait for a comparison that is going on."""
        if self._thread is not None:
            self._thread.join()

    def _show_pinned(self, _: object = None) -> None:
        state = self._state
        before, skeleton = state.pinned_skeleton, state.skeleton
        if state.pinned is None or state.placement is None or before is None or skeleton is None:
            told = "<div>Pin a placement below the picture to compare the next ones with it.</div>"
        else:
            told = differences_as_html(differences(state.pinned, state.placement, (before, skeleton)))
        if self._pinned.value != told:
            self._pinned.value = told

    def _start(self, _: object) -> None:
        with self._state.lock:
            recipe, machine = self._state.recipe, self._state.machine
        self.compare.disabled = True
        self._note.value = '<div role="status">Planning every precision ...</div>'
        # Planning takes seconds for the largest models; it is no torch work, so it leaves the worker alone.
        self._thread = threading.Thread(target=self._run, args=(recipe, machine), name="workbench-compare", daemon=True)
        self._thread.start()

    def _run(self, recipe: Recipe, machine: Machine) -> None:
        try:
            fits = what_fits(recipe, machine=machine)
            with self._state.lock:
                self._asked = recipe, machine
                self._show(fits)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            self._note.value = ""
            self._state.report("compare", as_sentence(error))
        finally:
            self.compare.disabled = False

    def _show(self, fits: tuple[Fit, ...]) -> None:
        self._table.value = fits_as_html(fits)
        old = self._uses.children
        self._uses.children = tuple(self._use(fit) for fit in fits)
        close_tree(*old)
        self._show_age()

    def _use(self, fit: Fit) -> Any:
        label = fit.precision.label
        button = w.Button(description=f"Use {label}", tooltip=f"Take over {label}", layout=w.Layout(width="auto"))
        button.on_click(self._state.guarded("compare", lambda _: self._state.update(precision=fit.precision)))
        return button

    def _show_age(self, _: object = None) -> None:
        if self._asked is None:
            return
        recipe, machine = self._asked
        same = (
            machine == self._state.machine
            and recipe.with_(precision=self._state.recipe.precision) == self._state.recipe
        )
        self._note.value = "" if same else "For choices that have changed since: compare again."


def differences(
    pinned: Placement, now: Placement, skeletons: tuple[Skeleton, Skeleton] | None = None
) -> list[tuple[str, str, str, str]]:
    """What differs between a pinned placement and the present one.

    Args:
        pinned: The one.
        now: The other.
        skeletons: Their models, if they are already there; None reads them, which may ask the Hub.

    Returns:
        Rows of (what, pinned, now, difference), those that are the same left out; the difference is empty where there
        is none to be counted.
    """
    rows = [
        ("Model", str(pinned.recipe.model), str(now.recipe.model), ""),
        ("Machine", pinned.machine.name, now.machine.name, ""),
        ("Precision", pinned.precision.label, now.precision.label, ""),
        ("Strategy", pinned.recipe.strategy, now.recipe.strategy, ""),
        ("Verdict", VERDICTS[pinned.verdict][1], VERDICTS[now.verdict][1], ""),
        _speeds(pinned, now, skeletons or (read_skeleton(pinned.recipe.model), read_skeleton(now.recipe.model))),
        _sizes("Weights", pinned.total_bytes, now.total_bytes),
        _sizes("KV cache", pinned.kv_cache_bytes, now.kv_cache_bytes),
    ]
    for device in dict.fromkeys((*pinned.memory, *now.memory)):
        a, b = pinned.memory.get(device), now.memory.get(device)
        for what, attribute in (("limit", "limit_bytes"), ("weights", "weight_bytes"), ("in use", "used_bytes")):
            sizes = [getattr(memory, attribute) if memory else None for memory in (a, b)]
            rows.append(_sizes(f"{device_label(device)} {what}", *sizes))
    rows.append(_sizes("Fetched a token", *(sum(x.bytes_after for x in p.waiting) for p in (pinned, now))))
    rows.append(("Crossings", str(pinned.crossings), str(now.crossings), ""))
    homes = {layer.name: layer.device for layer in pinned.layers}
    elsewhere = [x.name for x in now.layers if x.name in homes and homes[x.name] != x.device]
    if elsewhere:
        named = ", ".join(elsewhere[:3]) + (" ..." if len(elsewhere) > 3 else "")
        rows.append(("Layers elsewhere", "", f"{len(elsewhere)}: {named}", ""))
    return [row for row in rows if row[1] != row[2] or row[3]]


def _sizes(what: str, a: int | None, b: int | None) -> tuple[str, str, str, str]:
    nothing = "unknown" if what == "KV cache" else "not used"
    left, right = (nothing if size is None else format_bytes(size) for size in (a, b))
    off = "" if a is None or b is None or a == b else f"{b - a:+,} bytes"
    return what, left, right, off


def _speeds(pinned: Placement, now: Placement, skeletons: tuple[Skeleton, Skeleton]) -> tuple[str, str, str, str]:
    speeds = [predict_speed(each, skeleton) for each, skeleton in zip((pinned, now), skeletons, strict=True)]
    left, right = ("no estimate" if s is None else f"est. {rate(s)} tok/s" for s in speeds)
    factor = ""
    if speeds[0] is not None and speeds[1] is not None and left != right:
        factor = f"x {speeds[1].tokens_per_second / speeds[0].tokens_per_second:.2g}"
    return "Speed", left, right, factor


def differences_as_html(rows: list[tuple[str, str, str, str]]) -> str:
    """The same as a table."""
    if not rows:
        return "<div>Pinned: nothing differs from it yet.</div>"
    lines = "".join(
        f"<tr><td>{escape(what)}</td><td>{escape(a)}</td><td>{escape(b)}</td>"
        f'<td class="wb-number">{escape(off)}</td></tr>'
        for what, a, b, off in rows
    )
    head = '<tr><th></th><th>Pinned</th><th>Now</th><th class="wb-number">Difference</th></tr>'
    return f"<table>{head}{lines}</table>"


def fits_as_html(fits: tuple[Fit, ...]) -> str:
    """The comparison as a table."""
    rows = []
    for fit in fits:
        symbol, word = VERDICTS[fit.placement.verdict]
        context = (
            "unknown" if fit.longest_context is None else f"{fit.longest_context:,}" if fit.longest_context else "none"
        )
        speed = "no estimate" if fit.speed is None else f"est. {rate(fit.speed)} tok/s"
        cache = fit.placement.kv_cache_bytes
        rows.append(
            f"<tr><td>{escape(fit.precision.label)}</td>"
            f'<td title="{escape(fit.placement.summary)}">{symbol} {word}</td>'
            f"{_bytes(fit.placement.total_bytes)}{_bytes(cache)}"
            f'<td class="wb-number">{context}</td><td class="wb-number">{speed}</td></tr>'
        )
    heads = ("Precision", "Verdict", "Weights", "KV cache", "Longest context", "Speed")
    numbers = ' class="wb-number"'
    head = "".join(f"<th{numbers if index > 1 else ''}>{name}</th>" for index, name in enumerate(heads))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _bytes(size_bytes: int | None) -> str:
    if size_bytes is None:
        return '<td class="wb-number">unknown</td>'
    return f'<td class="wb-number" title="{size_bytes:,} bytes">{format_bytes(size_bytes)}</td>'
