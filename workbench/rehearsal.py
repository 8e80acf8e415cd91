"""A model's own forward, run on the ``meta`` device with books kept about every block.

Nothing is computed there: operators only make tensors of the right shape, and their bytes are added up until they are
freed. Decoder layers of a kind behave alike, so one of each kind runs and the others let their input through.
"""

from __future__ import annotations

import inspect
import re
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class TooLongError(Exception):
    """A run takes more operators or more time than it may."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a prompt and the second step after it made, in bytes.

    Attributes:
        tokens: Of the prompt.
        cache: By cache layer; of a cache that is made as a whole the one size.
        prefill: By block, the peak of live tensors while it runs, less the cache and what ``kept`` has of layers
            before it.
        kept: By decoder layer, the storage of its share of the cache that no tensor of the cache shows: a sliding
            window's layer is a view of the whole prompt's.
        step: By block, the peak beside the cache in a decode step at ``tokens + 2``; empty if none was made.
        operators: That ran in the prefill.
        is_whole: Whether ``cache`` is all that is still alive after the prefill.
    """

    tokens: int
    cache: tuple[int, ...]
    prefill: dict[str, int]
    kept: dict[str, int]
    step: dict[str, int]
    operators: int
    is_whole: bool


class Rehearsal:
    """Runs a model's forward without values.

    Use it as a context: inside, blocks report when they begin, and layers that are like an earlier one do not run.

    Args:
        module: A causal language model on ``meta``, not quantized.
        blocks: Names of the blocks to which peaks are attributed.
        layers: Those of them that are decoder layers, in order.
        seconds: Of this thread's time, for all runs together: after them none goes on. Not of the clock's, so that what
            is found does not depend on what else the machine does.
    """

    def __init__(self, module: Any, blocks: Sequence[str], layers: Sequence[str], *, seconds: float) -> None:
        self._module = module
        self._blocks = blocks
        self._layers = layers
        self._deadline = time.thread_time() + seconds
        # The first layer stands for none: the embeddings outlive it, so other things are alive while it runs.
        kinds = _kinds(module, layers)
        firsts = {kind: layers[i] for i, kind in reversed(list(enumerate(kinds))) if i}
        self._stands_in = {name: firsts[kind] for name, kind in zip(layers[1:], kinds[1:], strict=True)}
        self._stands_in = {name: first for name, first in self._stands_in.items() if name != first}
        self._outputs: dict[str, _Output | None] = {}
        self._passed: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._watch: Any = None

    def __enter__(self) -> Rehearsal:  # noqa: PYI034 - typing.Self came with Python 3.11
        """Hook the blocks."""
        stand_ins = set(self._stands_in.values())
        for name in self._blocks:
            block = self._module.get_submodule(name)
            self._undo.append(block.register_forward_pre_hook(self._enter(name)).remove)
            if (name in stand_ins or name in self._stands_in) and "forward" not in vars(block):
                block.forward = (self._skip if name in self._stands_in else self._show)(name, block.forward)
                self._undo.append(lambda block=block: delattr(block, "forward"))  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the model as it was."""
        for undo in self._undo:
            undo()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any) -> None:
            if self._watch is not None:
                self._watch.enter(name)

        return hook

    def _show(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def shown(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._outputs[name] = _Output.of(output)
            return output

        return shown

    def _skip(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skipped(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            output = self._outputs.get(self._stands_in.get(name, ""))
            if output is None or output.shape != getattr(hidden, "shape", None):
                return forward(*args, **kwargs)
            self._passed.add(name)
            return output.with_hidden(hidden)

        return skipped

    def run(self, tokens: int, *, step: bool = False, most_operators: int | None = None) -> Run:
        """Run a prompt and, if asked to, two tokens after it, of which the second is watched.

        Raises:
            TooLongError: If it takes more than ``most_operators``, or the time is up.
            Exception: Whatever the model has against it.
        """
        result = self._run(tokens, step=step, most_operators=most_operators)
        if result is None:
            self._stands_in = {}
            result = self._run(tokens, step=step, most_operators=most_operators)
        assert result is not None  # noqa: S101 - where none stood in, none is in the way
        return result

    def _run(self, tokens: int, *, step: bool, most_operators: int | None) -> Run | None:
        """Run it; None if no layer may stand in for another here."""
        import torch

        parameters = inspect.signature(self._module.forward).parameters
        options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in parameters:
            options["logits_to_keep"] = 1
        two_sides = getattr(getattr(self._module, "config", None), "is_encoder_decoder", False)
        watch = self._watch = _watch(self._module, most_operators, self._deadline)

        def forward(count: int) -> Any:
            self._outputs.clear()
            self._passed.clear()
            watch.visits.clear()
            watch.enter(self._blocks[0])
            ids = torch.zeros((1, count), dtype=torch.long, device="meta")
            return self._module(input_ids=ids, **({"decoder_input_ids": ids} if two_sides else {}), **options)

        try:
            with torch.no_grad(), without_values(), watch:
                output = forward(tokens)
                operators = watch.operators
                name = next((n for n in ("past_key_values", "cache_params", "state") if output.get(n) is not None), "")
                cache = output[name] if name else None
                del output
                alive_bytes = watch.live_bytes
                shares = _shares(cache, [self._module.get_submodule(layer) for layer in self._layers])
                is_whole = sum(share.storage_bytes for share in shares) == alive_bytes
                if not self._fill_in(shares):
                    return None
                result = Run(
                    tokens=tokens,
                    cache=tuple(share.size_bytes for share in shares),
                    prefill=self._prefill_peaks(shares),
                    kept=self._by_layer(shares, lambda share: share.storage_bytes - share.size_bytes),
                    step={},
                    operators=operators,
                    is_whole=is_whole,
                )
                if step and name in parameters and not two_sides:
                    options[name] = cache
                    with suppress(Exception):  # whatever the model has against it, the prompt was run
                        forward(1)
                        base_bytes = watch.live_bytes
                        forward(1)
                        result = replace(result, step=self._step_peaks(base_bytes))
        finally:
            self._watch = None
        return result

    def _fill_in(self, shares: list[_Share]) -> bool:
        """Give the layers that did not run the share of the one that stood in for them; False if that cannot be."""
        places = {name: i for i, name in enumerate(self._layers)}
        passed = {places[name]: places[self._stands_in[name]] for name in self._passed}
        if len(shares) != len(places):
            return not passed or len(shares) == 1
        if any(shares[i].storage_bytes for i in passed) or not any(share.storage_bytes for share in shares):
            return not passed
        for i, first in passed.items():
            shares[i] = shares[first]
        return True

    def _by_layer(self, shares: list[_Share], size: Callable[[_Share], int]) -> dict[str, int]:
        if len(shares) != len(self._layers):
            return dict.fromkeys(self._layers, 0)
        return {name: size(share) for name, share in zip(self._layers, shares, strict=True)}

    def _timeline(self, storage_bytes: Mapping[str, int]) -> list[_Visit]:
        """The blocks' turns as they would be if every layer ran and left so much behind."""
        stand_ins = {visit.name: visit for visit in self._watch.visits}
        added = 0
        turns = []
        for visit in self._watch.visits:
            like = stand_ins[self._stands_in[visit.name]] if visit.name in self._passed else visit
            entry = visit.entry + added
            turns.append(_Visit(name=visit.name, entry=entry, peak=entry + like.peak - like.entry))
            if visit.name in self._passed:
                added += storage_bytes.get(visit.name, 0)
        return turns

    def _prefill_peaks(self, shares: list[_Share]) -> dict[str, int]:
        storage = self._by_layer(shares, lambda share: share.storage_bytes)
        sizes = self._by_layer(shares, lambda share: share.size_bytes)
        peaks = dict.fromkeys(self._blocks, 0)
        held = 0 if any(storage.values()) else sum(share.size_bytes for share in shares)
        for visit in self._timeline(storage):
            peaks[visit.name] = max(peaks[visit.name], visit.peak - held - sizes.pop(visit.name, 0))
            held += storage.pop(visit.name, 0)
        return peaks

    def _step_peaks(self, base_bytes: int) -> dict[str, int]:
        peaks = dict.fromkeys(self._blocks, 0)
        for visit in self._timeline({}):
            peaks[visit.name] = max(peaks[visit.name], visit.peak - base_bytes)
        return peaks


