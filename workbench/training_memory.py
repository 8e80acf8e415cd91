"""What training an adapter will take beside the model, before anything is trained.

Adapters, gradients and optimizer state are counted. What a step keeps for its way back is seen by running the model's
own forward on the ``meta`` device, where nothing is computed, and adding up what torch would save.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.hardware import device_label, format_bytes
from workbench.precision import Int8, element_bytes
from workbench.rehearsal import without_values
from workbench.skeleton import turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.hardware import DeviceId
    from workbench.placement import Placement
    from workbench.session import Session
    from workbench.skeleton import Skeleton
    from workbench.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training takes beside the loaded model, in bytes.

    Attributes:
        adapter_bytes: Its weights, in float32.
        gradient_bytes: A float32 for each of them.
        optimizer_bytes: AdamW's two float32 for each of them.
        upcast_bytes: What is kept in float32 meanwhile in place of float16.
        activation_bytes: Estimate of what a step keeps for its way back; None if the model cannot be run on ``meta``.
        tokens: Of the longest example.
        batch_size: Examples in a step.
        by_device: The sum on each device, by where the layers are.
        short: The device that has too little room, or None.
    """

    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    upcast_bytes: int
    activation_bytes: int | None
    tokens: int
    batch_size: int
    by_device: dict[DeviceId, int]
    short: DeviceId | None

    @property
    def total_bytes(self) -> int:
        """All that is known."""
        known = (self.adapter_bytes, self.gradient_bytes, self.optimizer_bytes, self.upcast_bytes)
        return sum(known) + (self.activation_bytes or 0)

    @property
    def sentence(self) -> str:
        """The same in words."""
        parts = [
            f"adapter {format_bytes(self.adapter_bytes)}",
            f"gradients {format_bytes(self.gradient_bytes)}",
            f"optimizer {format_bytes(self.optimizer_bytes)}",
        ]
        if self.upcast_bytes:
            parts.append(f"float32 in place of float16 {format_bytes(self.upcast_bytes)}")
        if self.activation_bytes is None:
            parts.append("activations unknown")
        else:
            parts.append(
                f"activations est. {format_bytes(self.activation_bytes)} ({self.batch_size} x {self.tokens} tokens)"
            )
        return f"Training takes {format_bytes(self.total_bytes)} beside the model: {', '.join(parts)}."


def plan_training(session: Session, options: TrainingOptions, *, tokens: int) -> TrainingPlan:
    """Work out what a training will take.

    Args:
        session: A loaded model.
        options: How it will be trained.
        tokens: Of the longest example.

    Raises:
        ValueError: If there is nothing to train, or a device has too little room; the sentence says what would help.
    """
    from workbench.gptq_layers import linear_shape
    from workbench.training import targets

    skeleton, placement = session.skeleton, session.placement
    names = targets(session, options)
    module = skeleton.plain_model().module
    shapes = {name: linear_shape(module.get_submodule(name)) for name in names}
    sizes = {name: 4 * options.r * (rows + columns) for name, (rows, columns) in shapes.items()}
    adapter_bytes = sum(sizes.values())
    upcast_bytes = _upcast_bytes(placement)
    with turn.build():
        kept = _kept_for_the_way_back(skeleton, placement, options, set(names), tokens)
    activation_bytes = None
    if kept is not None:
        activation_bytes = options.batch_size * _with_checkpoints(kept, skeleton, placement, options, tokens)
    plan = TrainingPlan(
        adapter_bytes=adapter_bytes,
        gradient_bytes=adapter_bytes,
        optimizer_bytes=2 * adapter_bytes,
        upcast_bytes=upcast_bytes,
        activation_bytes=activation_bytes,
        tokens=tokens,
        batch_size=options.batch_size,
        by_device={},
        short=None,
    )
    by_device = _spread(plan, placement)
    short = next((d for d, size in by_device.items() if size > placement.memory[d].free_bytes), None)
    if short is not None:
        helps = "a smaller batch_size" if options.gradient_checkpointing else "gradient_checkpointing=True"
        raise ValueError(
            f"{plan.sentence} {device_label(short)} has {format_bytes(max(0, placement.memory[short].free_bytes))} "
            f"left: try {helps}, a smaller r, shorter texts or fewer layers."
        )
    return TrainingPlan(**{**vars(plan), "by_device": by_device})


def upcasts(placement: Placement) -> bool:
    """Whether what is not quantized is trained in float32: with float16, in which small gradients vanish."""
    return placement.dtype == "float16"


def _upcast_bytes(placement: Placement) -> int:
    from workbench.sizes import sizes_of
    from workbench.skeleton import read_skeleton

    if not upcasts(placement):
        return 0
    skeleton = read_skeleton(placement.recipe.model)
    tensors = sizes_of(skeleton, placement.recipe.precision).tensors
    # Quantized values are left alone; so is what is kept in float32 anyway.
    return sum(t.after_bytes for t in tensors if not t.quantized and not t.is_buffer and not t.upcast_bytes)


