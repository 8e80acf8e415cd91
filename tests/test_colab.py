"""Google Colab, as far as it can be played here: packages, modules, notebook. The rest is on a checklist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
LISTED = Path(__file__).parent / "colab-2026-08-19.txt"
# What Colab's own machinery and its CUDA driver are tuned to; another build of any of these would break a session.
MUST_STAY = re.compile(
    r"(torch\w*|numpy|scipy|pandas|triton|nvidia-.+|cuda-.+|cu\w+-cu12|ip(ywidgets|ykernel|ython)|traitlets|tornado)"
)

# The parts of google.colab that are used, and what they do: they write down that they were called.
STUB = {
    "__init__.py": "",
    "output.py": """
import os
def enable_custom_widget_manager():
    with open(os.environ["COLAB_CALLS"], "a") as file:
        file.write("enable_custom_widget_manager\\n")
""",
    "userdata.py": """
class NotebookAccessError(Exception): pass
class SecretNotFoundError(Exception): pass
def get(name):
    if name != "HF_TOKEN":
        raise SecretNotFoundError(name)
    return "hf_of_colabs_secrets"
""",
    "errors.py": "class Error(Exception): pass",
}


@pytest.fixture
def colab(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``google.colab`` can be imported, and is, before anything else, as in Colab's kernels."""
    package = tmp_path / "stub" / "google" / "colab"
    package.mkdir(parents=True)
    for name, source in STUB.items():
        (package / name).write_text(source)
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    # Libraries ask the shell's name whether this is Colab.
    (startup / "00-colab.py").write_text(
        "import google.colab\n"
        "class Shell(type(get_ipython())):\n    def __str__(self): return '<google.colab._shell.Shell object>'\n"
        "get_ipython().__class__ = Shell\n"
    )
    return {
        "PYTHONPATH": str(tmp_path / "stub"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "COLAB_CALLS": str(tmp_path / "calls"),
    }


def calls(colab: dict[str, str]) -> list[str]:
    file = Path(colab["COLAB_CALLS"])
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(("begin", "expected"), [("import google.colab", 1), ("pass", 0)])
def test_the_widget_switches_custom_widgets_on(colab: dict[str, str], begin: str, expected: int) -> None:
    """Once, where this is Colab; nowhere else, and not by importing the core."""
    program = f"{begin}\nimport workbench\nworkbench.Recipe()\nprint(end='core ', flush=True)\n"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **colab}, check=True, capture_output=True)
    assert calls(colab) == []
    program += "workbench.Workbench; workbench.Workbench\n"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **colab}, check=True, capture_output=True)
    assert calls(colab) == ["enable_custom_widget_manager"] * expected


def test_the_notebook_runs(
    colab: dict[str, str], demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the installation: the token from Colab's secrets, the widget, and the way without widgets."""
    for name, value in colab.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (install,) = (cell for cell in notebook.cells if cell.source.startswith("%pip "))
    notebook.cells.remove(install)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = {key: "".join(o.text for o in each if o.output_type == "stream") for key, each in outputs.items()}
    assert set(calls(colab)) == {"enable_custom_widget_manager"}  # anywidget asks again
    assert "There is a token." in said["token"]
    assert any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs["bench"])
    assert any("wb-placement" in o.get("data", {}).get("text/html", "") for o in outputs["plain"])
    assert "as previewed" in said["load"]
    assert "Paris" in said["load"]


def test_the_listed_packages_are_those_of_colab() -> None:
    """The list is what the next test stands on."""
    listed = dict(line.split("==") for line in LISTED.read_text().splitlines() if not line.startswith("#"))
    assert listed["torch"].endswith("+cu128")
    assert listed["ipywidgets"] == "7.7.1"
    assert len(listed) > 600


def test_the_install_cell_leaves_colabs_packages_alone(tmp_path: Path) -> None:
    """pip is asked what it would do in an environment in which everything that Colab lists is installed."""
    source = next(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.source.startswith("%pip"))
    (requirement,) = re.findall(r'"llm-device-workbench(\[\w+\]) @ git\+https://', source)
    assert source.startswith("%pip install --quiet ")  # no --upgrade, no other index
    wheel = build_wheel(tmp_path)
    python = pretend_installed(tmp_path / "colab")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    asked = [*pip, "install", "--dry-run", "--quiet", "--report", "-"]
    index = subprocess.run([*asked, "--ignore-installed", "--no-deps", "filelock"], capture_output=True, check=False)
    if index.returncode:
        pytest.skip("needs a package index, to ask pip what it would install")
    result = subprocess.run([*asked, f"{wheel}{requirement}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    installs = {item["metadata"]["name"].lower().replace("_", "-"): item for item in report["install"]}
    assert "llm-device-workbench" in installs
    assert "bitsandbytes" in installs  # else this would show nothing
    assert [name for name in installs if MUST_STAY.fullmatch(name)] == []


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "dist")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def pretend_installed(folder: Path) -> Path:
    """An environment that says it holds every listed package; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    (packages,) = folder.glob("lib/python*/site-packages")
    for line in LISTED.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, version = line.split("==")
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
    return folder / "bin" / "python"
