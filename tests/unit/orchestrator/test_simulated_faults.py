"""What a simulation tells of its faults: which broke something, and when each was over."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.sim.faults import Fault, FaultKind, FaultOutcome, random_faults
from tests.support.sim import SHAPES, load, random_load, run
from workers.api import WorkerId

#: One request a second, the last one at 20 s.
LOAD = load([(float(at_s), 200, 20) for at_s in range(21)])


def fault(kind: FaultKind, name: str = "d0", at_s: float = 3.1, duration_s: float = 2.0) -> Fault:
    return Fault(at_s, kind, WorkerId(name), duration_s, factor=3.0, rate=0.3)


def outcome_of(one: Fault, shape: str = "two apart") -> FaultOutcome:
    result, _ = run(SHAPES[shape], LOAD, faults=(one,))
    (outcome,) = result.faults
    assert outcome.fault == one
    return outcome


@pytest.mark.parametrize(
    "kind", [kind for kind in FaultKind if kind not in (FaultKind.CRASH, FaultKind.CONTROLLER_CRASH)]
)
def test_what_lasts_is_over_after_its_duration(kind: FaultKind) -> None:
    assert outcome_of(fault(kind)) == FaultOutcome(fault(kind), "", 3.1 + 2.0)


def test_a_crash_is_over_when_the_process_in_its_place_is_ready() -> None:
    outcome = outcome_of(fault(FaultKind.CRASH))
    # A tick to see it at 3.5 s, a second to load, a tick that sees that.
    assert outcome == FaultOutcome(outcome.fault, "", 4.5)


def test_a_worker_that_crashes_while_it_loads_is_waited_for_once() -> None:
    faults = (fault(FaultKind.CRASH), fault(FaultKind.CRASH, at_s=4.0))
    result, _ = run(SHAPES["two apart"], LOAD, faults=faults)
    first, second = result.faults
    assert first.why_not == second.why_not == ""
    assert first.over_at_s == second.over_at_s
    assert second.over_at_s is not None
    assert second.over_at_s > 5.0


def test_a_controller_that_ends_is_followed_by_another_one() -> None:
    # In its tick at 3.5 s.
    outcome = outcome_of(fault(FaultKind.CONTROLLER_CRASH))
    assert outcome == FaultOutcome(outcome.fault, "", 5.5)


def test_a_controller_that_ends_in_its_first_tick_makes_two_faults() -> None:
    faults = (
        fault(FaultKind.CONTROLLER_CRASH),
        fault(FaultKind.CONTROLLER_CRASH, at_s=4.0, duration_s=1.0),
    )
    result, _ = run(SHAPES["two apart"], LOAD, faults=faults)
    first, second = (outcome.over_at_s for outcome in result.faults)
    assert first is not None
    assert second is not None
    assert second == pytest.approx(first + 1.0)


def test_what_was_to_come_after_the_last_answer_did_not_happen() -> None:
    outcome = outcome_of(fault(FaultKind.PAUSE, at_s=100.0))
    assert outcome == FaultOutcome(outcome.fault, "the run had ended")


def test_what_was_not_over_at_the_end_has_no_end() -> None:
    outcome = outcome_of(fault(FaultKind.SLOW, at_s=19.0, duration_s=500.0))
    assert outcome == FaultOutcome(outcome.fault, "")


@pytest.mark.parametrize("kind", [FaultKind.PAUSE, FaultKind.CUT_FROM_GATEWAY])
def test_a_worker_that_is_silent_too_long_gets_a_new_process_and_the_fault_is_over(kind: FaultKind) -> None:
    outcome = outcome_of(fault(kind, duration_s=12.0))
    # It was heard at 3 s, and is lost in the first tick that is 5 s later.
    assert outcome == FaultOutcome(outcome.fault, "", 8.5)


def test_a_worker_that_is_dead_already_cannot_be_broken() -> None:
    faults = (fault(FaultKind.CRASH), fault(FaultKind.PAUSE, at_s=3.2), fault(FaultKind.CRASH, "nobody"))
    result, _ = run(SHAPES["two apart"], LOAD, faults=faults)
    assert [one.why_not for one in result.faults] == ["", *["no process of it lived"] * 2]


@pytest.mark.parametrize("kind", [FaultKind.CUT_FROM_WORKERS, FaultKind.LOSS_WITH_WORKERS])
def test_a_worker_alone_has_no_way_to_others(kind: FaultKind) -> None:
    assert outcome_of(fault(kind, "w0"), "one").why_not == "no other worker lived"


def test_lost_messages_are_counted() -> None:
    lossy = fault(FaultKind.LOSS_WITH_GATEWAY)
    lost, _ = run(SHAPES["two apart"], LOAD, faults=(lossy,))
    assert lost.num_lost > 0
    assert run(SHAPES["two apart"], LOAD)[0].num_lost == 0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(sorted(SHAPES)))
def test_every_fault_has_its_outcome_in_order_and_what_broke_nothing_changes_nothing(
    seed: int, shape: str
) -> None:
    names = [worker.worker_id for worker in SHAPES[shape]]
    faults = random_faults(random.Random(seed), names, rate_per_s=1.5, until_s=4.0)
    plan = random_load(seed, 20)
    result, _ = run(SHAPES[shape], plan, seed=seed, faults=faults)
    assert [outcome.fault for outcome in result.faults] == list(faults)
    for outcome in result.faults:
        if outcome.over_at_s is not None:
            assert outcome.why_not == ""
            assert outcome.fault.at_s < outcome.over_at_s <= result.load.elapsed_s
    broken = tuple(outcome.fault for outcome in result.faults if not outcome.why_not)
    again, _ = run(SHAPES[shape], plan, seed=seed, faults=broken)
    assert again.load == result.load
