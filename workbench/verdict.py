"""Whether a placement fits, in a sentence, and what to do about it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from workbench.first_forward import bytes_once_run, unrunnable_modules
from workbench.hardware import DeviceId, device_label, format_bytes, parse_bytes
from workbench.precision import FourBit, FullPrecision, Int8
from workbench.sizes import sizes_of, smaller_precisions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.placement import Layer, Placement, Verdict
    from workbench.recipe import Recipe
    from workbench.skeleton import Skeleton


class Advice(str):
    """A sentence that says what to do, and what that changes in the recipe.

    Attributes:
        changes: What :meth:`Recipe.with_` takes to follow it; empty where only a person can.
    """

    __slots__ = ("changes",)
    changes: Mapping[str, Any]

    def __new__(cls, sentence: str, **changes: Any) -> Advice:  # noqa: PYI034 - a str's constructor names its class
        """Make a piece of advice from its sentence and the recipe's new choices."""
        made = super().__new__(cls, sentence)
        made.changes = changes
        return made

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the advice followed; the same one if there is nothing to change.

        Raises:
            ValueError: If the recipe is another one by now and the change cannot be meant for it.
        """
        changes = dict(self.changes)
        if changes.get("strategy", "custom") != "custom":
            changes["device_map"] = None
        return recipe.with_(**changes)


class Attempt(Protocol):
    """Places, but does not judge, a recipe for the same model, machine and tensor sizes: to try out advice."""

    def __call__(self, tried: Recipe, device_map: Mapping[str, DeviceId] | None = None) -> Placement:
        """Place a recipe; a ``device_map`` spares the planning where the map cannot change."""


def judge(placement: Placement, skeleton: Skeleton) -> tuple[Verdict, str]:
    """Judge a placement of which everything is known but the verdict.

    Args:
        placement: With bytes, layers and map filled in.
        skeleton: Its model.

    Returns:
        Verdict and summary.
    """
    trouble, summary = _assess(placement)
    verdict: Verdict = "does_not_fit"
    refused = not_loadable_because(placement, skeleton)
    if refused is not None:
        summary = f"Does not fit: it cannot be loaded here: {refused}."
    elif trouble in ("offloads", "fits"):
        verdict = trouble
    return verdict, " ".join((summary, *_quantizes_little(placement, skeleton)))


def not_loadable_because(placement: Placement, skeleton: Skeleton) -> str | None:
    """Why this machine cannot load a checkpoint that is quantized already, wherever it is put; None if it can.

    Nobody knows it of another machine, which may have other libraries.
    """
    return skeleton.not_loadable_because if placement.machine.is_here else None


def advise(placement: Placement, skeleton: Skeleton, attempt: Attempt) -> tuple[Advice, ...]:
    """What to do about a placement, the best first.

    Args:
        placement: Of which everything is known but the advice.
        skeleton: Its model.
        attempt: Tries out advice before it is given: what is advised with numbers works.

    Returns:
        Sentences; none if all is well.
    """
    if not_loadable_because(placement, skeleton) is not None:
        return ()  # no choice of the recipe's would change it
    trouble, _ = _assess(placement)
    advice = [*_advice_impossible_budgets(placement), *_advice_one_device(placement, attempt)]
    if trouble not in ("fits", "nowhere to run"):
        advice += _advice_strategy(placement, attempt)
    if trouble in ("homeless", "unquantizable", "offloads"):
        advice += _advice_too_large(placement)
    if trouble == "homeless":
        advice += [*_advice_raise(placement, attempt), *_advice_overflow(placement, attempt)]
    elif trouble == "unquantizable":
        advice += [*_advice_raise(placement, attempt), *_advice_unquantizable(placement, attempt)]
    elif trouble == "nowhere to run":
        advice += _advice_overflow(placement, attempt)
    elif trouble == "cache":
        advice += [*_advice_overflow(placement, attempt), *_advice_cache(placement, attempt)]
    elif trouble == "short":
        advice += _advice_short(placement, attempt)
    elif trouble in ("refused", "offloads"):
        advice += _advice_raise(placement, attempt)
    if trouble not in ("cache", "fits"):
        advice += _advice_smaller(placement, skeleton)
    advice += [*_advice_unrunnable(placement, skeleton), *_advice_crossings(placement)]
    return tuple(advice)


_Trouble = Literal["homeless", "refused", "unquantizable", "nowhere to run", "cache", "short", "offloads", "fits"]


def _assess(placement: Placement) -> tuple[_Trouble, str]:
    """What is the matter with a placement, in a word and in a sentence."""
    memory, precision = placement.memory, placement.precision
    homeless, waiting = _homeless(placement), list(placement.waiting)
    if homeless:
        share = f"{_total(homeless)} of {format_bytes(placement.total_bytes)}"
        return "homeless", f"Does not fit: {_span(placement, homeless)} ({share}) has no room."
    refused = placement.recipe.precision.refused_because(placement.device_map.values())
    if refused is not None:
        return "refused", f"Does not fit: it cannot be loaded so: {refused}."
    if waiting and isinstance(precision, (Int8, FourBit)) and not precision.fp32_cpu_offload:
        stored = placement.recipe.precision != precision
        return "unquantizable", (
            f"Does not fit: {_span(placement, waiting)} would wait on {_places(waiting)}, where bitsandbytes "
            + (
                "keeps nothing that is quantized already."
                if stored
                else "does not quantize unless fp32_cpu_offload is on."
            )
        )
    if waiting and all(device == "disk" for device in placement.device_map.values()) and "cpu" not in memory:
        return "nowhere to run", "Does not fit: what waits on disk would run on the CPU, which max_memory leaves out."
    if placement.recipe.workload.cache == "offloaded":
        if all(device == "cpu" for device in placement.runs_on.values()):
            return "cache", (
                "Does not fit: an offloaded cache waits on the CPU for a GPU, and no layer runs on one: "
                "take cache='dynamic'."
            )
        if "cpu" not in memory:
            return "cache", "Does not fit: an offloaded cache waits on the CPU, which max_memory leaves out."
    short = {d: max(_over_limit(placement, d), _over_device(placement, d)) for d in memory}
    short = {d: missing for d, missing in short.items() if missing > 0}
    if short:
        return "short", (
            f"Does not fit: {', '.join(f'{device_label(d)} is short by {format_bytes(n)}' for d, n in short.items())}."
        )
    if waiting:
        what = f"{_span(placement, waiting)} ({_total(waiting)})"
        return "offloads", f"Offloads: {what} waits on {_places(waiting)} and is fetched to run."
    parts = (
        f"{device_label(d)} ({format_bytes(m.used_bytes)} of {format_bytes(m.capacity_bytes)})"
        for d, m in memory.items()
        if m.weight_bytes
    )
    return "fits", f"Fits on {' + '.join(parts)}."


def _working(attempt: Attempt, recipe: Recipe, device_map: Mapping[str, DeviceId] | None = None) -> Placement | None:
    """What a recipe comes to, if that works."""
    try:
        tried = attempt(recipe, device_map)
    except ValueError:  # what transformers itself cannot plan
        return None
    return tried if _assess(tried)[0] in ("offloads", "fits") else None


def _works(attempt: Attempt, recipe: Recipe, device_map: Mapping[str, DeviceId] | None = None) -> bool:
    return _working(attempt, recipe, device_map) is not None


def _waiting_bytes(placement: Placement) -> int:
    return sum(layer.bytes_after for layer in placement.waiting)


def _homeless(placement: Placement) -> list[Layer]:
    return [layer for layer in placement.layers if layer.device is None]


def _over_limit(placement: Placement, device: DeviceId) -> int:
    return placement.memory[device].weight_bytes - placement.memory[device].limit_bytes


def _over_device(placement: Placement, device: DeviceId) -> int:
    # The checkpoint's own file serves as the offload store, so free disk is no bound.
    return 0 if device == "disk" else -placement.memory[device].free_bytes


def _gpus(placement: Placement) -> list[DeviceId]:
    return [d for d in placement.memory if d not in ("cpu", "disk")]


def _limits(placement: Placement) -> dict[DeviceId, int]:
    return {device: m.limit_bytes for device, m in placement.memory.items()}


def as_said(size_bytes: int, *, up: bool) -> int:
    """The nearest size, upwards or downwards, that the text which people read and type gives exactly."""
    step_bytes = 2**30 // 10 if size_bytes >= 2**30 else 2**20 if size_bytes >= 2**20 else 2**10
    said_bytes = parse_bytes(format_bytes(max(size_bytes, 0)))
    if up and said_bytes < size_bytes:
        return parse_bytes(format_bytes(size_bytes + step_bytes))
    if not up and said_bytes > size_bytes:
        return parse_bytes(format_bytes(max(size_bytes - step_bytes, 0)))
    return said_bytes


def _advice_impossible_budgets(placement: Placement) -> list[Advice]:
    limits = _limits(placement)
    return [
        Advice(
            f"The budget of {device_label(device)} ({format_bytes(m.limit_bytes)}) is more than the "
            f"{format_bytes(m.capacity_bytes)} that it has to give: lower it.",
            max_memory={**limits, device: as_said(m.capacity_bytes, up=False)},
        )
        for device, m in placement.memory.items()
        if m.limit_bytes > m.capacity_bytes and device != "disk"
    ]


def _advice_one_device(placement: Placement, attempt: Attempt) -> list[Advice]:
    """One device that could take everything.

    The strategies miss it because they keep room for a second layer, or because they spread what one GPU could hold,
    and each hand-over from one GPU to the next costs time.
    """
    used = [device for device, m in placement.memory.items() if m.weight_bytes]
    for device in _gpus(placement) or ["cpu"]:
        m = placement.memory.get(device)
        if m is None or placement.total_bytes > m.limit_bytes or used == [device]:
            continue
        whole = attempt(placement.recipe.with_(strategy="custom", device_map={"": device}))
        if _assess(whole)[0] == "fits":
            of = f"{format_bytes(whole.memory[device].used_bytes)} of {format_bytes(m.capacity_bytes)}"
            custom = f'strategy="custom" with device_map={{"": {device!r}}}'
            return [
                Advice(
                    f"All of it would fit on {device_label(device)} ({of}): {custom}.",
                    strategy="custom",
                    device_map={"": device},
                )
            ]
    return []


_RANKS: dict[_Trouble, int] = {"fits": 0, "offloads": 1}


def _advice_strategy(placement: Placement, attempt: Attempt) -> list[Advice]:
    """Another strategy that puts more where it runs."""
    recipe, gpus = placement.recipe, _gpus(placement)
    if recipe.strategy == "custom" or not gpus:
        return []
    now = (_RANKS.get(_assess(placement)[0], 2), _waiting_bytes(placement))
    for strategy, why in (
        ("balanced_low_0", f"leaves room on {device_label(gpus[0])} for generation"),
        ("packed", "fills gaps that the others leave"),
    ):
        if strategy == recipe.strategy or (strategy == "balanced_low_0" and len(gpus) == 1):
            continue
        try:
            tried = attempt(recipe.with_(strategy=strategy))
        except ValueError:  # what transformers itself cannot plan
            continue
        trouble, _ = _assess(tried)
        waiting = _waiting_bytes(tried)
        if trouble in _RANKS and (_RANKS[trouble], waiting) < now:
            comes_to = "everything fits" if trouble == "fits" else f"only {format_bytes(waiting)} would wait"
            return [Advice(f'strategy="{strategy}" {why}: {comes_to}.', strategy=strategy)]
    return []


def _advice_too_large(placement: Placement) -> list[Advice]:
    """Name a block that is larger than any fast device's budget: no budget between the two changes anything."""
    gpus = [placement.memory[d] for d in _gpus(placement)] or [m for d, m in placement.memory.items() if d == "cpu"]
    largest = max(placement.layers, key=lambda layer: layer.bytes_after)
    room = max((m.limit_bytes for m in gpus), default=0)
    if not gpus or largest.bytes_after <= room:
        return []
    return [
        Advice(
            f"{largest.name} alone ({format_bytes(largest.bytes_after)}) is larger than every budget "
            f"(at most {format_bytes(room)}): it cannot be kept where it runs."
        )
    ]


