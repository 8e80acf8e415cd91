"""Encoder-decoders are loaded with the class that their config asks for, and previewed as exactly as the others."""

from __future__ import annotations

import gc
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from architectures import save_model, seq2seq_types

import workbench as wb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALL = os.environ.get("WORKBENCH_ALL_ARCHITECTURES") == "1"
# T5 keeps a weight in float32 under float16, BART ties three embeddings, Marian has a bias that is a buffer, LED and
# LongT5 attend in windows, Switch has experts, a composed model has two configs, T5Gemma nests its decoder's.
VARIED = ("t5", "bart", "marian", "led", "longt5", "switch_transformers", "encoder-decoder", "t5gemma", "prophetnet")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    yield
    gc.collect()


def with_tokenizer(folder: Path, tiny_llama: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(tiny_llama / name, folder / name)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", seq2seq_types() if ALL else VARIED)
def test_the_loaded_bytes_and_map_are_the_previewed_ones(model_type: str, tmp_path: Path, tiny_llama: Path) -> None:
    save_model(model_type, tmp_path, seq2seq=True)
    for precision in (wb.FullPrecision(dtype="float16"), wb.Int8(), wb.FourBit()):
        recipe = wb.Recipe(
            model=str(tmp_path),
            precision=precision,
            max_memory={"cpu": "8GiB"},
            workload=wb.Workload(context_length=16),
        )
        session = wb.load(recipe)
        assert session.skeleton.is_encoder_decoder
        assert session.skeleton.architecture == type(session.model).__name__
        assert session.load_report.matches, session.load_report.lines
        session.unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_maps_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    save_model(model_type, tmp_path, seq2seq=True)
    asked = wb.Recipe(model=str(tmp_path), max_memory={"cpu": "1GiB"}, workload=wb.Workload(context_length=16))
    total = wb.place(asked, measure=False).total_bytes
    for share in (0.3, 0.6, 0.9):
        budgets: dict[Any, Any] = {"cpu": int(share * total), "disk": "1GiB"}
        recipe = asked.with_(max_memory=budgets)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path, dtype="auto", device_map="auto", max_memory=budgets, offload_folder=str(tmp_path / "off")
        )
        found = getattr(model, "hf_device_map", {"": "cpu"})
        assert wb.place(recipe, measure=False).device_map == found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_it_answers_and_the_exported_program_does_too(model_type: str, tmp_path: Path, tiny_llama: Path) -> None:
    save_model(model_type, tmp_path, seq2seq=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 0}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    recipe = wb.Recipe(model=str(with_tokenizer(tmp_path, tiny_llama)), max_memory={"cpu": "8GiB"})
    session = wb.load(recipe.with_(workload=wb.Workload(context_length=128)))
    session.tokenizer.chat_template = None
    inputs = session.tokenizer("Translate this.", return_tensors="pt")
    expected = session.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    answer = session.generate("Translate this.", max_new_tokens=8)
    assert answer == session.tokenizer.decode(expected, skip_special_tokens=True)
    assert session.last_stats is not None
    assert session.last_stats.new_tokens == len(expected) - 1  # the decoder's start token is nobody's
    session.unload()
    code = recipe.to_python()
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in code
    scope: dict[str, Any] = {}
    exec(compile(code, "exported.py", "exec"), scope)  # noqa: S102 - running it is the point
    assert isinstance(scope["model"], session.skeleton.model_class)


@pytest.mark.filterwarnings("ignore")
def test_the_decoder_of_bart_alone_stays_a_causal_model(tmp_path: Path) -> None:
    save_model("bart", tmp_path)
    skeleton = wb.read_skeleton(str(tmp_path))
    assert skeleton.architecture == "BartForCausalLM"
    assert not skeleton.is_encoder_decoder
