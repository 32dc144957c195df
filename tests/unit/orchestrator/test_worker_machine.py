"""The life of a declared worker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.view import LifecycleState
from orchestrator.control.worker_machine import (
    FAILED_RETRY_S,
    GOOD_RECORD_S,
    MAX_BACKOFF_S,
    TRANSITIONS,
    WorkerEvent,
    WorkerMachine,
)
from workers.api import WorkerId

E = WorkerEvent
S = LifecycleState
REASON = "because"


def machine_in(state: LifecycleState, now_s: float = 0.0) -> WorkerMachine:
    """A machine that got there by the shortest way."""
    machine = WorkerMachine(WorkerId("w-0"))
    ways = {
        S.PENDING: (),
        S.STARTING: (E.PLACEMENT_ASKED,),
        S.READY: (E.PLACEMENT_ASKED, E.HEARD_READY),
        S.LOST: (E.PLACEMENT_ASKED, E.EXITED),
        S.FAILED: (E.PLACEMENT_ASKED, E.HEARD_FAILED),
    }
    for event in ways[state]:
        machine.handle(event, REASON, now_s)
    assert machine.state is state
    return machine


def test_the_table_names_every_state_and_every_event() -> None:
    assert set(TRANSITIONS) == {(state, event) for state in S for event in E}


GOLDEN = """
pending  placement_asked    starting
pending  adopted            starting
starting adopted            starting
starting placement_reported starting
starting bound              starting
starting heard_loading      starting
starting heard_ready        ready
starting heard_failed       failed
starting silent             lost
starting exited             lost
ready    adopted            starting
ready    bound              starting
ready    heard_loading      starting
ready    heard_ready        ready
ready    heard_failed       lost
ready    silent             lost
ready    exited             lost
ready    replace            pending
lost     adopted            starting
lost     retry_due          pending
failed   adopted            starting
failed   retry_due          pending
"""


def test_golden_transitions() -> None:
    written = {
        (S(a), E(event)): S(b) for a, event, b in (line.split() for line in GOLDEN.split("\n") if line)
    }
    assert {pair: state for pair, state in TRANSITIONS.items() if state is not None} == written


@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("event", list(E))
def test_an_event_leads_where_the_table_says_and_leaves_its_reason(
    state: LifecycleState, event: WorkerEvent
) -> None:
    machine = machine_in(state)
    before = machine.reason
    if event is E.ADOPTED:
        machine.adopt(machine.incarnation + 1, "a new reason", 1.0)
    else:
        machine.handle(event, "a new reason", 1.0)
    expected = TRANSITIONS[state, event]
    assert machine.state is (expected or state)
    assert machine.reason == (before if expected is None else "a new reason")
    machine.check_invariants()


def test_every_state_can_come_to_ready() -> None:
    reached = {S.READY}
    for _ in S:
        reached |= {a for (a, event), b in TRANSITIONS.items() if b in reached and event is not E.ADOPTED}
    assert reached == set(S)


def start_again(machine: WorkerMachine, now_s: float) -> None:
    machine.handle(E.RETRY_DUE, REASON, now_s)
    machine.handle(E.PLACEMENT_ASKED, REASON, now_s)
    assert machine.state is S.STARTING


def test_a_worker_that_was_ready_is_started_again_at_once_and_then_with_growing_waits() -> None:
    machine = machine_in(S.READY)
    waits = []
    for _ in range(8):
        machine.handle(E.EXITED, REASON, 10.0)
        waits.append(machine.retry_at_s - 10.0)
        start_again(machine, 10.0)
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, MAX_BACKOFF_S, MAX_BACKOFF_S]


def test_a_worker_that_never_was_ready_gets_no_free_start() -> None:
    machine = machine_in(S.STARTING)
    waits = []
    for _ in range(3):
        machine.handle(E.EXITED, REASON, 10.0)
        waits.append(machine.retry_at_s - 10.0)
        start_again(machine, 10.0)
    assert waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("ready_s", "wait_s"), [(GOOD_RECORD_S - 1, 4.0), (GOOD_RECORD_S, 0.0)])
def test_a_minute_of_readiness_clears_the_record(ready_s: float, wait_s: float) -> None:
    machine = machine_in(S.READY)
    for _ in range(3):
        machine.handle(E.EXITED, REASON, 10.0)
        start_again(machine, 10.0)
    machine.handle(E.HEARD_READY, REASON, 20.0)
    machine.handle(E.HEARD_READY, REASON, 30.0)
    machine.handle(E.EXITED, REASON, 20.0 + ready_s)
    assert machine.retry_at_s == 20.0 + ready_s + wait_s


def test_a_failed_worker_is_tried_again_after_a_minute() -> None:
    machine = machine_in(S.STARTING)
    machine.handle(E.HEARD_FAILED, "no such model", 10.0)
    assert (machine.state, machine.reason) == (S.FAILED, "no such model")
    assert machine.retry_at_s == 10.0 + FAILED_RETRY_S


def test_the_next_incarnation_is_above_all_that_were_seen() -> None:
    machine = machine_in(S.LOST)
    machine.saw_incarnation(7)
    start_again(machine, 1.0)
    assert machine.incarnation == 8


def test_a_long_record_of_losses_does_not_overflow() -> None:
    machine = machine_in(S.STARTING)
    machine.num_losses = 5000
    machine.handle(E.EXITED, REASON, 0.0)
    assert machine.retry_at_s == MAX_BACKOFF_S


@given(st.lists(st.tuples(st.sampled_from(E), st.floats(0, 100)), max_size=40))
def test_no_order_of_events_breaks_it_and_incarnations_only_grow(
    events: list[tuple[WorkerEvent, float]],
) -> None:
    machine = WorkerMachine(WorkerId("w-0"))
    now_s, started = 0.0, []
    for event, elapsed_s in events:
        now_s += elapsed_s
        before = machine.incarnation
        if event is E.ADOPTED:
            machine.adopt(machine.incarnation + 1, REASON, now_s)
        else:
            machine.handle(event, REASON, now_s)
        if machine.incarnation != before:
            started.append(machine.incarnation)
        machine.check_invariants()
    assert started == sorted(set(started))
