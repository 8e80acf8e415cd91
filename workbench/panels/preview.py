"""The Preview panel: the verdict, the picture, and advice; always in view."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING

import ipywidgets as w

from workbench.first_forward import bytes_once_run
from workbench.hardware import device_label, format_bytes
from workbench.panels.advice import AdviceList
from workbench.panels.chart import Chart
from workbench.panels.live import Live
from workbench.panels.look import Page, classed, close_tree, html, panel, problem_line
from workbench.panels.picture import KINDS, MODULE_KINDS, chart_height, chart_spec, spec_as_html
from workbench.panels.state import import_numpy
from workbench.panels.touch import Hands
from workbench.panels.tree import kinds_by_block
from workbench.show import duration, rate
from workbench.sizes import sizes_of
from workbench.speed import predict_load_seconds, predict_speed

if TYPE_CHECKING:
    from workbench.panels.picture import ChartSpec
    from workbench.panels.state import State
    from workbench.placement import Placement
    from workbench.sizes import Sizes
    from workbench.skeleton import Skeleton

VERDICTS = {"fits": ("✓", "Fits"), "offloads": ("⇅", "Offloads"), "does_not_fit": ("✗", "Does not fit")}


class PreviewPanel:
    """What the choices come to.

    Attributes:
        box: What is shown.
        chart: The plotly figure, once there is one.
        advice: What to do about the verdict.
        hands: What hands do in the figure.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.chart: Chart | None = None
        self._closed = False
        self._kinds: tuple[Sizes, dict[str, dict[str, int]]] | None = None
        self.page = classed(Page(), "wb-page")
        self._verdict = html("wb-verdict")
        self._doing = html("wb-doing")
        self._plain = html("wb-plain")
        self._why_plain = html("wb-note")
        self.advice = AdviceList(state)
        self.hands = Hands(state)
        self.hands.on_stale = self._draw_anew
        self._holder = classed(w.Box([self._plain, self.hands.touch]), "wb-chart")
        self._live = Live(state, self.hands.touch)
        self._key = html("wb-key", value=_key(by_kind=False))
        self.box = panel(
            "Preview",
            [
                problem_line(state, "preview"),
                self._verdict,
                self._doing,
                self.page,
                self._holder,
                self._key,
                self.hands.bar,
                self._why_plain,
                self.advice.box,
            ],
        )
        state.observe(self._show, "placement")
        state.observe(self._show_doing, ["doing", "recipe", "machine", "placement"])
        state.observe(self._redraw, ["pinned", "session"])
        self.page.observe(self._redraw, ["dark", "width_px"])
        self.page.observe(lambda _: state.be_seen(), "width_px")
        self.hands.kinds.observe(self._switch_kinds, "value")
        self._maker = threading.Thread(target=self._make_chart, name="workbench-chart", daemon=True)
        self._show()
        self._show_doing()

    def start(self) -> None:
        """Import plotly and make the figure in the background; the plain picture stands in until then."""
        self._maker.start()

    def close(self) -> None:
        """Let the background thread come to its end."""
        self._closed = True
        self._state.be_seen()
        self.hands.close()
        self._live.close()
        if self._maker.is_alive():
            self._maker.join()

    def _make_chart(self) -> None:
        self._state.wait_seen()
        import_numpy()
        try:
            chart = Chart()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with plotly, the plain picture will do
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._why_plain.value = (
                f"Plotly's figure could not be made, so this is the plain picture ({escape(reason[:200])})."
            )
            return
        with self._state.lock:
            if self._closed:
                close_tree(chart.figure)
                return
            self.chart = chart
            self._redraw()

    def _show(self, _: object = None) -> None:
        placement = self._state.placement
        if placement is None:
            self._verdict.value = '<div role="status">The verdict appears here in a few seconds.</div>'
            self._holder.layout.height = f"{chart_height(len(self._state.budgets()))}px"
            return
        symbol, word = VERDICTS[placement.verdict]
        for name in VERDICTS:
            if name == placement.verdict:
                self._verdict.add_class(f"wb-{name}")
            else:
                self._verdict.remove_class(f"wb-{name}")
        # The summary begins with the verdict's own words.
        rest = placement.summary.removeprefix(word)
        summary = f"<b>{symbol} {word}</b>{escape(rest)}{self._speed(placement)}"
        self._verdict.value = f'<div role="status" title="{_exact(placement)}">{summary}</div>'
        self._redraw()

    def _speed(self, placement: Placement) -> str:
        """The estimated decoding speed, as HTML; nothing where there is no estimate."""
        skeleton = self._state.skeleton
        speed = None if skeleton is None else predict_speed(placement, skeleton)
        if speed is None:
            return ""
        basis = "measured on this machine" if speed.calibrated else "from data sheets, unmeasured"
        tip = f"Estimate for one sequence at a short context; bandwidths {basis}"
        return f' <span class="wb-speed" title="{tip}">est. {rate(speed)} tok/s</span>'

    def _redraw(self, _: object = None) -> None:
        with self._state.lock:
            placement = self._state.placement
            if placement is None:
                return
            spec = self._spec(placement)
            if self._holder.layout.height != f"{spec.height_px}px":
                self._holder.layout.height = f"{spec.height_px}px"
            self.hands.draw(spec, 0 if self.chart is None else self.page.width_px)
            if self.chart is None:
                self._plain.value = spec_as_html(spec)
                return
            self.chart.show(spec, dark=self.page.dark, width_px=self.page.width_px)
            shown = (self.chart.figure, self.hands.touch)
            if self._holder.children != shown:  # made and shown in different steps: Colab needs that
                self._holder.children = shown
                close_tree(self._plain)

    def _draw_anew(self) -> None:
        """Make the pages forget the figure and draw it from what it now is."""
        with self._state.lock:
            if self.chart is not None:
                self.chart.figure.send_state(["_widget_data", "_widget_layout"])
                self._holder.children = (self.hands.touch,)
                self._holder.children = (self.chart.figure, self.hands.touch)

    def _spec(self, placement: Placement) -> ChartSpec:
        skeleton, session = self._state.skeleton, self._state.session
        loaded = session is not None and session.placement.device_map == placement.device_map
        same = loaded and session.recipe == placement.recipe
        kinds = None
        if self.hands.kinds.value and skeleton is not None:
            sizes = sizes_of(skeleton.on(placement.machine), placement.recipe.precision)
            if self._kinds is None or self._kinds[0] is not sizes:
                self._kinds = sizes, kinds_by_block(sizes)
            kinds = self._kinds[1]
        return chart_spec(
            placement,
            width_px=self.page.width_px,
            skeleton=skeleton,
            kinds=kinds,
            pinned=self._state.pinned,
            measured=session.load_report.measured_bytes if same else None,
        )

    def _switch_kinds(self, change: dict[str, bool]) -> None:
        self._key.value = _key(by_kind=change["new"])
        self._redraw()

    def _show_doing(self, _: object = None) -> None:
        """What the planner is at, and when it has come to rest what else is known of the placement."""
        placement, skeleton = self._state.placement, self._state.skeleton
        told = escape(self._state.doing)
        if not told and placement is not None and placement.advice is not None and skeleton is not None:
            told = _facts(placement, skeleton)
        self._doing.value = told
        if self._state.placement is not None and not self._state.is_current:
            self._holder.add_class("wb-old")
        else:
            self._holder.remove_class("wb-old")


