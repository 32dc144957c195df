"""How many workers there are: more when moves of phases do not help, fewer when they do not need to be, none lost on the way."""

import math
import random
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.bench.trace import TraceRow
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.controller import ControllerConfig, ControllerState, decide, recover
from orchestrator.control.look import Look
from orchestrator.control.observation import GatewayNews, Observation
from orchestrator.control.plan import Plan, RequestResources, StartWorker, StopWorker
from orchestrator.control.policies.policy import ClusterLoad, Totals
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.scaling import Demand, Scaling
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from orchestrator.control.switching import Switching
from orchestrator.control.view import ClusterView, LifecycleState, ScaleState, SwitchState, WorkerView
from orchestrator.control.worker_machine import WorkerEvent, WorkerMachine
from orchestrator.sim.pictures import Pictures
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from tests.support.fake_cluster import FakeMachines, controller_config, declare
from tests.support.sim import ENGINE, LLAMA_ON_H100, load, worker
from workers.api import Phase, PhaseWork, WorkerId, WorkerState, WorkerStatus
from workers.step_cost import StepCost

E, P, D = (frozenset({phase}) for phase in Phase)
EXTRA = tuple(WorkerId(f"w-{i}") for i in range(2, 5))
CONFIG = ScalingConfig(EXTRA, hold_s=10.0, release_s=20.0, give_up_s=60.0, blocked_s=100.0)
SERVED = {Phase.PREFILL: 5, Phase.DECODE: 5}
COST = StepCost(0.002, 2.5e-5, 2.6e-5, 0.005, 5e-8, 1e-9)
LOOK = Look(0.0, ClusterLoad((), Totals()), COST, Slo(1.0, 0.05))


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


def demand(load: float, *, is_moving: bool = False) -> Demand:
    return Demand(load, is_moving, P | D, LOOK)


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


# In the controller.


def config() -> ControllerConfig:
    found = controller_config("w-0", "w-1")
    extra = tuple(declare(one) for one in EXTRA)
    return replace(found, switch_mode=SwitchMode.ON, slo=Slo(1.0, 0.05), extra=extra, scaling=CONFIG)


