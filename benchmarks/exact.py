"""Prove that previewed weight bytes are the loaded ones, for every language model architecture that transformers has.

Makes each model with random weights, previews it, loads it on the CPU in each precision, and writes what came out to
docs/exact.md. Beside ours stand the two figures that people use: ``get_memory_footprint()`` and what
``accelerate estimate-memory`` says. Exits with 1 if a preview differs from its load by a single byte.

    python benchmarks/exact.py [--only llama,gpt2 | --only seq2seq] [--columns "GPTQ 4-bit;nf4"] [--to FILE] [--jobs 2]

With ``--only`` or ``--columns`` the report is printed, or written to the file named, and docs/exact.md stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for the other threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.commands import estimate  # noqa: E402
from architectures import model_types, save_model, seq2seq_types  # noqa: E402

import workbench as wb  # noqa: E402
from workbench.gptq_folder import planned_config  # noqa: E402
from workbench.gptq_layers import linear_shape, quantizable_modules  # noqa: E402
from workbench.kernels import import_gptqmodel  # noqa: E402
from workbench.sizes import measure_weights  # noqa: E402

REPORT = ROOT / "docs" / "exact.md"
SEQ2SEQ = " (seq2seq)"
# Refusals of a preview that say what the libraries cannot do.
NOT_OURS = ("transformers cannot plan", "GPTQ finds nothing to quantize", "nothing is left to quantize")
# Column -> the nearest dtype that accelerate's estimate knows.
PRECISIONS = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "float16",
    "int8": "int8",
    "int8 with skips": "int8",
    "nf4": "int4",
    "nf4 double": "int4",
    "fp4": "int4",
    "GPTQ 4-bit": "int4",
    # At the end: some models share an activation with all of their class, and accelerate's hooks stay on it.
    "bfloat16, CPU and disk": "float16",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One architecture in one precision.

    Attributes:
        difference_bytes: By how much loaded and previewed bytes differ, over all devices; None if it was not loaded.
        footprint_error: What ``get_memory_footprint()`` is off by, as a share of the loaded bytes.
        estimate_error: What accelerate's estimate is off by, likewise; None where it can make none.
        error: Why it could not be loaded.
        is_ours: Whether that is Workbench's error and not the libraries'.
        is_untouched: Whether it was to be quantized, but no weight was.
    """

    difference_bytes: int | None = None
    footprint_error: float | None = None
    estimate_error: float | None = None
    error: str = ""
    is_ours: bool = False
    is_untouched: bool = False

    @property
    def status(self) -> str:
        """``"exact"``, ``"different"`` or ``"impossible"``: the libraries themselves cannot."""
        if self.is_ours or self.difference_bytes:
            return "different"
        return "impossible" if self.error else "exact"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture in every precision, and accelerate's error if it can make no estimate of it."""

    model_type: str
    class_name: str = ""
    parameter_count: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    estimate_failure: str = ""


# --- make, preview, load ----------------------------------------------------------------------------------------------


def row_names() -> tuple[str, ...]:
    """Every row: the causal language models, then the encoder-decoders."""
    return (*model_types(), *(f"{name}{SEQ2SEQ}" for name in seq2seq_types()))


def examine(model_type: str, titles: Sequence[str] = tuple(PRECISIONS)) -> Row:
    """Make one architecture, then preview and load it in the precisions of these titles."""
    with tempfile.TemporaryDirectory(prefix="exact-") as folder, quiet():
        try:
            name = model_type.removesuffix(SEQ2SEQ)
            count = save_model(name, Path(folder), seq2seq=name != model_type)
        except Exception as error:  # noqa: BLE001 - libraries raise anything, and what they raise is the result
            return Row(model_type=model_type, outcomes=dict.fromkeys(titles, Outcome(error=one_line(error, folder))))
        estimates, failure = accelerate_estimates(folder)
        outcomes = {title: compare(folder, title, estimates.get(PRECISIONS[title])) for title in titles}
        return Row(
            model_type=model_type,
            class_name=wb.read_skeleton(folder).architecture,
            parameter_count=count,
            outcomes=outcomes,
            estimate_failure=failure,
        )


