"""What is known of a model from its config: the tree, its order, what is tied, what stays whole."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import transformers

from workbench.model import ModelRef
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.skeleton import _Turn, read_skeleton, turn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workbench.precision import Precision


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}), encoding="utf-8")


def test_a_tiny_llama(tiny_llama: Path) -> None:
    skeleton = read_skeleton(str(tiny_llama))

    assert skeleton.architecture == "LlamaForCausalLM"
    assert skeleton.model_type == "llama"
    assert skeleton.dtype == "bfloat16"
    assert skeleton.parameter_count == 139_584  # counted by hand in conftest.py
    assert skeleton.layer_count == 2
    assert skeleton.context_length == 2048
    assert skeleton.no_split_classes == {"LlamaDecoderLayer"}
    assert skeleton.tied == {}
    assert skeleton.has_weights
    assert [(block.name, block.class_name) for block in skeleton.blocks] == [
        ("model.embed_tokens", "Embedding"),
        ("model.layers.0", "LlamaDecoderLayer"),
        ("model.layers.1", "LlamaDecoderLayer"),
        ("model.norm", "LlamaRMSNorm"),
        ("model.rotary_emb", "LlamaRotaryEmbedding"),
        ("lm_head", "Linear"),
    ]
    assert skeleton.decoder_blocks == ("model.layers.0", "model.layers.1")
    assert skeleton.linear_modules == (
        *(
            f"model.layers.{index}.{part}"
            for index in (0, 1)
            for part in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            )
        ),
        "lm_head",
    )
    assert skeleton.default_skips == ("lm_head",)


def test_gpt2_has_conv1d_learned_positions_and_a_tied_head(
    tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    skeleton = read_skeleton(str(tiny_model("gpt2")))

    assert [block.name for block in skeleton.blocks] == [
        "transformer.wte",
        "transformer.wpe",
        *(f"transformer.h.{index}" for index in range(3)),
        "transformer.ln_f",
        "lm_head",
    ]
    assert skeleton.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "transformer.h.0.attn.c_attn" in skeleton.linear_modules
    assert skeleton.context_length == 512
    assert skeleton.parameter_count == loaded("gpt2", FullPrecision()).num_parameters()


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "falcon", "deepseek-v3", "qwen3-moe", "lfm2"])
def test_counts_are_those_of_the_loaded_model(
    name: str, tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    skeleton, model = read_skeleton(str(tiny_model(name))), loaded(name, FullPrecision())

    assert skeleton.parameter_count == model.num_parameters()
    assert skeleton.dtype == str(model.dtype).removeprefix("torch.")
    assert skeleton.architecture == type(model).__name__
    assert len(skeleton.decoder_blocks) == skeleton.layer_count == model.config.num_hidden_layers
    assert skeleton.no_split_classes == set(model._no_split_modules)
    # Every tensor is in one block and no other.
    blocks = [block.name for block in skeleton.blocks]
    for tensor in (n for named in (model.named_parameters(), model.named_buffers()) for n, _ in named):
        assert sum(tensor.startswith(f"{block}.") or tensor == block for block in blocks) == 1, tensor


def test_falcon_has_no_module_that_bitsandbytes_would_replace(tiny_model: Callable[[str], Path]) -> None:
    skeleton = read_skeleton(str(tiny_model("falcon")))
    # Its head is a plain Linear, but tied and therefore skipped.
    assert set(skeleton.linear_modules) == set(skeleton.default_skips) == {"lm_head"}


@pytest.mark.parametrize("precision", [FullPrecision(), FullPrecision(dtype="float16"), Int8(), FourBit()])
@pytest.mark.parametrize("name", ["llama", "gpt2", "granitemoehybrid"])
def test_a_meta_model_has_the_tensors_that_a_load_fills(
    name: str, precision: Precision, tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    meta = read_skeleton(str(tiny_model(name))).meta_model(precision)
    model = loaded(name, precision)

    assert all(tensor.is_meta for tensor in (*meta.module.parameters(), *meta.module.buffers()))
    assert [(n, type(m).__name__) for n, m in meta.module.named_modules()] == [
        (n, type(m).__name__) for n, m in model.named_modules()
    ]
    assert meta.dtype == str(model.dtype).removeprefix("torch.")
    assert (meta.quantizer is None) == isinstance(precision, FullPrecision)
    assert not meta.module.training


def test_the_config_and_torch_are_left_as_they_were(tiny_llama: Path) -> None:
    import torch

    skeleton = read_skeleton(str(tiny_llama))
    before = skeleton.config.to_dict()

    for precision in (FullPrecision(dtype="float16"), Int8(), FourBit(quant_type="fp4")):
        skeleton.meta_model(precision)

    assert skeleton.config.to_dict() == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1).device.type == "cpu"


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_skeleton_is_kept_while_its_files_do_not_change(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    first = read_skeleton(str(folder))
    assert read_skeleton(ModelRef(name=str(folder))) is first
    assert first.meta_model(Int8()) is first.meta_model(Int8())

    change_config(folder, num_hidden_layers=1)
    os.utime(folder / "config.json", ns=(0, 0))  # a file system's clock may be too coarse to tell the two apart

    assert read_skeleton(str(folder)).layer_count == 1


def test_few_variants_are_kept_and_the_used_ones_stay(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    skeleton = read_skeleton(str(folder))
    used = skeleton.meta_model(FullPrecision())

    for step in range(20):  # as when the threshold's slider is dragged
        skeleton.meta_model(Int8(threshold=float(step)))
        assert skeleton.meta_model(FullPrecision()) is used

    assert len(skeleton._variants) <= 8


# --- dtype="auto" -----------------------------------------------------------------------------------------------------


def test_a_config_without_dtype_has_that_of_its_first_floating_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    change_config(folder, dtype=..., torch_dtype=...)

    assert read_skeleton(str(folder)).dtype == "bfloat16"
    assert str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype) == "torch.bfloat16"


@pytest.mark.parametrize("weights", [None, b"garbage"])
def test_without_dtype_and_readable_weights_it_is_float32(
    weights: bytes | None, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    change_config(tmp_path, dtype=..., torch_dtype=...)
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)

    skeleton = read_skeleton(str(tmp_path))

    assert skeleton.dtype == "float32"
    assert skeleton.has_weights == (weights is not None)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_skeleton(str(folder))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_config_of_no_language_model(tmp_path: Path) -> None:
    transformers.ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    sentence = refused(tmp_path)
    assert sentence.startswith(f"{tmp_path.name} is of type 'vit', which is no causal language model: Workbench loads ")


def test_a_model_that_is_already_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    skeleton = read_skeleton(str(tmp_path))
    assert skeleton.quantized_as == "GPTQ 4-bit, groups of 128"
    assert skeleton.parameter_count == 139_584


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": -1}, {"num_hidden_layers": "many"}, {"vocab_size": None}, {"hidden_act": "no such thing"}],
)
def test_a_config_that_contradicts_itself(changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    change_config(tmp_path, **changes)
    sentence = refused(tmp_path)
    assert sentence.startswith(
        (
            f"The config of {tmp_path.name} describes no LlamaForCausalLM that can be built: ",
            f"The config.json of {tmp_path.name} cannot be used: ",
        )
    )


# --- whose turn it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_building_waits_for_a_pause_and_work_waits_for_the_build(times: int) -> None:
    order = []
    working, asked = threading.Event(), threading.Event()

    def build() -> None:
        working.wait(30)
        asked.set()
        with turn.build():
            order.append("built")

    builder = threading.Thread(target=build)
    builder.start()
    with ExitStack() as held:
        for _ in range(times):
            held.enter_context(turn.work())
        working.set()
        assert asked.wait(30)
        order.append("worked")
        while "built" not in order and builder.is_alive():
            turn.pause()  # returns at once until the builder has really asked, and only after it is done from then on
        order.append("worked again")
    builder.join(30)

    assert order == ["worked", "built", "worked again"]


def test_work_does_not_wait_for_a_build_that_was_interrupted() -> None:
    class Interrupted:
        def acquire(self) -> None:
            raise KeyboardInterrupt

    mine = _Turn()
    mine._lock = Interrupted()
    with pytest.raises(KeyboardInterrupt), mine.build():
        pass
    assert mine._waiting == 0


def test_nobody_builds_while_work_does_not_pause(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    built = threading.Event()

    def build() -> None:
        read_skeleton(str(tmp_path))
        built.set()

    builder = threading.Thread(target=build)
    with turn.work():
        builder.start()
        assert not built.wait(0.5)
    assert built.wait(30)
    builder.join(30)


def test_building_inside_of_work_needs_no_pause(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with turn.work():
        assert read_skeleton(str(tmp_path)).layer_count == 2
        turn.pause()  # nobody waits, so it comes back at once
