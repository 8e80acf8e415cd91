"""Run the layers that wait on disk from the checkpoint's own files, read ahead of the computation.

accelerate opens the file for every tensor of every token, maps it, lets the processor wait at each page, and unmaps
it. Here the files stay mapped for the session's life and the parameters are views of them. While a layer computes, the
pages of the next ones are brought in by two threads; behind it they are let go as far as the budget asks. A result
never depends on the reading ahead: a page that is not there yet is read when it is touched.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from workbench.hardware import format_bytes
from workbench.offload_files import UnservedError, WaitingTensor, WeightFiles, find_waiting, switch
from workbench.offload_pages import Chunk, MappedFile, PageReaders, WeightsChangedError, is_supported, major_faults

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.offload_gpu import GpuOffload
    from workbench.placement import Placement

__all__ = ["Offload", "OffloadKind", "WeightsChangedError", "attach"]

OffloadKind = Literal["workbench", "accelerate"]

_CHUNK_BYTES = 4 * 2**20  # what a thread reads at once; larger gains nothing, and a stop waits for one of them
_LOOK_AHEAD_BYTES = 2**30  # no disk needs to be asked earlier
_LEAST_AHEAD_BYTES = 8 * 2**20  # below, a disk's queue runs dry between two layers
_HUGE_RELEASE_SECONDS_PER_BYTE = 5e-12  # letting go of small pages takes five times as long, of huge ones a hundredth
_HUGE_UNIT_BYTES = 4 * 2**20  # from this size on, rounding a layer to huge pages costs little
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def attach(
    model: Any, placement: Placement, folder: str | None, *, drop_behind: bool | None = None
) -> tuple[Offload | GpuOffload | None, tuple[str, ...]]:
    """Replace accelerate's hooks on a loaded model by our own offload, where that can serve.

    Args:
        model: As ``from_pretrained`` with the placement's device map gives it, before its first forward.
        placement: Where everything is; the budget of the CPU bounds what stays in memory.
        folder: Where weights go that the checkpoint holds in another dtype or cut another way.
        drop_behind: Whether what has run is dropped from the system's page cache too. None: if it would not fit into
            the memory that is free.

    Returns:
        The offload, to be closed with the session, and what to report. None in place of it where accelerate's hooks
        stay, with the reason in the report; ``(None, ())`` if nothing waits.
    """
    if not placement.waiting:
        return None, ()
    offload: Offload | None = None
    try:
        if not is_supported():
            raise UnservedError("reading pages ahead needs Linux 5.14 or newer")  # noqa: TRY301 - one place answers
        tensors = find_waiting(model)
        if not tensors:
            return None, ()
        files = WeightFiles(folder)
        try:
            parameters = files.map([t for t in tensors if t.in_ram is None])
            if any(device not in ("cpu", "disk") for device in placement.device_map.values()):
                from workbench.offload_gpu import attach_to_gpu

                under_gpu = attach_to_gpu(model, tensors, parameters, files, placement)
                return under_gpu, under_gpu.lines
            offload = Offload(model, tensors, files, placement, drop_behind=drop_behind)
        except BaseException:
            files.close()
            raise
        switch(model, tensors, parameters)
    except (UnservedError, OSError) as error:
        if offload is not None:
            offload.close()
        return None, (f"Offload: accelerate's hooks fetch the layers on disk, because {error}.",)
    return offload, offload.lines


# --- the order of reading ---------------------------------------------------------------------------------------------

_Range = tuple[MappedFile, int, int]


@dataclass(eq=False, kw_only=True)
class _Unit:
    """What is read and let go together: a layer, or a part of it where the budget is tight.

    ``dense`` ranges are read ahead. Of ``sparse`` ones (tables, fused experts) only what is touched is read.
    """

    name: str
    dense: list[_Range]
    sparse: list[_Range]
    on_demand: bool = False  # an expert of its own: nobody knows before whether it will be called
    kept: bool = False
    chunks: list[Chunk] = field(default_factory=list)
    queued: int = 0  # of the chunks, those given to the readers since the pages were last let go
    from_disk: bool = True  # whether the disk was read when its pages were brought in last
    dense_bytes: int = 0
    full_bytes: int = 0
    files: tuple[MappedFile, ...] = ()
    beside: list[_Unit] = field(default_factory=list)  # those that lie in the file where a fault here may reach
    chosen: set[tuple[int, int]] = field(default_factory=set)  # expert slices that were read

    def measure(self, granule: int) -> None:
        """Work out what it takes in memory, where pages of one size are mapped as a whole."""
        self.dense, self.sparse = _merge(self.dense), _merge(self.sparse)
        self.chunks = [
            Chunk(owner=self, file=file, start=max(start, at), end=min(end, at + _CHUNK_BYTES))
            for file, start, end in self.dense
            for at in range(start - start % _CHUNK_BYTES, end, _CHUNK_BYTES)
        ]
        self.dense_bytes = sum(end - start for _, start, end in self.dense)
        self.full_bytes = _rounded_bytes(self.dense, granule) + _rounded_bytes(self.sparse, MappedFile.page_bytes)
        self.files = tuple({file for file, _, _ in (*self.dense, *self.sparse)})


def _merge(ranges: list[_Range], granule: int = MappedFile.page_bytes) -> list[_Range]:
    """Round ranges outwards to whole pages and join those that touch."""
    merged: list[_Range] = []
    for file, start, end in sorted(ranges, key=lambda r: (r[0].path, r[1])):
        low, high = start - start % granule, min(end + -end % granule, file.size_bytes)
        if merged and merged[-1][0] is file and low <= merged[-1][2]:
            merged[-1] = (file, merged[-1][1], max(high, merged[-1][2]))
        else:
            merged.append((file, low, high))
    return merged


def _rounded_bytes(ranges: list[_Range], granule: int) -> int:
    return sum(end - start for _, start, end in _merge(ranges, granule))


class Offload:
    """The layers on disk of one model, read ahead of the computation.

    Attributes:
        lines: What to report about it.
        room_bytes: So much of the weights on disk may be in memory at a time.
        kept_bytes: What stays in memory from token to token.
        streamed_bytes: What is read anew for each token.
    """

    def __init__(
        self,
        model: Any,
        tensors: list[WaitingTensor],
        files: WeightFiles,
        placement: Placement,
        *,
        drop_behind: bool | None,
    ) -> None:
        self._lock = threading.RLock()
        self._files = files
        self._readers = PageReaders()
        self._closed = False
        self._handles: list[Any] = []
        self._current: _Unit | None = None
        self._called_on_demand: list[_Unit] = []
        self._position = -1  # of the current unit in the order
        self._trace: list[_Unit] = []
        self._previous_trace: list[_Unit] = []
        self._strays: list[_Unit] = []  # units whose modules are never called: others use their weights
        self._ahead: deque[_Unit] = deque()  # the units after the current one that have been looked at
        self._ahead_bytes = 0
        self._slow_bytes = 0  # of what was let go in this forward
        self._faults = -1
        self._probes = 0  # so many of the units that are kept are still to be looked at
        blocks = frozenset(layer.name for layer in placement.layers)
        self.room_bytes = _room_bytes(placement)
        units = self._cut(model, tensors, lambda owner: nearest_block(owner, blocks))
        sizes = [unit.full_bytes for unit in units]
        if self.room_bytes < min(sum(sizes), 2 * max(sizes)):  # too tight for whole layers
            units = self._cut(model, tensors, lambda owner: owner)
        self._lay_out(units)
        self._units = units
        self._order = [u for u in units if not u.on_demand]
        self._keep(units)
        free_bytes = _free_bytes(placement)
        self._drops = self.streamed_bytes > free_bytes if drop_behind is None else drop_behind
        self._hook(model, units, tensors)
        self._finalizer = weakref.finalize(model, self.close)
        self.lines = (self._describe(),)

    def _cut(self, model: Any, tensors: list[WaitingTensor], unit_of: Callable[[str], str]) -> list[_Unit]:
        """Group the tensors; in the order in which the modules were registered, until their real order is known."""
        import torch

        units: dict[str, _Unit] = {}
        dense_anywhere: set[_Range] = set()
        experts = _expert_count(model)
        for t in tensors:
            alone = re.match(r"(.*\.experts\.\d+)(?:\.|$)", t.owner)
            name = alone[1] if alone else unit_of(t.owner)
            unit = units.setdefault(name, _Unit(name=name, dense=[], sparse=[], on_demand=alone is not None))
            place = self._files.ranges[t.name]
            meta = t.meta
            if isinstance(t.module, torch.nn.Embedding) or (
                experts > 1 and meta.dim() == 3 and meta.shape[0] == experts
            ):
                unit.sparse.append(place)
            else:
                unit.dense.append(place)
                dense_anywhere.add(place)
        for unit in units.values():  # a table that is also a head is read whole
            unit.sparse = [place for place in unit.sparse if place not in dense_anywhere]
            unit.measure(MappedFile.page_bytes)
        return list(units.values())

    def _lay_out(self, units: list[_Unit]) -> None:
        """Use huge pages where a unit fills several: mapping them and letting them go takes a hundredth of the time."""
        self._huge = sum(unit.dense_bytes for unit in units) >= _HUGE_UNIT_BYTES * len(units)
        if self._huge:
            for unit in units:
                unit.measure(MappedFile.huge_page_bytes)
        for file in self._files.mapped.values():
            sparse = [(start, end) for unit in units for other, start, end in unit.sparse if other is file]
            file.advise(huge=self._huge, sparse=sparse)

    def _find_neighbours(self, units: list[_Unit]) -> None:
        """Linux maps as much around a page that is touched as it has read at once, up to a huge page."""
        for file in self._files.mapped.values():
            inside = [(low, high, u) for u in units for other, low, high in (*u.dense, *u.sparse) if other is file]
            inside.sort(key=lambda place: place[0])
            places, at = [], 0
            for low, high, unit in [*inside, (file.size_bytes, file.size_bytes, _Unit(name="", dense=[], sparse=[]))]:
                if low > at:  # what others run from, by mappings of their own
                    places.append((at, low, _Unit(name="", dense=[(file, at, low)], sparse=[])))
                places.append((low, high, unit))
                at = max(at, high)
            for index, (low, high, unit) in enumerate(places):
                for step in (-1, 1):
                    other = index + step
                    while 0 <= other < len(places) and (
                        low - places[other][1] < MappedFile.huge_page_bytes
                        and places[other][0] - high < MappedFile.huge_page_bytes
                    ):
                        unit.beside.append(places[other][2])
                        other += step

    def _keep(self, units: list[_Unit]) -> None:
        """Choose what stays in memory: all, or as much as fits beside the layer that runs and what is read ahead.

        Spread over the model, so that the disk works while those that stay compute.
        """
        granule = MappedFile.huge_page_bytes if self._huge else MappedFile.page_bytes
        total = _rounded_bytes([place for u in units for place in (*u.dense, *u.sparse)], granule)
        if total <= self.room_bytes:
            for unit in units:
                unit.kept = True
            self.kept_bytes, self.streamed_bytes, self._ahead_room_bytes = total, 0, total
            return
        total = sum(u.full_bytes for u in units)
        largest = max(u.full_bytes for u in units)
        if not self._huge:  # a fault maps as much as was read at once, at both ends of what is read ahead
            largest += min(2 * MappedFile.huge_page_bytes, self.room_bytes // 4)
        ahead = max(*(u.dense_bytes for u in units), _LEAST_AHEAD_BYTES)
        budget = max(0, self.room_bytes - largest - ahead)
        owed = 0.0
        self.kept_bytes = 0
        for unit in units:
            owed += unit.full_bytes * budget / total
            if unit.full_bytes <= owed:
                unit.kept = True
                owed -= unit.full_bytes
                self.kept_bytes += unit.full_bytes
        self.streamed_bytes = sum(u.dense_bytes for u in units if not u.kept)
        self._find_neighbours(units)
        self._ahead_room_bytes = max(0, self.room_bytes - self.kept_bytes - largest)

    def _describe(self) -> str:
        layers = sum(not u.on_demand for u in self._order)
        kept = sum(u.kept for u in self._order)
        text = f"Offload: {layers} parts of the model on disk are read ahead of the computation; "
        if not self.streamed_bytes:
            text += f"all of them stay in memory once read ({format_bytes(self.kept_bytes)})."
        else:
            text += (
                f"{kept} stay in memory ({format_bytes(self.kept_bytes)}), {format_bytes(self.streamed_bytes)} are "
                f"read for each token, with {format_bytes(self.room_bytes)} in memory at most."
            )
        if self._files.converted_bytes:
            text += f" {format_bytes(self._files.converted_bytes)} were stored again in the model's dtype."
        return text

    def _hook(self, model: Any, units: list[_Unit], tensors: list[WaitingTensor]) -> None:
        for unit in units:
            hook = functools.partial(self._enter_on_demand if unit.on_demand else self._enter, unit)
            self._handles.append(model.get_submodule(unit.name).register_forward_pre_hook(hook))
        by_unit = sorted(units, key=lambda u: len(u.name), reverse=True)
        fused: dict[str, list[WaitingTensor]] = {}
        for t in tensors:
            if t.meta.dim() == 3 and t.meta.shape[0] == _expert_count(model):
                fused.setdefault(t.owner, []).append(t)
        for owner, group in fused.items():
            unit = next(u for u in by_unit if not u.name or owner == u.name or owner.startswith(f"{u.name}."))
            places = [(*self._files.ranges[t.name], int(t.meta.shape[0])) for t in group]
            hook = functools.partial(self._enter_experts, unit, places)
            self._handles.append(model.get_submodule(owner).register_forward_pre_hook(hook, with_kwargs=True))

    # --- while the model runs

    def _enter(self, unit: _Unit, _module: Any, _args: Any) -> None:
        """A unit is about to run: let go of the one before, make sure of this one, look after the next ones."""
        with self._lock:
            if self._closed:
                return
            for file in unit.files:
                file.check()
            last, self._current = self._current, unit
            if last is not None and last is not unit:
                for called in self._called_on_demand:
                    self._let_go(called)
                self._called_on_demand.clear()
                if last not in self._ahead:
                    self._let_go(last)
            self._advance(unit)
            self._look_for_evictions()
            self._bring_in(unit)
            self._look_ahead()
        self._readers.wait(unit)

    def _bring_in(self, unit: _Unit) -> None:
        """Make sure that a unit which is about to run is there or on its way.

        Pages that only have to be mapped are so here and now: handing that to a thread takes longer.
        """
        if not unit.from_disk and not unit.kept:
            for chunk in unit.chunks[unit.queued :]:
                unit.queued += 1
                if chunk.file.populate(chunk.start, chunk.end):
                    unit.from_disk = True
                    break
        todo = unit.chunks[unit.queued :]
        if todo:
            if not unit.queued:
                unit.from_disk = False  # until a thread finds otherwise
            unit.queued += len(todo)
            self._readers.put(todo, front=True)

    def _look_for_evictions(self) -> None:
        """After a fault that had to wait, check for a whole forward that what is kept is still there."""
        faults = major_faults()
        if faults != self._faults:
            self._faults, self._probes = faults, len(self._order)

    def _enter_on_demand(self, unit: _Unit, _module: Any, _args: Any) -> None:
        with self._lock:
            if self._closed:
                return
            for file in unit.files:
                file.check()
            self._called_on_demand.append(unit)
            self._bring_in(unit)
        self._readers.wait(unit)

    def _enter_experts(
        self, unit: _Unit, places: list[tuple[MappedFile, int, int, int]], _module: Any, args: Any, kwargs: Any
    ) -> None:
        """Fused experts are about to run: read those that the router chose, all at once."""
        import torch

        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        router = next((v for v in tensors if v.dtype in (torch.int64, torch.int32)), None)
        if router is None:
            return  # they are read when they are touched
        hit: list[int] = router.unique().tolist()  # type: ignore[no-untyped-call]
        wanted = _Unit(name=unit.name, dense=[], sparse=[])
        with self._lock:
            if self._closed:
                return
            for file, start, end, count in places:
                stride = (end - start) // count
                for expert in (e for e in hit if 0 <= e < count):
                    first = start + expert * stride
                    if (first, id(file)) in unit.chosen and file.is_resident(first, first + stride):
                        continue
                    unit.chosen.add((first, id(file)))
                    wanted.dense.append((file, first, first + stride))
            if not wanted.dense:
                return
            wanted.measure(MappedFile.page_bytes)
            self._bring_in(wanted)
        self._readers.wait(wanted)

    def _advance(self, unit: _Unit) -> None:
        """Find the unit in the order, and learn the order from what is really called."""
        if self._trace and unit is self._trace[0]:  # a forward has begun
            complete = len(self._trace) >= len(self._order) or self._trace == self._previous_trace
            if complete and self._trace != self._order:
                self._forget()
                self._order = self._trace
                self._position = len(self._order) - 1
                self._strays = [u for u in self._units if not u.on_demand and u not in self._order]
            for stray in self._strays:
                self._let_go(stray)
            self._read_into_huge_pages()
            self._previous_trace, self._trace = self._trace, []
        self._trace.append(unit)
        count = len(self._order)
        following = (self._position + 1) % count
        if self._order[following] is unit:
            self._position = following
            if self._ahead:
                self._ahead_bytes -= self._ahead.popleft().dense_bytes
            return
        self._forget()
        turned = [(following + step) % count for step in range(count)]
        self._position = next((i for i in turned if self._order[i] is unit), self._position)

    def _forget(self) -> None:
        """What was read ahead is not what comes next."""
        for chunk in self._readers.clear():
            chunk.owner.queued = 0
        for unit in self._ahead:
            if unit is not self._current:
                self._let_go(unit)
        self._ahead.clear()
        self._ahead_bytes = 0

    def _look_ahead(self) -> None:
        """Have the next units read as far as there is room."""
        count = len(self._order)
        room = self._ahead_room_bytes
        for unit in self._ahead:
            if not unit.kept:
                room -= sum(chunk.size_bytes for chunk in unit.chunks[: unit.queued])
        if self._ahead and not self._read_ahead(self._ahead[-1], room):
            return
        while len(self._ahead) < count - 1 and self._ahead_bytes < _LOOK_AHEAD_BYTES:
            unit = self._order[(self._position + 1 + len(self._ahead)) % count]
            self._ahead.append(unit)
            self._ahead_bytes += unit.dense_bytes
            before = unit.queued
            if unit.kept and unit.queued and self._probes:
                self._probes -= 1
                if not all(file.is_resident(start, end) for file, start, end in unit.dense):
                    unit.queued = 0  # the system took the pages for something else
            if not self._read_ahead(unit, room):
                return
            if not unit.kept:
                room -= sum(chunk.size_bytes for chunk in unit.chunks[before : unit.queued])

    def _read_ahead(self, unit: _Unit, room_bytes: int) -> bool:
        """Give what is left of a unit to the readers, as far as there is room; return whether nothing is left."""
        todo = unit.chunks[unit.queued :]
        if not unit.kept:
            if not unit.from_disk:
                return True  # brought in when it runs
            ends = itertools.accumulate(chunk.size_bytes for chunk in todo)
            todo = todo[: sum(end <= room_bytes for end in ends)]
        if todo:
            if not unit.queued:
                unit.from_disk = False  # until a thread finds otherwise
            unit.queued += len(todo)
            self._readers.put(todo, front=False)
        return unit.queued == len(unit.chunks)

    def _let_go(self, unit: _Unit) -> None:
        if unit.kept:
            return
        unit.queued = 0
        unit.chosen.clear()
        started = time.perf_counter()
        for file, start, end in (*unit.dense, *unit.sparse):
            file.release(start, end, drop=self._drops)
        if time.perf_counter() - started > unit.full_bytes * _HUGE_RELEASE_SECONDS_PER_BYTE:
            self._slow_bytes += unit.full_bytes
        for other in unit.beside:
            if not other.kept and not other.queued and other is not self._current:
                for file, start, end in (*other.dense, *other.sparse):
                    file.release(start, end, drop=False)

    def _read_into_huge_pages(self) -> None:
        """Once, if letting go shows that the system holds the files in small pages: read them again.

        It goes by how they were first written or read, and costs at each token more than the computation.
        """
        if self._slow_bytes * 2 > self.streamed_bytes and self._huge and not self._drops:
            for file in self._files.mapped.values():
                file.release(0, file.size_bytes, drop=True)
            for unit in self._units:
                unit.queued, unit.from_disk = 0, True
            self._huge = False
        self._slow_bytes = 0

    # --- the end

    def close(self) -> None:
        """Stop reading and let go of threads, files and mappings; the model's own references are its own.

        Called when the model is collected and when the program ends, too.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._finalizer.detach()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
        self._readers.close()
        self._units, self._order, self._trace, self._previous_trace, self._strays = [], [], [], [], []
        self._ahead.clear()
        self._called_on_demand.clear()
        self._current = None
        self._files.close()


