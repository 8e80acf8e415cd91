"""GPTQ folders from elsewhere: AutoGPTQ's and GPTQ-for-LLaMa's, read where they lie and as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench as wb
from workbench.gptq_packing import dequantize, pack_linear
from workbench.model import find_model

if TYPE_CHECKING:
    from collections.abc import Callable

WORKLOAD = wb.Workload(context_length=128)
REFERENCE = Path(__file__).parents[2] / "shared" / "data" / "autogptq-4bit-32g"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} is missing")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of links for folders that are gone tomorrow do not belong in anybody's cache."""
    monkeypatch.setenv("WORKBENCH_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def rounded(weight: Any, options: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Scales and zero points (out, groups), the group of each input, and the weight rounded to nearest."""
    inputs = weight.shape[1]
    size = inputs if options["group_size"] == -1 else options["group_size"]
    g_idx = torch.arange(inputs) // size
    if options.get("desc_act"):
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    top = 2 ** options["bits"] - 1
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        part = weight[:, g_idx == group]
        low, high = part.min(1).values, part.max(1).values
        if options.get("sym", True):
            high = torch.maximum(low.abs(), high)
            low = -high
        scales.append(((high - low) / top).half().float())
        middle = torch.full_like(low, (top + 1) // 2)
        zeros.append(middle if options.get("sym", True) else (-low / scales[-1]).round().clamp(1, top))
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    values = ((weight / scale[:, g_idx]).round() + zero[:, g_idx]).clamp(0, top)
    return scale, zero, g_idx, scale[:, g_idx] * (values - zero[:, g_idx])


@pytest.fixture
def old_folder(tiny_llama: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Write a folder as AutoGPTQ 0.7 does, and return it with the plain model that it stands for."""
    from transformers import AutoModelForCausalLM

    def make(basename: str | None = None, *, config: bool = True, **options: Any) -> tuple[Path, Any]:
        options = {"bits": 4, "group_size": 32, **options}
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                full = f"model.layers.{name}"
                scales, zeros, g_idx, weight = rounded(module.weight.data.float(), options)
                packed = pack_linear(weight, scales, zeros, g_idx, bits=options["bits"], layout="gptq")
                tensors |= packed.tensors(full) | {f"{full}.bias": torch.zeros(weight.shape[0], dtype=torch.float16)}
                del tensors[f"{full}.weight"]
                module.weight.data = dequantize(packed, bits=options["bits"], layout="gptq").half()
        folder = tmp_path / f"old-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama / file, folder)
        stated = json.loads((folder / "config.json").read_text())
        stated["dtype"] = "float16"
        if config:
            dead = {"is_marlin_format": False, "model_name_or_path": None, "model_file_base_name": None}
            said = {"damp_percent": 0.01, "static_groups": False, **options, **dead, "quant_method": "gptq"}
            (folder / "quantize_config.json").write_text(json.dumps(said))
            stated["quantization_config"] = said
        (folder / "config.json").write_text(json.dumps(stated))
        name = basename or f"gptq_model-{options['bits']}bit-{options['group_size']}g"
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        return folder, model

    return make


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(3, 67).reshape(2, 32)).logits.float()


def check(ref: wb.ModelRef | Path, plain: Any) -> wb.LoadReport:
    session = wb.load(wb.Recipe(model=ref if isinstance(ref, wb.ModelRef) else str(ref), workload=WORKLOAD))
    got, want = logits(session.model), logits(plain)
    report = session.load_report
    session.unload()
    assert float((got - want).norm() / want.norm()) < 0.01
    assert report.matches, report.lines
    return report


@needs_reference
def test_autogptqs_own_folder() -> None:
    """Made by AutoGPTQ 0.7.1 itself, with its own logits beside it."""
    reference = json.loads((REFERENCE / "autogptq_reference.json").read_text())
    before = sorted((p.name, p.stat().st_mtime_ns) for p in REFERENCE.iterdir())
    session = wb.load(wb.Recipe(model=str(REFERENCE), workload=WORKLOAD))
    with torch.no_grad():
        found = session.model(torch.tensor([reference["probe_ids"]])).logits[0].float()
    assert float((found[-1] - torch.tensor(reference["last_logits"])).abs().max()) < 0.05
    assert found.argmax(-1).tolist() == reference["argmax"]
    assert session.load_report.matches, session.load_report.lines
    assert "The weights are in gptq_model-4bit-32g.safetensors." in session.load_report.lines
    session.unload()
    assert sorted((p.name, p.stat().st_mtime_ns) for p in REFERENCE.iterdir()) == before


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"desc_act": True},
        {"sym": False},
        {"group_size": -1},
        {"group_size": -1, "sym": False},
        {"desc_act": True, "sym": False},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_folders_of_that_kind(old_folder: Callable[..., tuple[Path, Any]], bits: int, options: dict[str, Any]) -> None:
    folder, plain = old_folder(bits=bits, **options)
    report = check(folder, plain)
    assert any("is_marlin_format" in line for line in report.lines)


def test_nothing_but_the_tensors(old_folder: Callable[..., tuple[Path, Any]]) -> None:
    """GPTQ-for-LLaMa wrote no config: bits, groups, symmetry and act-order are seen from the tensors."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 3}, "3 bits, groups of 32, symmetric, act-order off"),
        ({"group_size": -1}, "4 bits, whole rows, symmetric, act-order off"),
        ({"sym": False, "desc_act": True}, "4 bits, groups of 32, asymmetric, act-order on"),
    ]
    for options, said in cases:
        folder, plain = old_folder("llama7b-4bit", config=False, **options)
        assert any(said in line for line in check(folder, plain).lines)


def test_from_before_act_order(old_folder: Callable[..., tuple[Path, Any]]) -> None:
    folder, plain = old_folder("llama7b", config=False)
    file = folder / "llama7b.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".g_idx")}
    save_file(tensors, file, metadata={"format": "pt"})
    check(folder, plain)


def test_several_sets_of_weights(old_folder: Callable[..., tuple[Path, Any]]) -> None:
    folder, plain = old_folder("one")
    other, other_plain = old_folder("two", bits=8)
    shutil.copy(other / "two.safetensors", folder)
    with pytest.raises(ValueError, match=r"several sets of weights; name one with .*model_basename=.*'one', 'two'"):
        find_model(str(folder))
    with pytest.raises(ValueError, match=r"has no weights named 'three'; there are: 'one', 'two'"):
        find_model(wb.ModelRef(name=str(folder), model_basename="three"))
    check(wb.ModelRef(name=str(folder), model_basename="one"), plain)
    given = {"bits": 8, "group_size": 32}
    check(wb.ModelRef(name=str(folder), model_basename="two.safetensors", quantize_config=given), other_plain)


def test_shards_under_a_name_of_their_own(old_folder: Callable[..., tuple[Path, Any]]) -> None:
    folder, plain = old_folder("shards")
    tensors = load_file(folder / "shards.safetensors")
    (folder / "shards.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:50], names[50:]), 1):
        save_file({n: tensors[n] for n in part}, folder / f"shards-{number:05d}-of-00002.safetensors")
    check(folder, plain)


def test_a_config_given_by_hand(old_folder: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, plain = old_folder("model", config=False)
    given = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    check(wb.ModelRef(name=str(folder), quantize_config=given), plain)
    file = tmp_path / "given.json"
    file.write_text(json.dumps(given))
    ref = wb.ModelRef(name=str(folder), quantize_config=str(file))
    assert ref == wb.ModelRef(name=str(folder), quantize_config=given)
    recipe = wb.Recipe(model=ref)
    assert wb.Recipe.from_json(recipe.to_json()) == recipe
    for wrong in ({"bits": 8, "group_size": 32}, {"bits": 4, "group_size": 64}):
        with pytest.raises(ValueError, match=r"but its tensors are those of 4 bits and group_size=32: correct it"):
            find_model(wb.ModelRef(name=str(folder), quantize_config=wrong))
    for bad, sentence in (
        ("{no json", "is a dict or a JSON file"),
        (7, "quantize_config is a dict"),
        ({"group_size": 3}, "at least how many bits"),
        ({"bits": 4, "quant_method": "gptq", "is_marlin_format": True}, "packed for Marlin"),
    ):
        with pytest.raises(ValueError, match=sentence):
            find_model(wb.ModelRef(name=str(folder), quantize_config=bad))


def test_pickles_are_refused_unless_allowed(old_folder: Callable[..., tuple[Path, Any]]) -> None:
    folder, plain = old_folder("llama7b-4bit-128g", config=False)
    torch.save(load_file(folder / "llama7b-4bit-128g.safetensors"), folder / "llama7b-4bit-128g.pt")
    (folder / "llama7b-4bit-128g.safetensors").unlink()
    with pytest.raises(ValueError, match=r"llama7b-4bit-128g\.pt is a pickle, which can run code while it is read"):
        find_model(str(folder))
    check(wb.ModelRef(name=str(folder), allow_pickle=True), plain)
    torch.save({"harmful": print}, folder / "llama7b-4bit-128g.pt")
    with pytest.raises(ValueError, match="holds more than tensors or is damaged"):
        find_model(wb.ModelRef(name=str(folder), allow_pickle=True))


def test_damaged_and_other_peoples_files(old_folder: Callable[..., tuple[Path, Any]], tiny_llama: Path) -> None:
    folder, _ = old_folder("cut")
    data = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:200])
    with pytest.raises(ValueError, match="damaged or cut short"):
        find_model(str(folder))
    assert find_model(str(tiny_llama)).location == str(tiny_llama.resolve())
    assert find_model(str(tiny_llama)).notes == ()


def test_a_kernel_by_name(old_folder: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = old_folder()
    precision = wb.GPTQ(backend="torch")
    session = wb.load(wb.Recipe(model=str(folder), workload=WORKLOAD, precision=precision))
    assert type(session.model.model.layers[0].mlp.up_proj).__name__ == "TorchLinear"
    session.unload()
    with pytest.raises(ValueError, match="backend='exllama_v1' cannot be used: gptqmodel has no ExLlama v1"):
        wb.load(wb.Recipe(model=str(folder), workload=WORKLOAD, precision=wb.GPTQ(backend="exllama_v1")))
