"""A loaded model with its tokenizer: generate, stream, measure, unload.

All torch work runs in ONE long-lived thread, loading included: a second thread that computes brings a second pool of
OpenMP threads, and both get slower.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from workbench.generation import GenerationStats, make_options
from workbench.model import refuses_unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from workbench.adapters import Adapters
    from workbench.chat import Chat
    from workbench.generation import ContextUse, Prefix
    from workbench.hardware import DeviceId
    from workbench.placement import Placement
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton
    from workbench.training import TrainingProgress, TrainingReport
    from workbench.training_memory import TrainingPlan

_T = TypeVar("_T")
_WORKER = "workbench-torch"


class Cancelled(Exception):  # noqa: N818 - it is an outcome that was asked for, no error
    """A load was cancelled; everything that it had taken is given back."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a load is.

    Attributes:
        stage: ``"resolve"``, ``"download"``, ``"read"`` or ``"quantize"``, and ``"check"``.
        done: Bytes.
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


@functools.lru_cache(maxsize=1)
def worker() -> ThreadPoolExecutor:
    """The one thread in which models are loaded and run."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=_WORKER)


def is_worker() -> bool:
    """Whether the calling thread is the worker, as it is in what reports progress."""
    return threading.current_thread().name.startswith(_WORKER)


def in_worker(work: Callable[[], _T], cancel: Callable[[], None] = lambda: None) -> _T:
    """Run work in the worker and wait; an interrupt of the waiting thread cancels the work."""
    if is_worker():
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
        recipe: The choices that it was loaded with.
        placement: Where everything is.
        load_report: What the load came to.
        skeleton: What was known of it before.
        last_stats: What the last generation came to, or None.
        changed: Whether its weights are others than those that were loaded: an adapter was merged into them.
    """

    model: Any
    recipe: Recipe
    placement: Placement
    load_report: LoadReport
    skeleton: Skeleton
    last_stats: GenerationStats | None = None
    changed: bool = False
    _offload: Any = field(default=None, repr=False)
    _offload_folder: Any = field(default=None, repr=False)
    _adapters: Any = field(default=None, repr=False)
    _no_tokenizer: str = field(default="", repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _prefixes: weakref.WeakSet[Prefix] = field(default_factory=weakref.WeakSet, repr=False)

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer, read when it is first asked for; None if the model came without."""
        from workbench.loading import read_tokenizer

        tokenizer, self._no_tokenizer = read_tokenizer(self.skeleton)
        return tokenizer

    def needed_tokenizer(self, what: str) -> Any:
        """The tokenizer, where nothing goes on without it.

        Args:
            what: What to say of that, as the end of a sentence.

        Raises:
            ValueError: If there is none, or it cannot be read.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self._no_tokenizer}{what}")
        return self.tokenizer

    def generate(self, prompt: str, **options: Any) -> str:
        """Answer a prompt; the options are those of :meth:`stream`.

        Returns:
            The new text, up to a :meth:`stop`.

        Raises:
            ValueError: If an option is out of range, the prompt is too long, or the model is unloaded.
            TypeError: If an option is unknown; the valid ones are listed.
        """
        return "".join(self.stream(prompt, **options))

    def stream(
        self, prompt: str, *, system: str | None = None, assistant: Session | None = None, **options: Any
    ) -> Iterator[str]:
        """Answer a prompt piece by piece while it is computed, with the model's chat template where it has one.

        Args:
            prompt: What the user says.
            system: A system prompt, where the chat template knows one; None is the template's own.
            assistant: A smaller model that is loaded too, and guesses what this one then checks: the same answer, in
                less time if it often guesses right.
            **options: Those of :class:`GenerationOptions`; ``options=GenerationOptions(...)`` gives them all.

        Yields:
            Pieces of text; leaving the loop stops the generation.

        Raises:
            ValueError: As :meth:`generate`, at once and not at the first piece.
        """
        from workbench.answering import answer, as_messages, encode_prompt

        chosen = make_options(options)
        inputs = encode_prompt(self, as_messages(prompt, system), chosen)
        return answer(self, inputs, chosen, assistant=assistant)

    def answers(self, prompts: Sequence[str], *, system: str | None = None, **options: Any) -> Iterator[str]:
        """Answer many prompts, as many at a time as fit into what the preview counted for the context.

        Args:
            prompts: Each is answered by itself.
            system: As in :meth:`stream`.
            **options: As in :meth:`stream`.

        Yields:
            One answer for each prompt, in their order.

        Raises:
            ValueError: As :meth:`generate`, at once.
        """
        from workbench.answering import answer_many, as_messages, encode_prompt

        chosen = make_options(options)
        if isinstance(prompts, str) or not prompts:
            raise ValueError("Give a list of prompts, or ask for one with generate().")
        encoded = [encode_prompt(self, as_messages(prompt, system), chosen) for prompt in prompts]
        return answer_many(self, encoded, chosen)

    def chat(self, *, system: str | None = None) -> Chat:
        """Begin a conversation.

        Args:
            system: A system prompt, where the chat template knows one.
        """
        from workbench.chat import Chat

        return Chat(self, system=system)

    def context_use(self, prompt: str, *, system: str | None = None, max_new_tokens: int = 64) -> ContextUse:
        """How much of the context a prompt and its answer would take; nothing is computed.

        Args:
            prompt: What the user would say.
            system: As in :meth:`stream`.
            max_new_tokens: As in :meth:`stream`.

        Raises:
            ValueError: If the model is unloaded or has no tokenizer.
        """
        from workbench.answering import as_messages, context_use

        return context_use(self, as_messages(prompt, system), max_new_tokens)

    def new_stop(self) -> threading.Event:
        """Make what :meth:`stop` sets from now on, for a generation that begins."""
        self._stop = threading.Event()
        return self._stop

    def remember(self, prefix: Prefix) -> None:
        """Note a cache that goes when the model goes."""
        self._prefixes.add(prefix)

    def stop(self) -> None:
        """Stop the generation that is running; it ends with the token that is being computed."""
        self._stop.set()

    @refuses_unknown
    def save(self, folder: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> Path:
        """Write the model as a folder that loads to the same weights: as they are now, quantized ones packed.

        With tokenizer, chat template, generation config, recipe and model card. Nothing appears at ``folder`` before
        it is whole.

        Args:
            folder: The new folder.
            overwrite: Replace the folder if it exists.
            max_shard_size: Of one weight file, as ``save_pretrained`` takes it.

        Returns:
            The folder.

        Raises:
            ValueError: If the model cannot be saved as it is, or not there; the sentence says what to do.
        """
        from workbench.saving import save

        return save(self, folder, overwrite=overwrite, max_shard_size=max_shard_size)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model, with a model card, as a repository on the Hub.

        A model that was quantized while it was loaded is uploaded quantized, one into which an adapter was merged as it
        is now; any other is the folder it came from.

        Args:
            repo_id: ``"org/name"``, or ``"name"`` for the owner of the token.
            private: Make the repository private; a public one that exists is only written to with False.
            token: A token with write access; None is the one of ``huggingface_hub.login()``. Kept nowhere.

        Returns:
            The repository's address.

        Raises:
            ValueError: If there is nothing to upload, or the Hub does not take it; the sentence says what to do.
        """
        from workbench.saving import push

        return push(self, repo_id, private=private, token=token)

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters beside the model: load, list, use, save, merge and remove them."""
        if self._adapters is None:
            from workbench.adapters import Adapters

            self._adapters = Adapters(self)
        adapters: Adapters = self._adapters
        return adapters

    def train_adapter(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        folder: str | Path | None = None,
        overwrite: bool = False,
        progress: Callable[[TrainingProgress], None] | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> TrainingReport:
        """Train a LoRA adapter on this model, full or quantized; its own weights do not change.

        The adapter is active afterwards. What it will take is worked out first, and refused if there is no room.

        Args:
            texts: Texts to continue, or (question, answer) pairs, of which only the answers are learnt; questions are
                put as :meth:`generate` puts them.
            folder: Save the adapter there. A run that is cancelled then goes on when it is called again.
            overwrite: Replace the folder if it exists.
            progress: Called from the worker thread after each step.
            cancel: Set it to stop after the step that is being done.
            **options: Those of :class:`TrainingOptions`: ``r``, ``alpha``, ``target_modules``, ``steps``, ...

        Returns:
            The report: losses, seconds, and what it took.

        Raises:
            ValueError: If it cannot be trained so; the sentence says what to do.
            Cancelled: If ``cancel`` was set.
        """
        from workbench.training import TrainingOptions, train_adapter

        return train_adapter(
            self,
            texts,
            options=TrainingOptions(**options),
            folder=folder,
            overwrite=overwrite,
            progress=progress,
            cancel=cancel,
        )

    def plan_training(self, texts: Sequence[str | tuple[str, str]], **options: Any) -> TrainingPlan:
        """What :meth:`train_adapter` would take beside the model; nothing is trained.

        Args:
            texts: As there.
            **options: As there.

        Raises:
            ValueError: As there, too little room included.
        """
        from workbench.training import TrainingOptions, preview

        return preview(self, texts, TrainingOptions(**options))

    def follow(self, **changes: Any) -> None:
        """Keep recipe and placement in step with what was changed in the loaded model.

        Args:
            changes: As :meth:`Recipe.with_` takes them, such as ``adapters``.
        """
        from workbench.placement import place

        self.recipe = self.recipe.with_(**changes)
        self.placement = place(self.recipe, machine=self.placement.machine, skeleton=self.skeleton, advice=False)

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
        self.model = self._adapters = None
        for prefix in self._prefixes:
            prefix.forget()
        if self._offload_folder is not None:
            self._offload_folder.cleanup()
        give_back()

    def _encode(self, prompt: str, system: str | None) -> Any:
        from workbench.answering import as_messages, encode

        return encode(self, as_messages(prompt, system))

    def _input_device(self) -> Any:
        embedding = self.model.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        home = getattr(hook, "execution_device", None)
        return embedding.weight.device if home is None else home
