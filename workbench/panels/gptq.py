"""What reading a GPTQ checkpoint may need: which weight files, how they are quantized, and which kernel multiplies."""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as w
from traitlets import List, Unicode

from workbench.gptq_files import weight_basenames
from workbench.gptq_layers import quantized_shapes
from workbench.kernels import backends
from workbench.model import ModelRef
from workbench.panels.look import classed, html, problem_line, text_field, visible
from workbench.panels.what_if import Latest
from workbench.precision import GPTQ, FullPrecision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.kernels import Backend
    from workbench.panels.state import State

_BY_ITSELF = ("found by itself", "")


class FilesControls:
    """AutoGPTQ's names: ``model_basename``, offered in a list, and a ``quantize_config`` given by hand.

    Args:
        state: The state.
        name: The field in which the model is named. What is chosen here is for the name in it, refused or not.

    Attributes:
        box: What is shown.
    """

    def __init__(self, state: State, name: Any) -> None:
        self._state, self._name = state, name
        self._showing = False  # the controls are being set, not used
        self._looked_at: tuple[str, ModelRef | None] = ("", None)
        self.weights = classed(
            w.Dropdown(
                description="Weights",
                options=(_BY_ITSELF,),
                tooltip="model_basename: which set of weight files in the folder, by its name without ending",
            ),
            "wb-basename",
            "wb-wide",
        )
        self.config = text_field(
            "Quantized how",
            "wb-quantize-config",
            '{"bits": 4, "group_size": 128}',
            "quantize_config, where a GPTQ folder has none: JSON, or a JSON file",
        )
        self.pickles = classed(
            w.Checkbox(
                description="Allow pickles",
                indent=False,
                tooltip="Read .bin and .pt weights, which can run code: only if you trust their author",
            ),
            "wb-allow-pickle",
        )
        inside = w.VBox([self.weights, self.config, self.pickles])
        self.box = classed(w.Accordion([inside], titles=("Unusual files",)), "wb-knobs", "wb-files")
        self.box.selected_index = None
        for control in (self.weights, self.config, self.pickles):
            control.observe(lambda _: self._change(), "value")
        name.observe(self._look, "value")
        state.observe(self._look, ["recipe", "problems"])
        self._look()

    def _change(self) -> None:
        with self._state.lock:
            if self._showing:
                return

            def change() -> None:
                ref = dataclasses.replace(
                    ModelRef.parse(self._name.value),
                    model_basename=self.weights.value or None,
                    quantize_config=self.config.value.strip() or None,
                    allow_pickle=self.pickles.value,
                )
                self._state.take_model(ref)

            self._state.guarded("model", change)()

    def _look(self, _: object = None) -> None:
        """Follow the name and the recipe; a folder that was refused opens this, for here it may be put right."""
        with self._state.lock:
            named, ref = self._name.value.strip(), self._state.recipe.model
            (name_before, ref_before), self._looked_at = self._looked_at, (named, ref)
            sets = _sets_in(named) if named else {}
            self._showing = True
            try:
                options = (_BY_ITSELF, *((name, name) for name in sets))
                if self.weights.options != options:
                    self.weights.options = options
                if str(ref) == named and ref != ref_before:
                    self.weights.value = ref.model_basename if ref.model_basename in sets else ""
                    self.config.value, self.pickles.value = str(ref.quantize_config or ""), ref.allow_pickle
                elif named != name_before:
                    self.weights.value, self.config.value, self.pickles.value = "", "", False
            finally:
                self._showing = False
            visible(self.weights, when=len(sets) > 1)
            if sets and self._state.problems.get("model"):
                self.box.selected_index = 0


def _sets_in(named: str) -> Mapping[str, Any]:
    """The sets of weight files in a folder; none where there is no such folder, for reading the model says so."""
    try:
        folder = Path(named).expanduser()
        return weight_basenames(folder) if folder.is_dir() else {}
    except (OSError, RuntimeError, ValueError):  # forbidden, too long, or a ~user whom nobody knows
        return {}