def nearest_block(owner: str, blocks: frozenset[str]) -> str:
    """The block around a module, or the module itself."""
    name = owner
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name or owner


def _expert_count(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    return next((n for name in _EXPERT_COUNTS if isinstance(n := getattr(config, name, None), int)), 0)


def streamed_share(placement: Placement) -> float:
    """How much of what is on disk is read for every token, from 0 to 1, where layers run on the CPU.

    An estimate: what stays in memory is settled by where things are in the files.
    """
    sizes = [layer.bytes_after for layer in placement.layers if layer.device == "disk"]
    total, room = sum(sizes), _room_bytes(placement)
    if total <= room:
        return 0.0
    return 1.0 - max(0, room - max(sizes) - max(*sizes, _LEAST_AHEAD_BYTES)) / total


def _room_bytes(placement: Placement) -> int:
    """What the CPU's budget leaves for weights from disk: never less than the reserve that the preview shows."""
    memory = placement.memory.get("cpu")
    if memory is None:
        return 0
    room = min(
        memory.limit_bytes - memory.weight_bytes,
        memory.capacity_bytes - (memory.used_bytes - memory.reserved_bytes),
    )
    return max(room, memory.reserved_bytes)


def _free_bytes(placement: Placement) -> int:
    with contextlib.suppress(KeyError, ValueError):
        memory = placement.memory.get("cpu")
        return placement.machine.device("cpu").free_bytes - (memory.used_bytes if memory else 0)
    return 0
