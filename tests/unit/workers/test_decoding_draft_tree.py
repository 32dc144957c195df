"""Draft trees: their shape, what a row sees, and that the likeliest one is the likeliest one."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.engine.prompt_lookup import lookup_chain
from benchmarks.engine.tree_search import searched_tree
from workers.engine.decoding.draft_tree import MIN_CHANCE, DraftTree, chances_after, likeliest_tree
from workers.engine.decoding.ngram_table import NgramTable

TOKENS = st.lists(st.integers(0, 4), max_size=60)
TREE = DraftTree((5, 6, 5, 7), (0, 0, 1, 3), (1, 1, 2, 3), (0.6, 0.3, 0.2, 0.1))

Make = Callable[[NgramTable, list[int], int], DraftTree]


def chain(_table: NgramTable, tokens: list[int], max_drafts: int) -> DraftTree:
    return lookup_chain(tokens, max_drafts)


def test_a_row_sees_itself_and_what_it_follows() -> None:
    TREE.check_invariants()
    assert TREE.mask().astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert TREE.position_offsets == (0, 1, 1, 2, 3)
    assert [TREE.path(row) for row in range(5)] == [(), (5,), (6,), (5, 5), (5, 5, 7)]


def test_no_drafts_are_a_tree_of_row_0_alone() -> None:
    empty = DraftTree()
    empty.check_invariants()
    assert empty.mask().tolist() == [[True]]
    assert empty.position_offsets == (0,)
    assert likeliest_tree(NgramTable(), [1, 2, 3], 8) == empty
    assert searched_tree(NgramTable(), [1, 2, 3], 8) == empty
    assert lookup_chain([1, 2, 3], 8) == empty
    assert lookup_chain([], 8) == empty


@pytest.mark.parametrize("make", [likeliest_tree, searched_tree, chain])
@given(TOKENS, st.integers(1, 20))
def test_every_beginning_of_a_tree_is_a_tree(make: Make, tokens: list[int], max_drafts: int) -> None:
    table = NgramTable()
    table.learn(tokens)
    tree = make(table, tokens, max_drafts)
    assert tree.num_drafts <= max_drafts
    assert tree == make(table, tokens, max_drafts)
    for num_drafts in range(tree.num_drafts + 1):
        part = tree.first(num_drafts)
        part.check_invariants()
        assert np.array_equal(part.mask(), tree.mask()[: num_drafts + 1, : num_drafts + 1])


def chance_of(table: NgramTable, tokens: list[int], path: tuple[int, ...]) -> float:
    chance, text = 1.0, tuple(tokens)
    for token_id in path:
        chance *= dict(chances_after(table, text[-table.max_context :])).get(token_id, 0.0)
        text = (*text, token_id)
    return chance


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4))
def test_no_other_tree_of_this_size_promises_more(tokens: list[int], max_drafts: int) -> None:
    table = NgramTable()
    table.learn(tokens)
    tree = likeliest_tree(table, tokens, max_drafts)
    for row, chance in enumerate(tree.chances, start=1):
        assert chance == pytest.approx(chance_of(table, tokens, tree.path(row)))
    paths = [()]
    for _ in range(max_drafts):
        paths += [(*path, token_id) for path in paths if len(path) < max_drafts for token_id in range(3)]
    chances = {path: chance_of(table, tokens, path) for path in paths if path}
    likely = sorted((chance for chance in chances.values() if chance >= MIN_CHANCE), reverse=True)
    assert sum(tree.chances) == pytest.approx(sum(likely[:max_drafts]), abs=1e-9)


@given(TOKENS)
def test_chances_fall_and_leave_some_for_what_was_never_seen(tokens: list[int]) -> None:
    table = NgramTable()
    table.learn(tokens)
    chances = [chance for _, chance in chances_after(table, tuple(tokens[-3:]))]
    assert chances == sorted(chances, reverse=True)
    assert math.fsum(chances) < 1


def test_a_longer_context_outweighs_a_shorter_one() -> None:
    table = NgramTable(max_context=2)
    table.learn([1, 2, 3] + [9, 2, 4] * 5)
    assert chances_after(table, (1, 2))[0][0] in (3, 4)
    table.learn([1, 2, 3] * 3)
    assert chances_after(table, (1, 2))[0][0] == 3
    assert chances_after(table, (9, 2))[0][0] == 4


def test_a_repeated_text_is_continued_as_a_chain() -> None:
    text = [1, 2, 3, 4, 5, 6] * 6
    table = NgramTable()
    table.learn(text)
    for tree in (likeliest_tree(table, text, 4), lookup_chain(text, 4)):
        assert tree.token_ids == (1, 2, 3, 4)
        assert tree.parents == (0, 1, 2, 3)
    assert set(searched_tree(table, text, 4).token_ids) == {1, 2, 3, 4}


def test_lookup_takes_the_latest_place_of_the_longest_match() -> None:
    assert lookup_chain([1, 2, 7, 1, 2, 8, 5, 2, 9, 1, 2], 2).token_ids == (8, 5)


def test_two_ways_to_go_on_are_both_drafted() -> None:
    table = NgramTable(max_context=1)
    table.learn([1, 2, 1, 3, 1, 2, 1, 3, 1])
    for tree in (likeliest_tree(table, [1], 6), searched_tree(table, [1], 6)):
        first = [
            token_id for token_id, parent in zip(tree.token_ids, tree.parents, strict=True) if parent == 0
        ]
        assert set(first) == {2, 3}
        assert not any(a == b for a, b in combinations(first, 2))