def _advice_unrunnable(placement: Placement, skeleton: Skeleton) -> list[Advice]:
    """Name the modules that load in 4 bits on this machine's CPU and then fail at the first forward."""
    precision = placement.recipe.precision
    if not isinstance(precision, FourBit) or not placement.machine.is_here:
        return []
    block_of, runs_on = sizes_of(skeleton, precision).block_of, placement.runs_on
    names = [n for n in unrunnable_modules(skeleton, precision) if runs_on.get(block_of[f"{n}.weight"]) == "cpu"]
    if not names:
        return []
    kinds = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    skips = precision.skip_modules or skeleton.default_skips
    return [
        Advice(
            f"bitsandbytes cannot compute {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} in 4 bits on "
            f"this CPU, though it loads: leave {' and '.join(kinds)} out with skip_modules.",
            precision=replace(precision, skip_modules=(*skips, *(kind for kind in kinds if kind not in skips))),
        )
    ]


def _advice_crossings(placement: Placement) -> list[Advice]:
    """Warn of a map of one's own that goes back and forth."""
    if placement.recipe.strategy != "custom":
        return []
    devices = set(placement.runs_on.values())
    back = placement.crossings - (len(devices) - 1)
    if back <= 0:
        return []
    return [
        Advice(
            f"This map hands the hidden states over {placement.crossings} times, where {len(devices) - 1} would do: "
            "neighbouring layers on one device are faster."
        )
    ]


