"""The computed answer: where every layer goes, what it costs there, and whether it fits."""

from __future__ import annotations

import difflib
import itertools
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from workbench.adapters import adapter_bytes
from workbench.checkpoint import before_ampere
from workbench.hardware import DeviceId, Machine
from workbench.model import refuses_unknown
from workbench.packed import pack_model
from workbench.planner import plan
from workbench.precision import GPTQ, FourBit, FullPrecision, Int8
from workbench.sizes import Sizes, device_of, nearest, sizes_of
from workbench.skeleton import Block, MetaModel, Skeleton, read_skeleton, turn
from workbench.verdict import Advice, advise, judge, not_loadable_because
from workbench.verdict import longest_context as _search_context
from workbench.workload import Cost, Workload, measure_cost

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workbench.precision import Precision
    from workbench.recipe import Recipe
    from workbench.verdict import Attempt

Verdict = Literal["fits", "offloads", "does_not_fit"]


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What one device holds, in bytes.

    Attributes:
        weight_bytes: All tensors of the modules on it, quantization state and buffers included, after the load.
        kv_cache_bytes: The KV cache at the workload's full context, of the layers that run on it; None while unknown.
        activation_bytes: Estimate of the peak of live activations of the layers that run on it; None while unknown.
        reserved_bytes: Room for the largest layer that has to be brought here to run, when layers are offloaded.
        limit_bytes: The budget from ``max_memory``: as in accelerate, it bounds the weights that are kept here.
        capacity_bytes: What the device really has to give: free memory less its named reserve. Everything together
            (weights, cache, activations, reserve) must stay within it.
    """

    weight_bytes: int
    kv_cache_bytes: int | None
    activation_bytes: int | None
    reserved_bytes: int
    limit_bytes: int
    capacity_bytes: int

    @property
    def used_bytes(self) -> int:
        """Everything that is known to be needed."""
        return self.weight_bytes + (self.kv_cache_bytes or 0) + (self.activation_bytes or 0) + self.reserved_bytes

    @property
    def free_bytes(self) -> int:
        """What is left on the device; negative if it is exceeded."""
        return self.capacity_bytes - self.used_bytes


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block of the model and where it goes.

    Attributes:
        name: Module name, e.g. ``"model.layers.0"``.
        class_name: Its class.
        device: Where it is kept; None if no device that was offered has room.
        bytes_before: Its bytes in the model's own dtype.
        bytes_after: Its bytes in the chosen precision, quantization state included.
        quantized: Whether any weight in it is quantized.
    """

    name: str
    class_name: str
    device: DeviceId | None
    bytes_before: int
    bytes_after: int
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where everything goes.

    Attributes:
        device_map: Module name to device, exactly what ``from_pretrained`` is given; without what has no room.
        layers: The blocks in execution order.
        memory: For each device of the budget, in accelerate's order, what it will hold.
        verdict: ``"fits"``: every layer runs where it is kept. ``"offloads"``: some wait on the CPU or disk and are
            fetched to run. ``"does_not_fit"``: it cannot be loaded or used as asked.
        summary: The verdict in one sentence with numbers.
        advice: What to do about it, sentences with numbers that can be applied; may be empty, None if not asked for.
        unplaced: Modules for which no device that was offered has room.
        dtype: What the unquantized weights are kept in.
        precision: In which the weights are: the recipe's, or that of a checkpoint that is quantized already.
        total_bytes: Bytes of all weights after the load.
        kv_cache_bytes: The whole KV cache; None while unknown.
        machine: The machine that it was computed for.
        recipe: The choices that it was computed from.
    """

    device_map: dict[str, DeviceId]
    layers: tuple[Layer, ...]
    memory: dict[DeviceId, DeviceMemory]
    verdict: Verdict
    summary: str
    advice: tuple[Advice, ...] | None
    unplaced: tuple[str, ...]
    dtype: str
    precision: Precision
    total_bytes: int
    kv_cache_bytes: int | None
    machine: Machine = field(repr=False)
    recipe: Recipe = field(repr=False)

    @property
    def waiting(self) -> tuple[Layer, ...]:
        """The layers that are kept where they do not run, and are fetched each time."""
        runs_on = self.runs_on
        return tuple(layer for layer in self.layers if runs_on.get(layer.name) != layer.device)

    @property
    def crossings(self) -> int:
        """How often a token's hidden state is handed from one device to another on its way through the layers."""
        return sum(a != b for a, b in itertools.pairwise(self.runs_on.values()))

    @property
    def runs_on(self) -> dict[str, DeviceId]:
        """Layer name to the device that computes it, in execution order; without what has no room."""
        gpus = [d for d in self.memory if d not in ("cpu", "disk") and d in self.device_map.values()]
        main = gpus[0] if gpus else "cpu"
        waits = {"disk", "cpu"} if gpus else {"disk"}
        return {
            layer.name: main if layer.device in waits else layer.device
            for layer in self.layers
            if layer.device is not None
        }

    def __str__(self) -> str:
        """As a table of plain text."""
        from workbench.show import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from workbench.show import as_html

        return as_html(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._repr_html_()}

    def __rich__(self) -> Any:
        """For rich, which is there when it asks; as text, or it would read brackets as markup."""
        import importlib

        return importlib.import_module("rich.text").Text(str(self))