# --- layers of a kind -------------------------------------------------------------------------------------------------


def _kinds(module: Any, layers: Sequence[str]) -> list[int]:
    """Return, for each decoder layer, the number of its kind.

    Alike are layers with the same classes, shapes, dtypes and settings throughout, but for where in the model they are,
    for which the config's lists say the same: those with an entry a layer, and those of the numbers of some layers.
    """
    config = getattr(module, "config", None)
    settings = {} if config is None else vars(config.get_text_config(decoder=True))
    lists = [v for v in settings.values() if isinstance(v, (list, tuple))]

    def told(index: int) -> tuple[Any, ...]:
        return tuple(
            repr(v[index]) if len(v) == len(layers) and not _is_place("layer", v[index], index) else index in v
            for v in lists
        )

    kinds: dict[Any, int] = {}
    return [
        kinds.setdefault((_behaviour(module.get_submodule(name), i), told(i)), len(kinds))
        for i, name in enumerate(layers)
    ]


def _behaviour(layer: Any, index: int) -> tuple[Any, ...]:
    found: list[Any] = []
    for path, part in layer.named_modules():
        found.append((path, type(part)))
        for tensors in (part._parameters, part._buffers):  # noqa: SLF001 - named_parameters() walks the tree each time
            found += [(name, t.shape, t.dtype) for name, t in tensors.items() if t is not None]
        for name, value in vars(part).items():
            # Fractions scale values, not shapes.
            if isinstance(value, (int, str, tuple, type(None))) and not name.startswith("_"):
                found.append((name, None if _is_place(name, value, index) else repr(value)))
    return tuple(found)


