"""Load a model exactly where its placement says, and check the real tensors against it."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.adapters import attach_adapters, base_note, check_all_here, read_adapters
from workbench.checkpoint import as_dict
from workbench.four_bit import keep_scales
from workbench.hardware import Machine, device_label, format_bytes
from workbench.kernels import (
    choose_backend,
    import_gptqmodel,
    quiet_optimum,
    settle_kernels,
    spared_from_initialization,
)
from workbench.load_guard import after_running_out, check_room, is_out_of_memory, unloadable_because
from workbench.load_progress import check_cancelled, download_bar, files_of, reporting
from workbench.model import check_weights, read_config, refuses_unknown
from workbench.offload import attach as attach_offload
from workbench.placement import Placement, place
from workbench.precision import GPTQ, FourBit
from workbench.quantize_4bit import fast_quantization
from workbench.saving import make_savable
from workbench.session import Cancelled, LoadReport, Progress, Session, give_back, in_worker
from workbench.sizes import measure_weights, sizes_of
from workbench.skeleton import Skeleton, read_skeleton, turn
from workbench.threads import SpareThreads
from workbench.weight_cache import drop, find, keep, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from workbench.offload import OffloadKind
    from workbench.recipe import Recipe

_TOKENIZER_SIGNS = ("tokenizer", "vocab", "merges.txt", "spiece", "sentencepiece", ".tiktoken", "tekken")  # in names
_WORTH_KEEPING_SECONDS = 1.0  # what is quantized faster than that is quantized again


@refuses_unknown
def load(
    recipe: Recipe,
    *,
    machine: Machine | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
    offload: OffloadKind = "workbench",
    anyway: bool = False,
    keep_quantized: bool = True,
) -> Session:
    """Load a model exactly as its placement says, and check the real tensors against it.

    Args:
        recipe: The choices.
        machine: This machine as the preview saw it (``Machine.detect()``), so that what was previewed is what is
            loaded; None looks afresh.
        progress: Called from the worker thread with a :class:`Progress`.
        cancel: Set it to stop the load; it stops at the next weight.
        offload: Who brings in the layers that wait on the CPU or disk: ``"workbench"`` reads them ahead of the
            computation (accelerate takes over where that cannot be, and the report says why); ``"accelerate"`` leaves
            it to accelerate's hooks. The results are the same.
        anyway: Load what does not fit by our count or into what is free now, where that can be tried at all.
        keep_quantized: Keep weights that are quantized while they are loaded, where that takes more than a moment, for
            the next load of the same; see :func:`workbench.kept_weights`.

    Returns:
        The session.

    Raises:
        DoesNotFit: If there is too little memory or disk; a ValueError that knows what would fit.
        ValueError: If the recipe cannot be loaded here; the sentence says why and what would work.
        Cancelled: If ``cancel`` was set.
    """
    if offload not in ("workbench", "accelerate"):
        raise ValueError(f"offload is 'workbench' or 'accelerate', not {offload!r}.")
    cancel = cancel or threading.Event()
    attempt = functools.partial(
        _load,
        recipe,
        machine,
        progress or (lambda _: None),
        cancel,
        offload=offload,
        anyway=anyway,
        keep_quantized=keep_quantized,
    )

    def work() -> Session:
        try:
            return attempt()
        except _KeptIsDamaged:
            pass  # outside, its frames are gone with what they hold
        return attempt(anew=True)

    return in_worker(work, cancel.set)


class _KeptIsDamaged(Exception):  # noqa: N818 - nobody sees it
    """Quantized weights were kept from an earlier load, and are of no use."""


def _load(
    recipe: Recipe,
    machine: Machine | None,
    progress: Callable[[Progress], None],
    cancel: threading.Event,
    *,
    offload: OffloadKind,
    anyway: bool,
    keep_quantized: bool,
    anew: bool = False,
) -> Session:
    started = time.perf_counter()
    progress(Progress(stage="resolve", done=0, total=None, text="looking where everything goes"))
    here = Machine.detect()
    if machine is not None and machine.name != here.name:
        raise ValueError(f"The preview is for {machine.name!r}, not for this machine: pick 'This machine' to load.")
    skeleton = read_skeleton(recipe.model)
    stated = skeleton.stored if isinstance(skeleton.stored, GPTQ) else None
    if stated is not None and isinstance(recipe.precision, GPTQ):
        stated = replace(stated, backend=recipe.precision.backend)  # the rest is as it was made
    if isinstance(recipe.precision, GPTQ) and skeleton.quantized_as is None:
        raise ValueError(
            f"{skeleton.source.title} is not quantized, and GPTQ is not done while loading: quantize it first with "
            "workbench.quantize(recipe, output_dir), then load that folder."
        )
    placement = place(recipe, machine=machine or here, skeleton=skeleton, advice=False)
    if placement.verdict == "does_not_fit":  # only then is advice worth its time
        placement = place(recipe, machine=machine or here, skeleton=skeleton)
    why = unloadable_because(placement, skeleton)
    if why is not None:
        raise ValueError(why)
    if recipe.adapters:
        check_all_here(placement)
    check_room(placement, here, skeleton, recipe.offload_folder or tempfile.gettempdir(), anyway=anyway)
    check_cancelled(cancel)

    offload_folder = None
    if "disk" in placement.device_map.values() and recipe.offload_folder is None:
        offload_folder = tempfile.TemporaryDirectory(prefix="workbench-offload-", ignore_cleanup_errors=True)
    folder = recipe.offload_folder if offload_folder is None else offload_folder.name
    model = reader = None
    keeps = keep_quantized and not getattr(recipe.precision, "has_fp16_weight", False)  # nothing is quantized at rest
    key = key_of(skeleton, placement) if keeps else None
    kept = None if key is None or anew else find(key)
    doubtful: Path | None = None  # what is kept, until it has proved to be whole
    quantizes = kept is None and recipe.precision.package is not None and skeleton.quantized_as is None
    steps = reporting(
        progress,
        cancel,
        stage="quantize" if quantizes else "read",
        sizes={
            t.name: t.before_bytes if quantizes else t.after_bytes for t in sizes_of(skeleton, recipe.precision).tensors
        },
        files=files_of(skeleton.source),
    )
    try:
        check_weights(skeleton.source)
        with turn.work(), steps:
            kernel: tuple[str, ...] = ()
            config = None
            if stated is not None:
                config, kernel = _with_kernel(stated, skeleton, placement)
            elif skeleton.quant_method == "bitsandbytes":
                config = _without_offload(skeleton)
            with contextlib.ExitStack() as around:
                if skeleton.quant_method in ("awq", "gptq"):
                    import_gptqmodel()
                    around.enter_context(quiet_optimum())
                    around.enter_context(spared_from_initialization(skeleton.model_class))
                around.enter_context(_spared_from_random_numbers())
                if quantizes and isinstance(recipe.precision, FourBit):
                    around.enter_context(fast_quantization(functools.partial(check_cancelled, cancel)))
                around.enter_context(SpareThreads())
                began = time.perf_counter()
                bar = download_bar(progress, cancel)
                doubtful = kept
                model, info = _from_pretrained(placement, skeleton, folder, bar, config, kept)
                read_seconds = time.perf_counter() - began
            make_savable(model)
            if skeleton.quant_method in ("awq", "gptq"):
                settle_kernels(model)
        check_cancelled(cancel)
        progress(Progress(stage="check", done=0, total=None, text="checking the tensors against the preview"))
        bare = placement  # the adapters come last: what is kept for later loads has none
        if recipe.adapters:
            bare = place(recipe.with_(adapters=()), machine=placement.machine, skeleton=skeleton, advice=False)
        report = _check(model, info, bare, time.perf_counter() - started)
        cached = _keep(key, model, placement, skeleton, read_seconds) if quantizes and report.matches else ()
        if anew:
            cached = ("Quantized weights kept from an earlier load were damaged: they were made anew.", *cached)
        if kept is not None:
            if not report.matches:  # as it did when they were kept
                raise _KeptIsDamaged  # noqa: TRY301 - what goes wrong is tidied up in one place
            doubtful = None
            cached = ("The quantized weights were kept from an earlier load.",)
        peft_model = attach_adapters(model, recipe.adapters)
        if peft_model is not None:
            report = _check(model, info, placement, time.perf_counter() - started)
        notes = [base_note(adapter, skeleton) for adapter in read_adapters(recipe.adapters)]
        report = replace(report, lines=(*report.lines, *cached, *skeleton.source.notes, *kernel, *filter(None, notes)))
        if offload == "workbench":
            reader, lines = attach_offload(model, placement, folder)
            report = replace(report, seconds=time.perf_counter() - started, lines=(*report.lines, *lines))
    except BaseException as error:
        del model
        if offload_folder is not None:
            offload_folder.cleanup()
        ran_out = is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
        if ran_out or cancel.is_set():  # frames hold what was read so far
            error.__traceback__ = error.__cause__ = error.__context__ = None
        give_back()
        check_cancelled(cancel)  # libraries wrap what stopped a download in errors of their own
        if ran_out:
            raise after_running_out(placement, skeleton, f"Loading {skeleton.source.title}") from None
        if doubtful is not None and isinstance(error, Exception):  # damaged, or gone in the meantime
            drop(doubtful)
            raise _KeptIsDamaged from None
        raise
    session = Session(
        model=model,
        recipe=recipe,
        placement=placement,
        load_report=report,
        skeleton=skeleton,
        _offload=reader,
        _offload_folder=offload_folder,
    )
    for adapter in read_adapters(recipe.adapters):
        session.adapters.take(adapter, peft_model)
    if offload_folder is not None:  # else its removal with a forgotten session would be a warning
        weakref.finalize(session, offload_folder.cleanup)
    return session


def _with_kernel(stated: GPTQ, skeleton: Skeleton, placement: Placement) -> tuple[Any, tuple[str, ...]]:
    """The config of a quantized model with the kernel in it that is right for it here, and what is said of that."""
    from workbench.gptq_layers import quantized_shapes

    backend, lines = choose_backend(
        stated,
        quantized_shapes(skeleton),
        devices=placement.device_map.values(),
        dtype=placement.dtype,
        adapters=bool(placement.recipe.adapters),
    )
    config = read_config(skeleton.source)
    config.quantization_config = {**as_dict(config.quantization_config), "backend": backend}
    return config, lines


def _without_offload(skeleton: Skeleton) -> Any:
    """The config without what some checkpoints state: to keep in full precision what is on the CPU.

    What they hold is packed, whatever the device.
    """
    config = read_config(skeleton.source)
    stated = as_dict(config.quantization_config)
    config.quantization_config = {**stated, "llm_int8_enable_fp32_cpu_offload": False}
    return config


def _from_pretrained(  # noqa: PLR0917 - one call
    placement: Placement,
    skeleton: Skeleton,
    offload_folder: str | None,
    bar: type,
    config: Any = None,
    kept: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GgufConfig

    _quiet_bitsandbytes()
    if isinstance(placement.precision, FourBit):
        keep_scales()
    source = skeleton.source
    options: dict[str, Any] = {
        **(source.arguments if kept is None else {}),
        "use_safetensors": None if source.allow_pickle or source.gguf_file else True,
        "dtype": getattr(torch, placement.dtype),
        "device_map": dict(placement.device_map),
        "offload_folder": offload_folder,
        "offload_buffers": placement.recipe.offload_buffers,
        "output_loading_info": True,
    }
    if config is not None:
        options["config"] = config
    elif source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif (
        skeleton.quantized_as is None and kept is None
    ):  # a None here would hide what a quantized checkpoint says of itself
        options["quantization_config"] = placement.recipe.precision.to_config(placement.dtype)
    if not source.is_local and kept is None:
        options["tqdm_class"] = bar
    try:
        auto_class = AutoModelForSeq2SeqLM if skeleton.is_encoder_decoder else AutoModelForCausalLM
        model, info = auto_class.from_pretrained(source.location if kept is None else kept, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {source.title} are damaged or cut short ({error}): fetch them again."
        ) from None
    except (Cancelled, ValueError):
        raise
    except Exception as error:  # models from anywhere, in libraries that raise anything
        raise ValueError(f"{source.title} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    if kept is not None:  # it is the same model, wherever its weights were found
        model.config._name_or_path = model.name_or_path = source.location  # noqa: SLF001 - transformers' own name for it
    return model, info


def _keep(
    key: str | None, model: Any, placement: Placement, skeleton: Skeleton, read_seconds: float
) -> tuple[str, ...]:
    """Keep what was quantized for the next load, and say so."""
    if key is None or read_seconds < _WORTH_KEEPING_SECONDS:
        return ()
    title, label, size_bytes = skeleton.source.title, placement.precision.label, placement.total_bytes
    if not keep(key, model, title=title, precision=label, size_bytes=size_bytes):
        return ()
    return (f"The quantized weights are kept for the next load ({format_bytes(size_bytes)}).",)


@contextlib.contextmanager
def _spared_from_random_numbers() -> Iterator[None]:
    """Let linear modules be made on meta without drawing numbers that no memory takes: a fifth of a mapped load."""
    from torch import nn

    original = nn.Linear.reset_parameters

    def reset(module: nn.Linear) -> None:
        if not module.weight.is_meta:
            original(module)

    nn.Linear.reset_parameters = reset  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = original  # type: ignore[method-assign]


def _quiet_bitsandbytes() -> None:
    """Silence a warning that bitsandbytes logs for every layer of every token when it casts to float16 for int8."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def read_tokenizer(skeleton: Skeleton) -> tuple[Any | None, str]:
    """The model's tokenizer; or None and why, as the beginning of a sentence."""
    from transformers import AutoTokenizer

    source = skeleton.source
    try:
        return AutoTokenizer.from_pretrained(source.location, **source.arguments), ""
    except Exception as error:  # noqa: BLE001 - files from anywhere, in libraries that raise anything
        told = " ".join(str(error).split())[:300].rstrip(". ")
    there = any(sign in file.name.lower() for file in source.files for sign in _TOKENIZER_SIGNS)
    if source.files and not there and source.gguf_file is None:
        return None, f"{source.title} came without a tokenizer"
    return None, f"The tokenizer of {source.title} cannot be read ({told})"


# --- after the load ---------------------------------------------------------------------------------------------------


def _check(model: Any, info: dict[str, Any], placement: Placement, seconds: float) -> LoadReport:
    measured = measure_weights(model)
    predicted = {device: memory.weight_bytes for device, memory in placement.memory.items()}
    lines = []
    matches = True
    for device in dict.fromkeys((*predicted, *measured)):
        foretold, found = predicted.get(device, 0), measured.get(device, 0)
        label = device_label(device)
        if foretold == found:
            lines.append(f"{label}: {found:,} bytes of weights, as previewed.")
        else:
            matches = False
            lines.append(f"{label}: {found:,} bytes of weights, {found - foretold:+,} against the preview.")
    actual = getattr(model, "hf_device_map", None)  # models on one device have none
    if actual is not None and dict(actual) != placement.device_map:
        matches = False
        lines.append("The device map differs from the preview's.")
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        lines.append(
            f"{len(missing)} weights are not in the checkpoint and are RANDOM: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else ".")
        )
    return LoadReport(
        seconds=seconds, predicted_bytes=predicted, measured_bytes=measured, matches=matches, lines=tuple(lines)
    )
