"""Workers that are added and go, as the controller sees them: the autoscaler, the gateway and controllers that die."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.controller import ControllerConfig, ControllerState, decide, recover
from orchestrator.control.observation import GatewayNews, Observation
from orchestrator.control.plan import Plan, RequestResources, StartWorker, StopWorker
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.slo import Slo
from orchestrator.control.switching import Switching
from orchestrator.control.view import ClusterView, LifecycleState, ScaleState, SwitchState, WorkerView
from tests.support.fake_cluster import FakeMachines, controller_config, declare
from tests.support.scaling import CONFIG, EXTRA, D, P, demand
from workers.api import PhaseWork, WorkerId, WorkerState, WorkerStatus


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
