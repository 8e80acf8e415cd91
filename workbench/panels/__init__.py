"""The widgets: one state object, panels that write its inputs, views that read its results."""

from __future__ import annotations

import importlib
import sys

from workbench.panels.bench import Workbench

__all__ = ["Workbench"]


def _allow_in_colab() -> None:
    """Colab's page shows no widgets but ipywidgets' own, the chart for one, until the kernel asks for it."""
    if "google.colab" in sys.modules:  # Colab's kernels begin with it
        importlib.import_module("google.colab.output").enable_custom_widget_manager()


_allow_in_colab()
