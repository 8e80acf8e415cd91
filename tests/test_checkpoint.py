"""Checkpoints that are quantized already are recognised, previewed with their real sizes, and loaded as they are."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from architectures import save_model
from hub_server import HubServer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import workbench as wb
from workbench.checkpoint import describe, not_loadable_because, owner_of, stored_tensors
from workbench.first_forward import bytes_once_run
from workbench.model import ModelFile, find_model
from workbench.sizes import measure_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SHORT = wb.Workload(context_length=16)
BITSANDBYTES = {
    "nf4, double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8, skips": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "down_proj"]),
}


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    yield
    gc.collect()


def recipe(folder: Path | str, **choices: Any) -> wb.Recipe:
    return wb.Recipe(**{"model": str(folder), "max_memory": {"cpu": "4GiB"}, "workload": SHORT, **choices})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_checkpoints(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=BITSANDBYTES[name], device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, tmp_path)
    expected = model(torch.arange(8)[None]).logits

    skeleton = wb.read_skeleton(str(tmp_path))
    assert skeleton.quantized_as is not None
    assert skeleton.quantized_as.startswith("bitsandbytes ")
    assert skeleton.parameter_count == wb.read_skeleton(str(tiny_llama)).parameter_count
    placement = wb.place(recipe(tmp_path))
    assert placement.kv_cache_bytes == wb.place(recipe(tiny_llama)).kv_cache_bytes
    session = wb.load(recipe(tmp_path))
    assert session.load_report.matches, session.load_report.lines
    assert session.load_report.measured_bytes == {"cpu": placement.total_bytes}
    assert torch.equal(session.model(torch.arange(8)[None]).logits, expected)
    session.unload()
    for other in (wb.Int8(), wb.FourBit(), wb.GPTQ()):
        with pytest.raises(ValueError, match=r"is quantized already \(bitsandbytes .*pick full precision, which keeps"):
            wb.place(recipe(tmp_path, precision=other))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_bitsandbytes_has_packed_stays_packed_whatever_is_stated(
    bits: int, tiny_llama: Path, tmp_path: Path
) -> None:
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=options, device_map={"": "cpu"}, dtype="auto"
    )
    model.save_pretrained(tmp_path)
    expected = wb.place(recipe(tmp_path)).total_bytes
    # transformers would take the packed weights of modules on the CPU for unquantized ones.
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
    (tmp_path / "config.json").write_text(json.dumps(config, indent=1))
    session = wb.load(recipe(tmp_path))
    assert session.load_report.matches, session.load_report.lines
    assert session.load_report.measured_bytes == {"cpu": expected}
    session.unload()
    split = recipe(tmp_path, max_memory={"cpu": 6 * expected // 10, "disk": "1GiB"})
    assert "would wait on disk, where bitsandbytes keeps nothing that is quantized already" in wb.place(split).summary


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder made by AutoGPTQ 0.7.1 is not beside this checkout")
@pytest.mark.parametrize("share", [2.0, 0.75, 0.5])
def test_a_gptq_checkpoint_and_its_maps(share: float, tmp_path: Path) -> None:
    folder = SHARED / "autogptq-4bit-32g"
    skeleton = wb.read_skeleton(str(folder))
    assert skeleton.quantized_as == "GPTQ 4-bit, groups of 32"
    whole = wb.place(recipe(folder)).total_bytes
    budgets: dict[Any, Any] = {"cpu": int(share * whole), "disk": "1GiB"}
    asked = recipe(folder, max_memory=budgets)
    placement = wb.place(asked)
    session = wb.load(asked)
    assert session.load_report.matches, session.load_report.lines
    assert session.load_report.measured_bytes == {
        d: m.weight_bytes for d, m in placement.memory.items() if m.weight_bytes
    }
    session.unload()
    model = AutoModelForCausalLM.from_pretrained(
        skeleton.source.location, device_map="auto", max_memory=budgets, offload_folder=str(tmp_path)
    )
    assert getattr(model, "hf_device_map", {"": "cpu"}) == placement.device_map
    assert measure_weights(model) == session.load_report.measured_bytes


def test_gptq_is_previewed_before_it_is_made(tiny_llama: Path) -> None:
    # In a layer, by hand: 64 x 64 (q, o), 32 x 64 (k, v), 128 x 64 (gate, up), 64 x 128 (down), in 4 bits and groups of
    # 32: qweight, qzeros, scales and g_idx of each, and a table of 8 int32 that the kernel makes for each module.
    def packed(rows: int, columns: int) -> int:
        groups = columns // 32
        return rows * columns // 2 + groups * rows // 2 + 2 * groups * rows + 4 * columns + 32

    layer = 2 * packed(64, 64) + 2 * packed(32, 64) + 2 * packed(128, 64) + packed(64, 128)
    rest = 2 * (2 * 512 * 64 + 2 * 2 * 64 + 64)  # embedding, head, norms, in bfloat16
    rotary = 2 * 4 * 8  # two tables of 8 float32
    placement = wb.place(recipe(tiny_llama, precision=wb.GPTQ(group_size=32)))
    assert placement.total_bytes == 2 * layer + rest + rotary
    assert {layer.name: layer.quantized for layer in placement.layers}["model.layers.0"]
    with pytest.raises(ValueError, match=r"group_size=128 does not divide the 64 inputs of model.layers.0.self_attn"):
        wb.place(recipe(tiny_llama, precision=wb.GPTQ()))
    with pytest.raises(ValueError, match=r"quantize it first with workbench.quantize"):
        wb.load(recipe(tiny_llama, precision=wb.GPTQ(group_size=32)))


# --- other methods ----------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, "fp8"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, "AWQ 4-bit, groups of 32"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors, pack-quantized",
    ),
}


def save_packed(method: str, original: Path, folder: Path) -> int:
    """A model with its layers' matrices in another method's tensors, of the right names and types.

    Returns:
        The bytes of all tensors.
    """
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, weight in load_file(original / "model.safetensors").items():
        owner, rows, columns = name.removesuffix(".weight"), *(weight.shape if weight.dim() == 2 else (0, 0))
        if method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape
            tensors[f"{name}_blocks"] = torch.zeros(experts, rows, columns // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 127, dtype=torch.uint8)
        elif ".layers." not in name or weight.dim() != 2 or "norm" in name or ".gate.weight" in name:
            tensors[name] = weight
        elif method == "fp8":
            tensors[name] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
            tensors[f"{owner}.weight_scale_inv"] = torch.zeros(-(-rows // 32), -(-columns // 32))
        elif method == "awq":
            tensors[f"{owner}.qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
            tensors[f"{owner}.qzeros"] = torch.zeros(columns // 32, rows // 8, dtype=torch.int32)
            tensors[f"{owner}.scales"] = torch.zeros(columns // 32, rows, dtype=torch.float16)
        elif method == "compressed-tensors":
            tensors[f"{owner}.weight_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
            tensors[f"{owner}.weight_scale"] = torch.zeros(rows, columns // 32, dtype=torch.bfloat16)
            tensors[f"{owner}.weight_shape"] = torch.tensor([rows, columns])
        else:
            tensors[name] = weight
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    stated = OTHERS[method][0] if method in OTHERS else {"quant_method": method, "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (original / file).is_file():
            shutil.copy(original / file, folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def check_load_and_maps(folder: Path) -> wb.Session:
    """Loaded bytes are the previewed ones, on one device and on two, and the map of two is transformers'."""
    session = wb.load(recipe(folder))
    assert session.load_report.matches, session.load_report.lines
    budgets: dict[Any, Any] = {"cpu": 6 * session.placement.total_bytes // 10, "disk": "1GiB"}
    asked = recipe(folder, max_memory=budgets)
    split = wb.load(asked)
    assert split.load_report.matches, split.load_report.lines
    assert split.load_report.measured_bytes["disk"]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", max_memory=budgets, offload_folder=str(folder.parent / "offload")
    )
    assert model.hf_device_map == split.placement.device_map
    assert measure_weights(model) == split.load_report.measured_bytes
    split.unload()
    return session


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "model_type"), [("fp8", "llama"), ("fp8", "deepseek_v3"), ("mxfp4", "gpt_oss")])
def test_what_runs_on_gpus_alone_is_unpacked_on_the_cpu(method: str, model_type: str, tmp_path: Path) -> None:
    save_model(model_type, tmp_path / "original")
    in_files = save_packed(method, tmp_path / "original", tmp_path / "packed")
    folder = tmp_path / "packed"
    session = check_load_and_maps(folder)
    assert f"unpacked to bfloat16 while they are loaded: {method} runs on GPUs only" in session.placement.summary
    assert session.placement.total_bytes == wb.place(recipe(tmp_path / "original")).total_bytes
    session.model(torch.arange(8)[None])
    assert bytes_once_run(session.placement, session.skeleton) == measure_weights(session.model)
    session.unload()
    assert wb.place(recipe(folder, precision=wb.FullPrecision(dtype="float32"))).dtype == "float32"
    # On a GPU that has the kernels they stay as they are in the files; beside them, the buffers that no file holds.
    box = wb.Machine.preset("H100 80 GB")
    placement = wb.place(recipe(folder, max_memory=None), machine=box)
    skeleton = wb.read_skeleton(str(folder))
    module = skeleton.plain_model().module
    saved = module.state_dict().keys()
    unsaved = sum(b.numel() * b.element_size() for name, b in module.named_buffers() if name not in saved)
    upcast = 2 * 3 * 4 if model_type == "deepseek_v3" else 0  # biases of the routers, kept in float32
    assert placement.total_bytes == in_files + unsaved + upcast
    assert {layer.quantized for layer in placement.layers if "Decoder" in layer.class_name} == {True}
    with pytest.raises(ValueError, match="dtype='auto' keeps it as it is, float32 would not"):
        wb.place(recipe(folder, max_memory=None, precision=wb.FullPrecision(dtype="float32")), machine=box)


