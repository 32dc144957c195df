"""Codes of few bits: nothing is lost between codes and bytes, and as little as can be between numbers and codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.codecs.quantise import pack_bits, quantise, unpack_bits

each_width = pytest.mark.parametrize("bits", [2, 4, 8])


@each_width
@given(data=st.data())
def test_codes_come_back_from_their_bytes(bits: int, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, 2))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    sizes[dim] *= 8 // bits
    seed = data.draw(st.integers(0, 2**32))
    codes = torch.randint(0, 2**bits, sizes, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    kept = codes.clone()
    bytes_ = pack_bits(codes, bits, dim)
    assert bytes_.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack_bits(bytes_, bits, dim), kept)
    assert torch.equal(codes, kept)


@each_width
def test_all_levels_of_the_width_are_used(bits: int) -> None:
    # bits**2 - 1, as published, is the same for 2 and 4 bits alone.
    x = torch.linspace(-3, 5, 4096)[None]
    found = quantise(x, bits, dim=1)
    assert sorted(set(found.codes.flatten().tolist())) == list(range(2**bits))
    half_step = 8 / (2**bits - 1) / 2
    # Scale and minimum are rounded to fp16.
    assert float((found.numbers() - x).abs().max()) <= half_step + 8 * 2**-11


@each_width
@pytest.mark.parametrize("value", [0.0, 1.0, -117.25, 3e-7])
def test_a_group_of_equal_numbers_has_no_range_to_divide_by(bits: int, value: float) -> None:
    found = quantise(torch.full((3, 64), value), bits, dim=1)
    assert found.scales.eq(0).all()
    assert (found.numbers() - value).abs().max() <= abs(value) * 2**-11 + 2**-25
