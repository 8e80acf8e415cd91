"""The strategy "packed": fill the fast devices as full as they can be, and spill only what has no room.

transformers' planner walks through the model once and never goes back: a device that it has skipped because one
embedding was too large for it stays empty. Here the largest blocks that are no decoder layers (embedding, head) are
tried in several places, and for each choice the decoder layers fill the devices in execution order, the fastest device
first. The choice with the lowest predicted time for a token wins. Cost: some 25 passes over the layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.adapters import adapter_bytes
from workbench.precision import FourBit, Int8
from workbench.speed import CPU_BYTES_PER_S, DISK_BYTES_PER_S, GPU_BYTES_PER_S, PCIE_BYTES_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.hardware import DeviceId, Machine
    from workbench.recipe import Recipe
    from workbench.sizes import Sizes
    from workbench.skeleton import Skeleton
    from workbench.workload import Cost

_TRIED = 2  # so many of the largest other blocks are tried in several places; the rest go where there is room
_CROSSING_SECONDS = 50e-6  # handing a hidden state from one device to the next


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that stays whole: a block, together with the blocks whose weights are tied to it.

    Attributes:
        name: Of the block.
        weight_bytes: Where it runs.
        spilled_bytes: Where it waits to be fetched; more than that if it is not quantized there.
        cache_bytes: Its share of the KV cache, kept where it runs.
        activation_bytes: Peak of live activations while it runs.
        is_layer: Whether it is a decoder layer.
        adapter_bytes: Weights that stay where it runs even while the rest of it waits elsewhere.
    """

    name: str
    weight_bytes: int
    spilled_bytes: int
    cache_bytes: int
    activation_bytes: int
    is_layer: bool
    adapter_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A device to fill.

    Attributes:
        id: As ``max_memory`` spells it.
        limit_bytes: For the weights that are kept here.
        capacity_bytes: For those, the cache, the activations and the room for fetched layers together.
        seconds_per_byte: To read a weight that runs here; on a device to spill to, to fetch it from there.
    """

    id: DeviceId
    limit_bytes: int
    capacity_bytes: int
    seconds_per_byte: float


@dataclass(kw_only=True)
class _Load:
    """What a device has been given so far."""

    weight: int = 0
    cache: int = 0
    activation: int = 0

    def fits(self, item: Item, device: Bin, reserve: int) -> bool:
        weight = self.weight + item.weight_bytes + item.adapter_bytes
        other = self.cache + item.cache_bytes + max(self.activation, item.activation_bytes)
        return weight <= device.limit_bytes and weight + reserve + other <= device.capacity_bytes

    def add(self, item: Item) -> None:
        self.weight += item.weight_bytes + item.adapter_bytes
        self.cache += item.cache_bytes
        self.activation = max(self.activation, item.activation_bytes)


def pack(items: Sequence[Item], fast: Sequence[Bin], slow: Sequence[Bin]) -> dict[str, DeviceId | None]:
    """Assign each item to a device.

    Args:
        items: In execution order.
        fast: The devices on which layers run where they are kept. The first of them fetches and runs what is spilled,
            as accelerate has it.
        slow: The devices to spill to, the quicker one first.

    Returns:
        Item name to device; None where nothing that was offered has room.
    """
    order = _quickest_first(fast)
    others = sorted((i for i in items if not i.is_layer), key=lambda i: i.weight_bytes, reverse=True)
    tried = [i.name for i in others[:_TRIED] if i.weight_bytes]
    # Devices of a kind are alike, but for the first, which has to keep room for what is fetched.
    kinds: dict[tuple[int, int, float], list[int]] = {}
    for index in order[1:]:
        kinds.setdefault(
            (fast[index].limit_bytes, fast[index].capacity_bytes, fast[index].seconds_per_byte), []
        ).append(index)
    places = dict.fromkeys((*order[:1], *(i for same in kinds.values() for i in (same[0], same[-1]))))
    best: tuple[float, dict[str, DeviceId | None]] | None = None
    layers = [item for item in items if item.is_layer]
    by_size = sorted(layers, key=lambda i: i.weight_bytes, reverse=True)
    # Where layers differ in size, the large ones first can leave only small ones to be fetched.
    for sequence in (layers, by_size) if by_size != layers else (layers,):
        for homes in itertools.product((_FREE, *places, _SPILLED), repeat=len(tried)):
            found = _fill(items, sequence, fast, slow, dict(zip(tried, homes, strict=True)))
            if found is not None and (best is None or found[0] < best[0]):
                best = found
    placed = {} if best is None else best[1]
    large = {item.name for item in items if item.is_layer or item.name in tried}
    if fast and fast[0].id not in {placed.get(name) for name in large}:
        return pack(items, fast[1:], slow)  # then the next device is the first of the map, and fetches what is spilled
    return placed


def _quickest_first(fast: Sequence[Bin]) -> list[int]:
    return sorted(range(len(fast)), key=lambda index: fast[index].seconds_per_byte)


_FREE, _SPILLED = -1, -2  # what a tried block can be told beside an index: go where there is room, or be spilled


def _fill(
    items: Sequence[Item], layers: Sequence[Item], fast: Sequence[Bin], slow: Sequence[Bin], fixed: dict[str, int]
) -> tuple[float, dict[str, DeviceId | None]] | None:
    """Fill the devices for one choice of where the tried blocks go; None if they cannot go there.

    What is spilled needs room on the device that runs it (the largest such item, and their cache), and that room
    decides what has to be spilled: repeated until both agree.
    """
    spilled = {name for name, home in fixed.items() if home == _SPILLED}
    while True:
        homes = _assign(items, layers, fast, fixed, spilled)
        if homes is None:
            return None
        now = {name for name, home in homes.items() if home is None}
        if now <= spilled:
            return _finish(items, fast, slow, homes)
        spilled |= now


def _assign(
    items: Sequence[Item], layers: Sequence[Item], fast: Sequence[Bin], fixed: dict[str, int], spilled: set[str]
) -> dict[str, int | None] | None:
    """Give every item an index into ``fast`` or None, with room kept for what was spilled so far."""
    fetched = [i for i in items if i.name in spilled]
    reserve = max((i.spilled_bytes + i.adapter_bytes for i in fetched), default=0)
    loads = [_Load() for _ in fast]
    if fast:  # what stays there of what is fetched
        loads[0].weight = sum(i.adapter_bytes for i in fetched)
        loads[0].cache = sum(i.cache_bytes for i in fetched)
        loads[0].activation = max((i.activation_bytes for i in fetched), default=0)
    homes: dict[str, int | None] = dict.fromkeys((i.name for i in items), None)

    def put(item: Item, index: int) -> bool:
        if not loads[index].fits(item, fast[index], 0 if index else reserve):
            return False
        loads[index].add(item)
        homes[item.name] = index
        return True

    for item in items:
        if fixed.get(item.name, _FREE) >= 0 and not put(item, fixed[item.name]):
            return None
    left = []
    order = _quickest_first(fast)
    remaining = list(order)
    for item in layers:  # one device after the other
        while remaining and not put(item, remaining[0]):
            remaining.pop(0)
        if not remaining:
            left.append(item)
    # What is left may still fit into a gap: small blocks beside their neighbours, and layers where sizes differ.
    left += [i for i in items if not i.is_layer and fixed.get(i.name, _FREE) == _FREE]
    names = list(homes)
    full: set[tuple[int, ...]] = set()
    for item in left:
        size = (item.weight_bytes, item.cache_bytes, item.activation_bytes, item.adapter_bytes)
        if size in full:
            continue
        at = names.index(item.name)
        near = next((homes[n] for n in (*reversed(names[:at]), *names[at + 1 :]) if homes[n] is not None), None)
        first = [] if near is None else [near]
        if not any(put(item, index) for index in dict.fromkeys((*first, *order))):
            full.add(size)
    return homes


def _finish(
    items: Sequence[Item], fast: Sequence[Bin], slow: Sequence[Bin], homes: dict[str, int | None]
) -> tuple[float, dict[str, DeviceId | None]]:
    """Spill what has no home, and predict the time of a token; what cannot even be spilled counts as endless."""
    room = [device.limit_bytes for device in slow]
    placed: dict[str, DeviceId | None] = {}
    main_seconds = fast[0].seconds_per_byte if fast else 0.0
    seconds = 0.0
    for item in items:
        home = homes[item.name]
        if home is not None:
            placed[item.name] = fast[home].id
            seconds += item.weight_bytes * fast[home].seconds_per_byte
            continue
        index = next((k for k, free in enumerate(room) if item.spilled_bytes <= free), None)
        if index is None:
            placed[item.name] = None
            seconds += item.spilled_bytes  # a second a byte: worse than any device
            continue
        room[index] -= item.spilled_bytes
        placed[item.name] = slow[index].id
        seconds += item.spilled_bytes * (slow[index].seconds_per_byte + main_seconds)
    runs_on = [homes[item.name] or 0 for item in items if item.weight_bytes]
    crossings = sum(a != b for a, b in itertools.pairwise(runs_on))
    return seconds + crossings * _CROSSING_SECONDS, placed


def pack_model(
    recipe: Recipe,
    *,
    machine: Machine,
    budgets: Mapping[DeviceId, int],
    skeleton: Skeleton,
    sizes: Sizes,
    cost: Cost | None,
) -> dict[str, DeviceId | None]:
    """Pack a model's blocks onto the devices of a budget.

    Args:
        recipe: The choices.
        machine: For the devices' capacities and speeds.
        budgets: Device to bytes, in accelerate's order.
        skeleton: The model.
        sizes: Its bytes in the chosen precision.
        cost: Its cache and activations; None counts them as nothing.

    Returns:
        Device map, with None for what has no room.
    """
    # A tied copy has to be where the original is: its block goes along with the original's.
    leader = {block.name: block.name for block in skeleton.blocks}
    for copy, original in skeleton.tied.items():
        follower = sizes.block_named(copy)
        if follower is not None and original in sizes.block_of:
            old, new = leader[follower], leader[sizes.block_of[original]]
            leader = {name: new if first == old else first for name, first in leader.items()}
    gpus = [device for device in budgets if device not in ("cpu", "disk")]
    cache = {} if cost is None else cost.cache_by_block(recipe.workload, skeleton.decoder_blocks)
    beside: dict[DeviceId, int] = {}  # what a device has to hold whatever is put there
    if recipe.workload.cache == "offloaded" and gpus:
        # It waits on the CPU; the layer that computes has its own on the GPU, and so has the next.
        beside = {**dict.fromkeys(gpus, sum(sorted(cache.values())[-2:])), "cpu": sum(cache.values())}
        cache = {}
    items = _items(recipe, skeleton, sizes, cost, leader, cache=cache)
    # Buffers stay where a block runs, also when it is spilled; they are few, so room for all is kept everywhere.
    buffers = sum(piece.buffer_bytes for piece in sizes.blocks.values())

    def bins(devices: Sequence[DeviceId], default_speed: float, *, fetched: bool) -> list[Bin]:
        found = []
        for device in devices:
            known = machine.device(device)
            speed = default_speed if fetched else known.bandwidth_bytes_per_s or default_speed
            capacity = known.budget_bytes - beside.get(device, 0)
            limit = budgets[device] - buffers
            found.append(
                Bin(
                    id=device,
                    limit_bytes=min(limit, capacity) if device == "cpu" else limit,
                    capacity_bytes=capacity,
                    seconds_per_byte=1 / speed,
                )
            )
        return found

    if gpus:
        fast = bins(gpus, GPU_BYTES_PER_S, fetched=False)
        slow = bins([d for d in ("cpu",) if d in budgets], PCIE_BYTES_PER_S, fetched=True)
    else:
        fast = bins([d for d in ("cpu",) if d in budgets], CPU_BYTES_PER_S, fetched=False)
        slow = []
    slow += bins([d for d in ("disk",) if d in budgets], DISK_BYTES_PER_S, fetched=False)
    placed = pack(items, fast, slow)
    device_map = {block.name: placed.get(leader[block.name]) for block in skeleton.blocks}
    devices = set(device_map.values())
    return {"": devices.pop()} if len(devices) == 1 else device_map


def _items(
    recipe: Recipe,
    skeleton: Skeleton,
    sizes: Sizes,
    cost: Cost | None,
    leader: Mapping[str, str],
    *,
    cache: Mapping[str, int],
) -> list[Item]:
    quantizes = isinstance(recipe.precision, (Int8, FourBit))
    unquantized_when_spilled = isinstance(recipe.precision, (Int8, FourBit)) and recipe.precision.fp32_cpu_offload
    kept = {} if cost is None else cost.kept_bytes(recipe.workload)
    activations = {} if cost is None else cost.activation_bytes(recipe.workload)
    adapters: dict[str, int] = {}
    for module, size in adapter_bytes(recipe.adapters, skeleton).items():
        around = sizes.block_named(module) or skeleton.blocks[0].name
        adapters[around] = adapters.get(around, 0) + size
    # A weight is on the device whole before bitsandbytes has quantized it.
    whole = max((t.kept_bytes for t in sizes.tensors if t.quantized), default=0) if quantizes else 0
    decoder_blocks = set(skeleton.decoder_blocks)
    items = []
    for block in skeleton.blocks:
        if leader[block.name] != block.name:
            continue
        members = [name for name, first in leader.items() if first == block.name]
        pieces = [sizes.blocks[name] for name in members]
        weight = sum(p.parameter_bytes for p in pieces)
        items.append(
            Item(
                name=block.name,
                weight_bytes=weight,
                spilled_bytes=sum(p.kept_bytes for p in pieces) if unquantized_when_spilled else weight,
                cache_bytes=sum(cache.get(name, 0) + kept.get(name, 0) for name in members),
                activation_bytes=max(whole, *(activations.get(name, 0) for name in members)),
                is_layer=block.name in decoder_blocks,
                adapter_bytes=sum(adapters.get(name, 0) for name in members),
            )
        )
    return items