def _is_place(name: str, value: Any, index: int) -> bool:
    """Whether a setting says where in the model a layer is, or which other layer it goes with."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return re.search("idx|index|layer_id", name) is not None or (value == index and "layer" in name)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What a layer returns: a hidden state of a shape, and more if that is a tuple."""

    shape: Any
    others: tuple[Any, ...] | None

    @classmethod
    def of(cls, output: Any) -> _Output | None:
        """Take note of an output without keeping it alive; None if it is of another form."""
        import torch

        if isinstance(output, torch.Tensor):
            return cls(shape=output.shape, others=None)
        if type(output) is not tuple or not output or not isinstance(output[0], torch.Tensor):
            return None
        others = tuple(
            partial(torch.empty, o.shape, dtype=o.dtype, device="meta") if isinstance(o, torch.Tensor) else o
            for o in output[1:]
        )
        return cls(shape=output[0].shape, others=others)

    def with_hidden(self, hidden: Any) -> Any:
        """The same output with another hidden state, the other tensors made anew."""
        if self.others is None:
            return hidden
        return (hidden, *(other() if isinstance(other, partial) else other for other in self.others))


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Share:
    """A layer's share of the cache.

    Attributes:
        size_bytes: Of its tensors, less counters (what has no batch dimension).
        storage_bytes: Of the memory that they keep alive.
    """

    size_bytes: int
    storage_bytes: int

    @classmethod
    def of(cls, *values: Any) -> _Share:
        """Of all tensors inside."""
        tensors = [t for t in _tensors(list(values), set()) if t.is_meta]
        storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}  # noqa: SLF001 - a storage's identity
        return cls(size_bytes=sum(t.nbytes for t in tensors if t.dim() > 1), storage_bytes=sum(storages.values()))


def _shares(cache: Any, layers: Sequence[Any]) -> list[_Share]:
    """Return a share for each layer, or for each entry of a cache that is not cut by layers; it may be a single one."""
    if cache is None:  # some models keep it in the layers themselves
        return [_Share.of(*(_attributes(part) for part in layer.modules())) for layer in layers]
    parts = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    inside = [vars(part) for part in parts if part is not None] or [getattr(cache, "__dict__", {})]
    lists = [v for part in inside for v in part.values() if isinstance(v, (list, tuple)) and _tensors(v, set())]
    if not lists:
        return [_Share.of(cache)]
    length = max(len(layers), *map(len, lists))
    each = length // len(layers) if layers and length % len(layers) == 0 else 1  # several to a layer
    rows = [[v[i : i + each] for v in lists] for i in range(0, length, each)]
    return [_Share.of(*row) for row in rows]


def _attributes(module: Any) -> dict[str, Any]:
    """What hangs on a module beside its parameters, buffers and submodules."""
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}


def _tensors(value: Any, seen: set[int]) -> list[Any]:
    """Every tensor inside: attributes, lists and dicts of them, each once."""
    import torch

    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    elif hasattr(value, "__dict__") and not callable(value):
        children = list(vars(value).values())
    else:
        return []
    return [tensor for child in children for tensor in _tensors(child, seen)]


# --- operators without values -----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Visit:
    """A block's turn in a forward: bytes of all live tensors when it begins, and at most."""

    name: str
    entry: int
    peak: int


