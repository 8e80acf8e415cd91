"""The Devices panel: which machine, how much of each device, and how the layers are spread."""

from __future__ import annotations

import math
import re
import sys
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.hardware import THIS_MACHINE, Device, DeviceId, Machine, format_bytes, parse_bytes
from workbench.panels.advanced import advanced
from workbench.panels.look import classed, close_tree, html, panel, problem_line
from workbench.panels.state import bind, device_class
from workbench.recipe import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.panels.state import State

_GIB = 2**30


def slider_step(total_bytes: int) -> float:
    """A slider's step in GiB: fine enough for a small model, and not thousands of steps for a big device."""
    for up_to_gib, step in ((32, 0.05), (128, 0.1), (1024, 0.5)):
        if total_bytes <= up_to_gib * _GIB:
            return step
    return 1.0


def largest_gib(total_bytes: int) -> float:
    """Where a slider ends: all the memory, rounded up to a step."""
    step = slider_step(total_bytes)
    return round(max(step, math.ceil(total_bytes / _GIB / step) * step), 2)


def set_budget(state: State, device: Device, size: int | str | None) -> None:
    """Give a device another budget and leave the others what they are; None leaves the device out.

    Raises:
        ValueError: If the size is none, or no device would be left.
    """
    if size is not None:
        parse_bytes(size)
    memory = dict(state.machine.budgets() if state.recipe.max_memory is None else state.recipe.max_memory)
    memory.pop(device.id, None)
    if size is not None:
        memory[device.id] = size
    if not memory:
        raise ValueError("A model needs at least one device: leave one ticked.")
    ordered = {d.id: memory.pop(d.id) for d in state.machine.devices if d.id in memory}
    state.update(max_memory={**ordered, **memory})


