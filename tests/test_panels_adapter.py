"""The Outliers, Adapter and Save controls, with a tiny model that is really measured, trained and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from played_page import choose, click, find, send, wait_for

import workbench as wb
from workbench.int8_outliers import ModuleOutliers, OutlierReport
from workbench.panels.adapter import loss_spec
from workbench.panels.lines import lines_figure
from workbench.panels.outliers import outlier_specs, outliers_as_html
from workbench.panels.precision import name_groups

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[wb.Workbench]:
    monkeypatch.chdir(tmp_path)
    workload = wb.Workload(context_length=128)
    made = wb.Workbench(
        wb.Recipe(model=str(tiny_llama), max_memory={"cpu": "512MB"}, precision=wb.Int8(), workload=workload)
    )
    assert made._state.settle(60)
    click(find(made, "wb-load"))
    idle(made)
    yield made
    made.close()
    if made.session is not None:
        made.session.unload()


def idle(bench: wb.Workbench) -> None:
    wait_for(lambda: not bench._state.activity)
    assert bench._state.settle(60)


def problem(bench: wb.Workbench, panel: str) -> str:
    return str(bench._state.problems.get(panel, ""))


def open_tab(bench: wb.Workbench, name: str) -> None:
    send(bench._tabs, selected_index=bench._tabs.titles.index(name))


def shown(widget: Any) -> bool:
    return bool(widget.layout.display is None)


def test_outliers_are_measured_and_a_threshold_is_taken(bench: wb.Workbench) -> None:
    open_tab(bench, "Outliers")
    assert not shown(bench._outliers._after)
    click(find(bench, "wb-outliers-measure"))
    idle(bench)
    assert problem(bench, "outliers") == ""
    report = bench._outliers.report
    assert report is not None
    assert bench.session is not None  # it stays loaded
    magnitudes = bench._outliers.magnitudes.figure
    assert list(magnitudes.data[0].y) == [report.largest(layer) for layer in (0, 1)]
    assert list(magnitudes.data[2].y) == [6.0, 6.0]
    send(find(bench, "wb-outliers-threshold"), value=1.0)
    shares = bench._outliers.shares.figure
    assert list(shares.data[0].y) == [report.share(1.0, layer) for layer in (0, 1)]
    assert list(bench._outliers.magnitudes.figure.data[2].y) == [1.0, 1.0]
    assert f"{report.share(1.0):.2%} of the multiplications" in find(bench, "wb-outliers-report").value
    click(find(bench, "wb-outliers-take"))
    assert bench.recipe.precision == wb.Int8(threshold=1.0)
    send(find(bench, "wb-outliers-prompt"), value="")
    click(find(bench, "wb-outliers-measure"))
    idle(bench)
    assert "Give a prompt" in problem(bench, "outliers")


def test_charts_are_plain_data() -> None:
    modules = tuple(
        ModuleOutliers(name=f"layers.{layer}.{name}", layer=layer, rows=rows, peaks=(0.5, 1.0, 4.0 + layer))
        for layer in (0, 1)
        for name, rows in (("a", 10), ("b", 30))
    )
    report = OutlierReport(prompt="x", tokens=3, threshold=4.5, modules=modules)
    magnitudes, shares = outlier_specs(report)
    assert dict(magnitudes.series) == {"largest": [4.0, 5.0], "half of the columns stay below": [1.0, 1.0]}
    assert magnitudes.levels == {"threshold 4.5": 4.5}
    # In the second layer one column of three, in both modules.
    assert dict(shares.series) == {"multiplied in 16 bits": [0.0, pytest.approx(1 / 3)]}
    assert report.share() == pytest.approx(1 / 6)
    assert "33.33%" in outliers_as_html(report)
    figure = lines_figure(magnitudes, dark=True)
    assert figure.layout.yaxis.type == "log"
    assert loss_spec((3.0, 2.0)).places == [1, 2]


def test_an_adapter_is_trained_switched_and_removed(bench: wb.Workbench, tmp_path: Path) -> None:
    open_tab(bench, "Adapter")
    plain = bench.placement
    assert plain is not None
    assert find(bench, "wb-adapter-active").options == ("none: the base model",)
    click(find(bench, "wb-adapter-train"))
    assert "Give some examples" in problem(bench, "adapter")
    send(find(bench, "wb-adapter-texts"), value="What is it? => A test.\nJust a text of its own.\n")
    assert bench._adapter.examples() == [("What is it?", "A test."), "Just a text of its own."]
    send(find(bench, "wb-adapter-r"), value=4)
    wait_for(lambda: "Training takes" in find(bench, "wb-adapter-plan").value)
    examples = find(bench, "wb-adapter-texts").value
    send(find(bench, "wb-adapter-texts"), value="")
    wait_for(lambda: find(bench, "wb-adapter-plan").value == "")  # of nothing there is no plan
    send(find(bench, "wb-adapter-texts"), value=examples)
    send(find(bench, "wb-adapter-steps"), value=6)
    send(find(bench, "wb-adapter-batch"), value=1)
    send(find(bench, "wb-adapter-folder"), value="learnt")
    click(find(bench, "wb-adapter-train"))
    idle(bench)
    assert problem(bench, "adapter") == ""
    report = bench._adapter.report
    assert report is not None
    assert len(report.losses) == 6
    assert list(bench._adapter.chart.figure.data[0].y) == list(report.losses)
    assert bench._adapter.chart.figure._widget_data[0]["x"] == [1, 2, 3, 4, 5, 6]  # for a page that is reloaded
    session = bench.session
    assert session is not None
    assert find(bench, "wb-adapter-active").value == "adapter"
    assert bench.recipe.adapters == session.recipe.adapters == (str(tmp_path / "learnt"),)
    assert bench.placement is not None
    assert bench.placement.total_bytes == plain.total_bytes + report.adapter.size_bytes
    choose(find(bench, "wb-adapter-active"), "none: the base model")
    idle(bench)
    assert session.adapters.active is None
    send(find(bench, "wb-adapter-location"), value="nowhere")
    click(find(bench, "wb-adapter-load"))
    idle(bench)
    assert "There is no folder nowhere" in problem(bench, "adapter")
    choose(find(bench, "wb-adapter-active"), "adapter")
    idle(bench)
    click(find(bench, "wb-adapter-remove"))
    idle(bench)
    assert bench.recipe.adapters == ()
    send(find(bench, "wb-adapter-location"), value="learnt")
    click(find(bench, "wb-adapter-load"))
    idle(bench)
    assert find(bench, "wb-adapter-active").value == "learnt"
    click(find(bench, "wb-adapter-merge"))
    idle(bench)
    assert "learnt is part of 14 modules now" in find(bench, "wb-adapter-report").value
    assert find(bench, "wb-adapter-active").options == ("none: the base model",)


def test_training_is_cancelled(bench: wb.Workbench) -> None:
    send(find(bench, "wb-adapter-texts"), value="What is it? => A test.")
    send(find(bench, "wb-adapter-steps"), value=100_000)
    bench._adapter.chart.box.observe(lambda _: None, "children")
    click(find(bench, "wb-adapter-train"))
    wait_for(lambda: "step" in find(bench, "wb-adapter-text").value)
    click(find(bench, "wb-adapter-cancel"))
    idle(bench)
    assert "Stopped" in find(bench, "wb-adapter-text").value
    assert bench.session is not None
    assert bench.session.adapters.list() == ()


def test_saved_and_opened(bench: wb.Workbench, tmp_path: Path) -> None:
    assert not shown(find(bench, "wb-save-open"))
    click(find(bench, "wb-save"))
    assert "Name a folder to save to" in problem(bench, "save")
    send(find(bench, "wb-save-folder"), value="made")
    click(find(bench, "wb-save"))
    idle(bench)
    assert problem(bench, "save") == ""
    assert str(tmp_path / "made") in find(bench, "wb-save-said").value
    push = bench._save.push
    assert push.folder == str(tmp_path / "made")
    push.form._handle_custom_msg({"repo_id": " "}, [])
    assert problem(bench, "save-push").startswith("Name the repository")
    click(find(bench, "wb-save"))
    idle(bench)
    assert "made exists: name a new folder" in problem(bench, "save")
    send(find(bench, "wb-save-overwrite"), value=True)
    click(find(bench, "wb-save"))
    idle(bench)
    before = bench.placement
    click(find(bench, "wb-save-open"))
    idle(bench)
    assert bench.placement is not None
    assert before is not None
    assert bench.placement.total_bytes == before.total_bytes
    click(find(bench, "wb-load"))
    idle(bench)
    assert bench.session is not None
    assert bench.session.load_report.matches


def test_skip_modules_are_picked_and_dropped(bench: wb.Workbench) -> None:
    modules, find_field = find(bench, "wb-skip-list"), find(bench, "wb-skip-find")
    assert bench.session is not None
    assert modules.options == bench.session.skeleton.linear_modules
    assert modules.value == ("lm_head",)  # transformers' own choice
    send(find_field, value="layers.1.*k_proj")
    assert modules.options == ("model.layers.1.self_attn.k_proj",)
    send(modules, index=[0])
    assert bench.recipe.precision == wb.Int8(skip_modules=("lm_head", "model.layers.1.self_attn.k_proj"))
    send(find_field, value="")
    click_chip(bench, "up_proj")
    skips = ("lm_head", "model.layers.1.self_attn.k_proj", "up_proj")
    assert bench.recipe.precision == wb.Int8(skip_modules=skips)
    assert modules.value == tuple(m for m in modules.options if m.endswith("up_proj") or m in skips)
    # Dropping one of those that a pattern covers leaves the others, by name.
    left = [i for i, m in enumerate(modules.options) if m in modules.value and m != "model.layers.0.mlp.up_proj"]
    send(modules, index=left)
    assert bench.recipe.precision == wb.Int8(skip_modules=(*skips[:2], "model.layers.1.mlp.up_proj"))
    assert "3 of 15 stay as they are" in find(bench, "wb-skip-modules").get_title(0)
    send(modules, index=[])
    assert "transformers itself leaves lm_head alone" in problem(bench, "precision")
    assert len(modules.value) == 3
    send(find_field, value="(")
    assert modules.options == ()


def click_chip(bench: wb.Workbench, name: str) -> None:
    send(bench._precision.chips[name], value=True)


def test_several_heads_each_have_a_button_of_their_own() -> None:
    heads = [f"lm_heads.{i}" for i in range(3)]
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj", *heads]
    assert name_groups(names) == {"q_proj": 2, **dict.fromkeys(heads, 1)}


def test_every_option_of_bitsandbytes(bench: wb.Workbench) -> None:
    send(find(bench, "wb-has-fp16-weight"), value=True)
    assert bench.recipe.precision == wb.Int8(has_fp16_weight=True)
    assert bench._state.settle(60)
    assert "has_fp16_weight keeps the weights as they are" in bench.placement.summary  # type: ignore[union-attr]
    choose(find(bench, "wb-precision"), "nf4")
    choose(find(bench, "wb-quant-storage"), "bfloat16")
    assert bench.recipe.precision == wb.FourBit(quant_storage="bfloat16")
    assert not shown(find(bench, "wb-has-fp16-weight"))
    assert bench._state.settle(60)
    assert "14 weights become nf4" in find(bench, "wb-casts").value
    if "torchao" in find(bench, "wb-precision").options:
        choose(find(bench, "wb-precision"), "torchao")
        pick(find(bench, "wb-ao-group"), "64")
        assert bench.recipe.precision == wb.TorchAO(group_size=64)
        assert not shown(find(bench, "wb-quant-storage"))
    assert "hqq" not in find(bench, "wb-precision").options  # it is not installed
    for name in ("wb-threshold", "wb-has-fp16-weight", "wb-quant-storage", "wb-compute-dtype", "wb-skip-list"):
        assert len(find(bench, name).tooltip) > 40


def pick(dropdown: Any, label: str) -> None:
    """As the browser does where labels and values differ."""
    send(dropdown, index=dropdown._options_labels.index(label))
