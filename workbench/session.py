"""A loaded model with its tokenizer: generate, stream, measure, unload.

All torch work runs in ONE long-lived thread, loading included: a second thread that computes brings a second pool of
OpenMP threads, and both get slower.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.model import refuses_unknown
from workbench.skeleton import turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workbench.hardware import DeviceId
    from workbench.placement import Placement
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton

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


def give_back() -> None:
    """Return freed memory to the system, where the allocators would keep it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)


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
    _offload: Any = field(default=None, repr=False)
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
        # An encoder and a decoder each have a context of their own.
        used = max(tokens, max_new_tokens) if self.skeleton.is_encoder_decoder else tokens + max_new_tokens
        if limit is not None and used > limit:
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

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model's folder, with its model card, as a repository on the Hub.

        Args:
            repo_id: ``"org/name"``, or ``"name"`` for the owner of the token.
            private: Make the repository private; a public one that exists is only written to with False.
            token: A token with write access; None is the one of ``huggingface_hub.login()``. Kept nowhere.

        Returns:
            The repository's address.

        Raises:
            ValueError: If the model is not a local folder, or the Hub does not take it.
        """
        from workbench.upload import push_folder

        return push_folder(self.skeleton.source, repo_id, private=private, token=token)

    def unload(self) -> None:
        """Drop the model and give its memory back. Other references to ``session.model`` keep it alive."""
        self.stop()
        in_worker(self._unload)

    def _unload(self) -> None:
        if self.model is None:
            return
        if self._offload is not None:
            self._offload.close()
            self._offload = None
        # The hooks hold the offloaded weights; removing them would load those back, so only cut the references.
        for hook in [m._hf_hook for m in self.model.modules() if hasattr(m, "_hf_hook")]:  # noqa: SLF001 - accelerate's
            hook.weights_map = hook.tied_params_map = None
        hook = None
        self.model = None
        if self._offload_folder is not None:
            self._offload_folder.cleanup()
        give_back()

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
