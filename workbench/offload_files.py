"""What waits on disk, and where in the checkpoint's own files its bytes are: what offload.py runs from.

Leans on how accelerate's hooks and transformers' index of offloaded weights look, which is not public API;
tests/test_offload.py compares the logits and fails when they change.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.offload_pages import MappedFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_KEEPS_FREE_BYTES = 2**30  # on the disk, beside weights that have to be converted


class UnservedError(Exception):
    """Why accelerate's hooks have to stay: the second half of a sentence."""


@dataclass(frozen=True, kw_only=True)
class WaitingTensor:
    """A parameter or buffer that is kept where its module does not run.

    Attributes:
        name: Its full name.
        module: Whose it is.
        meta: What stands in for it in the module.
        in_ram: It, if it waits in RAM; else None.
        path: The safetensors file that it waits in.
        key: Its name there.
        dtypes: What accelerate casts it to, one after the other.
    """

    name: str
    module: Any = field(repr=False)
    meta: Any = field(repr=False)
    in_ram: Any | None = field(default=None, repr=False)
    path: str = ""
    key: str = ""
    dtypes: tuple[Any, ...] = ()

    @property
    def owner(self) -> str:
        """The name of its module."""
        return self.name.rpartition(".")[0]

    def put(self, tensor: Any) -> None:
        """Make a tensor the module's."""
        local = self.name.rpartition(".")[2]
        is_parameter = local in self.module._parameters  # noqa: SLF001 - as accelerate sets them
        where = self.module._parameters if is_parameter else self.module._buffers  # noqa: SLF001 - likewise
        where[local] = tensor


