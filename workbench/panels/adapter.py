"""The Adapter panel: load, switch, merge and remove LoRA adapters of the loaded model, and train one."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.adapters import describe
from workbench.panels.job import Job
from workbench.panels.lines import LinesSpec, LinesView
from workbench.panels.look import button, classed, html, number_field, problem_line, text_field, visible
from workbench.panels.state import NO_MODEL, as_sentence
from workbench.panels.what_if import Latest

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.panels.look import Page
    from workbench.panels.state import State
    from workbench.session import Session
    from workbench.training import TrainingProgress, TrainingReport

_BASE = "none: the base model"
_APART_SECONDS = 0.4  # between pictures of the loss
_BETWEEN = "=>"


class AdapterPanel:
    """Everything about adapters, in one tab.

    Args:
        state: The state.
        page: What the page is like.
        in_view: Whether the tab is.

    Attributes:
        box: What is shown.
        report: Of the last training, or None.
        chart: The loss.
    """

    def __init__(self, state: State, page: Page, in_view: Callable[[], bool]) -> None:
        self._state, self._in_view = state, in_view
        self._job = Job(
            state, "adapter", cancelled="Stopped; a folder keeps what a later run goes on with.", tip="Steps done"
        )
        self._latest = Latest("workbench-adapter")
        self._drawn, self._showing = 0.0, False
        self.report: TrainingReport | None = None
        self.location = text_field(
            "Adapter", "wb-adapter-location", "a folder or org/name", "A LoRA adapter that was trained on this model"
        )
        self.load = button("Load adapter", "wb-adapter-load", "Put it beside the loaded model, and use it")
        self.active = classed(
            w.Dropdown(description="In use", options=(_BASE,), tooltip="Which adapter speaks in Generate"),
            "wb-adapter-active",
            "wb-wide",
        )
        self.merge = button("Merge", "wb-adapter-merge", "Add it into the weights for good; quantized ones are rounded")
        self.remove = button("Remove", "wb-adapter-remove", "Take it out of memory")
        self._held = html("wb-note", "wb-adapter-held")
        self.texts = classed(
            w.Textarea(
                description="Examples",
                placeholder=f"What does a cat say? {_BETWEEN} Meow.",
                rows=5,
                tooltip=f"One on each line: question {_BETWEEN} answer, of which the answer is learnt, or just a text",
            ),
            "wb-adapter-texts",
            "wb-wide",
            "wb-stack",
        )
        self.numbers = {
            "r": number_field("Rank", 8, "wb-adapter-r", "How much it can learn, and its size"),
            "alpha": number_field("Alpha", 16.0, "wb-adapter-alpha", "Its strength is alpha / rank"),
            "steps": number_field("Steps", 60, "wb-adapter-steps", "Times that it is changed"),
            "batch_size": number_field("Batch", 4, "wb-adapter-batch", "Examples for each step"),
            "learning_rate": number_field("Learning rate", 1e-3, "wb-adapter-rate", "Lower it if the loss jumps about"),
        }
        self.checkpointing = classed(
            w.Checkbox(
                description="Gradient checkpointing",
                indent=False,
                tooltip="Compute the layers twice in place of keeping what is between: slower, much smaller",
            ),
            "wb-adapter-checkpointing",
        )
        self.folder = text_field("Save to", "wb-adapter-folder", "a new folder", "Where the trained adapter is saved")
        self.train = button("Train", "wb-adapter-train", "Train an adapter on the loaded model", "primary")
        self.cancel = button("Cancel", "wb-adapter-cancel", "Stop after this step")
        self._plan = html("wb-note", "wb-adapter-plan")
        self._why = html("wb-note", "wb-adapter-why")
        self._said = html("wb-adapter-report")
        self.chart = LinesView(page, "wb-adapter-chart", 240)
        loading = [
            classed(w.HBox([self.location, self.load]), "wb-row"),
            self.active,
            classed(w.HBox([self.merge, self.remove]), "wb-row"),
            self._held,
        ]
        training = [
            self.texts,
            classed(w.HBox(list(self.numbers.values())), "wb-row"),
            self.checkpointing,
            self.folder,
            self._plan,
            classed(w.HBox([self.train, self.cancel]), "wb-row"),
            self._job.bar,
        ]
        self._all = w.VBox([*loading, *training])
        self.box = w.VBox(
            [self._why, self._all, problem_line(state, "adapter"), self._job.text, self.chart.box, self._said]
        )
        self.load.on_click(state.guarded("adapter", self._load))
        self.merge.on_click(state.guarded("adapter", self._merge))
        self.remove.on_click(state.guarded("adapter", self._remove))
        self.active.observe(state.guarded("adapter", self._use), "value")
        self.train.on_click(state.guarded("adapter", self._train))
        self.cancel.on_click(lambda _: self._job.cancel.set())  # waits for nothing, not even for the lock
        for control in (self.texts, self.checkpointing, *self.numbers.values()):
            control.observe(self.refresh, "value")
        state.observe(self._show, ["activity", "session"])
        self._show()

    def close(self) -> None:
        """Stop what is going on and wait for it."""
        self._job.close()
        self._latest.close()

    def refresh(self, _: object = None) -> None:
        """Work out anew what a training would take, if anybody looks."""
        session = self._state.session
        if session is not None and self._in_view() and not self._state.activity:
            self._latest.ask(lambda _moved_on: self._foretell(session))

    def examples(self) -> list[str | tuple[str, str]]:
        """What is in the field, a text or a pair for each line."""
        found: list[str | tuple[str, str]] = []
        for line in self.texts.value.splitlines():
            question, between, answer = (part.strip() for part in line.partition(_BETWEEN))
            if line.strip():
                found.append((question, answer) if between and question and answer else line.strip())
        return found

    # The work.

    def _work(self, doing: str, work: Callable[[Session], str]) -> None:
        """Do something with the adapters of the loaded model, and keep recipe and preview in step."""
        session = self._state.begin_with_model(doing)

        def run() -> None:
            said = work(session)
            self._follow(session)
            self._said.value = f'<div role="status">{escape(said)}</div>'

        self._job.start(run, beside=True)

    def _load(self, _: object) -> None:
        location = self.location.value.strip()
        if not location:
            raise ValueError("Name an adapter: a folder, or org/name on the Hub.")
        self._work("loading an adapter", lambda session: describe(session.adapters.load(location)) + ".")

    def _use(self, change: Any) -> None:
        session, name = self._state.session, None if change["new"] == _BASE else change["new"]
        if self._showing or session is None or name == session.adapters.active:
            return

        def use(session: Session) -> str:
            session.adapters.use(name)
            return "The base model speaks alone." if name is None else f"{name} is in use."

        self._work("switching adapters", use)

    def _merge(self, _: object) -> None:
        name = self._chosen()
        self._work("merging an adapter", lambda session: session.adapters.merge(name))

    def _remove(self, _: object) -> None:
        name = self._chosen()

        def remove(session: Session) -> str:
            session.adapters.remove(name)
            return f"{name} was removed."

        self._work("removing an adapter", remove)

    def _chosen(self) -> str:
        if self.active.value == _BASE:
            raise ValueError("Pick an adapter under In use first.")
        return str(self.active.value)

    def _options(self) -> dict[str, Any]:
        return {
            **{name: control.value for name, control in self.numbers.items()},
            "gradient_checkpointing": bool(self.checkpointing.value),
        }

    def _train(self, _: object) -> None:
        examples, folder = self.examples(), self.folder.value.strip() or None
        if not examples:
            raise ValueError("Give some examples, one on each line.")
        session = self._state.begin_with_model("training")
        taken = {adapter.name for adapter in session.adapters.list()}
        number = 1
        while (name := "adapter" if number == 1 else f"adapter_{number}") in taken:
            number += 1
        options, job = {**self._options(), "name": name}, self._job

        def progress(step: TrainingProgress) -> None:
            job.progress(step)
            self._draw(step)

        def work() -> None:
            report = session.train_adapter(examples, folder=folder, progress=progress, cancel=job.cancel, **options)
            self.report = report
            self._follow(session)
            self._said.value = f'<div role="status">{"<br>".join(map(escape, report.lines))}</div>'

        def prepare() -> None:
            self.report, self._said.value = None, ""
            self.chart.show(loss_spec(()))

        job.start(work, prepare=prepare, beside=True)

    def _draw(self, step: TrainingProgress) -> None:
        now = time.monotonic()
        if step.losses and (now - self._drawn > _APART_SECONDS or step.done == step.total):
            self._drawn = now
            self.chart.update(loss_spec(step.losses))

    def _foretell(self, session: Session) -> None:
        examples = self.examples()
        try:
            said = session.plan_training(examples, **self._options()).sentence if examples else ""
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
            said = as_sentence(error)
        self._plan.value = escape(said)

    # What the controls show.

    def _follow(self, session: Session) -> None:
        """The preview counts what is loaded."""
        state = self._state
        with state.lock:
            if state.session is session and state.recipe.adapters != session.recipe.adapters:
                same_model = state.recipe.model == session.recipe.model
                if same_model:
                    state.update(adapters=session.recipe.adapters)

    def _show(self, _: object = None) -> None:
        state = self._state
        session, idle = state.session, not state.activity
        self._why.value = "" if session is not None else NO_MODEL
        visible(self._all, when=session is not None)
        held = () if session is None else session.adapters.list()
        names = (_BASE, *(adapter.name for adapter in held))
        self._showing = True
        if self.active.options != names:
            self.active.options = names
        now = None if session is None else session.adapters.active
        self.active.value = _BASE if now is None else now
        self._showing = False
        self._held.value = "<br>".join(escape(describe(adapter)) for adapter in held)
        for control in (self.load, self.train, self.active):
            control.disabled = not idle
        self.merge.disabled = self.remove.disabled = not idle or not held
        self.cancel.disabled = state.activity != "training"
        if idle:
            self.refresh()


def loss_spec(losses: tuple[float, ...]) -> LinesSpec:
    """What the chart of a training shows."""
    return LinesSpec(
        series={"loss": losses}, x=list(range(1, len(losses) + 1)), x_title="step", y_title="loss", y_format=".3g"
    )
