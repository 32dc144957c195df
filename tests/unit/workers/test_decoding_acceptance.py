"""Drafts change how many steps the output takes, never the output; shown on a toy model with the real generator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rejection_rule import accept_by_rejection
from workers.engine.decoding.acceptance import Accepted, walk
from workers.engine.decoding.draft_tree import DraftTree, likeliest_tree
from workers.engine.decoding.ngram_table import NgramTable
from workers.engine.sampling.philox import uniform

VOCAB = 5
NO_STOPS: frozenset[int] = frozenset()


def sample_next(text: tuple[int, ...], *, model: int, sharpness: float, seed: int, is_greedy: bool) -> int:
    """A toy target: its distribution hangs on the last two tokens, its draw on (seed, position)."""
    logits = np.random.default_rng([model, *text[-2:]]).standard_normal(VOCAB) * sharpness
    if is_greedy:
        return int(logits.argmax())
    chances = np.exp(logits - logits.max())
    cumulative = (chances / chances.sum()).cumsum()
    return min(int(np.searchsorted(cumulative, uniform(seed, len(text)), side="right")), VOCAB - 1)


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Any tree at all, good guesses or not."""
    tokens: list[int] = []
    parents: list[int] = []
    depths = [0]
    for _ in range(draw(st.integers(0, 12))):
        parent, token_id = draw(st.integers(0, len(tokens))), draw(st.integers(0, VOCAB - 1))
        if (parent, token_id) not in zip(parents, tokens, strict=True):
            tokens.append(token_id)
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return DraftTree(tuple(tokens), tuple(parents), tuple(depths[1:]), (0.5,) * len(tokens))


TARGETS = st.fixed_dictionaries(
    {
        "model": st.integers(0, 1000),
        "sharpness": st.sampled_from([0.5, 2.0, 6.0]),
        "seed": st.integers(0, 2**64 - 1),
        "is_greedy": st.booleans(),
    }
)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
STOPS = st.frozensets(st.integers(0, VOCAB - 1), max_size=1)


