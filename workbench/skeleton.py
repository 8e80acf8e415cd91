"""The model's module tree, built from its config on the ``meta`` device: names, shapes and dtypes, no weights."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from workbench import checkpoint
from workbench.model import ModelRef, Source, find_model, read_config
from workbench.precision import GPTQ, HQQ, FullPrecision, is_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workbench.checkpoint import StoredTensor
    from workbench.hardware import Machine
    from workbench.precision import Precision

_K = TypeVar("_K")
_V = TypeVar("_V")
_KEPT = 8  # skeletons, and quantized variants of them, that stay in memory


class _Turn:
    """Whose turn it is to rely on, or to change, torch's process-wide default dtype.

    ``from_pretrained`` builds a model under a changed default dtype, and so must we, to get the same dtypes. The
    default belongs to the whole process: a forward pass in another thread would meet it. So building waits for a pause
    of the long work (one token, one loaded tensor), and long work waits while a skeleton is built.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._waiting = 0
        self._held = 0  # how often its holder has taken the lock; only that thread touches it

    @contextmanager
    def build(self) -> Iterator[None]:
        """Take the next turn for a short build."""
        with self._changed:
            self._waiting += 1
        try:
            self._lock.acquire()
        finally:  # also where Ctrl-C ends the waiting, or a pause would last for ever
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            with self._holding():
                yield
        finally:
            self._lock.release()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Keep the turn for long work that calls :meth:`pause` now and then."""
        with self._lock, self._holding():
            yield

    def pause(self) -> None:
        """Let those who wait to build go first; call it only while holding :meth:`work`, however often."""
        if not self._waiting:
            return
        held, self._held = self._held, 0
        for _ in range(held):
            self._lock.release()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting == 0)
        finally:
            for _ in range(held):
                self._lock.acquire()
            self._held = held

    @contextmanager
    def _holding(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1


turn = _Turn()
_shelves = threading.Lock()


def _kept(shelf: OrderedDict[_K, _V], key: _K, make: Callable[[], _V]) -> _V:
    """Return what is kept under a key, the last few used; only making it takes a turn, so a known model never waits."""

    def find() -> _V | None:
        with _shelves:
            if key in shelf:
                shelf.move_to_end(key)
            return shelf.get(key)

    found = find()
    if found is not None:
        return found
    with turn.build():
        found = find()  # another thread may have made it while this one waited
        if found is None:
            found = make()
            with _shelves:
                shelf[key] = found
                while len(shelf) > _KEPT:
                    shelf.popitem(last=False)
        return found


@dataclass(frozen=True, kw_only=True)
class Block:
    """One step of the model in execution order: a decoder layer, an embedding, a norm or a head.

    Attributes:
        name: Module name, as device maps spell it.
        class_name: Its class, e.g. ``"LlamaDecoderLayer"``.
    """

    name: str
    class_name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """What is known of a model without its weights.

    Attributes:
        source: Where the model was found.
        architecture: The class that will be loaded, e.g. ``"LlamaForCausalLM"``.
        model_type: As the config says, e.g. ``"llama"``.
        dtype: What ``dtype="auto"`` resolves to, e.g. ``"bfloat16"``.
        parameter_count: Parameters, tied ones once.
        layer_count: Decoder layers.
        context_length: Tokens that the model allows, or None if the config does not say.
        blocks: The steps in execution order that hold any tensor; no device map cuts through one.
        decoder_blocks: Names of those blocks that are decoder layers, in order.
        linear_modules: Names of all linear modules, for choosing ``skip_modules``.
        default_skips: The modules that transformers leaves alone by itself (the head, tied weights).
        tied: Name of a tied parameter to the name of the one that holds the data.
        no_split_classes: Module classes that must stay on one device.
        quantized_as: How the checkpoint is quantized already, in words ("GPTQ 4-bit, groups of 128"), or None.
        stored: The same as one of our precisions; None for other methods.
        unpacked_because: Why its weights are turned back into full precision while they are loaded; None if they are
            not, as for every model before :meth:`on` has been asked.
        is_encoder_decoder: Whether it reads a prompt with an encoder and writes with a decoder (T5, BART): loaded with
            ``AutoModelForSeq2SeqLM`` in place of ``AutoModelForCausalLM``.
        config: The ``transformers`` config. Do not change it.
        model_class: The ``transformers`` class.
    """

    source: Source
    architecture: str
    model_type: str
    dtype: str
    parameter_count: int
    layer_count: int
    context_length: int | None
    blocks: tuple[Block, ...]
    decoder_blocks: tuple[str, ...]
    linear_modules: tuple[str, ...]
    default_skips: tuple[str, ...]
    tied: dict[str, str]
    no_split_classes: frozenset[str]
    quantized_as: str | None
    stored: Precision | None
    is_encoder_decoder: bool
    config: Any = field(repr=False)
    model_class: Any = field(repr=False)
    unpacked_because: str | None = None
    _variants: OrderedDict[Any, MetaModel] = field(default_factory=OrderedDict, repr=False)
    _elsewhere: OrderedDict[str, Skeleton] = field(default_factory=OrderedDict, repr=False)

    @property
    def has_weights(self) -> bool:
        """Whether there are weight files to load, or only a config."""
        return bool(self.source.weight_files)

    def on(self, machine: Machine) -> Skeleton:
        """The same model as transformers loads it on a machine: some methods' weights are unpacked without a GPU."""
        if self.quantized_as is None or self.unpacked_because is not None:
            return self
        reason = checkpoint.unpacked_because(self._stated, machine)
        if reason is None:
            return self
        return _kept(
            self._elsewhere,
            reason,
            lambda: replace(self, unpacked_because=reason, _variants=OrderedDict(), _elsewhere=OrderedDict()),
        )

    @property
    def quant_method(self) -> str | None:
        """The method of a checkpoint that is quantized already, as transformers spells it."""
        return None if self.quantized_as is None else checkpoint.method_of(self._stated)

    @property
    def is_packed_otherwise(self) -> bool:
        """Whether the weights that are loaded are quantized by a method that is none of our precisions."""
        return self.quantized_as is not None and self.stored is None and self.unpacked_because is None

    @property
    def unpacks_when_run(self) -> bool:
        """Whether the weights stay packed until the first forward and are then turned back into full precision."""
        return self.is_packed_otherwise and self.quant_method == "compressed-tensors"

    @property
    def not_loadable_because(self) -> str | None:
        """Why this machine cannot load a checkpoint that is quantized already, in transformers' words."""
        return None if self.quantized_as is None else checkpoint.not_loadable_because(self._stated)

    @property
    def _stated(self) -> dict[str, Any]:
        return checkpoint.as_dict(self.config.quantization_config)

    def meta_model(self, precision: Precision) -> MetaModel:
        """The module tree that ``from_pretrained`` would fill for a precision; built once for each.

        Raises:
            ValueError: If the precision's library is missing, or the checkpoint is quantized already in another way.
        """
        if self.quantized_as is not None:
            refused = not isinstance(precision, (FullPrecision, GPTQ)) or (
                isinstance(precision, GPTQ) and not isinstance(self.stored, GPTQ)
            )
            if refused:
                raise ValueError(
                    f"{self.source.title} is quantized already ({self.quantized_as}), so it cannot be loaded as "
                    f"{precision.label}: pick full precision, which keeps it as it is, or the original model."
                )
            dtype = precision.dtype if isinstance(precision, FullPrecision) else "auto"
            if self.unpacked_because is not None:
                return self.plain_model(dtype)
            if dtype not in ("auto", self.dtype):
                raise ValueError(
                    f"{self.source.title} is quantized already ({self.quantized_as}): dtype='auto' keeps it as it is, "
                    f"{dtype} would not."
                )
            precision = FullPrecision()
        return _kept(self._variants, precision, lambda: _build(self, precision))

    def plain_model(self, dtype: str = "auto") -> MetaModel:
        """The module tree without any quantization, in the model's own or another dtype; built once for each."""
        if self.quantized_as is None:
            return self.meta_model(FullPrecision(dtype=dtype))
        own = self.dtype if dtype == "auto" else dtype
        return _kept(self._variants, f"plain {own}", lambda: _build_meta(self.model_class, self.config, own))


