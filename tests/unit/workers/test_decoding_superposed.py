"""Superposed decoding: drafts stay distinct and finite, one draft is greedy, n-grams tell drafts apart."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.decoding.ngram_table import NgramTable
from workers.engine.decoding.superposed import (
    MAX_CONTEXT,
    NGRAM_WEIGHTS,
    MixSettings,
    SuperposedDrafts,
    mix_settings,
)

VOCAB = 12
STOP = 0
INF = float("inf")


def ngrams(*texts: list[int]) -> NgramTable:
    table = NgramTable(MAX_CONTEXT)
    for text in texts:
        table.learn(text)
    return table


def start(num_drafts: int, prompt: list[int], table: NgramTable, max_tokens: int = 10) -> SuperposedDrafts:
    return SuperposedDrafts(
        num_drafts, prompt, table, stop_token_ids=frozenset({STOP}), max_tokens=max_tokens
    )


def toy_logprobs(model: int, token_ids: tuple[int, ...], weights: tuple[float, ...]) -> np.ndarray:
    """A toy model that takes a mix: logits are linear in the mixed embedding."""
    rng = np.random.default_rng(model)
    embedding, head = rng.standard_normal((VOCAB, 6)), rng.standard_normal((6, VOCAB))
    logits = np.array(weights) @ embedding[list(token_ids)] @ head
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def likeliest(logprobs: np.ndarray, count: int) -> list[tuple[int, float]]:
    order = sorted(range(VOCAB), key=lambda token_id: (-logprobs[token_id], token_id))
    return [(token_id, float(logprobs[token_id])) for token_id in order[:count]]


@pytest.mark.parametrize(
    ("num_drafts", "expected"),
    [
        (2, MixSettings(0.62, 0.06, 6)),
        (3, MixSettings(0.54, 0.06, 9)),
        (6, MixSettings(0.54, 0.06, 18)),
        (8, MixSettings(0.54, 0.09, 24)),
        (10, MixSettings(0.54, 0.12, 30)),
        (20, MixSettings(0.54, 0.12, 60)),
    ],
)
def test_constants_are_those_of_the_paper(num_drafts: int, expected: MixSettings) -> None:
    assert mix_settings(num_drafts) == expected


@given(
    st.integers(1, 5),
    st.integers(0, 1000),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    st.integers(1, 8),
)
def test_drafts_are_distinct_finite_and_mixed_by_weights_that_sum_to_one(
    num_drafts: int, model: int, prompt: list[int], max_tokens: int
) -> None:
    drafts = start(num_drafts, prompt, ngrams(prompt), max_tokens)
    mix: tuple[tuple[int, ...], tuple[float, ...]] = ((prompt[-1],), (1.0,))
    while not drafts.is_finished:
        drafts.step(likeliest(toy_logprobs(model, *mix), drafts.num_candidates))
        if not drafts.is_finished:
            mix = drafts.mix()
            assert sum(mix[1]) == pytest.approx(1.0)
            assert len(set(mix[0])) == len(mix[0]) <= num_drafts
            assert STOP not in mix[0]
    found, logprobs = drafts.drafts()
    assert len(found) == num_drafts
    assert len(set(found)) == len(found)
    assert list(logprobs) == sorted(logprobs, reverse=True)
    assert all(math.isfinite(logprob) and logprob <= 0 for logprob in logprobs)
    for draft in found:
        assert len(draft) <= max_tokens
        assert STOP not in draft[:-1]


@given(st.integers(0, 1000), st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20))
def test_one_draft_is_greedy_decoding(model: int, prompt: list[int]) -> None:
    drafts = start(1, prompt, ngrams(prompt), max_tokens=6)
    last, expected = prompt[-1], []
    while not drafts.is_finished:
        logprobs = toy_logprobs(model, (last,), (1.0,))
        drafts.step(likeliest(logprobs, drafts.num_candidates))
        last = int(logprobs.argmax())
        expected.append(last)
        if not drafts.is_finished:
            assert drafts.mix() == ((last,), (1.0,))
    assert drafts.drafts()[0] == (tuple(expected),)
    assert len(expected) == 6 or expected[-1] == STOP


def test_the_first_step_takes_distinct_tokens() -> None:
    drafts = start(3, [1], ngrams())
    drafts.step([(5, -0.5), (6, -1.2), (7, -2.5), (8, -4.0)])
    token_ids, weights = drafts.mix()
    assert token_ids == (5, 6, 7)
    assert list(weights) == sorted(weights, reverse=True)


def test_ngrams_tell_which_token_goes_with_which_draft() -> None:
    table = ngrams([1, 5, 8], [1, 6, 9])
    drafts = start(2, [1], table)
    drafts.step([(5, -0.69), (6, -0.7)])
    drafts.step([(8, -0.69), (9, -0.7)])
    assert set(drafts.drafts()[0]) == {(5, 8), (6, 9)}


def test_a_score_is_the_geometric_mean_of_model_and_ngrams() -> None:
    table = ngrams([1, 5], [1, 5], [1, 6])
    drafts = start(2, [1], table)
    drafts.step([(5, math.log(0.5)), (6, math.log(0.5))])
    chance_5, chance_6 = (NGRAM_WEIGHTS[0] * part for part in (2 / 3, 1 / 3))
    expected = 1 / (1 + (chance_6 / chance_5) ** 0.62)
    assert drafts.mix()[1] == pytest.approx((expected, 1 - expected))


def test_a_missing_ngram_is_a_penalty_and_never_minus_infinity() -> None:
    drafts = start(2, [1], ngrams([1, 5]))
    drafts.step([(5, -1.0), (6, -0.1), (7, -INF)])
    # What n-grams know comes first; what they do not is there where nothing else is.
    assert drafts.mix()[0] == (5, 6)
    assert all(math.isfinite(weight) for weight in drafts.mix()[1])


def test_ended_drafts_leave_the_mix_and_end_the_search_when_none_can_be_beaten() -> None:
    drafts = start(2, [1], ngrams())
    drafts.step([(STOP, -0.1), (5, -2.4), (6, -5.0)])
    assert drafts.mix()[0] == (5, 6)
    assert not drafts.is_finished
    drafts.step([(STOP, -0.001), (7, -7.0)])
    assert drafts.is_finished
    assert drafts.drafts()[0] == ((STOP,), (5, STOP))


def test_nothing_but_stop_tokens_ends_it() -> None:
    drafts = start(3, [1], ngrams())
    drafts.step([(STOP, -0.01)])
    assert drafts.is_finished
    assert drafts.drafts() == (((STOP,),), (-0.01,))
