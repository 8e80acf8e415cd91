"""What `pip install` gives: the wheel, with the core's libraries and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import workbench as wb

ROOT = Path(__file__).parent.parent
EXTRAS = ("ipywidgets", "anywidget", "plotly", "IPython", "jupyterlab", "bitsandbytes", "gptqmodel", "optimum", "peft")


def build(target: str, source: Path, folder: Path) -> Path:
    """What `python -m build` does, without an environment of its own."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], capture_output=True, check=True)
    return folder


def run_core_only(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the installed wheel in a process that has none of the extras."""
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        # Python takes None for "not found", when it imports and when it is asked whether it could.
        f"sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
        "import workbench\n"
        f"assert workbench.__file__.startswith({str(installed)!r}), workbench.__file__\n"
        "from workbench.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_it_is_small_and_holds_the_package_alone(wheel: Path) -> None:
    assert wheel.name == f"llm_device_workbench-{wb.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "workbench",
        f"llm_device_workbench-{wb.__version__}.dist-info",
    }
    assert "workbench/py.typed" in names
    assert "workbench/workbench.ipynb" in names
    assert not any("test" in name or "__pycache__" in name for name in names)
    kinds = {".py", ".js", ".css", ".typed"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "workbench").rglob("*") if path.suffix in kinds}
    assert sources - set(names) == set()


def test_the_source_distribution_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """And holds what a packager wants: the tests, and what these read."""
    source = build("sdist", ROOT, tmp_path / "sdist")
    assert source.name == f"llm_device_workbench-{wb.__version__}.tar.gz"
    assert source.stat().st_size < 10_000_000  # pictures
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}
    for wanted in (
        "LICENSE",
        "constraints.txt",
        "docs/tutorial.md",
        "notebooks/1-preview.ipynb",
        "tests/test_wheel.py",
    ):
        assert (unpacked / wanted).is_file(), wanted


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"llm_device_workbench-{wb.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert (
            archive.read(f"{info}/entry_points.txt").decode() == "[console_scripts]\nworkbench = workbench.cli:main\n"
        )
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert "Requires-Python: >=3.10" in metadata
    assert not any(extra.lower() in line for extra in EXTRAS for line in needed)
    assert any("transformers" in line for line in needed)


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    names = ("bin/workbench", "Scripts/workbench.exe")
    (script,) = (installed / name for name in names if (installed / name).exists())
    result = subprocess.run(
        [script, "--version"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"workbench {wb.__version__}\n"


def test_plan_without_any_extra(installed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    result = run_core_only(installed, tmp_path, "plan", str(tiny_llama), "--machine", "2x RTX 4090")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Fits on cuda:0" in result.stdout


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ("int8", "int8 needs bitsandbytes: run `pip install bitsandbytes`"),
        ("gptq", "needs gptqmodel: run `pip install gptqmodel`"),
    ],
)
def test_what_an_extra_is_missing_for(
    installed: Path, tiny_llama: Path, tmp_path: Path, precision: str, says: str
) -> None:
    question = ("plan", str(tiny_llama), "--machine", "2x RTX 4090", "--precision", precision)
    result = run_core_only(installed, tmp_path, *question)
    assert (result.returncode, result.stdout) == (2, "")
    (sentence,) = result.stderr.splitlines()
    assert says in sentence


def test_fits_says_what_it_leaves_out(installed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    result = run_core_only(installed, tmp_path, "fits", str(tiny_llama), "--machine", "2x RTX 4090")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nfull precision  fits" in result.stdout
    assert result.stdout.endswith("they need bitsandbytes, run `pip install bitsandbytes`.\n")


def test_lab_and_the_widget_say_what_is_missing(installed: Path, tmp_path: Path) -> None:
    result = run_core_only(installed, tmp_path, "lab")
    assert result.returncode == 2
    (sentence,) = result.stderr.splitlines()
    assert sentence.endswith("run `pip install 'llm-device-workbench[lab]'`.")
