"""A loaded model with its tokenizer: load it exactly where the preview said, generate, stream, measure, unload.

All torch work runs in ONE long-lived thread, loading included: a second thread that computes brings a second pool of
OpenMP threads, and both get slower.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.hardware import DeviceId, Machine, format_bytes
from workbench.model import check_weights, refuses_unknown
from workbench.placement import Placement, place
from workbench.sizes import measure_weights
from workbench.skeleton import Skeleton, read_skeleton, turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from workbench.recipe import Recipe

_T = TypeVar("_T")
_WORKER = "workbench-torch"


class Cancelled(Exception):  # noqa: N818 - it is an outcome that was asked for, no error
    """A load was cancelled; everything that it had taken is given back."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a load is.

    Attributes:
        stage: ``"plan"``, ``"download"``, ``"read"`` or ``"check"``.
        done: Bytes when downloading, weights when reading.
        total: Of how many; None if unknown.
        text: The same in words.
    """

    stage: str
    done: int
    total: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load came to.

    Attributes:
        seconds: From the start to the checked model.
        predicted_bytes: Device to the weight bytes that the placement foretold.
        measured_bytes: Device to the bytes of the tensors that are really there.
        matches: Whether bytes and device map are as foretold.
        lines: The findings in plain sentences.
    """

    seconds: float
    predicted_bytes: dict[DeviceId, int]
    measured_bytes: dict[DeviceId, int]
    matches: bool
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What one generation came to.

    Attributes:
        prompt_tokens: Tokens of the prompt, template included.
        new_tokens: Tokens generated.
        first_token_seconds: From the start to the first token.
        tokens_per_second: Of the tokens after the first; 0.0 with fewer than two.
        stopped: Whether it was stopped before its end.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    stopped: bool


@functools.lru_cache(maxsize=1)
def worker() -> ThreadPoolExecutor:
    """The one thread in which models are loaded and run."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=_WORKER)


def in_worker(work: Callable[[], _T], cancel: Callable[[], None] = lambda: None) -> _T:
    """Run work in the worker and wait; an interrupt of the waiting thread cancels the work."""
    if threading.current_thread().name.startswith(_WORKER):
        return work()
    future = worker().submit(work)
    try:
        return future.result()
    except KeyboardInterrupt:
        cancel()
        raise


@refuses_unknown
def load(
    recipe: Recipe,
    *,
    machine: Machine | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Session:
    """Load a model exactly as its placement says, and check the real tensors against it.

    Args:
        recipe: The choices.
        machine: This machine as the preview saw it (``Machine.detect()``), so that what was previewed is what is
            loaded; None looks afresh.
        progress: Called from the worker thread with a :class:`Progress`.
        cancel: Set it to stop the load; it stops at the next weight.

    Returns:
        The session.

    Raises:
        ValueError: If the recipe cannot be loaded here; the sentence says why and what would work.
        Cancelled: If ``cancel`` was set.
    """
    cancel = cancel or threading.Event()
    return in_worker(lambda: _load(recipe, machine, progress or (lambda _: None), cancel), cancel.set)


def _load(
    recipe: Recipe, machine: Machine | None, progress: Callable[[Progress], None], cancel: threading.Event
) -> Session:
    started = time.perf_counter()
    progress(Progress(stage="plan", done=0, total=None, text="planning"))
    here = Machine.detect()
    if machine is not None and machine.name != here.name:
        raise ValueError(f"The preview is for {machine.name!r}, not for this machine: pick 'This machine' to load.")
    skeleton = read_skeleton(recipe.model)
    placement = place(recipe, machine=machine or here, skeleton=skeleton)
    if placement.verdict == "does_not_fit":
        raise ValueError(" ".join((placement.summary, *placement.advice)))
    _check_free(placement, here)
    check_weights(skeleton.source)
    _check_cancelled(cancel)

    offload_folder = None
    if "disk" in placement.device_map.values():
        offload_folder = tempfile.TemporaryDirectory(prefix="workbench-offload-", ignore_cleanup_errors=True)
    folder = None if offload_folder is None else offload_folder.name
    model = None
    try:
        with turn.work(), _reporting(progress, cancel):
            model, info = _from_pretrained(placement, skeleton, folder, _download_bar(progress, cancel))
        _check_cancelled(cancel)
        progress(Progress(stage="check", done=0, total=None, text="checking the tensors against the preview"))
        tokenizer = _tokenizer(skeleton)
        report = _check(model, info, placement, time.perf_counter() - started)
    except BaseException:
        del model
        if offload_folder is not None:
            offload_folder.cleanup()
        _give_back()
        _check_cancelled(cancel)  # libraries wrap what stopped a download in errors of their own
        raise
    return Session(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        placement=placement,
        load_report=report,
        skeleton=skeleton,
        _offload_folder=offload_folder,
    )


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


def _from_pretrained(
    placement: Placement, skeleton: Skeleton, offload_folder: str | None, download_bar: type
) -> tuple[Any, dict[str, Any]]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _quiet_bitsandbytes()
    source = skeleton.source
    options: dict[str, Any] = {
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
        "use_safetensors": None if source.allow_pickle else True,
        "dtype": getattr(torch, placement.dtype),
        "device_map": dict(placement.device_map),
        "quantization_config": placement.recipe.precision.to_config(placement.dtype),
        "offload_folder": offload_folder,
        "output_loading_info": True,
    }
    if not source.is_local:
        options["tqdm_class"] = download_bar
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source.location, **options)
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


def _tokenizer(skeleton: Skeleton) -> Any | None:
    """The model's tokenizer, or None where it has none that can be read."""
    from transformers import AutoTokenizer

    source = skeleton.source
    try:
        return AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
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
        label = f"cuda:{device}" if isinstance(device, int) else device
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