def decode_plainly(prompt: list[int], target: dict, stops: frozenset[int], max_new: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + max_new:
        text.append(sample_next(tuple(text), **target))
        if text[-1] in stops:
            break
    return text


def step(text: list[int], tree: DraftTree, target: dict, stops: frozenset[int], end: int) -> Accepted:
    """One step of the toy model: every row is sampled once, as if its path were real."""
    sampled = [sample_next((*text, *tree.path(row)), **target) for row in range(tree.num_drafts + 1)]
    return walk(tree, sampled, stop_token_ids=stops, max_tokens=end - len(text))


@given(PROMPTS, TARGETS, STOPS, st.integers(1, 30), st.integers(1, 10))
def test_output_with_ngram_drafts_is_that_without(
    prompt: list[int], target: dict, stops: frozenset[int], max_new: int, max_drafts: int
) -> None:
    text, end, num_steps = list(prompt), len(prompt) + max_new, 0
    table = NgramTable()
    table.learn(text)
    while len(text) < end and not (num_steps and text[-1] in stops):
        accepted = step(text, likeliest_tree(table, text, max_drafts), target, stops, end)
        text += accepted.token_ids
        table.learn(text, len(text) - len(accepted.token_ids))
        num_steps += 1
    assert text == decode_plainly(prompt, target, stops, max_new)
    assert num_steps <= len(text) - len(prompt)


@given(PROMPTS, TARGETS, STOPS, st.integers(1, 12), st.data())
def test_output_with_any_drafts_is_that_without(
    prompt: list[int], target: dict, stops: frozenset[int], max_new: int, data: st.DataObject
) -> None:
    text, end = list(prompt), len(prompt) + max_new
    while len(text) < end and not (len(text) > len(prompt) and text[-1] in stops):
        text += step(text, data.draw(trees()), target, stops, end).token_ids
    assert text == decode_plainly(prompt, target, stops, max_new)


@given(PROMPTS, TARGETS, trees())
def test_kept_rows_hold_the_kv_of_the_tokens_before_the_last(
    prompt: list[int], target: dict, tree: DraftTree
) -> None:
    accepted = step(list(prompt), tree, target, NO_STOPS, len(prompt) + 100)
    assert len(accepted.rows) == len(accepted.token_ids)
    assert accepted.rows[0] == 0
    assert tree.path(accepted.rows[-1]) == accepted.token_ids[:-1]
    # In place: a row is never behind the place that its KV moves to.
    assert all(row >= place for place, row in enumerate(accepted.rows))


CHAIN = DraftTree((1, 2, 3), (0, 1, 2), (1, 2, 3), (0.9, 0.8, 0.7))


def test_all_drafts_right_bring_one_token_more_than_there_are_drafts() -> None:
    accepted = walk(CHAIN, [1, 2, 3, 4], stop_token_ids=NO_STOPS, max_tokens=9)
    assert accepted == Accepted((1, 2, 3, 4), (0, 1, 2, 3))


def test_a_wrong_draft_ends_the_walk_with_the_token_that_was_sampled() -> None:
    assert walk(CHAIN, [1, 4, 3, 4], stop_token_ids=NO_STOPS, max_tokens=9) == Accepted((1, 4), (0, 1))
    assert walk(CHAIN, [0, 2, 3, 4], stop_token_ids=NO_STOPS, max_tokens=9) == Accepted((0,), (0,))


def test_a_stop_token_or_the_limit_in_the_middle_cuts_the_rest() -> None:
    stopped = walk(CHAIN, [1, 2, 3, 4], stop_token_ids=frozenset({2}), max_tokens=9)
    assert stopped == Accepted((1, 2), (0, 1))
    limited = walk(CHAIN, [1, 2, 3, 4], stop_token_ids=NO_STOPS, max_tokens=3)
    assert limited == Accepted((1, 2, 3), (0, 1, 2))


def test_a_row_without_usable_logits_is_reported_only_if_it_is_reached() -> None:
    assert walk(CHAIN, [1, -1, 3, 4], stop_token_ids=NO_STOPS, max_tokens=9).token_ids == (1, -1)
    assert walk(CHAIN, [0, -1, -1, -1], stop_token_ids=NO_STOPS, max_tokens=9).token_ids == (0,)


#: Outputs that a distribution is estimated from.
NUM_DRAWS = 1500
CHANCES = st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(lambda parts: sum(parts) > 0)


def share(parts: list[int]) -> np.ndarray:
    return np.array(parts, dtype=np.float64) / sum(parts)


def output_shares(target: np.ndarray, draft: np.ndarray, num_proposals: int, *, is_drawn: bool) -> np.ndarray:
    """Of many outputs of the classical rule: proposals drawn without replacement, or certain and in order."""
    rng = np.random.default_rng(7)
    counts = np.zeros(len(target))
    for numbers in rng.random((NUM_DRAWS, num_proposals + 1)).tolist():
        left, proposals, drafts = draft, [], []
        for place in range(num_proposals):
            chosen = int(rng.choice(len(left), p=left)) if is_drawn else place
            proposals.append(chosen)
            drafts.append(left if is_drawn else np.eye(len(left))[place])
            left = left * (np.arange(len(left)) != chosen)
            if left.sum() == 0:
                break
            left = left / left.sum()
        counts[accept_by_rejection(target, proposals, drafts, numbers[: len(proposals) + 1])] += 1
    return counts / NUM_DRAWS


@settings(max_examples=20)
@given(CHANCES, CHANCES, st.integers(1, 2), st.booleans())
def test_the_classical_rule_keeps_the_distribution_of_the_target(
    target_parts: list[int], draft_parts: list[int], num_proposals: int, is_drawn: bool
) -> None:
    target = share(target_parts)
    found = output_shares(target, share(draft_parts), num_proposals, is_drawn=is_drawn)
    # More than 6 standard deviations.
    assert found == pytest.approx(target, abs=0.08)
    assert not found[target == 0].any()


def test_the_classical_rule_accepts_what_the_target_is_sure_of_and_never_what_it_rules_out() -> None:
    sure, even = np.array([0.0, 1.0, 0.0]), np.full(3, 1 / 3)
    assert accept_by_rejection(sure, [1], [even], [0.999, 0.0]) == 1
    assert accept_by_rejection(sure, [0, 2], [even, even], [0.0, 0.0, 0.999]) == 1
