"""The one state that all panels share: inputs, read-only results, and the one recompute between them."""

from __future__ import annotations

import contextlib
import importlib
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from traitlets import Dict, HasTraits, Instance, Tuple, Unicode

from workbench.generation import GenerationOptions
from workbench.hardware import Device, DeviceId, Machine, parse_bytes
from workbench.placement import Placement, place
from workbench.precision import GPTQ, FullPrecision
from workbench.recipe import Recipe
from workbench.session import Session
from workbench.skeleton import Skeleton, read_skeleton

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.model import ModelRef
    from workbench.precision import Precision


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """A placement with everything that it was computed from."""

    recipe: Recipe
    machine: Machine
    skeleton: Skeleton
    placement: Placement


NO_MODEL = "Load a model first, in the Load tab."
NOT_FINISHED = "The preview is not finished: wait until it shows where the layers go."
_UNSEEN_SECONDS = 1.0  # longer than a page needs to show the controls
_REST_SECONDS = 0.5  # more than what lies between two steps of a slider on a busy machine


class State(HasTraits):
    """Inputs, results, and what is going on. Panels observe the traits; only the methods here change them.

    A change whose model is ready is computed where it is made, in milliseconds. Everything slow (importing torch, a
    newly picked model, measuring a KV cache) happens in one thread that always works on the newest wish and forgets
    older ones. Callbacks arrive on several threads, so every change happens under ``lock``.

    Args:
        recipe: The choices to begin with.
        machine: The machine to plan for; None is this one, whose accelerators are looked for in the background.
    """

    recipe = Instance(Recipe, read_only=True)
    machine = Instance(Machine, read_only=True)
    skeleton = Instance(Skeleton, allow_none=True, read_only=True)
    placement = Instance(Placement, allow_none=True, read_only=True)
    pinned = Instance(Placement, allow_none=True, read_only=True)  # what others are compared with
    session = Instance(Session, allow_none=True, read_only=True)  # the one that is talked to
    sessions = Tuple(read_only=True)  # all that are loaded, that one among them
    generation = Instance(GenerationOptions, args=(), read_only=True)  # how its answers are made
    doing = Unicode(read_only=True)  # what the planner is at, in words; empty when the answer is complete
    activity = Unicode(read_only=True)  # "loading", "unloading", "generating" or "": at most one at a time
    problems = Dict(read_only=True)  # panel -> the sentence that it shows

    def __init__(self, recipe: Recipe, machine: Machine | None) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self._wake = threading.Condition(self.lock)
        self._seen = threading.Event()
        self._detected = machine is not None
        self._wanted = True  # the planner's single slot: whatever recipe and machine are when it looks
        self._working = False
        self._closed = False
        self._good: _Answer | None = None
        self.pinned_skeleton: Skeleton | None = None  # of what is pinned
        self._warm: set[tuple[ModelRef, Precision]] = set()
        self.set_trait("recipe", recipe)
        self.set_trait("machine", machine or Machine.detect(accelerators=False))
        self._planner = threading.Thread(target=self._plan_forever, name="workbench-planner", daemon=True)

    # What the panels ask.

    def budgets(self) -> dict[DeviceId, int]:
        """The budget of each device that is used, in bytes; devices that the machine does not have are left out."""
        machine: Machine = self.machine
        memory = self.recipe.max_memory
        if memory is None:
            return machine.budgets()
        return {d.id: parse_bytes(memory[d.id]) for d in machine.devices if d.id in memory}

    @property
    def is_current(self) -> bool:
        """Whether the placement answers the recipe and the machine as they are now."""
        good = self._good
        return good is not None and good.recipe == self.recipe and good.machine == self.machine

    @property
    def is_here(self) -> bool:
        """Whether the machine that is planned for is the one that this runs on: only there can anything be loaded."""
        return bool(self.machine.is_here)

    # What the panels do.

    def update(self, *, machine: Machine | None = None, **changes: Any) -> None:
        """Change several choices at once, with one recompute.

        Raises:
            TypeError: If a choice is unknown.
            ValueError: If a choice cannot be meant; nothing is changed then.
        """
        with self.lock:
            recipe = self.recipe.with_(**changes) if changes else self.recipe
            machine = machine or self.machine
            if self._detected or machine is not self.machine:
                machine.parse_max_memory(recipe.max_memory)
            if recipe == self.recipe and machine == self.machine:
                return
            good = self._good
            if good is None or good.recipe.model != recipe.model or _warmth(recipe) not in self._warm:
                self._publish(recipe, machine)
            else:
                placement = place(recipe, machine=machine, skeleton=good.skeleton, measure=False, advice=False)
                answer = _Answer(recipe=recipe, machine=machine, skeleton=good.skeleton, placement=placement)
                self._publish(recipe, machine, answer)
            self._want()

    def take_model(self, model: ModelRef, **changes: Any) -> None:
        """Pick a model; what was chosen for another one's layers, a custom map and adapters, goes.

        Raises:
            ValueError: If a choice cannot be meant; nothing is changed then.
        """
        with self.lock:
            if self.recipe.strategy == "custom":
                changes = {"strategy": "auto", "device_map": None, **changes}
            if model.name != self.recipe.model.name:
                changes = {"adapters": (), **changes}
            self.update(model=model, **changes)

    def replace(self, recipe: Recipe) -> None:
        """Change all choices at once, checked in full before anything changes; takes seconds for a model not yet seen.

        Raises:
            ValueError: If the recipe cannot be placed; nothing is changed then.
        """
        if not isinstance(recipe, Recipe):
            raise ValueError(f"A recipe is a wb.Recipe(...), not {type(recipe).__name__}.")  # noqa: TRY004 - one kind of error for bad input
        self.settle()  # before that, the machine's accelerators are unknown
        machine = self.machine
        skeleton = read_skeleton(recipe.model)
        placement = place(recipe, machine=machine, skeleton=skeleton, measure=False, advice=False)
        with self.lock:
            self.set_trait("problems", {})
            answer = _Answer(recipe=recipe, machine=machine, skeleton=skeleton, placement=placement)
            self._publish(recipe, machine, answer)
            self._warm.add(_warmth(recipe))
            self._want()

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until the planner has nothing left to do.

        Args:
            timeout: Seconds at most; None waits as long as it takes.

        Returns:
            Whether it has come to rest.
        """
        self.be_seen()
        with self._wake:
            return self._wake.wait_for(lambda: self._closed or not (self._wanted or self._working), timeout)

    def begin(self, activity: str) -> None:
        """Claim the worker for one activity.

        Raises:
            ValueError: If another one is going on.
        """
        with self.lock:
            if self.activity:
                raise ValueError(f"Workbench is still {self.activity}: wait for it, or stop it first.")
            self.set_trait("activity", activity)

    def begin_with_model(self, activity: str) -> Session:
        """Claim the worker for something that is done with the loaded model, and give that.

        Raises:
            ValueError: If none is loaded, or another activity is going on.
        """
        with self.lock:
            session: Session | None = self.session
            if session is None:
                raise ValueError(NO_MODEL)
            self.begin(activity)
            return session

    def end(self) -> None:
        """Give the worker back."""
        with self.lock:
            self.set_trait("activity", "")

    def hold(self, session: Session | None) -> None:
        """Make a loaded model the one that is talked to; None lets go of the one that was, for one that is left."""
        with self.lock, self.hold_trait_notifications():
            others = tuple(s for s in self.sessions if s is not (self.session if session is None else session))
            held = others if session is None else (*others, session)
            self.set_trait("sessions", held)
            self.set_trait("session", held[-1] if held else None)

    def forget(self, session: Session) -> None:
        """Let go of a loaded model that is not talked to."""
        with self.lock, self.hold_trait_notifications():
            if session is self.session:
                self.hold(None)
            else:
                self.set_trait("sessions", tuple(s for s in self.sessions if s is not session))

    def choose(self, generation: GenerationOptions) -> None:
        """Say how answers are made."""
        with self.lock:
            self.set_trait("generation", generation)

    def pin(self, placement: Placement | None) -> None:
        """Keep the present placement to compare others with; None lets it go."""
        with self.lock:
            self.pinned_skeleton = None if placement is None else self.skeleton
            self.set_trait("pinned", placement)

    def report(self, panel: str, sentence: str) -> None:
        """Show a sentence in a panel; an empty one takes it away."""
        with self.lock:
            if self.problems.get(panel, "") != sentence:
                self.set_trait("problems", {**self.problems, panel: sentence})

    def guarded(self, panel: str, action: Callable[..., None]) -> Callable[..., None]:
        """Make a callback that shows its error in a panel, where no cell would show it, and lets the kernel go on."""

        def run(*args: Any) -> None:
            try:
                self.report(panel, "")
                action(*args)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must be seen
                self.report(panel, as_sentence(error))

        return run

    # The planner.

    def start(self) -> None:
        """Start planning in the background."""
        self._planner.start()

    def be_seen(self) -> None:
        """Let heavy imports begin: a page shows the controls, or somebody waits for an answer."""
        self._seen.set()

    def wait_seen(self) -> None:
        """Hold heavy imports back for a moment: beside them the controls would take longer to show."""
        self._seen.wait(_UNSEEN_SECONDS)

    def close(self) -> None:
        """Stop the planner; a step that it is in the middle of is finished first."""
        self.be_seen()
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._planner.is_alive():
            self._planner.join()

    def _want(self) -> None:
        self._wanted = True
        self._wake.notify_all()

    def _publish(self, recipe: Recipe, machine: Machine, answer: _Answer | None = None) -> None:
        """Set inputs and results together, so that no observer sees half of a change."""
        with self.lock, self.hold_trait_notifications():
            self.set_trait("recipe", recipe)
            self.set_trait("machine", machine)
            if answer is not None:
                self._good = answer
                self.set_trait("skeleton", answer.skeleton)
                self.set_trait("placement", answer.placement)
                self.set_trait("problems", {**self.problems, "preview": ""})

    def _plan_forever(self) -> None:
        self.wait_seen()
        import_numpy()
        while True:
            with self._wake:
                self._working = False
                if not self._wanted:
                    with contextlib.suppress(Exception):  # as below
                        self.set_trait("doing", "")
                    self._wake.notify_all()
                self._wake.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                self._wanted, self._working = False, True
                recipe, machine, good = self.recipe, self.machine, self._good
            try:
                self._plan(recipe, machine, good)
            except Exception as error:  # noqa: BLE001 - the thread must outlive any model
                with self.lock, contextlib.suppress(Exception):  # a view that cannot show it must not end the thread
                    if (recipe, machine) == (self.recipe, self.machine):
                        self._fall_back("preview", as_sentence(error))

    def _plan(self, recipe: Recipe, machine: Machine, good: _Answer | None) -> None:
        if not self._detected:
            self._say("Looking for GPUs ...")
            found = Machine.detect()
            with self.lock:
                if not self._detected and self.machine is machine:
                    self._publish(self.recipe, found)
                self._detected = True
                self._want()  # again, for the machine as it is known now
            return
        if good is not None and good.recipe.model == recipe.model:
            skeleton = good.skeleton
        else:
            self._say(f"Reading what {recipe.model} is made of ...")
            try:
                skeleton = read_skeleton(recipe.model)
            except ValueError as error:
                with self.lock:
                    if self.recipe.model == recipe.model:
                        self._fall_back("model", as_sentence(error))
                return
            if self._shorten(recipe, skeleton) or self._keep_quantized(recipe, skeleton):
                return

        def offer(*, measure: bool, advice: bool) -> Placement | None:
            placement = place(recipe, machine=machine, skeleton=skeleton, measure=measure, advice=advice)
            answer = _Answer(recipe=recipe, machine=machine, skeleton=skeleton, placement=placement)
            return placement if self._offer(answer) else None

        placement = self.placement if self.is_current else None
        if placement is None:
            self._say("Working out where every layer goes ...")
            placement = offer(measure=False, advice=False)
        if placement is not None and placement.kv_cache_bytes is None:
            self._say("Measuring the KV cache and the activations ...")
            placement = offer(measure=True, advice=False)
        if placement is None:
            return
        with self.lock:
            self._warm.add(_warmth(recipe))
        # Advice is tried out with further plans: not before a moving slider has come to rest.
        if not self._moved_on(_REST_SECONDS):
            offer(measure=True, advice=True)

    def _moved_on(self, seconds: float) -> bool:
        """Wait whether a newer wish comes within so many seconds."""
        with self._wake:
            return self._wake.wait_for(lambda: self._wanted or self._closed, seconds)

    def _shorten(self, recipe: Recipe, skeleton: Skeleton) -> bool:
        """Lower a context that was meant for another model to what a newly picked one allows, and say so."""
        limit, asked = skeleton.context_length, recipe.workload.context_length
        if limit is None or asked <= limit:
            return False
        with self.lock:
            if self.recipe == recipe:
                self._publish(recipe.with_(workload=replace(recipe.workload, context_length=limit)), self.machine)
                said = f"{skeleton.source.title} allows {limit:,} tokens: the context was lowered from {asked:,}."
                self.report("workload", said)
            self._want()
        return True

    def _keep_quantized(self, recipe: Recipe, skeleton: Skeleton) -> bool:
        """Take a checkpoint that is quantized already as it is, whatever was chosen for another model, and say so."""
        both_gptq = isinstance(recipe.precision, GPTQ) and isinstance(skeleton.stored, GPTQ)
        kept = recipe.precision == FullPrecision() or both_gptq
        if skeleton.quantized_as is None or kept:
            return False
        with self.lock:
            if self.recipe == recipe:
                self._publish(recipe.with_(precision=FullPrecision()), self.machine)
                said = f"{skeleton.source.title} is quantized already ({skeleton.quantized_as}): it is taken as it is."
                self.report("precision", said)
            self._want()
        return True

    def _say(self, text: str) -> None:
        with self.lock:
            self.set_trait("doing", text)

    def _offer(self, answer: _Answer) -> bool:
        """Publish an answer unless its question is an old one."""
        with self.lock:
            if (answer.recipe, answer.machine) != (self.recipe, self.machine):
                if not self.is_current:
                    self._want()
                return False
            self._publish(answer.recipe, answer.machine, answer)
            return True

    def _fall_back(self, panel: str, sentence: str) -> None:
        """Say what was wrong and go back to the last choices that could be placed."""
        self.report(panel, sentence)
        good = self._good
        if good is not None:
            self._publish(good.recipe, good.machine, good)
            self.report("preview", sentence if panel == "preview" else "")


_importing = threading.Lock()


def import_numpy() -> None:
    """Import numpy alone, before torch and plotly do in two threads at once: it does not stand that."""
    with _importing, contextlib.suppress(ImportError):
        importlib.import_module("numpy")


def _warmth(recipe: Recipe) -> tuple[ModelRef, Precision]:
    """What a placement's slow first time depends on: the module tree is built for each of these."""
    return recipe.model, recipe.precision