def test_old_gpus_have_no_fp8(tiny_llama: Path, tmp_path: Path) -> None:
    in_files = save_packed("fp8", tiny_llama, tmp_path)
    for name, packed in (("Colab T4", False), ("RTX 3090", False), ("A100 80 GB", False), ("L4", True)):
        placement = wb.place(recipe(tmp_path, max_memory=None), machine=wb.Machine.preset(name))
        assert (placement.total_bytes == in_files + 64) == packed
        assert ("is too old for fp8" in placement.summary) != packed


@pytest.mark.filterwarnings("ignore")
def test_awq_is_loaded_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    in_files = save_packed("awq", tiny_llama, tmp_path)
    session = check_load_and_maps(tmp_path)
    assert session.skeleton.quantized_as == "AWQ 4-bit, groups of 32"
    assert session.placement.total_bytes == in_files + 64
    layers = {layer.name: layer for layer in session.placement.layers}
    assert layers["model.layers.0"].quantized
    assert layers["model.layers.0"].bytes_after < layers["model.layers.0"].bytes_before == 73_984
    assert not layers["lm_head"].quantized
    assert isinstance(session.generate("Hello", max_new_tokens=2), str)
    assert bytes_once_run(session.placement, session.skeleton) == measure_weights(session.model)
    session.unload()
    with pytest.raises(ValueError, match=r"is quantized already \(AWQ"):
        wb.place(recipe(tmp_path, precision=wb.FourBit()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_is_previewed_by_its_files(name: str, tmp_path: Path) -> None:
    import torchao.quantization

    save_model("llama", tmp_path / "original")
    options = transformers.TorchAoConfig(getattr(torchao.quantization, name)())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=options, device_map={"": "cpu"}, dtype="auto"
    )
    model.save_pretrained(tmp_path / "packed")
    session = wb.load(recipe(tmp_path / "packed"))
    assert session.skeleton.quantized_as == "torchao"
    assert session.load_report.matches, session.load_report.lines
    assert "Sizes are those of its files (torchao)" in session.placement.summary
    assert session.placement.total_bytes < wb.place(recipe(tmp_path / "original")).total_bytes
    session.model(torch.arange(8)[None])
    assert bytes_once_run(session.placement, session.skeleton) == measure_weights(session.model)
    session.unload()


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is not None,
    reason="compressed-tensors is installed, and this is about a method whose library is not",
)
def test_a_method_whose_library_is_not_here(tiny_llama: Path, tmp_path: Path) -> None:
    in_files = save_packed("compressed-tensors", tiny_llama, tmp_path)
    skeleton = wb.read_skeleton(str(tmp_path))
    assert skeleton.quantized_as == "compressed-tensors, pack-quantized"
    placement = wb.place(recipe(tmp_path))
    assert placement.total_bytes == in_files + 64  # the buffers that no file holds
    assert "Sizes are those of its files (compressed-tensors, pack-quantized), an estimate" in placement.summary
    assert placement.verdict == "does_not_fit"
    assert re.match(r"Does not fit: it cannot be loaded here: .*compressed.tensors", placement.summary)
    layers = {layer.name: layer for layer in placement.layers}
    assert layers["model.layers.0"].quantized
    assert layers["model.layers.0"].bytes_after < layers["model.layers.0"].bytes_before == 73_984
    assert not layers["lm_head"].quantized
    # By hand: unpacked at the first forward, beside a bfloat16 scale for 32 weights and two int64 for each matrix.
    scales = 2 * (2 * (2 * 4096 + 2 * 2048 + 3 * 8192) // 32 + 2 * 7 * 8)
    assert bytes_once_run(placement, skeleton) == {"cpu": 279_168 + 64 + scales}
    with pytest.raises(
        ValueError, match=r"is quantized \(compressed-tensors, pack-quantized\), and this machine cannot"
    ):
        wb.load(recipe(tmp_path))
    assert wb.predict_speed(placement, skeleton) is None
    assert wb.predict_load_seconds(placement, skeleton) is None
    # The map follows the packed sizes: both layers together are smaller than one would be in bfloat16.
    packed = 2 * layers["model.layers.0"].bytes_after
    box = wb.Machine.preset("Kaggle 2x T4")
    budgets = {0: placement.total_bytes + 1000, "cpu": "4GiB"}
    assert packed < 73_984
    elsewhere = wb.place(recipe(tmp_path, max_memory=budgets, strategy="packed"), machine=box)
    assert set(elsewhere.device_map.values()) == {0}
    assert elsewhere.verdict == "fits"
    with pytest.raises(ValueError, match="is quantized already"):
        wb.place(recipe(tmp_path, precision=wb.FourBit()))


@pytest.mark.parametrize(("method", "words"), [("fbgemm_fp8", "GPU"), ("something-new", "something-new")])
def test_why_it_cannot_be_loaded_is_said_in_the_librarys_words(method: str, words: str, tiny_llama: Path) -> None:
    reason = not_loadable_because({"quant_method": method})
    assert reason is not None
    assert words in reason
    assert wb.read_skeleton(str(tiny_llama)).not_loadable_because is None


def test_over_the_hub_only_headers_travel(tiny_llama: Path, tmp_path: Path) -> None:
    in_files = save_packed("compressed-tensors", tiny_llama, tmp_path / "model")
    code = (
        "import json, workbench as wb\n"
        "recipe = wb.Recipe(model='org/packed', max_memory={'cpu': '4GiB'}, workload=wb.Workload(context_length=16))\n"
        "placement = wb.place(recipe)\n"
        "print(json.dumps([placement.total_bytes, placement.summary]))"
    )
    with HubServer(repos={"org/packed": tmp_path / "model"}) as hub:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=hub.env(tmp_path / "cache"),
            capture_output=True,
            text=True,
            check=True,
        )
        total, summary = json.loads(done.stdout.splitlines()[-1])
        header = int.from_bytes((tmp_path / "model" / "model.safetensors").read_bytes()[:8], "little")
        asked = [r for r in hub.requests if r.path.endswith(".safetensors") and r.sent_bytes]
        assert asked
        assert all(request.range is not None for request in asked)
        assert hub.sent_bytes(".safetensors") <= max(2 * (header + 8), 250_000)
    assert total == in_files + 64
    assert "compressed-tensors" in summary


