"""Whether a placement fits, in a sentence, and what to do about it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from workbench.hardware import DeviceId, device_label, format_bytes
from workbench.precision import FullPrecision
from workbench.sizes import sizes_of, smaller_precisions
from workbench.workload import Cost, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.placement import Layer, Placement, Verdict
    from workbench.skeleton import Skeleton


def judge(
    placement: Placement,
    skeleton: Skeleton,
    cost: Cost | None,
    replan: Callable[[dict[DeviceId, int]], dict[str, DeviceId]],
) -> tuple[Verdict, str, tuple[str, ...]]:
    """Judge a placement of which everything is known but the verdict.

    Args:
        placement: With bytes, layers and map filled in.
        skeleton: Its model.
        cost: Its cache and activations, if they are known.
        replan: Budgets in bytes to the map that the recipe's strategy would give; advice is tried out with it.

    Returns:
        Verdict, summary and advice.
    """
    memory, precision = placement.memory, placement.recipe.precision
    homeless = [layer for layer in placement.layers if layer.device is None]
    waiting = list(placement.waiting)
    unquantizable = waiting and not isinstance(precision, FullPrecision) and not precision.fp32_cpu_offload
    over_limit = {d: m.weight_bytes + m.reserved_bytes - m.limit_bytes for d, m in memory.items()}
    # The checkpoint's own file serves as the offload store, so free disk is no bound.
    over_device = {d: -m.free_bytes for d, m in memory.items() if d != "disk"}
    short = {d: max(over_limit[d], over_device.get(d, 0)) for d in memory}
    short = {d: missing for d, missing in short.items() if missing > 0}

    verdict: Verdict = "does_not_fit"
    advice = _advice_impossible_budgets(placement)
    if homeless:
        summary = (
            f"Does not fit: {_span(homeless)} ({format_bytes(sum(layer.bytes_after for layer in homeless))} of "
            f"{format_bytes(placement.total_bytes)}) has no room."
        )
        advice += [*_advice_one_device(placement, cost), *_advice_no_room(placement, homeless, replan)]
    elif unquantizable:
        summary = (
            f"Does not fit: {_span(waiting)} would wait on {_places(waiting)}, where bitsandbytes does not quantize "
            "unless fp32_cpu_offload is on."
        )
        advice += [*_advice_one_device(placement, cost), *_advice_unquantizable(placement)]
    elif short:
        summary = (
            f"Does not fit: {', '.join(f'{device_label(d)} is short by {format_bytes(n)}' for d, n in short.items())}."
        )
        advice += _advice_short(placement, short, over_limit, cost)
    elif waiting:
        verdict = "offloads"
        summary = (
            f"Offloads: {_span(waiting)} ({format_bytes(sum(layer.bytes_after for layer in waiting))}) waits on "
            f"{_places(waiting)} and is fetched to run."
        )
        advice += _advice_one_device(placement, cost)
    else:
        verdict = "fits"
        summary = "Fits on " + " + ".join(
            f"{device_label(d)} ({format_bytes(m.used_bytes)} of {format_bytes(m.capacity_bytes)})"
            for d, m in memory.items()
            if m.weight_bytes
        )
        summary += "."
    if verdict != "fits":
        advice += _advice_smaller(placement, skeleton)
    advice += _advice_quantizes_little(placement, skeleton)
    return verdict, summary, tuple(advice)


def _gpus(placement: Placement) -> list[DeviceId]:
    return [d for d in placement.memory if d not in ("cpu", "disk")]


def _advice_impossible_budgets(placement: Placement) -> list[str]:
    return [
        f"The budget of {device_label(device)} ({format_bytes(m.limit_bytes)}) is more than the "
        f"{format_bytes(m.capacity_bytes)} that it has to give: lower it."
        for device, m in placement.memory.items()
        if m.limit_bytes > m.capacity_bytes and device != "disk"
    ]


def _advice_one_device(placement: Placement, cost: Cost | None) -> list[str]:
    """One device that could take everything, which the strategies miss because they keep room for a second layer."""
    needed = placement.total_bytes + (0 if cost is None else _extra_bytes(placement.recipe.workload, cost))
    for device in _gpus(placement) or ["cpu"]:
        m = placement.memory.get(device)
        if m is not None and placement.total_bytes <= m.limit_bytes and needed <= m.capacity_bytes:
            of = f"{format_bytes(needed)} of {format_bytes(m.limit_bytes)}"
            custom = f'strategy="custom" with device_map={{"": {device!r}}}'
            return [f"All of it would fit on {device_label(device)} ({of}): {custom}."]
    return []


def _advice_no_room(
    placement: Placement, homeless: list[Layer], replan: Callable[[dict[DeviceId, int]], dict[str, DeviceId]]
) -> list[str]:
    """How much more budget would do, tried out with the planner before it is said."""
    advice = []
    recipe, memory = placement.recipe, placement.memory
    limits = {d: m.limit_bytes for d, m in memory.items()}
    room = {d: m.capacity_bytes - m.limit_bytes for d, m in memory.items() if d != "disk"}
    device = max(room, key=lambda d: room[d], default=None)
    if device is not None and room[device] > 0 and recipe.strategy != "custom":
        need = sum(layer.bytes_after for layer in homeless) + max(layer.bytes_after for layer in homeless)
        if not isinstance(recipe.precision, FullPrecision):
            need = math.ceil(need / 0.9)  # transformers keeps a tenth of every budget free under bitsandbytes
        raised = {**limits, device: limits[device] + min(need, room[device])}
        if set(replan(raised).values()) <= set(raised):
            advice.append(
                f"Raise {device_label(device)} from {format_bytes(limits[device])} to {format_bytes(raised[device])}."
            )
    if "cpu" not in memory:
        advice.append('Add "cpu" to max_memory to let layers wait in RAM.')
    elif "disk" not in memory and isinstance(recipe.precision, FullPrecision):
        advice.append('Add "disk" to max_memory to let layers wait on disk (slow).')
    return advice


def _advice_unquantizable(placement: Placement) -> list[str]:
    gpus = _gpus(placement)
    if not gpus:
        return ["Without a GPU, fp32_cpu_offload would leave everything unquantized: raise the budget of cpu instead."]
    return [
        f"Set fp32_cpu_offload=True to keep those modules unquantized, or give {device_label(gpus[0])} more memory."
    ]


def _advice_short(
    placement: Placement, short: dict[DeviceId, int], over_limit: dict[DeviceId, int], cost: Cost | None
) -> list[str]:
    advice = []
    for device, missing in short.items():
        m = placement.memory[device]
        needed = m.limit_bytes + over_limit[device]
        if over_limit[device] > 0 and needed <= m.capacity_bytes:
            advice.append(f"Raise {device_label(device)} from {format_bytes(m.limit_bytes)} to {format_bytes(needed)}.")
        extra = (m.kv_cache_bytes or 0) + (m.activation_bytes or 0)
        if cost is None or missing > extra:
            continue
        if len(placement.memory) > 1 and placement.recipe.strategy != "custom" and m.capacity_bytes > extra:
            advice.append(
                f"Lower the budget of {device_label(device)} to at most {format_bytes(m.capacity_bytes - extra)}: the "
                "strategies fill a budget with weights and leave no room for cache and activations."
            )
        context = _longest_context(placement.recipe.workload, cost, share=(extra - missing) / extra)
        if context:
            advice.append(f"A context of {context:,} tokens would fit.")
    return advice


def _extra_bytes(workload: Workload, cost: Cost) -> int:
    return sum(cost.cache_bytes(workload)) + max(cost.activation_bytes(workload).values(), default=0)


def _longest_context(workload: Workload, cost: Cost, *, share: float) -> int:
    """The longest context whose cache and activations are at most a share of what they are now; 0 if there is none."""
    room_bytes = share * _extra_bytes(workload, cost)
    low, high = 0, workload.context_length
    while low < high:
        middle = (low + high + 1) // 2
        if _extra_bytes(Workload(context_length=middle, batch_size=workload.batch_size), cost) <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _advice_smaller(placement: Placement, skeleton: Skeleton) -> list[str]:
    """The largest smaller precision whose weights the fast devices could hold, or else the smallest there is."""
    total = placement.total_bytes
    devices = _gpus(placement) or ["cpu"]
    room = sum(placement.memory[d].limit_bytes for d in devices if d in placement.memory)
    smaller = [p for p in smaller_precisions(skeleton, placement.recipe.precision) if p[1] < 0.9 * total]
    fitting = [p for p in smaller if p[1] <= 0.9 * room] or smaller[-1:]
    return [
        f"{label} would take {format_bytes(size)} in place of {format_bytes(total)}." for label, size in fitting[:1]
    ]


def _advice_quantizes_little(placement: Placement, skeleton: Skeleton) -> list[str]:
    """Say it when a method leaves most of a model alone: fused experts, layers that are no plain nn.Linear."""
    precision = placement.recipe.precision
    if isinstance(precision, FullPrecision):
        return []
    tensors = sizes_of(skeleton, precision).tensors
    whole = sum(t.kept_bytes for t in tensors)
    untouched = sum(t.kept_bytes for t in tensors if not t.quantized)
    if untouched * 2 <= whole:
        return []
    change = f"{format_bytes(placement.total_bytes)} in place of {format_bytes(whole)}"
    share = f"{100 * untouched / whole:.0f} % of this model are weights that bitsandbytes does not quantize"
    return [f"{share}; as {precision.label} it takes {change}."]


def _span(layers: list[Layer]) -> str:
    return layers[0].name if len(layers) == 1 else f"{layers[0].name} to {layers[-1].name}"


def _places(layers: list[Layer]) -> str:
    return " and ".join(dict.fromkeys(device_label(layer.device) for layer in layers if layer.device is not None))
