"""The digest of a transfer changes with all that it speaks of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.digest import DIGEST_BYTES, token_digest, transfer_digest
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout

LAYOUT = KvLayout("d", "float16", 16, 30, 3, 64, "rope")
TOKENS = token_digest([1, 2, 3])
CHUNKS = [(KvRange(0, 1, 0, 2), 0, 7), (KvRange(0, 1, 2, 3), 0, 8)]
DIGEST = transfer_digest(LAYOUT, TOKENS, (0, 3), CHUNKS)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_other_tokens_have_another_digest(tokens: list[int], others: list[int]) -> None:
    assert (token_digest(tokens) == token_digest(others)) == (tokens == others)
    assert len(token_digest(tokens)) == DIGEST_BYTES


def test_the_same_tokens_at_other_positions_have_another_digest() -> None:
    assert token_digest([1, 2], first_position=5) != token_digest([1, 2])


OTHER_LAYOUTS = [
    replace(LAYOUT, model_digest="e"),
    replace(LAYOUT, position_encoding="rope2"),
    replace(LAYOUT, dtype="float32"),
    replace(LAYOUT, num_layers=31),
    replace(LAYOUT, num_kv_heads=4),
    replace(LAYOUT, head_dim=65),
    # The border between two names is part of it.
    replace(LAYOUT, model_digest="dr", position_encoding="ope"),
]


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_another_model_or_meaning_has_another_digest(layout: KvLayout) -> None:
    assert transfer_digest(layout, TOKENS, (0, 3), CHUNKS) != DIGEST


def test_blocks_may_differ_between_the_two_sides() -> None:
    assert transfer_digest(replace(LAYOUT, block_size=1), TOKENS, (0, 3), CHUNKS) == DIGEST


@pytest.mark.parametrize(
    "chunks",
    [
        CHUNKS[:1],
        CHUNKS[::-1],
        [CHUNKS[0], (KvRange(0, 1, 2, 3), 0, 9)],
        [CHUNKS[0], (KvRange(0, 1, 2, 3), 1, 8)],
        [(CHUNKS[1][0], 0, 7), (CHUNKS[0][0], 0, 8)],
    ],
)
def test_other_chunks_have_another_digest(chunks: list[tuple[KvRange, int, int]]) -> None:
    assert transfer_digest(LAYOUT, TOKENS, (0, 3), chunks) != DIGEST


def test_other_tokens_or_heads_have_another_digest() -> None:
    assert transfer_digest(LAYOUT, token_digest([1, 2, 4]), (0, 3), CHUNKS) != DIGEST
    assert transfer_digest(LAYOUT, TOKENS, (0, 2), CHUNKS) != DIGEST
