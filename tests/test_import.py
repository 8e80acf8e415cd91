from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest

import workbench as wb

HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "huggingface_hub", "safetensors"}
WIDGETS = {"ipywidgets", "anywidget", "plotly", "IPython", "traitlets"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running some code."""
    program = f"{code}\nimport sys, json; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_loads_neither_heavy_nor_widget_libraries() -> None:
    assert not modules_after("import workbench") & (HEAVY | WIDGETS)


def test_the_core_never_loads_a_widget_library(demo_model: object) -> None:
    code = (
        "import workbench as wb\n"
        "recipe = wb.Recipe(model='demo')\n"
        "placement = wb.place(recipe)\n"
        "session = wb.load(recipe)\n"
        "session.generate('Hello', max_new_tokens=2)\n"
        "recipe.to_python(placement), recipe.to_json()\n"
    )
    loaded = modules_after(code)
    assert "torch" in loaded
    assert not loaded & (WIDGETS - {"IPython", "traitlets"})
    assert "ipywidgets" not in loaded


def test_import_takes_less_than_a_third_of_a_second() -> None:
    def seconds(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - started

    seconds("import workbench")  # compiles and fills the page cache
    # The interpreter's own start is not ours; the median of differences keeps a busy machine out.
    differences = [seconds("import workbench") - seconds("pass") for _ in range(5)]
    assert statistics.median(differences) < 0.3


def test_every_public_name_exists() -> None:
    for name in wb.__all__:
        assert getattr(wb, name) is not None, name


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Workbanch'"):
        _ = wb.Workbanch
