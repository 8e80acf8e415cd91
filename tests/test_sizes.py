"""Bytes: foretold from shapes, counted on models that are really loaded; the two must not differ by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import TINY_MODELS

from workbench.hardware import Device, Machine
from workbench.placement import place
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.recipe import Recipe
from workbench.sizes import device_of, measure_weights, nearest, sizes_of, smaller_precisions
from workbench.skeleton import read_skeleton
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from workbench.placement import Placement
    from workbench.precision import Precision

PRECISIONS = {
    "float32": FullPrecision(dtype="float32"),
    "bfloat16": FullPrecision(dtype="bfloat16"),
    "float16": FullPrecision(dtype="float16"),
    "int8": Int8(),
    "int8 less a layer": Int8(skip_modules=("lm_head", "model.layers.1", "transformer.h.1")),
    "nf4": FourBit(double_quant=False),
    "nf4 double": FourBit(),
    "fp4": FourBit(quant_type="fp4", double_quant=False),
}
MACHINE = Machine(
    devices=tuple(
        Device(
            id=device,
            name="RAM",
            total_bytes=2**40,
            free_bytes=2**40,
            reserved_bytes=0,
            reserved_for="",
            bandwidth_bytes_per_s=None,
            source="",
        )
        for device in ("cpu", "disk")
    )
)


def placed(folder: Path, precision: Precision, max_memory: dict[Any, Any]) -> Placement:
    recipe = Recipe(model=str(folder), precision=precision, max_memory=max_memory, workload=Workload(context_length=16))
    return place(recipe, machine=MACHINE, measure=False)


def foretold(placement: Placement) -> dict[Any, int]:
    return {device: memory.weight_bytes for device, memory in placement.memory.items() if memory.weight_bytes}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_foretold_bytes_are_those_of_the_loaded_model(
    name: str, precision: str, tiny_model: Callable[[str], Path], loaded: Callable[[str, Precision], Any]
) -> None:
    options = PRECISIONS[precision]
    if isinstance(options, Int8):
        # Only names that the model has: any other is refused.
        linear = read_skeleton(str(tiny_model(name))).linear_modules
        options = Int8(skip_modules=tuple(n for n in options.skip_modules if any(m.startswith(n) for m in linear)))

    placement = placed(tiny_model(name), options, {"cpu": "1GiB"})

    assert foretold(placement) == measure_weights(loaded(name, options))
    assert placement.total_bytes == sum(foretold(placement).values())
    assert placement.total_bytes == sum(layer.bytes_after for layer in placement.layers)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_foretold_bytes_of_a_split_between_cpu_and_disk(
    name: str, share: float, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(name)
    whole = placed(folder, FullPrecision(), {"cpu": "1GiB"}).total_bytes
    placement = placed(folder, FullPrecision(), {"cpu": int(share * whole), "disk": "1GiB"})

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=dict(placement.device_map), offload_folder=tmp_path
    )

    assert foretold(placement) == measure_weights(model)
    assert sum(foretold(placement).values()) == whole
    assert foretold(placement).get("disk", 0) > 0


@pytest.mark.parametrize("precision", [Int8(fp32_cpu_offload=True), FourBit(fp32_cpu_offload=True)])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "deepseek-v3"])
def test_foretold_bytes_of_layers_that_wait_unquantized(
    name: str, precision: Precision, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(name)
    whole = placed(folder, FullPrecision(), {"cpu": "1GiB"}).total_bytes
    placement = placed(folder, precision, {"cpu": int(0.6 * whole), "disk": "1GiB"})
    skeleton = read_skeleton(str(folder))

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map=dict(placement.device_map),
        offload_folder=tmp_path,
        quantization_config=precision.to_config(skeleton.dtype),
    )

    # Everything is on the CPU or disk, so nothing is quantized, and the preview says both.
    assert foretold(placement) == measure_weights(model)
    assert placement.total_bytes == placed(folder, FullPrecision(dtype=placement.dtype), {"cpu": "1GiB"}).total_bytes
    assert not any(layer.quantized for layer in placement.layers)


def test_sizes_of_a_tiny_llama_worked_out_by_hand(tiny_llama: Path) -> None:
    # Hidden 64, 4 heads of 16, 2 key-value heads, MLP 128, vocabulary 512, bfloat16.
    # A layer: q and o 64 * 64 each, k and v 32 * 64 each, gate, up and down 128 * 64 each, two norms of 64:
    #   2 * 4,096 + 2 * 2,048 + 3 * 8,192 + 2 * 64 = 36,992 weights of 2 bytes = 73,984.
    # In nf4 a matrix of n weights takes n / 2, 16 float32 code values, and a float32 scale for each 64 weights:
    #   q, o: 2,048 + 64 + 4 * 64 = 2,368; k, v: 1,024 + 64 + 4 * 32 = 1,216; gate, up, down: 4,096 + 64 + 512 = 4,672;
    #   2 * 2,368 + 2 * 1,216 + 3 * 4,672 + 256 (norms) = 21,440.
    # With double quantization a byte for each scale, a float32 for each 256 scales, 256 float32 code values and a
    # float32 offset in place of those scales: q, o: 2,048 + 64 + 64 + 4 + 1,024 + 4 = 3,208; k, v: 1,024 + 64 + 32 +
    #   1,032 = 2,152; gate, up, down: 4,096 + 64 + 128 + 1,032 = 5,320;
    #   2 * 3,208 + 2 * 2,152 + 3 * 5,320 + 256 = 26,936.
    # In int8 a byte each and a float32 for each row: q, o 4,096 + 256; k, v 2,048 + 128; gate, up 8,192 + 512; down
    #   8,192 + 256: 2 * 4,352 + 2 * 2,176 + 2 * 8,704 + 8,448 + 256 = 39,168.
    # Embedding and head 512 * 64 * 2 = 65,536 each, the last norm 128; the rotary embedding keeps its 8 float32
    # frequencies twice: 64.
    layer = {
        FullPrecision(): 73_984,
        FourBit(double_quant=False): 21_440,
        FourBit(): 26_936,
        Int8(): 39_168,
        FullPrecision(dtype="float32"): 147_968,
    }
    for precision, layer_bytes in layer.items():
        placement = placed(tiny_llama, precision, {"cpu": "1GiB"})
        wide = 2 if placement.dtype == "float32" else 1
        assert [(each.name, each.bytes_before, each.bytes_after, each.quantized) for each in placement.layers] == [
            ("model.embed_tokens", 65_536, wide * 65_536, False),
            ("model.layers.0", 73_984, layer_bytes, not isinstance(precision, FullPrecision)),
            ("model.layers.1", 73_984, layer_bytes, not isinstance(precision, FullPrecision)),
            ("model.norm", 128, wide * 128, False),
            ("model.rotary_emb", 64, 64, False),
            ("lm_head", 65_536, wide * 65_536, False),
        ]
        assert placement.total_bytes == 2 * layer_bytes + wide * (2 * 65_536 + 128) + 64


def test_measured_bytes_are_those_of_every_tensor(loaded: Callable[[str, Precision], Any]) -> None:
    model = loaded("llama-tied", FourBit())
    # By hand, over what torch shows and what bitsandbytes documents of its state; the tied head is the embedding.
    expected = model.get_input_embeddings().weight.numel() * 2
    expected += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    matrices = 0
    for name, parameter in model.model.layers.named_parameters():
        expected += parameter.numel() * parameter.element_size()
        if name.endswith("_proj.weight"):
            state = parameter.quant_state
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            expected += sum(part.numel() * part.element_size() for part in parts)
            matrices += 1
    expected += model.model.norm.weight.numel() * 2

    assert matrices == 4 * 7
    assert measure_weights(model) == {"cpu": expected}
    # Without the state that bitsandbytes keeps beside the weights, which transformers' own figure leaves out.
    assert model.get_memory_footprint() < expected


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in ("deepseek-v3", "ernie-moe", "gpt-oss")])
def test_smaller_precisions_take_what_they_would_take(name: str, tiny_model: Callable[[str], Path]) -> None:
    skeleton = read_skeleton(str(tiny_model(name)))

    offered = smaller_precisions(skeleton, FullPrecision())

    assert offered == [
        (precision, sum(t.after_bytes for t in sizes_of(skeleton, precision).tensors))
        for precision in (Int8(), FourBit())
    ]
    assert smaller_precisions(skeleton, Int8()) == offered[1:]
    assert smaller_precisions(skeleton, FourBit(quant_type="fp4")) == []


def test_parts_of_a_block_add_up_to_it(tiny_llama: Path) -> None:
    sizes = sizes_of(read_skeleton(str(tiny_llama)), Int8())
    block = sizes.blocks["model.layers.0"]
    parts = sizes.parts_of("model.layers.0")

    assert {part.name for part in parts} >= {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.input_layernorm.weight",
    }
    for total in ("before_bytes", "parameter_bytes", "kept_bytes", "buffer_bytes"):
        assert sum(getattr(part, total) for part in parts) == getattr(block, total)


def test_names_are_found_in_maps_as_accelerate_finds_them() -> None:
    device_map = {"model.layers.1": 0, "model.layers.10": 1, "model": "cpu"}

    assert device_of("model.layers.1.mlp.weight", device_map) == 0
    assert device_of("model.layers.10.mlp.weight", device_map) == 1
    assert device_of("model.layers.11.mlp.weight", device_map) == "cpu"
    assert device_of("lm_head.weight", device_map) is None
    assert device_of("lm_head.weight", {"": "disk"}) == "disk"
    assert nearest("model.layers.1", device_map) == "model.layers.1"