@refuses_unknown
def place(
    recipe: Recipe,
    *,
    machine: Machine | None = None,
    skeleton: Skeleton | None = None,
    measure: bool = True,
    advice: bool = True,
) -> Placement:
    """Compute where every layer goes and what it costs there. No weights are read.

    The four named strategies give what ``from_pretrained`` would do with the same ``max_memory`` on that machine.

    Args:
        recipe: The choices.
        machine: For which machine; None is this one as it is now.
        skeleton: The recipe's model, if it is already there; None reads it.
        measure: False leaves cache and activations unknown (None) unless they have been measured before; measuring
            takes up to a few seconds, once for each model and dtype.
        advice: False leaves the advice out, which is tried out with further plans and takes most of the time.

    Returns:
        The placement; one that does not fit is a verdict, not an error.

    Raises:
        ValueError: If the recipe cannot be meant for this model or machine; the sentence says what to do.
    """
    machine = machine or Machine.detect()
    skeleton = (skeleton or read_skeleton(recipe.model)).on(machine)
    _check_context(recipe.workload, skeleton)
    _check_skip_modules(recipe.precision, skeleton)
    attempt = attempts(recipe.precision, machine, skeleton, measure=measure)
    placement = attempt(recipe)
    # That no layer runs on a GPU is a verdict: another budget or machine may change it.
    why_not = recipe.workload.cache_refused_because(skeleton.config, gpu=True)
    if why_not is not None:
        raise ValueError(why_not)
    _check_compute_dtype(placement)
    verdict, summary = judge(placement, skeleton)
    placement = replace(placement, verdict=verdict, summary=summary)
    return replace(placement, advice=advise(placement, skeleton, attempt)) if advice else placement


def longest_context(placement: Placement, skeleton: Skeleton) -> int | None:
    """The longest context with which a placement's own map works.

    Args:
        placement: Of any machine.
        skeleton: Its model.

    Returns:
        Tokens for each sequence, at the placement's batch size and within what the model allows; 0 if none works, None
        while the cache is unknown.
    """
    if placement.kv_cache_bytes is None:
        return None
    skeleton = skeleton.on(placement.machine)
    if placement.unplaced or not_loadable_because(placement, skeleton) is not None:
        return 0
    attempt = attempts(placement.recipe.precision, placement.machine, skeleton, measure=False)
    return _search_context(placement, attempt, skeleton.context_length or _MOST_TOKENS)


_MOST_TOKENS = 1 << 20  # where a model names no limit


def attempts(precision: Precision, machine: Machine, skeleton: Skeleton, *, measure: bool) -> Attempt:
    """Make a function that places recipes of one model in one precision on one machine."""
    meta = skeleton.meta_model(precision)
    sizes = sizes_of(skeleton, precision)
    cost = _cost(skeleton, precision, measure=measure)

    def attempt(tried: Recipe, device_map: Mapping[str, DeviceId] | None = None) -> Placement:
        """Place, but do not judge, a recipe whose tensors are those of the given one."""
        budgets = _budgets(tried, machine)
        planned = device_map or _map(tried, machine, budgets, skeleton=skeleton, sizes=sizes, cost=cost)
        draft = Placement(
            device_map={name: device for name, device in planned.items() if device is not None and device in budgets},
            layers=(),
            memory={},
            verdict="does_not_fit",
            summary="",
            advice=None,
            unplaced=tuple(name for name, device in planned.items() if device not in budgets),
            dtype=meta.dtype,
            precision=skeleton.stored or tried.precision,
            total_bytes=0,
            kv_cache_bytes=None,
            machine=machine,
            recipe=tried,
        )
        return _account(draft, skeleton, sizes, cost, budgets)

    return attempt


