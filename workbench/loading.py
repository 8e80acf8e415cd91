"""Load a model exactly where its placement says, and check the real tensors against it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.checkpoint import as_dict
from workbench.hardware import Machine, device_label, format_bytes
from workbench.kernels import (
    choose_backend,
    import_gptqmodel,
    quiet_optimum,
    settle_kernels,
    spared_from_initialization,
)
from workbench.model import check_weights, read_config, refuses_unknown
from workbench.offload import attach as attach_offload
from workbench.placement import Placement, place
from workbench.precision import GPTQ
from workbench.session import Cancelled, LoadReport, Progress, Session, give_back, in_worker
from workbench.sizes import measure_weights
from workbench.skeleton import Skeleton, read_skeleton, turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from workbench.offload import OffloadKind
    from workbench.recipe import Recipe


@refuses_unknown
def load(
    recipe: Recipe,
    *,
    machine: Machine | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
    offload: OffloadKind = "workbench",
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

    Returns:
        The session.

    Raises:
        ValueError: If the recipe cannot be loaded here; the sentence says why and what would work.
        Cancelled: If ``cancel`` was set.
    """
    if offload not in ("workbench", "accelerate"):
        raise ValueError(f"offload is 'workbench' or 'accelerate', not {offload!r}.")
    cancel = cancel or threading.Event()
    return in_worker(lambda: _load(recipe, machine, progress or (lambda _: None), cancel, offload), cancel.set)


def _load(
    recipe: Recipe,
    machine: Machine | None,
    progress: Callable[[Progress], None],
    cancel: threading.Event,
    offload: OffloadKind,
) -> Session:
    started = time.perf_counter()
    progress(Progress(stage="plan", done=0, total=None, text="planning"))
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
    placement = place(recipe, machine=machine or here, skeleton=skeleton)
    if placement.verdict == "does_not_fit":
        raise ValueError(" ".join((placement.summary, *(placement.advice or ()))))
    if skeleton.source.gguf_file is not None and "disk" in placement.device_map.values():
        raise ValueError(
            f"{skeleton.source.title} is a GGUF file, of which transformers puts nothing on disk: raise the other "
            "budgets, or save the loaded model once with save_pretrained and name that folder."
        )
    if skeleton.not_loadable_because is not None:
        raise ValueError(
            f"{skeleton.source.title} is quantized ({skeleton.quantized_as}), and this machine cannot load it: "
            f"{skeleton.not_loadable_because}."
        )
    _check_free(placement, here)
    check_weights(skeleton.source)
    _check_cancelled(cancel)

    offload_folder = None
    if "disk" in placement.device_map.values() and recipe.offload_folder is None:
        offload_folder = tempfile.TemporaryDirectory(prefix="workbench-offload-", ignore_cleanup_errors=True)
    folder = recipe.offload_folder if offload_folder is None else offload_folder.name
    model = reader = None
    try:
        with turn.work(), _reporting(progress, cancel):
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
                model, info = _from_pretrained(placement, skeleton, folder, _download_bar(progress, cancel), config)
            if skeleton.quant_method in ("awq", "gptq"):
                settle_kernels(model)
        _check_cancelled(cancel)
        progress(Progress(stage="check", done=0, total=None, text="checking the tensors against the preview"))
        tokenizer = read_tokenizer(skeleton)
        report = _check(model, info, placement, time.perf_counter() - started)
        report = replace(report, lines=(*report.lines, *skeleton.source.notes, *kernel))
        if offload == "workbench":
            reader, lines = attach_offload(model, placement, folder)
            report = replace(report, seconds=time.perf_counter() - started, lines=(*report.lines, *lines))
    except BaseException:
        del model
        if offload_folder is not None:
            offload_folder.cleanup()
        give_back()
        _check_cancelled(cancel)  # libraries wrap what stopped a download in errors of their own
        raise
    session = Session(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        placement=placement,
        load_report=report,
        skeleton=skeleton,
        _offload=reader,
        _offload_folder=offload_folder,
    )
    if offload_folder is not None:  # else its removal with a forgotten session would be a warning
        weakref.finalize(session, offload_folder.cleanup)
    return session