@dataclass(frozen=True, kw_only=True, eq=False)
class MetaModel:
    """A module tree on the ``meta`` device, with the quantizer that changed it (None in full precision).

    Attributes:
        module: The model.
        quantizer: As transformers has it.
        dtype: Of what is not quantized.
        prequantized: Whether its quantized weights have their packed shapes already.
        stored: The checkpoint's tensors, where its method is none that could be built here.
    """

    module: Any
    quantizer: Any | None
    dtype: str
    prequantized: bool = False
    stored: tuple[StoredTensor, ...] = ()


_skeletons: OrderedDict[tuple[ModelRef, str], Skeleton] = OrderedDict()


def read_skeleton(ref: ModelRef | str) -> Skeleton:
    """Build the skeleton of a model from its config; kept for the next call while the files do not change.

    Args:
        ref: The model, as :meth:`ModelRef.parse` reads it.

    Raises:
        ValueError: If there is no such model, or its config describes none that generates text.
    """
    ref = ModelRef.parse(ref)
    source = find_model(ref)
    key = (ref, source.fingerprint)
    return _kept(_skeletons, key, lambda: _read(source))


def _read(source: Source) -> Skeleton:
    config = read_config(source)
    model_class, config = _model_class(config, source)
    options = getattr(config, "quantization_config", None)
    options = None if options is None else checkpoint.as_dict(options)
    if source.gguf_file is not None:
        options = config.quantization_config = {"quant_method": "gguf"}
    dtype = _checkpoint_dtype(config, source)
    try:
        meta = _build_meta(model_class, config, dtype)
    except Exception as error:  # the model's own code may raise anything on a config that contradicts itself
        raise ValueError(
            f"The config of {source.title} describes no {model_class.__name__} that can be built: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    module = meta.module
    no_split = frozenset(getattr(module, "_no_split_modules", None) or ())
    blocks = _blocks(module, no_split)
    text_config = config.get_text_config(decoder=True)
    tied = dict(getattr(module, "all_tied_weights_keys", {}) or {})
    linear = tuple(name for name, child in module.named_modules() if _is_linear(child))
    return Skeleton(
        source=source,
        architecture=model_class.__name__,
        model_type=config.model_type,
        dtype=meta.dtype,
        parameter_count=sum(p.numel() for name, p in module.named_parameters() if name not in tied),
        layer_count=int(getattr(text_config, "num_hidden_layers", 0) or 0),
        context_length=_context_length(text_config),
        blocks=blocks,
        decoder_blocks=_decoder_blocks(module, blocks),
        linear_modules=linear,
        default_skips=_default_skips(module, linear),
        tied=tied,
        no_split_classes=no_split,
        quantized_as=None if options is None else checkpoint.describe(options),
        stored=None if options is None else checkpoint.stored_precision(options),
        is_encoder_decoder=_seq2seq_class(config) is model_class,
        config=config,
        model_class=model_class,
        unpacked_because=None if source.gguf_file is None else "only then can every layer of it run anywhere",
    )


def _seq2seq_class(config: Any) -> Any | None:
    """The encoder-decoder class that reads and writes text for a config, or None if there is none."""
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or not getattr(config, "is_encoder_decoder", False):
        return None
    found = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    return found if found.main_input_name == "input_ids" else None  # some read sound


def _model_class(config: Any, source: Source) -> tuple[Any, Any]:
    """Return the class that an ``AutoModelFor...`` would load and the config that it would give it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    seq2seq = _seq2seq_class(config)
    if seq2seq is not None:
        # Some types (BART) have a class for the decoder alone, too: the config says which it was saved from.
        saved_from = getattr(config, "architectures", None) or ()
        alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and getattr(config, "is_decoder", False)
        if seq2seq.__name__ in saved_from or (not any("CausalLM" in name for name in saved_from) and not alone):
            return seq2seq, config

    auto_map = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in auto_map and source.trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = auto_map["AutoModelForCausalLM"]
        return get_class_from_dynamic_module(reference, source.location, revision=source.revision), config
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"{source.title} is of type {config.model_type!r}, which is no causal language model: Workbench loads "
            "models that continue text (Llama, Qwen, Mistral, GPT-2, ...)."
        ) from None
    model_class = found[0] if isinstance(found, (tuple, list)) else found
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) == text_class:
        quantized = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantized is not None:
            config.quantization_config = quantized
    return model_class, config


def _checkpoint_dtype(config: Any, source: Source) -> str:
    """Return what ``dtype="auto"`` resolves to: the config's word, else the first floating tensor of the checkpoint."""
    if getattr(config, "dtype", None) is not None:
        return str(config.dtype).removeprefix("torch.")
    if source.gguf_file is not None:
        return "bfloat16"  # its blocks have none, and transformers' own choice is twice as large
    safetensors = [f.name for f in source.weight_files if f.name.endswith(".safetensors")]
    if safetensors:
        dtype = _first_floating_dtype(source, safetensors[0])
        if dtype is not None:
            return dtype
    return "float32"


def _first_floating_dtype(source: Source, file_name: str) -> str | None:
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    try:
        tensors = sorted(checkpoint.tensors_in(source, file_name), key=lambda tensor: tensor.name)
    except ValueError:
        return None  # reported when the weights are to be read
    return next((names[tensor.dtype] for tensor in tensors if tensor.dtype in names), None)


def _build(skeleton: Skeleton, precision: Precision) -> MetaModel:
    if skeleton.quantized_as is not None:
        return _build_stored(skeleton)
    if not is_installed(precision):
        raise ValueError(
            f"{precision.label} needs {precision.package}: run `pip install {precision.package}`, then restart."
        )
    dtype = precision.dtype_of(skeleton.dtype)
    if isinstance(precision, GPTQ):
        from workbench.gptq_folder import planned_config

        options = planned_config(precision, skeleton)
        return _build_meta(skeleton.model_class, skeleton.config, dtype, options, prequantized=True)
    if isinstance(precision, HQQ):  # transformers has no quantizer that would do it
        return _build_meta(skeleton.model_class, skeleton.config, dtype)
    return _build_meta(skeleton.model_class, skeleton.config, dtype, precision.to_config(dtype))


def _build_stored(skeleton: Skeleton) -> MetaModel:
    """The module tree of a checkpoint that is quantized already: as it will be, or by what its files hold."""
    options = checkpoint.as_dict(skeleton.config.quantization_config)
    if checkpoint.is_built(options):
        with suppress(Exception):  # options that this version does not know: what the files hold, then
            return _build_meta(skeleton.model_class, skeleton.config, skeleton.dtype, options, prequantized=True)
    plain = skeleton.plain_model()
    try:
        stored = checkpoint.stored_tensors(skeleton.source)
    except ValueError as error:
        raise ValueError(f"{skeleton.source.title} is quantized ({skeleton.quantized_as}). {error}") from None
    return MetaModel(module=plain.module, quantizer=None, dtype=plain.dtype, prequantized=True, stored=stored)


def _build_meta(
    model_class: Any,
    config: Any,
    dtype: str,
    quantization_config: Any | None = None,
    *,
    prequantized: bool = False,
) -> MetaModel:
    """Build a module tree as ``from_pretrained`` does just before it reads weights."""
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    torch_dtype = getattr(torch, dtype)
    quantizer = None
    picks_kernel = False
    quiet: AbstractContextManager[Any] = nullcontext()
    if quantization_config is not None:
        config.quantization_config = quantization_config
        picks_kernel = prequantized and checkpoint.method_of(checkpoint.as_dict(quantization_config)) in ("awq", "gptq")
        if picks_kernel:
            from workbench.kernels import import_gptqmodel, quiet_optimum

            import_gptqmodel()
            quiet = quiet_optimum()
        quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=prequantized)
        torch_dtype = quantizer.update_dtype(torch_dtype)
    config.dtype = torch_dtype
    for key in config.sub_configs:
        sub_config = getattr(config, key, None)
        if sub_config is not None:
            sub_config.dtype = torch_dtype
    with ExitStack() as stack:
        stack.enter_context(quiet)
        for context in model_class.get_init_context(torch_dtype, quantizer is not None, False, False):
            stack.enter_context(context)
        module = model_class(config)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=module,
                dtype=torch_dtype,
                device_map={"": "cpu"} if picks_kernel else None,
                checkpoint_files=None,
                use_kernels=False,
            )
    module.eval()
    return MetaModel(
        module=module,
        quantizer=quantizer,
        dtype=str(torch_dtype).removeprefix("torch."),
        prequantized=prequantized,
    )


