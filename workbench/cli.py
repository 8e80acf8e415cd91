"""The command ``workbench``: plan a model, compare the precisions, open the notebook.

Thin: it reads the choices, asks the core, prints. Importing it, and ``--help``, load no heavy library.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from workbench.compare import what_fits
from workbench.hardware import Machine, format_bytes
from workbench.kernels import quietly
from workbench.model import ModelRef
from workbench.placement import place
from workbench.precision import DTYPES, GPTQ, FourBit, FullPrecision, Int8
from workbench.recipe import STRATEGIES, Recipe
from workbench.show import WORDS, as_data, as_page, as_text, rate, table
from workbench.skeleton import read_skeleton
from workbench.speed import predict_speed
from workbench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.precision import Precision

_PRECISIONS: dict[str, Precision] = {
    "full": FullPrecision(),
    **{dtype: FullPrecision(dtype=dtype) for dtype in DTYPES},
    "int8": Int8(),
    "nf4": FourBit(quant_type="nf4"),
    "fp4": FourBit(quant_type="fp4"),
    "gptq": GPTQ(),
}
# Texts are set by hand; and an abbreviation could be an option meant for JupyterLab.
_FORM: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
_NOTEBOOK = "workbench.ipynb"
_LAB_PACKAGES = ("jupyterlab", "ipywidgets", "anywidget", "plotly")

_ABOUT = """\
See where every layer of a language model will go, and what it will cost, before a single weight is read.

  workbench plan   one model, one machine, one precision: memory for each device, verdict, advice
  workbench fits   the same model in every precision, the best first
  workbench lab    the same with sliders, in JupyterLab; there the model can be loaded and talked to
"""
_EXAMPLES = """\
examples:
  workbench plan demo
      The demo model on this machine, as it is now.
  workbench fits mistralai/Mistral-7B-v0.1 --machine "Colab T4"
      Which precision a free Colab has room for. Only the config is read from the Hub.
"""
_PLAN_ABOUT = """\
Plan a model: where every layer goes, and what it costs there. Only its config is read, no weights, and the machine need
not be this one: name any of the presets. A model that fits on one GPU runs best there; next best are several GPUs; what
waits on the CPU or the disk is fetched for every token. The KV cache grows with --context and --batch.
"""
_PLAN_EXAMPLES = """\
examples:
  workbench plan meta-llama/Llama-3.1-70B --machine "2x RTX 4090" --precision nf4 --context 8192
      Does a 70B model in 4 bits fit on two 24 GB cards, with room for 8,192 tokens?
  workbench plan ./my-model --max-memory 0=10GiB cpu=30GiB --python > load.py
      A plain transformers program that loads it with this map. "--html plan.html" writes a page to send around.

exit code: 0 if it fits or offloads, 1 if it does not fit, 2 if the question cannot be answered.
"""
_FITS_ABOUT = """\
Plan a model in full precision, int8 and 4 bits, and put the best first: what fits comes before what offloads and what
does not fit; among equals the more exact precision comes first.
"""
_FITS_EXAMPLES = """\
examples:
  workbench fits demo --machine "16 GB laptop"
      Every precision of the demo model on a laptop without a GPU.
  workbench fits meta-llama/Llama-3.1-70B --machine "8x A100 80 GB" --context 32768 --batch 4
      What is left for the weights beside the KV cache of four long conversations.

exit code: 0 if anything fits or offloads, 1 if nothing does, 2 if the question cannot be answered.
"""
_LAB_ABOUT = f"""\
Open the workbench in JupyterLab: {_NOTEBOOK} of this folder, which is put there if there is none. Options that it does
not know go to JupyterLab.
"""
_LAB_EXAMPLES = """\
examples:
  workbench lab
      In the browser, in this folder.
  workbench lab --no-browser --port 9999
      On a machine far away: open the printed address.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, where argparse prints the usage as well."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` shows how.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; None takes them from the command line.

    Returns:
        0; 1 if the model does not fit; 2 if the question cannot be answered, with one sentence on stderr.

    Raises:
        SystemExit: From ``--help``, ``--version``, and from arguments that cannot be read (code 2).
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "lab":
        _Parser(prog=f"workbench {options.command}").error(f"there is no option {' '.join(rest)}")
    try:
        if options.command == "lab":
            return _lab(rest)
        with quietly():  # stderr is for our own sentence
            code = _plan(options) if options.command == "plan" else _fits(options)
            sys.stdout.flush()
        return code  # noqa: TRY300 - a pipe may break as late as in the flush
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - a network that is down, a config that breaks transformers: no traceback
        sentence = " ".join(str(error).split())  # what other libraries say may run over many lines
        kind = "" if sentence and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"workbench: {kind}{sentence}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from workbench import __version__

    parser = _Parser(**_FORM, prog="workbench", description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    plan = commands.add_parser(
        "plan", description=_PLAN_ABOUT, epilog=_PLAN_EXAMPLES, **_FORM, help="plan one precision"
    )
    _add_question(plan)
    plan.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="full",
        metavar="PRECISION",
        help=f"how the weights are kept: {', '.join(_PRECISIONS)} (default: full, as the model was published)",
    )
    form = plan.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the placement as JSON, sizes in bytes")
    form.add_argument("--html", type=Path, metavar="FILE", help="write it as a page that needs nothing else")
    form.add_argument("--python", action="store_true", help="print a transformers program that loads the model so")

    fits = commands.add_parser(
        "fits", description=_FITS_ABOUT, epilog=_FITS_EXAMPLES, **_FORM, help="compare precisions"
    )
    _add_question(fits)
    commands.add_parser("lab", description=_LAB_ABOUT, epilog=_LAB_EXAMPLES, **_FORM, help="open the notebook")
    return parser