def _watch(module: Any, most_operators: int | None, deadline: float) -> Any:
    """A context that adds up the storages which operators return, until they are freed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    weights = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}  # noqa: SLF001 - a storage's identity
    live: dict[int, int] = {}
    recall = _memory()

    def value(tensor: Any) -> Any:
        return True if tensor.dtype == torch.bool else 0

    def hits(mask: Any) -> Any:
        # All of them, but for a mask over the experts, which are stepped through: one that takes every token.
        return torch.empty((mask.numel() if mask.dim() > 1 else 1, mask.dim()), dtype=torch.long, device="meta")

    aten = torch.ops.aten
    answers = {aten._local_scalar_dense.default: value, aten.nonzero.default: hits}  # noqa: SLF001 - its name

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.live_bytes = 0
            self.operators = 0
            self.visits: list[_Visit] = []

        def enter(self, name: str) -> None:
            self.visits.append(_Visit(name=name, entry=self.live_bytes, peak=self.live_bytes))

        def freed(self, key: int) -> None:
            self.live_bytes -= live.pop(key)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            if time.thread_time() > deadline or (most_operators is not None and self.operators > most_operators):
                raise TooLongError
            is_asked = func in answers and args[0].is_meta
            result = answers[func](*args) if is_asked else recall(func, args, kwargs or {})
            for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage._cdata  # noqa: SLF001 - likewise
                    if key not in live and key not in weights and tensor.is_meta:
                        live[key] = storage.nbytes()
                        self.live_bytes += live[key]
                        weakref.finalize(storage, self.freed, key)
            visit = self.visits[-1]
            visit.peak = max(visit.peak, self.live_bytes)
            return result

    return Watch()


def _memory() -> Callable[..., Any]:
    """Return a function that runs an operator, or makes what it made of inputs of the same shapes before.

    torch works shapes out in Python, some 100 microseconds an operator; layers of a kind, and steps through the tokens
    of a prompt, ask for the same ones again and again.
    """
    import torch

    known: dict[Any, tuple[Any, Any, Any]] = {}
    makes_new: dict[Any, bool] = {}  # operator -> whether it gives a tensor of its own and changes none

    def key_of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape, value.stride(), value.dtype, value.device
        if isinstance(value, (list, tuple)):
            return tuple(map(key_of, value))
        return type(value), value

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if func not in makes_new:
            schema = func._schema  # noqa: SLF001 - what it says of aliases is nowhere else
            ends = [*schema.arguments, *schema.returns]
            makes_new[func] = len(schema.returns) == 1 and all(end.alias_info is None for end in ends)
        if not makes_new[func]:
            return func(*args, **kwargs)
        key = (func, key_of(args), *((name, key_of(value)) for name, value in kwargs.items()))
        try:
            if key in known:
                shape, stride, dtype = known[key]
                return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        except TypeError:  # an argument that cannot be a key
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        # A storage larger than its tensor would be told wrongly.
        if isinstance(result, torch.Tensor) and result.is_meta and result.untyped_storage().nbytes() == result.nbytes:
            known[key] = result.shape, result.stride(), result.dtype
        return result

    return run


def without_values() -> Any:
    """A context for a forward without values.

    Attention makes no matrix of all pairs, as the fused kernels of every device do not (on ``meta`` torch would take
    its plain formula, which does). And what depends on values is answered as for a prompt without padding or packing,
    with experts in even demand.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class WithoutValues(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is scaled_dot_product_attention and is_fused(*args, **kwargs):
                return attend(*args, **kwargs)
            answer = answers.get(func)
            if answer is not None and isinstance(args[0], torch.Tensor) and args[0].is_meta:
                found = answer(*args, **kwargs)
                if found is not None:
                    return found
            return func(*args, **kwargs)

    def is_fused(query: Any, key: Any, *_: Any, enable_gqa: bool = False, **__: Any) -> bool:
        return query.dim() == 4 and (enable_gqa or query.shape[1] == key.shape[1])

    def attend(query: Any, _key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
        new = partial(torch.empty, dtype=query.dtype, device="meta")
        result = new((*query.shape[:-1], value.shape[-1]))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            new(attn_mask.shape)  # the kernels take numbers to add
        return result

    def nothing(_: Any, *dim: Any, **named: Any) -> Any:
        return None if dim or named else torch.zeros((), dtype=torch.bool)

    def even(whole: Any, sizes: Any, dim: int = 0) -> Any:
        if isinstance(sizes, int) or any(sizes):
            return None
        return whole.tensor_split(len(sizes), dim)

    answers: dict[Any, Callable[..., Any]] = {
        torch.Tensor.__contains__: lambda *_: False,  # models look for padding among the ids
        torch.Tensor.any: nothing,
        torch.any: nothing,
        torch.Tensor.tolist: lambda value: [0] * value.numel() if value.dim() == 1 else None,
        torch.Tensor.split: even,
        torch.split: even,
    }
    return WithoutValues()
