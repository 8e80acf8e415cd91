"""The panels without a browser: messages are played to the widgets as a page would send them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import pytest
from ipywidgets.widgets import widget as widget_module
from played_page import choose, click, find, send, wait_for

import workbench as wb
from workbench.first_forward import bytes_once_run, repacks_4bit
from workbench.panels import state as state_module
from workbench.panels.devices import slider_step
from workbench.panels.look import count, whole_tree
from workbench.panels.model import model_facts
from workbench.panels.precision import name_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GIB = 2**30


def device(name: int | str, total_bytes: int) -> wb.Device:
    return wb.Device(
        id=name,
        name=f"Memory <{name}>",
        total_bytes=total_bytes,
        free_bytes=total_bytes,
        reserved_bytes=0,
        reserved_for="nothing",
        bandwidth_bytes_per_s=None,
        source="made up",
    )


BOX = wb.Machine(name="box", devices=(device(0, 16 * GIB), device("cpu", 24 * GIB), device("disk", 200 * GIB)))


def error_in(bench: wb.Workbench, panel: str) -> str:
    return str(bench._state.problems.get(panel, ""))


@pytest.fixture
def bench(tiny_llama: Path) -> Iterator[wb.Workbench]:
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama)), BOX)
    wait_for(lambda: made._preview.chart is not None and made._state.settle(60))
    yield made
    made.close()


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Each call of place() by the panels but those for advice is noted, by whether it was asked to measure."""
    calls: list[bool] = []
    real = state_module.place

    def noted(*args: Any, **options: Any) -> wb.Placement:
        if not options["advice"]:
            calls.append(options["measure"])
        return real(*args, **options)

    monkeypatch.setattr(state_module, "place", noted)
    return calls


def bigger_model(folder: Path, **changes: Any) -> Path:
    """A Llama of a gigabyte or so that is nothing but its config."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_workbench_is_there_before_any_heavy_library() -> None:
    code = """
import sys, threading, time
threading.Thread.start = lambda thread: None  # what goes on in the background comes after
began = time.perf_counter()
import workbench as wb
bench = wb.Workbench()
print(time.perf_counter() - began, [name for name in ("torch", "transformers", "plotly") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 2


def test_what_is_given_is_placed_and_shown(bench: wb.Workbench, tiny_llama: Path) -> None:
    assert bench.recipe.model == wb.ModelRef(name=str(tiny_llama))
    assert bench.machine is BOX
    placement = bench.placement
    assert placement is not None
    assert placement.verdict == "fits"
    assert placement.kv_cache_bytes is not None
    assert "Fits" in find(bench, "wb-verdict").value
    assert find(bench, "wb-model").value == str(tiny_llama)
    # Seven linear modules in each of two layers, and the head; nothing is skipped unless it is said.
    assert list(bench._precision.chips) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    ]
    facts = find(bench, "wb-model-facts").value
    assert all(fact in facts for fact in ("140k parameters", "2 layers", "bfloat16", "context 2,048", "apache-2.0"))


def test_when_all_is_known_the_load_is_estimated_and_so_is_what_comes_after_it(tiny_llama: Path) -> None:
    here = wb.Machine(name="This machine", devices=(device("cpu", 24 * GIB),))
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama), precision=wb.FourBit()), here)
    assert made._state.settle(60)
    told = find(made, "wb-doing").value
    assert "Loads in about" in told
    assert made.placement is not None
    assert made._state.skeleton is not None
    once = bytes_once_run(made.placement, made._state.skeleton)
    assert once is not None
    assert (f"{once['cpu']:,} bytes" in told) == ("once they have run" in told) == repacks_4bit()
    send(find(made, "wb-memory-cpu"), value=0.0)  # no room for anything: nothing to load
    assert made._state.settle(60)
    assert "Loads in about" not in find(made, "wb-doing").value
    made.close()


def test_every_control_has_a_label_and_a_tooltip(bench: wb.Workbench) -> None:
    kinds = (w.Button, w.Text, w.Textarea, w.Dropdown, w.Checkbox, w.FloatSlider, w.IntText, w.FloatText, w.FileUpload)
    controls = {part for part in whole_tree(bench) if isinstance(part, kinds)}
    assert len(controls) > 30
    assert [control for control in controls if not control.description or not control.tooltip] == []
    rows = {part for part in whole_tree(bench) if isinstance(part, w.ToggleButtons)}
    assert [row for row in rows if not row.description or not row.tooltips] == []