def _advice_raise(placement: Placement, attempt: Attempt) -> list[Advice]:
    """How much more budget would do, on the device with the most to spare."""
    recipe, memory = placement.recipe, placement.memory
    if recipe.strategy == "custom":
        return []
    homeless = _homeless(placement)
    layers = homeless or list(placement.waiting)
    if not layers:
        return []
    quantizes = not isinstance(recipe.precision, FullPrecision)
    room = {d: m.capacity_bytes - m.limit_bytes for d, m in memory.items() if d != "disk"}
    if _gpus(placement) and (quantizes or not homeless):
        room.pop("cpu", None)  # more there would only let more of it wait, under a method even unquantized
    device = max(room, key=lambda d: room[d], default=None)
    left_over = sum(layer.bytes_after for layer in layers)
    if device is None or room[device] < left_over:  # planning is the dear part of a slider's move
        return []
    # Room for what is left over, and for the largest layer, which the strategies keep free.
    need = left_over + max(layer.bytes_after for layer in placement.layers)
    if quantizes:
        need = math.ceil(need / 0.9)  # transformers keeps a tenth of every budget free under bitsandbytes
    capacity = memory[device].capacity_bytes
    raised = min(as_said(memory[device].limit_bytes + need, up=True), as_said(capacity, up=False))
    if raised <= memory[device].limit_bytes:
        return []
    tried = _working(attempt, recipe.with_(max_memory={**_limits(placement), device: raised}))
    if tried is None or not (homeless or _waiting_bytes(tried) < left_over):
        return []
    return [_raise(placement, {device: raised})]