def _map(
    recipe: Recipe,
    machine: Machine,
    budgets: Mapping[DeviceId, int],
    *,
    skeleton: Skeleton,
    sizes: Sizes,
    cost: Cost | None,
) -> Mapping[str, DeviceId | None]:
    if recipe.strategy == "packed":
        return pack_model(recipe, machine=machine, budgets=budgets, skeleton=skeleton, sizes=sizes, cost=cost)
    if recipe.strategy != "custom":
        return plan(recipe, skeleton, budgets)
    device_map = recipe.device_map or {}
    _check_custom_map(recipe, budgets, skeleton, sizes)
    return device_map


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_context(workload: Workload, skeleton: Skeleton) -> None:
    limit = skeleton.context_length
    if limit is not None and workload.context_length > limit:
        raise ValueError(
            f"{skeleton.source.title} allows a context of {limit:,} tokens; lower context_length from "
            f"{workload.context_length:,}."
        )


def _check_skip_modules(precision: Precision, skeleton: Skeleton) -> None:
    if isinstance(precision, FullPrecision) or not precision.skip_modules:
        return
    import re

    from transformers.quantizers.quantizers_utils import should_convert_module

    names = skeleton.linear_modules
    for pattern in precision.skip_modules:
        try:
            hits = [name for name in names if not should_convert_module(name, [pattern])]
        except re.error as error:
            raise ValueError(f"skip_modules: {pattern!r} is neither a module name nor a pattern ({error}).") from None
        if not hits:
            candidates = sorted({part for name in names for part in (name, name.rpartition(".")[2])})
            close = difflib.get_close_matches(pattern, candidates, n=3) or candidates[:3]
            raise ValueError(
                f"skip_modules: {skeleton.architecture} has no linear module {pattern!r}; close are "
                f"{', '.join(map(repr, close))}."
            )
    if isinstance(precision, GPTQ):
        return  # what is outside the decoder layers, a tied head among it, is left alone whatever is named
    for name in skeleton.linear_modules:
        if f"{name}.weight" in skeleton.tied and should_convert_module(name, list(precision.skip_modules)):
            raise ValueError(
                f"skip_modules leaves out {name!r}, whose weight is the embedding's and cannot be quantized: add it."
            )


def _check_compute_dtype(placement: Placement) -> None:
    precision = placement.recipe.precision
    if not isinstance(precision, FourBit) or precision.compute_dtype != "bfloat16":
        return
    for device in _gpus(placement.runs_on.values()):
        name = placement.machine.device(device).name
        if before_ampere(name):
            raise ValueError(
                f"compute_dtype='bfloat16' is not for {name}, which computes none (GPUs do from Ampere on): take "
                "'float16'."
            )


def _budgets(recipe: Recipe, machine: Machine) -> dict[DeviceId, int]:
    budgets = machine.parse_max_memory(recipe.max_memory)
    if recipe.max_memory is None and "disk" in (recipe.device_map or {}).values():
        budgets["disk"] = machine.device("disk").budget_bytes
    return budgets


def _check_custom_map(recipe: Recipe, budgets: Mapping[DeviceId, int], skeleton: Skeleton, sizes: Sizes) -> None:
    device_map, known = recipe.device_map or {}, sizes.module_names
    whole = skeleton.no_split_classes if recipe.no_split_module_classes is None else recipe.no_split_module_classes
    for name, device in device_map.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"device_map: {skeleton.architecture} has no module {name!r}{hint}")
        if device not in budgets:
            offered = ", ".join(map(repr, budgets))
            raise ValueError(f"device_map puts {name!r} on {device!r}, but the budget offers only {offered}.")
    missing = [t for t in sizes.tensors if device_of(t.name, device_map) is None]
    # Buffers of a module that is cut up may stay unnamed, as transformers' own maps leave them.
    missing = [t for t in missing if not (t.is_buffer and _is_cut(sizes.block_of[t.name], device_map))]
    if missing:
        modules = list(dict.fromkeys(sizes.block_of[t.name] for t in missing))
        shown = ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")
        raise ValueError(f"device_map leaves out {shown}: give each a device.")
    for block in skeleton.blocks:
        inside = [name for name in device_map if name.startswith(f"{block.name}.")]
        devices = {device_of(t.name, device_map) for t in sizes.tensors if sizes.block_of[t.name] == block.name}
        if inside and len(devices) > 1 and block.class_name in whole:
            raise ValueError(
                f"device_map splits {block.name}, but a {block.class_name} must stay on one device: give it one device "
                "in place of its parts."
            )
    for copy, original in skeleton.tied.items():
        if device_of(copy, device_map) != device_of(original, device_map):
            raise ValueError(f"device_map parts {copy} from {original}, which are one tensor: give both one device.")