def test_a_slider_is_one_change_one_recompute_and_one_redrawing(bench: wb.Workbench, placed: list[bool]) -> None:
    seen: list[Any] = []
    bench._state.observe(seen.append, "placement")
    send(find(bench, "wb-memory-cuda-0"), value=2.5)
    assert dict(bench.recipe.max_memory or {}) == {0: "2.5GiB", "cpu": 24 * GIB}
    assert bench.placement is not None
    assert bench.placement.memory[0].limit_bytes == 5 * GIB // 2
    assert find(bench, "wb-memory-text-cuda-0").value == "2.5 GiB"
    assert find(bench, "wb-memory-text-cpu").value == "24.0 GiB"
    notes = "".join(part.value for part in whole_tree(bench._devices._rows_box) if isinstance(part, w.HTML))
    assert "2,684,354,560 bytes may be used" in notes
    assert "Memory &lt;disk&gt;" in notes
    assert placed == [False]
    assert len([change for change in seen if change["new"].advice is None]) == 1


def test_what_a_text_box_takes_moves_the_slider_and_nothing_goes_back_and_forth(
    bench: wb.Workbench, placed: list[bool]
) -> None:
    slider, text = find(bench, "wb-memory-cuda-0"), find(bench, "wb-memory-text-cuda-0")
    send(text, value=" 10.03 gib")
    assert dict(bench.recipe.max_memory or {})[0] == "10.03gib"
    assert slider.value == pytest.approx(10.05)  # its own resolution
    send(slider, value=10.05)  # the browser says what it was told
    assert dict(bench.recipe.max_memory or {})[0] == "10.03gib"
    assert placed == [False]
    send(text, value="10GB")
    assert bench.placement is not None
    assert bench.placement.memory[0].limit_bytes == 10**10
    send(text, value="100TB")  # more than there is: the slider stands at its end, and says nothing else
    assert slider.value == slider.max == 16.0
    assert bench.placement.memory[0].limit_bytes == 10**14
    assert placed == [False] * 3


def test_a_recipe_set_from_a_cell_moves_every_control_with_one_recompute(
    bench: wb.Workbench, tiny_llama: Path, placed: list[bool]
) -> None:
    recipe = wb.Recipe(
        model=str(tiny_llama),
        precision=wb.Int8(threshold=3.5, skip_modules=("lm_head", "model.layers.0"), fp32_cpu_offload=True),
        strategy="sequential",
        max_memory={0: "1GiB", "disk": "7GiB"},
        workload=wb.Workload(context_length=512, batch_size=3),
    )
    bench.recipe = recipe
    assert bench.recipe == recipe
    assert bench.placement is not None
    assert bench.placement.recipe == recipe
    assert placed == [False]
    shown = {
        name: find(bench, name).value
        for name in (
            *(
                "wb-precision",
                "wb-threshold",
                "wb-fp32-offload",
                "wb-skip-text",
                "wb-strategy",
                "wb-context",
                "wb-batch",
            ),
            *(
                "wb-use-cuda-0",
                "wb-use-cpu",
                "wb-use-disk",
                "wb-memory-cuda-0",
                "wb-memory-text-disk",
                "wb-memory-text-cpu",
            ),
        )
    }
    assert shown == {
        "wb-precision": "int8",
        "wb-threshold": 3.5,
        "wb-fp32-offload": True,
        "wb-skip-text": "model.layers.0",
        "wb-strategy": "sequential",
        "wb-context": 512,
        "wb-batch": 3,
        "wb-use-cuda-0": True,
        "wb-use-cpu": False,
        "wb-use-disk": True,
        "wb-memory-cuda-0": 1.0,
        "wb-memory-text-disk": "7 GiB",
        "wb-memory-text-cpu": "",
    }
    assert [name for name, chip in bench._precision.chips.items() if chip.value] == ["lm_head"]
    assert find(bench, "wb-memory-cpu").disabled
    for precision, name in ((wb.GPTQ(group_size=16), "wb-group-size"), (wb.TorchAO(group_size=-1), "wb-ao-group")):
        bench.recipe = recipe.with_(precision=precision)  # more than people are offered
        assert bench.recipe.precision == precision
        assert find(bench, name).value == precision.group_size


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda model: wb.Recipe(model=model, max_memory={3: "1GiB"}), "no cuda:3"),
        (lambda model: wb.Recipe(model=model, workload=wb.Workload(context_length=10**6)), "context"),
        (lambda model: wb.Recipe(model=f"{model}/missing"), "missing"),
        (lambda _: {"model": "demo"}, "wb.Recipe"),
    ],
)
def test_a_bad_recipe_raises_one_sentence_and_changes_nothing(
    bench: wb.Workbench, tiny_llama: Path, bad: Callable[[str], Any], says: str
) -> None:
    before = bench.recipe, bench.placement, find(bench, "wb-model").value
    with pytest.raises(ValueError, match=says):
        bench.recipe = bad(str(tiny_llama))
    assert (bench.recipe, bench.placement, find(bench, "wb-model").value) == before


