"""Half-quadratic quantization by hqq: 1 to 8 bits without calibration."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.model import refuses_unknown
from workbench.options import check_choice, check_skip_modules, element_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workbench.hardware import DeviceId

_A_BYTE = {8: 1, 4: 2, 2: 4, 1: 8}  # bits to values in a byte
_A_WORD = 10  # values of 3 bits in an int32


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class HQQ:
    """Linear weights in 1 to 8 bits by hqq.

    Attributes:
        bits: 8, 4, 3, 2 or 1.
        group_size: So many weights of a row share a scale and a zero point: 16 to 256.
        skip_modules: As in :class:`workbench.precision.Int8`.
    """

    method: ClassVar[str] = "hqq"
    package: ClassVar[str | None] = "hqq"
    config_class: ClassVar[str | None] = "HqqConfig"
    imports: ClassVar[tuple[str, ...]] = ()
    bits: int = 4
    group_size: int = 64
    skip_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is out of range.
        """
        check_choice("bits", self.bits, (8, 4, 3, 2, 1))
        check_choice("group_size", self.group_size, (16, 32, 64, 128, 256))
        check_skip_modules(self)

    @property
    def label(self) -> str:
        """A few words for a title."""
        return f"HQQ {self.bits}-bit, groups of {self.group_size}"

    def dtype_of(self, model_dtype: str) -> str:
        """What the weights that are not quantized are kept in: the model's own dtype."""
        return model_dtype

    def refused_because(self, devices: Iterable[DeviceId]) -> str | None:
        """Why it cannot run where layers are kept; None if it can."""
        if {"cpu", "disk"} & set(devices):
            return "transformers loads HQQ on GPUs only"
        return _refused_by_transformers()

    def to_config(self, model_dtype: str) -> Any:  # noqa: ARG002 - the signature that every precision has
        """The ``transformers.HqqConfig`` of these options."""
        from transformers import HqqConfig

        options = {"skip_modules": list(self.skip_modules)} if self.skip_modules else {}
        return HqqConfig(nbits=self.bits, group_size=self.group_size, axis=1, **options)

    def to_python(self, model_dtype: str) -> list[str]:  # noqa: ARG002 - likewise
        """The same config as lines of Python, for an exported program."""
        skipped = f", skip_modules={list(self.skip_modules)!r}" if self.skip_modules else ""
        return [f"quantization_config = HqqConfig(nbits={self.bits}, group_size={self.group_size}, axis=1{skipped})"]

    def quantized_bytes(self, shape: tuple[int, int], dtype: str = "bfloat16") -> int:
        """Bytes of one quantized weight of ``shape`` (out, in): values, and a scale and a zero point for each group.

        Args:
            shape: Its rows and columns.
            dtype: Of scales and zero points: the model's own.
        """
        groups = math.prod(shape) // self.group_size
        if self.bits == 3:
            values = 4 * math.ceil(groups / _A_WORD) * self.group_size
        else:
            values = groups // _A_BYTE[self.bits] * self.group_size
        return values + 2 * element_bytes(dtype) * groups


@functools.lru_cache(maxsize=1)
def _refused_by_transformers() -> str | None:
    """Why this version of transformers cannot quantize with it while it loads; None if it can."""
    import transformers
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    if "get_quantize_ops" in vars(HqqHfQuantizer):
        return None
    return f"transformers {transformers.__version__} says that HQQ is not available yet and will be supported soon"
