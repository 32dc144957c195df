"""The governor: never above a limit, off when drafts do not pay, on again when they would."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.decoding.draft_tree import DraftTree
from workers.engine.decoding.governor import (
    MAX_CORRECTION,
    MIN_GAIN,
    DraftRecord,
    StepCost,
    drafts_allowed,
    may_draft,
)

#: Rows are nearly free up to 8, then each costs as much as the first.
CHEAP_TO_8 = StepCost(((1, 1.0), (8, 1.1), (16, 9.0)))
LINEAR = StepCost(((1, 1.0), (64, 64.0)))


def chain_of(*chances: float) -> DraftTree:
    """A chain whose tokens are 1, 2, 3, ..."""
    count = len(chances)
    return DraftTree(tuple(range(1, count + 1)), tuple(range(count)), tuple(range(1, count + 1)), chances)


TREES = st.lists(st.lists(st.floats(0, 1), max_size=6).map(lambda chances: chain_of(*chances)), max_size=5)


def allowed(
    trees: list[DraftTree], cost: StepCost, *, correction: float = 1.0, other_rows: int = 0, **limits: int
) -> list[int]:
    limits = {"num_waiting": 0, "max_rows": 64} | limits
    return drafts_allowed(trees, [correction] * len(trees), cost, num_rows=len(trees) + other_rows, **limits)


@given(TREES, st.integers(0, 40), st.integers(0, 2), st.integers(1, 40), st.floats(0, MAX_CORRECTION))
def test_never_more_than_the_trees_have_or_the_step_holds(
    trees: list[DraftTree], other_rows: int, num_waiting: int, max_rows: int, correction: float
) -> None:
    limits = {"other_rows": other_rows, "num_waiting": num_waiting, "max_rows": max_rows}
    counts = allowed(trees, CHEAP_TO_8, correction=correction, **limits)
    assert len(counts) == len(trees)
    assert all(0 <= count <= tree.num_drafts for count, tree in zip(counts, trees, strict=True))
    assert sum(counts) == 0 or len(trees) + other_rows + sum(counts) <= max_rows
    if num_waiting or len(trees) + other_rows >= max_rows:
        assert not any(counts)


@given(TREES.filter(bool), st.sampled_from([CHEAP_TO_8, LINEAR]))
def test_no_other_choice_brings_more_tokens_per_second(trees: list[DraftTree], cost: StepCost) -> None:
    falling = [chain_of(*sorted(tree.chances, reverse=True)[:3]) for tree in trees[:3]]

    def rate(counts: tuple[int, ...]) -> float:
        gained = sum(sum(tree.chances[:count]) for tree, count in zip(falling, counts, strict=True))
        return (len(falling) + gained) / cost.seconds(len(falling) + sum(counts))

    best = max(rate(counts) for counts in product(*(range(tree.num_drafts + 1) for tree in falling)))
    chosen = tuple(allowed(falling, cost))
    plain = rate((0,) * len(falling))
    if best > plain * MIN_GAIN * (1 + 1e-9):
        assert rate(chosen) == pytest.approx(best)
    else:
        assert rate(chosen) == pytest.approx(plain) or rate(chosen) == pytest.approx(best)


def test_free_rows_are_filled_and_dear_ones_are_not() -> None:
    sure = chain_of(*[0.9] * 10)
    assert allowed([sure], CHEAP_TO_8) == [7]
    assert allowed([sure], LINEAR) == [0]
    assert allowed([sure], CHEAP_TO_8, other_rows=7) == [0]


def test_the_likelier_drafts_go_first() -> None:
    counts = allowed([chain_of(0.9, 0.8, 0.7), chain_of(0.3, 0.2)], CHEAP_TO_8, max_rows=5)
    assert counts == [3, 0]


def test_off_at_high_load_and_while_requests_wait() -> None:
    trees = [chain_of(0.9, 0.9)] * 4
    assert sum(allowed(trees, CHEAP_TO_8)) > 0
    assert allowed(trees, CHEAP_TO_8, num_waiting=1) == [0] * 4
    assert allowed(trees, CHEAP_TO_8, max_rows=4) == [0] * 4
    assert not may_draft(num_rows=64, num_waiting=0, max_rows=64)
    assert may_draft(num_rows=63, num_waiting=0, max_rows=64)


def test_drafts_that_fail_switch_themselves_off_and_come_back_when_they_would_be_right() -> None:
    record, tree, dear = DraftRecord(), chain_of(0.5, 0.4), StepCost(((1, 1.0), (2, 1.3), (3, 1.6)))

    def count() -> int:
        return drafts_allowed([tree], [record.correction], dear, num_rows=1, num_waiting=0, max_rows=9)[0]

    assert count() > 0
    for _ in range(40):
        record.add(tree, (7,))
    assert count() == 0
    # No draft is computed now, yet the first draft of each tree is compared with the token that came.
    for _ in range(40):
        record.add(tree, (1,))
    assert count() > 0


@given(st.lists(st.tuples(st.lists(st.floats(0, 1), max_size=5), st.booleans()), max_size=60))
def test_the_correction_stays_within_its_bounds(steps: list[tuple[list[float], bool]]) -> None:
    record = DraftRecord()
    for chances, is_right in steps:
        record.add(chain_of(*chances), (1, 2, 3) if is_right else (9,))
        assert 0 < record.correction <= MAX_CORRECTION


def test_a_record_judges_each_draft_that_the_tokens_reach_once() -> None:
    record = DraftRecord()
    tree = DraftTree((1, 5, 2, 6), (0, 0, 1, 2), (1, 1, 2, 2), (0.5, 0.3, 0.25, 0.125))
    record.add(tree, (1,))
    assert (record.num_accepted, record.num_promised) == (1, 0.8)
    record = DraftRecord()
    record.add(tree, (1, 2, 3))
    assert (record.num_accepted, record.num_promised) == (2, pytest.approx(1.175))
    # The second draft of a wrong first one is wrong, whatever its token.
    record = DraftRecord()
    record.add(tree, (4, 2, 3))
    assert (record.num_accepted, record.num_promised) == (0, pytest.approx(1.175))


def test_cost_is_linear_between_measurements_and_goes_on_as_steep_after_them() -> None:
    cost = StepCost(((1, 1.0), (4, 4.0), (8, 6.0)))
    assert [cost.seconds(rows) for rows in (1, 2, 4, 6, 8, 10)] == pytest.approx([1, 2, 4, 5, 6, 7])
    assert StepCost(((2, 2.0), (4, 1.0))).seconds(9) == 1.0


def test_fewer_rows_than_were_ever_measured_are_taken_for_cheap() -> None:
    assert StepCost(((4, 2.0), (8, 3.0))).seconds(1) == 0.5
    assert StepCost(((4, 2.0),)).seconds(9) == 2.0


def test_one_slow_step_does_not_make_its_rows_dearer_than_more_rows() -> None:
    cost = StepCost.measured({8: 3.0, 1: 1.0, 4: 99.0, 16: 4.0})
    assert cost == StepCost(((1, 1.0), (4, 3.0), (8, 3.0), (16, 4.0)))


@given(st.floats(0, 0.9), st.floats(1, 12))
def test_costs_learned_from_the_steps_that_it_chooses_lead_to_the_right_choice(
    chance: float, cost_of_9: float
) -> None:
    true = StepCost(((1, 1.0), (9, cost_of_9)))
    tree = chain_of(*[chance**depth for depth in range(1, 9)])
    seen: dict[int, float] = {}

    def choose(cost: StepCost) -> int:
        return drafts_allowed([tree], [1.0], cost, num_rows=1, num_waiting=0, max_rows=64)[0]

    for _ in range(20):
        num_drafts = choose(StepCost.measured(seen or {1: 1.0}))
        seen[1 + num_drafts] = true.seconds(1 + num_drafts)
    assert num_drafts == choose(true)
