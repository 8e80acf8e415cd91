from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import workbench as wb
from workbench import cli
from workbench.show import WORDS, as_page, as_text

if TYPE_CHECKING:
    from collections.abc import Callable

TWO_CARDS = "2x RTX 4090"


def workbench(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def one_sentence(stderr: str) -> str:
    (line,) = stderr.splitlines()
    assert line.startswith("workbench")
    return line


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A 70B model's config and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("configs") / "llama-70b"
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deepseek_671b(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import DeepseekV3Config

    folder = tmp_path_factory.mktemp("configs") / "deepseek-671b"
    DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    return str(folder)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_70b_model_in_4_bits_on_two_cards(llama_70b: str) -> None:
    result = workbench(
        "plan", llama_70b, "--machine", TWO_CARDS, "--precision", "nf4", "--context", "8192", "--strategy", "packed"
    )
    assert (result.returncode, result.stderr) == (0, "")
    recipe = wb.Recipe(
        model=llama_70b,
        precision=wb.FourBit(quant_type="nf4"),
        strategy="packed",
        workload=wb.Workload(context_length=8192),
    )
    placement = wb.place(recipe, machine=wb.Machine.preset(TWO_CARDS))
    assert placement.verdict == "fits"
    speed = wb.predict_speed(placement, wb.read_skeleton(recipe.model))
    assert result.stdout == as_text(placement, speed=speed) + "\n"


def test_a_671b_model_as_json(deepseek_671b: str) -> None:
    budgets = {0: "70GiB", 1: "70GiB", "cpu": "900GiB", "disk": "900GB"}
    given = [f"{device}={size}" for device, size in budgets.items()]
    result = workbench("plan", deepseek_671b, "--machine", "8x A100 80 GB", "--json", "--max-memory", *given)
    assert (result.returncode, result.stderr) == (0, "")
    data = json.loads(result.stdout)
    recipe = wb.Recipe(model=deepseek_671b, max_memory=budgets)
    placement = wb.place(recipe, machine=wb.Machine.preset("8x A100 80 GB"))
    assert wb.Recipe.from_json(json.dumps(data["recipe"])) == recipe
    assert data["verdict"] == placement.verdict == "offloads"
    assert data["device_map"] == placement.device_map
    assert data["total_bytes"] == placement.total_bytes
    assert {name: m["weight_bytes"] for name, m in data["memory"].items()} == {
        str(device): m.weight_bytes for device, m in placement.memory.items()
    }


def test_what_does_not_fit_is_an_answer_with_code_1(llama_70b: str, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["plan", llama_70b, "--machine", "RTX 3090", "--max-memory", "0=20GiB", "--max-memory", "cpu=30GiB"]
    assert cli.main(question) == 1
    out, err = capsys.readouterr()
    assert "\nDoes not fit: " in out
    assert "\nno room " in out
    assert err == ""
    # A program that could not run is not printed.
    assert cli.main([*question, "--python"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert one_sentence(err).startswith("workbench: Does not fit: ")


def test_a_page(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert cli.main(["plan", str(tiny_llama), "--machine", "Colab T4", "--html", str(page)]) == 0
    recipe, machine = wb.Recipe(model=str(tiny_llama)), wb.Machine.preset("Colab T4")
    placement = wb.place(recipe, machine=machine)
    speed = wb.predict_speed(placement, wb.read_skeleton(recipe.model))
    assert page.read_text(encoding="utf-8") == as_page(placement, speed=speed)
    assert capsys.readouterr().out == f"{placement.summary} Written to {page}.\n"


def test_the_printed_program_runs(tiny_llama: Path, tmp_path: Path) -> None:
    result = workbench("plan", str(tiny_llama), "--max-memory", "cpu=1GiB", "--precision", "float32", "--python")
    assert (result.returncode, result.stderr) == (0, "")
    program = f"{result.stdout}\nprint('parameters', model.num_parameters(), model.dtype)\n"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.endswith("parameters 139584 torch.float32\n")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("full", wb.FullPrecision()),
        ("float32", wb.FullPrecision(dtype="float32")),
        ("bfloat16", wb.FullPrecision(dtype="bfloat16")),
        ("float16", wb.FullPrecision(dtype="float16")),
        ("int8", wb.Int8()),
        ("nf4", wb.FourBit(quant_type="nf4")),
        ("fp4", wb.FourBit(quant_type="fp4")),
        ("gptq", wb.GPTQ()),
    ],
)
def test_every_precision(precision: str, expected: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    # As wide as GPTQ's usual group.
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--machine", "L4", "--precision", precision, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert wb.Recipe.from_json(json.dumps(data["recipe"])).precision == expected


def test_what_is_said_of_the_model(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--revision", "main", "--trust-remote-code", "--batch", "3", "--json", "--machine", "L4"]
    assert cli.main(["plan", str(tiny_llama), *options]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["model"]["revision"], recipe["model"]["trust_remote_code"]) == ("main", True)
    assert recipe["workload"]["batch_size"] == 3


# --- fits -------------------------------------------------------------------------------------------------------------


def test_the_precisions_side_by_side(llama_70b: str) -> None:
    result = workbench("fits", llama_70b, "--machine", "A100 80 GB")
    assert (result.returncode, result.stderr) == (0, "")
    _, rows, sentences = result.stdout.rstrip("\n").split("\n\n")
    cells = [re.split(r"\s{2,}", row) for row in rows.splitlines()]
    assert cells[0] == ["precision", "verdict", "weights", "longest context", "est. tok/s"]
    fits = wb.what_fits(wb.Recipe(model=llama_70b), machine=wb.Machine.preset("A100 80 GB"))
    assert [row[0] for row in cells[1:]] == [fit.precision.label for fit in fits]
    assert [row[1] for row in cells[1:]] == [WORDS[fit.placement.verdict] for fit in fits]
    assert cells[1][1] == "fits"
    assert cells[-1][:2] == ["full precision", "does not fit"]
    assert cells[1][3] == f"{fits[0].longest_context:,}"
    assert sentences.splitlines() == [f"{fit.precision.label}: {fit.placement.summary}" for fit in fits]


def test_code_1_if_nothing_fits(llama_70b: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fits", llama_70b, "--machine", "16 GB laptop"]) == 1
    assert "  fits" not in capsys.readouterr().out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "nowhere/at-all"], "is not in the local cache"),
        (["plan", "demo", "--machine", "RTX 4091"], "did you mean 'RTX 4090'?"),
        (["plan", "demo", "--machine", "L4", "--max-memory", "1=20GiB"], "has no cuda:1"),
        (["plan", "demo", "--machine", "L4", "--max-memory", "0=lots"], "is no size of memory"),
        (["plan", "demo", "--machine", "L4", "--max-memory", "0=1GiB", "0=2GiB"], "names a device twice"),
        (["plan", "demo", "--machine", "L4", "--max-memory", "0=1GiB", "cuda:0=2GiB"], "names cuda:0 twice"),
        (["plan", "demo", "--machine", "L4", "--context", "-1"], "whole number of at least 1"),
        (["plan", "demo", "--machine", "L4", "--html", "/nowhere/plan.html"], "/nowhere/plan.html cannot be written"),
        (["plan", "demo", "--max-memory", "20GiB"], "'20GiB' is no DEVICE=SIZE"),
        (["plan", "--max-memory", "0=20GiB", "demo"], "'demo' is no DEVICE=SIZE"),
        (["plan", "demo", "--precision", "q4"], "'nf4'"),
        (["plan", "demo", "--strategy", "custom"], "'packed'"),
        (["plan", "demo", "--json", "--python"], "not allowed with"),
        (["plan", "demo", "--contxt", "8"], "`workbench plan --help`"),
        (["plan"], "MODEL"),
        (["fit", "demo"], "'fits'"),
        ([], "COMMAND"),
    ],
)
def test_an_error_is_one_sentence(
    arguments: list[str], says: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tiny_llama) if argument == "demo" else argument for argument in arguments]
    try:
        code = cli.main(given)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert says.replace("demo", str(tiny_llama)) in one_sentence(err)


def test_no_traceback(tmp_path: Path) -> None:
    """Not even from a config that makes transformers itself stumble."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = workbench("plan", str(tmp_path), "--machine", "L4")
    assert (result.returncode, result.stdout) == (2, "")
    assert one_sentence(result.stderr)


def test_a_reader_that_has_seen_enough(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "workbench", "plan", str(tiny_llama), "--machine", "L4", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["plan"], ["fits"], ["lab"]])
def test_help_teaches_by_two_examples_that_can_be_read(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    examples = re.findall(r"^  workbench (.*)$", capsys.readouterr().out.partition("examples:")[2], re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        options, rest = cli._parser().parse_known_args(shlex.split(example.partition(">")[0]))
        assert command in ([], [options.command])
        assert not rest or options.command == "lab"
        if options.command != "lab" and options.machine is not None:
            assert options.machine in wb.Machine.presets()


def test_the_command_starts_without_heavy_libraries() -> None:
    program = "import workbench.cli, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'workbench'" in result.stdout
    assert not re.search("'(torch|transformers|accelerate|huggingface_hub|ipywidgets|plotly)'", result.stdout)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"workbench {wb.__version__}\n"


# --- lab --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jupyter_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Keep a JupyterLab's files in a folder of the test."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter" / name))
    for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter" / name))
    return lambda name: tmp_path / name


def test_lab_serves_the_notebook(jupyter_home: Callable[[str], Path]) -> None:
    folder = jupyter_home("work")
    folder.mkdir()
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port=0"]
    command = [sys.executable, "-m", "workbench", "lab", *options]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            # Written for the browser just before it is told of; the loop ends with the server's output at the latest.
            assert any("file://" in line for line in server.stderr)
            (page,) = jupyter_home("jupyter").rglob("jpserver-file-to-run-*-open.html")
            assert "/lab/tree/workbench.ipynb?token=" in page.read_text(encoding="utf-8")
        finally:
            server.terminate()
            server.communicate(timeout=60)
    shipped = Path(__file__).parent.parent / "notebooks" / "workbench.ipynb"
    assert (folder / "workbench.ipynb").read_bytes() == shipped.read_bytes()


def test_lab_leaves_a_notebook_that_is_there_alone(jupyter_home: Callable[[str], Path], tmp_path: Path) -> None:
    notebook = tmp_path / "workbench.ipynb"
    notebook.write_text("mine")
    result = workbench("lab", "--version", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", result.stdout)  # JupyterLab's own answer
    assert notebook.read_text() == "mine"


def test_lab_without_jupyterlab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jupyterlab", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab"]) == 2
    assert "needs jupyterlab: run `pip install 'llm-device-workbench[lab]'`" in one_sentence(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
