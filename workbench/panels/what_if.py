"""The What if panel: the context grown until something spills, and one device's budget swept."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

import ipywidgets as w

from workbench.hardware import device_label
from workbench.panels.curves import (
    MovedOn,
    context_growth,
    growth_svg,
    sweep_budget,
    sweep_sentence,
    sweep_svg,
)
from workbench.panels.look import classed, html, problem_line
from workbench.panels.state import as_sentence, bind

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.panels.state import State

_T = TypeVar("_T")
_REST_SECONDS = 0.3  # a moving slider has the processor to itself
_MOST_TOKENS = 1 << 17


class Latest:
    """One thread that works on the newest job and gives up older ones.

    Args:
        name: The thread's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Condition()
        self._job: Callable[[Callable[[], bool]], None] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def ask(self, job: Callable[[Callable[[], bool]], None]) -> None:
        """Do a job once nothing has been asked for a moment; it is given a function that says when to give up."""
        with self._wake:
            self._job = job
            self._wake.notify_all()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def find_out(self, find: Callable[[], _T], take: Callable[[_T | None, str], None]) -> None:
        """Find something out, unless something newer is asked for before that begins.

        Args:
            find: Finds it out.
            take: Given what was found and "", or None and what went wrong.
        """

        def job(moved_on: Callable[[], bool]) -> None:
            if moved_on():
                return
            try:
                found = find()
            except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
                take(None, as_sentence(error))
            else:
                take(found, "")

        self.ask(job)

    def close(self) -> None:
        """Give up, and wait for the thread's end."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _moved_on(self) -> bool:
        return self._closed or self._job is not None

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._moved_on)
                job = None
                while not self._closed and job is not self._job:
                    job = self._job
                    self._wake.wait_for(lambda seen=job: self._closed or self._job is not seen, _REST_SECONDS)  # type: ignore[misc]
                if self._closed:
                    return
                self._job = None
            if job is not None:
                job(self._moved_on)


class WhatIfPanel:
    """Two curves around the present choices, worked out while nothing moves.

    Attributes:
        box: What is shown.
        context: A slider for the context length.
        device: Whose budget is swept.
    """

    def __init__(self, state: State, in_view: Callable[[], bool]) -> None:
        self._state, self._in_view = state, in_view
        self._latest = Latest("workbench-what-if")
        self._done: Any = None
        self.context = classed(
            w.FloatLogSlider(
                description="Context",
                base=2,
                min=7,
                max=math.log2(_MOST_TOKENS),
                step=0.05,
                value=2048,
                readout=False,
                tooltip="Context length in tokens; the KV cache and the activations grow with it",
            ),
            "wb-what-if-context",
            "wb-wide",
        )
        self._growth = html("wb-growth")
        self.device = classed(
            w.Dropdown(description="Budget of", options=[], tooltip="Whose budget is swept"),
            "wb-what-if-device",
            "wb-wide",
        )
        self._sweep = html("wb-sweep")
        self.box = w.VBox(
            [
                problem_line(state, "what if"),
                self.context,
                self._growth,
                self.device,
                self._sweep,
                html(
                    "wb-note",
                    value="Solid: predicted tokens a second. Dashed: share of the weights on GPUs (in RAM where there "
                    "are none). Shaded: does not fit.",
                ),
            ]
        )
        bind(
            self.context,
            state,
            "what if",
            show=lambda: float(self._within(state.recipe.workload.context_length)),
            write=self._write_context,
            same=lambda a, b: abs(math.log2(max(1, a)) - math.log2(max(1, b))) < 0.025,
        )
        state.observe(self._fit_slider, "skeleton")
        state.observe(self.refresh, ["placement", "skeleton"])
        self.device.observe(state.guarded("what if", lambda _: self.refresh()), "value")
        self._fit_slider()

    def close(self) -> None:
        """End the background thread."""
        self._latest.close()

    def _within(self, tokens: int) -> int:
        return int(min(2**self.context.max, max(2**self.context.min, tokens)))

    def _write_context(self, tokens: float) -> None:
        skeleton = self._state.skeleton
        limit = None if skeleton is None else skeleton.context_length
        whole = max(1, round(tokens / 64) * 64)
        workload = self._state.recipe.workload
        self._state.update(workload=replace(workload, context_length=min(whole, limit or whole)))

    def _fit_slider(self, _: object = None) -> None:
        skeleton = self._state.skeleton
        most = math.log2(max(256, (skeleton and skeleton.context_length) or _MOST_TOKENS))
        if self.context.max != most:
            self.context.max = most

    def refresh(self, _: object = None) -> None:
        """Work both curves out anew, if anyone is looking."""
        if not self._in_view():
            return
        with self._state.lock:
            placement, skeleton = self._state.placement, self._state.skeleton
            if placement is None or skeleton is None:
                return
            labels = [(device_label(device), device) for device in placement.memory]
            if list(self.device.options) != labels:
                before = self.device.value
                self.device.options = labels
                self.device.value = before if before in placement.memory else labels[0][1]
            device = self.device.value
            key = (placement.recipe, placement.machine, placement.kv_cache_bytes is None, device)
        if key == self._done:
            return

        def job(moved_on: Callable[[], bool]) -> None:
            try:
                growth = context_growth(placement, skeleton, moved_on)
                self._growth.value = (
                    growth_svg(growth) + _said(growth.sentence)
                    if growth is not None
                    else _said("The cache is not known yet, or something has no room.")
                )
                sweep = sweep_budget(placement, skeleton, device, moved_on)
                said = sweep_sentence(sweep)
                if sweep.strategy != placement.recipe.strategy:
                    said += ' A custom map follows no budget: this is with strategy "auto".'
                self._sweep.value = sweep_svg(sweep) + _said(said)
                self._done = key
                self._state.report("what if", "")
            except MovedOn:
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
                self._state.report("what if", as_sentence(error))

        self._latest.ask(job)


def _said(sentence: str) -> str:
    return f'<div role="status">{escape(sentence)}</div>'
