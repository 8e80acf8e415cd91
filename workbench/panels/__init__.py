"""The widgets: one state object, panels that write its inputs, views that read its results."""

from __future__ import annotations

from workbench.panels.bench import Workbench

__all__ = ["Workbench"]
