"""How many bytes each tensor takes in the model's own dtype and in the chosen precision.

Looks at what ``from_pretrained`` keeps in float32, which is not transformers' public API; tests/test_sizes.py compares
the bytes with those of loaded models.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.checkpoint import owner_of
from workbench.four_bit import kept_tensors
from workbench.precision import GPTQ, FourBit, FullPrecision, Int8

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from workbench.hardware import DeviceId
    from workbench.precision import Precision
    from workbench.skeleton import MetaModel, Skeleton


@dataclass(frozen=True, kw_only=True)
class TensorSize:
    """One tensor that is really there after the load (tied copies are not)."""

    name: str
    before_bytes: int
    after_bytes: int
    kept_bytes: int  # if its module is left out of the quantization because it is offloaded
    upcast_bytes: int  # of kept_bytes, what being kept in float32 adds; a parameter on disk goes without
    is_buffer: bool
    is_saved: bool  # it has a name in the checkpoint, which not every buffer has
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Sums over the tensors of a block or of a part of it; buffers apart because they stay where the block runs."""

    name: str
    before_bytes: int
    parameter_bytes: int
    kept_bytes: int
    upcast_bytes: int
    buffer_bytes: int
    saved_buffer_bytes: int
    saved_upcast_bytes: int  # of saved_buffer_bytes, likewise
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model's tensors in one precision.

    Attributes:
        tensors: All that are really there after a load.
        block_of: Tensor name to the name of the block that it belongs to.
        blocks: Block name to its sums.
        module_names: The names that a device map may use.
    """

    tensors: tuple[TensorSize, ...]
    block_of: dict[str, str]
    blocks: dict[str, Piece]
    module_names: frozenset[str]

    def block_named(self, tensor: str) -> str | None:
        """The block around a tensor, also around a tied copy, which has no bytes of its own."""
        return nearest(tensor, self.blocks)

    def parts_of(self, block: str) -> list[Piece]:
        """A block tensor by tensor, for maps that cut through it."""
        return [_piece(t.name, [t]) for t in self.tensors if self.block_of[t.name] == block]


_sizes: weakref.WeakKeyDictionary[MetaModel, dict[bool, Sizes]] = weakref.WeakKeyDictionary()


def sizes_of(skeleton: Skeleton, precision: Precision) -> Sizes:
    """Sizes of every tensor of a model in a precision, worked out once.

    Raises:
        ValueError: If the precision's library is missing.
    """
    meta = skeleton.meta_model(precision)
    made_int8 = isinstance(precision, GPTQ) and precision.backend == "torch_int8"
    kept = _sizes.setdefault(meta, {})
    if made_int8 not in kept:
        kept[made_int8] = _add_up(skeleton, meta, precision, made_int8=made_int8)
    return kept[made_int8]


def _add_up(skeleton: Skeleton, meta: MetaModel, precision: Precision, *, made_int8: bool) -> Sizes:
    if meta.stored:
        tensors = _as_stored(skeleton, meta)
    elif meta.prequantized:
        tensors = _as_packed(skeleton, meta)
        if made_int8:
            tensors = _as_int8(meta, tensors)
    else:
        tensors = _as_quantized(skeleton, meta, precision)
    names = {block.name for block in skeleton.blocks}
    block_of = {t.name: nearest(t.name, names) or skeleton.blocks[0].name for t in tensors}
    grouped: dict[str, list[TensorSize]] = {block.name: [] for block in skeleton.blocks}
    for t in tensors:
        grouped[block_of[t.name]].append(t)
    blocks = {name: _piece(name, group) for name, group in grouped.items()}
    # transformers' own maps name a shared module by each of its names, and single parameters that hang on inner nodes.
    modules = frozenset(name for name, _ in meta.module.named_modules(remove_duplicate=False)) | {
        name for name, _ in meta.module.named_parameters(remove_duplicate=False)
    }
    return Sizes(tensors=tuple(tensors), block_of=block_of, blocks=blocks, module_names=modules)


def _as_packed(skeleton: Skeleton, meta: MetaModel) -> list[TensorSize]:
    """The tensors of a tree whose modules are those of a quantized checkpoint already."""
    before = _unquantized_bytes(skeleton.plain_model())
    kept = _unquantized_bytes(meta)
    saved = meta.module.state_dict().keys()
    tensors = []
    for name, tensor in _named_tensors(meta.module):
        if name in skeleton.tied:
            continue
        owner, _, last = name.rpartition(".")
        child = meta.module.get_submodule(owner)
        is_bitsandbytes = last == "weight" and type(child).__name__ in ("Linear4bit", "Linear8bitLt")
        after = kept[name]
        if is_bitsandbytes and isinstance(skeleton.stored, (Int8, FourBit)):
            after = skeleton.stored.quantized_bytes((child.out_features, child.in_features))
        whole = before.get(name, before.get(f"{owner}.weight", 0) if last == "qweight" else 0)
        narrow = not is_bitsandbytes and tensor.element_size() == 1  # fp8 has names of its own for the scales alone
        is_buffer = not _is_parameter(tensor)
        tensors.append(
            TensorSize(
                name=name,
                before_bytes=whole,
                after_bytes=after,
                kept_bytes=after,  # what is quantized in the checkpoint is so on every device
                upcast_bytes=0 if is_bitsandbytes else after - tensor.numel() * tensor.element_size(),
                is_buffer=is_buffer,
                is_saved=not is_buffer or name in saved,
                quantized=is_bitsandbytes or narrow or (name not in before and name in saved),
            )
        )
    tensors += [
        _made_later(f"{name}.{table}", tensor)
        for name, child in meta.module.named_modules()
        for table, tensor in _kernel_tables(child)
    ]
    return tensors


def _as_int8(meta: MetaModel, tensors: list[TensorSize]) -> list[TensorSize]:
    """What one of gptqmodel's kernels makes of packed weights once they are read: int8, and a float32 for each row."""
    packed = {name: child for name, child in meta.module.named_modules() if hasattr(child, "qweight")}
    found = []
    for tensor in tensors:
        owner, _, last = tensor.name.rpartition(".")
        child = packed.get(owner)
        if child is None or last == "bias":
            found.append(tensor)
        elif last == "qweight":
            size = child.out_features * (child.in_features + 4)
            found.append(replace(tensor, after_bytes=size, kept_bytes=size, is_saved=False))
    return found