def test_bad_input_is_put_back_with_a_sentence_and_the_next_good_one_takes_it_away(bench: wb.Workbench) -> None:
    text = find(bench, "wb-memory-text-cpu")
    for bad, says in (("lots", "'lots' is no size"), ("-3GiB", "negative"), ("  ", "Type how much")):
        send(text, value=bad)
        assert says in error_in(bench, "devices")
        assert text.value == "24.0 GiB"
        assert bench.recipe.max_memory is None
    send(text, value="3GiB")
    assert error_in(bench, "devices") == ""
    assert dict(bench.recipe.max_memory or {})["cpu"] == "3GiB"


def test_a_device_can_be_left_out_but_not_the_last(bench: wb.Workbench) -> None:
    send(find(bench, "wb-use-cuda-0"), value=False)
    assert dict(bench.recipe.max_memory or {}) == {"cpu": 24 * GIB}
    send(find(bench, "wb-use-cpu"), value=False)
    assert "at least one device" in error_in(bench, "devices")
    assert find(bench, "wb-use-cpu").value is True
    send(find(bench, "wb-use-disk"), value=True)
    assert dict(bench.recipe.max_memory or {}) == {"cpu": 24 * GIB, "disk": 200 * GIB}
    click(find(bench, "wb-reset"))
    assert bench.recipe.max_memory is None
    assert [find(bench, f"wb-use-{name}").value for name in ("cuda-0", "cpu", "disk")] == [True, True, False]


def test_another_machine_brings_its_own_rows_and_leaves_nothing_behind(bench: wb.Workbench) -> None:
    send(find(bench, "wb-memory-cuda-0"), value=2.5)
    choose(find(bench, "wb-machine"), "2x RTX 4090")
    assert list(bench._devices.rows) == ["cuda:0", "cuda:1", "cpu", "disk"]
    assert bench.recipe.max_memory is None
    assert bench.placement is not None
    assert list(bench.placement.memory) == [0, 1, "cpu"]
    alive = len(widget_module._instances)
    for name in ("8x A100 80 GB", "16 GB laptop", "2x RTX 4090"):
        choose(find(bench, "wb-machine"), name)
    assert len(widget_module._instances) == alive
    bench.machine = BOX
    assert find(bench, "wb-machine").value == "box"
    with pytest.raises(ValueError, match="cuda:1"):
        bench._state.update(max_memory={1: "1GiB"})
    with pytest.raises(ValueError, match=r"wb\.Machine"):
        bench.machine = "16 GB laptop"  # type: ignore[assignment]


def test_only_the_chosen_methods_options_are_shown_and_they_are_remembered(bench: wb.Workbench) -> None:
    def shown() -> set[str]:
        names = ("wb-dtype", "wb-threshold", "wb-double-quant", "wb-compute-dtype", "wb-fp32-offload")
        return {name for name in names if find(bench, name).layout.display != "none"}

    method = find(bench, "wb-precision")
    assert shown() == {"wb-dtype"}
    choose(method, "int8")
    assert shown() == {"wb-threshold", "wb-fp32-offload"}
    send(find(bench, "wb-threshold"), value=2.0)
    choose(method, "nf4")
    assert shown() == {"wb-double-quant", "wb-compute-dtype", "wb-fp32-offload"}
    choose(find(bench, "wb-compute-dtype"), "float32")
    send(find(bench, "wb-double-quant"), value=False)
    assert bench.recipe.precision == wb.FourBit(quant_type="nf4", double_quant=False, compute_dtype="float32")
    choose(method, "fp4")
    assert bench.recipe.precision == wb.FourBit(quant_type="fp4")
    choose(method, "int8")
    assert bench.recipe.precision == wb.Int8(threshold=2.0)
    assert bench.placement is not None
    assert bench.placement.recipe == bench.recipe


