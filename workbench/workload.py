"""What the KV cache and the activations are for: context length and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.model import refuses_unknown

if TYPE_CHECKING:
    from collections.abc import Sequence


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Workload:
    """How the model will be used.

    Attributes:
        context_length: Tokens of prompt and answer together, for each sequence.
        batch_size: Sequences at a time.
    """

    context_length: int = 2048
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is no whole number of at least 1.
        """
        for name in ("context_length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, not {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one sequence costs beside the weights, as functions of its length.

    Attributes:
        cache: For each layer of the KV cache (offset, slope, ceiling), in bytes, bytes a token, bytes: a layer holds
            ``min(offset + slope * tokens, ceiling)``; the ceiling is what a sliding window or a state comes to.
        activations: For each block (name, constant, linear, quadratic): the peak of live activations while it runs in
            the prefill is ``constant + linear * tokens + quadratic * tokens ** 2`` bytes.
    """

    cache: tuple[tuple[int, float, int], ...]
    activations: tuple[tuple[str, float, float, float], ...]

    def cache_bytes(self, workload: Workload) -> tuple[int, ...]:
        """KV cache bytes for each cache layer when the context is full."""
        tokens, batch = workload.context_length, workload.batch_size
        return tuple(batch * min(round(offset + slope * tokens), ceiling) for offset, slope, ceiling in self.cache)

    def activation_bytes(self, workload: Workload) -> dict[str, int]:
        """Estimated peak of live activations in bytes for each block, for a prompt that fills the context."""
        tokens, batch = workload.context_length, workload.batch_size
        return {
            name: batch * max(0, round(constant + linear * tokens + quadratic * tokens**2))
            for name, constant, linear, quadratic in self.activations
        }

    def scaled(self, factor: int) -> Cost:
        """The same model in a dtype with ``factor`` times as many bytes an element."""
        return Cost(
            cache=tuple((factor * offset, factor * slope, factor * ceiling) for offset, slope, ceiling in self.cache),
            activations=tuple((name, factor * a, factor * b, factor * c) for name, a, b, c in self.activations),
        )


# Three short runs give each block's parabola, and two of them each cache layer's line; a long one gives its ceiling.
_PROMPTS = (64, 128, 256)
_LONG = 1 << 20


def measure_cost(module: Any, block_names: Sequence[str], decoder_blocks: Sequence[str]) -> Cost | None:
    """Run a model's own forward on the ``meta`` device to see what cache and activations it makes.

    Nothing is computed, so the size of the model hardly matters. The cache is exact for any architecture that fills
    one (sliding windows, latent attention, states); the activations are those of this forward with fused attention, an
    estimate: kernels take scratch memory of their own.

    Args:
        module: A causal language model on ``meta``, not quantized.
        block_names: The blocks to which peaks are attributed, in execution order.
        decoder_blocks: Those of them that have a share in the cache.

    Returns:
        The cost of one sequence, or None if the model cannot be run on ``meta``.
    """
    try:
        runs = [_watch_prefill(module, block_names, decoder_blocks, tokens) for tokens in _PROMPTS]
        with _fused_attention():
            ceiling = _cache_bytes(_prefill(module, _LONG))
    except Exception:  # noqa: BLE001 - models from anywhere; what cannot be run is shown as unknown
        return None
    (first, _), (second, _), _ = runs
    lines = tuple(_line(low, high, top) for low, high, top in zip(first, second, ceiling, strict=True))
    peaks = [run[1] for run in runs]
    return Cost(cache=lines, activations=tuple((n, *_parabola([p[n] for p in peaks])) for n in block_names))


def _line(low: int, high: int, top: int) -> tuple[int, float, int]:
    """Return (offset, slope, ceiling) of a cache layer from its bytes at two short lengths and a very long one."""
    x0, x1, _ = _PROMPTS
    if low < high == top:  # the window ends between the two lengths
        return 0, low / x0, top
    slope = (high - low) / (x1 - x0)
    return round(low - slope * x0), slope, top


def _parabola(values: list[int]) -> tuple[float, float, float]:
    """Return constant, linear and quadratic coefficient through the values at the prompt lengths."""
    x0, x1, x2 = _PROMPTS
    y0, y1, y2 = values
    slope01, slope12 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    quadratic = (slope12 - slope01) / (x2 - x0)
    linear = slope01 - quadratic * (x0 + x1)
    return y0 - linear * x0 - quadratic * x0**2, linear, quadratic


def _fused_attention() -> Any:
    """A context in which attention makes no matrix of all pairs, as the fused kernels of every device do not.

    On ``meta`` torch would take its plain formula, which does.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    class Fused(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.__contains__:
                return False  # models look for padding among the ids, which have no values here
            if func is scaled_dot_product_attention:
                query = args[0] if args else kwargs["query"]
                value = args[2] if len(args) > 2 else kwargs["value"]
                return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
            return func(*args, **kwargs)

    return Fused()


def _prefill(module: Any, tokens: int) -> Any:
    """Run a prompt of ``tokens`` ids, as ``generate`` does: with a cache and logits for the last token alone."""
    import inspect

    import torch

    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(module.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.no_grad():
        return module(input_ids=torch.zeros((1, tokens), dtype=torch.long, device="meta"), **options)


def _cache_bytes(output: Any) -> list[int]:
    """Bytes of each layer of the cache that a forward returned, less counters (what has no batch dimension)."""
    cache = output.get("past_key_values") or output.get("cache_params")
    layers = getattr(cache, "layers", None)
    if layers is None:
        layers = [cache] if cache is not None else []
    return [sum(t.nbytes for t in _tensors(layer, set()) if t.dim() > 1) for layer in layers]


def _tensors(value: Any, seen: set[int]) -> list[Any]:
    """Every tensor inside a cache layer: attributes, lists and dicts of them, each once."""
    import torch

    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        children = list(vars(value).values())
    else:
        return []
    return [tensor for child in children for tensor in _tensors(child, seen)]


def _watch_prefill(
    module: Any, block_names: Sequence[str], decoder_blocks: Sequence[str], tokens: int
) -> tuple[list[int], dict[str, int]]:
    """Return the bytes of each cache layer, and the peak of other live tensors while each block runs."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    weights = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}  # noqa: SLF001 - a storage's identity
    live: dict[int, int] = {}
    peaks = dict.fromkeys(block_names, 0)
    running = [block_names[0]]
    total_bytes = [0]

    def freed(key: int) -> None:
        total_bytes[0] -= live.pop(key)

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Adds up the storages that operators return, until they are freed."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage._cdata  # noqa: SLF001 - likewise
                    if key not in live and key not in weights:
                        live[key] = storage.nbytes()
                        total_bytes[0] += live[key]
                        weakref.finalize(storage, freed, key)
            peaks[running[0]] = max(peaks[running[0]], total_bytes[0])
            return result

    def enter(name: str) -> Any:
        def hook(_module: Any, _args: Any) -> None:
            running[0] = name

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(enter(name)) for name in block_names]
    try:
        with _fused_attention(), Watch():  # type: ignore[no-untyped-call]
            output = _prefill(module, tokens)
    finally:
        for handle in handles:
            handle.remove()
    # The cache is counted on its own: a layer's share is among the live tensors from that layer on.
    cache = _cache_bytes(output)
    shares = dict(zip(decoder_blocks, cache, strict=True)) if len(cache) == len(decoder_blocks) else {}
    held = 0
    for name in block_names:
        held += shares.get(name, 0)
        peaks[name] -= min(held, peaks[name])
    return cache, peaks