def compare(folder: str, title: str, estimate_bytes: float | None) -> Outcome:
    """Preview, load, and hold the two against each other, device by device."""
    try:
        chosen = precision(title, wb.read_skeleton(folder))
        placement = preview(folder, chosen, to_disk="disk" in title)
    except Exception as error:  # noqa: BLE001 - as above
        return Outcome(error=one_line(error, folder), is_ours=not any(text in str(error) for text in NOT_OURS))
    try:
        if isinstance(chosen, wb.GPTQ):
            # Which kernel is right here is found out by workbench.load; transformers takes the first that starts.
            model = wb.load(placement.recipe.with_(model=pack(folder, chosen), precision=wb.FullPrecision())).model
        else:
            seq2seq = wb.read_skeleton(folder).is_encoder_decoder
            auto_class = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
            # What workbench.load calls, which would measure cache and activations first.
            model = auto_class.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=getattr(torch, placement.dtype),
                device_map=dict(placement.device_map),
                quantization_config=chosen.to_config(placement.dtype),
                offload_folder=str(Path(folder) / "offload"),
            )
    except Exception as error:  # noqa: BLE001 - as above
        return Outcome(error=one_line(error, folder))
    foretold = {device: memory.weight_bytes for device, memory in placement.memory.items()}
    measured = measure_weights(model)
    difference = sum(abs(measured.get(d, 0) - foretold.get(d, 0)) for d in {*measured, *foretold})
    difference += abs(sum(storages(model).values()) - foretold["cpu"])
    footprint_bytes, loaded_bytes = model.get_memory_footprint(), sum(measured.values())
    del model
    gc.collect()  # tensors and their modules refer to each other
    return Outcome(
        difference_bytes=difference,
        footprint_error=footprint_bytes / loaded_bytes - 1,
        estimate_error=None if estimate_bytes is None else estimate_bytes / loaded_bytes - 1,
        is_untouched=not isinstance(chosen, wb.FullPrecision) and not any(la.quantized for la in placement.layers),
    )


