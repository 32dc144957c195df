"""Workers that take other phases while requests run, in the code that serves, with and without faults."""

import random
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.slo import Slo
from orchestrator.control.switching import MAX_REMEMBERED
from orchestrator.control.view import SwitchState
from orchestrator.sim.faults import Fault, FaultKind
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from tests.support.sim import BOTH, ENGINE, LLAMA_ON_H100, SHAPES, D, P, load, random_load, run, worker
from workers.api import PhaseSet, WorkerId

#: Long enough to be there when a worker changes.
LONG = load([(0.1 * i, 800, 400) for i in range(12)])


def wanted(worker_id: str, phases: PhaseSet, number: int = 1) -> SwitchRequest:
    return SwitchRequest(f"s{number}", WorkerId(worker_id), phases, "the test wants it")


def test_sequences_move_with_their_kv_when_decode_is_given_up() -> None:
    result, simulation = run(SHAPES["two apart"], LONG, switches=((2.0, wanted("d1", P)),))
    assert {record.status for record in result.load.records} == {OK}
    [switch] = result.switches
    assert switch.state in (SwitchState.CHANGED, SwitchState.PROVEN), switch
    assert switch.change_s is not None
    assert switch.change_s < 0.3
    records = [simulation.dispatcher.records.get(f"r{i}") for i in range(12)]
    moved = [one for record in records if record for sample in record.samples for one in sample.migrations]
    assert moved
    for migration in moved:
        assert (migration.source, migration.target) == ("d1", "d0")
        assert migration.transfer is not None
        assert migration.pause_s is not None
        assert migration.pause_s < 0.2
    # Nothing was computed twice.
    assert all(len(sample.attempts) == 1 for record in records if record for sample in record.samples)


def test_prompts_that_wait_go_to_others_when_prefill_is_given_up() -> None:
    burst = load([(0.001 * i, 3000, 20) for i in range(30)])
    result, simulation = run(SHAPES["two apart"], burst, switches=((0.01, wanted("p1", D)),))
    assert {record.status for record in result.load.records} == {OK}
    assert result.switches[0].state is not SwitchState.UNDONE
    records = [simulation.dispatcher.records.get(f"r{i}") for i in range(30)]
    given_back = [
        sample
        for record in records
        if record
        for sample in record.samples
        if any(attempt.problem == "p1 gives up prefill" for attempt in sample.attempts)
    ]
    assert given_back
    for sample in given_back:
        assert [attempt.route.prefill.worker_id for attempt in sample.attempts] == ["p1", "p0"]


def test_a_worker_that_does_all_keeps_what_it_keeps() -> None:
    result, _ = run(SHAPES["two"], LONG, switches=((1.0, wanted("w1", P)), (2.2, wanted("w1", BOTH, 2))))
    assert {record.status for record in result.load.records} == {OK}
    assert [switch.state is SwitchState.UNDONE for switch in result.switches] == [False, False]


@pytest.mark.parametrize(
    ("shape", "worker_id", "phases", "reason"),
    [
        ("apart", "d0", P, "no other worker that is ready serves decode; d0 must keep it"),
        ("one", "w0", D, "no other worker that is ready serves prefill; w0 must keep it"),
        ("two", "w0", BOTH, "w0 serves prefill+decode already"),
        ("two", "w0", frozenset(), "no phase is named; a worker serves one at least"),
        ("two", "x", P, "no worker 'x' is declared; there are w0, w1"),
    ],
)
def test_what_must_not_be_is_refused_with_the_reason(
    shape: str, worker_id: str, phases: PhaseSet, reason: str
) -> None:
    result, _ = run(SHAPES[shape], LONG, switches=((1.0, wanted(worker_id, phases)),))
    [switch] = result.switches
    assert (switch.state, switch.reason) == (SwitchState.UNDONE, reason)
    assert {record.status for record in result.load.records} == {OK}


def test_two_at_once_do_not_both_give_up_the_last_of_a_phase() -> None:
    both = ((1.0, wanted("d0", P)), (1.0, wanted("d1", P, 2)))
    result, _ = run(SHAPES["two apart"], LONG, switches=both)
    assert {record.status for record in result.load.records} == {OK}
    states = sorted(switch.state is SwitchState.UNDONE for switch in result.switches)
    assert states == [False, True]


def test_a_worker_that_dies_while_it_leaves_comes_back_as_it_was() -> None:
    crash = (Fault(2.001, FaultKind.CRASH, "d1"),)
    result, simulation = run(SHAPES["two apart"], LONG, switches=((2.0, wanted("d1", P)),), faults=crash)
    assert {record.status for record in result.load.records} == {OK}
    assert simulation.dispatcher.view is not None
    d1 = simulation.dispatcher.view.worker(WorkerId("d1"))
    assert d1 is not None
    undone = result.switches[0].state is SwitchState.UNDONE
    assert d1.phases == (D if undone else P)


@pytest.mark.parametrize("after_s", [-0.6, 0.0, 0.001, 0.02, 0.06, 0.2])
def test_a_controller_that_dies_in_a_switch_leaves_one_that_ends(after_s: float) -> None:
    """It has told of each step, and not done it."""
    gone = (Fault(2.0 + after_s, FaultKind.CONTROLLER_CRASH, WorkerId(""), duration_s=0.7),)
    result, simulation = run(SHAPES["two apart"], LONG, switches=((2.0, wanted("d1", P)),), faults=gone)
    assert {record.status for record in result.load.records} == {OK}
    [switch] = result.switches
    assert not switch.is_under_way, switch
    view = simulation.dispatcher.view
    assert view is not None
    assert view.controller_epoch == 2
    d1 = view.worker(WorkerId("d1"))
    assert d1 is not None
    assert d1.phases == (D if switch.state is SwitchState.UNDONE else P)


