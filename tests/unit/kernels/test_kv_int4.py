"""Rows of K and V in four bits: what they are, and how near."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.kv_int4.op import head_dim_of, pack, pack_kv, turned, unpack, unpack_kv, values_of
from phasewise_kernels.kv_int4.rows import is_supported, row_bytes

SIZES = st.sampled_from((16, 32, 64, 128, 256))


def rows_of(head_dim: int, scale: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, head_dim, generator=generator) * scale


@settings(deadline=None)
@given(SIZES, st.floats(1e-3, 1e3), st.integers(0, 2**30))
def test_a_number_is_off_by_half_a_step_of_its_group(head_dim: int, scale: float, seed: int) -> None:
    x = rows_of(head_dim, scale, seed)
    rows = pack(x)
    assert rows.shape == (3, 5, row_bytes(head_dim))
    groups, found = (one.unflatten(-1, (-1, 2)) for one in (x, unpack(rows)))
    step = (groups.amax(-2, keepdim=True) - groups.amin(-2, keepdim=True)) / 15
    # Scale and minimum are rounded to fp16, and the last code is fifteen steps away.
    slack = (groups.abs().amax(-2, keepdim=True) + 15 * step) * 2**-10 + 2**-23
    assert ((found - groups).abs() <= step / 2 + slack).all()


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**30))
def test_a_row_depends_on_nothing_else(head_dim: int, seed: int) -> None:
    x = rows_of(head_dim, 1.0, seed)
    assert torch.equal(pack(x)[1, 2], pack(x[1, 2]))


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**30))
def test_turning_twice_is_nothing_and_keeps_products(head_dim: int, seed: int) -> None:
    x, y = rows_of(head_dim, 1.0, seed), rows_of(head_dim, 1.0, seed + 1)
    torch.testing.assert_close(turned(turned(x)), x, atol=1e-5, rtol=0)
    torch.testing.assert_close((turned(x) * turned(y)).sum(-1), (x * y).sum(-1), atol=1e-4, rtol=1e-4)


def test_bytes_are_where_the_format_says() -> None:
    x = torch.zeros(16)
    # Even channels from 0 to 15 in steps of 1, odd ones from -30 to 0 in steps of 2.
    x[0::2] = torch.tensor([0.0, 15, 1, 2, 3, 4, 5, 6])
    x[1::2] = torch.tensor([-30.0, 0, -16, -14, -12, -10, -8, -6])
    row = pack(x)
    assert row[:8].clone().view(torch.int32).tolist() == [0x87F021F0 - 2**32, 0xCBA96543 - 2**32]
    assert row[8:].view(torch.float16).tolist() == [1.0, 2.0, 0.0, -30.0]
    assert torch.equal(unpack(row), x)


def test_keys_are_spread_before_they_are_packed_and_values_are_not() -> None:
    kv = torch.randn(2, 2, 300, 1, 64, generator=torch.Generator().manual_seed(1))
    # One channel is large for all tokens, as keys have it.
    kv[..., 5] += 40
    rows = pack_kv(kv)
    assert rows.shape == (2, 2, 300, 1, row_bytes(64))
    errors = (unpack_kv(rows) - kv).square().mean((0, 2, 3, 4)).sqrt()
    assert torch.equal(unpack(rows[:, 1]), unpack_kv(rows)[:, 1])
    assert errors[0] < errors[1] / 2


def test_nan_stays_in_its_group_and_what_is_too_large_saturates() -> None:
    x = torch.ones(2, 32)
    x[0, 3] = float("nan")
    x[1, 0::2] = 1e30
    x[1, 1::2] = torch.tensor([float("inf"), -1e30] * 8)
    found = unpack(pack(x))
    assert found[0, 1::2].isnan().all()
    assert torch.equal(found[0, 0::2], x[0, 0::2])
    assert (found[1, 0::2] == 65024).all()
    # What attention makes of them in fp16 is a number too.
    assert found[1].half().isfinite().all()
    assert found[1, 1::4].min() > 0 > found[1, 3::4].max()


def test_caches_are_told_apart_by_their_dtype() -> None:
    packed, plain = torch.zeros(2, 4, 1, row_bytes(64), dtype=torch.uint8), torch.zeros(2, 4, 1, 64)
    assert head_dim_of(packed) == head_dim_of(plain) == 64
    assert values_of(packed, torch.bfloat16).shape == plain.shape
    assert values_of(plain, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("head_dim", "is_it"), [(16, False), (32, True), (80, False), (96, False), (128, True)]
)
def test_heads_are_a_power_of_two(head_dim: int, is_it: bool) -> None:
    assert is_supported(head_dim) is is_it
