"""How many workers there are: more when moves of phases do not help, fewer when they do not need to be, none lost on the way."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.scaling import Scaling
from orchestrator.control.view import ScaleState
from orchestrator.control.worker_machine import WorkerEvent, WorkerMachine
from tests.support.scaling import CONFIG, EXTRA, LOOK, demand
from workers.api import Phase, WorkerId

SERVED = {Phase.PREFILL: 5, Phase.DECODE: 5}


def machine(worker_id: str, *, is_ready: bool = True) -> WorkerMachine:
    found = WorkerMachine(WorkerId(worker_id))
    found.handle(WorkerEvent.PLACEMENT_ASKED, "asked", 0.0)
    if is_ready:
        found.address = f"{worker_id}:1"
        found.handle(WorkerEvent.HEARD_READY, "serves", 0.0)
    return found


def machines(num: int, *, num_ready: int | None = None) -> dict[WorkerId, WorkerMachine]:
    ready = num if num_ready is None else num_ready
    return {WorkerId(f"w-{i}"): machine(f"w-{i}", is_ready=i < ready) for i in range(num)}


def added(scaling: Scaling, load: float, num: int, *, until_s: float, from_s: float = 0.0) -> list[WorkerId]:
    """While these look at it, each second."""
    found: list[WorkerId] = []
    now_s = from_s
    while now_s <= until_s and not found:
        found += scaling.tick(now_s, demand(load), machines(num), SERVED)
        now_s += 1.0
    return found


def test_a_load_that_lasts_gets_as_many_workers_as_it_needs() -> None:
    scaling = Scaling(CONFIG)
    assert not added(scaling, 1.2, 2, until_s=9.0)
    # 2 x 1.2 / 0.7 are four workers.
    assert added(scaling, 1.2, 2, until_s=20.0, from_s=10.0) == ["w-2", "w-3"]
    [view] = scaling.views()
    assert (view.num_before, view.num_wanted, view.state, view.digest) == (
        2,
        4,
        ScaleState.ASKED,
        LOOK.digest,
    )
    assert view.why == "load 1.20 for 10 s, and no move of phases helps"


def test_the_effect_is_looked_at_once_those_that_came_are_ready() -> None:
    scaling, present = Scaling(CONFIG), machines(2)
    for now_s in range(11):
        scaling.tick(float(now_s), demand(1.2), present, SERVED, 0.4)
    assert (scaling.views()[-1].met_before, scaling.views()[-1].met_after) == (0.4, None)
    # 1.2 of what two can do is 0.6 of what four can: all of it is served, after 1 / 1.2.
    assert scaling.views()[-1].predicted == pytest.approx(1.2)
    present = machines(4)
    for one in EXTRA[:2]:
        present[one] = machine(one, is_ready=False)
        present[one].address = "w:1"
    for now_s in range(11, 40):
        scaling.tick(float(now_s), demand(0.7), present, SERVED, 0.5)
    assert (scaling.views()[-1].state, scaling.views()[-1].met_after) == (ScaleState.DONE, None)
    present = machines(4)
    for now_s in range(40, 60):
        scaling.tick(float(now_s), demand(0.7), present, SERVED, 0.5 + now_s / 100)
    # As of 15 s after that.
    assert scaling.views()[-1].met_after == 0.5 + 55 / 100


def test_a_load_that_goes_while_nodes_are_waited_for_ends_that() -> None:
    scaling, present = Scaling(CONFIG), machines(4, num_ready=2)
    assert added(scaling, 1.2, 2, until_s=20.0)
    for now_s in range(20, 50):
        scaling.tick(float(now_s), demand(0.1), present, SERVED)
    assert [(one.num_wanted, one.state) for one in scaling.views()] == [
        (4, ScaleState.UNDONE),
        (3, ScaleState.ASKED),
    ]
    assert scaling.views()[0].reason.startswith("overtaken: one worker fewer would have load 0.20")


def test_a_load_that_falls_or_a_move_of_phases_begins_the_wait_anew() -> None:
    scaling = Scaling(CONFIG)
    for now_s in range(40):
        # Every tenth second something else is seen.
        load = demand(0.9 if now_s % 20 == 9 else 1.2, is_moving=now_s % 20 == 18)
        assert not scaling.tick(float(now_s), load, machines(2), SERVED)


def test_there_are_never_more_than_declared() -> None:
    scaling = Scaling(CONFIG)
    assert added(scaling, 50.0, 2, until_s=20.0) == list(EXTRA)
    assert not added(scaling, 50.0, 5, until_s=100.0, from_s=20.0)
    assert scaling.views()[-1].state is ScaleState.UNDONE
    assert "maxWorkers are there already" in scaling.views()[-1].reason


def test_one_that_no_node_takes_is_given_up_and_the_reason_told() -> None:
    scaling = Scaling(CONFIG)
    [*new] = added(scaling, 1.2, 2, until_s=20.0)
    for now_s in range(20, 90):
        scaling.tick(float(now_s), demand(1.2), machines(4, num_ready=2), SERVED)
    assert set(scaling.retiring) == set(new)
    view = scaling.views()[-1]
    assert (view.state, view.reason) == (
        ScaleState.UNDONE,
        "no node took w-2, w-3 in 60 s: is there an autoscaler, and may it add nodes?",
    )
    for one in new:
        scaling.gone(one, "is drained", 2)
    # It is not asked again at once.
    assert not added(scaling, 1.2, 2, until_s=150.0, from_s=90.0)
    assert added(scaling, 1.2, 2, until_s=300.0, from_s=151.0)


def test_one_that_does_not_start_is_given_up_with_its_own_reason() -> None:
    scaling, present = Scaling(CONFIG), machines(3, num_ready=2)
    scaling.recover((), EXTRA[:1], 0.0)
    present[EXTRA[0]].handle(WorkerEvent.EXITED, "the model needs 9 GiB of memory", 1.0)
    for now_s in range(70):
        scaling.tick(float(now_s), demand(0.9), present, SERVED)
    assert set(scaling.retiring) == {EXTRA[0]}
    assert scaling._why_late([present[EXTRA[0]]]) == "w-2 does not start: the model needs 9 GiB of memory"


@pytest.mark.parametrize("event", [WorkerEvent.EXITED, WorkerEvent.REPLACE])
def test_one_that_had_a_node_and_needs_a_new_process_is_waited_for_anew(event: WorkerEvent) -> None:
    scaling, present = Scaling(CONFIG), machines(3)
    scaling.recover((), EXTRA[:1], 0.0)
    for now_s in range(200):
        scaling.tick(float(now_s), demand(0.9), present, SERVED)
    present[EXTRA[0]].handle(event, "a new process", 200.0)
    for now_s in range(200, 255):
        scaling.tick(float(now_s), demand(0.9), present, SERVED)
    assert not scaling.retiring
    for now_s in range(255, 262):
        scaling.tick(float(now_s), demand(0.9), present, SERVED)
    assert set(scaling.retiring) == {EXTRA[0]}


def test_one_that_is_not_needed_goes_the_last_one_first_and_never_the_only_one_of_a_phase() -> None:
    scaling = Scaling(CONFIG)
    for now_s in range(19):
        scaling.tick(float(now_s), demand(0.3), machines(4), SERVED)
    assert not scaling.retiring
    for now_s in range(19, 30):
        scaling.tick(float(now_s), demand(0.3), machines(4), SERVED)
    assert set(scaling.retiring) == {"w-3"}
    scaling.keeps(WorkerId("w-3"), "no other worker")
    assert scaling.views()[-1].state is ScaleState.UNDONE


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 5.0) | st.just(math.inf), st.booleans(), st.integers(1, 40), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_it_stays_within_bounds_and_does_not_flap(steps: list[tuple[float, bool, int, bool]]) -> None:
    scaling, now_s, present = Scaling(CONFIG), 0.0, 2
    changes: list[tuple[float, int]] = []
    for level, is_moving, num_s, is_placed in steps:
        for _ in range(num_s):
            now_s += 1.0
            seen = machines(present, num_ready=present if is_placed else 2)
            new = scaling.tick(now_s, demand(level, is_moving=is_moving), seen, SERVED)
            if new:
                changes.append((now_s, 1))
            present += len(new)
            assert list(new) == [f"w-{i}" for i in range(present - len(new), present)]
            assert set(scaling.retiring) <= set(EXTRA[: present - 2])
            for one in sorted(scaling.retiring, reverse=True):
                changes.append((now_s, -1))
                scaling.gone(one, "is drained", present - 1)
                present -= 1
            assert 2 <= present <= 2 + len(EXTRA)
    for (first_s, first), (second_s, second) in pairwise(changes):
        if first != second:
            assert second_s - first_s >= min(CONFIG.hold_s, CONFIG.release_s)