def test_a_quantized_config_without_weights_says_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ValueError, match=r"is quantized \(HQQ\)\. .* has no safetensors files whose headers"):
        wb.place(recipe(tmp_path))


@pytest.mark.parametrize(
    "shards", [("model.safetensors",), ("model-00001-of-00001.safetensors",), ("other.safetensors",)]
)
def test_headers_give_every_tensor(shards: tuple[str, ...], tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    (tmp_path / "original").mkdir()
    beside = () if "other.safetensors" in shards else ("consolidated.safetensors",)
    for name in (*shards, *beside, "original/model-00001-of-00001.safetensors"):
        shutil.copy(tiny_llama / "model.safetensors", tmp_path / name)
    source = find_model(str(tiny_llama))
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")]
    files = tuple(ModelFile(name=name, size_bytes=1) for name in names)
    found = stored_tensors(dataclasses.replace(source, location=str(tmp_path), files=files))
    assert sum(tensor.size_bytes for tensor in found) == 279_168
    assert {tensor.dtype for tensor in found} == {"BF16"}
    assert sum(tensor.elements for tensor in found) == 139_584


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, "GPTQ 3-bit, whole rows"),
        ({"quant_method": "fbgemm_fp8"}, "fp8 (FBGEMM)"),
        ({"quant_method": "something-new", "bits": 5}, "something-new 5-bit"),
    ],
)
def test_in_words(options: dict[str, Any], words: str) -> None:
    assert describe(options) == words


def test_owners() -> None:
    assert owner_of("model.layers.0.mlp.up_proj.weight_scale_inv") == "model.layers.0.mlp.up_proj"
    assert owner_of("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4") == "model.layers.0.mlp.up_proj"
    assert owner_of("model.layers.0.mlp.up_proj.qweight") == "model.layers.0.mlp.up_proj"
    assert owner_of("model.norm.weight") == "model.norm"


def test_the_panel_takes_it_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    from played_page import find, wait_for

    save_packed("fp8", tiny_llama, tmp_path)
    bench = wb.Workbench(recipe(tiny_llama, precision=wb.FourBit()))
    try:
        wait_for(lambda: bench._state.settle(60))
        bench._state.update(model=wb.ModelRef(name=str(tmp_path)))
        wait_for(lambda: bench._state.settle(60))
        assert bench.recipe.precision == wb.FullPrecision()
        assert "quantized already (fp8): it is taken as it is" in bench._state.problems["precision"]
        assert "fp8" in find(bench, "wb-stored").value
        assert find(bench, "wb-method").layout.display == "none"
        assert bench.placement is not None
        assert bench.placement.recipe.model.name == str(tmp_path)
    finally:
        bench.close()