def hooks_of(module: Any) -> list[Any]:
    """Accelerate's hooks on one module, also where several are chained."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def find_waiting(model: Any) -> list[WaitingTensor]:
    """All tensors that accelerate's hooks would fetch.

    Raises:
        UnservedError: If one is of a kind that only they know how to fetch.
    """
    import torch

    found = []
    for name, module in model.named_modules():
        for hook in (h for h in hooks_of(module) if getattr(h, "offload", False)):
            prefix, weights = "", hook.weights_map
            while hasattr(weights, "dataset"):
                prefix, weights = prefix + weights.prefix, weights.dataset
            own = {**module._parameters, **module._buffers}  # noqa: SLF001 - as accelerate sets them
            index: Mapping[str, Any] = getattr(weights, "index", None) or {}
            in_ram: Mapping[str, Any] = getattr(weights, "state_dict", None) or {}
            for local, meta in own.items():
                if meta is None or not meta.is_meta:
                    continue
                tensor, key = functools.partial(WaitingTensor, module=module, meta=meta), prefix + local
                full_name = f"{name}.{local}" if name else local
                if type(meta) not in (torch.nn.Parameter, torch.Tensor):
                    raise UnservedError(f"{full_name} is no plain tensor but a {type(meta).__name__}")
                if key in in_ram:
                    found.append(tensor(name=full_name, in_ram=in_ram[key]))
                    continue
                entry = index.get(key, {})
                if "safetensors_file" not in entry:
                    raise UnservedError(f"{full_name} is in no safetensors file")
                stored = getattr(torch, entry["dtype"]) if "dtype" in entry else meta.dtype
                file, key = str(entry["safetensors_file"]), entry.get("weight_name", key)
                found.append(tensor(name=full_name, path=file, key=key, dtypes=(stored, meta.dtype)))
    return found


class WeightFiles:
    """The mapped files, and where in them each tensor is.

    Attributes:
        mapped: The files by path.
        ranges: Tensor name to file, first byte and the byte after the last.
        converted_bytes: What had to be stored again because the checkpoint holds it in another dtype.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._copies: Path | None = None  # ours in that folder, which may be somebody's own
        self.mapped: dict[str, MappedFile] = {}
        self.ranges: dict[str, tuple[MappedFile, int, int]] = {}
        self.converted_bytes = 0

    def _open(self, path: str) -> MappedFile:
        if path not in self.mapped:
            self.mapped[path] = MappedFile(path)
        return self.mapped[path]

    def map(self, tensors: Iterable[WaitingTensor]) -> dict[str, Any]:
        """Make a parameter or buffer of every tensor; those that share bytes are one and the same object.

        Raises:
            UnservedError: If the files cannot serve.
            OSError: If a file cannot be opened or is damaged.
        """
        import torch

        made: dict[tuple[str, str, Any], Any] = {}
        result = {}
        for t in tensors:
            path, key = self._converted(t) if self._needs_converting(t) else (t.path, t.key)
            meta, identity = t.meta, (path, key, type(t.meta))
            start, end = self._open(path).entries[key][2:]
            if identity not in made:
                tensor = self._open(path).tensor(key)
                if tensor.shape != meta.shape:
                    raise UnservedError(f"{t.name} has another shape in the file than in the model")
                if isinstance(meta, torch.nn.Parameter):
                    tensor = torch.nn.Parameter(tensor, requires_grad=meta.requires_grad)
                made[identity] = tensor
            result[t.name] = made[identity]
            self.ranges[t.name] = (self._open(path), start, end)
        in_use = {file for file, _, _ in self.ranges.values()}
        for path in [path for path, file in self.mapped.items() if file not in in_use]:
            self.mapped.pop(path).close()  # all that it was needed for has been stored again
        return result

    def _needs_converting(self, t: WaitingTensor) -> bool:
        entries = self._open(t.path).entries
        if t.key not in entries:
            raise UnservedError(f"{t.key} is not in {t.path}")
        return any(dtype != entries[t.key][0] for dtype in t.dtypes)

    def _converted(self, t: WaitingTensor) -> tuple[str, str]:
        """Store a copy in the dtype that the model wants: casting at each token would cost more than reading."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._folder is None:
            raise UnservedError(f"{t.name} is in the checkpoint in another dtype, and there is no folder for a copy")
        dtype = str(t.dtypes[-1]).removeprefix("torch.")
        size = t.meta.numel() * t.dtypes[-1].itemsize
        try:
            if self._copies is None:
                self._copies = Path(tempfile.mkdtemp(prefix="workbench-", dir=self._folder))
            path = f"{self._copies}/{t.key}.{dtype}.safetensors"
            if path in self.mapped:
                return path, t.key
            tensor = self._open(t.path).tensor(t.key)
            if shutil.disk_usage(self._folder).free < size + _KEEPS_FREE_BYTES:
                raise UnservedError(_no_room(t.name))
            for dtype_ in t.dtypes:
                tensor = tensor.to(dtype_)
            save_file({t.key: tensor.contiguous()}, path)
        except (OSError, SafetensorError):
            raise UnservedError(_no_room(t.name)) from None
        self.converted_bytes += size
        return path, t.key

    def close(self) -> None:
        """Close the files and remove our copies; a mapping goes with the last tensor of it."""
        for file in self.mapped.values():
            file.close()
        self.mapped.clear()
        self.ranges.clear()
        if self._copies is not None:
            shutil.rmtree(self._copies, ignore_errors=True)
            self._copies = None


def _no_room(name: str) -> str:
    return f"{name} is in the checkpoint in another dtype, and the disk has no room for a copy"


def switch(model: Any, tensors: Iterable[WaitingTensor], parameters: Mapping[str, Any]) -> None:
    """Put the mapped tensors into the modules and take accelerate's hooks off: all runs on the CPU."""
    from accelerate.hooks import remove_hook_from_module

    for t in tensors:
        t.put(parameters[t.name])
    for module in model.modules():
        for hook in hooks_of(module):
            hook.offload = False  # else taking it off would read everything into memory
            hook.weights_map = hook.tied_params_map = None
        remove_hook_from_module(module)
