"""Nexus: the search finds the optimum from anywhere, the cases its listing leaves open, and an order that starves nobody."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.policies.nexus import (
    DECODE_SLACK,
    PREFILL_SLACK,
    QueuedPrompt,
    Split,
    adjust,
    choose,
    layouts,
    other,
    rounded,
    shortest_first,
    target,
)
from workers.api import Phase

PREFILL, DECODE = Phase.PREFILL, Phase.DECODE


class Counted:
    """Costs that count how often they are asked for."""

    def __init__(self, cost: Callable[[Phase, int], float]) -> None:
        self.num_calls = 0
        self._cost = cost

    def __call__(self, phase: Phase, percent: int) -> float:
        self.num_calls += 1
        return self._cost(phase, percent)


def golden(phase: Phase, percent: int) -> float:
    """Decode grows up to 50 %, prefill up to 80."""
    return 0.1 * max(80 / percent, 1) if phase is PREFILL else 0.01 * max(50 / percent, 1)


@st.composite
def monotone(draw: st.DrawFn) -> Callable[[Phase, int], float]:
    """Any costs that do not grow with the share."""
    steps = st.lists(st.floats(0, 3), min_size=100, max_size=100)
    tables = {}
    for phase in (PREFILL, DECODE):
        value, table = draw(st.floats(0.1, 1)), []
        for step in draw(steps):
            table.append(value)
            value += step if step > 1 else 0.0
        # [percent - 1]
        tables[phase] = table[::-1]
    return lambda phase, percent: tables[phase][percent - 1]


# The search.


@pytest.mark.parametrize(("start", "num_calls"), [(54, 3), (53, 4), (50, 7), (20, 37), (80, 29)])
def test_golden_prefill_first(start: int, num_calls: int) -> None:
    cost = Counted(golden)
    assert adjust(PREFILL, Split(start, 100 - start), cost) == Split(54, 46)
    assert cost.num_calls == num_calls


@pytest.mark.parametrize(("start", "num_calls"), [(50, 15), (20, 45), (80, 21)])
def test_golden_decode_first(start: int, num_calls: int) -> None:
    cost = Counted(golden)
    assert adjust(DECODE, Split(start, 100 - start), cost) == Split(62, 38)
    assert cost.num_calls == num_calls


@given(
    cost=monotone(),
    goal=st.sampled_from([PREFILL, DECODE]),
    start=st.integers(0, 100),
    least=st.integers(1, 50),
)
def test_the_greedy_search_finds_what_an_exhaustive_one_finds(
    cost: Callable[[Phase, int], float], goal: Phase, start: int, least: int
) -> None:
    slack = DECODE_SLACK if goal is PREFILL else PREFILL_SLACK
    limit_s = slack * cost(other(goal), 100)
    feasible = [share for share in range(least, 101 - least) if cost(other(goal), 100 - share) <= limit_s]
    found = adjust(goal, Split(start, 100 - start), cost, least=least)
    assert found.prefill + found.decode == 100
    assert found.of(goal) == max(feasible, default=least)
    if feasible:
        assert cost(goal, found.of(goal)) == min(cost(goal, share) for share in feasible)


def test_where_no_split_keeps_the_slack_the_goal_has_the_least() -> None:
    def contended(phase: Phase, percent: int) -> float:
        return 1.0 if percent == 100 else 1.2

    assert adjust(PREFILL, Split(50, 50), contended, least=6) == Split(6, 94)
    # Against a best that has the same traffic, contention is not counted as a loss of SMs.
    assert adjust(PREFILL, Split(50, 50), contended, least=6, best_s=1.2) == Split(94, 6)


def test_no_stage_is_asked_for_its_cost_without_sms() -> None:
    def flat(phase: Phase, percent: int) -> float:
        assert percent > 0
        return 1.0

    assert adjust(PREFILL, Split(50, 50), flat) == Split(99, 1)
    assert adjust(DECODE, Split(100, 0), flat) == Split(1, 99)


# A tick.


def chosen(
    goal: Phase, now: Split, *, delta: int = 5, prefilling: bool = True, decoding: bool = True
) -> Split:
    choice = choose(goal, now, golden, is_prefilling=prefilling, is_decoding=decoding, delta=delta)
    assert choice.reason
    return choice.split


def test_golden_the_buffer_holds_back_small_changes() -> None:
    assert chosen(PREFILL, Split(50, 50)) == Split(50, 50)
    assert chosen(DECODE, Split(50, 50)) == Split(62, 38)
    assert chosen(PREFILL, Split(50, 50), delta=3) == Split(54, 46)


def test_an_idle_stage_leaves_all_to_the_other_whatever_the_buffer() -> None:
    assert chosen(PREFILL, Split(98, 2), decoding=False) == Split(100, 0)
    assert chosen(PREFILL, Split(50, 50), prefilling=False) == Split(0, 100)
    assert chosen(PREFILL, Split(50, 50), prefilling=False, decoding=False) == Split(50, 50)
    # And gets its part back.
    assert chosen(PREFILL, Split(100, 0), delta=60) == Split(54, 46)


def test_decode_comes_first_when_kv_is_short() -> None:
    assert (target(0.70), target(0.71)) == (PREFILL, DECODE)
    assert target(0.70, DECODE) == PREFILL


def test_with_hysteresis_the_goal_stays_about_the_threshold() -> None:
    for last in (PREFILL, DECODE):
        assert target(0.72, last, hysteresis=0.05) == target(0.67, last, hysteresis=0.05) == last
        assert target(0.76, last, hysteresis=0.05) == DECODE
        assert target(0.64, last, hysteresis=0.05) == PREFILL
    assert target(0.72, None, hysteresis=0.05) == DECODE


# Layouts.


def test_an_h100_can_be_divided_in_steps_of_eight_sms() -> None:
    h100 = layouts(132, least=8, multiple=8)
    assert h100 == tuple(range(8, 128, 8))
    # 54 % are 71 SMs.
    assert rounded(PREFILL, Split(54, 46), h100, 132) == 64
    # 38 % for decode are 50 SMs: it gets 44.
    assert rounded(DECODE, Split(62, 38), h100, 132) == 88


@given(goal=st.sampled_from([PREFILL, DECODE]), prefill=st.integers(1, 99), num_sms=st.integers(16, 200))
def test_a_layout_gives_the_goal_no_more_than_the_split_unless_it_is_the_smallest(
    goal: Phase, prefill: int, num_sms: int
) -> None:
    all_of_them = layouts(num_sms, least=8, multiple=4)
    num = rounded(goal, Split(prefill, 100 - prefill), all_of_them, num_sms)
    assert num in all_of_them
    share = num if goal is PREFILL else num_sms - num
    smallest = all_of_them[0] if goal is PREFILL else num_sms - all_of_them[-1]
    assert share == smallest or share * 100 <= Split(prefill, 100 - prefill).of(goal) * num_sms


# The order of prompts.

QUEUE = [
    QueuedPrompt("a", 1000, 0, arrived_s=200.0),
    QueuedPrompt("b", 200, 0, arrived_s=200.0),
    QueuedPrompt("c", 3000, 0, arrived_s=0.0),
]


def batch(**options: bool) -> list[tuple[str, int]]:
    found = shortest_first(QUEUE, now_s=200.0, budget=2048, decay=15, **options)
    return [(one.request_id, num) for one, num in found]


def test_golden_an_old_long_prompt_leaves_the_printed_batch_empty_and_is_cut_here() -> None:
    assert [one.score(200.0, 15) for one in QUEUE] == [1000, 200, 0]
    assert batch(cuts_prompts=False) == []
    assert batch() == [("c", 2048)]


def test_without_aging_the_shortest_goes_first_and_who_was_begun_counts_what_is_left() -> None:
    queue = [*QUEUE, QueuedPrompt("d", 5000, 4900, arrived_s=100.0), QueuedPrompt("e", 7, 7, arrived_s=0.0)]
    found = shortest_first(queue, now_s=200.0, budget=500, decay=0)
    assert [(one.request_id, num) for one, num in found] == [("d", 100), ("b", 200), ("a", 200)]


prompts = st.builds(
    QueuedPrompt,
    st.text("abc", min_size=1, max_size=3),
    st.integers(1000, 5000),
    st.integers(0, 1000),
    st.floats(0, 100),
)


@given(queue=st.lists(prompts, max_size=8), budget=st.integers(1, 4000), decay=st.floats(0, 100))
def test_a_batch_fills_the_budget_in_order(queue: list[QueuedPrompt], budget: int, decay: float) -> None:
    found = shortest_first(queue, now_s=100.0, budget=budget, decay=decay)
    assert sum(num for _, num in found) == min(budget, sum(one.num_left for one in queue))
    scores = [one.score(100.0, decay) for one, _ in found]
    assert scores == sorted(scores)
    assert all(0 < num <= one.num_left for one, num in found)
    assert all(num == one.num_left for one, num in found[:-1])