def pack(folder: str, chosen: wb.GPTQ) -> str:
    """Write the same model as a GPTQ checkpoint whose weights mean nothing: this is about their size.

    Returns:
        The new folder, inside the given one.
    """
    from safetensors.torch import save_file

    import_gptqmodel()
    skeleton = wb.read_skeleton(folder)
    seq2seq = skeleton.is_encoder_decoder
    auto_class = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    # By the names that the loaded model has for them: some checkpoints hold several weights in one tensor.
    state = auto_class.from_pretrained(folder, dtype="auto").state_dict()
    tensors = {name: tensor.clone() for name, tensor in state.items() if name not in skeleton.tied}
    module = skeleton.plain_model().module
    for name in (name for names in quantizable_modules(skeleton, chosen).values() for name in names):
        rows, columns = linear_shape(module.get_submodule(name))
        groups = columns // chosen.group_size
        tensors.pop(f"{name}.weight", None)  # of layers that share one, each has packed weights of its own
        tensors[f"{name}.qweight"] = torch.zeros(columns * chosen.bits // 32, rows, dtype=torch.int32)
        tensors[f"{name}.qzeros"] = torch.zeros(groups, rows * chosen.bits // 32, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.ones(groups, rows, dtype=torch.float16)
        tensors[f"{name}.g_idx"] = torch.arange(columns, dtype=torch.int32) // chosen.group_size
    target = Path(folder) / "packed"
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = planned_config(chosen, skeleton)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(target)


def preview(folder: str, chosen: Any, *, to_disk: bool) -> wb.Placement:
    """Place a model on the CPU, or as much as transformers puts there when a part has to go to the disk."""
    recipe = wb.Recipe(
        model=folder,
        precision=chosen,
        max_memory={"cpu": "8GiB"},
        workload=wb.Workload(context_length=1),  # every model allows that; this is about weights
    )
    whole = wb.place(recipe, measure=False)
    if not to_disk:
        return whole
    budgets = {"cpu": 6 * whole.total_bytes // 10, "disk": "8GiB"}
    return wb.place(recipe.with_(strategy="sequential", max_memory=budgets), measure=False)


def precision(title: str, skeleton: wb.Skeleton) -> Any:
    """The options of a column; what is skipped besides transformers' own choice is the most frequent kind of module."""
    if title.startswith("int8"):
        kinds = [name.rpartition(".")[2] for name in skeleton.linear_modules if name not in skeleton.default_skips]
        skips = (*skeleton.default_skips, statistics.mode(kinds)) if kinds and "skips" in title else ()
        return wb.Int8(skip_modules=skips)
    if title.startswith("GPTQ"):
        module = skeleton.plain_model().module
        odd = [n for n in skeleton.linear_modules if any(d % 32 for d in linear_shape(module.get_submodule(n)))]
        return wb.GPTQ(group_size=32, skip_modules=tuple(dict.fromkeys(name.rpartition(".")[2] for name in odd)))
    if title in ("nf4", "nf4 double", "fp4"):
        return wb.FourBit(quant_type=title[:3], double_quant="double" in title)
    return wb.FullPrecision(dtype=title.partition(",")[0])


def storages(model: Any) -> dict[int, int]:
    """Address to bytes of every piece of memory that a tensor anywhere in the model lies in.

    It asks no module for its parameters: it follows all attributes, so it also finds tensors that nobody registered,
    and it counts memory, so that views and tied weights count once and a slice counts with all that it keeps alive.
    """
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
        elif isinstance(value, torch.nn.Module) or not callable(value):
            waiting.extend(getattr(value, "__dict__", {}).values())
    return found


def accelerate_estimates(folder: str) -> tuple[dict[str, float], str]:
    """What ``accelerate estimate-memory`` says: bytes for each of its dtypes, or else why it says nothing."""
    arguments = SimpleNamespace(
        model_name=folder,
        library_name="transformers",
        trust_remote_code=False,
        dtypes=sorted(set(PRECISIONS.values())),
    )
    ask_the_hub = estimate.verify_on_hub
    # All the rest is accelerate's own: only the question whether the Hub has the model is answered here.
    estimate.verify_on_hub = lambda *_: SimpleNamespace(library_name="transformers", config={})
    try:
        return {row[0]: float(row[2]) for row in estimate.gather_data(arguments)}, ""
    except Exception as error:  # noqa: BLE001 - as above
        return {}, one_line(error, folder)
    finally:
        estimate.verify_on_hub = ask_the_hub


def one_line(error: BaseException, folder: str) -> str:
    """An error's class and message without line breaks and without the name of a folder that is gone."""
    text = " ".join(str(error).replace(folder, "the model").replace(Path(folder).name, "the model").split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no warnings about tiny models with random weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# --- the report -------------------------------------------------------------------------------------------------------

PART = "Made by `python benchmarks/exact.py` with `--columns` and `--to`; do not edit. The whole: [exact.md](exact.md)."
HOW_TO_READ = """\
Every architecture that this version of transformers maps to a causal language model, and every encoder-decoder that it
maps to text in and text out, is made as a tiny model with random weights (tests/architectures.py), previewed with
`workbench.place`, and loaded on the CPU with the previewed device map.

- **exact**: on each device the previewed bytes are those that `measure_weights` finds, and on the CPU also those of all
  memory that a walk through everything the loaded model refers to comes upon. One byte more or less is "different".
- The numbers in brackets say by how many per cent two others miss the loaded bytes: first `get_memory_footprint()` of
  the loaded model, then `accelerate estimate-memory`. The latter counts the model without its head, shared layers as
  often as they are used, and of a model with several parts all of them, where the causal language model is the text
  decoder alone; it knows neither bfloat16 nor nf4 and fp4, so its nearest (float16, int4) stands there.
- **nothing quantized**: the libraries load it without a word, but no weight of it gets smaller.
- **no**: the libraries themselves cannot make or load it; the footnote has their error.
- "bfloat16, CPU and disk" has room for about half of the model on the CPU. "int8 with skips" also leaves the most
  frequent kind of linear module alone.
- These are bytes after the load; on the CPU bitsandbytes repacks 4-bit weights at the first forward. In models this
  small the embeddings and the tables of the 4-bit formats weigh more than in large ones, so the two others' errors are
  not those of a large model.
- GPTQ: the model as a checkpoint that is quantized already (4 bits, groups of 32; its packed weights mean nothing),
  previewed from the original as it will be. Modules whose shapes GPTQ cannot pack are skipped; where it finds no plain
  linear module in the decoder layers, there is nothing to load and the footnote says so.
- "(seq2seq)" marks the encoder-decoders."""


def report(rows: list[Row]) -> str:
    """The whole report as Markdown; the same text for the same results."""
    titles = tuple(rows[0].outcomes)
    notes: dict[str, int] = {}
    table = [
        f"| model type | class | parameters | {' | '.join(titles)} |",
        f"|---|---|---:|{'---|' * len(titles)}",
    ]
    for row in rows:
        failure = row.estimate_failure and mark(f"No estimate by accelerate: ``{row.estimate_failure}``", notes)
        cells = [cell(row.outcomes[title], notes) for title in titles]
        count = f"{row.parameter_count:,}" if row.parameter_count else ""
        table.append(f"| {row.model_type}{failure} | {row.class_name} | {count} | {' | '.join(cells)} |")
    parts = [
        "# Previewed bytes and loaded bytes",
        "Made by `python benchmarks/exact.py`; do not edit." if len(titles) == len(PRECISIONS) else PART,
        summary(rows),
        f"Versions: {versions()}. Machine: {machine()}.",
        HOW_TO_READ,
        "\n".join(errors_by_precision(rows)),
        "\n".join(table),
        "\n".join(f"[^{number}]: {text}" for text, number in notes.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(rows: list[Row]) -> str:
    """How many loads were exact, different and impossible."""
    statuses = [outcome.status for row in rows for outcome in row.outcomes.values()]
    never = sum(all(outcome.status == "impossible" for outcome in row.outcomes.values()) for row in rows)
    return (
        f"**{len(rows)} architectures in {len(rows[0].outcomes)} precisions: {statuses.count('exact'):,} exact, "
        f"{statuses.count('different'):,} different, {statuses.count('impossible'):,} impossible for the libraries "
        f"themselves ({never} architectures in no precision).**"
    )


def errors_by_precision(rows: list[Row]) -> Iterator[str]:
    """A small table: the outcomes and the others' errors for each precision."""
    yield "| precision | exact | different | impossible | `get_memory_footprint()` | `accelerate estimate-memory` |"
    yield "|---|---:|---:|---:|---|---|"
    for title in rows[0].outcomes:
        outcomes = [row.outcomes[title] for row in rows]
        counts = [str([o.status for o in outcomes].count(s)) for s in ("exact", "different", "impossible")]
        footprint = spread(o.footprint_error for o in outcomes)
        yield f"| {title} | {' | '.join(counts)} | {footprint} | {spread(o.estimate_error for o in outcomes)} |"


def spread(errors: Iterable[float | None]) -> str:
    """Median and extremes of some relative errors."""
    known = [error for error in errors if error is not None]
    if not known:
        return ""
    return f"median {percent(statistics.median(known))}, from {percent(min(known))} to {percent(max(known))}"


def percent(error: float) -> str:
    """A relative error in per cent, with a sign unless it rounds to nothing."""
    text = f"{100 * error:+.1f} %"
    return text if text not in ("+0.0 %", "-0.0 %") else "0.0 %"


def cell(outcome: Outcome, notes: dict[str, int]) -> str:
    """What the big table says of one outcome."""
    if outcome.error:
        return f"{'WORKBENCH' if outcome.is_ours else 'no'}{mark(f'``{outcome.error}``', notes)}"
    status = f"{outcome.difference_bytes:+,} bytes" if outcome.difference_bytes else "exact"
    status += ", nothing quantized" if outcome.is_untouched else ""
    errors = [percent(e).removesuffix(" %") for e in (outcome.footprint_error, outcome.estimate_error) if e is not None]
    return f"{status} ({', '.join(errors)})"


def mark(text: str, notes: dict[str, int]) -> str:
    """A reference to a footnote, the same for the same text."""
    return f"[^{notes.setdefault(text, len(notes) + 1)}]"


def versions() -> str:
    """Of everything that has a say in the sizes."""
    packages = ("transformers", "torch", "accelerate", "bitsandbytes", "gptqmodel", "optimum", "safetensors")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def machine() -> str:
    """What it ran on, in a few words."""
    gpus = torch.cuda.device_count()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpus or 'no'} GPU"


# --- the run ----------------------------------------------------------------------------------------------------------


def main() -> int:
    """Examine, report, and say whether anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TYPES", help="model types, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes (default 1)")
    parser.add_argument("--columns", default="", metavar="TITLES", help="precisions, separated by semicolons")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where to write the report of a part")
    options = parser.parse_args()
    chosen = tuple(options.only.split(",")) if options.only else row_names()
    if options.only == "seq2seq":
        chosen = row_names()[len(model_types()) :]
    titles = options.columns.split(";") if options.columns else list(PRECISIONS)
    if not set(titles) <= set(PRECISIONS):
        parser.error(f"the columns are {', '.join(PRECISIONS)}")
    unknown = set(chosen) - set(row_names())
    if unknown:
        parser.error(
            f"transformers {transformers.__version__} maps no {', '.join(sorted(unknown))} to a language model"
        )
    started = time.perf_counter()
    rows = []
    with mapping(options.jobs) as map_:
        for row in map_(functools.partial(examine, titles=titles), chosen):
            rows.append(row)
            found = [outcome.status for outcome in row.outcomes.values()]
            counts = ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))
            print(f"{time.perf_counter() - started:7.1f} s  {row.model_type}: {counts}", file=sys.stderr)
    text = report(rows)
    if options.to is not None:
        options.to.write_text(text, encoding="utf-8")
        print(summary(rows))
    elif options.only or options.columns:
        print(text)
    else:
        REPORT.write_text(text, encoding="utf-8")
        print(summary(rows))
    return int(any(outcome.status == "different" for row in rows for outcome in row.outcomes.values()))


@contextlib.contextmanager
def mapping(jobs: int) -> Iterator[Callable[..., Iterable[Row]]]:
    """A ``map`` over so many processes, in order."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


if __name__ == "__main__":
    raise SystemExit(main())
