"""What a quantization will take, in the Quantize panel before it starts: each device's memory, and advice to follow."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.gptq_plan import plan_quantization
from workbench.hardware import device_label, format_bytes
from workbench.panels.look import classed, html, visible
from workbench.panels.picture import device_colour
from workbench.panels.what_if import Latest
from workbench.precision import GPTQ

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.calibration import CalibrationText
    from workbench.gptq_plan import QuantizeMemory, QuantizePlan
    from workbench.hardware import DeviceId
    from workbench.panels.state import State

_SIGNS = {"fits": "✓", "offloads": "✓", "does_not_fit": "✗"}


class AheadView:
    """Works the plan out while nothing moves, and shows it.

    Args:
        state: The state.
        amount: How much calibration text the controls ask for; may raise ValueError.
        in_view: Whether anyone is looking.

    Attributes:
        box: What is shown.
        plan: For the choices as they are now; None while it is worked out, or where there is nothing to quantize.
        on_plan: Called, from a thread of its own, when the plan has changed.
    """

    def __init__(self, state: State, amount: Callable[[], CalibrationText], in_view: Callable[[], bool]) -> None:
        self._state, self._amount, self._in_view = state, amount, in_view
        self._latest = Latest("workbench-quantize-plan")
        self._key: Any = None
        self.plan: QuantizePlan | None = None
        self.on_plan: Callable[[], None] = lambda: None
        self._said = html("wb-note", "wb-quantize-plan")
        self.apply = classed(w.Button(description="Make room", layout=w.Layout(width="auto")), "wb-make-room")
        self.box = w.VBox([self._said, self.apply])
        self.apply.on_click(state.guarded("quantize", lambda _: self._apply()))
        # "doing" last: an equal placement that answers a new question is announced by nothing else.
        state.observe(self.refresh, ["recipe", "machine", "skeleton", "placement", "doing"])
        self._show()

    def close(self) -> None:
        """End the background thread."""
        self._latest.close()

    def refresh(self, _: object = None) -> None:
        """Work the plan out anew, if anyone is looking and the question is another one."""
        if not self._in_view():
            return
        with self._state.lock:
            state, recipe, machine = self._state, self._state.recipe, self._state.machine
            skeleton = state.skeleton
            wanted = isinstance(recipe.precision, GPTQ) and skeleton is not None and skeleton.quantized_as is None
            if wanted and not state.is_current:
                return
            text = None
            if wanted:
                try:
                    text = self._amount()
                except ValueError:  # said beside the numbers
                    wanted = False
            key = (recipe, machine, text) if wanted else None
            if key == self._key:
                return
            self._key = key
            self._take(None)

        def find() -> QuantizePlan | None:
            return None if key is None else plan_quantization(recipe, calibration=text, machine=machine)

        def take(plan: QuantizePlan | None, problem: str) -> None:
            with state.lock:
                if key is not None and key == self._key:
                    self._take(plan, problem)

        self._latest.find_out(find, take)

    def _take(self, plan: QuantizePlan | None, problem: str = "") -> None:
        self.plan = plan
        self._show(problem)
        self.on_plan()

    def _apply(self) -> None:
        with self._state.lock:
            changes = (
                next((advice.changes for advice in self.plan.advice if advice.changes), None) if self.plan else None
            )
            if changes:
                self._state.update(**changes, device_map=None)

    def _show(self, problem: str = "") -> None:
        plan = self.plan
        self._said.value = escape(problem) if plan is None else plan_as_html(plan)
        sentence = next((advice for advice in plan.advice if advice.changes), "") if plan else ""
        self.apply.tooltip = f"Do it: {sentence}"
        visible(self.apply, when=bool(sentence))


def plan_as_html(plan: QuantizePlan) -> str:
    """Verdict, a bar and figures for each device, and advice."""
    largest = max(max(m.capacity_bytes, m.weight_bytes + m.work_bytes) for m in plan.memory.values()) or 1
    rows = "".join(
        _row(device, memory, largest)
        for device, memory in plan.memory.items()
        if device != "disk" or memory.weight_bytes
    )
    advice = "".join(f"<div>{escape(each)}</div>" for each in plan.advice)
    return (
        f'<div role="status" class="wb-{plan.verdict}">While quantizing: '
        f"<b>{_SIGNS[plan.verdict]} {escape(plan.summary)}</b></div>"
        '<table class="wb-ahead"><tr><th></th><th></th><th class="wb-number">weights</th>'
        '<th class="wb-number" title="An estimate, at the worst moment">work, estimated</th>'
        f'<th class="wb-number">of</th></tr>{rows}</table>'
        f"<div>The new folder: {format_bytes(plan.output_bytes)} of weights, "
        f'<span title="{plan.output_bytes:,} bytes">exact</span>; twice that on the disk while it is written.</div>'
        f"{advice}"
    )


def _row(device: DeviceId, memory: QuantizeMemory, largest: int) -> str:
    label = device_label(device)
    parts = ((memory.weight_bytes, 1.0), (memory.work_bytes, 0.55))
    blocks = "".join(
        f'<i style="width:{100 * size / largest:.2f}%;background:{device_colour(device)};opacity:{opacity}"></i>'
        for size, opacity in parts
    )
    limit = f'<i class="wb-ahead-limit" style="left:{100 * memory.capacity_bytes / largest:.2f}%"></i>'
    sizes = "".join(
        f'<td class="wb-number" title="{size:,} bytes">{format_bytes(size)}</td>'
        for size in (memory.weight_bytes, memory.work_bytes, memory.capacity_bytes)
    )
    over = f" lacks {format_bytes(-memory.free_bytes)}" if memory.free_bytes < 0 else ""
    return (
        f'<tr><td>{label}</td><td class="wb-ahead-bar"><div aria-hidden="true">{blocks}{limit}</div></td>{sizes}'
        f"<td>{over}</td></tr>"
    )