def _raise(placement: Placement, raised: Mapping[DeviceId, int]) -> Advice:
    changes = (
        f"{device_label(device)} from {format_bytes(placement.memory[device].limit_bytes)} to {format_bytes(limit)}"
        for device, limit in raised.items()
    )
    return Advice(f"Raise {' and '.join(changes)}.", max_memory={**_limits(placement), **raised})


def _advice_overflow(placement: Placement, attempt: Attempt) -> list[Advice]:
    """Let the rest wait in RAM, or on disk, where that was not offered."""
    recipe, machine = placement.recipe, placement.machine
    if recipe.strategy == "custom":
        return []
    what = "the cache" if recipe.workload.cache == "offloaded" else "layers"
    device, advice = "cpu", f'Add "cpu" to max_memory to let {what} wait in RAM.'
    if "cpu" in placement.memory:
        device, advice = "disk", 'Add "disk" to max_memory to let layers wait on disk (slow).'
    if device in placement.memory:
        return []
    budget = machine.device(device).budget_bytes
    if device == "cpu" and budget < sum(layer.bytes_after for layer in _homeless(placement)):
        return []
    limits = {**_limits(placement), device: budget}
    return [Advice(advice, max_memory=limits)] if _works(attempt, recipe.with_(max_memory=limits)) else []


def _advice_cache(placement: Placement, attempt: Attempt) -> list[Advice]:
    """Keep the cache where the layers run."""
    workload = replace(placement.recipe.workload, cache="dynamic")
    if not _works(attempt, placement.recipe.with_(workload=workload), placement.device_map):
        return []
    return [Advice('Take cache="dynamic": it is kept where the layers run.', workload=workload)]


def _advice_unquantizable(placement: Placement, attempt: Attempt) -> list[Advice]:
    recipe = placement.recipe
    if not isinstance(recipe.precision, (Int8, FourBit)):
        return []
    if not _gpus(placement):
        return [
            Advice(
                "Without a GPU, fp32_cpu_offload would leave everything unquantized: raise the budget of cpu instead."
            )
        ]
    keeping = recipe.with_(precision=replace(recipe.precision, fp32_cpu_offload=True))
    if not _works(attempt, keeping, placement.device_map):
        return []
    return [Advice("Set fp32_cpu_offload=True to keep those modules unquantized.", precision=keeping.precision)]


def _advice_short(placement: Placement, attempt: Attempt) -> list[Advice]:
    advice = []
    recipe, memory, limits = placement.recipe, placement.memory, _limits(placement)
    over = [d for d in memory if _over_limit(placement, d) > 0]
    full = [d for d in memory if _over_device(placement, d) > 0]
    raised = {d: as_said(limits[d] + _over_limit(placement, d), up=True) for d in over}
    if raised and _works(attempt, recipe.with_(max_memory={**limits, **raised})):
        advice.append(_raise(placement, raised))
    if full and recipe.strategy != "custom":
        lowered = {
            d: as_said(memory[d].capacity_bytes - memory[d].used_bytes + memory[d].weight_bytes, up=False)
            for d in full
            if memory[d].used_bytes - memory[d].weight_bytes < memory[d].capacity_bytes
        }
        if lowered and _works(attempt, recipe.with_(max_memory={**limits, **lowered})):
            changes = (f"{device_label(d)} to at most {format_bytes(limit)}" for d, limit in lowered.items())
            advice.append(
                Advice(
                    f"Lower the budget of {' and of '.join(changes)}: the strategies fill a budget with weights and "
                    "leave no room for cache and activations.",
                    max_memory={**limits, **lowered},
                )
            )
    context = 0 if over else longest_context(placement, attempt, recipe.workload.context_length)
    if context:
        workload = replace(recipe.workload, context_length=context)
        advice.append(Advice(f"A context of {context:,} tokens would fit.", workload=workload))
    return advice