def test_a_new_model_s_context_is_kept_within_what_it_allows(bench: wb.Workbench, tmp_path: Path) -> None:
    short = bigger_model(tmp_path / "short", max_position_embeddings=1024)
    send(find(bench, "wb-model"), value=str(short))
    wait_for(lambda: bench.recipe.workload.context_length == 1024)
    assert bench.placement is not None
    assert bench.recipe.model.name == bench.placement.recipe.model.name == str(short)
    assert find(bench, "wb-context").value == 1024
    assert error_in(bench, "workload") == "short allows 1,024 tokens: the context was lowered from 2,048."


def test_the_first_skipped_module_adds_to_the_usual_ones(bench: wb.Workbench) -> None:
    """transformers would replace its own choice by it, and quantize the head."""
    choose(find(bench, "wb-precision"), "int8")
    send(bench._precision.chips["q_proj"], value=True)
    assert bench.recipe.precision == wb.Int8(skip_modules=("lm_head", "q_proj"))
    assert [name for name, chip in bench._precision.chips.items() if chip.value] == ["q_proj", "lm_head"]
    send(bench._precision.chips["lm_head"], value=False)
    assert bench.recipe.precision == wb.Int8(skip_modules=("q_proj",))
    assert "lm_head is quantized too" in bench._precision._skip_note.value


def test_skip_modules_by_button_and_by_name(bench: wb.Workbench) -> None:
    choose(find(bench, "wb-precision"), "int8")
    send(bench._precision.chips["lm_head"], value=True)
    send(bench._precision.chips["q_proj"], value=True)
    send(find(bench, "wb-skip-text"), value="model.layers.0, model.layers.1.mlp.up_proj")
    chosen = ("lm_head", "q_proj", "model.layers.0", "model.layers.1.mlp.up_proj")
    assert bench.recipe.precision == wb.Int8(skip_modules=chosen)
    send(bench._precision.chips["q_proj"], value=False)
    assert bench.recipe.precision == wb.Int8(skip_modules=("lm_head", *chosen[2:]))
    placement = bench.placement
    assert placement is not None
    assert [layer.quantized for layer in placement.layers if layer.name.startswith("model.layers")] == [False, True]

    send(find(bench, "wb-skip-text"), value="no_such_module")
    wait_for(lambda: "no_such_module" in error_in(bench, "preview"))
    bench._state.settle()
    assert bench.recipe.precision == wb.Int8(skip_modules=("lm_head", *chosen[2:]))
    assert find(bench, "wb-skip-text").value == "model.layers.0, model.layers.1.mlp.up_proj"


def test_module_names_are_grouped_by_what_they_end_in() -> None:
    names = ["a.0.q_proj", "a.0.mlp.0", "a.1.q_proj", "a.1.mlp.0", "lm_head"]
    assert name_groups(names) == {"q_proj": 2, "mlp.0": 2, "lm_head": 1}


def test_a_context_past_the_models_own_is_put_back(bench: wb.Workbench) -> None:
    context = find(bench, "wb-context")
    send(context, value=2049)
    assert "2,048" in error_in(bench, "workload")
    assert context.value == 2048
    send(find(bench, "wb-batch"), value=0)
    assert "batch_size" in error_in(bench, "workload")
    before = bench.placement
    send(find(bench, "wb-batch"), value=4)
    assert before is not None
    assert bench.placement is not None
    assert bench.placement.kv_cache_bytes == 4 * (before.kv_cache_bytes or 0) > 0
    assert error_in(bench, "workload") == ""


def test_custom_keeps_the_map_as_it_was(bench: wb.Workbench) -> None:
    before = bench.placement
    assert before is not None
    choose(find(bench, "wb-strategy"), "custom")
    assert bench.recipe.strategy == "custom"
    assert dict(bench.recipe.device_map or {}) == before.device_map
    choose(find(bench, "wb-strategy"), "sequential")
    assert (bench.recipe.strategy, bench.recipe.device_map) == ("sequential", None)


