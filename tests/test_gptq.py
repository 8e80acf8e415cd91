"""Quantize: what is in the folder, that it loads as what was computed, and that nothing half-done is ever left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import workbench as wb
from workbench.gptq_packing import dequantize, packed_linear

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = wb.CalibrationText(samples=8, sequence_length=64)
WORKLOAD = wb.Workload(context_length=128)


def recipe(model: Path, **options: Any) -> wb.Recipe:
    return wb.Recipe(model=str(model), workload=WORKLOAD, precision=wb.GPTQ(**{"group_size": 32, **options}))


def quantize(model: Path, output: Path, *, options: dict[str, Any] | None = None, **more: Any) -> wb.QuantizeReport:
    return wb.quantize(recipe(model, **(options or {})), output, **{"calibration": TEXT, "batch_size": 3, **more})


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plain_model(original: Path, quantized: Path) -> Any:
    """The original with the plain weights that the packed tensors stand for: what every kernel has to come near."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    tensors: dict[str, Any] = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    options = json.loads((quantized / "config.json").read_text())["quantization_config"]
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        weight = dequantize(packed_linear(tensors, name), bits=options["bits"], layout=options["checkpoint_format"])
        module = model.get_submodule(name)
        module.weight.data = weight.t().contiguous() if isinstance(module, Conv1D) else weight.contiguous()
    return model


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 67).reshape(2, 32)).logits.float()


@pytest.fixture(scope="module")
def with_tokenizer(tiny_model: Callable[[str], Path], tiny_llama: Path, tmp_path_factory: Any) -> Callable[[str], Path]:
    """Give the models of tiny_models.py the tokenizer of the tiny Llama; their vocabularies have the same size."""

    def make(name: str) -> Path:
        folder: Path = tmp_path_factory.mktemp("with-tokenizer") / name
        shutil.copytree(tiny_model(name), folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama / file, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, wb.QuantizeReport, list[Any]]:
    steps: list[Any] = []
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    report = quantize(tiny_llama, folder, progress=steps.append, max_shard_size="100KB")
    return folder, report, steps