def _kernel_tables(module: Any) -> list[tuple[str, Any]]:
    """What one of gptqmodel's kernels makes for itself after the weights are read.

    It is made, looked at and taken away again: transformers plans before it is there.
    """
    make = getattr(module, "_init_wf_unsqueeze_buffers", None)
    if make is None:
        return []
    there = set(module._buffers)  # noqa: SLF001 - there is no public way to take a buffer away
    make()
    made = [(name, module._buffers.pop(name)) for name in list(module._buffers) if name not in there]  # noqa: SLF001 - likewise
    # The two tables of a kernel are views of one.
    return list({tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in made}.values())  # noqa: SLF001 - a storage's identity


def _made_later(name: str, tensor: Any) -> TensorSize:
    """A buffer that no checkpoint holds."""
    size = tensor.numel() * tensor.element_size()
    return TensorSize(
        name=name,
        before_bytes=size,
        after_bytes=size,
        kept_bytes=size,
        upcast_bytes=0,
        is_buffer=True,
        is_saved=False,
        quantized=False,
    )


def _as_stored(skeleton: Skeleton, meta: MetaModel) -> list[TensorSize]:
    """The tensors of the checkpoint's files, and the buffers that no checkpoint holds."""
    before = _unquantized_bytes(meta)
    left = {name: size for name, size in before.items() if name not in {t.name for t in meta.stored}}
    found = []
    for tensor in sorted(meta.stored, key=lambda t: -t.size_bytes):  # the values come before what is beside them
        if tensor.name not in skeleton.tied:
            whole = before.get(tensor.name)
            found.append((tensor, left.pop(f"{owner_of(tensor.name)}.weight", 0) if whole is None else whole))
    tensors = [
        TensorSize(
            name=tensor.name,
            before_bytes=whole,
            after_bytes=tensor.size_bytes,
            kept_bytes=tensor.size_bytes,
            upcast_bytes=0,
            is_buffer=False,
            is_saved=True,
            quantized=tensor.name not in before or tensor.dtype not in ("BF16", "F16", "F32"),
        )
        for tensor, whole in found
    ]
    saved = meta.module.state_dict().keys()
    return tensors + [_made_later(name, tensor) for name, tensor in meta.module.named_buffers() if name not in saved]


