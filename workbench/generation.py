"""One answer of a loaded model: what can be chosen, how its text comes out, and what it came to.

Everything that computes here runs in the one worker thread, inside ``transformers``' own ``generate``.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from workbench.model import refuses_unknown
from workbench.skeleton import turn
from workbench.threads import SpareThreads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workbench.skeleton import Skeleton
    from workbench.workload import Workload

WHEN_FULL = ("refuse", "stop", "cut")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What can be chosen for an answer, named as ``transformers.GenerationConfig`` names it.

    Attributes:
        max_new_tokens: At most so many tokens.
        do_sample: Draw tokens at random in place of taking the likeliest.
        temperature: Of the drawing, above 0.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from so many likeliest tokens; 0 for all.
        min_p: Draw from tokens that are at least this part as likely as the likeliest; 0 for all.
        repetition_penalty: Above 1 discourages repeating.
        seed: Makes the drawing repeatable.
        stop_strings: Texts before which an answer ends; they are left out of it.
        num_beams: Follow so many answers at a time and give the likeliest, which then comes in one piece.
        when_full: What to do if prompt and answer together exceed the model's context: ``"refuse"``, ``"stop"`` the
            answer where the context ends, or ``"cut"`` what was said first.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_strings: Sequence[str] = ()
    num_beams: int = 1
    when_full: str = "refuse"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ValueError: If one is out of range.
        """
        _check_range("max_new_tokens", self.max_new_tokens, int, low=1)
        _check_range("temperature", self.temperature, (int, float), low=1e-6)
        _check_range("top_p", self.top_p, (int, float), low=1e-6, high=1)
        _check_range("top_k", self.top_k, int, low=0)
        _check_range("min_p", self.min_p, (int, float), low=0, high=1)
        _check_range("repetition_penalty", self.repetition_penalty, (int, float), low=1e-6)
        _check_range("num_beams", self.num_beams, int, low=1)
        if self.seed is not None:
            _check_range("seed", self.seed, int, low=0)
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f'stop_strings are texts such as ["User:"], not {self.stop_strings!r}.')
        object.__setattr__(self, "stop_strings", tuple(stops))
        if self.when_full not in WHEN_FULL:
            raise ValueError(f"when_full is one of {', '.join(map(repr, WHEN_FULL))}, not {self.when_full!r}.")

    def to_generate(self) -> dict[str, Any]:
        """What ``model.generate`` takes for them; the seed and what the context does are not its business."""
        chosen: dict[str, Any] = {name: getattr(self, name) for name in ("max_new_tokens", "do_sample", "num_beams")}
        chosen["repetition_penalty"] = float(self.repetition_penalty)
        for name in _SAMPLING:  # without sampling they would only bring a warning that they are ignored
            value = getattr(self, name)
            chosen[name] = None if not self.do_sample or (name == "min_p" and not value) else value
        return chosen

    def to_python(self) -> dict[str, str]:
        """The same as arguments of ``model.generate`` in an exported program, where they differ from its defaults."""
        default = GenerationOptions()
        names = ["repetition_penalty", "num_beams", *(_SAMPLING if self.do_sample else ())]
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        chosen |= {n: getattr(self, n) for n in names if getattr(self, n) != getattr(default, n)}
        if self.stop_strings:
            chosen["stop_strings"] = list(self.stop_strings)
        written = {name: repr(value) for name, value in chosen.items()}
        return written | ({"tokenizer": "tokenizer"} if self.stop_strings else {})