def _is_cut(block: str, device_map: Mapping[str, DeviceId]) -> bool:
    """Whether a map names parts of a block."""
    return any(name.startswith(f"{block}.") for name in device_map)


_costs: weakref.WeakKeyDictionary[MetaModel, Cost | None] = weakref.WeakKeyDictionary()


def _cost(skeleton: Skeleton, precision: Precision, *, measure: bool) -> Cost | None:
    """Cache and activations of a model in the dtype that it computes in, measured once."""
    meta = skeleton.plain_model(precision.dtype if isinstance(precision, FullPrecision) else "auto")
    if meta not in _costs and measure:
        with turn.build():
            names = [block.name for block in skeleton.blocks]
            longest = skeleton.context_length
            cost = measure_cost(meta.module, names, skeleton.decoder_blocks, context_length=longest)
            if cost is None and meta.dtype != "bfloat16":
                # Some kernels (grouped experts) exist on meta for bfloat16 alone; only the bytes an element differ.
                other = skeleton.plain_model("bfloat16")
                cost = measure_cost(other.module, names, skeleton.decoder_blocks, context_length=longest)
                cost = cost and cost.scaled(2 if meta.dtype == "float32" else 1)
            _costs[meta] = cost
    return _costs.get(meta)


# --- accounting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Homes:
    """Where things are kept and where they run, as accelerate's hooks have it.

    Offloaded modules run on the first GPU of the map (without one, on the CPU), and their buffers stay there.
    """

    device_map: dict[str, DeviceId]
    main: DeviceId
    offloaded: frozenset[DeviceId]
    unquantized: frozenset[DeviceId]  # devices on which bitsandbytes leaves modules alone
    offload_buffers: bool  # those that the checkpoint holds

    @classmethod
    def of(cls, recipe: Recipe, device_map: dict[str, DeviceId], budgets: Mapping[DeviceId, int]) -> _Homes:
        used = set(device_map.values())
        gpus = [device for device in budgets if device in used and device not in ("cpu", "disk")]
        slow: frozenset[DeviceId] = frozenset({"cpu", "disk"})
        keeps = isinstance(recipe.precision, (Int8, FourBit)) and recipe.precision.fp32_cpu_offload
        # The names on the CPU and disk become skip_modules, and the root's name, "", ends every name.
        everywhere = device_map.get("") in slow
        return cls(
            device_map=device_map,
            main=gpus[0] if gpus else "cpu",
            offloaded=slow if gpus else frozenset({"disk"}),
            unquantized=(frozenset(budgets) if everywhere else slow) if keeps else frozenset(),
            offload_buffers=recipe.offload_buffers,
        )

    def runs_on(self, device: DeviceId) -> DeviceId:
        return self.main if device in self.offloaded else device


def _place_block(block: Block, sizes: Sizes, homes: _Homes, weights: dict[DeviceId, int]) -> Layer:
    """Account for a block; if its parts lie on several devices, the one with most of it stands for the block."""
    whole = sizes.blocks[block.name]
    cut = _is_cut(block.name, homes.device_map)
    pieces = sizes.parts_of(block.name) if cut else [whole]
    shares: dict[DeviceId | None, int] = {}
    quantized = False
    for piece in pieces:
        device = device_of(piece.name, homes.device_map)
        if device is None and cut and not piece.parameter_bytes:
            # transformers' maps name no buffers of a module that they cut up; it keeps them on the CPU.
            shares["cpu"] = shares.get("cpu", 0) + piece.buffer_bytes
            weights["cpu"] = weights.get("cpu", 0) + piece.buffer_bytes
            continue
        keep = device in homes.unquantized
        parameters = piece.kept_bytes if keep else piece.parameter_bytes
        if device == "disk":
            parameters -= piece.upcast_bytes  # it is fetched in the model's dtype, though kept in float32 elsewhere
        quantized |= piece.quantized and not keep
        shares[device] = shares.get(device, 0) + parameters + piece.buffer_bytes
        if device is not None:
            follows = piece.saved_buffer_bytes if homes.offload_buffers and device in homes.offloaded else 0
            weights[device] += parameters + follows
            if follows and device == "disk":
                weights[device] -= piece.saved_upcast_bytes
            home = homes.runs_on(device)
            weights[home] = weights.get(home, 0) + piece.buffer_bytes - follows
    if not shares:  # a tied copy, which the map names tensor by tensor and which holds nothing of its own
        inside = f"{block.name}."
        shares[next(device for name, device in homes.device_map.items() if name.startswith(inside))] = 0
    return Layer(
        name=block.name,
        class_name=block.class_name,
        device=max(shares, key=lambda d: shares[d]),
        bytes_before=whole.before_bytes,
        bytes_after=sum(shares.values()),
        quantized=quantized,
    )


