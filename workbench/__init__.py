"""See where every layer of a language model will go, and what it will cost, before a weight is read.

Heavy libraries load when they are first needed: importing this package imports neither torch nor a widget library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workbench.adapters import Adapter, read_adapter
from workbench.calibration import CalibrationText
from workbench.compare import Fit, what_fits
from workbench.generation import ContextUse, GenerationOptions, GenerationStats
from workbench.hardware import Device, Machine
from workbench.load_guard import DoesNotFit
from workbench.loading import load
from workbench.model import ModelRef, fetch_demo_model
from workbench.placement import DeviceMemory, Layer, Placement, place
from workbench.precision import GPTQ, HQQ, FourBit, FullPrecision, Int8, TorchAO
from workbench.recipe import Recipe
from workbench.session import Cancelled, LoadReport, Progress, Session
from workbench.skeleton import Skeleton, read_skeleton
from workbench.speed import Calibration, Speed, calibrate, predict_load_seconds, predict_speed
from workbench.weight_cache import KeptWeights, kept_weights
from workbench.weight_cache import empty as empty_kept_weights
from workbench.workload import Workload

if TYPE_CHECKING:
    from workbench.chat import Chat
    from workbench.gptq import QuantizeProgress, QuantizeReport, quantize
    from workbench.gptq_plan import QuantizePlan, plan_quantization
    from workbench.int8_outliers import OutlierReport, outliers
    from workbench.panels import Workbench
    from workbench.reasons import Reason, why
    from workbench.training import TrainingOptions, TrainingProgress, TrainingReport
    from workbench.training_memory import TrainingPlan

__version__ = "0.1.0"

# What not every program uses is imported when it is asked for: making its classes takes a quarter of the import.
_LATER = {
    "Chat": "chat",
    "OutlierReport": "int8_outliers",
    "QuantizePlan": "gptq_plan",
    "QuantizeProgress": "gptq",
    "QuantizeReport": "gptq",
    "Reason": "reasons",
    "TrainingOptions": "training",
    "TrainingPlan": "training_memory",
    "TrainingProgress": "training",
    "TrainingReport": "training",
    "outliers": "int8_outliers",
    "plan_quantization": "gptq_plan",
    "quantize": "gptq",
    "why": "reasons",
}

__all__ = [
    "GPTQ",
    "HQQ",
    "Adapter",
    "Calibration",
    "CalibrationText",
    "Cancelled",
    "Chat",
    "ContextUse",
    "Device",
    "DeviceMemory",
    "DoesNotFit",
    "Fit",
    "FourBit",
    "FullPrecision",
    "GenerationOptions",
    "GenerationStats",
    "Int8",
    "KeptWeights",
    "Layer",
    "LoadReport",
    "Machine",
    "ModelRef",
    "OutlierReport",
    "Placement",
    "Progress",
    "QuantizePlan",
    "QuantizeProgress",
    "QuantizeReport",
    "Reason",
    "Recipe",
    "Session",
    "Skeleton",
    "Speed",
    "TorchAO",
    "TrainingOptions",
    "TrainingPlan",
    "TrainingProgress",
    "TrainingReport",
    "Workbench",
    "Workload",
    "calibrate",
    "empty_kept_weights",
    "fetch_demo_model",
    "kept_weights",
    "load",
    "outliers",
    "place",
    "plan_quantization",
    "predict_load_seconds",
    "predict_speed",
    "quantize",
    "read_adapter",
    "read_skeleton",
    "what_fits",
    "why",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: above all the widget, and with it the widget libraries."""
    if name in _LATER:
        return getattr(importlib.import_module(f"workbench.{_LATER[name]}"), name)
    if name == "Workbench":
        try:
            return importlib.import_module("workbench.panels").Workbench
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "workbench":
                raise
            raise ImportError(
                f"The widget needs {error.name}: run `pip install 'llm-device-workbench[lab]'` and restart the kernel."
            ) from error
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")