def _check_free(placement: Placement, here: Machine) -> None:
    """Compare with what is free at this moment: the preview may be minutes old."""
    for device, memory in placement.memory.items():
        free = here.device(device).free_bytes
        if device != "disk" and memory.used_bytes > free:
            raise ValueError(
                f"{here.device(device).label} has {format_bytes(free)} free now, but {format_bytes(memory.used_bytes)} "
                "are needed: close other programs or models, or lower the budgets."
            )


def _check_cancelled(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("The load was cancelled.")


@contextlib.contextmanager
def _reporting(progress: Callable[[Progress], None], cancel: threading.Event) -> Iterator[None]:
    """Turn transformers' progress bar over the weights into our progress, and make each step a place to cancel."""
    import transformers

    here = threading.current_thread()

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.current_thread() is not here:  # somebody else's bar
            return factory(*args, **kwargs)
        return _Steps(args[0] if args else kwargs.get("iterable", ()), kwargs.get("total"), progress, cancel)

    previous = transformers.logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers.logging.set_tqdm_hook(previous)


class _Steps:
    """Stands in for a tqdm bar over the weights."""

    def __init__(
        self, items: Any, total: int | None, progress: Callable[[Progress], None], cancel: threading.Event
    ) -> None:
        self._items = items
        self._total = total if total is not None else (len(items) if hasattr(items, "__len__") else None)
        self._progress, self._cancel = progress, cancel

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(self._items):
            _check_cancelled(self._cancel)
            turn.pause()
            self._progress(
                Progress(stage="read", done=done, total=self._total, text=f"reading weights {done} of {self._total}")
            )
            yield item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None  # update, set_description, close, ...


def _with_kernel(stated: GPTQ, skeleton: Skeleton, placement: Placement) -> tuple[Any, tuple[str, ...]]:
    """The config of a quantized model with the kernel in it that is right for it here, and what is said of that."""
    from workbench.gptq_layers import quantized_shapes

    backend, lines = choose_backend(
        stated, quantized_shapes(skeleton), devices=placement.device_map.values(), dtype=placement.dtype
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


def _from_pretrained(
    placement: Placement, skeleton: Skeleton, offload_folder: str | None, download_bar: type, config: Any = None
) -> tuple[Any, dict[str, Any]]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GgufConfig

    _quiet_bitsandbytes()
    source = skeleton.source
    options: dict[str, Any] = {
        **source.arguments,
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
    elif skeleton.quantized_as is None:  # a None here would hide what a quantized checkpoint says of itself
        options["quantization_config"] = placement.recipe.precision.to_config(placement.dtype)
    if not source.is_local:
        options["tqdm_class"] = download_bar
    try:
        auto_class = AutoModelForSeq2SeqLM if skeleton.is_encoder_decoder else AutoModelForCausalLM
        model, info = auto_class.from_pretrained(source.location, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {source.title} are damaged or cut short ({error}): fetch them again."
        ) from None
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{source.title} ran out of memory while it was loaded, though the preview said that it fits; lower the "
            f"budgets by a GiB and try again. ({str(error).splitlines()[0]})"
        ) from None
    except (Cancelled, ValueError):
        raise
    except Exception as error:  # models from anywhere, in libraries that raise anything
        raise ValueError(f"{source.title} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    return model, info


def _download_bar(progress: Callable[[Progress], None], cancel: threading.Event) -> type:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Reports bytes in place of drawing, and ends a download that is cancelled; the next one resumes it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self._done, self._all = int(kwargs.get("initial") or 0), kwargs.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            _check_cancelled(cancel)
            self._done += int(n or 0)
            total = int(self._all) if self._all else None
            of = f" of {format_bytes(total)}" if total else ""
            progress(
                Progress(
                    stage="download", done=self._done, total=total, text=f"downloading {format_bytes(self._done)}{of}"
                )
            )
            return None

    return Bar


def _quiet_bitsandbytes() -> None:
    """Silence a warning that bitsandbytes logs for every layer of every token when it casts to float16 for int8."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def read_tokenizer(skeleton: Skeleton) -> Any | None:
    """The model's tokenizer, or None where it has none that can be read."""
    from transformers import AutoTokenizer

    source = skeleton.source
    try:
        return AutoTokenizer.from_pretrained(source.location, **source.arguments)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None


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
