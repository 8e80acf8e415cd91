"""torchao's weight-only quantization: int8 on any device, int4 on NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.model import refuses_unknown
from workbench.options import check_choice, check_skip_modules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workbench.hardware import DeviceId

_INT4_INPUTS, _INT4_OUTPUTS = 1024, 8  # tinygemm's tiles: weights are filled up to multiples of these


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class TorchAO:
    """Linear weights in 8 or 4 bits by torchao, the activations as they are.

    Attributes:
        bits: 8 or 4.
        group_size: So many weights of a row share one scale: 32, 64, 128, 256, or -1 for the whole row (8 bits only).
            None is torchao's own choice: whole rows in 8 bits, 128 in 4.
        skip_modules: As in :class:`workbench.precision.Int8`.
    """

    method: ClassVar[str] = "torchao"
    package: ClassVar[str | None] = "torchao"
    config_class: ClassVar[str | None] = "TorchAoConfig"
    bits: int = 8
    group_size: int | None = None
    skip_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is out of range.
        """
        check_choice("bits", self.bits, (8, 4))
        check_choice("group_size", self.group_size, (None, *((-1,) if self.bits == 8 else ()), 32, 64, 128, 256))
        check_skip_modules(self)

    @property
    def label(self) -> str:
        """A few words for a title."""
        group = self._group
        return f"torchao int{self.bits}" + ("" if group == -1 else f", groups of {group}")

    @property
    def _group(self) -> int:
        """-1 for whole rows."""
        return (-1 if self.bits == 8 else 128) if self.group_size is None else self.group_size

    @property
    def imports(self) -> tuple[str, ...]:
        """What an exported program imports besides transformers."""
        if self.bits == 4:
            return ("from torchao.quantization import Int4WeightOnlyConfig",)
        return ("from torchao.quantization import Int8WeightOnlyConfig" + ("" if self._group == -1 else ", PerGroup"),)

    def dtype_of(self, model_dtype: str) -> str:
        """What the weights that are not quantized are kept in: the model's own, and bfloat16 beside int4."""
        return model_dtype if self.bits == 8 else "bfloat16"

    def refused_because(self, devices: Iterable[DeviceId]) -> str | None:
        """Why it cannot run where layers are kept; None if it can."""
        if "disk" in devices:
            return "torchao's tensors cannot wait on the disk"
        if self.bits == 4 and "cpu" in devices:
            return "torchao's int4 kernels run on NVIDIA GPUs from Ampere on; int8 runs on the CPU too"
        return None

    def to_config(self, model_dtype: str) -> Any:  # noqa: ARG002 - the signature that every precision has
        """The ``transformers.TorchAoConfig`` of these options."""
        import torchao.quantization as ao
        from transformers import TorchAoConfig

        if self.bits == 4:
            kind = ao.Int4WeightOnlyConfig(group_size=self._group, int4_packing_format="tile_packed_to_4d")
        elif self._group == -1:
            kind = ao.Int8WeightOnlyConfig()
        else:
            kind = ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(self._group))
        return TorchAoConfig(kind, modules_to_not_convert=self._not_converted())

    def _not_converted(self) -> list[str] | None:
        """The same for torchao's quantizer, which is asked about parameters."""
        both = [part for name in self.skip_modules for part in (name, rf".*{name}\.weight")]
        return both or None

    def to_python(self, model_dtype: str) -> list[str]:  # noqa: ARG002 - likewise
        """The same config as lines of Python, for an exported program."""
        if self.bits == 4:
            kind = f'Int4WeightOnlyConfig(group_size={self._group}, int4_packing_format="tile_packed_to_4d")'
        elif self._group == -1:
            kind = "Int8WeightOnlyConfig()"
        else:
            kind = f"Int8WeightOnlyConfig(granularity=PerGroup({self._group}))"
        skipped = self._not_converted()
        rest = f", modules_to_not_convert={skipped!r}" if skipped else ""
        return [f"quantization_config = TorchAoConfig({kind}{rest})"]

    def quantized_bytes(self, shape: tuple[int, int], dtype: str = "bfloat16") -> int:  # noqa: ARG002 - likewise
        """Bytes of one quantized weight of ``shape`` (out, in).

        In 8 bits the values, and for each group a float32 scale and an int8 zero point. In 4 bits the values, and for
        each group a scale and a zero point in bfloat16, of the weight filled up to whole tiles.
        """
        rows, columns = shape
        if self.bits == 8:
            groups = 1 if self._group == -1 else math.ceil(columns / self._group)
            return rows * columns + 5 * rows * groups
        rows = math.ceil(rows / _INT4_OUTPUTS) * _INT4_OUTPUTS
        columns = math.ceil(columns / _INT4_INPUTS) * _INT4_INPUTS
        return rows * columns // 2 + 4 * rows * (columns // self._group)
