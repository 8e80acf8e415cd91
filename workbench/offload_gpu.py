"""Layers that wait in RAM or on disk under a GPU: the next ones are copied while one computes.

Never run on a GPU yet: see docs/untested.md.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.hardware import format_bytes
from workbench.offload import nearest_block
from workbench.offload_files import UnservedError, WaitingTensor, WeightFiles, hooks_of
from workbench.offload_pages import Chunk, PageReaders

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workbench.placement import Placement


_CHUNK_BYTES = 4 * 2**20


@dataclass(eq=False, kw_only=True)
class _Unit:
    """A layer; ``fetched`` are its tensors on the GPU, complete once ``arrived`` has passed on the copy stream."""

    name: str
    tensors: list[WaitingTensor] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)  # in RAM or in a mapped file, one for each of the tensors
    chunks: list[Chunk] = field(default_factory=list)  # of the mapped files
    size_bytes: int = 0
    from_disk: bool = False
    fetched: list[Any] | None = None
    arrived: Any = None


class GpuOffload:
    """The waiting layers of one model, copied ahead of the computation on a stream of their own.

    Attributes:
        lines: What to report about it.
    """

    def __init__(self, model: Any, units: list[_Unit], files: WeightFiles, device: Any, room_bytes: int) -> None:
        import torch

        self._units = units
        self._files = files
        self._readers = PageReaders()
        self._device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._room_bytes = room_bytes
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._handles: list[Any] = []
        for index, unit in enumerate(units):
            module = model.get_submodule(unit.name)
            self._handles.append(module.register_forward_pre_hook(functools.partial(self._enter, index), prepend=True))
            leave = functools.partial(self._leave, unit)
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._finalizer = weakref.finalize(model, self.close)
        there = f"{format_bytes(room_bytes)} there at most"
        self.lines = (
            f"Offload: {len(units)} layers are copied to {self._device} ahead of the computation, with {there}.",
        )

    def _fetch(self, unit: _Unit) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            unit.fetched = [source.to(self._device, non_blocking=True) for source in unit.sources]
            unit.arrived = self._stream.record_event()

    def _enter(self, index: int, _module: Any, _args: Any) -> None:
        import torch

        unit = self._units[index]
        for file in {chunk.file for chunk in unit.chunks}:
            file.check()
        if unit.fetched is None:
            self._fetch(unit)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(unit.arrived)
        for t, tensor in zip(unit.tensors, unit.fetched or (), strict=True):
            tensor.record_stream(stream)  # or its memory would be given away while it is still read
            is_parameter = isinstance(t.meta, torch.nn.Parameter)
            t.put(torch.nn.Parameter(tensor, requires_grad=t.meta.requires_grad) if is_parameter else tensor)
        room = self._room_bytes - sum(u.size_bytes for u in self._units if u.fetched is not None)
        for step in range(1, len(self._units)):
            following = self._units[(index + step) % len(self._units)]
            if following.fetched is None:
                if following.size_bytes > room:
                    self._readers.put(following.chunks, front=False)  # so that its copy will not wait for the disk
                    break
                room -= following.size_bytes
                self._fetch(following)

    def _leave(self, unit: _Unit, _module: Any, _args: Any, _output: Any) -> None:
        for t in unit.tensors:
            t.put(t.meta)
        unit.fetched = unit.arrived = None

    def state(self) -> dict[str, Any]:
        """The full name of every tensor that waits, and it: in RAM or in a mapped file."""
        return {t.name: source for unit in self._units for t, source in zip(unit.tensors, unit.sources, strict=True)}

    def close(self) -> None:
        """Let go of the copies and of the memory that they come from."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._readers.close()
        for unit in self._units:
            unit.sources.clear()
            unit.tensors.clear()
            unit.fetched = unit.arrived = None
        self._units = []
        self._stream = None
        self._files.close()
        self._finalizer.detach()


def attach_to_gpu(
    model: Any,
    tensors: list[WaitingTensor],
    mapped: Mapping[str, Any],
    files: WeightFiles,
    placement: Placement,
) -> GpuOffload:
    """Replace what accelerate's hooks fetch by copies ahead; its hooks stay and move the inputs.

    Args:
        model: As ``from_pretrained`` with the placement's device map gives it, before its first forward.
        tensors: What waits.
        mapped: Tensor name to its view in a mapped file, for those on disk.
        files: These files, which the offload closes.
        placement: Where everything is.

    Returns:
        The offload.

    Raises:
        UnservedError: If accelerate's hooks have to fetch the weights; nothing has been changed then.
    """
    import torch

    hooks = [h for module in model.modules() for h in hooks_of(module) if getattr(h, "offload", False)]
    devices = {hook.execution_device for hook in hooks}
    main = next(iter(devices))
    if len(devices) != 1 or torch.device(main).type != "cuda":
        raise UnservedError("the waiting layers run on something else than one CUDA device")
    blocks = frozenset(layer.name for layer in placement.layers)
    units: dict[str, _Unit] = {}
    for t in tensors:
        name = nearest_block(t.owner, blocks)
        unit = units.setdefault(name, _Unit(name=name))
        # Only from pinned memory does a copy run beside the computation.
        source = mapped[t.name].data if t.in_ram is None else t.in_ram.to(t.meta.dtype).pin_memory()
        unit.tensors.append(t)
        unit.sources.append(source)
        unit.size_bytes += source.nbytes
        if t.in_ram is None:
            file, start, end = files.ranges[t.name]
            unit.chunks += [
                Chunk(owner=unit, file=file, start=at, end=min(end, at + _CHUNK_BYTES))
                for at in range(start, end, _CHUNK_BYTES)
            ]
    memory = placement.memory[main]
    room = max(memory.reserved_bytes, memory.capacity_bytes - (memory.used_bytes - memory.reserved_bytes))
    for hook in hooks:
        hook.offload = False
        hook.weights_map = hook.tied_params_map = None
    return GpuOffload(model, list(units.values()), files, main, room)