def test_a_model_that_is_not_there_is_refused_with_its_name_left_to_be_mended(
    bench: wb.Workbench, tiny_llama: Path, tmp_path: Path
) -> None:
    name, good = find(bench, "wb-model"), bench.placement
    send(name, value=str(tmp_path / "nothing"))
    wait_for(lambda: "nothing" in error_in(bench, "model"))
    bench._state.settle()
    assert name.value == str(tmp_path / "nothing")
    assert (bench.recipe.model.name, bench.placement) == (str(tiny_llama), good)
    send(find(bench, "wb-memory-cuda-0"), value=2.5)
    assert bench.placement is not None
    assert bench.placement.memory[0].limit_bytes == 5 * GIB // 2
    send(name, value=str(tiny_llama))
    assert error_in(bench, "model") == ""


def test_a_picked_model_is_read_in_the_background_and_older_wishes_are_forgotten(
    bench: wb.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, asked, real = threading.Event(), [], state_module.read_skeleton

    def held(ref: wb.ModelRef) -> wb.Skeleton:
        asked.append(Path(ref.name).name)
        assert go.wait(60)
        return real(ref)

    monkeypatch.setattr(state_module, "read_skeleton", held)
    first, second, third = (bigger_model(tmp_path / name) for name in ("first", "second", "third"))
    name = find(bench, "wb-model")
    send(name, value=str(first))
    wait_for(lambda: asked == ["first"])
    assert "first" in bench._state.doing
    assert not bench._state.is_current
    send(name, value=str(second))
    send(name, value=str(third))
    send(find(bench, "wb-memory-cuda-0"), value=0.5)  # nothing waits meanwhile
    assert Path(bench.recipe.model.name) == third
    go.set()
    placement = bench.placement
    assert asked == ["first", "third"]
    assert placement is not None
    assert placement.recipe == bench.recipe
    assert len(placement.layers) >= 18
    assert {layer.device for layer in placement.layers} == {0, "cpu"}
    assert "no weight files" in find(bench, "wb-model-facts").value
    assert find(bench, "wb-model").options[-1] == str(third)


def test_callbacks_on_many_threads_leave_controls_and_recipe_agreeing(bench: wb.Workbench) -> None:
    def drag(where: str) -> None:
        for step in range(1, 16):
            send(find(bench, where), value=step / 2)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(drag, ["wb-memory-cuda-0", "wb-memory-cpu", "wb-memory-cuda-0"]))
    assert bench._state.problems in ({}, dict.fromkeys(bench._state.problems, ""))
    budgets = bench._state.budgets()
    assert find(bench, "wb-memory-cuda-0").value * GIB == budgets[0]
    assert find(bench, "wb-memory-cpu").value * GIB == budgets["cpu"] == 15 * GIB // 2
    assert bench.placement is not None
    assert bench.placement.recipe == bench.recipe


def test_knobs_are_in_the_advanced_part(bench: wb.Workbench) -> None:
    assert find(bench, "wb-advanced").selected_index is None
    send(find(bench, "wb-fallback"), value=True)
    send(find(bench, "wb-offload-buffers"), value=True)
    send(find(bench, "wb-offload-folder"), value="somewhere")
    send(find(bench, "wb-no-split"), value="LlamaAttention, LlamaMLP")
    recipe = bench.recipe
    assert recipe.fallback_allocation
    assert recipe.offload_buffers
    assert recipe.offload_folder == "somewhere"
    assert recipe.no_split_module_classes == ("LlamaAttention", "LlamaMLP")
    bench.recipe = wb.Recipe(model=recipe.model)
    assert [find(bench, f"wb-{name}").value for name in ("fallback", "offload-folder", "no-split")] == [False, "", ""]


def test_advice_comes_when_a_slider_rests_and_its_button_follows_it(bench: wb.Workbench) -> None:
    bench.recipe = bench.recipe.with_(max_memory={0: 100_000})
    assert bench._state.settle(60)
    assert bench.placement is not None
    assert bench.placement.verdict == "does_not_fit"
    advice = bench.placement.advice
    assert advice
    row = next(index for index, sentence in enumerate(advice) if sentence.startswith("Raise cuda:0"))
    button = bench._preview.advice.buttons[row]
    assert button.tooltip == f"Do it: {advice[row]}"
    click(button)
    assert bench._state.settle(60)
    assert bench.placement.verdict == "fits"
    assert bench.recipe == advice[row].apply(bench.recipe)
    assert all(button.layout.display == "none" for button in bench._preview.advice._rows[1:])


