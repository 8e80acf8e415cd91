"""Packed weights, worked out by hand and against a file of AutoGPTQ's."""

from __future__ import annotations

import pytest
import torch

from workbench.gptq_packing import dequantize, pack_linear, pack_values, unpack_values


def test_by_hand() -> None:
    values = torch.tensor([[i % 16] for i in range(32)])
    # 4 bits, the first value lowest: 0x76543210, 0xFEDCBA98 (negative as int32), and so on.
    assert pack_values(values, 4).flatten().tolist() == [0x76543210, 0xFEDCBA98 - 2**32, 0x76543210, 0xFEDCBA98 - 2**32]
    three = torch.zeros(32, 1, dtype=torch.int64)
    three[10] = 0b110  # its lowest bits are bits 30 and 31 of word 0, its highest is bit 0 of word 1
    assert pack_values(three, 3).flatten().tolist() == [-(2**31), 1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip(bits: int) -> None:
    values = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(0))
    words = pack_values(values, bits)
    assert words.shape == (96 * bits // 32, 5)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_values(words, bits), values.int())


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_gives_the_weight_back(bits: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    scales = (torch.rand(64, 4, generator=generator) + 0.01).half().float()
    zeros = torch.randint(1, 2**bits, (64, 4), generator=generator)
    g_idx = torch.randperm(128, generator=generator) // 32
    values = torch.randint(0, 2**bits, (64, 128), generator=generator)
    weight = scales[:, g_idx] * (values - zeros[:, g_idx])
    packed = pack_linear(weight, scales, zeros, g_idx, bits=bits, layout=layout)
    assert torch.equal(dequantize(packed, bits=bits, layout=layout), weight)


def test_v1_has_no_zero_point_zero() -> None:
    """All weights of a group positive: the zero point is 0, v1 stores 1 less; the values move up with it instead."""
    scales, zeros, g_idx = torch.ones(32, 1), torch.zeros(32, 1), torch.zeros(32, dtype=torch.int64)
    weight = torch.arange(32).remainder(15).expand(32, 32).float()
    packed = pack_linear(weight, scales, zeros, g_idx, bits=4, layout="gptq")
    assert int(packed.qzeros.abs().max()) == 0  # stored as 1 - 1, not as -1, which would spill into its neighbours
    assert torch.equal(dequantize(packed, bits=4, layout="gptq"), weight)
