"""GEAR: each correction makes the error smaller, and what the published code gets wrong is right here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codecs.codec import PAGE_TOKENS, CodecId, PageShape
from kvtransfer.codecs.gear import (
    GEAR,
    GEAR_L,
    MIN_TOKENS,
    Recipe,
    factors,
    gear_codec,
    num_groups_of,
    orthonormal,
    outlier_count,
    rank_of,
)
from tests.support.codec_kv import realistic_kv, round_trip

KEPT = gear_codec(CodecId.NONE, Recipe(bits=2, rank=0, outlier_share=0.02))
PLAIN = gear_codec(CodecId.NONE, Recipe(bits=2, rank=0, outlier_share=0.0))


def errors(packed: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Frobenius norm for each layer and page, K and V and heads together."""
    return torch.stack([page.flatten(1).norm(dim=1) for page in (packed - kv).split(PAGE_TOKENS, 2)], 1)


@settings(max_examples=20)
@given(
    num_tokens=st.integers(32, 200),
    head_dim=st.sampled_from([64, 96, 128]),
    seed=st.integers(0, 10_000),
)
def test_outliers_and_factors_each_make_the_error_of_every_page_smaller(
    num_tokens: int, head_dim: int, seed: int
) -> None:
    kv = realistic_kv(num_tokens, head_dim=head_dim, seed=seed)
    gear, gear_l, plain = (errors(round_trip(each, kv), kv) for each in (GEAR, GEAR_L, PLAIN))
    # Pages shorter than MIN_TOKENS, and factors too short to be had, are the same in two of them.
    assert (gear <= gear_l * (1 + 1e-6)).all()
    assert (gear_l <= plain * (1 + 1e-6)).all()
    assert (gear[:, 0] < plain[:, 0]).all()


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([(64, 64), (33, 96), (96, 33)]), st.integers(1, 4))
def test_every_matrix_of_a_batch_has_factors_of_its_own(seed: int, size: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn((4, *size), generator=generator)
    error += (
        3
        * torch.randn((4, size[0], rank), generator=generator)
        @ torch.randn((4, rank, size[1]), generator=generator)
    )
    left, right = factors(error, rank)
    for number in range(4):
        alone = factors(error[number : number + 1], rank)
        assert torch.equal(left[number], alone[0][0])
        assert torch.equal(right[number], alone[1][0])
        residual = (error[number] - left[number].T @ right[number]).norm()
        best = torch.linalg.svdvals(error[number])[rank:].norm()
        assert residual <= 1.05 * best
        assert residual < error[number].norm()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_factors_of_an_error_of_lower_rank_are_exact(rank: int) -> None:
    one = torch.outer(torch.arange(1.0, 65), torch.arange(1.0, 41))
    error = torch.stack((one, torch.zeros_like(one), -one))
    left, right = factors(error, rank)
    assert left.isfinite().all()
    assert (left.mT @ right - error).norm() <= 1e-5 * error.norm()


def test_rows_become_orthonormal_and_dependent_ones_zero() -> None:
    rows = torch.randn((5, 3, 64), generator=torch.Generator().manual_seed(0))
    rows[1, 2] = rows[1, 0] * 2 - rows[1, 1]
    rows[2, 0] = 0
    found = orthonormal(rows)
    expected = torch.eye(3).repeat(5, 1, 1)
    expected[1, 2, 2] = expected[2, 0, 0] = 0
    assert (found @ found.mT - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("length", "count"), [(16, 0), (49, 0), (50, 1), (64, 1), (128, 1), (150, 2), (256, 3)]
)
def test_the_number_of_outliers_follows_the_length_of_their_own_vector(length: int, count: int) -> None:
    # Not the width of all heads together: so heads take equally much, however many there are.
    assert outlier_count(length, 0.02) == count
    one, many = (GEAR.packed_bytes(PageShape(1, 64, num_heads, 64)) for num_heads in (1, 48))
    assert many == 48 * one


def test_outliers_come_back_as_they_were_and_widen_no_range() -> None:
    kv = realistic_kv(64).half()
    kv[:, :, 11, 1, 17] = 300
    kv[:, :, 45, 2, 60] = -300
    found = round_trip(GEAR, kv)
    assert found[:, :, 11, 1, 17].eq(300).all()
    assert found[:, :, 45, 2, 60].eq(-300).all()
    # Without factors, which would make up for it. K is grouped by channel, V by token.
    for vector in (lambda x: x[:, 0, :, 1, 17], lambda x: x[:, 1, 45, 2]):
        kept, plain = ((vector(round_trip(each, kv)) - vector(kv.float())).norm() for each in (KEPT, PLAIN))
        assert kept < plain / 5


@pytest.mark.parametrize("num_tokens", [1, MIN_TOKENS - 1])
def test_pages_too_short_to_save_anything_are_kept(num_tokens: int) -> None:
    kv = realistic_kv(num_tokens).half()
    for each in (GEAR, GEAR_L):
        assert (round_trip(each, kv) - kv.float()).abs().max() <= 2**-15


def test_a_shorter_page_has_fewer_factors() -> None:
    assert [rank_of(num_tokens, 2) for num_tokens in (16, 31, 32, 63, 64)] == [0, 0, 1, 1, 2]


def test_channels_are_grouped_evenly() -> None:
    assert [num_groups_of(head_dim) for head_dim in (8, 64, 80, 96, 128, 200)] == [1, 1, 2, 2, 2, 4]


def test_sizes_to_fp16_are_those_that_were_worked_out_by_hand() -> None:
    # 64 x 64 numbers of 2 bits; 64 scales and minima; rank 2; 2 outliers of 3 bytes in each of 64 vectors.
    head = 64 * 64 // 4 + 64 * 4 + 2 * 128 * 2
    assert GEAR_L.packed_bytes(PageShape(1, 64, 1, 64)) == 2 * (head + 1)
    assert GEAR.packed_bytes(PageShape(1, 64, 1, 64)) == 2 * (head + 64 * 6 + 1)
    assert GEAR_L.packed_bytes(PageShape(1, 64, 1, 64)) / (2 * 64 * 64 * 2) == pytest.approx(0.219, abs=0.001)