def _add_question(parser: argparse.ArgumentParser) -> None:
    """Add what every question about a model needs."""
    parser.add_argument("model", metavar="MODEL", help="'demo', a folder, 'org/name' or 'org/name@revision'")
    parser.add_argument(
        "--machine", metavar="NAME", help=f"one of {', '.join(Machine.presets())} (default: this machine as it is now)"
    )
    workload = Workload()
    parser.add_argument(
        "--context",
        type=int,
        default=workload.context_length,
        metavar="TOKENS",
        help="prompt and answer together, for each sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=workload.batch_size,
        metavar="SEQUENCES",
        help="so many at a time (default: %(default)s)",
    )
    strategies = [name for name in STRATEGIES if name != "custom"]  # which needs a map, too long for a command line
    parser.add_argument(
        "--strategy",
        choices=strategies,
        default=Recipe().strategy,
        metavar="STRATEGY",
        help=f"how layers are spread: {', '.join(strategies)} (default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory",
        type=_budget,
        nargs="+",
        action="extend",
        metavar="DEVICE=SIZE",
        help="budgets for the weights, such as 0=20GiB cpu=30GiB disk=100GB; a device left out is not used "
        "(default: what is free on the GPUs and in RAM)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python that comes with the model, which can do anything that you can do",
    )


def _budget(text: str) -> tuple[str, str]:
    device, equals, size = text.partition("=")
    if not (device and equals and size):
        raise argparse.ArgumentTypeError(f"{text!r} is no DEVICE=SIZE such as 0=20GiB or cpu=30GiB")
    return device, size


def _read_question(options: argparse.Namespace, precision: Precision) -> tuple[Recipe, Machine]:
    given = options.max_memory
    if given is not None and len(dict(given)) < len(given):
        raise ValueError("--max-memory names a device twice: keep one of the two.")
    ref = ModelRef.parse(options.model)
    recipe = Recipe(
        model=dataclasses.replace(
            ref, revision=options.revision or ref.revision, trust_remote_code=options.trust_remote_code
        ),
        precision=precision,
        strategy=options.strategy,
        max_memory=None if given is None else dict(given),
        workload=Workload(context_length=options.context, batch_size=options.batch),
    )
    return recipe, Machine.detect() if options.machine is None else Machine.preset(options.machine)


def _plan(options: argparse.Namespace) -> int:
    recipe, machine = _read_question(options, _PRECISIONS[options.precision])
    skeleton = read_skeleton(recipe.model)
    placement = place(recipe, machine=machine, skeleton=skeleton)
    refused = placement.verdict == "does_not_fit"
    if options.python:
        if refused:  # a program with a map that has holes would fail only after the download
            print(f"workbench: {placement.summary}", file=sys.stderr)
        else:
            print(recipe.to_python(placement), end="")
        return int(refused)
    speed = predict_speed(placement, skeleton)
    if options.json:
        print(json.dumps(as_data(placement, speed=speed), indent=2))
    elif options.html is not None:
        try:
            options.html.write_text(as_page(placement, speed=speed), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{options.html} cannot be written: {error.strerror}.") from None
        print(f"{placement.summary} Written to {options.html}.")
    else:
        print(as_text(placement, speed=speed))
    return int(refused)


def _fits(options: argparse.Namespace) -> int:
    recipe, machine = _read_question(options, FullPrecision())
    found = what_fits(recipe, machine=machine)
    rows = [
        (
            fit.placement.precision.label,
            WORDS[fit.placement.verdict],
            format_bytes(fit.placement.total_bytes),
            "?" if fit.longest_context is None else f"{fit.longest_context:,}",
            rate(fit.speed),
        )
        for fit in found
    ]
    workload = recipe.workload
    print(f"{recipe.model}: context {workload.context_length:,}, batch {workload.batch_size:,}, on {machine.name}\n")
    print(table(("precision", "verdict", "weights", "longest context", "est. tok/s"), rows, left=2))
    print()
    for fit in found:
        print(f"{fit.placement.precision.label}: {fit.placement.summary}")
    if importlib.util.find_spec("bitsandbytes") is None:
        print("int8 and nf4 are left out: they need bitsandbytes, run `pip install bitsandbytes`.")
    return int(all(fit.placement.verdict == "does_not_fit" for fit in found))


def _lab(arguments: Sequence[str]) -> int:
    missing = [name for name in _LAB_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"`workbench lab` needs {', '.join(missing)}: run `pip install 'llm-device-workbench[lab]'`.")
    notebook = Path(_NOTEBOOK)
    if not notebook.exists():
        here = Path(__file__).parent
        # The wheel carries it beside this file; a checkout has it in its own folder.
        sources = (here / _NOTEBOOK, here.parent / "notebooks" / _NOTEBOOK)
        shutil.copyfile(next((path for path in sources if path.exists()), sources[0]), notebook)
    importlib.import_module("jupyterlab.labapp").main([str(notebook), *arguments])
    return 0