def stored_element_sizes(skeleton: Skeleton, meta: MetaModel, precision: Precision) -> dict[str, float]:
    """Bytes an element of each parameter, by what a quantized checkpoint's files hold or a load makes: for planning.

    What a method adds to a weight counts with it; what cannot be told apart (experts that are fused when they are
    loaded) is spread over the block's other parameters.
    """
    sizes = sizes_of(skeleton, FullPrecision() if meta.stored else precision)
    parameters = dict(meta.module.named_parameters())
    held: dict[str, int] = {}
    loose: dict[str, int] = {}
    for tensor in sizes.tensors:
        names = (tensor.name, f"{owner_of(tensor.name)}.weight")
        known = next((name for name in names if name in parameters), None)
        if known is not None:
            held[known] = held.get(known, 0) + tensor.after_bytes
        elif not tensor.is_buffer:
            home = sizes.block_of[tensor.name]
            loose[home] = loose.get(home, 0) + tensor.after_bytes
    others: dict[str | None, list[str]] = {}
    for name in parameters:
        if name not in held:
            others.setdefault(sizes.block_named(name), []).append(name)
    for block, size in loose.items():
        names_left = others.get(block, [])
        elements = sum(parameters[name].numel() for name in names_left)
        for name in names_left:
            held[name] = round(size * parameters[name].numel() / max(1, elements))
    return {name: held.get(name, 0) / max(1, p.numel()) for name, p in parameters.items()}


def _as_quantized(skeleton: Skeleton, meta: MetaModel, precision: Precision) -> list[TensorSize]:
    """The tensors of a tree that is quantized while it is loaded, or not at all."""
    before = _unquantized_bytes(skeleton.plain_model())
    unquantized = _unquantized_bytes(meta)
    split = _split_from(meta) if meta.quantizer is not None else {}
    saved = meta.module.state_dict().keys()
    tensors = []
    for name, tensor in _named_tensors(meta.module):
        if name in skeleton.tied:
            continue
        is_buffer = not _is_parameter(tensor)
        quantized = (
            not is_buffer
            and all(_needs_quantization(skeleton, meta, precision, n) for n in {name, split.get(name, name)})
            and not isinstance(precision, (FullPrecision, GPTQ))
            and not (isinstance(precision, Int8) and precision.has_fp16_weight)
        )
        kept = unquantized[name]
        after = precision.quantized_bytes(tuple(tensor.shape), meta.dtype) if quantized else kept  # type: ignore[union-attr]
        tensors.append(
            TensorSize(
                name=name,
                before_bytes=before.get(name, kept),
                after_bytes=after,
                kept_bytes=kept,
                upcast_bytes=0 if quantized else kept - tensor.numel() * tensor.element_size(),
                is_buffer=is_buffer,
                is_saved=not is_buffer or name in saved,
                quantized=quantized,
            )
        )
    return tensors