def test_an_error_in_a_callback_is_seen_and_the_next_move_works(
    bench: wb.Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench._preview.chart is not None
    with monkeypatch.context() as broken:
        broken.setattr(bench._preview.hands, "touch", None)
        send(find(bench, "wb-memory-cuda-0"), value=2.5)
        assert error_in(bench, "devices").startswith("Something went wrong here (AttributeError: ")
    send(find(bench, "wb-memory-cuda-0"), value=3.5)
    assert error_in(bench, "devices") == ""
    assert bench.placement is not None
    assert bench.placement.memory[0].limit_bytes == 7 * GIB // 2


def test_error_sentences_are_text_and_no_html(bench: wb.Workbench) -> None:
    send(find(bench, "wb-memory-text-cpu"), value="<b>lots</b>")
    lines = [part for part in whole_tree(bench) if "wb-error" in getattr(part, "_dom_classes", ())]
    shown = [line.value for line in lines if line.layout.display != "none"]
    assert len(shown) == 1
    assert "&lt;b&gt;lots&lt;/b&gt;" in shown[0]


def test_the_page_tells_theme_and_width_and_the_one_figure_follows(bench: wb.Workbench) -> None:
    assert bench._preview.chart is not None
    figure = bench._preview.chart.figure
    send(find(bench, "wb-page"), dark=True, width_px=432)
    state = figure.get_state()
    assert state["_widget_layout"]["width"] == find(bench, "wb-touch").picture["width"] == 432
    assert state["_widget_layout"]["font"]["color"] == "#d9d9d9"
    assert find(bench, "wb-chart").children == (figure, find(bench, "wb-touch"))
    assert find(bench, "wb-chart").layout.height == f"{state['_widget_layout']['height']}px"


def test_without_plotly_the_plain_picture_stays_and_says_why(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama)), BOX)
    try:
        assert made.placement is not None
        made._preview._maker.join()
        assert "plotly" in made._preview._why_plain.value.lower()
        plain, _ = find(made, "wb-chart").children
        assert plain.value.count('class="wb-plain-bar"') == 2
        send(find(made, "wb-use-disk"), value=True)
        assert plain.value.count('class="wb-plain-bar"') == 3
    finally:
        made.close()


def test_a_first_model_that_cannot_be_placed_leaves_the_workbench_usable(tiny_llama: Path) -> None:
    made = wb.Workbench(wb.Recipe(model="/no/such/folder"), BOX)
    try:
        assert made.placement is None
        assert "/no/such/folder" in error_in(made, "model")
        send(find(made, "wb-model"), value=str(tiny_llama))
        assert made.placement is not None
    finally:
        made.close()
    with pytest.raises(ValueError, match=r"wb\.Recipe"):
        wb.Workbench("demo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Valid options: recipe, machine"):
        wb.Workbench(model="demo")  # type: ignore[call-arg]


def test_closing_takes_every_widget_and_thread_along(tiny_llama: Path) -> None:
    widgets, threads = set(widget_module._instances), set(threading.enumerate())
    made = wb.Workbench(wb.Recipe(model=str(tiny_llama), precision=wb.Int8()), BOX)
    wait_for(lambda: made._preview.chart is not None)
    assert made.placement is not None
    choose(find(made, "wb-machine"), "2x RTX 4090")
    assert len(widget_module._instances) > len(widgets) + 100
    made.close()
    made.close()
    assert set(widget_module._instances) == widgets
    assert [
        t.name
        for t in set(threading.enumerate()) - threads
        if t.name.startswith("workbench-") and "torch" not in t.name
    ] == []


def test_closing_before_the_background_is_done_leaves_nothing_either(tiny_llama: Path) -> None:
    widgets = set(widget_module._instances)
    wb.Workbench(wb.Recipe(model=str(tiny_llama)), BOX).close()
    assert set(widget_module._instances) == widgets


def test_facts_and_numbers() -> None:
    assert [count(n) for n in (7, 1_500, 134_515_008, 7_241_732_096, 671_026_419_200)] == [
        "7",
        "1.5k",
        "135M",
        "7.24B",
        "671B",
    ]
    assert [slider_step(gib * GIB) for gib in (1, 24, 80, 500, 2000)] == [0.05, 0.05, 0.1, 0.5, 1.0]


def test_facts_of_a_model_are_escaped(tmp_path: Path) -> None:
    folder = bigger_model(tmp_path / "<img src=x>")
    assert "<img" not in model_facts(wb.read_skeleton(str(folder)))
