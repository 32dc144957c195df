"""Ranges of KV: splitting them, and accounting for them."""

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.kv_range import Coverage, KvRange, split

TOKEN_BYTES = 8


@st.composite
def ranges(draw: st.DrawFn, num_layers: int = 40, num_tokens: int = 50) -> KvRange:
    layer_lo = draw(st.integers(0, num_layers - 1))
    token_lo = draw(st.integers(0, num_tokens - 1))
    layer_hi = draw(st.integers(layer_lo + 1, num_layers))
    return KvRange(layer_lo, layer_hi, token_lo, draw(st.integers(token_lo + 1, num_tokens)))


def pairs(kv_range: KvRange) -> set[tuple[int, int]]:
    layers = range(kv_range.layer_lo, kv_range.layer_hi)
    return {(layer, token) for layer in layers for token in range(kv_range.token_lo, kv_range.token_hi)}


@given(ranges(), st.integers(1, 7), st.integers(1, TOKEN_BYTES * 200))
def test_parts_fit_and_cover_the_range_once(whole: KvRange, token_step: int, max_bytes: int) -> None:
    parts = list(split(whole, token_bytes=TOKEN_BYTES, token_step=token_step, max_bytes=max_bytes))
    sizes = [part.num_layers * part.num_tokens * TOKEN_BYTES for part in parts]
    assert max(sizes) <= max(max_bytes, token_step * TOKEN_BYTES)
    assert sum(len(pairs(part)) for part in parts) == len(pairs(whole))
    assert set().union(*map(pairs, parts)) == pairs(whole)


@given(ranges(), st.integers(1, 7), st.integers(1, TOKEN_BYTES * 200))
def test_tokens_are_divided_where_blocks_end(whole: KvRange, token_step: int, max_bytes: int) -> None:
    for part in split(whole, token_bytes=TOKEN_BYTES, token_step=token_step, max_bytes=max_bytes):
        assert part.token_lo == whole.token_lo or part.token_lo % token_step == 0
        assert part.token_hi == whole.token_hi or part.token_hi % token_step == 0


def test_whole_layers_are_kept_together_while_one_fits() -> None:
    whole = KvRange(0, 5, 0, 16)
    parts = split(whole, token_bytes=TOKEN_BYTES, token_step=4, max_bytes=TOKEN_BYTES * 32)
    assert [(part.num_layers, part.num_tokens) for part in parts] == [(2, 16), (2, 16), (1, 16)]


def test_a_layer_that_does_not_fit_is_divided_where_blocks_end() -> None:
    whole = KvRange(0, 1, 2, 19)
    parts = split(whole, token_bytes=TOKEN_BYTES, token_step=4, max_bytes=TOKEN_BYTES * 8)
    assert [(part.token_lo, part.token_hi) for part in parts] == [(2, 8), (8, 16), (16, 19)]


def test_parts_of_a_layer_are_of_one_size_and_leave_no_small_rest() -> None:
    whole = KvRange(0, 1, 0, 64)
    # Five blocks fit, of sixteen.
    parts = split(whole, token_bytes=TOKEN_BYTES, token_step=4, max_bytes=TOKEN_BYTES * 23)
    assert [part.num_tokens for part in parts] == [16, 16, 16, 16]


@given(ranges(), st.integers(1, 7), st.integers(1, TOKEN_BYTES * 200))
def test_there_are_no_more_parts_than_needed(whole: KvRange, token_step: int, max_bytes: int) -> None:
    layer = KvRange(0, 1, whole.token_lo, whole.token_hi)
    parts = list(split(layer, token_bytes=TOKEN_BYTES, token_step=token_step, max_bytes=max_bytes))
    num_blocks = -(-layer.token_hi // token_step) - layer.token_lo // token_step
    assert len(parts) == -(-num_blocks // max(1, max_bytes // (TOKEN_BYTES * token_step)))


@given(ranges(6, 6), ranges(6, 6))
def test_ranges_overlap_when_they_have_a_layer_of_a_token_in_common(one: KvRange, other: KvRange) -> None:
    assert one.overlaps(other) == bool(pairs(one) & pairs(other))


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
    assert coverage.problem(KvRange(2, 3, 0, 1)) == "layers [2, 3) of tokens [0, 1) of 2 layers and 3 tokens"
