"""Previewed and loaded bytes, architecture by architecture: a varied choice of them, or all when asked to.

``WORKBENCH_ALL_ARCHITECTURES=1 pytest tests/test_architectures.py`` takes every type that transformers maps to a causal
language model; benchmarks/exact.py does so in more precisions and writes docs/exact.md.
"""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from architectures import model_types, save_model, tiny_config

import workbench as wb
from workbench.sizes import measure_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

REPORT = Path(__file__).parent.parent / "docs" / "exact.md"
# What the libraries themselves cannot make, and what they say.
IMPOSSIBLE = {
    "gemma3n": "requires the (PIL|timm) library",
    "gemma4_assistant": "set of layer types producing a cache",
    "gemma4_unified_assistant": "set of layer types producing a cache",
    "musicgen": "no attribute 'dropout'",
    "musicgen_melody": "no attribute 'dropout'",
}
# One for each way in which architectures differ where bytes are concerned.
VARIED = (
    "apertus",  # parameters of its activation function
    "bart",  # the decoder alone of an encoder-decoder
    "big_bird",  # a head with weight and bias tied, buffers that are no weights
    "bloom",
    "ctrl",  # a table of positions that is a buffer of an inner node
    "dbrx",
    "deepseek_v3",  # latent attention, dense and expert layers, a saved buffer
    "deepseek_v4",  # many weights that are kept in float32
    "falcon",  # a linear class of its own, which nothing quantizes
    "gemma3",  # with its vision tower
    "gemma3n_text",
    "gemma4_text",
    "gpt2",  # Conv1D
    "gpt_bigcode",
    "gpt_oss",
    "granitemoehybrid",
    "hrm_text",  # two stacks, parameters of the model itself
    "jamba",  # states, attention and experts
    "mamba2",
    "mixtral",
    "phi3",  # fused projections
    "qwen4_exp_text",  # a table that the checkpoint holds in pieces
    "recurrent_gemma",
    "rwkv",
    "xlnet",  # parameters made in float32 whatever is asked for
)
ALL = os.environ.get("WORKBENCH_ALL_ARCHITECTURES") == "1"
TESTED = tuple(name for name in (model_types() if ALL else VARIED) if name not in IMPOSSIBLE)


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """Free each model: its modules refer to each other, so nothing else would before long."""
    yield
    gc.collect()


def recipe(folder: Path, **choices: Any) -> wb.Recipe:
    options = {"max_memory": {"cpu": "8GiB"}, "workload": wb.Workload(context_length=1), **choices}
    return wb.Recipe(model=str(folder), **options)


def load(placement: wb.Placement, **options: Any) -> Any:
    """Load as workbench.load does, which would measure cache and activations first; that takes minutes for some."""
    chosen = placement.recipe
    return transformers.AutoModelForCausalLM.from_pretrained(
        chosen.model.name,
        dtype=getattr(torch, placement.dtype),
        device_map=dict(placement.device_map),
        quantization_config=chosen.precision.to_config(placement.dtype),
        **options,
    )


# A warning of a library about a config that is tiny, or about a weight that is random, says nothing about sizes.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TESTED)
def test_the_loaded_bytes_are_the_previewed_ones(model_type: str, tmp_path: Path) -> None:
    save_model(model_type, tmp_path)
    for precision in (wb.FullPrecision(dtype="bfloat16"), wb.FourBit(double_quant=False)):
        placement = wb.place(recipe(tmp_path, precision=precision), measure=False)
        assert measure_weights(load(placement)) == {"cpu": placement.total_bytes}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", IMPOSSIBLE)
def test_what_the_libraries_cannot_make_is_known(model_type: str, tmp_path: Path) -> None:
    with pytest.raises((AttributeError, ImportError, ValueError), match=IMPOSSIBLE[model_type]):
        save_model(model_type, tmp_path)


def test_every_type_has_a_tiny_config_of_its_own() -> None:
    others = {name: found for name in model_types() if (found := tiny_config(name).model_type) != name}
    assert others == {"gpt-sw3": "gpt2"}  # the Swedish GPT-2 has no config of its own


# --- where bytes once differed ----------------------------------------------------------------------------------------


def test_parts_of_one_saved_tensor_are_quantized_together_or_not_at_all(tmp_path: Path) -> None:
    # The checkpoint holds gate, query, key and value in one tensor; without the gate transformers quantizes none.
    save_model("hrm_text", tmp_path)
    precision = wb.Int8(skip_modules=("lm_head", "gate_proj"))
    placement = wb.place(recipe(tmp_path, precision=precision), measure=False)
    assert measure_weights(load(placement)) == {"cpu": placement.total_bytes}
    everything = wb.place(recipe(tmp_path, precision=wb.Int8()), measure=False)
    assert placement.total_bytes > everything.total_bytes


@pytest.mark.parametrize("model_type", ["ctrl", "deepseek_v4", "gemma3n_text"])
def test_with_a_part_on_disk_each_device_holds_what_was_previewed(model_type: str, tmp_path: Path) -> None:
    # ctrl: a buffer that transformers' map leaves out. deepseek_v4: float32 weights, which are fetched in bfloat16.
    save_model(model_type, tmp_path)
    total_bytes = wb.place(recipe(tmp_path), measure=False).total_bytes
    budgets = {"cpu": 6 * total_bytes // 10, "disk": "8GiB"}
    placement = wb.place(recipe(tmp_path, strategy="sequential", max_memory=budgets), measure=False)
    measured = measure_weights(load(placement, offload_folder=str(tmp_path / "offload")))
    assert measured["disk"] > 0
    assert measured == {device: memory.weight_bytes for device, memory in placement.memory.items()}


@pytest.mark.parametrize("model_type", ["ctrl", "openai-gpt", "xlnet"])
def test_a_map_of_transformers_can_be_taken_over_as_a_custom_one(model_type: str, tmp_path: Path) -> None:
    # It names single parameters (xlnet) and shared modules (openai-gpt), and leaves buffers out (ctrl).
    save_model(model_type, tmp_path)
    total_bytes = wb.place(recipe(tmp_path), measure=False).total_bytes
    budgets = {"cpu": 6 * total_bytes // 10, "disk": "8GiB"}
    machine = wb.Machine.detect()  # once: what is free changes from moment to moment
    planned = wb.place(recipe(tmp_path, strategy="sequential", max_memory=budgets), machine=machine, measure=False)
    custom = recipe(tmp_path, strategy="custom", device_map=planned.device_map, max_memory=budgets)
    assert wb.place(custom, machine=machine, measure=False).memory == planned.memory


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_covers_the_types_of_the_version_that_it_names() -> None:
    text = REPORT.read_text(encoding="utf-8")
    version = re.search(r"^Versions: .*\btransformers ([\d.]+)", text, re.MULTILINE)
    assert version is not None
    table = text.partition("| model type |")[2]
    listed = re.findall(r"^\| ([a-z][\w-]*)(?:\[\^\d+\])? \|", table, re.MULTILINE)
    assert len(listed) == len(set(listed)) >= 180
    if version[1] == transformers.__version__:
        assert tuple(listed) == model_types()


def test_the_report_has_no_difference() -> None:
    text = REPORT.read_text(encoding="utf-8")
    counts = re.search(r"([\d,]+) exact, ([\d,]+) different, ([\d,]+) impossible", text)
    assert counts is not None
    assert len(re.findall(r"\| exact(?:,| \()", text)) == int(counts[1].replace(",", ""))
    assert counts[2] == "0"
