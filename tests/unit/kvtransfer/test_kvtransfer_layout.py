"""What two pools must agree on, and what may differ."""

from dataclasses import replace

import pytest

from kvtransfer.layout import KvLayout, blocks_needed, incompatibility, inexactness, shared_heads
from kvtransfer.pool import KvSpan, span_bytes, span_of

LAYOUT = KvLayout("d", "float16", 16, 30, 4, 64, "rope")


def test_a_layout_without_a_range_of_heads_has_all() -> None:
    assert (LAYOUT.heads, LAYOUT.num_heads) == ((0, 4), 4)
    rank = replace(LAYOUT, head_lo=2, head_hi=4)
    assert (rank.heads, rank.num_heads) == ((2, 4), 2)


def test_sizes_count_the_heads_that_are_here() -> None:
    assert LAYOUT.token_bytes == 2 * 4 * 64 * 2
    assert replace(LAYOUT, head_lo=1, head_hi=2).token_bytes == 2 * 64 * 2
    assert LAYOUT.block_bytes == 30 * 16 * LAYOUT.token_bytes


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_needed_counts_a_partly_filled_one(num_tokens: int, num_blocks: int) -> None:
    assert blocks_needed(num_tokens, 16) == num_blocks


@pytest.mark.parametrize(
    ("sender", "receiver", "is_exact"),
    [
        ("int4", "int4", True),
        ("float8_e4m3fn", "float8_e4m3fn", True),
        ("bfloat16", "int4", True),
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", False),
        ("int4", "bfloat16", False),
        ("float8_e4m3fn", "bfloat16", False),
        # Rounded once more than it would be here.
        ("float8_e4m3fn", "int4", False),
    ],
)
def test_kv_in_fewer_bits_than_here_or_rounded_to_others_is_not_exact(
    sender: str, receiver: str, is_exact: bool
) -> None:
    found = inexactness(replace(LAYOUT, dtype=sender), replace(LAYOUT, dtype=receiver))
    assert (found is None) is is_exact


def test_rows_in_four_bits_have_their_scales_with_them() -> None:
    assert replace(LAYOUT, dtype="int4").token_bytes == 2 * 4 * (32 + 8)
    assert replace(LAYOUT, dtype="int4", head_dim=128).token_bytes == 2 * 4 * 72


@pytest.mark.parametrize(
    "other",
    [
        LAYOUT,
        replace(LAYOUT, block_size=1),
        replace(LAYOUT, dtype="float8_e4m3fn"),
        replace(LAYOUT, weight_dtype="fp8"),
        replace(LAYOUT, head_lo=3, head_hi=4),
    ],
)
def test_block_size_dtypes_and_heads_may_differ(other: KvLayout) -> None:
    assert incompatibility(LAYOUT, other) is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (replace(LAYOUT, model_digest="e"), "model_digest is 'd' at the sender and 'e' at the receiver"),
        (replace(LAYOUT, num_layers=31), "num_layers is 30 at the sender and 31 at the receiver"),
        (replace(LAYOUT, num_kv_heads=8), "num_kv_heads is 4 at the sender and 8 at the receiver"),
        (replace(LAYOUT, head_dim=8), "head_dim is 64 at the sender and 8 at the receiver"),
        (
            replace(LAYOUT, position_encoding="none"),
            "position_encoding is 'rope' at the sender and 'none' at the receiver",
        ),
    ],
)
def test_another_model_is_named_as_the_reason(other: KvLayout, reason: str) -> None:
    assert incompatibility(LAYOUT, other) == reason


def test_all_differences_are_named() -> None:
    reason = incompatibility(LAYOUT, replace(LAYOUT, num_layers=1, head_dim=1))
    assert reason is not None
    assert reason.count(" at the receiver") == 2


def test_ranks_without_a_common_head_have_nothing_to_send() -> None:
    low, high = replace(LAYOUT, head_lo=0, head_hi=2), replace(LAYOUT, head_lo=2, head_hi=4)
    assert shared_heads(low, high) is None
    assert incompatibility(low, high) == "the sender has KV heads [0, 2] and the receiver [2, 4]"


def test_common_heads_are_those_of_both() -> None:
    assert shared_heads(replace(LAYOUT, head_lo=1, head_hi=4), replace(LAYOUT, head_lo=0, head_hi=2)) == (
        1,
        2,
    )


def test_a_span_names_the_blocks_of_its_tokens_alone() -> None:
    span = span_of((9, 7, 5, 3), 4, tokens=(6, 11), layers=(1, 3), heads=(0, 2))
    assert span == KvSpan((7, 5), 2, 5, 1, 3, 0, 2)
    assert span_bytes(span, replace(LAYOUT, head_dim=8)) == 2 * 5 * 2 * 2 * 8 * 2
    assert span_bytes(span, replace(LAYOUT, head_dim=8), "float32") == 2 * 5 * 2 * 2 * 8 * 4
