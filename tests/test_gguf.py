"""A GGUF file is picked like any model: previewed as it will be unpacked, and loaded so."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hub_server import HubServer
from transformers import AutoModelForCausalLM, GgufConfig

import workbench as wb
from workbench.sizes import measure_weights

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, MLP, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY = 64, 128, 2, 4, 2, 512


def write_gguf(path: Path) -> None:
    """A Llama of the shapes above with random weights in Q8_0, and a tokenizer of single bytes."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCABULARY)
    alphabet = sorted(ByteLevel.alphabet())
    rest = ["ab", *(f"<{i}>" for i in range(VOCABULARY - len(alphabet) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*alphabet, *rest])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY - 1)
    writer.add_eos_token_id(VOCABULARY - 2)
    random = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name: str, *shape: int) -> None:
        weights = (random.standard_normal(shape) * 0.02).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    narrow = HIDDEN // HEADS * KEY_VALUE_HEADS
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", narrow, HIDDEN),
            ("attn_v", narrow, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", MLP, HIDDEN),
            ("ffn_up", MLP, HIDDEN),
            ("ffn_down", HIDDEN, MLP),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path)
    return path


def recipe(model: Path | str, **choices: Any) -> wb.Recipe:
    return wb.Recipe(
        **{"model": str(model), "max_memory": {"cpu": "4GiB"}, "workload": wb.Workload(context_length=16), **choices}
    )


@pytest.mark.filterwarnings("ignore")
def test_it_is_previewed_loaded_and_asked(file: Path, tiny_llama: Path) -> None:
    for name in (file, file.parent):  # the file itself, or the folder that it is alone in
        skeleton = wb.read_skeleton(str(name))
        assert skeleton.quantized_as == "GGUF"
        assert skeleton.source.title == "tiny.Q8_0"
        assert skeleton.dtype == "bfloat16"
    placement = wb.place(recipe(file))
    # The shapes are those of the tiny Llama.
    assert placement.total_bytes == wb.place(recipe(tiny_llama)).total_bytes
    assert "Its weights (GGUF) are unpacked to bfloat16 while they are loaded" in placement.summary
    session = wb.load(recipe(file))
    assert session.load_report.matches, session.load_report.lines
    assert session.load_report.measured_bytes == {"cpu": placement.total_bytes}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=GgufConfig(dequantize=True),
    )
    tokens = torch.arange(8)[None]
    assert torch.equal(session.model(tokens).logits, model(tokens).logits)
    assert isinstance(session.generate("abc", max_new_tokens=3), str)
    assert session.last_stats is not None
    assert session.last_stats.prompt_tokens >= 2
    session.unload()
    wide = wb.load(recipe(file, precision=wb.FullPrecision(dtype="float32")))
    assert wide.load_report.matches
    assert wide.model.dtype == torch.float32
    wide.unload()


@pytest.mark.filterwarnings("ignore")
def test_the_exported_program_loads_it_too(file: Path) -> None:
    code = recipe(file).to_python()
    assert "gguf_file='tiny.Q8_0.gguf'" in code
    assert "gguf" in re.search("# pip install (.*)", code)[1]  # type: ignore[index]
    scope: dict[str, Any] = {}
    exec(compile(code, "exported.py", "exec"), scope)  # noqa: S102 - running it is the point
    assert measure_weights(scope["model"]) == {"cpu": wb.place(recipe(file)).total_bytes}


def test_what_it_cannot_do_is_said(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is quantized already \(GGUF\), so it cannot be loaded as int8"):
        wb.place(recipe(file, precision=wb.Int8()))
    half = wb.place(recipe(file)).total_bytes // 2
    with pytest.raises(ValueError, match="is a GGUF file, of which transformers puts nothing on disk"):
        wb.load(recipe(file, max_memory={"cpu": half, "disk": "1GiB"}))
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 GGUF files: name one, such as .*a\.gguf"):
        wb.read_skeleton(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(ValueError, match="The header of a cannot be used"):
        wb.read_skeleton(str(tmp_path / "a.gguf"))


def test_on_the_hub_one_is_fetched_first(file: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import workbench as wb\n"
        "try:\n    wb.read_skeleton('org/packed')\n"
        "except ValueError as error:\n    print(error)"
    )
    with HubServer(repos={"org/packed": file.parent}) as hub:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=hub.env(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        assert hub.sent_bytes(".gguf") == 0
    assert "huggingface_hub.hf_hub_download('org/packed', 'tiny.Q8_0.gguf')" in done.stdout