def _give_back() -> None:
    """Return freed memory to the system, where the allocators would keep it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)


# --- the session ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Session:
    """A loaded model.

    Attributes:
        model: The ordinary ``transformers`` model; None after :meth:`unload`.
        tokenizer: Its tokenizer; None if the model came without.
        recipe: The choices that it was loaded with.
        placement: Where everything is.
        load_report: What the load came to.
        skeleton: What was known of it before.
        last_stats: What the last generation came to, or None.
    """

    model: Any
    tokenizer: Any | None
    recipe: Recipe
    placement: Placement
    load_report: LoadReport
    skeleton: Skeleton
    last_stats: GenerationStats | None = None
    _offload_folder: Any = field(default=None, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def generate(self, prompt: str, **options: Any) -> str:
        """Answer a prompt; the options are those of :meth:`stream`.

        Returns:
            The new text, up to a :meth:`stop`.

        Raises:
            ValueError: If an option is out of range, the prompt is too long, or the model is unloaded.
            TypeError: If an option is unknown; the valid ones are listed.
        """
        return "".join(self.stream(prompt, **options))

    @refuses_unknown
    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        system: str | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer a prompt piece by piece while it is computed, with the model's chat template where it has one.

        Args:
            prompt: What the user says.
            max_new_tokens: At most so many tokens.
            system: A system prompt, where the chat template knows one; None is the template's own.
            do_sample: Draw tokens at random in place of taking the likeliest.
            temperature: Of the drawing, above 0.
            top_p: Draw from the likeliest tokens that together have this probability.
            top_k: Draw from so many likeliest tokens; 0 for all.
            repetition_penalty: Above 1 discourages repeating.
            seed: Makes the drawing repeatable.

        Yields:
            Pieces of text; leaving the loop stops the generation.

        Raises:
            ValueError: As :meth:`generate`, at once and not at the first piece.
        """
        _check_range("max_new_tokens", max_new_tokens, int, low=1)
        _check_range("temperature", temperature, (int, float), low=1e-6)
        _check_range("top_p", top_p, (int, float), low=1e-6, high=1)
        _check_range("top_k", top_k, int, low=0)
        _check_range("repetition_penalty", repetition_penalty, (int, float), low=1e-6)
        inputs = self._encode(prompt, system)
        tokens = int(inputs["input_ids"].shape[1])
        limit = self.skeleton.context_length
        if limit is not None and tokens + max_new_tokens > limit:
            raise ValueError(
                f"The prompt's {tokens:,} tokens and {max_new_tokens:,} new ones are more than the {limit:,} that the "
                "model allows: shorten the prompt or lower max_new_tokens."
            )
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "repetition_penalty": float(repetition_penalty),
            # Without sampling they would only bring a warning that they are ignored.
            "temperature": float(temperature) if do_sample else None,
            "top_p": float(top_p) if do_sample else None,
            "top_k": top_k if do_sample else None,
        }
        return self._stream(inputs, options, seed)

    def stop(self) -> None:
        """Stop the generation that is running; it ends with the token that is being computed."""
        self._stop.set()

    def unload(self) -> None:
        """Drop the model and give its memory back. Other references to ``session.model`` keep it alive."""
        self.stop()
        in_worker(self._unload)

    def _unload(self) -> None:
        if self.model is None:
            return
        # The hooks hold the offloaded weights; removing them would load those back, so only cut the references.
        for hook in [m._hf_hook for m in self.model.modules() if hasattr(m, "_hf_hook")]:  # noqa: SLF001 - accelerate's
            hook.weights_map = hook.tied_params_map = None
        hook = None
        self.model = None
        if self._offload_folder is not None:
            self._offload_folder.cleanup()
        _give_back()

    def _encode(self, prompt: str, system: str | None) -> Any:
        if self.model is None:
            raise ValueError("This model is unloaded: load it again.")
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self.skeleton.source.title} came without a tokenizer: use session.model with your own.")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("Give a prompt: some text.")
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            if system:
                messages.insert(0, {"role": "system", "content": system})
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return tokenizer(f"{system}\n\n{prompt}" if system else prompt, return_tensors="pt")

    def _stream(self, inputs: Any, options: dict[str, Any], seed: int | None) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = self._stop = threading.Event()

        def run() -> None:
            try:
                with turn.work():
                    self._generate(inputs, options, seed, streamer, stop)
            finally:
                streamer.end()

        future = worker().submit(run)
        try:
            yield from filter(None, streamer)
        except GeneratorExit:
            stop.set()
            raise
        except KeyboardInterrupt:
            stop.set()
            future.exception()
            raise
        future.result()

    def _generate(
        self, inputs: Any, options: dict[str, Any], seed: int | None, streamer: Any, stop: threading.Event
    ) -> None:
        import torch
        from transformers import StoppingCriteriaList

        if self.model is None:
            raise ValueError("This model is unloaded: load it again.")
        device = self._input_device()
        inputs = {key: value.to(device) for key, value in inputs.items()}
        batch, prompt_tokens = inputs["input_ids"].shape
        times: list[float] = []

        def after_each_token(input_ids: Any, _scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            turn.pause()
            # A program that ends must not wait for a long answer.
            ends = stop.is_set() or not threading.main_thread().is_alive()
            return torch.full((batch,), ends, dtype=torch.bool, device=input_ids.device)

        started = time.perf_counter()
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model.generate(
                **inputs, **options, streamer=streamer, stopping_criteria=StoppingCriteriaList([after_each_token])
            )
        decoding = times[-1] - times[0]
        self.last_stats = GenerationStats(
            prompt_tokens=prompt_tokens,
            new_tokens=len(times),
            first_token_seconds=times[0] - started,
            tokens_per_second=(len(times) - 1) / decoding if len(times) > 1 and decoding > 0 else 0.0,
            stopped=stop.is_set(),
        )

    def _input_device(self) -> Any:
        embedding = self.model.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        home = getattr(hook, "execution_device", None)
        return embedding.weight.device if home is None else home


def _check_range(name: str, value: Any, kind: Any, *, low: float, high: float | None = None) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = f"from {low:g} to {high:g}" if high is not None else f"of at least {low:g}"
        whole = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {whole} {bound}, not {value!r}.")
