"""Write a quantized model as a folder that transformers, gptqmodel, vLLM and AutoGPTQ read."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.gptq_layers import quantizable_modules
from workbench.hardware import format_bytes
from workbench.saving import front_matter

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.gptq import QuantizeReport
    from workbench.offload_gpu import GpuOffload
    from workbench.precision import GPTQ
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton


def write_folder(
    folder: Path,
    report: QuantizeReport,
    *,
    recipe: Recipe,
    skeleton: Skeleton,
    model: Any,
    tokenizer: Any,
    layer_files: list[Path],
    max_shard_size: str,
    started: float,
    notes: list[str],
) -> QuantizeReport:
    """Write weights, configs, tokenizer, recipe, report and model card.

    Args:
        folder: Is made.
        report: Without sizes, seconds and sentences.
        recipe: Saved beside the model.
        skeleton: The original.
        model: The model whose layers have been quantized; also one that is spread over devices.
        tokenizer: With its chat template.
        layer_files: The packed tensors, a safetensors file for each decoder layer.
        max_shard_size: Of one weight file.
        started: ``time.perf_counter()`` at the start of the run.
        notes: More sentences for the report.

    Returns:
        The whole report.
    """
    folder.mkdir(parents=True)
    state = _state(model, {m.name for m in report.modules}, layer_files)
    skipped = _skipped(skeleton, report)
    config = quantization_config(report.precision, skeleton, {m.name for m in report.modules}, skipped)
    original = model.config
    model.config = copy.deepcopy(original)
    model.config.quantization_config = config
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    finally:
        model.config = original
    del state
    (folder / "quantize_config.json").write_text(json.dumps(_autogptq_config(config), indent=2), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
    report = replace(
        report,
        after_bytes=_saved_bytes(folder),
        seconds=time.perf_counter() - started,
        lines=(),
    )
    report = replace(report, lines=tuple(_lines(report, skeleton, skipped, notes)))
    (folder / "quantize_report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    (folder / "README.md").write_text(_card(report, skeleton), encoding="utf-8")
    return report


def _state(model: Any, quantized: set[str], layer_files: list[Path]) -> dict[str, Any]:
    """Every tensor of the new checkpoint."""
    from safetensors.torch import load_file

    state = gathered_state(model)
    state = {name: tensor for name, tensor in state.items() if name.removesuffix(".weight") not in quantized}
    for file in layer_files:
        state |= load_file(file)
    return state


def gathered_state(model: Any, offload: GpuOffload | None = None) -> dict[str, Any]:
    """A model's state dict, with what waits elsewhere in its place.

    Args:
        model: A loaded model.
        offload: Ours under a GPU, which has what waits then; None is accelerate's.
    """
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    state: dict[str, Any] = model.state_dict()
    if not any(tensor.is_meta for tensor in state.values()):
        return state
    if offload is None:
        found: dict[str, Any] = get_state_dict_offloaded_model(model)
        return found
    waiting = offload.state()
    return {name: waiting.get(name, tensor) for name, tensor in state.items()}


def _saved_bytes(folder: Path) -> int:
    """Bytes of the tensors in the weight files, their headers left out."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        total += file.stat().st_size - 8 - header
    return total


def _skipped(skeleton: Skeleton, report: QuantizeReport) -> list[str]:
    """Linear modules in the decoder layers that stay as they are."""
    done = {m.name for m in report.modules}
    inside = tuple(f"{block}." for block in skeleton.decoder_blocks)
    return [name for name in skeleton.linear_modules if name.startswith(inside) and name not in done]


def planned_config(precision: GPTQ, skeleton: Skeleton) -> dict[str, Any]:
    """What config.json will say of a model that has yet to be quantized.

    Raises:
        ValueError: If it cannot be quantized so; the sentence names the module.
    """
    quantized = {name for names in quantizable_modules(skeleton, precision).values() for name in names}
    inside = tuple(f"{block}." for block in skeleton.decoder_blocks)
    skipped = [name for name in skeleton.linear_modules if name.startswith(inside) and name not in quantized]
    return quantization_config(precision, skeleton, quantized, skipped)


