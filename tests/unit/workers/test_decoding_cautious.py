"""Cautious decoding: how many branches, where they end, and that the likeliest one stays."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.api import CautiousDecoding
from workers.engine.decoding.cautious import (
    MIN_BRANCH_TOKENS,
    BranchSet,
    num_branches,
    punctuation_token_ids,
)

PARAMS = CautiousDecoding()
COMMA, STOP = 8, 9
ENDS = {"punctuation": frozenset({COMMA}), "stop_token_ids": frozenset({STOP})}


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [(0.0, 1), (0.01, 1), (0.175, 1), (0.176, 2), (0.755, 5), (1.34, 9), (1.499, 9), (1.5, 10), (9.0, 10)],
)
def test_branches_by_entropy_are_those_of_the_authors_code(entropy: float, expected: int) -> None:
    assert num_branches(entropy, PARAMS) == expected


@given(st.floats(0, 20), st.floats(0, 20))
def test_more_entropy_never_means_fewer_branches(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 1 <= num_branches(low, PARAMS) <= num_branches(high, PARAMS) <= PARAMS.max_branches


def test_punctuation_comes_with_spaces_and_in_runs() -> None:
    texts = [".", " .", "\n\n", ");", "  ", "", "a.", "word", " ?!", "\n    ", "-", "...", '."', "\t}"]
    assert punctuation_token_ids(texts) == {0, 1, 2, 3, 8, 9, 11, 13}


#: What each branch would say if it went on: (token, logprob). Small whole numbers, so that ties occur.
STREAMS = st.lists(
    st.lists(
        st.tuples(st.sampled_from([1, 2, COMMA, STOP]), st.integers(0, 4).map(lambda n: -n / 4)),
        min_size=6,
        max_size=6,
    ),
    min_size=1,
    max_size=5,
)


def span(stream: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """The branch, cut where it ends."""
    for count, (token_id, _) in enumerate(stream, start=1):
        if token_id == STOP or count == limit or (token_id == COMMA and count >= MIN_BRANCH_TOKENS):
            return stream[:count]
    raise AssertionError("unreachable")


@given(STREAMS, st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_winner_is_that_of_brute_force_in_any_order_of_tokens(
    streams: list[list[tuple[int, float]]], max_branch_tokens: int, max_tokens: int, order: object
) -> None:
    params = CautiousDecoding(max_branch_tokens=max_branch_tokens)
    branches = BranchSet(params, [stream[0] for stream in streams], max_tokens=max_tokens, **ENDS)
    num_added = 0
    while branches.open_branches:
        branch = order.choice(branches.open_branches)  # type: ignore[attr-defined]
        branches.add(branch, *streams[branch][len(branches.tokens(branch))])
        num_added += 1
    spans = [span(stream, min(max_branch_tokens, max_tokens)) for stream in streams]
    means = [sum(-logprob for _, logprob in part) / len(part) for part in spans]
    expected = means.index(min(means))
    assert branches.winner() == expected
    assert branches.tokens(expected) == tuple(token_id for token_id, _ in spans[expected])
    assert branches.perplexity(expected) == pytest.approx(math.exp(means[expected]))
    assert branches.num_rows == num_added
    assert branches.num_sampled_tokens == num_added + len(streams)
    assert branches.num_sampled_tokens <= sum(len(part) for part in spans)


def test_punctuation_as_the_first_token_does_not_win_by_being_short() -> None:
    branches = BranchSet(PARAMS, [(COMMA, -0.1), (1, -0.5)], max_tokens=50, **ENDS)
    assert branches.open_branches == (0, 1)
    branches.add(0, COMMA, -3.0)
    branches.add(1, COMMA, -0.5)
    assert branches.winner() == 1


def test_a_branch_that_cannot_win_any_more_is_given_up() -> None:
    params = CautiousDecoding(max_branch_tokens=4)
    branches = BranchSet(params, [(1, -0.1), (2, -5.0)], max_tokens=50, **ENDS)
    assert branches.open_branches == (0, 1)
    branches.add(0, COMMA, -0.1)
    assert branches.open_branches == ()
    assert branches.winner() == 0


def test_branches_may_all_end_with_their_first_token() -> None:
    branches = BranchSet(PARAMS, [(1, -2.0), (STOP, -1.0), (1, -1.0)], max_tokens=1, **ENDS)
    assert branches.open_branches == ()
    assert branches.winner() == 1
    assert branches.num_rows == 0
