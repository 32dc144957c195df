"""Ranges of KV: splitting them, and accounting for them."""

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.kv_range import Coverage, KvRange, split
from kvtransfer.layout import KvLayout

LAYOUT = KvLayout(
    "d", "float16", block_size=4, num_layers=40, num_kv_heads=2, head_dim=8, position_encoding=""
)
BLOCK_BYTES = LAYOUT.chunk_bytes(num_layers=1, num_blocks=1)


@st.composite
def ranges(draw: st.DrawFn, num_layers: int = 40, num_blocks: int = 20) -> KvRange:
    layer_lo = draw(st.integers(0, num_layers - 1))
    block_lo = draw(st.integers(0, num_blocks - 1))
    layer_hi = draw(st.integers(layer_lo + 1, num_layers))
    return KvRange(layer_lo, layer_hi, block_lo, draw(st.integers(block_lo + 1, num_blocks)))


def pairs(kv_range: KvRange) -> set[tuple[int, int]]:
    layers = range(kv_range.layer_lo, kv_range.layer_hi)
    return {(layer, block) for layer in layers for block in range(kv_range.block_lo, kv_range.block_hi)}


@given(ranges(), st.integers(1, BLOCK_BYTES * 100))
def test_parts_fit_and_cover_the_range_once(whole: KvRange, max_bytes: int) -> None:
    parts = list(split(whole, LAYOUT, max_bytes))
    assert all(part.num_bytes(LAYOUT) <= max(max_bytes, BLOCK_BYTES) for part in parts)
    assert sum(len(pairs(part)) for part in parts) == len(pairs(whole))
    assert set().union(*map(pairs, parts)) == pairs(whole)


@given(st.lists(ranges(6, 6), max_size=12))
def test_coverage_counts_each_pair_once(candidates: list[KvRange]) -> None:
    coverage = Coverage(6, 6)
    seen: set[tuple[int, int]] = set()
    for candidate in candidates:
        problem = coverage.problem(candidate)
        assert (problem is None) == seen.isdisjoint(pairs(candidate))
        if problem is None:
            coverage.add(candidate)
            seen |= pairs(candidate)
        assert coverage.num_missing == 36 - len(seen)
        assert coverage.is_complete == (len(seen) == 36)


def test_a_range_that_is_empty_or_outside_is_a_problem() -> None:
    coverage = Coverage(2, 3)
    outside = [
        (0, 3, 0, 1),
        (0, 1, 0, 4),
        (-1, 1, 0, 1),
        (0, 1, -1, 1),
        (1, 1, 0, 1),
        (0, 1, 2, 2),
        (1, 0, 0, 1),
    ]
    assert all(coverage.problem(KvRange(*ends)) for ends in outside)
    assert coverage.problem(KvRange(2, 3, 0, 1)) == "layers [2, 3) of blocks [0, 1) of 2 layers and 3 blocks"


def test_whole_layers_are_kept_together_while_one_fits() -> None:
    sizes = [
        (part.layer_hi - part.layer_lo, part.block_hi - part.block_lo)
        for part in split(KvRange(0, 5, 0, 4), LAYOUT, BLOCK_BYTES * 8)
    ]
    assert sizes == [(2, 4), (2, 4), (1, 4)]
