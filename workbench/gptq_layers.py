"""Take a model through GPTQ layer by layer.

gptqmodel's ``GPTQ`` does the rounding. What is fed to it is arranged here: calibration sequences go through the decoder
layers in batches, each layer once for every stage and only as far as that stage; modules with the same input (query,
key and value) share one Hessian and are rounded in one go, which changes nothing for any of them.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from workbench.gptq_memory import LayerMemory
from workbench.gptq_packing import PackedLinear, dequantize, pack_linear
from workbench.precision import FullPrecision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from workbench.precision import GPTQ
    from workbench.skeleton import Skeleton

_PACK = 32  # values in a packed block: features come in multiples of it
_ONE_THREAD_WEIGHTS = 8_000_000
_ERROR_TOKENS = 512  # on so many the output error of a module is measured


def quantizable_modules(skeleton: Skeleton, precision: GPTQ) -> dict[str, tuple[str, ...]]:
    """The modules that GPTQ will quantize, layer by layer.

    Args:
        skeleton: The model.
        precision: How.

    Returns:
        Name of each decoder layer to the full names of its modules, those of ``skip_modules`` left out.

    Raises:
        ValueError: If a module's shape does not go with the group size or the packing, or there is nothing to quantize.
    """
    module = skeleton.meta_model(FullPrecision()).module
    found: dict[str, tuple[str, ...]] = {}
    every: list[str] = []
    for block in skeleton.decoder_blocks:
        names = []
        for name, child in module.get_submodule(block).named_modules():
            if not _is_linear(child):
                continue
            full = f"{block}.{name}" if name else block
            every.append(full)
            if not any(f".{skip}." in f".{full}." for skip in precision.skip_modules):
                names.append(full)
                _check_shape(full, linear_shape(child), precision)
        found[block] = tuple(names)
    title = skeleton.source.title
    for skip in precision.skip_modules:
        if not any(f".{skip}." in f".{name}." for name in (*every, *skeleton.linear_modules)):
            kinds = sorted({name.rpartition(".")[2] for name in every})
            raise ValueError(f"{title} has no module {skip!r} to skip; its layers have {', '.join(kinds)}.")
    if not any(found.values()):
        if every:
            raise ValueError("skip_modules names every module there is: nothing is left to quantize.")
        raise ValueError(
            f"GPTQ finds nothing to quantize in {title}: its decoder layers hold no plain linear modules "
            "(Falcon and fused experts have classes of their own); take int8 or 4-bit, or another model."
        )
    return found


def with_fitting_groups(precision: GPTQ, skeleton: Skeleton) -> GPTQ:
    """The same choices, with the largest group size that divides the model's modules if their own does not."""
    for size in (precision.group_size, 128, 64, 32, -1):
        tried = replace(precision, group_size=size)
        try:
            quantizable_modules(skeleton, tried)
        except ValueError:
            continue
        return tried
    return precision  # something else is the matter, and will be said


def quantized_shapes(skeleton: Skeleton) -> tuple[tuple[int, int], ...]:
    """The different (out, in) shapes of the modules that are quantized in a model, or can be in one that is not yet."""
    stated = getattr(skeleton.config, "quantization_config", None) or {}
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    ends = tuple(name for names in stated.get("modules_in_block_to_quantize") or () for name in names)
    module = skeleton.meta_model(FullPrecision()).module
    shapes = []
    for block in skeleton.decoder_blocks:
        for name, child in module.get_submodule(block).named_modules():
            if hasattr(child, "qweight"):  # the tree may stand as it will be loaded, or as it was before
                shapes.append((child.out_features, child.in_features))
            elif _is_linear(child) and (not ends or f"{block}.{name}".endswith(ends)):
                shapes.append(linear_shape(child))
    return tuple(dict.fromkeys(shapes))


def _is_linear(module: Any) -> bool:
    """Whether GPTQ takes a module: exactly these classes, not their subclasses."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def linear_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear module, also of transformers' transposed kind."""
    from transformers.pytorch_utils import Conv1D

    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _check_shape(name: str, shape: tuple[int, int], precision: GPTQ) -> None:
    rows, columns = shape
    if precision.group_size != -1 and columns % precision.group_size:
        fits = [size for size in (128, 64, 32) if columns % size == 0]
        raise ValueError(
            f"group_size={precision.group_size} does not divide the {columns:,} inputs of {name}: take "
            f"{' or '.join(map(str, [*fits, -1]))}, or skip it with skip_modules."
        )
    for what, size in (("inputs", columns), ("outputs", rows)):
        if size % _PACK:
            raise ValueError(
                f"{name} has {size:,} {what}, which is no multiple of {_PACK}, and GPTQ packs {_PACK} at a time: "
                f"leave it out with skip_modules=({name.rpartition('.')[2]!r},)."
            )