def as_sentence(error: Exception) -> str:
    """An error as one sentence for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError) and text:
        return text
    return f"Something went wrong here ({type(error).__name__}: {text[:300]}); the rest goes on."


def bind(
    control: Any,
    state: State,
    panel: str,
    *,
    show: Callable[[], Any],
    write: Callable[[Any], None],
    same: Callable[[Any, Any], bool] = lambda left, right: bool(left == right),
) -> Callable[[], None]:
    """Tie a control's value to a choice of the recipe, both ways.

    What the control says is compared at its own resolution: a value that already says what the recipe says writes
    nothing, so nothing loops. A refused value is put back, and the panel says why. A list gets a value that it lacks: a
    recipe from a cell or a file may say more than people are offered.

    Args:
        control: A widget with a ``value``.
        state: The state.
        panel: Where errors are shown.
        show: The value that the control should have, from the state.
        write: Puts a value into the state; may raise.
        same: Whether two values mean the same to this control.

    Returns:
        A function that unties them.
    """
    filling = False  # the control is being set, not used: a list with other options begins with the first of them

    def from_state(_: object = None) -> None:
        nonlocal filling
        shown = show()
        if same(control.value, shown):
            return
        with state.lock:
            filling = True
            try:
                offer(control, shown)
                control.value = shown
            finally:
                filling = False

    def from_control(change: Any) -> None:
        with state.lock:
            if not filling and not same(change["new"], show()):
                state.guarded(panel, write)(change["new"])
                from_state()

    from_state()
    names = ["recipe", "machine", "skeleton"]
    state.observe(from_state, names)
    control.observe(from_control, "value")
    return lambda: state.unobserve(from_state, names)


def offer(control: Any, value: Any) -> None:
    """Add a value to a list that lacks it; other controls are left alone."""
    options = getattr(control, "options", None)
    if not options:
        return
    paired = isinstance(options[0], tuple)
    if value not in [option[1] if paired else option for option in options]:
        control.options = (*options, (str(value), value) if paired else value)


def device_class(device: Device) -> str:
    """A device's name as part of a CSS class: "cuda-0", "cpu"."""
    return device.label.replace(":", "-")
