"""The notebooks: stored without outputs, and each executed in full, in a kernel of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TEACHING = [path for path in NOTEBOOKS if path.name[0].isdecimal()]


def execute(path: Path, cwd: Path) -> str:
    """Run every cell; the first that raises fails the test. Returns what people read: printed text and results."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(cwd)}})
    client.execute()
    outputs: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"]
    return "\n".join([*texts, *(o.data.get("text/plain", "") for o in outputs if "data" in o)])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    assert "widgets" not in notebook.metadata


# What each one is there to show, as it stands in its outputs.
SHOWS = {
    "1-preview": [
        "Does not fit: model.layers.59 to lm_head",
        "packed          Fits on cuda:0",
        "98 % of this model are experts that bitsandbytes does not quantize",
    ],
    "2-int8": [
        "outliers multiplied apart",
        "threshold  6.0: error",
        "has no linear module",
        "int8            Fits on cuda:0",
    ],
    "3-four-bits": ["nf4: -1.00", "bits a weight: 4.500, with double quantization 4.127", "experts that bitsandbytes"],
    "4-gptq": [
        "output error",
        "Fits: all of it is on cuda:0",
        "layers wait on the CPU",
        "group_size=128 does not divide the 576 inputs",
        "(210 of 210), error",
        "Perplexity on 4,096 tokens of held-back text",
        "as previewed",
        "Paris",
    ],
    "5-offload": [
        "Offloads: ",
        "disk, read ahead",
        "leaves out model.norm",
        "no module 'model.layer.0'",
        "parts lm_head",
    ],
    "6-adapter": [
        "as previewed",
        "Training takes",
        "step 30 of 30, loss",
        "said the owl",
        "Adapters(*owl)",
        "1,302,528 bytes more in the preview",
        "PeftModel.from_pretrained(model, 'owl', adapter_name='owl')",
        "and this model is other",
        "owl is part of 28 modules now. The weights were rounded to nf4 + double quantization anew.",
    ],
    "7-old-checkpoints": [
        "The weights are in gptq_model-4bit-32g.safetensors.",
        "is_marlin_format, model_name_or_path, model_file_base_name mean nothing any more",
        "has several sets of weights",
        "No config says how this is quantized; its tensors do: 4 bits, groups of 32, symmetric",
        "says 8 bits and group_size=32, but its tensors are those of 4 bits",
        "stored zero points: {7}",
        "Kernel: Torch",
    ],
    "8-core": ["Paris", "as previewed", "AutoModelForCausalLM.from_pretrained(", "Valid options", "nf4"],
}


@pytest.mark.parametrize("path", TEACHING, ids=lambda path: path.stem)
def test_every_cell_runs_and_shows_its_point(
    path: Path, demo_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = request.getfixturevalue("gptq_lesson")[0] if path.stem == "4-gptq" else execute(path, tmp_path)
    for sentence in SHOWS[path.stem]:
        assert sentence in said, said