class _Reached(Exception):  # noqa: N818 - how a forward pass is ended where nobody needs the rest of it
    pass


@dataclass(frozen=True, kw_only=True)
class RoundedModule:
    """What GPTQ made of one module.

    Attributes:
        name: Its full name.
        packed: Its new tensors.
        error: The norm of the change of its output on calibration tokens, by that of the output: 0.05 is 5 %.
        tokens: Calibration tokens that it saw; without any it was rounded to nearest.
        seconds: Its share of the time.
    """

    name: str
    packed: PackedLinear
    error: float
    tokens: int
    seconds: float


@dataclass(kw_only=True)
class _Group:
    """Modules that multiply the same input."""

    names: list[str]
    hessian: Any = None
    stand_in: Any = None
    sample: Any = None
    tokens: int = 0


@dataclass(kw_only=True)
class Layers:
    """The decoder layers of a loaded model, with calibration sequences on their way through them.

    Attributes:
        model: A ``transformers`` model in full precision; its weights are replaced by the rounded ones as it goes.
        names: Of the decoder layers, in order.
        targets: For each layer the full names of the modules to quantize.
        batches: Token ids, (sequences, length) each.
        precision: How to quantize.
        kept_bytes: Room for outputs of finished modules; what it does not hold is computed again.
        check: Called between any two steps; raises to stop.
    """

    model: Any
    names: tuple[str, ...]
    targets: dict[str, tuple[str, ...]]
    batches: list[Tensor]
    precision: GPTQ
    kept_bytes: int = 0
    check: Callable[[], None] = lambda: None
    whole: bool = False
    _blocks: list[Any] = field(default_factory=list)
    _hidden: list[Any] = field(default_factory=list)
    _calls: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    _order: dict[int, list[list[str]]] = field(default_factory=dict)
    _memory: LayerMemory | None = None

    def start(self) -> None:
        """Run the sequences up to the first layer, and see how the model calls its layers and they their modules."""
        self._blocks = [self.model.get_submodule(name) for name in self.names]
        lengths = [batch.shape[0] for batch in self.batches]
        # One batch of each size goes through the whole model; a second one tells whether all are called alike.
        pioneers = {lengths.index(size) for size in lengths} | {1} & set(range(len(lengths)))
        calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        for index, batch in enumerate(self.batches):
            self.check()
            seen, hidden, passes_on = self._explore(batch, whole=index in pioneers, first=index == 0)
            self._hidden.append(hidden)
            if index in pioneers:
                calls[index] = seen
                self.whole = self.whole or not passes_on
        first = lengths[0]
        for index in sorted(pioneers):
            for layer, call in enumerate(calls[index]):
                self._calls.setdefault((layer, lengths[index]), call)
        if 1 in pioneers and lengths[1] == first:
            self.whole = self.whole or not all(_alike(one, two) for one, two in zip(calls[0], calls[1], strict=True))
        if self.whole:
            self._hidden = []
            self._calls = {}

    def _explore(
        self, batch: Tensor, *, whole: bool, first: bool
    ) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Any, bool]:
        """Run one batch: how each layer was called but for the hidden states, those of the first layer, and whether
        each layer's output is the next one's input.
        """  # noqa: D205
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        inputs: list[tuple[str, Any]] = []  # kept while a layer runs, so that no other tensor gets its address
        passes_on = True
        start: Any = None
        previous: Any = None
        handles = []

        def before_layer(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal passes_on, start
            hidden = args[0] if args else kwargs["hidden_states"]
            if previous is None:
                start = hidden
            else:
                passes_on = passes_on and (hidden is previous or bool((hidden == previous).all()))
            seen.append(_with_hidden(args, kwargs, None))
            if not whole:
                raise _Reached

        def after_layer(module: Any, _args: Any, output: Any) -> None:
            nonlocal previous
            previous = _first(output)
            if first:
                self._order[len(seen) - 1] = _same_input(inputs)
                inputs.clear()
            if module is self._blocks[-1]:
                raise _Reached

        def before_module(name: str) -> Callable[[Any, Any], None]:
            return lambda _module, args: inputs.append((name, args[0]))

        for block in self._blocks:
            handles.append(block.register_forward_pre_hook(before_layer, with_kwargs=True))
            handles.append(block.register_forward_hook(after_layer))
        if first:
            for names in self.targets.values():
                handles += [self.model.get_submodule(n).register_forward_pre_hook(before_module(n)) for n in names]
        try:
            self._forward(batch)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != (len(self._blocks) if whole else 1):
            self.whole = True  # it runs its layers in an order of its own
        return seen, start, passes_on

    def _forward(self, batch: Tensor) -> None:
        import torch

        home = self.model.get_input_embeddings()
        hook = getattr(home, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        with torch.no_grad():
            self.model(input_ids=batch.to(home.weight.device if device is None else device), use_cache=False)

    def _replay(self, layer: int) -> Iterator[Any]:
        """Run all sequences through one layer, as it is now; yields the outputs, unless a hook ends the pass."""
        import torch

        for index, batch in enumerate(self.batches):
            self.check()
            if self._memory is not None:
                self._memory.start(index)
            try:
                if self.whole:
                    self._forward(batch)
                    continue
                args, kwargs = _with_hidden(*self._calls[layer, batch.shape[0]], self._hidden[index])
                with torch.no_grad():
                    output = _first(self._blocks[layer](*args, **kwargs))
            except _Reached:
                continue
            yield output

    def advance(self, layer: int) -> None:
        """Give the next layer this one's outputs as its inputs."""
        if not self.whole and layer + 1 < len(self._blocks):
            self._hidden = list(self._replay(layer))
        self._forget()

    def _forget(self) -> None:
        if self._memory is not None:
            self._memory.clear()
        self._memory = None

    def stages(self, layer: int) -> list[list[_Group]]:
        """The layer's modules in the order in which they are quantized: stages of groups with one input each."""
        targets = self.targets[self.names[layer]]
        groups = [list(names) for names in self._order.get(layer, [])]
        known = {name for names in groups for name in names}
        groups += [[name] for name in targets if name not in known]  # nothing has reached them
        stages: dict[tuple[str, ...], list[_Group]] = {}
        for names in groups:
            # Experts with different inputs do not wait for each other.
            pattern = tuple(re.sub(r"\d+", "*", name) for name in names)
            stages.setdefault(pattern if self.precision.true_sequential else (), []).append(_Group(names=names))
        return list(stages.values())

    def quantize(self, layer: int) -> Iterator[RoundedModule]:
        """Quantize one layer stage by stage; yields each module when it is done and replaced."""
        self._forget()
        name = self.names[layer]
        if not self.whole:
            self._memory = LayerMemory(
                name=name, block=self._blocks[layer], targets=self.targets[name], most_bytes=self.kept_bytes
            )
        done: set[str] = set()
        for groups in self.stages(layer):
            started = time.perf_counter()
            if self._memory is not None:
                self._memory.remember(done)
            self._collect(layer, groups)
            if self._memory is not None:
                self._memory.tidy()
            done |= {name for group in groups for name in group.names}
            count = sum(len(group.names) for group in groups)
            collecting = (time.perf_counter() - started) / count
            for group in groups:
                self.check()
                yield from self._round(group, collecting)

    def _collect(self, layer: int, groups: list[_Group]) -> None:
        from gptqmodel.quantization.gptq import GPTQ as Rounding  # noqa: N811 - we have a GPTQ of our own

        config = _rounding_config(self.precision)

        def before(group: _Group) -> Callable[[Any, Any], None]:
            def add(_module: Any, args: tuple[Any, ...]) -> None:
                x = args[0].detach()
                if group.hessian is None:
                    group.stand_in = _stand_in([self.model.get_submodule(name) for name in group.names], x.device)
                    group.hessian = Rounding(group.stand_in, qcfg=config)
                    group.hessian.quantizer.configure(perchannel=True)
                    group.sample = x.reshape(-1, x.shape[-1])[:_ERROR_TOKENS].float()
                group.hessian.add_batch(x, None)
                group.tokens += x.numel() // x.shape[-1]
                if len(groups) == 1:
                    raise _Reached
                if self._memory is not None:
                    self._memory.unsettle()

            return add

        handles = [
            self.model.get_submodule(group.names[0]).register_forward_pre_hook(before(group)) for group in groups
        ]
        try:
            for _ in self._replay(layer):
                pass
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            if group.hessian is None:  # an expert that no token was sent to
                group.stand_in = _stand_in([self.model.get_submodule(name) for name in group.names], None)
                group.hessian = Rounding(group.stand_in, qcfg=config)
                group.hessian.quantizer.configure(perchannel=True)

    def _round(self, group: _Group, collecting: float) -> Iterator[RoundedModule]:
        import torch

        started = time.perf_counter()
        stand_in = group.stand_in
        stand_in.weight.data = stand_in.weight.data.float()  # the result comes in this dtype, and 8 bits need it
        with torch.inference_mode(), _threads_for(stand_in.weight):
            rounded, scales, zeros, g_idx, *_ = group.hessian.quantize()
        before = stand_in.weight.data
        seconds = (time.perf_counter() - started) / len(group.names) + collecting
        at = 0
        for name in group.names:
            module = self.model.get_submodule(name)
            rows = _matrix(module).shape[0]
            part = slice(at, at + rows)
            at += rows
            with _threads_for(stand_in.weight):
                packed = pack_linear(
                    rounded[part],
                    scales[part],
                    zeros[part],
                    g_idx,
                    bits=self.precision.bits,
                    layout=self.precision.format,
                )
                weight = replace_weight(module, packed, self.precision)
            error = float("nan")
            if group.sample is not None:
                want = group.sample @ before[part].t()
                change = group.sample @ (weight.to(before.device) - before[part]).t()
                error = float(change.norm() / want.norm().clamp(min=1e-12))
            yield RoundedModule(name=name, packed=packed, error=error, tokens=group.tokens, seconds=seconds)
        group.hessian.free()
        group.hessian = group.stand_in = group.sample = None


@contextlib.contextmanager
def _threads_for(weight: Tensor) -> Iterator[None]:
    """Keep the rounding of a small weight to one thread.

    It is tens of thousands of small steps, after each of which the threads wait for each other: on a machine with other
    work to do, two of them took fifty times as long as one.
    """
    import torch

    threads = torch.get_num_threads()
    small = weight.device.type == "cpu" and weight.numel() <= _ONE_THREAD_WEIGHTS
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(threads)


def replace_weight(module: Any, packed: PackedLinear, precision: GPTQ) -> Tensor:
    """Put what packed tensors stand for in a module's place, also where accelerate keeps it elsewhere.

    Returns:
        The new weight in float32, (out, in).
    """
    import torch

    weight = dequantize(packed, bits=precision.bits, layout=precision.format)
    kept = _kept_weight(module)
    with torch.no_grad():
        kept.copy_(weight.t() if _is_transposed(module) else weight)
    return weight


def _kept_weight(module: Any) -> Tensor:
    """A module's weight where it really is: the module of an offloaded layer has only its shape."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            found: Tensor = kept["weight"]
            return found
    data: Tensor = module.weight.data
    return data


def _is_transposed(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _matrix(module: Any) -> Tensor:
    weight = _kept_weight(module)
    return weight.t() if _is_transposed(module) else weight


def _stand_in(modules: list[Any], device: Any) -> Any:
    """One linear module with the weights of several: rows are rounded independently of each other."""
    import torch

    weight = torch.cat([_matrix(module) for module in modules]).to(device)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def _rounding_config(precision: GPTQ) -> Any:
    from gptqmodel import QuantizeConfig

    return QuantizeConfig(
        bits=precision.bits,
        group_size=precision.group_size,
        desc_act=precision.desc_act,
        # Orders the columns by importance without the price of act-order when the model runs.
        act_group_aware=not precision.desc_act and precision.group_size != -1,
        sym=precision.sym,
        damp_percent=precision.damp_percent,
        true_sequential=precision.true_sequential,
        offload_to_disk=False,
    )


def _same_input(inputs: list[tuple[str, Any]]) -> list[list[str]]:
    """Module names in the order of their first call, those with one and the same input together."""
    groups: list[tuple[tuple[Any, ...], list[str]]] = []
    done: set[str] = set()
    for name, x in inputs:
        if name in done:
            continue
        done.add(name)
        identity = (x.data_ptr(), tuple(x.shape), tuple(x.stride()))
        if groups and groups[-1][0] == identity:
            groups[-1][1].append(name)
        else:
            groups.append((identity, [name]))
    return [names for _, names in groups]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _alike(one: tuple[tuple[Any, ...], dict[str, Any]], two: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether two batches were handed on with the same arguments."""
    return _equal(list(one[0]), list(two[0])) and _equal(one[1], two[1])


def _equal(one: Any, two: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.shape == two.shape and bool((one == two).all())
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(_equal, one, two))
    try:
        return one is two or bool(one == two)
    except (TypeError, ValueError, RuntimeError):
        return False
