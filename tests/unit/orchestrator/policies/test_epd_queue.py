"""EPD's switches: the published trigger to the letter, and the steady one by what it must never do."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.policies.epd_queue import (
    PHASES,
    Allocation,
    PhaseLoad,
    Settings,
    SteadyTrigger,
    Switch,
    allocations,
    published_switch,
)
from workers.api import Phase

ENCODE, PREFILL, DECODE = PHASES


def by_phase(encode: int, prefill: int, decode: int) -> dict[Phase, int]:
    return dict(zip(PHASES, (encode, prefill, decode), strict=True))


def way(switch: Switch | None) -> tuple[Phase, Phase] | None:
    return (switch.source, switch.target) if switch is not None else None


# The published trigger.


@pytest.mark.parametrize(
    ("queued", "num_workers", "expected"),
    [
        ((0, 0, 10), (5, 1, 2), (ENCODE, DECODE)),
        ((10, 0, 0), (1, 2, 5), (DECODE, ENCODE)),
        # All have half of the longest queue.
        ((0, 0, 0), (5, 1, 2), None),
        ((5, 5, 10), (5, 1, 2), None),
        ((4, 5, 10), (5, 1, 2), (ENCODE, DECODE)),
        # A queue that is shorter by one is short enough to give.
        ((9, 0, 10), (5, 1, 2), (ENCODE, DECODE)),
        # One that is as long is not.
        ((10, 0, 10), (5, 1, 3), None),
        ((10, 10, 0), (2, 5, 1), None),
        # The last worker of a phase stays.
        ((0, 0, 10), (1, 1, 6), None),
        # Ties: of targets and of donors the first.
        ((0, 7, 7), (3, 2, 2), (ENCODE, PREFILL)),
        ((0, 0, 7), (3, 3, 2), (ENCODE, DECODE)),
    ],
)
def test_the_published_trigger(
    queued: tuple[int, int, int], num_workers: tuple[int, int, int], expected: tuple[Phase, Phase] | None
) -> None:
    assert way(published_switch(by_phase(*queued), by_phase(*num_workers))) == expected


def test_the_published_trigger_is_blind_to_what_waits_in_front_of_decode() -> None:
    # A hundred requests wait for room in decode, outside of its queue.
    assert published_switch(by_phase(0, 0, 0), by_phase(5, 1, 2)) is None
    loads = by_load((0, 0, 0), (0, 0, 100), (5, 1, 2))
    assert way(run(loads, 20)) == (ENCODE, DECODE)


def test_the_published_trigger_goes_back_and_forth_with_its_sample() -> None:
    num = by_phase(2, 1, 2)
    there = published_switch(by_phase(0, 0, 3), num)
    back = published_switch(by_phase(3, 0, 0), by_phase(1, 1, 3))
    assert (way(there), way(back)) == ((ENCODE, DECODE), (DECODE, ENCODE))


# The steady trigger.


def by_load(
    queued_s: tuple[float, float, float],
    bridge_s: tuple[float, float, float],
    num_workers: tuple[int, int, int],
) -> dict[Phase, PhaseLoad]:
    values = zip(PHASES, queued_s, bridge_s, num_workers, strict=True)
    return {phase: PhaseLoad(queued, bridge, num) for phase, queued, bridge, num in values}


def run(loads: Mapping[Phase, PhaseLoad], num_samples: int) -> Switch | None:
    """The first switch of so many samples, one a second."""
    trigger = SteadyTrigger(Settings())
    return next((found for now in range(num_samples) if (found := trigger.decide(now, loads))), None)


def test_nothing_is_decided_on_a_single_sample_however_high_it_is() -> None:
    trigger, calm = SteadyTrigger(Settings()), by_load((1, 1, 1), (0, 0, 0), (5, 1, 2))
    assert run(by_load((0, 0, 500), (0, 0, 0), (5, 1, 2)), 10) is None
    for now in range(60):
        loads = by_load((0, 0, 60), (0, 0, 0), (5, 1, 2)) if now in (0, 30) else calm
        assert trigger.decide(now, loads) is None


def test_work_counts_and_not_requests() -> None:
    # A few long answers are more than many small pictures.
    found = run(by_load((3, 0, 100), (0, 0, 0), (4, 1, 3)), 20)
    assert way(found) == (ENCODE, DECODE)
    assert found is not None
    assert found.reason == ("decode needs 33.3 s for what waits, encode 0.8 s; 25.0 s with a worker moved")


def test_a_gain_below_the_cost_of_a_switch_is_left() -> None:
    # 100 s of work on three workers: 33 s, 25 on four.
    for switch_s, is_worth in ((8.0, True), (9.0, False)):
        trigger = SteadyTrigger(Settings(switch_s=switch_s))
        loads = by_load((0, 0, 100), (0, 0, 0), (4, 1, 3))
        found = [trigger.decide(now, loads) for now in range(11)][-1]
        assert (found is not None) == is_worth


def test_of_two_donors_the_one_that_is_missed_less_gives() -> None:
    assert way(run(by_load((20, 2, 300), (0, 0, 0), (4, 4, 2)), 20)) == (PREFILL, DECODE)


def test_a_switch_is_followed_by_a_rest() -> None:
    trigger = SteadyTrigger(Settings(drain_s=15))
    loads = by_load((0, 0, 500), (0, 0, 0), (5, 1, 2))
    switched = [now for now in range(100) if trigger.decide(now, loads)]
    assert switched == [10, 40, 70]


def test_a_phase_without_workers_gets_one_when_something_waits_for_it() -> None:
    assert way(run(by_load((0, 0, 1), (0, 0, 0), (3, 1, 0)), 20)) == (ENCODE, DECODE)
    assert way(run(by_load((0, 1, 1), (0, 0, 0), (3, 0, 0)), 20)) == (ENCODE, PREFILL)
    assert run(by_load((0, 0, 0), (0, 0, 0), (3, 1, 0)), 20) is None


seconds = st.floats(0, 1000)


@given(
    work_s=st.tuples(seconds, seconds, seconds),
    num=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
)
def test_under_steady_work_it_comes_to_rest_and_empties_no_phase(
    work_s: tuple[float, float, float], num: tuple[int, int, int]
) -> None:
    trigger, now_num, donors, targets = SteadyTrigger(Settings()), dict(zip(PHASES, num, strict=True)), [], []
    last = 0
    for now in range(600):
        loads = {
            phase: PhaseLoad(one, 0.0, now_num[phase]) for phase, one in zip(PHASES, work_s, strict=True)
        }
        if (found := trigger.decide(now, loads)) is not None:
            now_num[found.source] -= 1
            now_num[found.target] += 1
            donors.append(found.source)
            targets.append(found.target)
            last = now
    assert min(now_num.values()) >= 1
    assert sum(now_num.values()) == sum(num)
    # Each switch shortens the longest time by more than it costs, so none is undone by the next.
    assert all(
        (d, t) != (t2, d2) for d, t, d2, t2 in zip(donors, targets, donors[1:], targets[1:], strict=False)
    )
    assert last < 400


# Allocations.


def test_eight_workers_can_be_divided_in_21_ways() -> None:
    found = allocations(8)
    assert len(found) == len(set(found)) == 21
    # Those that the paper reports, which its code never looks at.
    assert {Allocation(5, 2, 1), Allocation(6, 1, 1)} <= set(found)
    assert len([one for one in found if one.decode >= 2]) == 15


@given(st.integers(1, 20))
def test_every_phase_has_a_worker_in_every_allocation(num: int) -> None:
    found = allocations(num)
    assert len(found) == (num - 1) * (num - 2) // 2
    assert all(min(one.encode, one.prefill, one.decode) >= 1 for one in found)
    assert all(one.encode + one.prefill + one.decode == num for one in found)
