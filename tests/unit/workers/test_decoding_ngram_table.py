"""What the n-gram tables remember, and that nothing in them grows without a bound or crosses tenants."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.decoding.ngram_table import MAX_COUNT, MAX_SUCCESSORS, NgramTable, NgramTables

TOKENS = st.lists(st.integers(0, 5), max_size=40)


def test_counts_what_followed_each_context() -> None:
    table = NgramTable(max_context=2)
    table.learn([1, 2, 3, 1, 2, 4, 1, 2, 3])
    assert dict(table.successors((1, 2))) == {3: 2, 4: 1}
    assert dict(table.successors((2,))) == {3: 2, 4: 1}
    assert dict(table.successors((2, 3))) == {1: 1}
    assert dict(table.successors((9,))) == {}


@given(TOKENS, st.lists(st.integers(0, 40), max_size=5))
def test_each_ngram_counts_once_however_the_text_came_in(tokens: list[int], cuts: list[int]) -> None:
    whole, pieces = NgramTable(), NgramTable()
    whole.learn(tokens)
    borders = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, end in pairwise(borders):
        pieces.learn(tokens[:end], start)
    expected: Counter[tuple[int, ...]] = Counter(
        tuple(tokens[end - length : end + 1])
        for end in range(len(tokens))
        for length in (1, 2, 3)
        if end >= length
    )
    for (*context, token_id), count in expected.items():
        assert whole.successors(tuple(context))[token_id] == min(count, MAX_COUNT)
        assert whole.successors(tuple(context)) == pieces.successors(tuple(context))
    assert len(whole) == len(pieces)


@given(st.lists(st.integers(0, 200), max_size=300), st.integers(1, 30))
def test_a_table_stays_within_its_bounds(tokens: list[int], max_contexts: int) -> None:
    table = NgramTable(max_contexts=max_contexts)
    table.learn(tokens)
    table.check_invariants()


def test_the_context_unused_for_longest_is_forgotten_first() -> None:
    table = NgramTable(max_context=1, max_contexts=2)
    table.learn([1, 2, 1, 3])
    assert dict(table.successors((1,))) == {2: 1, 3: 1}
    table.learn([7, 8])
    assert dict(table.successors((2,))) == {}
    assert dict(table.successors((1,))) == {2: 1, 3: 1}


def test_counts_are_capped_and_the_rarest_successor_makes_room() -> None:
    table = NgramTable(max_context=1)
    for _ in range(MAX_COUNT + 5):
        table.learn([0, 1])
    for token_id in range(2, MAX_SUCCESSORS + 2):
        table.learn([0, token_id])
    counts = table.successors((0,))
    assert counts[1] == MAX_COUNT
    assert len(counts) == MAX_SUCCESSORS
    assert 2 not in counts
    assert MAX_SUCCESSORS + 1 in counts


def test_a_tenant_never_sees_what_another_one_wrote() -> None:
    tables = NgramTables()
    tables.of("a").learn([1, 2, 3])
    assert len(tables.of("b")) == 0
    assert dict(tables.of("a").successors((1, 2))) == {3: 1}


def test_the_tenant_unused_for_longest_is_forgotten_first() -> None:
    tables = NgramTables(max_tenants=2)
    tables.of("a").learn([1, 2])
    tables.of("b").learn([1, 2])
    tables.of("a")
    tables.of("c")
    assert list(tables) == ["a", "c"]
    assert len(tables) == 2
    assert len(tables.of("a")) == 1
    assert len(tables.of("b")) == 0