class World:
    """A controller over fake machines, whose policy says what it is told to say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machines, self.now_s, self.load = FakeMachines(), 0.0, 0.5
        self.state: ControllerState = recover(None, (), config(), 0.0)
        monkeypatch.setattr(
            "orchestrator.control.auto_switch.AutoSwitch.demand", lambda *_a, **_k: demand(self.load)
        )
        self.requested: list[int] = []
        #: The gateway gets the views.
        self.is_reachable, self.known_version = True, 0
        #: Processes get a place.
        self.has_room = True

    def tick(self, num: int = 1) -> Plan:
        for _ in range(num):
            self.now_s += 1.0
            if self.has_room:
                self.machines.advance()
            news = GatewayNews(version=self.known_version)
            seen = Observation(self.machines.reports(), self.machines.statuses(), news)
            plan = decide(self.now_s, seen, self.state, config())
            if self.is_reachable:
                self.known_version = plan.view.version
            self.state.check_invariants()
            for action in plan.actions:
                match action:
                    case StartWorker():
                        self.machines.start(action.declared, action.incarnation)
                    case StopWorker():
                        self.machines.stop((action.worker_id, action.incarnation))
                    case RequestResources():
                        self.requested.append(len(action.workers))
        return plan

    def ready(self, plan: Plan) -> list[str]:
        return [one.worker_id for one in plan.view.workers if one.state is LifecycleState.READY]


def test_the_autoscaler_is_asked_the_worker_started_drained_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    assert world.ready(world.tick(5)) == ["w-0", "w-1"]
    # What has its place is not asked for any more.
    assert world.requested == [2, 0]
    world.load = 1.2
    plan = world.tick(16)
    assert world.ready(plan) == ["w-0", "w-1", "w-2", "w-3"]
    assert world.requested == [2, 0, 4, 0]
    assert plan.view.scales[-1].state is ScaleState.DONE
    world.load = 0.2
    process = world.machines.newest("w-3")
    process.work = PhaseWork(num_decodes=1)
    while not world.state.resizing or not world.state.resizing.scaling.retiring:
        plan = world.tick()
    view = plan.view.worker(WorkerId("w-3"))
    assert view is not None
    # What it decodes goes on elsewhere first.
    assert (view.phases, view.leaving) == (frozenset(), P | D)
    assert world.ready(world.tick(5))[-1] == "w-3"
    process.work = PhaseWork()
    plan = world.tick(2)
    assert plan.view.worker(WorkerId("w-3")) is None
    assert plan.view.scales[-1].reason == "w-3 is drained; workers left: 3"
    assert world.requested == [2, 0, 4, 0]
    assert all(key[0] != "w-3" for key in world.machines.processes)
    world.load = 2.0
    world.tick(20)
    # No incarnation is used twice.
    assert world.machines.newest("w-3").incarnation == 2


def test_a_worker_is_not_ended_while_the_gateway_does_not_know_that_it_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.load = 1.2
    world.tick(16)
    world.load, world.is_reachable = 0.2, False
    plan = world.tick(25 + int(CONFIG.drain_s) * 2)
    # It has nothing to do, but may get something in any moment.
    view = plan.view.worker(WorkerId("w-3"))
    assert view is not None
    assert (view.phases, view.leaving) == (frozenset(), P | D)
    process = world.machines.newest("w-3")
    process.work, world.is_reachable = PhaseWork(num_prefills=1), True
    world.tick(int(CONFIG.drain_s) // 2)
    assert process in world.machines.processes.values()
    process.work = PhaseWork()
    plan = world.tick(3)
    assert plan.view.scales[-1].reason == "w-3 is drained; workers left: 3"
    assert process not in world.machines.processes.values()


def test_a_worker_that_is_lost_goes_without_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.load = 1.2
    world.tick(16)
    world.load, world.is_reachable = 0.2, False
    while not world.state.resizing or not world.state.resizing.scaling.retiring:
        world.tick()
    world.machines.crash((WorkerId("w-3"), 1))
    assert world.tick(2).view.worker(WorkerId("w-3")) is None


def test_a_new_controller_keeps_those_that_were_added(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.load = 1.2
    plan = world.tick(16)
    world.state = recover(plan.view, world.machines.reports(), config(), world.now_s)
    world.load = 0.5
    assert world.ready(world.tick(3)) == ["w-0", "w-1", "w-2", "w-3"]
    # What the one before may have asked for is taken back.
    assert world.requested == [2, 0, 4, 0, 0]


def test_a_new_controller_goes_on_with_nodes_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.has_room, world.load = False, 1.2
    plan = world.tick(16)
    assert [one.state for one in plan.view.scales] == [ScaleState.ASKED]
    world.state = recover(plan.view, world.machines.reports(), config(), world.now_s)
    world.has_room = True
    [scale] = world.tick(3).view.scales
    assert (scale.scale_id, scale.state) == (plan.view.scales[0].scale_id, ScaleState.DONE)
    assert world.ready(world.tick(3)) == ["w-0", "w-1", "w-2", "w-3"]


def test_a_new_controller_tells_that_a_worker_was_to_go_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.load = 1.2
    world.tick(16)
    world.load = 0.2
    world.machines.newest("w-3").work = PhaseWork(num_decodes=1)
    while not world.state.resizing or not world.state.resizing.scaling.retiring:
        plan = world.tick()
    world.state = recover(plan.view, world.machines.reports(), config(), world.now_s)
    plan = world.tick(3)
    assert [one.state for one in plan.view.scales] == [ScaleState.DONE, ScaleState.UNDONE]
    assert (
        plan.view.scales[-1].reason == "its controller died before it ended; the workers that there are stay"
    )
    view = plan.view.worker(WorkerId("w-3"))
    assert view is not None
    assert (view.phases, view.leaving) == (P | D, frozenset())


def test_a_new_controller_ends_a_worker_that_was_let_go_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.load = 1.2
    world.tick(16)
    world.load = 0.2
    alive = dict(world.machines.processes)
    while world.state.resizing and len(world.state.machines) == 4:
        plan = world.tick()
    assert plan.view.scales[-1].state is ScaleState.DONE
    # The controller died before it could end the process.
    world.machines.processes = alive
    world.state = recover(plan.view, world.machines.reports(), config(), world.now_s)
    assert WorkerId("w-3") not in world.state.machines
    world.tick()
    assert all(worker_id != "w-3" for worker_id, _ in world.machines.processes)


def test_the_autoscaler_is_told_again_of_all_while_one_waits_for_a_node_and_of_none_after_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.tick(5)
    world.machines.crash((WorkerId("w-1"), 1))
    world.has_room = False
    world.tick(65)
    assert world.requested == [2, 0, 2, 2, 2]
    world.has_room = True
    world.tick(65)
    assert world.requested == [2, 0, 2, 2, 2, 0]


def test_a_worker_that_cannot_start_asks_for_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.tick(1)
    world.machines.newest("w-1").state = WorkerState.FAILED
    world.tick(3)
    assert world.state.machines[WorkerId("w-1")].state is LifecycleState.FAILED
    assert world.requested == [2, 0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.1, 0.65, 1.5, 4.0]),
            st.integers(1, 40),
            st.sampled_from(["", "restart", "no room", "room", "cut", "heal", "busy", "idle", "crash"]),
        ),
        max_size=12,
    )
)
def test_every_decision_has_an_end_and_every_worker_a_process(steps: list[tuple[float, int, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch)
        plan = world.tick(5)
        for load, num_ticks, what in steps:
            world.load = load
            match what:
                case "restart" if world.is_reachable:
                    world.state = recover(plan.view, world.machines.reports(), config(), world.now_s)
                case "room" | "no room":
                    world.has_room = what == "room"
                case "cut" | "heal":
                    world.is_reachable = what == "heal"
                case "busy" | "idle":
                    for process in world.machines.processes.values():
                        process.work = PhaseWork(num_decodes=what == "busy")
                case "crash":
                    for process in world.machines.processes.values():
                        process.exit_reason = "killed"
            plan = world.tick(num_ticks)
            assert not any(one.state is ScaleState.ASKED for one in plan.view.scales[:-1])
        world.is_reachable = world.has_room = True
        world.load = 0.65
        for process in world.machines.processes.values():
            process.work = PhaseWork()
        # Longer than an attempt to start a worker again.
        plan = world.tick(150)
    assert not any(one.state is ScaleState.ASKED for one in plan.view.scales)
    alive = {key[0] for key, process in world.machines.processes.items() if process.is_alive}
    assert alive == set(world.ready(plan))
    assert {"w-0", "w-1"} <= set(world.ready(plan))
    assert world.requested[-1] == 0


def test_a_switch_of_one_that_is_given_up_meanwhile_ends_with_it() -> None:
    one = EXTRA[0]
    switching = Switching({one: P | D})
    status = WorkerStatus(one, 1, P | D, WorkerState.READY)
    present = WorkerView(one, 1, P | D, LifecycleState.READY, "w-2:1", "serves", 0, status)
    other = replace(present, worker_id=WorkerId("w-0"))
    view = ClusterView("test", 1, 1, "tiny", (present, other))
    assert switching.begin([SwitchRequest("s", one, P, "asked")], view, 1.0) == 1
    switching.forget(one, 2.0)
    assert [(seen.state, seen.reason) for seen in switching.views()] == [
        (SwitchState.UNDONE, "w-2 is given up")
    ]


# In the simulator.


@cache
def run(seed: int, *, can_grow: bool) -> SimResult:
    """More prompts than two workers can do for 25 s, then next to none for as long."""
    engine = replace(ENGINE, kv_cache_bytes=20 * 10**9, token_budget=2048, max_running_sequences=256)
    rng, at_s, found = random.Random(seed), 0.0, []
    while at_s < 25.0:
        at_s += rng.expovariate(22.0)
        found.append((at_s, rng.randint(3000, 5000), rng.randint(2, 6)))
    while at_s < 60.0:
        at_s += rng.expovariate(2.0)
        found.append((at_s, rng.randint(50, 100), rng.randint(50, 400)))
    plan: list[PlannedRequest] = load(found)
    scaling = ScalingConfig(EXTRA[:2], hold_s=3.0, release_s=5.0)
    sim = SimConfig(
        tuple(worker(f"w-{i}", P | D, engine) for i in range(2)),
        LLAMA_ON_H100,
        slo=Slo(0.6, 0.03),
        switch_mode=SwitchMode.ON,
        load_s=1.0,
        seed=seed,
        extra=tuple(worker(one, P | D, engine) for one in EXTRA[:2]),
        scaling=scaling if can_grow else None,
    )
    return Simulation(sim, plan, plan[-1].arrival_s).run()


def num_met(result: SimResult) -> int:
    return sum(record.token_times_s[0] <= 0.6 for record in result.load.records if record.token_times_s)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_simulated_cluster_grows_and_shrinks_and_loses_nothing(seed: int) -> None:
    result = run(seed, can_grow=True)
    assert {record.status for record in result.load.records} == {OK}
    assert result.num_wrong_tokens == 0
    grown = [(one.num_before, one.num_wanted) for one in result.scales if one.state is ScaleState.DONE]
    assert grown[0][0] == 2
    assert max(wanted for _, wanted in grown) > 2
    assert grown[-1][1] < grown[-1][0]
    for one in result.scales:
        assert one.digest
        assert one.predicted is not None
    first = result.scales[0]
    assert first.predicted is not None
    assert first.predicted > 1
    assert first.met_before is not None
    assert num_met(result) > 1.2 * num_met(run(seed, can_grow=False))


def run_pictures(seed: int, drain_s: float) -> tuple[SimResult, bool]:
    """More pictures than one encoder can do, and settings with which one goes all the same; whether it had some then."""
    engine = replace(ENGINE, kv_cache_bytes=20 * 10**9, token_budget=2048, max_running_sequences=256)
    # Slow enough that pictures are there whenever a worker goes.
    pictures = replace(Pictures.of(LLAMA_ON_H100, tiles=3), batch_s=0.02, patch_s=4e-5)
    rng, at_s, plan = random.Random(seed), 0.0, []
    while at_s < 30.0:
        at_s += rng.expovariate(3.0)
        num_images = rng.randint(3, 6)
        prompt = rng.randint(1, 60) + num_images * pictures.num_tokens
        row = TraceRow(len(plan) + 1, at_s, prompt, rng.randint(2, 10), (), num_images)
        plan.append(PlannedRequest(row, at_s, prompt, row.output_tokens, num_images))
    sim = SimConfig(
        (worker("e-0", E, engine), worker("t-0", P | D, engine)),
        LLAMA_ON_H100,
        slo=Slo(0.6, 0.03),
        switch_mode=SwitchMode.ON,
        load_s=1.0,
        seed=seed,
        pictures=pictures,
        extra=tuple(worker(one, E, engine) for one in EXTRA[:2]),
        scaling=ScalingConfig(EXTRA[:2], hold_s=3.0, release_s=2.0, below=9.0, drain_s=drain_s),
    )
    simulation, had_some = Simulation(sim, plan, plan[-1].arrival_s), False
    update_view = simulation.dispatcher.update_view

    def on_view(view: ClusterView) -> bool:
        nonlocal had_some
        had_some |= any(
            one.leaving and one.status is not None and one.status.work.num_encodes > 0 for one in view.workers
        )
        return update_view(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation.dispatcher, "update_view", on_view)
        return simulation.run(), had_some


@pytest.mark.parametrize("drain_s", [60.0, 0.2])
def test_an_encoder_that_goes_takes_no_picture_with_it(drain_s: float) -> None:
    """Also when it is ended with pictures that requests wait for: others encode them anew."""
    all_had_some, reasons = [], []
    for seed in range(1, 4):
        result, had_some = run_pictures(seed, drain_s)
        assert {record.status for record in result.load.records} == {OK}
        assert result.num_wrong_tokens == 0
        assert result.scales[0].num_wanted > 2
        all_had_some.append(had_some)
        reasons += [one.reason for one in result.scales if one.num_wanted < one.num_before]
    assert any(all_had_some)
    assert any(("in time" if drain_s < 1 else "is drained") in one for one in reasons)
