"""How GPTQ's weights lie in a file: integers packed into 32-bit words, a scale and a zero point for each group.

The layout of GPTQ-for-LLaMa, AutoGPTQ and gptqmodel alike: along the input, every 32 values fill as many words as they
have bits, the first value in the lowest bits. Format ``gptq`` (v1) stores zero points less one, ``gptq_v2`` stores
them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PACKED_NAMES = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """One linear module's weight as it lies in a file.

    Attributes:
        qweight: int32 (in * bits / 32, out).
        qzeros: int32 (groups, out * bits / 32).
        scales: float16 (groups, out).
        g_idx: int32 (in,): the group of each input.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Name to tensor, as a checkpoint spells them."""
        return {f"{prefix}.{name}": getattr(self, name).contiguous() for name in PACKED_NAMES}


def pack_values(values: Tensor, bits: int) -> Tensor:
    """Pack whole numbers below ``2**bits`` along the first dimension, whose length is a multiple of 32.

    Args:
        values: (n, m), of any integer type.
        bits: Of each value.

    Returns:
        int32 (n * bits / 32, m).
    """
    import torch

    blocks = values.to(torch.int64).reshape(-1, _WORD, values.shape[1])
    words = torch.zeros(blocks.shape[0], bits, values.shape[1], dtype=torch.int64, device=values.device)
    for value, word, shift in _places(bits):
        part = blocks[:, value]
        words[:, word] |= (part << shift if shift >= 0 else part >> -shift) & 0xFFFFFFFF
    return words.reshape(-1, values.shape[1]).to(torch.int32)  # wraps around: the bits stay what they are


def unpack_values(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_values`.

    Returns:
        int32 (n, m).
    """
    import torch

    blocks = (words.to(torch.int64) & 0xFFFFFFFF).reshape(-1, bits, words.shape[1])
    values = torch.zeros(blocks.shape[0], _WORD, words.shape[1], dtype=torch.int64, device=words.device)
    for value, word, shift in _places(bits):
        part = blocks[:, word]
        values[:, value] |= part >> shift if shift >= 0 else part << -shift
    values &= 2**bits - 1
    return values.reshape(-1, words.shape[1]).to(torch.int32)


def _places(bits: int) -> list[tuple[int, int, int]]:
    """Which value touches which word, and how far it is shifted there; a 3-bit value may lie across two words."""
    return [
        (value, word, value * bits - word * _WORD)
        for value in range(_WORD)
        for word in range(value * bits // _WORD, (value * bits + bits - 1) // _WORD + 1)
    ]


def pack_linear(
    weight: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, *, bits: int, layout: str
) -> PackedLinear:
    """Pack a weight that is already rounded to its grid.

    Args:
        weight: (out, in), each value ``scale * (integer - zero)`` of its group.
        scales: (out, groups).
        zeros: (out, groups), whole numbers.
        g_idx: (in,): the group of each input.
        bits: 2, 3, 4 or 8.
        layout: ``"gptq"`` or ``"gptq_v2"``.

    Returns:
        The packed tensors, on the CPU.
    """
    import torch

    groups = g_idx.long()
    top = 2**bits - 1
    zeros = zeros.float()
    values = torch.round(weight.float() / scales.float()[:, groups])
    if layout == "gptq":
        zeros = zeros.clamp(min=1)  # v1 has no room for zero point 0: the values move up by one with it
    values = (values + zeros[:, groups]).clamp_(0, top)
    stored = (zeros - (1 if layout == "gptq" else 0)).int()
    return PackedLinear(
        qweight=pack_values(values.int().t(), bits).cpu(),
        qzeros=pack_values(stored, bits).t().contiguous().cpu(),
        scales=scales.t().to(torch.float16).contiguous().cpu(),
        g_idx=g_idx.to(torch.int32).cpu().clone(),  # files hold no shared tensors
    )


def dequantize(packed: PackedLinear, *, bits: int, layout: str) -> Tensor:
    """The plain float32 weight (out, in) that packed tensors stand for: what every kernel has to multiply with."""
    groups = packed.g_idx.long()
    values = unpack_values(packed.qweight, bits)
    zeros = unpack_values(packed.qzeros.t().contiguous(), bits).t() + (1 if layout == "gptq" else 0)
    return (packed.scales.float()[groups] * (values - zeros[groups])).t()


def packed_linear(tensors: dict[str, Any], prefix: str) -> PackedLinear:
    """Pick one module's tensors out of a checkpoint's."""
    return PackedLinear(**{name: tensors[f"{prefix}.{name}"] for name in PACKED_NAMES})
