"""What every test shares: a process that cannot reach the Hub, and one tiny real model on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workbench.precision import Precision
    from workbench.session import Session

# Test files import their neighbours (`from hub_server import HubServer`), which importlib mode does not arrange.
sys.path.insert(0, str(Path(__file__).parent))

VOCAB_SIZE = 512

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

MODEL_CARD = """\
---
license: apache-2.0
language: [en]
tags: [tiny, random-weights]
pipeline_tag: text-generation
library_name: transformers
---
# tiny_llama

Random weights, made by the test suite. It says nothing sensible.
"""


def pytest_configure(config: pytest.Config) -> None:
    """Cut this process off from the Hub, before anything imports huggingface_hub (it reads the environment once)."""
    # An empty home: neither a developer's token nor their downloaded models may change what a test sees.
    home = tempfile.TemporaryDirectory(prefix="hf-home-")
    config.add_cleanup(home.cleanup)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        os.environ.pop(name, None)
    os.environ["HF_HOME"] = home.name
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="session", autouse=True)
def nothing_kept() -> Iterator[None]:
    """Keep and take no quantized weights, or what a test sees would depend on what was loaded before."""
    import workbench.loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench.loading, "key_of", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Llama that loads, tokenizes and generates like any other: a folder to read, to be copied before changing.

    2 layers, hidden 64, 4 heads of 16, 2 key-value heads, MLP 128, vocabulary 512, 2048 positions, embeddings not
    tied, random bf16 weights, a tokenizer in which every one of the 512 ids decodes to text, a chat template, and a
    model card with a licence. Counted by hand: 2 * (512 * 64) for the embedding and the head; in a layer 12,288 for
    attention, 24,576 for the MLP, 128 for its norms; 64 for the last norm: 139,584 parameters, 279,168 bytes.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"

    # Byte level, so that any text can be encoded; the rest of the ids are merges of two letters. Nothing is trained.
    special = ["<s>", "</s>", "<pad>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ((first, second) for first in ascii_lowercase for second in ascii_lowercase)
    merges = list(islice(pairs, VOCAB_SIZE - len(symbols)))
    vocab = {token: index for index, token in enumerate([*symbols, *(first + second for first, second in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True)),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    ).save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    )
    # The seed is ours alone: a test that draws random numbers must not depend on whether this ran before it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real demo model, converted once for each user and kept in the cache."""
    from workbench.model import fetch_demo_model

    return fetch_demo_model()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a model of ``tiny_models.py`` by name, once: a folder to read, to be copied before changing."""
    from tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            make_tiny_model(name, folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def loaded(tiny_model: Callable[[str], Path]) -> Callable[[str, Precision], Any]:
    """Load a model of ``tiny_models.py`` on the CPU with plain transformers, each precision once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    models: dict[tuple[str, Precision], Any] = {}

    def load(name: str, precision: Precision) -> Any:
        if (name, precision) not in models:
            folder = tiny_model(name)
            dtype = precision.dtype_of(str(AutoConfig.from_pretrained(folder).dtype).removeprefix("torch."))
            models[name, precision] = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map={"": "cpu"},
                quantization_config=precision.to_config(dtype),
            )
        return models[name, precision]

    return load


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = None
    if mount and os.geteuid() == 0:
        done = subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
        )
    if done is None or done.returncode:
        pytest.skip("a small file system cannot be mounted here: it takes root and the right to mount")
    yield folder
    subprocess.run([str(shutil.which("umount")), "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def gptq_lesson(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The notebook that quantizes the demo model, run once: what it said, and the folder that it made."""
    from test_notebooks import FOLDER, execute

    home = tmp_path_factory.mktemp("lesson")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(home))  # where the notebook's kernel makes its folder
        said = execute(FOLDER / "4-gptq.ipynb", home)
    (made,) = home.glob("*/demo-gptq")
    return said, made


@pytest.fixture
def load() -> Iterator[Callable[..., Session]]:
    """Load models for a short context, and unload them after the test."""
    import workbench as wb

    sessions: list[Session] = []

    def make(model: Path | str, **options: Any) -> Session:
        recipe = wb.Recipe(model=str(model), workload=wb.Workload(context_length=128), **options)
        sessions.append(wb.load(recipe))
        return sessions[-1]

    yield make
    for session in sessions:
        session.unload()