def _needs_quantization(skeleton: Skeleton, meta: MetaModel, precision: Precision, name: str) -> bool:
    """Whether a parameter is quantized while it is loaded: by transformers' quantizer, else by its module's name."""
    if meta.quantizer is not None:
        return bool(meta.quantizer.param_needs_quantization(meta.module, name))
    if isinstance(precision, FullPrecision):
        return False
    from transformers.quantizers.quantizers_utils import should_convert_module

    module = name.removesuffix(".weight")
    skipped = list(precision.skip_modules or skeleton.default_skips)
    return module != name and module in skeleton.linear_modules and bool(should_convert_module(module, skipped))


def _piece(name: str, tensors: list[TensorSize]) -> Piece:
    return Piece(
        name=name,
        before_bytes=sum(t.before_bytes for t in tensors),
        parameter_bytes=sum(t.after_bytes for t in tensors if not t.is_buffer),
        kept_bytes=sum(t.kept_bytes for t in tensors if not t.is_buffer),
        upcast_bytes=sum(t.upcast_bytes for t in tensors if not t.is_buffer),
        buffer_bytes=sum(t.after_bytes for t in tensors if t.is_buffer),
        saved_buffer_bytes=sum(t.after_bytes for t in tensors if t.is_buffer and t.is_saved),
        saved_upcast_bytes=sum(t.upcast_bytes for t in tensors if t.is_buffer and t.is_saved),
        quantized=any(t.quantized for t in tensors),
    )