def quantization_config(precision: GPTQ, skeleton: Skeleton, quantized: set[str], skipped: list[str]) -> dict[str, Any]:
    """What config.json says of the quantization, for transformers, optimum, gptqmodel and vLLM.

    Args:
        precision: How it was done.
        skeleton: The original model.
        quantized: Full names of the quantized modules.
        skipped: Full names of the linear modules in the decoder layers that were left alone.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": precision.bits,
        "group_size": precision.group_size,
        "desc_act": precision.desc_act,
        "sym": precision.sym,
        "damp_percent": precision.damp_percent,
        "true_sequential": precision.true_sequential,
        "static_groups": False,
        "lm_head": False,
        "format": precision.format,
        "checkpoint_format": precision.format,
        "pack_dtype": "int32",
        "block_name_to_quantize": skeleton.decoder_blocks[0].rpartition(".")[0],
        "meta": {"quantizer": [f"{name}:{importlib.metadata.version(name)}" for name in ("gptqmodel", "optimum")]},
    }
    if skipped:
        # transformers asks for the ends of the names that are quantized, gptqmodel for patterns of those that are not.
        kinds = {re.sub(r"^\d+\.", "", name.removeprefix(config["block_name_to_quantize"] + ".")) for name in quantized}
        mixed = any(name.endswith(f".{kind}") for kind in kinds for name in skipped)
        config["modules_in_block_to_quantize"] = [sorted(quantized if mixed else kinds)]
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    return config


def _autogptq_config(config: dict[str, Any]) -> dict[str, Any]:
    """quantize_config.json as AutoGPTQ and older loaders read it."""
    extra = ("modules_in_block_to_quantize", "block_name_to_quantize", "format")
    return {**{k: v for k, v in config.items() if k not in extra}, "model_file_base_name": "model"}


def _lines(report: QuantizeReport, skeleton: Skeleton, skipped: list[str], notes: list[str]) -> list[str]:
    lines = [
        (
            f"{skeleton.source.title}: {format_bytes(report.before_bytes)} of weights became "
            f"{format_bytes(report.after_bytes)} ({report.precision.label}) in {report.seconds:.0f} s."
        ),
        f"Calibrated with {report.calibration.label}.",
    ]
    if report.perplexity_before is not None and report.perplexity_after is not None:
        change = report.perplexity_after / report.perplexity_before - 1
        lines.append(
            f"Perplexity on {report.evaluation_tokens:,} tokens of held-back text: {report.perplexity_before:.2f} "
            f"before, {report.perplexity_after:.2f} after ({change:+.1%})."
        )
    lines += notes
    unseen = [m.name for m in report.modules if not m.tokens]
    if unseen:
        lines.append(
            f"{len(unseen)} modules saw no calibration token and were rounded to nearest ({unseen[0]}, ...): give more "
            "samples."
        )
    worst = report.worst(3)
    typical = sorted(m.error for m in report.modules if m.error == m.error)
    if worst and worst[0].error > 2 * typical[len(typical) // 2]:
        names = ", ".join(f"{m.name} ({m.error:.1%})" for m in worst)
        lines.append(
            f"The outputs of these modules changed most: {names}; skip_modules with their names keeps them as they are."
        )
    if skipped:
        lines.append(
            f"{len(skipped)} modules were left alone; AutoGPTQ cannot read a folder with such, transformers and "
            "gptqmodel can."
        )
    share = 1 - sum(m.shape[0] * m.shape[1] for m in report.modules) / skeleton.parameter_count
    if share > 0.5:
        lines.append(
            f"{share:.0%} of the parameters are outside the quantized modules and stay as they were (embeddings, the "
            "head, fused experts)."
        )
    if report.precision.format == "gptq_v2":
        lines.append("Format gptq_v2: AutoGPTQ and other old loaders misread it without saying so.")
    return lines


def _card(report: QuantizeReport, skeleton: Skeleton) -> str:
    source, precision = skeleton.source, report.precision
    rows = [
        ("Method", "GPTQ (gptqmodel's), by Workbench"),
        ("Bits", f"{precision.bits}, {'symmetric' if precision.sym else 'asymmetric'}"),
        ("Group size", "whole rows" if precision.group_size == -1 else str(precision.group_size)),
        ("Act-order", "yes" if precision.desc_act else "no"),
        ("Format", f"`{precision.format}`"),
        ("Calibration", report.calibration.label),
        ("Weights before", format_bytes(report.before_bytes)),
        ("Weights after", format_bytes(report.after_bytes)),
    ]
    if report.perplexity_before is not None and report.perplexity_after is not None:
        rows += [
            ("Perplexity before", f"{report.perplexity_before:.3f}"),
            (
                "Perplexity after",
                f"{report.perplexity_after:.3f}, on {report.evaluation_tokens:,} tokens of other text",
            ),
        ]
    warning = (
        "\nThe format is `gptq_v2`: AutoGPTQ and other old loaders misread it without saying so.\n"
        if precision.format == "gptq_v2"
        else ""
    )
    return "\n".join(
        [
            front_matter(source, ["gptq", f"{precision.bits}-bit", "quantized"]),
            "",
            f"# {source.title}, {precision.label}",
            "",
            "| | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            warning,
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'FOLDER = "."  # this folder, or its id on the Hub; needs `pip install gptqmodel optimum`',
            'model = AutoModelForCausalLM.from_pretrained(FOLDER, device_map="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
            "```",
            "",
        ]
    )