class KernelChoice(anywidget.AnyWidget):
    """A list in which what cannot be used here is greyed, with the reason beside it.

    Attributes:
        choices: ``{"name": ..., "usable": ..., "reason": ...}`` each.
        value: The name of the one that is chosen.
    """

    _esm = """
    export default { render({ model, el }) {
      const label = document.createElement("label"), list = document.createElement("select");
      label.textContent = "Kernel";
      list.setAttribute("aria-label", "Kernel");
      list.title = "What multiplies with the quantized weights";
      const show = () => {
        const made = model.get("choices").map(({ name, usable, reason }) => {
          const option = document.createElement("option");
          option.value = name;
          option.textContent = usable ? name : `${name}: ${reason}`;
          option.title = reason;
          option.disabled = !usable;
          return option;
        });
        list.replaceChildren(...made);
        list.value = model.get("value");
      };
      list.onchange = () => { model.set("value", list.value); model.save_changes(); };
      model.on("change:choices", show);
      model.on("change:value", show);
      show();
      el.append(label, list);
      return () => { model.off("change:choices", show); model.off("change:value", show); };
    } };
    """
    choices = List().tag(sync=True)
    value = Unicode("auto").tag(sync=True)


class KernelControls:
    """Which kernel a GPTQ checkpoint is loaded with.

    Attributes:
        box: What is shown, and only for a model that is quantized with GPTQ.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._latest = Latest("workbench-kernels")
        self._key: Any = None
        self._problem = ""
        self.choice: Any = classed(KernelChoice(), "wb-kernel")
        self._note = html("wb-note", "wb-kernel-note")
        self.box = w.VBox([self.choice, self._note, problem_line(state, "kernel")])
        self.choice.observe(self._pick, "value")
        # "doing" last: an equal placement that answers a new question is announced by nothing else.
        state.observe(self._show, ["recipe", "machine", "skeleton", "placement", "doing"])
        self._offer((), "")
        self._show()

    def close(self) -> None:
        """End the background thread."""
        self._latest.close()

    def _stored(self) -> GPTQ | None:
        skeleton = self._state.skeleton
        return skeleton.stored if skeleton is not None and isinstance(skeleton.stored, GPTQ) else None

    def _pick(self, change: Any) -> None:
        with self._state.lock:
            stored, name = self._stored(), change["new"]
            if stored is not None and name != self._chosen():
                wanted = FullPrecision() if name == "auto" else dataclasses.replace(stored, backend=name)
                self._state.guarded("kernel", lambda: self._state.update(precision=wanted))()
                self.choice.value = self._chosen()

    def _chosen(self) -> str:
        return str(getattr(self._state.recipe.precision, "backend", "auto"))

    def _show(self, _: object = None) -> None:
        with self._state.lock:
            state, stored = self._state, self._stored()
            visible(self.box, when=stored is not None)
            self.choice.value = self._chosen()
            self._say()
            placement, skeleton = state.placement, state.skeleton
            if stored is None or placement is None or skeleton is None or not state.is_current:
                return
            devices = tuple(dict.fromkeys(placement.device_map.values()))
            adapters = bool(state.recipe.adapters)
            key = (state.recipe.model, devices, placement.dtype, state.machine.name, adapters)
            if key == self._key:
                return
            self._key = key
            if not state.is_here:
                self._offer((), "Which kernels there are is seen on the machine itself.")
                return
            self._offer((), "Looking which kernels can be used here ...")
            dtype = placement.dtype

        def find() -> tuple[Backend, ...]:
            shapes = quantized_shapes(skeleton)
            return offered_backends(stored, shapes, devices=devices, dtype=dtype, adapters=adapters)

        def take(found: tuple[Backend, ...] | None, problem: str) -> None:
            with state.lock:
                if key == self._key:
                    self._offer(found or (), problem)

        self._latest.find_out(find, take)

    def _offer(self, found: tuple[Backend, ...], said: str) -> None:
        choices = [{"name": b.name, "usable": b.usable, "reason": b.reason} for b in found]
        self._problem = said
        self.choice.choices = choices or [{"name": "auto", "usable": True, "reason": ""}]
        self._say()

    def _say(self) -> None:
        reason = next((c["reason"] for c in self.choice.choices if c["name"] == self._chosen()), "")
        self._note.value = escape(self._problem or reason)


def offered_backends(
    precision: GPTQ, shapes: tuple[tuple[int, int], ...], *, devices: tuple[Any, ...], dtype: str, adapters: bool
) -> tuple[Backend, ...]:
    """Every kernel with whether it takes all the shapes and is right with the smallest; loading checks all of them."""
    smallest = min(shapes, key=lambda shape: shape[0] * shape[1])
    allowed = backends(precision, shapes, devices=devices, dtype=dtype, adapters=adapters, check=False)
    tried = {b.name: b for b in backends(precision, [smallest], devices=devices, dtype=dtype, adapters=adapters)}
    return tuple(b if not b.usable else tried[b.name] for b in allowed)