def longest_context(placement: Placement, attempt: Attempt, high: int) -> int:
    """The longest context, up to ``high`` tokens, with which the same map works; 0 if there is none."""
    recipe = placement.recipe
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        workload = replace(recipe.workload, context_length=middle)
        if _works(attempt, recipe.with_(workload=workload), placement.device_map):
            low = middle
        else:
            high = middle - 1
    return low


def _advice_smaller(placement: Placement, skeleton: Skeleton) -> list[Advice]:
    """The largest smaller precision whose weights the fast devices could hold, or else the smallest there is."""
    total = placement.total_bytes
    devices = _gpus(placement) or ["cpu"]
    room = sum(placement.memory[d].limit_bytes for d in devices if d in placement.memory)
    smaller = [p for p in smaller_precisions(skeleton, placement.recipe.precision) if p[1] < 0.9 * total]
    fitting = [p for p in smaller if p[1] <= 0.9 * room] or smaller[-1:]
    return [
        Advice(f"{p.label} would take {format_bytes(size)} in place of {format_bytes(total)}.", precision=p)
        for p, size in fitting[:1]
    ]


def _quantizes_little(placement: Placement, skeleton: Skeleton) -> list[str]:
    """Say it when a method leaves most of a model alone: fused experts, layers that are no plain nn.Linear."""
    precision = placement.precision
    if skeleton.quantized_as is not None:
        return _of_stored(placement, skeleton)
    if isinstance(precision, FullPrecision):
        return []
    if getattr(precision, "has_fp16_weight", False):
        return ["has_fp16_weight keeps the weights as they are beside the int8 values: for training, not to save room."]
    tensors = sizes_of(skeleton, precision).tensors
    whole = sum(t.before_bytes for t in tensors)
    untouched = sum(t.before_bytes for t in tensors if not t.quantized)
    if untouched * 2 <= whole:
        return []
    experts = sum(t.before_bytes for t in tensors if not t.quantized and ".experts." in t.name)
    what = "experts" if 2 * experts > untouched else "weights"
    share = f"{100 * untouched / whole:.0f} % of this model are {what} that {precision.package} does not quantize"
    change = f"{format_bytes(placement.total_bytes)} in place of {format_bytes(whole)}"
    return [f"{share}: as {precision.label} it takes {change}."]


def _of_stored(placement: Placement, skeleton: Skeleton) -> list[str]:
    """Say what becomes of a checkpoint that is quantized already."""
    stated = skeleton.quantized_as
    if skeleton.unpacked_because is not None:
        change = f"unpacked to {placement.dtype} while they are loaded"
        return [f"Its weights ({stated}) are {change}: {skeleton.unpacked_because}."]
    found = []
    if skeleton.meta_model(placement.recipe.precision).stored:
        found.append(f"Sizes are those of its files ({stated}), an estimate of what a load keeps.")
    if skeleton.unpacks_when_run:
        once = bytes_once_run(placement, skeleton) or {}
        found.append(f"It is unpacked when it first runs, to {format_bytes(sum(once.values()))}.")
    return found


def _span(placement: Placement, layers: list[Layer]) -> str:
    """Name layers by runs in execution order: "lm_head", "model.layers.20 to model.layers.29 and lm_head"."""
    order = {layer.name: index for index, layer in enumerate(placement.layers)}
    runs: list[list[str]] = []
    for layer in layers:
        if runs and order[layer.name] == order[runs[-1][-1]] + 1:
            runs[-1].append(layer.name)
        else:
            runs.append([layer.name])
    texts = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    if len(texts) > 3:
        texts = [*texts[:2], f"{sum(map(len, runs[2:]))} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _places(layers: list[Layer]) -> str:
    return " and ".join(dict.fromkeys(device_label(layer.device) for layer in layers if layer.device is not None))


def _total(layers: list[Layer]) -> str:
    return format_bytes(sum(layer.bytes_after for layer in layers))
