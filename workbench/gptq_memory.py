"""Keep what the finished parts of a decoder layer gave, so that no pass over it computes them again.

While a layer is quantized in stages, each pass runs it a little further. A module that is done, with everything before
it, gives the same output for the same batch in every later pass of that layer; so does one in which nothing is
quantized (a norm), if all that ran before it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(kw_only=True)
class LayerMemory:
    """The outputs of one decoder layer's finished modules.

    Attributes:
        name: Of the layer.
        block: The layer.
        targets: Full names of the modules that are quantized in it.
        most_bytes: What it may hold; beyond that, things are computed again.
    """

    name: str
    block: Any
    targets: tuple[str, ...]
    most_bytes: int
    _batch: int = 0
    _settled: bool = True
    _kept: dict[str, dict[tuple[int, int], tuple[Any, int]]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)
    _before: dict[str, Any] = field(default_factory=dict)
    _bytes: int = 0

    def start(self, batch: int) -> None:
        """Say which batch runs next."""
        self._batch = batch
        self._settled = True
        self._calls = {}

    def unsettle(self) -> None:
        """Say that a module is run that is not done: what comes after it in this pass may change yet."""
        self._settled = False

    def remember(self, done: set[str]) -> None:
        """From now on, keep the outputs of modules in which everything is done, the outermost of them."""
        for name, module, is_quantized in self._outermost(self.name, self.block, done):
            if name not in self._kept:
                self._install(name, module, settled=not is_quantized)

    def tidy(self) -> None:
        """After a pass: drop what lies inside of something that is kept by now."""
        full = [name for name, kept in self._kept.items() if kept]
        for name in [n for n in self._kept if any(n.startswith(f"{other}.") for other in full)]:
            self._remove(name)

    def clear(self) -> None:
        """Forget everything; the modules are as they were."""
        for name in list(self._kept):
            self._remove(name)

    def _outermost(self, name: str, module: Any, done: set[str]) -> Iterator[tuple[str, Any, bool]]:
        """Name, module, and whether anything in it is quantized."""
        below = [target for target in self.targets if target == name or target.startswith(f"{name}.")]
        if not below and name.rpartition(".")[0] != self.name:
            return  # small things inside of others, such as activation functions
        if name != self.name and done.issuperset(below):
            yield name, module, bool(below)
            return
        for child_name, child in module.named_children():
            yield from self._outermost(f"{name}.{child_name}", child, done)

    def _install(self, name: str, module: Any, *, settled: bool) -> None:
        original = module.forward
        kept: dict[tuple[int, int], tuple[Any, int]] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            known = kept.get((self._batch, call))
            if known is not None and known[1] == _versions(known[0]):
                return known[0]
            output = original(*args, **kwargs)
            size = sum(tensor.nbytes for tensor in _tensors(output))
            trusted = self._settled or not settled
            if known is None and trusted and self._bytes + size <= self.most_bytes:
                self._bytes += size
                kept[self._batch, call] = (output, _versions(output))
            return output

        self._before[name] = (module, vars(module).get("forward"))  # accelerate's hooks put theirs there too
        self._kept[name] = kept
        module.forward = forward

    def _remove(self, name: str) -> None:
        module, own = self._before.pop(name)
        if own is None:
            del module.forward
        else:
            module.forward = own
        self._bytes -= sum(t.nbytes for output, _ in self._kept.pop(name).values() for t in _tensors(output))


def _tensors(output: Any) -> list[Any]:
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [tensor for one in output for tensor in _tensors(one)]
    return []


def _versions(output: Any) -> int:
    """Changes when somebody has written into the tensors."""
    return sum(tensor._version for tensor in _tensors(output))  # noqa: SLF001 - how torch counts writes