def _with_adapters(
    layers: tuple[Layer, ...], recipe: Recipe, skeleton: Skeleton, homes: _Homes, weights: dict[DeviceId, int]
) -> tuple[Layer, ...]:
    """Count adapters where their modules run."""
    extra: dict[str, int] = {}
    for module, size in adapter_bytes(recipe.adapters, skeleton).items():
        block = nearest(module, {layer.name for layer in layers}) or layers[0].name
        extra[block] = extra.get(block, 0) + size
        device = device_of(module, homes.device_map)
        if device is not None:
            home = homes.runs_on(device)
            weights[home] = weights.get(home, 0) + size
    return tuple(replace(layer, bytes_after=layer.bytes_after + extra.get(layer.name, 0)) for layer in layers)


def _account(
    draft: Placement, skeleton: Skeleton, sizes: Sizes, cost: Cost | None, limits: Mapping[DeviceId, int]
) -> Placement:
    """Fill in layers and memory."""
    homes = _Homes.of(draft.recipe, draft.device_map, limits)
    weights = dict.fromkeys(limits, 0)
    layers = tuple(_place_block(block, sizes, homes, weights) for block in skeleton.blocks)
    if draft.recipe.adapters:
        layers = _with_adapters(layers, draft.recipe, skeleton, homes, weights)
    reserved = dict.fromkeys(limits, 0)
    runs_on: dict[str, DeviceId] = {}
    for layer in layers:
        if layer.device is not None:
            home = runs_on[layer.name] = homes.runs_on(layer.device)
            if layer.device in homes.offloaded and home in reserved:
                reserved[home] = max(reserved[home], layer.bytes_after)
    cache, activations = _account_cost(draft.recipe.workload, skeleton, cost, runs_on)
    return replace(
        draft,
        layers=layers,
        memory={
            device: DeviceMemory(
                weight_bytes=weights[device],
                kv_cache_bytes=None if cost is None else cache.get(device, 0),
                activation_bytes=None if cost is None else activations.get(device, 0),
                reserved_bytes=reserved[device],
                limit_bytes=limit,
                capacity_bytes=draft.machine.device(device).budget_bytes,
            )
            for device, limit in limits.items()
        },
        total_bytes=sum(layer.bytes_after for layer in layers),
        kv_cache_bytes=None if cost is None else sum(cost.cache_bytes(draft.recipe.workload)),
    )


def _gpus(devices: Iterable[DeviceId]) -> set[DeviceId]:
    return {device for device in devices if device not in ("cpu", "disk")}


def _account_cost(
    workload: Workload, skeleton: Skeleton, cost: Cost | None, runs_on: Mapping[str, DeviceId]
) -> tuple[dict[DeviceId, int], dict[DeviceId, int]]:
    """Return cache bytes and activation bytes for each device, where the layers run."""
    cache: dict[DeviceId, int] = {}
    activations: dict[DeviceId, int] = {}
    if cost is None:
        return cache, activations
    shares = {n: b for n, b in cost.cache_by_block(workload, skeleton.decoder_blocks).items() if n in runs_on}
    for name, share in shares.items():
        home = "cpu" if workload.cache == "offloaded" else runs_on[name]
        cache[home] = cache.get(home, 0) + share
    if workload.cache == "offloaded":  # the layer that computes has its own on the GPU, and so has the next
        for gpu in _gpus(runs_on.values()):
            here = sorted(share for name, share in shares.items() if runs_on[name] == gpu)
            cache[gpu] = sum(here[-2:])
    for name, peak in cost.activation_bytes(workload).items():
        if name in runs_on:
            activations[runs_on[name]] = max(activations.get(runs_on[name], 0), peak)
    for name, kept in cost.kept_bytes(workload).items():
        if name in runs_on:
            activations[runs_on[name]] = activations.get(runs_on[name], 0) + kept
    return cache, activations