def make_options(options: dict[str, Any]) -> GenerationOptions:
    """Options from keywords; ``options=GenerationOptions(...)`` among them stands for the rest.

    Raises:
        TypeError: If one is unknown.
        ValueError: If one is out of range.
    """
    given = options.pop("options", None)
    if given is None:
        return GenerationOptions(**options)
    if not isinstance(given, GenerationOptions):
        raise ValueError(f"options is a GenerationOptions, not {type(given).__name__}.")  # noqa: TRY004 - one kind of error for bad input
    return GenerationOptions(**{**{f.name: getattr(given, f.name) for f in fields(given)}, **options})


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What one generation came to.

    Attributes:
        prompt_tokens: Tokens of the prompt, template included.
        new_tokens: Tokens generated.
        first_token_seconds: From the start to the first token.
        tokens_per_second: Of the tokens after the first; 0.0 with fewer than two.
        stopped: Whether it was stopped before its end.
        reused_tokens: Of the prompt's tokens, those that an earlier turn had computed.
        threads: With how many threads torch computed at the end: as many as there were cores to spare.
        most_threads: With how many it computes where every core is to spare.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    stopped: bool
    reused_tokens: int = 0
    threads: int = 1
    most_threads: int = 1

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompt that were computed, for each second until the first new one."""
        return (self.prompt_tokens - self.reused_tokens) / self.first_token_seconds


# --- the context ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ContextUse:
    """How much of the context a prompt and its answer take.

    Attributes:
        prompt_tokens: Of the prompt, template and history included.
        new_tokens: The most that the answer may have.
        limit_tokens: What the model allows; None if it does not say.
        planned_tokens: What the preview counted memory for.
        cut_turns: Turns of a chat that are left out, the oldest first, so that the rest fits.
    """

    prompt_tokens: int
    new_tokens: int
    limit_tokens: int | None
    planned_tokens: int
    cut_turns: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.new_tokens

    @property
    def overflows(self) -> bool:
        """Whether that is more than the model allows."""
        return self.limit_tokens is not None and self.total_tokens > self.limit_tokens

    def __str__(self) -> str:
        """As one sentence."""
        said = f"{self.prompt_tokens:,} tokens of prompt and up to {self.new_tokens:,} new ones"
        if self.limit_tokens is not None:
            said += f" of {self.limit_tokens:,}"
        if self.cut_turns:
            said += f"; the oldest {self.cut_turns} turns are left out"
        if self.overflows:
            return f"{said}: more than the model allows."
        if self.total_tokens > self.planned_tokens:
            return f"{said}: more than the {self.planned_tokens:,} that the preview counted memory for."
        return f"{said}."


def room_for(options: GenerationOptions, prompt_tokens: int, skeleton: Skeleton) -> int:
    """How many new tokens are generated at most after a prompt.

    Raises:
        ValueError: If prompt and answer exceed the context and that is not to end the answer; or nothing is left.
    """
    limit, wanted = skeleton.context_length, options.max_new_tokens
    if limit is None:
        return wanted
    # An encoder and a decoder each have a context of their own.
    left = (limit if prompt_tokens <= limit else 0) if skeleton.is_encoder_decoder else limit - prompt_tokens
    if left >= wanted:
        return wanted
    if options.when_full == "refuse":
        raise ValueError(
            f"The prompt's {prompt_tokens:,} tokens and {wanted:,} new ones are more than the {limit:,} that the "
            "model allows: shorten the prompt or lower max_new_tokens, or say when_full='stop' or 'cut'."
        )
    if left < 1:
        raise ValueError(
            f"The prompt's {prompt_tokens:,} tokens leave no room in the {limit:,} that the model allows: shorten it."
        )
    return left


# --- the cache --------------------------------------------------------------------------------------------------------


class Prefix:
    """The cache of what a model has read and said, so that a longer text with the same beginning continues from there.

    Attributes:
        ids: The tokens that are in the cache.
        cache: A ``transformers`` cache, or None.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the cache."""
        self.ids: list[int] = []
        self.cache: Any = None

    def take(self, ids: list[int]) -> tuple[Any, int]:
        """The cache for a prompt, cut back to what it has in common with what was read before.

        Args:
            ids: The prompt's tokens.

        Returns:
            The cache, None if nothing can be reused, and for how many tokens it stands. It is the caller's now: what
            goes wrong with it must not come back.
        """
        cache, known = self.cache, self.ids
        self.forget()
        if cache is None:
            return None, 0
        same = next((i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids)))
        same = min(same, len(ids) - 1)  # the last one is computed, to know what follows
        if same < 1:
            return None, 0
        if same < len(known):
            # Windows and states that have moved on know no way back.
            if not cache.is_croppable:
                return None, 0
            try:
                cache.crop(same - len(known))
            except RuntimeError:
                return None, 0
        return cache, same

    def keep(self, cache: Any, ids: list[int]) -> None:
        """Keep a cache after an answer; the last token has not been through the model."""
        length = int(cache.get_seq_length())
        if 0 < length <= len(ids):
            self.cache, self.ids = cache, ids[:length]


CACHE_OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    # What it is for, compiling, takes longer than most answers.
    "static": {"cache_implementation": "static", "disable_compile": True},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},  # needs no other package
    "offloaded": {"cache_implementation": "offloaded"},
}


def cache_options(workload: Workload, skeleton: Skeleton, *, gpu: bool) -> dict[str, Any]:
    """What ``generate`` takes for a choice of cache.

    Raises:
        ValueError: If this machine or model cannot have it; the sentence says why.
    """
    why_not = workload.cache_refused_because(skeleton.config, gpu=gpu)
    if why_not is not None:
        raise ValueError(why_not)
    return dict(CACHE_OPTIONS[workload.cache])


# --- the text ---------------------------------------------------------------------------------------------------------


class TextStream:
    """Turns tokens into text as they come, up to a stop string; a ``transformers`` streamer.

    ``put`` and ``end`` belong to the thread that computes, iterating to the one that reads.

    Attributes:
        found: Whether a stop string has come; what follows is dropped.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ids: list[int] = []
        self._from = self._done = 0  # tokens that the next text is decoded with, and those whose text is out
        self._held = ""
        self._prompt = True
        self.found = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then each new token or several of them."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.reshape(-1).tolist()
        before, now = self._decode(self._ids[self._from : self._done]), self._decode(self._ids[self._from :])
        if len(now) > len(before) and not now.endswith("�"):  # a character may take several tokens
            self._from, self._done = self._done, len(self._ids)
            self.say(now[len(before) :])

    def say(self, text: str) -> None:
        """Give out text, all but what may be the beginning of a stop string."""
        if self.found:
            return
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.found, text = True, text[: min(ends)]
        out = len(text) - (0 if self.found else self._held_back(text))
        self._held = text[out:]
        if text[:out]:
            self._pieces.put(text[:out])

    def end(self) -> None:
        """Give out what is left, and end the reader's loop."""
        if self._ids[self._done :]:
            before, now = self._decode(self._ids[self._from : self._done]), self._decode(self._ids[self._from :])
            self.say(now[len(before) :])
        if self._held and not self.found:
            self._pieces.put(self._held)
        self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        """Wait for pieces of text until the end."""
        while (piece := self._pieces.get()) is not None:
            yield piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _held_back(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = 0
        for stop in self._stops:
            fits = (n for n in range(min(len(stop) - 1, len(text)), longest, -1) if text.endswith(stop[:n]))
            longest = max(longest, next(fits, 0))
        return longest


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """A text up to its first stop string."""
    return text[: min((at for at in (text.find(stop) for stop in stop_strings) if at >= 0), default=len(text))]


# --- the run ----------------------------------------------------------------------------------------------------------


def run(
    model: Any,
    inputs: dict[str, Any],
    chosen: dict[str, Any],
    *,
    stop: threading.Event,
    seed: int | None = None,
    stream: TextStream | None = None,
    prefix: Prefix | None = None,
) -> tuple[Any, GenerationStats]:
    """Generate, in the worker thread.

    Args:
        model: The model.
        inputs: ``input_ids`` and the like, of shape (batch, tokens), where the model's embedding is.
        chosen: What ``generate`` takes beside them.
        stop: Ends it with the token that is being computed.
        seed: Makes the drawing repeatable, and leaves torch's own random numbers alone.
        stream: Takes the tokens as they come.
        prefix: What may be known of the prompt already, and takes what is known afterwards.

    Returns:
        The tokens, of shape (batch, prompt and answer; or for an encoder-decoder the answer), and what it came to.
    """
    import torch
    from transformers import StoppingCriteriaList

    prompt_tokens = int(inputs["input_ids"].shape[1])
    cache, reused = (None, 0) if prefix is None else prefix.take(inputs["input_ids"][0].tolist())
    if prefix is not None:
        if cache is None:
            cache = _new_cache(model)
        chosen = {**chosen, "past_key_values": cache}
    times: list[tuple[float, int]] = []

    def after_each_token(input_ids: Any, _scores: Any, **_: Any) -> Any:
        times.append((time.perf_counter(), int(input_ids.shape[1])))
        turn.pause()
        spare.look()
        # A program that ends must not wait for a long answer.
        ends = stop.is_set() or not threading.main_thread().is_alive() or (stream is not None and stream.found)
        return torch.full((input_ids.shape[0],), ends, dtype=torch.bool, device=input_ids.device)

    with torch.random.fork_rng(enabled=seed is not None), SpareThreads() as spare:
        if seed is not None:
            torch.manual_seed(seed)
        started = time.perf_counter()
        sequences = model.generate(
            **inputs, **chosen, streamer=stream, stopping_criteria=StoppingCriteriaList([after_each_token])
        )
        threads = spare.threads
    if prefix is not None:
        prefix.keep(cache, sequences[0].tolist())
    first, last = times[0], times[-1]
    seconds, tokens = last[0] - first[0], last[1] - first[1]
    before = first[1] - 1 if model.config.is_encoder_decoder else prompt_tokens
    return sequences, GenerationStats(
        prompt_tokens=prompt_tokens,
        new_tokens=last[1] - before,
        first_token_seconds=first[0] - started,
        tokens_per_second=tokens / seconds if tokens and seconds > 0 else 0.0,
        stopped=stop.is_set(),
        reused_tokens=reused,
        threads=threads,
        most_threads=spare.most,
    )


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _check_range(name: str, value: Any, kind: Any, *, low: float, high: float | None = None) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = f"from {low:g} to {high:g}" if high is not None else f"of at least {low:g}"
        whole = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {whole} {bound}, not {value!r}.")
