"""Which steps are captured, and which of them computes a batch."""

from hypothesis import given
from hypothesis import strategies as st

from workers.device.buckets import (
    MAX_MIXED_TOKENS,
    MAX_PADDED_SHARE,
    bucket_of,
    decode_buckets,
    mixed_buckets,
)


def test_small_sizes_are_close_to_each_other_and_large_ones_are_few() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(6) == (1, 2, 4, 6)
    assert decode_buckets(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert len(decode_buckets(1024)) < 40


@given(st.integers(1, 2048), st.data())
def test_every_batch_has_the_smallest_size_that_holds_it(most: int, data: st.DataObject) -> None:
    buckets = decode_buckets(most)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most
    num = data.draw(st.integers(1, most))
    size = bucket_of(num, buckets)
    assert size is not None
    assert size >= num
    assert not any(num <= other < size for other in buckets)
    assert size - num <= max(7, MAX_PADDED_SHARE * num + 8)


def test_a_batch_beyond_all_sizes_has_none() -> None:
    assert bucket_of(9, (1, 2, 4, 8)) is None
    assert bucket_of(1, ()) is None


def test_mixed_steps_are_captured_up_to_the_token_budget() -> None:
    assert mixed_buckets(1) == (1,)
    assert mixed_buckets(64) == (32, 64)
    assert mixed_buckets(300) == (32, 64, 128, 256, 300)
    assert mixed_buckets(100_000)[-1] == MAX_MIXED_TOKENS


@given(budget=st.integers(1, 4096), num_tokens=st.integers(1, 2048))
def test_a_mixed_step_is_padded_by_less_than_a_tile(budget: int, num_tokens: int) -> None:
    size = bucket_of(num_tokens, mixed_buckets(budget))
    if num_tokens > budget:
        return
    assert size is not None
    assert 0 <= size - num_tokens < 128