def test_what_is_in_the_folder(done: tuple[Path, wb.QuantizeReport, list[Any]], tiny_llama: Path) -> None:
    folder, report, _ = done
    names = left_in(folder)
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "quantize_config.json"} <= set(
        names
    )
    assert {"README.md", "quantize_report.json", "recipe.json", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert left_in(folder.parent) == ["tiny"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["checkpoint_format"]) == (4, 32, "gptq")
    assert config["block_name_to_quantize"] == "model.layers"
    assert "modules_in_block_to_quantize" not in config
    assert wb.Recipe.from_json((folder / "recipe.json").read_text()) == recipe(tiny_llama)
    saved = json.loads((folder / "quantize_report.json").read_text())
    assert saved["perplexity_after"] == report.perplexity_after
    card = (folder / "README.md").read_text()
    for said in ("license: apache-2.0", "gptq", "8 x 64 tokens", f"{report.perplexity_after:.3f}"):
        assert said in card


def test_the_report(done: tuple[Path, wb.QuantizeReport, list[Any]]) -> None:
    folder, report, _ = done
    assert len(report.modules) == 14
    assert {m.shape for m in report.modules} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert all(0 < m.error < 0.3 for m in report.modules)
    assert all(m.tokens == 8 * 64 for m in report.modules)
    assert report.before_bytes == 279_168
    # By hand, for each of two layers: 4 bits, float16 scales and 4-bit zero points for groups of 32, 4 bytes of group
    # index for each input. q, o: 64x64; k, v: 32x64; gate, up: 128x64; down: 64x128. Left as they are: two times
    # 512x64 for embedding and head, and 5 norms of 64, in bfloat16.
    layer = sum(
        rows * columns // 2 + columns // 32 * (2 * rows + rows // 2) + 4 * columns
        for rows, columns in [(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64)] * 2 + [(64, 128)]
    )
    assert report.after_bytes == 2 * layer + 2 * (2 * 512 * 64 + 5 * 64)
    assert [m.name for m in report.worst(2)] == sorted(
        (m.name for m in report.worst(2)), key=lambda n: -next(m.error for m in report.modules if m.name == n)
    )
    series = report.layer_errors()
    assert set(series) == {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert all(len(errors) == 2 for errors in series.values())
    assert report.perplexity_before is not None
    assert any("of held-back text" in line for line in report.lines)
    assert str(folder) == report.folder


def test_the_plan_foretells_the_size(done: tuple[Path, wb.QuantizeReport, list[Any]], tiny_llama: Path) -> None:
    plan = wb.plan_quantization(recipe(tiny_llama), calibration=TEXT, batch_size=3)
    assert plan.output_bytes == done[1].after_bytes
    assert plan.module_count == 14
    assert plan.verdict == "fits"
    hidden = 8 * 64 * 64 * 2  # sequences, tokens, width, bfloat16
    assert plan.hidden_bytes == hidden
    kept = 8 * 64 * (2 * 64 + 2 * 32 + 2 * 128 + 64) * 2 + 2 * hidden  # outputs of a layer's seven modules, two norms
    assert plan.kept_bytes == kept
    # Everything but down has 64 inputs: q, k, v, o, gate and up have 448 outputs. One Hessian for 128 inputs at most,
    # three more squares and six copies of the weights in float32.
    rounding = 4 * 128**2 + max(4 * (3 * 64**2 + 6 * 448 * 64), 4 * (3 * 128**2 + 6 * 64 * 128))
    logits = 512 * 512 * 10  # tokens, vocabulary; of a forward pass to measure with
    memory = plan.memory["cpu"]
    assert memory.weight_bytes == 279_168 + 2 * 8 * 4  # and two buffers of rotary frequencies
    assert memory.work_bytes == max(2 * hidden + rounding, logits) + kept
    assert plan.summary in [step.text for step in done[2]]


def test_progress(done: tuple[Path, wb.QuantizeReport, list[Any]]) -> None:
    _, report, steps = done
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages[0] == "plan"
    assert stages[-3:] == ["quantize", "measure", "save"] or stages[-2:] == ["quantize", "save"]
    modules = [step for step in steps if getattr(step, "module", None)]
    assert [step.module for step in modules] == [m.name for m in report.modules]
    assert [step.done for step in modules] == list(range(1, 15))
    assert {step.total for step in modules} == {14}
    assert modules[-1].seconds_left == 0
    assert all(step.error > 0 and step.module in step.text for step in modules)


def test_it_loads_as_what_was_computed(done: tuple[Path, wb.QuantizeReport, list[Any]], tiny_llama: Path) -> None:
    folder, *_ = done
    session = wb.load(wb.Recipe(model=str(folder), workload=WORKLOAD))
    got, want = logits(session.model), logits(plain_model(tiny_llama, folder))
    assert float((got - want).norm() / want.norm()) < 0.01
    assert session.load_report.matches, session.load_report.lines
    assert any(line.startswith("Kernel: ") for line in session.load_report.lines)
    assert session.generate("Hello", max_new_tokens=3)
    session.unload()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"bits": 8}),  # weights the other way round, biases, positional arguments
        ("llama-tied", {"group_size": -1, "bits": 3, "sym": False, "skip_modules": ("mlp",)}),
        ("gemma3", {"desc_act": True, "sym": False}),  # two kinds of layer with masks of their own
        ("deepseek-v3", {"true_sequential": False, "format": "gptq_v2", "skip_modules": ("kv_a_proj_with_mqa",)}),
        ("qwen3-moe", {}),
        ("mistral", {"bits": 2, "sym": False}),
    ],
)
def test_architectures(
    name: str, options: dict[str, Any], with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    original = with_tokenizer(name)
    report = quantize(original, tmp_path / "out", options=options, evaluation=None)
    assert report.modules
    session = wb.load(wb.Recipe(model=str(tmp_path / "out"), workload=WORKLOAD))
    got, want = logits(session.model), logits(plain_model(original, tmp_path / "out"))
    session.unload()
    assert float((got - want).norm() / want.norm()) < 0.02
    assert not any("pass" in line and "whole model" in line for line in report.lines)


def test_gptq_is_better_than_rounding(with_tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    """The point of it all: the output error is smaller than that of rounding each weight to the nearest value."""
    import torch
    from transformers import AutoModelForCausalLM

    original = with_tokenizer("llama")
    report = quantize(original, tmp_path / "out", options={"bits": 3}, evaluation=None)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    first = report.modules[0]
    weight = model.get_submodule(first.name).weight.data
    groups = weight.reshape(weight.shape[0], -1, 32)
    scale = 2 * groups.abs().amax(-1, keepdim=True) / 7
    nearest = ((groups / scale).round().clamp(-4, 3) * scale).reshape(weight.shape)
    x = torch.randn(512, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rounding = float((x @ (nearest - weight).t()).norm() / (x @ weight.t()).norm())
    assert first.error < rounding


def test_skipped_modules_stay(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    report = quantize(
        tiny_llama, tmp_path / "out", options={"skip_modules": ("layers.1.mlp", "v_proj")}, evaluation=None
    )
    assert len(report.modules) == 14 - 3 - 2
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        names = set(file.keys())
    assert {"model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight"} <= names
    assert "model.layers.0.mlp.up_proj.qweight" in names
    assert any("5 modules were left alone" in line for line in report.lines)
    session = wb.load(wb.Recipe(model=str(tmp_path / "out"), workload=WORKLOAD))
    want = logits(plain_model(tiny_llama, tmp_path / "out"))
    assert float((logits(session.model) - want).norm() / want.norm()) < 0.01
    session.unload()


# --- nothing half-done ------------------------------------------------------------------------------------------------


def test_cancel_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    modules: list[str] = []

    def watch(step: Any) -> None:
        if getattr(step, "module", None):
            modules.append(step.module)
            if len(modules) == 3:
                cancel.set()

    with pytest.raises(wb.Cancelled):
        quantize(tiny_llama, tmp_path / "out", progress=watch, cancel=cancel)
    assert len(modules) <= 3 + 2  # query, key and value are rounded together
    assert left_in(tmp_path) == []


def test_an_error_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    def fail(step: Any) -> None:
        if step.stage == "save":
            raise RuntimeError("the panel has gone")

    with pytest.raises(RuntimeError, match="the panel has gone"):
        quantize(tiny_llama, tmp_path / "out", progress=fail)
    assert left_in(tmp_path) == []


KILLED = """
import os, signal, sys
import workbench as wb

def watch(step):
    if (getattr(step, "module", None) or "").startswith("model.layers.1."):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = wb.Recipe(model=sys.argv[1], precision=wb.GPTQ(group_size=32), workload=wb.Workload(context_length=128))
text = wb.CalibrationText(samples=8, sequence_length=64)
wb.quantize(recipe, sys.argv[2], calibration=text, batch_size=3, progress=watch)
"""


def test_a_killed_run_goes_on(
    done: tuple[Path, wb.QuantizeReport, list[Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tiny_llama), str(out)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    assert not out.exists()
    assert {".out.quantizing"} <= set(left_in(tmp_path))
    shutil.copytree(tmp_path / ".out.quantizing", tmp_path / "spare")

    steps: list[Any] = []
    report = quantize(tiny_llama, out, progress=steps.append)
    assert report.resumed_layers == 1
    said = "An interrupted run had finished 1 layers: it was continued."
    assert said in report.lines
    assert said in [step.text for step in steps]
    assert [m.name for m in report.modules] == [m.name for m in done[1].modules]
    assert report.perplexity_after == pytest.approx(done[1].perplexity_after, rel=1e-6)
    assert report.after_bytes == done[1].after_bytes

    # The same remains, other choices: nothing of them is used.
    (tmp_path / "spare").rename(tmp_path / ".out.quantizing")
    other = quantize(tiny_llama, out, options={"bits": 8}, overwrite=True, evaluation=None)
    assert other.resumed_layers == 0
    assert "An interrupted run with other choices was found: this one started afresh." in other.lines
    assert left_in(tmp_path) == ["out"]


def test_nothing_is_overwritten_unasked(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out exists: name a new folder, or say overwrite=True"):
        quantize(tiny_llama, out)
    quantize(tiny_llama, out, overwrite=True, evaluation=None)
    assert "mine.txt" not in left_in(out)
    assert left_in(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="is the model itself"):
        wb.quantize(recipe(tiny_llama), tiny_llama, overwrite=True)
    with pytest.raises(ValueError, match="holds the model itself"):
        wb.quantize(recipe(tiny_llama), tiny_llama.parent, overwrite=True)


def test_disk_full_in_mid_save(tiny_llama: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill(step: Any) -> None:
        if step.stage == "save" and not filler.exists():
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(b"x" * (free - 100_000))

    with pytest.raises(ValueError, match=r"The disk with .* is full; nothing was left there: make room"):
        quantize(tiny_llama, small_disk / "out", progress=fill)
    assert left_in(small_disk) == ["filler"]
    with pytest.raises(ValueError, match=r"needs up to .* of disk space .* are free"):
        quantize(tiny_llama, small_disk / "out")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_size": 128}, r"group_size=128 does not divide the 64 inputs of model\.layers\.0\.self_attn\.q_proj: "),
        ({"skip_modules": ("nothing",)}, "has no module 'nothing' to skip; its layers have down_proj"),
        ({"skip_modules": ("self_attn", "mlp")}, "nothing is left to quantize"),
    ],
)
def test_choices_against_the_shapes(tiny_llama: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        quantize(tiny_llama, tmp_path / "out", options=options)
    assert left_in(tmp_path) == []


def test_odd_shapes(with_tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlp\.gate_proj has 200 outputs, which is no multiple of 32"):
        quantize(with_tokenizer("llama-tied"), tmp_path / "out")


def test_models_that_cannot_be_quantized(
    done: tuple[Path, wb.QuantizeReport, list[Any]], with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is already quantized"):
        quantize(done[0], tmp_path / "out")
    with pytest.raises(ValueError, match="GPTQ finds nothing to quantize in falcon"):
        quantize(with_tokenizer("falcon"), tmp_path / "out")
    image = tmp_path / "vit"
    image.mkdir()
    (image / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(ValueError, match="no causal language model"):
        quantize(image, tmp_path / "out")


def test_other_bad_input(tiny_llama: Path, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"needs a recipe with precision=GPTQ\(\.\.\.\), not int8"):
        wb.quantize(wb.Recipe(model=str(tiny_llama), precision=wb.Int8()), tmp_path / "out")
    with pytest.raises(ValueError, match=r"Adapters are not quantized with their model: .*with_\(adapters=\(\)\)"):
        wb.quantize(recipe(tiny_llama).with_(adapters=("french",)), tmp_path / "out")
    with pytest.raises(ValueError, match="came without a tokenizer, and calibration text has to be tokenized"):
        quantize(tiny_model("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="shorter than one sequence of 64 tokens"):
        quantize(tiny_llama, tmp_path / "out", calibration=wb.CalibrationText(source=["x"], sequence_length=64))
    with pytest.raises(ValueError, match="batch_size is a whole number"):
        quantize(tiny_llama, tmp_path / "out", batch_size=0)
    with pytest.raises(TypeError, match="quantize has no option 'samples'"):
        quantize(tiny_llama, tmp_path / "out", samples=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        quantize(tiny_llama, tmp_path / "file")
    with pytest.raises(ValueError, match=r"quantize it first with workbench\.quantize"):
        wb.load(recipe(tiny_llama))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 5}, "bits is one of 2, 3, 4, 8, not 5"),
        ({"bits": True}, "bits is a whole number"),
        ({"group_size": 48}, "group_size is 32, 64, 128 or -1"),
        ({"damp_percent": 1}, "damp_percent is a number between 0 and 1"),
        ({"format": "marlin"}, "format is one of 'gptq', 'gptq_v2'"),
        ({"sym": "yes"}, "sym is True or False"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wb.GPTQ(**options)


# --- models that are spread, or strange -------------------------------------------------------------------------------


def test_weights_that_accelerate_keeps_elsewhere(tiny_llama: Path, tmp_path: Path) -> None:
    """Layers whose modules have only shapes: their weights are taken from, and put back, where accelerate has them."""
    import torch
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    from workbench.gptq_folder import gathered_state
    from workbench.gptq_layers import Layers, quantizable_modules
    from workbench.kernels import import_gptqmodel

    import_gptqmodel()
    precision = wb.GPTQ(group_size=32)
    skeleton = wb.read_skeleton(str(tiny_llama))
    targets = quantizable_modules(skeleton, precision)
    batches = [torch.arange(3, 67).reshape(2, 32)]
    results = []
    for offloaded in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        if offloaded:
            for layer in model.model.layers:
                cpu_offload(layer, execution_device=torch.device("cpu"))
            assert model.model.layers[0].mlp.up_proj.weight.is_meta
        layers = Layers(
            model=model, names=skeleton.decoder_blocks, targets=targets, batches=batches, precision=precision
        )
        layers.start()
        assert not layers.whole
        packed = []
        for index in range(2):
            packed += list(layers.quantize(index))
            layers.advance(index)
        results.append((packed, logits(model), gathered_state(model)))
    for one, two in zip(results[0][0], results[1][0], strict=True):
        assert one.name == two.name
        assert torch.equal(one.packed.qweight, two.packed.qweight)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2].keys() == results[1][2].keys()
    assert all(torch.equal(tensor, results[1][2][name]) for name, tensor in results[0][2].items())


def test_layers_that_hand_more_on_than_hidden_states(tiny_llama: Path) -> None:
    """A model that changes what goes from layer to layer: each stage runs all of it."""
    import torch
    from transformers import AutoModelForCausalLM

    from workbench.gptq_layers import Layers, quantizable_modules
    from workbench.kernels import import_gptqmodel

    import_gptqmodel()
    precision = wb.GPTQ(group_size=32)
    skeleton = wb.read_skeleton(str(tiny_llama))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))
    layers = Layers(
        model=model,
        names=skeleton.decoder_blocks,
        targets=quantizable_modules(skeleton, precision),
        batches=[torch.arange(3, 67).reshape(2, 32)],
        precision=precision,
    )
    layers.start()
    assert layers.whole
    before = logits(model)
    done = []
    for index in range(2):
        done += list(layers.quantize(index))
        layers.advance(index)
    assert len(done) == 14
    assert all(0 < module.error < 0.3 for module in done)
    assert float((logits(model) - before).norm() / before.norm()) < 0.3


def counted(forward: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return forward(*args, **kwargs)

    return run


def test_what_is_kept_changes_nothing(tiny_llama: Path) -> None:
    """Outputs that are kept for later passes, or computed again each time: the same bits, and the modules as before."""
    import torch
    from transformers import AutoModelForCausalLM

    from workbench.gptq_layers import Layers, quantizable_modules
    from workbench.kernels import import_gptqmodel

    import_gptqmodel()
    precision = wb.GPTQ(group_size=32)
    skeleton = wb.read_skeleton(str(tiny_llama))
    results, calls = [], []
    for kept_bytes in (1 << 30, 0):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        attention = model.model.layers[0].self_attn
        count: list[int] = []
        for module in (attention.o_proj, model.model.layers[0].input_layernorm):
            module.forward = counted(module.forward, count)
        layers = Layers(
            model=model,
            names=skeleton.decoder_blocks,
            targets=quantizable_modules(skeleton, precision),
            batches=[torch.arange(3, 67).reshape(2, 32), torch.arange(67, 131).reshape(2, 32)],
            precision=precision,
            kept_bytes=kept_bytes,
        )
        layers.start()
        results.append([])
        for index in range(2):
            results[-1] += list(layers.quantize(index))
            layers.advance(index)
        calls.append(len(count))
        assert "forward" not in vars(attention)
        assert "forward" in vars(attention.o_proj)  # ours of this test
    assert calls[0] < calls[1]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.packed.qweight, two.packed.qweight)
        assert torch.equal(one.packed.scales, two.packed.scales)