def _is_linear(module: Any) -> bool:
    """Whether a module is one of those that the quantizers look for: exactly these classes, not their subclasses."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _default_skips(module: Any, linear: tuple[str, ...]) -> tuple[str, ...]:
    from transformers.quantizers.base import get_keys_to_not_convert

    keys = set(get_keys_to_not_convert(module))
    return tuple(name for name in linear if name in keys)


def _context_length(config: Any) -> int | None:
    if hasattr(config, "relative_attention_num_buckets"):
        return None  # T5 and its kin know distances only; what their configs name is what they were trained with
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _blocks(module: Any, no_split: frozenset[str]) -> tuple[Block, ...]:
    """Cut the tree into the pieces that stay whole, in the order in which they are registered and run."""
    from torch import nn

    found: list[Block] = []

    def visit(name: str, child: Any, *, in_list: bool) -> None:
        class_name = type(child).__name__
        children = list(child.named_children())
        # Without a no-split list (some remote code) the members of a module list stand for the layers.
        whole = class_name in no_split or not children or (not no_split and in_list)
        if whole:
            if _holds_tensors(child, recurse=True):
                found.append(Block(name=name, class_name=class_name))
            return
        if name and _holds_tensors(child, recurse=False):
            found.append(Block(name=name, class_name=class_name))  # tensors that hang on an inner node
        for child_name, grandchild in children:
            visit(f"{name}.{child_name}" if name else child_name, grandchild, in_list=isinstance(child, nn.ModuleList))

    visit("", module, in_list=False)
    return tuple(found)


def _holds_tensors(module: Any, *, recurse: bool) -> bool:
    return any(True for _ in module.parameters(recurse)) or any(True for _ in module.buffers(recurse))


def _decoder_blocks(module: Any, blocks: tuple[Block, ...]) -> tuple[str, ...]:
    """Return the blocks that are members of the longest module list: the decoder layers."""
    from torch import nn

    lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    if getattr(module.config, "is_encoder_decoder", False):
        lists = [name for name in lists if "decoder" in name.split(".")] or lists
    members = [tuple(b.name for b in blocks if b.name.rpartition(".")[0] == name) for name in lists]
    return max(members, key=len, default=())