def _spread(plan: TrainingPlan, placement: Placement) -> dict[DeviceId, int]:
    """Give each device its share, by the layers that it runs."""
    homes = list(placement.runs_on.values())
    return {device: plan.total_bytes * homes.count(device) // len(homes) for device in dict.fromkeys(homes)}


def _with_checkpoints(
    kept: dict[str, int], skeleton: Skeleton, placement: Placement, options: TrainingOptions, tokens: int
) -> int:
    """Bytes for one sequence; with checkpoints a layer keeps its input alone, and one at a time is run again."""
    if not options.gradient_checkpointing:
        return sum(kept.values())
    blocks = [kept[name] for name in skeleton.decoder_blocks if name in kept]
    hidden = int(getattr(skeleton.config.get_text_config(decoder=True), "hidden_size", 0) or 0)
    inputs = len(blocks) * tokens * hidden * (4 if upcasts(placement) else element_bytes(placement.dtype))
    return sum(kept.values()) - sum(blocks) + inputs + max(blocks, default=0)


def _kept_for_the_way_back(
    skeleton: Skeleton, placement: Placement, options: TrainingOptions, names: set[str], tokens: int
) -> dict[str, int] | None:
    """Decoder layer (and "" for the rest) to the bytes that torch saves there for one sequence."""
    import torch

    dtype = "float32" if upcasts(placement) else placement.dtype
    module = copy.deepcopy(skeleton.plain_model(dtype).module)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    ledger = _Ledger()
    quantized_on_cpu = isinstance(placement.precision, Int8) and "cpu" in placement.runs_on.values()
    blocks = list(skeleton.decoder_blocks)
    first = next((b for b in blocks if any(name.startswith(f"{b}.") for name in names)), None)
    for name in skeleton.linear_modules:
        child = module.get_submodule(name)
        if name in names:
            child.register_forward_pre_hook(
                ledger.lora(options.r, copies=dtype != "float32", drops=options.dropout > 0)
            )
        if quantized_on_cpu and name not in skeleton.default_skips:  # bitsandbytes keeps what it has multiplied there
            child.register_forward_pre_hook(lambda _, args: ledger.add(args[0]) if args[0].requires_grad else None)
    for name in blocks:
        block = module.get_submodule(name)
        block.register_forward_pre_hook(ledger.enter(name, begins=name == first), with_kwargs=True)
        block.register_forward_hook(lambda *_: ledger.leave())
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    try:
        with torch.device("meta"), without_values(), _without_numbers(), ledger.watching():
            module(input_ids=ids, labels=ids, use_cache=False)
    except Exception:  # noqa: BLE001 - models from anywhere, on a device without numbers
        return None
    return ledger.bytes


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Answer what a forward asks of numbers as for texts that are not packed; attention keeps what fused kernels keep.

    That is query, key, value, the result, and a float32 for each row of each head; torch's plain formula, which it
    takes on ``meta``, would keep all pairs.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, query: Any, key: Any, value: Any) -> Any:
            result = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device="meta")
            rows = torch.empty(query.shape[:-1], dtype=torch.float32, device="meta")
            context.save_for_backward(query, key, value, result, rows)
            return result

        @staticmethod
        def backward(context: Any, *_: Any) -> Any:
            raise NotImplementedError

    class Attention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is scaled_dot_product_attention and args[0].dim() == 4:
                return Fused.apply(*args[:3])  # type: ignore[no-untyped-call]
            return func(*args, **(kwargs or {}))

    class Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # noqa: SLF001 - its name
                return True if args[0].dtype == torch.bool else 0
            return func(*args, **(kwargs or {}))

    with Attention(), Numbers():  # type: ignore[no-untyped-call]
        yield


class _Ledger:
    """Adds up what is saved, each piece of memory once."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._at = ""
        self._seen: dict[int, Any] = {}  # held, so that no identity is used twice

    def add(self, tensor: Any) -> None:
        import torch

        base = tensor if tensor._base is None else tensor._base  # noqa: SLF001 - what a view is of
        if isinstance(base, torch.nn.Parameter):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:  # noqa: SLF001 - a storage's identity
            self._seen[storage._cdata] = storage  # noqa: SLF001 - likewise
            self.count(storage.nbytes())

    def count(self, size_bytes: int) -> None:
        self.bytes[self._at] = self.bytes.get(self._at, 0) + size_bytes

    def lora(self, r: int, *, copies: bool, drops: bool) -> Any:
        """What an adapter on a module keeps: its input in float32, and the product with its first matrix."""

        def hook(_: Any, args: tuple[Any, ...]) -> None:
            elements = args[0].numel()
            if copies:
                self.count(4 * elements)
            else:
                self.add(args[0])
            self.count(4 * r * (elements // args[0].shape[-1]) + (elements if drops else 0))

        return hook

    def enter(self, name: str, *, begins: bool) -> Any:
        """Count under a layer's name; gradients go no further back than the first layer with an adapter."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._at = name
            hidden = args[0] if args else kwargs.get("hidden_states")
            if begins and hidden is not None:
                hidden.requires_grad_()

        return hook

    def leave(self) -> None:
        self._at = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        import torch

        def save(tensor: Any) -> Any:
            self.add(tensor)
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield
