"""In which precision the weights are kept: the options of each method and nothing else."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.hqq_weights import HQQ
from workbench.model import refuses_unknown
from workbench.options import DTYPES, check_choice, check_skip_modules, check_switches, element_bytes
from workbench.torchao_weights import TorchAO

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workbench.hardware import DeviceId

__all__ = [
    "DTYPES",
    "FOUR_BIT_BLOCK",
    "GPTQ",
    "GPTQ_BACKENDS",
    "HQQ",
    "PRECISIONS",
    "QUANT_STORAGES",
    "FourBit",
    "FullPrecision",
    "Int8",
    "Precision",
    "TorchAO",
    "element_bytes",
    "is_installed",
    "precision_from_dict",
    "precision_to_dict",
]

GPTQ_BACKENDS = (
    "auto",
    "torch",
    "torch_fused",
    "torch_aten",
    "torch_int8",
    "triton",
    "exllama_v1",
    "exllama_v2",
    "marlin",
    "machete",
    "bitblas",
)
QUANT_STORAGES = ("uint8", "float16", "bfloat16", "float32")
FOUR_BIT_BLOCK = 64  # weights that share one absmax in bitsandbytes' 4-bit formats
_NESTED_BLOCK = 256  # absmax values that share one nested absmax under double quantization
_CODE_BYTES = 16 * 4  # the 16 float32 values that a 4-bit number can mean
_NESTED_CODE_BYTES = 256 * 4


class _RunsAnywhere:
    """What most precisions have in common: no device refuses them."""

    config_class: ClassVar[str | None] = None  # of transformers, for exported programs
    imports: ClassVar[tuple[str, ...]] = ()  # lines of an exported program besides transformers' own

    def refused_because(self, devices: Iterable[DeviceId]) -> str | None:  # noqa: ARG002 - the signature that every precision has
        """Why it cannot run where layers are kept; None if it can."""
        return None


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class FullPrecision(_RunsAnywhere):
    """Weights as they are, in one floating-point type.

    Attributes:
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: as the checkpoint states it.
    """

    method: ClassVar[str] = "full"
    package: ClassVar[str | None] = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the dtype.

        Raises:
            ValueError: If the dtype is none of the four.
        """
        check_choice("dtype", self.dtype, ("auto", *DTYPES))

    @property
    def label(self) -> str:
        """A few words for a title."""
        return "full precision" if self.dtype == "auto" else self.dtype

    def dtype_of(self, model_dtype: str) -> str:
        """What the weights that are not quantized are kept in, for a model whose own dtype this is."""
        return model_dtype if self.dtype == "auto" else self.dtype

    def to_config(self, model_dtype: str) -> Any | None:  # noqa: ARG002 - the signature that every precision has
        """Nothing is quantized, so there is no quantization config."""
        return None

    def to_python(self, model_dtype: str) -> list[str]:  # noqa: ARG002 - likewise
        """No lines: an exported program needs no quantization config."""
        return []


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class Int8(_RunsAnywhere):
    """LLM.int8() by bitsandbytes: linear weights in 8 bits, outlier columns multiplied in 16.

    Attributes:
        threshold: Activations beyond this magnitude are multiplied in 16 bits; 0 switches that off.
        skip_modules: Modules to leave alone, by name or part of a name. Empty means transformers' own choice: the
            output head and tied weights. Names given here REPLACE that choice, so name ``"lm_head"`` too.
        fp32_cpu_offload: Allow modules on the CPU or disk beside quantized ones on a GPU; they are not quantized.
        has_fp16_weight: Keep the weights as they are and quantize them anew whenever they multiply: for training them.
            It saves no memory.
    """

    method: ClassVar[str] = "int8"
    package: ClassVar[str | None] = "bitsandbytes"
    config_class: ClassVar[str | None] = "BitsAndBytesConfig"
    threshold: float = 6.0
    skip_modules: tuple[str, ...] = ()
    fp32_cpu_offload: bool = False
    has_fp16_weight: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is out of range.
        """
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold <= 20:
            raise ValueError(f"threshold is a number from 0 to 20 (6.0 is usual), not {self.threshold!r}.")
        object.__setattr__(self, "threshold", float(self.threshold))
        check_skip_modules(self)
        check_switches(self, "fp32_cpu_offload", "has_fp16_weight")

    @property
    def label(self) -> str:
        """A few words for a title."""
        return "int8"

    def dtype_of(self, model_dtype: str) -> str:
        """What the weights that are not quantized are kept in: the model's own dtype."""
        return model_dtype

    def to_config(self, model_dtype: str) -> Any:  # noqa: ARG002 - the signature that every precision has
        """The ``transformers.BitsAndBytesConfig`` of these options."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=self.threshold,
            llm_int8_skip_modules=list(self.skip_modules) or None,
            llm_int8_enable_fp32_cpu_offload=self.fp32_cpu_offload,
            llm_int8_has_fp16_weight=self.has_fp16_weight,
        )

    def to_python(self, model_dtype: str) -> list[str]:  # noqa: ARG002 - likewise
        """The same config as lines of Python, for an exported program."""
        options = ["load_in_8bit=True", f"llm_int8_threshold={self.threshold!r}"]
        if self.has_fp16_weight:
            options.append("llm_int8_has_fp16_weight=True")
        return _bitsandbytes_lines(self, options)

    def quantized_bytes(self, shape: tuple[int, int], dtype: str = "bfloat16") -> int:  # noqa: ARG002 - likewise
        """Bytes of one quantized weight of ``shape`` (out, in): the int8 values and a float32 scale per row.

        With ``has_fp16_weight`` they come on top of the weight, once it has run.
        """
        rows, columns = shape
        return rows * columns + 4 * rows


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class FourBit(_RunsAnywhere):
    """Linear weights in 4 bits by bitsandbytes, in blocks of 64 that share one scale.

    Attributes:
        quant_type: ``"nf4"`` (for normally distributed weights, the usual choice) or ``"fp4"``.
        double_quant: Quantize the scales as well: 0.4 bits less for each weight.
        compute_dtype: The type to multiply in; ``"auto"`` is the model's own.
        quant_storage: The type as which the packed bytes are declared. It changes no size; FSDP, which shards tensors
            of one type only, wants the model's own.
        skip_modules: As in :class:`Int8`.
        fp32_cpu_offload: As in :class:`Int8`.
    """

    method: ClassVar[str] = "4bit"
    package: ClassVar[str | None] = "bitsandbytes"
    config_class: ClassVar[str | None] = "BitsAndBytesConfig"
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "auto"
    quant_storage: str = "uint8"
    skip_modules: tuple[str, ...] = ()
    fp32_cpu_offload: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is out of range.
        """
        check_choice("quant_type", self.quant_type, ("nf4", "fp4"))
        check_choice("compute_dtype", self.compute_dtype, ("auto", *DTYPES))
        check_choice("quant_storage", self.quant_storage, QUANT_STORAGES)
        check_skip_modules(self)
        check_switches(self, "double_quant", "fp32_cpu_offload")

    @property
    def label(self) -> str:
        """A few words for a title."""
        return self.quant_type + (" + double quantization" if self.double_quant else "")

    def dtype_of(self, model_dtype: str) -> str:
        """What the weights that are not quantized are kept in: the model's own dtype."""
        return model_dtype

    def to_config(self, model_dtype: str) -> Any:
        """The ``transformers.BitsAndBytesConfig`` of these options.

        Args:
            model_dtype: What ``compute_dtype="auto"`` becomes, e.g. ``"bfloat16"``.
        """
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=model_dtype if self.compute_dtype == "auto" else self.compute_dtype,
            bnb_4bit_quant_storage=self.quant_storage,
            llm_int8_skip_modules=list(self.skip_modules) or None,
            llm_int8_enable_fp32_cpu_offload=self.fp32_cpu_offload,
        )

    def to_python(self, model_dtype: str) -> list[str]:
        """The same config as lines of Python, for an exported program."""
        compute_dtype = model_dtype if self.compute_dtype == "auto" else self.compute_dtype
        options = [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{self.quant_type}"',
            f"bnb_4bit_use_double_quant={self.double_quant}",
            f"bnb_4bit_compute_dtype=torch.{compute_dtype}",
        ]
        if self.quant_storage != "uint8":
            options.append(f"bnb_4bit_quant_storage=torch.{self.quant_storage}")
        return _bitsandbytes_lines(self, options)

    def quantized_bytes(self, shape: tuple[int, int], dtype: str = "bfloat16") -> int:  # noqa: ARG002 - likewise
        """Bytes of one quantized weight of ``shape`` (out, in): packed values, scales and look-up tables."""
        weights = math.prod(shape)
        blocks = math.ceil(weights / FOUR_BIT_BLOCK)
        packed = math.ceil(weights / 2) + _CODE_BYTES
        if not self.double_quant:
            return packed + 4 * blocks
        return packed + blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + _NESTED_CODE_BYTES + 4


def _bitsandbytes_lines(precision: Int8 | FourBit, options: list[str]) -> list[str]:
    if precision.skip_modules:
        options.append(f"llm_int8_skip_modules={list(precision.skip_modules)!r}")
    if precision.fp32_cpu_offload:
        options.append("llm_int8_enable_fp32_cpu_offload=True")
    return ["quantization_config = BitsAndBytesConfig(", *(f"    {option}," for option in options), ")"]


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class GPTQ(_RunsAnywhere):
    """Linear weights of the decoder layers in 2 to 8 bits, rounded layer by layer so that their outputs change least.

    Not done while a model is loaded: ``workbench.quantize`` writes a folder, which is then a model of its own. For such
    a folder, ours or from anywhere, these are the options that it was made with.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: So many weights of a row share one scale and zero point: 32, 64, 128, or -1 for the whole row.
        desc_act: Quantize the columns with the largest activations first ("act-order"): better, slower to run.
        sym: Symmetric about zero; False stores a zero point for each group.
        damp_percent: What is added to the diagonal of the Hessian, as a part of its mean.
        true_sequential: Within a layer, let each module see the output of those that are already quantized.
        skip_modules: Modules to leave alone, by name or part of a name, such as ``"down_proj"`` or
            ``"layers.0.mlp"``. What is outside the decoder layers (the head) is always left alone.
        format: ``"gptq"`` (v1, which every loader reads) or ``"gptq_v2"``, which AutoGPTQ and old loaders misread.
        backend: The kernel that multiplies, of ``GPTQ_BACKENDS``; ``"auto"`` is the fastest that is right here.
    """

    method: ClassVar[str] = "gptq"
    package: ClassVar[str | None] = "gptqmodel"
    config_class: ClassVar[str | None] = "GPTQConfig"
    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    damp_percent: float = 0.1
    true_sequential: bool = True
    skip_modules: tuple[str, ...] = ()
    format: str = "gptq"
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is out of range.
        """
        for name, value in (("bits", self.bits), ("group_size", self.group_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} is a whole number, not {value!r}.")  # noqa: TRY004 - one kind of error for bad input
        check_choice("bits", self.bits, (2, 3, 4, 8))
        if self.group_size != -1 and (self.group_size < 16 or self.group_size & (self.group_size - 1)):
            raise ValueError(f"group_size is 32, 64, 128 or -1 for a whole row, not {self.group_size!r}.")
        check_switches(self, "desc_act", "sym", "true_sequential")
        number = isinstance(self.damp_percent, (int, float)) and not isinstance(self.damp_percent, bool)
        if not number or not 0 < self.damp_percent < 1:
            raise ValueError(f"damp_percent is a number between 0 and 1 (0.1 is usual), not {self.damp_percent!r}.")
        object.__setattr__(self, "damp_percent", float(self.damp_percent))
        check_choice("format", self.format, ("gptq", "gptq_v2"))
        check_choice("backend", self.backend, GPTQ_BACKENDS)
        check_skip_modules(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, backend: str = "auto") -> GPTQ:
        """Read what a folder says of itself: ``quantization_config`` of its config.json, or its quantize_config.json.

        Keys that only its maker used are passed over. Which modules it left alone is not taken from here: the tensors
        in the folder say so.

        Args:
            config: As AutoGPTQ, gptqmodel, optimum or transformers wrote it.
            backend: The kernel to load it with.

        Raises:
            ValueError: If it is not GPTQ's, or in a packing that transformers cannot read.
        """
        method = str(config.get("quant_method") or "gptq").lower()
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if method != "gptq":
            raise ValueError(f"This model is quantized with {method!r}, not with GPTQ.")
        if layout == "marlin" or config.get("is_marlin_format"):
            raise ValueError("This GPTQ model is packed for Marlin, which nothing reads any more: take its original.")
        if "bits" not in config:
            raise ValueError("A GPTQ config says at least how many bits: {'bits': 4, 'group_size': 128}.")
        return cls(
            bits=config["bits"],
            group_size=config.get("group_size", 128),
            desc_act=bool(config.get("desc_act", False)),
            sym=bool(config.get("sym", True)),
            damp_percent=config.get("damp_percent") or 0.01,
            true_sequential=bool(config.get("true_sequential", True)),
            format=layout,
            backend=backend,
        )

    @property
    def label(self) -> str:
        """A few words for a title."""
        return f"GPTQ {self.bits}-bit, " + ("whole rows" if self.group_size == -1 else f"groups of {self.group_size}")

    def dtype_of(self, model_dtype: str) -> str:
        """What the weights that are not quantized are kept in: the model's own dtype."""
        return model_dtype

    def to_config(self, model_dtype: str) -> Any:  # noqa: ARG002 - the signature that every precision has
        """The ``transformers.GPTQConfig`` of these options, which a folder that is already quantized loads with."""
        from transformers import GPTQConfig

        from workbench.kernels import import_gptqmodel, library_backend

        import_gptqmodel()
        return GPTQConfig(
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.desc_act,
            act_group_aware=False,
            sym=self.sym,
            damp_percent=self.damp_percent,
            true_sequential=self.true_sequential,
            format=self.format,
            backend=library_backend(self.backend),
        )

    def to_python(self, model_dtype: str) -> list[str]:  # noqa: ARG002 - likewise
        """The choice of the kernel as a line of Python; everything else is in the folder that it loads."""
        if self.backend == "auto":
            return []
        from workbench.kernels import library_backend

        return [f'quantization_config = GPTQConfig(bits={self.bits}, backend="{library_backend(self.backend)}")']

    def quantized_bytes(self, shape: tuple[int, int], dtype: str = "bfloat16") -> int:  # noqa: ARG002 - likewise
        """Bytes of one quantized weight of ``shape`` (out, in): ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

        As it stands in the file and after the load; the bias, which stays as it is, and a kernel's own tables are not
        among them.
        """
        rows, columns = shape
        groups = 1 if self.group_size == -1 else math.ceil(columns / self.group_size)
        words = math.ceil(columns * self.bits / 32) * rows + groups * math.ceil(rows * self.bits / 32)
        return 4 * words + 2 * groups * rows + 4 * columns


# What a precision is: options in a frozen dataclass, ``method`` and ``package``, ``label``, ``dtype_of()``,
# ``to_config()``, the exact ``quantized_bytes()`` of a weight, ``refused_because()`` for what it cannot run on, and
# ``to_python()`` with ``config_class`` and ``imports`` for exported programs. One more is one more class in this list.
Precision = FullPrecision | Int8 | FourBit | GPTQ | TorchAO | HQQ
PRECISIONS: dict[str, type[Precision]] = {cls.method: cls for cls in (FullPrecision, Int8, FourBit, GPTQ, TorchAO, HQQ)}


def is_installed(precision: Precision | type[Precision]) -> bool:
    """Whether the library that a precision needs is here."""
    return precision.package is None or importlib.util.find_spec(precision.package) is not None


def precision_to_dict(precision: Precision) -> dict[str, Any]:
    """Plain data for a recipe's JSON: the method and its options."""
    options = {field.name: getattr(precision, field.name) for field in fields(precision)}
    return {"method": precision.method, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}


def precision_from_dict(data: dict[str, Any]) -> Precision:
    """The inverse of :func:`precision_to_dict`.

    Raises:
        ValueError: If the method is unknown or an option is out of range.
        TypeError: If there is an unknown option.
    """
    options = dict(data)
    method = options.pop("method", None)
    if method not in PRECISIONS:
        raise ValueError(f"precision.method is one of {', '.join(map(repr, PRECISIONS))}, not {method!r}.")
    return PRECISIONS[method](**options)