class DevicesPanel:
    """The machine, the strategy, and a row for each device.

    Attributes:
        box: What is shown.
        rows: Device label to its controls: "use", "slider" and "text".
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.rows: dict[str, dict[str, Any]] = {}
        self._untie: list[Callable[[], None]] = []
        self._shown: tuple[Device, ...] = ()
        self._known = {state.machine.name: state.machine}  # those that are no presets, to come back to
        self.machine = classed(
            w.Dropdown(
                description="Machine",
                options=self._machines(),
                value=state.machine.name,
                tooltip="Plan for this machine, or try one that you do not have",
            ),
            "wb-machine",
            "wb-wide",
        )
        self.strategy = classed(
            w.Dropdown(
                description="Strategy",
                options=STRATEGIES,
                value=state.recipe.strategy,
                tooltip="auto and balanced fill all GPUs evenly, balanced_low_0 spares the first, "
                "sequential fills one after the other, packed leaves no room unused, custom keeps the map as it is now",
            ),
            "wb-strategy",
            "wb-wide",
        )
        self._rows_box = w.VBox([])
        self.reset = classed(
            w.Button(description="Reset to what is free", tooltip="Look again and use what is free, less each reserve"),
            "wb-reset",
        )
        self.reset.layout.width = "auto"
        self.own = OwnMachine(state, self._take_own)
        self.box = panel(
            "Devices",
            [
                self.machine,
                self.strategy,
                self._rows_box,
                self.reset,
                self.own.box,
                advanced(state),
                problem_line(state, "devices"),
            ],
        )
        bind(
            self.machine,
            state,
            "devices",
            show=self._machine_shown,
            write=self._pick_machine,
        )
        bind(
            self.strategy,
            state,
            "devices",
            show=lambda: state.recipe.strategy,
            write=self._pick_strategy,
        )
        self.reset.on_click(state.guarded("devices", self._reset))
        state.observe(self._rebuild, "machine")
        self._rebuild()

    def _machines(self) -> tuple[str, ...]:
        names = (THIS_MACHINE, *Machine.presets())
        return (*(name for name in self._known if name not in names), *names)

    def _machine_shown(self) -> str:
        name = str(self._state.machine.name)
        self._known[name] = self._state.machine
        return name

    def _pick_machine(self, name: str) -> None:
        if name == THIS_MACHINE:
            machine = _this_machine()
        else:
            machine = Machine.preset(name) if name in Machine.presets() else self._known[name]
        # The old budgets were for other devices.
        self._state.update(machine=machine, max_memory=None, **self._without_custom())

    def _take_own(self, machine: Machine) -> None:
        self._state.update(machine=machine, max_memory=None, **self._without_custom())

    def _without_custom(self) -> dict[str, Any]:
        return {"strategy": "auto", "device_map": None} if self._state.recipe.strategy == "custom" else {}

    def _pick_strategy(self, strategy: str) -> None:
        if strategy != "custom":
            self._state.update(strategy=strategy, device_map=None)
            return
        placement = self._state.placement
        if placement is None or placement.unplaced or not self._state.is_current:
            raise ValueError("A custom map starts from one in which everything has room: make room first.")
        self._state.update(strategy="custom", device_map=dict(placement.device_map))

    def _reset(self, _: object) -> None:
        fresh = _this_machine() if self._state.is_here else self._state.machine
        self._state.update(machine=fresh, max_memory=None)

    def _rebuild(self, _: object = None) -> None:
        devices = self._state.machine.devices
        if [(d.id, d.name, d.total_bytes) for d in devices] == [(d.id, d.name, d.total_bytes) for d in self._shown]:
            return  # the same devices with other free memory: nobody's slider is pulled from under their hand
        self._shown = devices
        for untie in self._untie:
            untie()
        old = self._rows_box.children
        self.rows, self._untie = {}, []
        self._rows_box.children = [self._row(device) for device in devices]
        close_tree(*old)

    def _row(self, device: Device) -> Any:
        state, short = self._state, device_class(device)
        step = slider_step(device.total_bytes)
        use = classed(
            w.Checkbox(
                description=device.label, indent=False, tooltip=f"Use {device.label} ({device.name}) or leave it out"
            ),
            f"wb-use-{short}",
        )
        slider = classed(
            w.FloatSlider(
                description=f"{device.label} memory in GiB",
                min=0.0,
                max=largest_gib(device.total_bytes),
                step=step,
                readout=False,
                tooltip=f"Memory of {device.label} that may be used, in GiB",
            ),
            f"wb-memory-{short}",
            "wb-unseen-label",
        )
        text = classed(
            w.Text(
                description=f"{device.label} memory",
                continuous_update=False,
                placeholder="not used",
                tooltip=f"Memory of {device.label} that may be used, such as 2GiB, 2GB or 512MB",
            ),
            f"wb-memory-text-{short}",
            "wb-unseen-label",
        )
        note = html("wb-note")

        def now() -> (
            Device
        ):  # with what is free at present; a machine that no longer has it is about to take the row away
            return next((other for other in state.machine.devices if other.id == device.id), device)

        def budget_bytes() -> int | None:
            return state.budgets().get(device.id)

        def on_slider() -> float:
            budget = budget_bytes() or 0
            return float(min(slider.max, round(round(budget / _GIB / step) * step, 6)))

        def in_text() -> str:
            memory = state.recipe.max_memory
            said = None if memory is None else memory.get(device.id)
            if isinstance(said, str):
                return re.sub(r"(?<=[\d.])(?=[A-Za-z])", " ", said)
            budget = budget_bytes()
            return "" if budget is None else format_bytes(budget)

        def set_text(said: str) -> None:
            if not said.strip():
                raise ValueError(
                    f"Type how much of {device.label} may be used, such as 2GiB; untick it to leave it out."
                )
            set_budget(state, device, "".join(said.split()))

        def show_use(_: object = None) -> None:
            used = budget_bytes() is not None
            if slider.disabled == used:
                slider.disabled = text.disabled = not used
            # ipywidgets shows no tooltip on a text box that has a label, so the exact bytes are the note's.
            told = _device_note(now(), budget_bytes())
            if note.value != told:
                note.value = told

        show_use()
        state.observe(show_use, ["recipe", "machine"])
        self._untie += [
            lambda: state.unobserve(show_use, ["recipe", "machine"]),
            bind(
                use,
                state,
                "devices",
                show=lambda: budget_bytes() is not None,
                write=lambda used: set_budget(state, device, now().budget_bytes if used else None),
            ),
            bind(
                slider,
                state,
                "devices",
                show=on_slider,
                write=lambda gib: set_budget(state, device, f"{round(gib, 6):g}GiB"),
                same=lambda left, right: abs(left - right) < step / 2,
            ),
            bind(text, state, "devices", show=in_text, write=set_text),
        ]
        self.rows[device.label] = {"use": use, "slider": slider, "text": text}
        return classed(w.Box([use, slider, text, note]), "wb-device")


class OwnMachine:
    """A machine put together by hand, folded away.

    Attributes:
        box: What is shown.
        fields: Its numbers, by name.
        use: The button that plans for it.
    """

    def __init__(self, state: State, take: Callable[[Machine], None]) -> None:
        self._take = take
        self.fields = {
            name: classed(
                kind(description=label, min=0, max=64 if name == "gpus" else 1e6, value=value, tooltip=tip),
                f"wb-own-{name.replace('_', '-')}",
                "wb-wide",
            )
            for name, kind, label, value, tip in (
                ("gpus", w.BoundedIntText, "GPUs", 1, "How many GPUs"),
                ("gpu_gib", w.BoundedFloatText, "GiB each", 24.0, "Memory of each GPU in GiB"),
                ("gpu_gb_s", w.BoundedFloatText, "GB/s each", 900.0, "Memory bandwidth of each GPU, by its data sheet"),
                ("ram_gib", w.BoundedFloatText, "RAM in GiB", 64.0, "All the RAM in GiB"),
                ("disk_gib", w.BoundedFloatText, "Disk in GiB", 500.0, "Free space on the disk in GiB"),
            )
        }
        self.use = classed(
            w.Button(description="Plan for it", tooltip="Plan for a machine with these devices"), "wb-own-use"
        )
        self.use.on_click(state.guarded("devices", lambda _: self._take(self.machine())))
        box = w.VBox([*self.fields.values(), self.use])
        self.box = classed(w.Accordion([box], titles=("A machine of your own",)), "wb-knobs", "wb-own")
        self.box.selected_index = None

    def machine(self) -> Machine:
        """The machine as its fields describe it."""
        number = {name: field.value for name, field in self.fields.items()}
        gpu_gib, ram_gib, disk_gib = number["gpu_gib"], number["ram_gib"], number["disk_gib"]
        bandwidth = round(number["gpu_gb_s"] * 1e9) or None
        parts: list[tuple[DeviceId, str, float, float, str, int | None]] = [
            (i, "GPU", gpu_gib, min(gpu_gib, 1.0), "CUDA context and allocator slack (estimate)", bandwidth)
            for i in range(int(number["gpus"]))
        ]
        system = "operating system and notebook (typical)"
        parts.append(("cpu", "RAM", ram_gib, min(ram_gib / 4, 5.0), system, None))
        parts.append(("disk", "Disk", disk_gib, disk_gib / 10, "other programs (typical)", None))
        devices = tuple(
            Device(
                id=device,
                name=name,
                total_bytes=round(gib * _GIB),
                free_bytes=round(gib * _GIB),
                reserved_bytes=round(kept_gib * _GIB),
                reserved_for=kept_for,
                bandwidth_bytes_per_s=speed,
                source="as you said",
            )
            for device, name, gib, kept_gib, kept_for, speed in parts
        )
        return Machine(name="My machine", devices=devices)


def _this_machine() -> Machine:
    # Before torch is imported there can be no tensors on a GPU, and importing it here would block the kernel.
    return Machine.detect(accelerators="torch" in sys.modules)


def _device_note(device: Device, budget_bytes: int | None) -> str:
    tip = (
        f"{'not used' if budget_bytes is None else f'{budget_bytes:,} bytes may be used'}; "
        f"{device.free_bytes:,} of {device.total_bytes:,} bytes free ({device.source}); "
        f"{device.reserved_bytes:,} bytes are kept back for {device.reserved_for}"
    )
    free = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
    return f'<span title="{escape(tip)}">{escape(device.name)} · {free}</span>'