def _named_tensors(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _is_parameter(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.nn.Parameter)


def _unquantized_bytes(meta: MetaModel) -> dict[str, int]:
    """Bytes of each tensor as it is loaded where nothing quantizes it.

    Some are kept in float32 whatever dtype is asked for. Saved buffers are among them (DeepSeek's routers); what is
    not saved is not cast.
    """
    import torch
    from transformers.core_model_loading import build_glob_alternation

    upcast: frozenset[str] = frozenset()
    plan = meta.module._get_dtype_plan(getattr(torch, meta.dtype))  # noqa: SLF001 - see the module's docstring
    if plan:
        pattern = build_glob_alternation(list(plan))[0]
        upcast = frozenset(name for name in meta.module.state_dict() if pattern.search(name))
    return {
        name: tensor.numel() * (4 if name in upcast else tensor.element_size())
        for name, tensor in _named_tensors(meta.module)
    }


def _split_from(meta: MetaModel) -> dict[str, str]:
    """For each parameter that is cut from a larger tensor of the checkpoint, the name of that tensor's first part.

    transformers decides by the first part alone whether to quantize all of them, so one that is left out keeps its
    neighbours (query, key and value of HRM-Text) in full precision too. A checkpoint saved by transformers holds them
    in one tensor; one that holds them apart would be quantized part by part.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    targets = [conversion.target_patterns for conversion in get_model_conversion_mapping(meta.module)]
    names = {name for name, _ in meta.module.named_parameters()}
    found = {}
    for first, *others in (patterns for patterns in targets if len(patterns) > 1):
        for name, part in ((name, part) for name in names for part in others if part in name):
            whole = name.replace(part, first, 1)
            if whole in names:
                found[name] = whole
    return found


def nearest(name: str, candidates: Mapping[str, Any] | set[str]) -> str | None:
    """The longest of the candidates that is the name itself or a module around it; the root is ``""``."""
    while name not in candidates:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def device_of(name: str, device_map: Mapping[str, DeviceId]) -> DeviceId | None:
    """Where a map puts a module or tensor; None if it says nothing about it."""
    key = nearest(name, device_map)
    return None if key is None else device_map[key]


_totals: weakref.WeakKeyDictionary[Skeleton, dict[Precision, int]] = weakref.WeakKeyDictionary()


def smaller_precisions(skeleton: Skeleton, current: Precision) -> list[tuple[Precision, int]]:
    """Total weight bytes under the precisions that are smaller than the current one, from the shapes alone."""
    if isinstance(current, FourBit) or skeleton.quantized_as is not None:
        return []
    if skeleton not in _totals:
        _totals[skeleton] = {precision: _quantized_total(skeleton, precision) for precision in (Int8(), FourBit())}
    smaller = (Int8(), FourBit()) if isinstance(current, FullPrecision) else (FourBit(),)
    return [(precision, _totals[skeleton][precision]) for precision in smaller]


def _quantized_total(skeleton: Skeleton, precision: Int8 | FourBit) -> int:
    from transformers.pytorch_utils import Conv1D

    module = skeleton.plain_model().module
    convertible = {}
    for name in skeleton.linear_modules:
        if name not in skeleton.default_skips:
            child = module.get_submodule(name)
            shape = tuple(child.weight.shape)
            convertible[f"{name}.weight"] = shape[::-1] if isinstance(child, Conv1D) else shape  # Conv1D is (in, out)
    return sum(
        precision.quantized_bytes(convertible[name]) if name in convertible else tensor.nbytes
        for name, tensor in _named_tensors(module)
        if name not in skeleton.tied
    )


# --- after a load --------------------------------------------------------------------------------------------------


def measure_weights(model: Any) -> dict[DeviceId, int]:
    """Add up the tensors that a loaded model really holds, quantization state included, each storage once.

    Args:
        model: A loaded ``transformers`` model, with or without accelerate's offload hooks.

    Returns:
        Device, as ``max_memory`` spells it, to bytes: as they are now, which some backends change at the first forward.
    """
    import torch

    sizes: dict[DeviceId, int] = {}
    seen: set[Any] = set()

    def add(tensor: Any, home: DeviceId) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors are made of others
            for name in tensor.__tensor_flatten__()[0]:
                if isinstance(part := getattr(tensor, name), torch.Tensor):
                    add(part, home)
            return
        # Views of one piece of memory count once, whatever their shapes.
        identity = id(tensor) if tensor.is_meta else (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        if identity not in seen and tensor.numel():
            seen.add(identity)
            sizes[home] = sizes.get(home, 0) + tensor.numel() * tensor.element_size()

    offloaded_tied: set[str] = set()
    tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            full_name = prefix + name
            if tensor.is_meta:
                if full_name in tied or full_name in offloaded_tied:
                    continue  # the same bytes in the same place as the tensor that it is tied to
                offloaded_tied.add(full_name)
                add(tensor, _offloaded_to(module, name))
                continue
            add(tensor, _device_id(tensor.device))
            for extra in _quantization_state(tensor):
                if isinstance(extra, torch.Tensor):
                    add(extra, _device_id(extra.device))
        for extra in _kernel_state(module):
            if isinstance(extra, torch.Tensor) and not extra.is_meta:
                add(extra, _device_id(extra.device))
    return sizes


def _quantization_state(parameter: Any) -> Iterator[Any]:
    """The tensors that bitsandbytes keeps beside a quantized weight."""
    yield getattr(parameter, "SCB", None)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        nested = getattr(state, "state2", None)
        yield from (state.absmax, state.code, getattr(state, "offset", None))
        if nested is not None:
            yield from (nested.absmax, nested.code)
        yield from kept_tensors(state)


def _kernel_state(module: Any) -> Iterator[Any]:
    """What a quantized module holds that is neither parameter nor buffer, once it has run."""
    # bitsandbytes moves the scales here; PEFT has a class of the same name.
    if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):
        yield from (module.state.CB, module.state.SCB)
    elif type(module).__module__.startswith("gptqmodel."):
        yield from vars(module).values()


def _offloaded_to(module: Any, name: str) -> DeviceId:
    """Where accelerate keeps a parameter of which the model itself has only the shape."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    prefix = ""
    while weights is not None and hasattr(weights, "dataset"):
        prefix += weights.prefix
        weights = weights.dataset
    if weights is not None and prefix + name in getattr(weights, "state_dict", {}):
        return "cpu"
    return "disk"


def _device_id(device: Any) -> DeviceId:
    if device.type == "cuda":
        return int(device.index or 0)
    return str(device.type)