def test_a_worker_that_dies_while_there_is_no_controller_is_started_by_the_next() -> None:
    gone = Fault(1.0, FaultKind.CONTROLLER_CRASH, WorkerId(""), duration_s=3.0)
    result, simulation = run(SHAPES["two"], LONG, faults=(gone, Fault(2.0, FaultKind.CRASH, WorkerId("w1"))))
    assert {record.status for record in result.load.records} == {OK}
    view = simulation.dispatcher.view
    assert view is not None
    assert view.controller_epoch == 2
    w1 = view.worker(WorkerId("w1"))
    assert w1 is not None
    assert w1.incarnation == 2
    # The crash of the controller comes with its next tick, so that it is gone for 3 s from then on.
    assert simulation.cluster.processes[WorkerId("w1"), 2].began_at_s >= 4.0


SWITCHES = st.lists(
    st.tuples(
        st.floats(0.0, 6.0),
        st.sampled_from(["w0", "w1", "p0", "p1", "d0", "d1"]),
        st.sampled_from([P, D, BOTH]),
    ),
    max_size=6,
)
FAULTS = st.lists(
    st.tuples(
        st.floats(0.0, 6.0),
        st.sampled_from(FaultKind),
        st.sampled_from(["w0", "w1", "p0", "p1", "d0", "d1"]),
        st.floats(0.1, 3.0),
    ),
    max_size=2,
)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["two", "two apart", "mixed"]), SWITCHES, FAULTS)
def test_whatever_is_asked_for_every_request_has_its_answer(
    seed: int,
    shape: str,
    switches: list[tuple[float, str, PhaseSet]],
    faults: list[tuple[float, FaultKind, str, float]],
) -> None:
    asked = tuple((at_s, wanted(name, phases, i)) for i, (at_s, name, phases) in enumerate(switches))
    broken = tuple(
        Fault(at_s, kind, name, duration_s, 3.0, rate=0.3) for at_s, kind, name, duration_s in faults
    )
    result, simulation = run(SHAPES[shape], random_load(seed, 30), seed=seed, switches=asked, faults=broken)
    # A request may have used all its attempts on faults; without any nothing fails.
    if not broken:
        assert {record.status for record in result.load.records} == {OK}
    view = simulation.dispatcher.view
    assert view is not None
    served = {phase for one in view.workers for phase in one.phases}
    assert served >= BOTH
    assert not any(switch.is_under_way for switch in view.switches)


def test_one_seed_gives_the_same_switches_and_times() -> None:
    def once() -> tuple[object, object]:
        result, _ = run(SHAPES["two apart"], LONG, seed=3, switches=((2.0, wanted("d1", P)),))
        return result.switches, result.load

    assert once() == once()


def shifting(seed: int = 1) -> list[PlannedRequest]:
    """Long prompts and short answers, then short prompts and long answers."""
    rng, at_s, found = random.Random(seed), 0.0, []
    while at_s < 12.0:
        at_s += rng.expovariate(22.0)
        found.append((at_s, rng.randint(3000, 5000), rng.randint(2, 6)))
    while at_s < 14.0:
        at_s += rng.expovariate(20.0)
        found.append((at_s, rng.randint(50, 100), rng.randint(50, 100)))
    return load(found)


@cache
def run_by_itself(mode: SwitchMode) -> tuple[SimResult, Simulation]:
    engine = replace(ENGINE, kv_cache_bytes=20 * 10**9, token_budget=2048, max_running_sequences=256)
    shape = [worker(f"{name}{i}", phases, engine) for name, phases in (("p", P), ("d", D)) for i in range(2)]
    config = SimConfig(tuple(shape), LLAMA_ON_H100, slo=Slo(0.6, 0.03), switch_mode=mode, load_s=1.0)
    plan = shifting()
    simulation = Simulation(config, plan, plan[-1].arrival_s)
    result = simulation.run()
    assert result.num_wrong_tokens == 0
    assert {record.status for record in result.load.records} == {OK}
    return result, simulation


def test_the_controller_switches_by_itself_when_the_load_shifts() -> None:
    _, as_it_is = run_by_itself(SwitchMode.OFF)
    result, by_itself = run_by_itself(SwitchMode.ON)
    done = [switch for switch in result.switches if switch.state is not SwitchState.UNDONE]
    assert done
    first = done[0]
    assert first.worker_id in ("d0", "d1")
    assert first.predicted is not None
    assert first.predicted > 1.0
    assert first.digest
    assert by_itself.dispatcher.totals.num_met > as_it_is.dispatcher.totals.num_met


def test_a_dry_run_tells_what_it_would_do_and_does_nothing() -> None:
    as_it_is, _ = run_by_itself(SwitchMode.OFF)
    result, _ = run_by_itself(SwitchMode.DRY_RUN)
    assert result.switches
    for switch in result.switches:
        assert switch.state is SwitchState.UNDONE
        assert switch.reason.startswith("dry run: load ")
    assert result.load == as_it_is.load


def test_a_result_has_all_switches_not_the_last_ones_alone() -> None:
    phases = (P, D)
    switches = tuple((0.5 * i, wanted("d1", phases[i % 2], i)) for i in range(2 * MAX_REMEMBERED))
    result, _ = run(SHAPES["two apart"], load([(0.5 * i, 100, 20) for i in range(70)]), switches=switches)
    assert [switch.switch_id for switch in result.switches] == [f"s{i}" for i in range(len(switches))]
