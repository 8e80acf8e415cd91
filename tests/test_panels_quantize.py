"""The Quantize tab, with a tiny model that is really quantized, saved, opened and loaded."""

from __future__ import annotations

import json
import math
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from played_page import choose, click, find, send, wait_for

import workbench as wb
from workbench.gptq import ModuleReport
from workbench.panels.look import Page
from workbench.panels.quantize import suggested_folder
from workbench.panels.quantized import QuantizedView, error_series, worst_modules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GPTQ = wb.GPTQ(group_size=32)
NAME = "tiny-llama-gptq-4bit-32g"
PROSE = "The quick brown fox jumps over the lazy dog while the rain falls on the roof. " * 40


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[wb.Workbench]:
    monkeypatch.chdir(tmp_path)
    workload = wb.Workload(context_length=128)
    made = wb.Workbench(
        wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "512MB"}, precision=GPTQ, workload=workload)
    )
    assert made._state.settle(60)
    send(find(made, "wb-samples"), value=8)
    send(find(made, "wb-sequence-length"), value=64)
    yield made
    made.close()
    if made.session is not None:
        made.session.unload()


@pytest.fixture(scope="module")
def report(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> wb.QuantizeReport:
    recipe = wb.Recipe(model=str(tiny_llama), precision=GPTQ, workload=wb.Workload(context_length=128))
    text = wb.CalibrationText(samples=4, sequence_length=64)
    return wb.quantize(recipe, tmp_path_factory.mktemp("made") / "it", calibration=text, evaluation=None)


def idle(bench: wb.Workbench) -> None:
    wait_for(lambda: not bench._state.activity)
    assert bench._state.settle(60)


def run(bench: wb.Workbench) -> wb.QuantizeReport:
    click(find(bench, "wb-quantize"))
    idle(bench)
    assert bench._state.problems.get("quantize", "") == ""
    made = bench._quantize.report
    assert made is not None
    return made


def problem(bench: wb.Workbench) -> str:
    return str(bench._state.problems.get("quantize", ""))


def pick(dropdown: Any, label: str) -> None:
    """As the browser does where labels and values differ."""
    send(dropdown, index=dropdown._options_labels.index(label))


def shown(widget: Any) -> bool:
    return bool(widget.layout.display is None)


def test_from_text_to_an_opened_and_loaded_model(bench: wb.Workbench, tiny_llama: Path, tmp_path: Path) -> None:
    assert [bench._tabs.get_title(index) for index in (1, 2)] == ["Generate", "Quantize"]
    assert find(bench, "wb-output").value == NAME
    assert str(tmp_path / NAME) in find(bench, "wb-output-path").value
    assert not shown(bench._quantize._after)
    texts: list[str] = []
    find(bench, "wb-quantize-text").observe(lambda change: texts.append(change["new"]), "value")

    click(find(bench, "wb-quantize"))
    assert find(bench, "wb-quantize").disabled
    assert find(bench, "wb-load").disabled
    idle(bench)
    assert problem(bench) == ""
    report = bench._quantize.report
    assert report is not None
    assert report.folder == str(tmp_path / NAME)
    assert (report.calibration.samples, report.calibration.sequence_length) == (8, 64)
    assert find(bench, "wb-quantize-progress").value == 1000
    modules = [text for text in texts if "model.layers." in text]
    assert modules
    assert all("of 14), error" in text and "left" in text for text in modules)
    # Everything that was left of the run is the folder.
    assert [path.name for path in tmp_path.iterdir()] == [NAME]

    said = find(bench, "wb-quantize-report").value
    for part in (
        f'title="{report.before_bytes:,} bytes"',
        f'title="{report.after_bytes:,} bytes"',
        f"{report.perplexity_before:.3f}",
        f"{report.perplexity_after:.3f}",
        f"in {report.seconds:.1f} s",
        report.worst(1)[0].name,
    ):
        assert part in said
    figure = bench._quantize._view.figure
    assert find(bench, "wb-quantize-chart").children == (figure,)
    assert {line.name: list(line.y) for line in figure.data} == report.layer_errors()
    assert find(bench, "wb-output").value == f"{NAME}-2"  # the next one is new as well

    worst = tuple(m.name for m in report.worst(2))
    click(find(bench, "wb-skip-worst"))
    assert bench.recipe.precision == wb.GPTQ(group_size=32, skip_modules=worst)
    assert find(bench, "wb-skip-worst").disabled, bench._state.problems
    assert ", ".join(worst) == find(bench, "wb-skip-text").value

    click(find(bench, "wb-open-result"))
    idle(bench)
    assert bench.recipe.model == wb.ModelRef(name=report.folder)
    assert bench.recipe.precision == wb.FullPrecision()
    assert find(bench, "wb-quantize").disabled
    assert "quantized already" in find(bench, "wb-quantize-why").value
    assert find(bench, "wb-skip-worst").disabled, bench._state.problems
    click(find(bench, "wb-load"))
    idle(bench)
    assert "Loaded as previewed" in find(bench, "wb-load-report").value


def test_the_button_says_why_it_cannot_be_pressed(bench: wb.Workbench) -> None:
    button, why = find(bench, "wb-quantize"), find(bench, "wb-quantize-why")
    assert not button.disabled
    assert why.value == ""
    choose(find(bench, "wb-precision"), "int8")
    idle(bench)
    assert button.disabled
    assert "Pick gptq" in why.value
    choose(find(bench, "wb-precision"), "gptq")
    idle(bench)
    assert not button.disabled
    choose(find(bench, "wb-machine"), "RTX 4090")
    idle(bench)
    assert button.disabled
    assert "pick This machine" in why.value


def test_no_change_of_precision_leaves_it_greyed(bench: wb.Workbench) -> None:
    for bits in (8, 4, 8, 4):
        pick(find(bench, "wb-bits"), str(bits))
        idle(bench)
        assert not find(bench, "wb-quantize").disabled
        assert find(bench, "wb-output").value == f"tiny-llama-gptq-{bits}bit-32g"
    bench.recipe = bench.recipe.with_(precision=wb.GPTQ(group_size=32, damp_percent=0.05))  # an equal placement
    idle(bench)
    assert not find(bench, "wb-quantize").disabled
    send(find(bench, "wb-output"), value="mine")
    pick(find(bench, "wb-bits"), "8")
    assert find(bench, "wb-output").value == "mine"
    send(find(bench, "wb-output"), value=" ")
    assert find(bench, "wb-output").value == "tiny-llama-gptq-8bit-32g"


def test_cancel_stops_after_the_module_and_leaves_nothing(bench: wb.Workbench, tmp_path: Path) -> None:
    seen: list[str] = []
    threads: list[str] = []

    def press(change: Any) -> None:
        if "model.layers." in change["new"]:
            seen.append(change["new"])
            threads.append(threading.current_thread().name)
            if len(seen) == 1:
                click(find(bench, "wb-quantize-cancel"))

    find(bench, "wb-quantize-text").observe(press, "value")
    assert find(bench, "wb-quantize-cancel").disabled
    click(find(bench, "wb-quantize"))
    idle(bench)
    assert len(seen) == 1
    assert threads[0].startswith("workbench-torch")
    assert "cancelled" in find(bench, "wb-quantize-text").value
    assert list(tmp_path.iterdir()) == []
    assert bench._quantize.report is None
    assert problem(bench) == ""
    assert find(bench, "wb-quantize-cancel").disabled
    assert not find(bench, "wb-quantize").disabled


def test_closing_in_the_middle_cancels(bench: wb.Workbench, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(change: Any) -> None:
        if "model.layers." in change["new"]:
            begun.set()
            assert go_on.wait(60)

    find(bench, "wb-quantize-text").observe(hold, "value")
    click(find(bench, "wb-quantize"))
    assert begun.wait(60)
    closing = threading.Thread(target=bench.close)
    closing.start()
    wait_for(bench._quantize._job.cancel.is_set)
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_fields_appear_where_they_are_needed(bench: wb.Workbench) -> None:
    controls = {
        name: find(bench, f"wb-calibration-{name}") for name in ("file", "dataset", "split", "column", "amount")
    }

    def fields() -> set[str]:
        return {name for name, control in controls.items() if shown(control)} - {"amount"}

    assert fields() == set()
    pick(find(bench, "wb-calibration"), "WikiText-2 (from the Hub)")
    assert fields() == set()
    pick(find(bench, "wb-calibration"), "A file")
    assert fields() == {"file"}
    for name, wanted in (("a.txt", {"file"}), ("a.JSONL", {"file", "column"}), ("a.parquet", {"file", "column"})):
        send(controls["file"], value=name)
        assert fields() == wanted
    pick(find(bench, "wb-calibration"), "A data set on the Hub")
    assert fields() == {"dataset", "split", "column"}
    assert "8 x 64 = 512 tokens" in controls["amount"].value
    send(find(bench, "wb-sequence-length"), value=4096)
    assert "2,048 tokens at a time" in controls["amount"].value
    send(find(bench, "wb-samples"), value=0)
    assert "samples is a whole number of at least 1" in controls["amount"].value


def test_a_file_with_a_column_over_a_folder_that_exists(bench: wb.Workbench, tmp_path: Path) -> None:
    file, folder = tmp_path / "texts.jsonl", tmp_path / "old"
    file.write_text("\n".join(json.dumps({"body": PROSE + str(i)}) for i in range(8)))
    folder.mkdir()
    (folder / "kept").touch()
    pick(find(bench, "wb-calibration"), "A file")
    send(find(bench, "wb-calibration-file"), value=str(file))
    send(find(bench, "wb-quantize-seed"), value=3)
    send(find(bench, "wb-output"), value=str(folder))
    bench.session = wb.load(bench.recipe.with_(precision=wb.FullPrecision()))
    session = bench.session
    assert "unloaded first" in find(bench, "wb-quantize-why").value

    click(find(bench, "wb-quantize"))
    assert "tick Overwrite" in problem(bench)
    assert bench.session is session
    send(find(bench, "wb-overwrite"), value=True)
    click(find(bench, "wb-quantize"))
    idle(bench)
    assert "texts.jsonl has no column 'text'" in problem(bench)
    assert "body" in problem(bench)
    assert (folder / "kept").exists()

    send(find(bench, "wb-calibration-column"), value="body")
    report = run(bench)
    assert report.calibration == wb.CalibrationText(
        source=str(file), column="body", samples=8, sequence_length=64, seed=3
    )
    assert bench.session is None
    assert not (folder / "kept").exists()
    assert (folder / "config.json").exists()
    assert "texts.jsonl" in find(bench, "wb-quantize-report").value


def test_what_cannot_be_is_said_in_the_panel(bench: wb.Workbench, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    source, file = find(bench, "wb-calibration"), find(bench, "wb-calibration-file")
    pick(source, "A file")
    for name, says in (("", "Name the file"), ("texts/none.txt", "There is no file texts/none.txt")):
        send(file, value=name)
        click(find(bench, "wb-quantize"))
        assert says in problem(bench)
    send(file, value="short.txt")
    click(find(bench, "wb-quantize"))
    idle(bench)
    assert "shorter than one sequence of 64 tokens" in problem(bench)
    pick(source, "A data set on the Hub")
    send(find(bench, "wb-calibration-dataset"), value="nonsense")
    click(find(bench, "wb-quantize"))
    assert "org/name" in problem(bench)
    pick(source, "Python's documentation (offline)")
    send(find(bench, "wb-sequence-length"), value=2)
    click(find(bench, "wb-quantize"))
    assert "sequence_length" in problem(bench)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    assert not find(bench, "wb-quantize").disabled


def test_without_plotly_the_table_is_open(report: wb.QuantizeReport, monkeypatch: pytest.MonkeyPatch) -> None:
    view = QuantizedView(Page())
    view.show(report)
    assert view.figure is not None
    assert "<details>" in view._text.value
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    view.show(report)
    assert view.figure is None
    assert view._chart.box.children == ()
    assert "<details open>" in view._text.value
    assert "could not be made" in view._text.value
    for module in report.modules:
        assert f"{module.error:.2%}" in view._text.value


def test_the_figure_follows_the_page_and_a_later_page_finds_it_so(report: wb.QuantizeReport) -> None:
    page = Page()
    view = QuantizedView(page)
    view.show(report)
    before = view.figure
    page.dark = True
    assert view.figure is not before
    assert before.comm is None
    assert view._chart.box.children == (view.figure,)
    assert view.figure.layout.font.color != before.layout.font.color
    page.width_px = 640
    assert view.figure.layout.width == 640
    state = view.figure.get_state()
    assert state["_widget_layout"]["width"] == 640
    assert len(state["_widget_data"]) == 7
    view.show(None)
    assert view.figure is None
    assert view._text.value == ""


def test_experts_are_one_line_with_the_worst_of_them(report: wb.QuantizeReport) -> None:
    from dataclasses import replace

    def module(layer: int, name: str, error: float) -> ModuleReport:
        return ModuleReport(
            name=f"model.layers.{layer}.{name}", layer=layer, shape=(8, 8), error=error, tokens=1, seconds=0.0
        )

    modules = (
        module(0, "mlp.experts.0.up_proj", 0.1),
        module(0, "mlp.experts.1.up_proj", 0.3),
        module(1, "mlp.experts.0.up_proj", math.nan),
        module(1, "o_proj", 0.2),
    )
    made = replace(report, modules=modules)
    assert error_series(made) == {"mlp.experts.*.up_proj": [0.3, None], "o_proj": [None, 0.2]}
    assert [m.error for m in worst_modules(made)] == [0.3]
    view = QuantizedView(Page())
    view.show(made)
    assert [list(line.y) for line in view.figure.data] == [[0.3, None], [None, 0.2]]


@pytest.mark.parametrize(
    ("title", "precision", "wanted"),
    [
        ("org/Some Model", wb.GPTQ(bits=3, group_size=-1), "Some-Model-gptq-3bit"),
        ("../", wb.GPTQ(), "model-gptq-4bit-128g"),
    ],
)
def test_suggested_folders_are_new(
    title: str, precision: wb.GPTQ, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (wanted, f"{wanted}-2", f"{wanted}-3"):
        assert suggested_folder(title, precision) == name
        (tmp_path / name).mkdir()


def test_memory_is_foretold_before_the_start(bench: wb.Workbench) -> None:
    said, room = find(bench, "wb-quantize-plan"), find(bench, "wb-make-room")
    assert said.value == ""  # nobody is looking
    send(bench._tabs, selected_index=2)
    wait_for(lambda: "While quantizing" in said.value)
    plan = bench._quantize.ahead.plan
    assert plan is not None
    assert plan == wb.plan_quantization(
        bench.recipe, calibration=wb.CalibrationText(samples=8, sequence_length=64), machine=bench.machine
    )
    assert f'title="{plan.memory["cpu"].work_bytes:,} bytes"' in said.value
    assert "✓ Fits: all of it is on cpu." in said.value
    assert not shown(room)

    send(find(bench, "wb-samples"), value=10**8)  # terabytes of states between two layers
    wait_for(lambda: "✗ Does not fit" in said.value)
    assert find(bench, "wb-quantize").disabled
    assert "quantizing takes" in find(bench, "wb-quantize-why").value
    send(find(bench, "wb-samples"), value=8)
    wait_for(lambda: "✓ Fits" in said.value)
    assert not find(bench, "wb-quantize").disabled

    # A machine that is not here, with budgets that leave the work no room there.
    bench.machine = wb.Machine.preset("Colab T4")
    bench.recipe = bench.recipe.with_(max_memory={0: "100KB", "cpu": "1KB"})
    idle(bench)
    wait_for(lambda: "✗ Does not fit" in said.value)
    assert shown(room)
    assert "Set the budgets to " in room.tooltip
    click(room)
    idle(bench)
    wait_for(lambda: "✓ Fits" in said.value)
    assert not shown(room)
    choose(find(bench, "wb-precision"), "int8")
    idle(bench)
    wait_for(lambda: said.value == "")


def test_more_of_gptq(bench: wb.Workbench) -> None:
    send(find(bench, "wb-damp"), value=0.05)
    send(find(bench, "wb-true-sequential"), value=False)
    pick(find(bench, "wb-format"), "gptq_v2 (old loaders misread it)")
    idle(bench)
    assert bench.recipe.precision == wb.GPTQ(group_size=32, damp_percent=0.05, true_sequential=False, format="gptq_v2")
    bench.recipe = bench.recipe.with_(precision=GPTQ)
    assert find(bench, "wb-damp").value == 0.1
    choose(find(bench, "wb-precision"), "full")
    assert not shown(find(bench, "wb-gptq-knobs"))


def test_picking_gptq_takes_groups_that_fit(bench: wb.Workbench) -> None:
    bench.recipe = bench.recipe.with_(precision=wb.FullPrecision())
    bench._precision._last["gptq"] = wb.GPTQ()  # as it is in a workbench of which no group size was asked
    choose(find(bench, "wb-precision"), "gptq")
    idle(bench)
    assert bench.recipe.precision == wb.GPTQ(group_size=64)
    assert "Groups of 128 do not divide" in bench._state.problems["precision"]
