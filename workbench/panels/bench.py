"""The workbench widget: all panels around one state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as w

from workbench.hardware import Machine
from workbench.model import refuses_unknown
from workbench.panels.adapter import AdapterPanel
from workbench.panels.code import CodePanel
from workbench.panels.compare import ComparePanel
from workbench.panels.devices import DevicesPanel
from workbench.panels.generate import GeneratePanel
from workbench.panels.look import STYLE, classed, html, whole_tree
from workbench.panels.model import ModelPanel
from workbench.panels.outliers import OutliersPanel
from workbench.panels.precision import PrecisionPanel, WorkloadPanel
from workbench.panels.preview import PreviewPanel
from workbench.panels.quantize import QuantizePanel
from workbench.panels.run import LoadPanel
from workbench.panels.save import SavePanel
from workbench.panels.state import State
from workbench.panels.tree import TreePanel
from workbench.panels.what_if import WhatIfPanel
from workbench.recipe import Recipe
from workbench.session import Session

if TYPE_CHECKING:
    from workbench.placement import Placement

_LIVE = (
    "This is a still picture: the live workbench needs Jupyter's widgets. JupyterLab, Notebook 7, VS Code and Voila "
    "show it when the cell is run; in Colab, first run <code>from google.colab import output; "
    "output.enable_custom_widget_manager()</code>. <code>bench.placement</code> says the same as a table."
)
_TABS = ("Load", "Generate", "Quantize", "Layers", "What if", "Outliers", "Adapter", "Compare", "Code")


@refuses_unknown
class Workbench(w.VBox):
    """Pick a model, budget each device, choose a precision, see where every layer goes, load it, talk to it.

    It appears at once; torch and plotly are imported in the background. It is an ordinary ipywidgets box.

    Args:
        recipe: The choices to begin with; None is the demo model in full precision on what is free.
        machine: The machine to plan for; None is this one.

    Raises:
        ValueError: If ``recipe`` is no :class:`Recipe`.
        TypeError: If there is an unknown option; the valid ones are listed.
    """

    def __init__(self, recipe: Recipe | None = None, machine: Machine | None = None) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise ValueError(f"recipe is a wb.Recipe(...), not {type(recipe).__name__}.")
        self._state = state = State(recipe or Recipe(), machine)
        self._preview = PreviewPanel(state)
        self._load = LoadPanel(state)
        self._save = SavePanel(state)
        self._generate = GeneratePanel(state)
        self._quantize = QuantizePanel(state, self._preview.page, in_view=lambda: self._sees("Quantize"))
        self._tabs = classed(w.Tab(), "wb-tabs")
        self._code = CodePanel(state, in_view=lambda: self._sees("Code"))
        self._layers = TreePanel(state, in_view=lambda: self._sees("Layers"))
        self._what_if = WhatIfPanel(state, in_view=lambda: self._sees("What if"))
        self._outliers = OutliersPanel(state, self._preview.page)
        self._adapter = AdapterPanel(state, self._preview.page, in_view=lambda: self._sees("Adapter"))
        self._comparison = ComparePanel(state)
        self._tabs.children = [
            w.VBox([self._load.box, self._save.box]),
            self._generate.box,
            self._quantize.box,
            self._layers.box,
            self._what_if.box,
            self._outliers.box,
            self._adapter.box,
            self._comparison.box,
            self._code.box,
        ]
        for index, name in enumerate(_TABS):
            self._tabs.set_title(index, name)
        self._tabs.selected_index = 0
        for each in (self._quantize, self._code, self._layers, self._what_if, self._adapter):
            self._tabs.observe(each.refresh, "selected_index")
        self._devices = DevicesPanel(state)
        self._precision = PrecisionPanel(state)
        self._model = ModelPanel(state)
        chosen = [self._model.box, self._devices.box, self._precision.box, WorkloadPanel(state).box]
        left = classed(w.VBox(chosen), "wb-column", "wb-left")
        right = classed(w.VBox([self._preview.box, self._tabs]), "wb-column", "wb-right")
        columns = classed(w.Box([left, right]), "wb-columns")
        super().__init__([html("wb-style", value=STYLE), columns])
        self.add_class("wb-root")
        state.start()
        self._preview.start()

    def _sees(self, tab: str) -> bool:
        return bool(self._tabs.selected_index == _TABS.index(tab))

    @property
    def recipe(self) -> Recipe:
        """The choices, as the controls show them. Setting them moves the controls.

        Raises:
            ValueError: When set, if they cannot be placed; nothing changes then. A model not yet seen takes seconds.
        """
        recipe: Recipe = self._state.recipe
        return recipe

    @recipe.setter
    def recipe(self, recipe: Recipe) -> None:
        self._state.replace(recipe)

    @property
    def machine(self) -> Machine:
        """The machine that is planned for. Setting it keeps the budgets, which must suit it.

        Raises:
            ValueError: When set, if the recipe names a device that it does not have; nothing changes then.
        """
        machine: Machine = self._state.machine
        return machine

    @machine.setter
    def machine(self, machine: Machine) -> None:
        if not isinstance(machine, Machine):
            raise ValueError(f"A machine is a wb.Machine, not {type(machine).__name__}.")  # noqa: TRY004 - one kind of error for bad input
        self._state.update(machine=machine)

    @property
    def placement(self) -> Placement | None:
        """Where everything goes, for the choices as they are now.

        Waits for it while it is being worked out: seconds at the very beginning (torch is imported) and for a new
        model, else milliseconds. None if the first model cannot be placed; the panel then says why.
        """
        self._state.settle()
        placement: Placement | None = self._state.placement
        return placement

    @property
    def session(self) -> Session | None:
        """The loaded model, or None. Setting it makes a session from a cell the one that Generate talks to."""
        session: Session | None = self._state.session
        return session

    @session.setter
    def session(self, session: Session | None) -> None:
        if session is not None and not isinstance(session, Session):
            raise ValueError(f"A session is what wb.load(...) returns, not {type(session).__name__}.")
        self._state.hold(session)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The live widget, and for where there can be none (GitHub, an export) the same facts standing still."""
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        placement: Placement | None = self._state.placement
        said = "not placed yet" if placement is None else placement.summary
        bundle["text/plain"] = f"Workbench for {self.recipe.model} on {self.machine.name}: {said}"
        still = "" if placement is None else placement._repr_html_()
        bundle["text/html"] = f"<p>{_LIVE}</p>{still}"
        return bundle

    def close(self) -> None:
        """Stop what is going on, end the background threads, and take every part off the page.

        A loaded model stays loaded: ``bench.session.unload()`` gives its memory back.
        """
        if self.comm is None:
            return
        self._generate.close()
        self._model.close()
        self._load.close()
        self._save.close()
        self._quantize.close()
        self._comparison.close()
        self._what_if.close()
        self._outliers.close()
        self._adapter.close()
        self._preview.close()
        self._state.close()
        for part in list(whole_tree(self))[:-1]:
            part.close()
        super().close()