def _exact(placement: Placement) -> str:
    parts = [f"weights {placement.total_bytes:,} bytes"]
    if placement.kv_cache_bytes is not None:
        parts.append(f"KV cache {placement.kv_cache_bytes:,} bytes ({format_bytes(placement.kv_cache_bytes)})")
    return escape("; ".join(parts))


def _facts(placement: Placement, skeleton: Skeleton) -> str:
    """How long a load takes, and the weights after the first token where these are others, as HTML."""
    told = []
    seconds = predict_load_seconds(placement, skeleton)
    if seconds is not None:
        basis = "with the files on this machine already"
        told.append(f'<span title="Estimate, {basis}">Loads in about {duration(seconds)} (est.).</span>')
    once = None if placement.unplaced else bytes_once_run(placement, skeleton)
    if once is not None and sum(once.values()) != placement.total_bytes:
        exact = "; ".join(f"{device_label(device)} {size:,} bytes" for device, size in once.items())
        told.append(
            f'<span title="{exact}">Weights take {format_bytes(sum(once.values()))} once they have run: '
            "they are repacked then.</span>"
        )
    return " ".join(told)


_HATCHES = {
    "": "background:var(--wb-soft)",
    "/": "background:repeating-linear-gradient(135deg,var(--wb-soft) 0 2px,transparent 2px 5px)",
    "x": "background:repeating-linear-gradient(45deg,var(--wb-soft) 0 1px,transparent 1px 4px),"
    "repeating-linear-gradient(135deg,var(--wb-soft) 0 1px,transparent 1px 4px)",
    "-": "background:repeating-linear-gradient(0deg,var(--wb-soft) 0 1px,transparent 1px 4px)",
    ".": "background:radial-gradient(var(--wb-soft) 1px,transparent 1.5px) 0 0/4px 4px",
}


def _key(*, by_kind: bool) -> str:
    """What the hatchings and the lines mean."""
    entries = [
        f'<span><i style="{"opacity:.4" if kind == "free" else _HATCHES[shape]}"></i>{escape(kind)}</span>'
        for kind, shape in KINDS
    ]
    entries.append('<span><i style="width:0;height:12px;border-width:0 0 0 2px"></i>limit</span>')
    entries.append('<span><i style="background:#D55E00;border-color:#D55E00"></i>no room</span>')
    entries.append('<span title="One tensor in two layers: they move together"><b>=</b> tied</span>')
    entries.append('<span><i style="height:0;border-width:2px 0 0"></i>stays whole</span>')
    if by_kind:
        entries += [
            f'<span><i style="background:{colour}"></i>{kind}</span>' for kind, (colour, _) in MODULE_KINDS.items()
        ]
    return "".join(entries)
