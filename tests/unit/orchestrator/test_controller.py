"""What the controller decides, tick by tick, against a cluster that misbehaves."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.controller import STOP_RETRY_S, ControllerConfig, ControllerState, decide, recover
from orchestrator.control.observation import Observation, ProcessKey, ProcessReport
from orchestrator.control.plan import Plan, StartWorker, StopWorker
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from tests.support.fake_cluster import FakeMachines, controller_config, declare
from workers.api import WorkerId, WorkerState

S = LifecycleState
TICK_S = 0.5
#: Well above the wait of a failed worker and the longest backoff.
RECOVERY_S = 300.0
W0 = WorkerId("w-0")
W1 = WorkerId("w-1")


@dataclass
class World:
    """A controller over fake machines; every tick checks what must hold always."""

    config: ControllerConfig = field(default_factory=lambda: controller_config("w-0", "w-1"))
    machines: FakeMachines = field(default_factory=FakeMachines)
    now_s: float = 0.0
    #: What the gateway has.
    view: ClusterView | None = None
    state: ControllerState | None = None
    starts: list[tuple[float, int, WorkerId, int]] = field(default_factory=list)
    #: Processes that somebody knows as stopped or dead.
    given_up: set[ProcessKey] = field(default_factory=set)
    failed_starts: list[ProcessReport] = field(default_factory=list)
    #: Processes that this controller did not start.
    rivals: set[ProcessKey] = field(default_factory=set)
    #: Workers whose next start is refused.
    refused: set[WorkerId] = field(default_factory=set)
    #: Workers whose processes say that they failed.
    broken: set[WorkerId] = field(default_factory=set)
    #: Workers whose processes load and load.
    loading: set[WorkerId] = field(default_factory=set)

    def tick(self, elapsed_s: float = TICK_S, *, applies: bool = True) -> Plan:
        """One look and what follows; `applies` False: the controller dies between view and actions."""
        self.now_s += elapsed_s
        self.machines.advance()
        for (worker_id, _), process in self.machines.processes.items():
            if worker_id in self.broken and process.address:
                process.state, process.message = WorkerState.FAILED, "no such model"
            elif worker_id in self.loading:
                process.state, process.message = WorkerState.LOADING, "loading weights, 40 %"
        observation = Observation((*self.machines.reports(), *self.failed_starts), self.machines.statuses())
        if self.state is None:
            self.state = recover(self.view, observation.processes, self.config, self.now_s)
        plan = decide(self.now_s, observation, self.state, self.config)
        self.check(plan, observation)
        self.view = plan.view
        self.failed_starts = []
        if applies:
            for action in plan.actions:
                self.apply(action)
        return plan

    def apply(self, action: StartWorker | StopWorker) -> None:
        if isinstance(action, StopWorker):
            self.machines.stop((action.worker_id, action.incarnation))
            return
        worker_id = action.declared.worker_id
        assert self.state is not None
        self.starts.append((self.now_s, self.state.epoch, worker_id, action.incarnation))
        if worker_id in self.refused:
            self.refused.discard(worker_id)
            self.failed_starts.append(ProcessReport(worker_id, action.incarnation, exit_reason="refused"))
        else:
            self.machines.start(action.declared, action.incarnation)

    def restart_controller(self) -> None:
        self.state = None
        self.failed_starts = []

    def settle(self) -> None:
        """No more faults, and time for everything to come back."""
        self.broken.clear()
        self.refused.clear()
        for process in self.machines.processes.values():
            process.is_mute = False
        self.tick()
        deadline_s = self.now_s + RECOVERY_S
        while {worker.state for worker in self.tick().view.workers} != {S.READY}:
            assert self.now_s < deadline_s, f"not ready again: {self.view}"
        for _ in range(int(STOP_RETRY_S / TICK_S) + 1):
            self.tick()

    def used(self) -> set[ProcessKey]:
        """All processes that ever were."""
        started = {(worker_id, incarnation) for _, _, worker_id, incarnation in self.starts}
        return started | self.rivals | set(self.machines.processes)

    def check(self, plan: Plan, observation: Observation) -> None:
        assert self.state is not None
        self.state.check_invariants()
        used = self.used()
        stops = {(a.worker_id, a.incarnation): a for a in plan.actions if isinstance(a, StopWorker)}
        for action in plan.actions:
            assert action.reason
            if isinstance(action, StartWorker):
                worker_id = action.declared.worker_id
                assert (worker_id, action.incarnation) not in used
                assert all(action.incarnation > i for w, i in used if w == worker_id)
        for key, status in observation.statuses.items():
            newest = max(i for w, i in used if w == key[0])
            if status.state is WorkerState.READY and key[1] == newest and key not in self.given_up:
                assert key not in stops, f"a worker that serves was stopped: {stops[key]}"
        self.given_up |= set(stops)
        for declared, worker in zip(self.config.declared, plan.view.workers, strict=True):
            assert (worker.worker_id, worker.phases) == (declared.worker_id, declared.phases)
            assert worker.reason
            started = sum(isinstance(a, StartWorker) and a.declared == declared for a in plan.actions)
            alive = [
                report.key
                for report in observation.processes
                if report.worker_id == worker.worker_id
                and report.is_alive
                and report.key not in self.given_up
            ]
            assert started + len(alive) <= 1, f"two processes are wanted: {alive}"
            if worker.state is S.READY:
                assert worker.address
        if self.view is not None:
            before = (self.view.controller_epoch, self.view.version)
            assert (plan.view.controller_epoch, plan.view.version) > before

    def worker(self, worker_id: str = "w-0") -> WorkerView:
        assert self.view is not None
        worker = self.view.worker(WorkerId(worker_id))
        assert worker is not None
        return worker


@pytest.fixture
def world() -> World:
    """Everything declared is ready."""
    world = World()
    for _ in range(4):
        world.tick()
    assert world.view is not None
    assert world.view.is_ready
    return world


def reasons(plan: Plan, kind: type) -> list[str]:
    return [action.reason for action in plan.actions if isinstance(action, kind)]


def ticks_until(world: World, condition: Callable[[], bool], limit: int) -> int:
    for n in range(1, limit + 1):
        world.tick()
        if condition():
            return n
    raise AssertionError(f"not within {limit} ticks; the view is {world.view}")


def test_every_declared_worker_is_started_once_at_first() -> None:
    world = World()
    plan = world.tick()
    assert [(a.declared.worker_id, a.incarnation) for a in plan.actions if isinstance(a, StartWorker)] == [
        ("w-0", 1),
        ("w-1", 1),
    ]
    assert {worker.state for worker in plan.view.workers} == {S.STARTING}
    for _ in range(5):
        assert world.tick().actions == ()
    assert {(worker.state, worker.num_restarts) for worker in world.tick().view.workers} == {(S.READY, 0)}


def test_the_view_has_address_status_and_a_version_that_grows(world: World) -> None:
    assert world.view is not None
    worker = world.worker()
    assert worker.address == "w-0.1:1"
    assert worker.status is not None
    assert worker.status.state is WorkerState.READY
    assert (world.view.deployment, world.view.model, world.view.controller_pid) == ("test", "tiny", 7)
    assert world.tick().view.version == world.view.version


def test_a_dead_worker_is_started_again_at_once_with_the_reason(world: World) -> None:
    world.machines.crash((W0, 1), "killed by signal 9")
    plan = world.tick()
    assert reasons(plan, StartWorker) == ["starts again: exited: killed by signal 9"]
    assert (world.worker().state, world.worker().incarnation, world.worker().num_restarts) == (
        S.STARTING,
        2,
        1,
    )
    ticks_until(world, lambda: world.worker().state is S.READY, 5)
    assert world.worker().address == "w-0.2:1"
    assert world.worker("w-1").incarnation == 1


def test_a_process_that_vanishes_from_the_list_is_lost(world: World) -> None:
    del world.machines.processes[W0, 1]
    assert reasons(world.tick(), StartWorker) == ["starts again: exited: its process is not listed any more"]


def test_a_silent_worker_is_stopped_and_replaced(world: World) -> None:
    world.machines.newest("w-0").is_mute = True
    n = ticks_until(world, lambda: world.worker().incarnation == 2, 20)
    assert n * TICK_S == pytest.approx(world.config.heartbeat_timeout_s + TICK_S)
    assert (W0, 1) not in world.machines.processes
    assert (W0, 1) in world.given_up
    ticks_until(world, lambda: world.worker().state is S.READY, 5)


def test_the_stop_of_a_silent_worker_says_for_how_long_it_was_silent(world: World) -> None:
    world.machines.newest("w-0").is_mute = True
    plan = world.tick()
    while not plan.actions:
        assert world.worker().reason.startswith("silent for ")
        plan = world.tick()
    assert reasons(plan, StopWorker) == ["incarnation 2 takes its place: silent for 5.5 s"]
    assert reasons(plan, StartWorker) == ["starts again: silent for 5.5 s"]
    assert isinstance(plan.actions[0], StopWorker)


def test_one_heartbeat_within_the_timeout_is_enough(world: World) -> None:
    for n in range(60):
        world.machines.newest("w-0").is_mute = n % 9 != 0
        assert world.tick().actions == ()


def test_a_controller_that_was_held_up_does_not_blame_the_workers(world: World) -> None:
    world.machines.newest("w-0").is_mute = True
    assert world.tick(elapsed_s=3600.0).actions == ()
    world.machines.newest("w-0").is_mute = False
    assert world.tick().actions == ()
    assert world.worker().state is S.READY


def test_a_worker_may_load_for_long_while_it_speaks() -> None:
    world = World(loading={W0})
    for _ in range(int(10 * world.config.startup_timeout_s / TICK_S)):
        world.tick()
    assert (world.worker().state, world.worker().incarnation) == (S.STARTING, 1)
    assert world.worker().reason == "loading weights, 40 %"


def test_a_start_that_says_nothing_is_given_up_after_the_startup_timeout() -> None:
    config = controller_config("w-0")
    state = recover(None, (), config, 0.0)
    waiting = ProcessReport(W0, 1, detail="waits for a node with 4 CPUs")
    now_s = 0.0
    decide(now_s, Observation(), state, config)
    while True:
        now_s += TICK_S
        plan = decide(now_s, Observation((waiting,)), state, config)
        if plan.actions:
            break
        assert plan.view.workers[0].reason == "waits for a node with 4 CPUs"
    assert now_s == config.startup_timeout_s + TICK_S
    assert reasons(plan, StopWorker) == [
        "lost: silent for 60.5 s while it started (waits for a node with 4 CPUs)"
    ]
    assert plan.view.workers[0].state is S.LOST


def test_a_worker_that_cannot_serve_fails_and_is_tried_again_each_minute() -> None:
    world = World()
    world.broken = {W0}
    ticks_until(world, lambda: world.worker().state is S.FAILED, 5)
    assert world.worker().reason == "no such model"
    assert world.worker().address == ""
    assert not any(worker_id == "w-0" for worker_id, _ in world.machines.processes)
    for _ in range(int(600 / TICK_S)):
        world.tick()
    assert sum(worker_id == "w-0" for _, _, worker_id, _ in world.starts) in (10, 11)
    world.broken = set()
    ticks_until(world, lambda: world.worker().state is S.READY, int(70 / TICK_S))


def test_a_worker_that_breaks_while_it_serves_is_replaced_at_once(world: World) -> None:
    world.broken = {W0}
    plan = world.tick()
    assert reasons(plan, StopWorker) == ["incarnation 2 takes its place: no such model"]
    assert reasons(plan, StartWorker) == ["starts again: no such model"]


def test_a_worker_that_always_crashes_starts_no_storm() -> None:
    world = World(config=controller_config("w-0"))
    for _ in range(int(600 / TICK_S)):
        world.tick()
        for key in world.machines.processes:
            world.machines.crash(key)
    # 1 + 1 + 2 + 4 + 8 + 16 s, then every 30 s, each rounded up to the next tick.
    assert 20 <= len(world.starts) <= 26


def test_a_start_that_is_refused_is_tried_again_later() -> None:
    world = World()
    world.refused = {W0}
    world.tick()
    plan = world.tick()
    assert plan.actions == ()
    assert (world.worker().state, world.worker().reason) == (S.LOST, "exited: refused")
    ticks_until(world, lambda: world.worker().state is S.READY, 10)
    assert world.worker().incarnation == 2


def test_a_process_of_no_declared_worker_is_stopped(world: World) -> None:
    world.machines.start(declare("stranger-0"), 4)
    plan = world.tick()
    assert plan.actions == (StopWorker(WorkerId("stranger-0"), 4, "no such worker is declared"),)


def test_the_older_of_two_incarnations_is_stopped(world: World) -> None:
    world.machines.start(declare("w-0"), 3)
    plan = world.tick()
    assert plan.actions == (StopWorker(W0, 1, "incarnation 3 takes its place"),)
    ticks_until(world, lambda: world.worker().state is S.READY, 5)
    assert world.worker().incarnation == 3


def test_an_older_process_that_appears_late_is_stopped_and_the_newer_stays(world: World) -> None:
    world.machines.crash((W0, 1))
    world.tick()
    world.machines.processes[W0, 1].exit_reason = None
    assert [type(action) for action in world.tick().actions] == [StopWorker]
    ticks_until(world, lambda: world.worker().state is S.READY, 5)
    assert world.worker().incarnation == 2


def test_the_incarnation_of_a_process_that_was_only_seen_dead_is_used_up(world: World) -> None:
    world.machines.start(declare("w-0"), 8)
    world.machines.crash((W0, 8))
    world.machines.crash((W0, 1))
    (start,) = world.tick().actions
    assert isinstance(start, StartWorker)
    assert start.incarnation == 9


def test_a_stop_that_does_not_help_is_asked_for_again_later(world: World) -> None:
    stranger = ProcessReport(WorkerId("stranger-0"), 4, "a:1")
    assert world.state is not None
    asked_s = []
    for n in range(int(3 * STOP_RETRY_S / TICK_S)):
        now_s = world.now_s + n * TICK_S
        observation = Observation((*world.machines.reports(), stranger), world.machines.statuses())
        if decide(now_s, observation, world.state, world.config).actions:
            asked_s.append(n * TICK_S)
    assert asked_s == [0.0, STOP_RETRY_S, 2 * STOP_RETRY_S]
    world.tick()
    assert world.state.stops_asked_at_s == {}


def test_a_worker_that_moves_is_used_at_its_new_address_once_it_is_heard_there(world: World) -> None:
    process = world.machines.newest("w-0")
    process.address, process.is_mute = "elsewhere:2", True
    assert world.tick().actions == ()
    assert (world.worker().state, world.worker().address) == (S.STARTING, "elsewhere:2")
    assert world.worker().reason == "moved from w-0.1:1 to elsewhere:2"
    process.is_mute = False
    world.tick()
    assert (world.worker().state, world.worker().incarnation) == (S.READY, 1)


def test_a_new_controller_keeps_ready_workers_ready(world: World) -> None:
    world.restart_controller()
    process = world.machines.newest("w-0")
    # It cannot be heard in the very first tick.
    process.is_mute = True
    plan = world.tick()
    process.is_mute = False
    assert plan.actions == ()
    assert {(worker.state, worker.incarnation) for worker in plan.view.workers} == {(S.READY, 1)}
    assert (plan.view.controller_epoch, plan.view.version) == (2, 1)
    assert world.worker().address == "w-0.1:1"


def test_a_new_controller_replaces_what_died_meanwhile(world: World) -> None:
    world.restart_controller()
    del world.machines.processes[W0, 1]
    plan = world.tick()
    assert [(a.declared.worker_id, a.incarnation) for a in plan.actions if isinstance(a, StartWorker)] == [
        ("w-0", 2)
    ]
    assert reasons(plan, StartWorker) == ["starts again: its process was gone, found by a new controller"]
    assert world.worker("w-1").state is S.READY


def test_a_new_controller_without_a_view_adopts_what_lives(world: World) -> None:
    world.restart_controller()
    world.view = None
    world.machines.start(declare("w-1"), 9)
    plan = world.tick()
    assert plan.actions == (StopWorker(W1, 1, "incarnation 9 takes its place"),)
    assert world.worker().state is S.READY
    ticks_until(world, lambda: world.worker("w-1").state is S.READY, 5)
    assert world.worker("w-1").incarnation == 9


def test_a_new_controller_does_not_use_an_incarnation_of_the_view_again(world: World) -> None:
    assert world.view is not None
    workers = tuple(
        replace(worker, incarnation=6, num_restarts=2, state=S.LOST) for worker in world.view.workers
    )
    world.view = replace(world.view, workers=workers)
    world.machines.processes.clear()
    world.restart_controller()
    world.tick()
    ticks_until(world, lambda: world.view is not None and world.view.is_ready, 10)
    assert (world.worker().incarnation, world.worker().num_restarts) == (7, 3)


def test_a_new_controller_that_nobody_tells_what_was_uses_numbers_above_all_that_may_have_been() -> None:
    world = World()
    world.config = replace(world.config, used_up=1000)
    world.machines.start(declare("w-1"), 1)
    ticks_until(world, lambda: world.view is not None and world.view.is_ready, 10)
    assert world.view is not None
    assert world.view.controller_epoch == 1001
    assert [worker.incarnation for worker in world.view.workers] == [1001, 1]
    assert [worker.num_restarts for worker in world.view.workers] == [0, 0]
    world.machines.crash((W1, 1))
    ticks_until(world, lambda: world.worker("w-1").incarnation != 1, 5)
    assert (world.worker("w-1").incarnation, world.worker("w-1").num_restarts) == (1001, 1)
    world.restart_controller()
    world.tick()
    assert world.view.controller_epoch == 1002


def test_a_new_controller_leaves_a_failed_worker_its_minute() -> None:
    world = World()
    world.broken = {W0}
    ticks_until(world, lambda: world.worker().state is S.FAILED, 5)
    world.restart_controller()
    assert world.tick().actions == ()
    assert world.worker().state is S.FAILED
    assert world.worker().reason == "no such model"


FAULTS = st.sampled_from(
    [
        "nothing",
        "crash",
        "vanish",
        "mute",
        "unmute",
        "break",
        "refuse",
        "stall",
        "crash loop",
        "stutter",
        "come back from the dead",
        "rival start",
        "restart",
        "die after the view",
    ]
)


def do_fault(world: World, fault: str, worker_id: WorkerId, num_ticks: int) -> None:
    keys = [key for key in world.machines.processes if key[0] == worker_id]
    process = world.machines.processes[max(keys)] if keys else None
    match fault:
        case "crash" if process is not None:
            process.exit_reason = "crashed"
        case "vanish" if process is not None:
            del world.machines.processes[worker_id, process.incarnation]
        case "mute" if process is not None:
            process.is_mute = True
        case "unmute" if process is not None:
            process.is_mute = False
        case "break":
            world.broken ^= {worker_id}
        case "refuse":
            world.refused.add(worker_id)
        case "stall":
            world.tick(elapsed_s=100.0)
        case "crash loop":
            for _ in range(num_ticks):
                for key in world.machines.processes:
                    world.machines.crash(key, "crashed")
                world.tick()
        case "stutter" if process is not None:
            for n in range(3 * num_ticks):
                process.is_mute = n % 9 != 0
                world.tick()
            process.is_mute = False
        case "come back from the dead" if process is not None and not process.is_alive:
            # It was reported dead too early. Whether it is used again or stopped is all the same.
            process.exit_reason = None
            world.given_up.add((worker_id, process.incarnation))
        case "rival start":
            # Another controller is at work, or was until now.
            highest = max((i for w, i in world.used() if w == worker_id), default=0)
            world.machines.start(declare(worker_id), highest + 1)
            world.rivals.add((worker_id, highest + 1))
            # What comes and goes between two looks is not known to anybody.
            world.tick()
        case "restart":
            world.restart_controller()
        case "die after the view":
            world.tick(applies=False)
            world.restart_controller()
    for _ in range(num_ticks):
        world.tick()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(FAULTS, st.sampled_from([W0, W1]), st.integers(0, 14)), max_size=25))
def test_no_faults_break_an_invariant_and_everything_is_ready_once_they_stop(
    faults: list[tuple[str, WorkerId, int]],
) -> None:
    world = World()
    for fault, worker_id, num_ticks in faults:
        do_fault(world, fault, worker_id, num_ticks)
    world.settle()
    assert world.view is not None
    assert {worker.state for worker in world.view.workers} == {S.READY}
    alive = {key for key, process in world.machines.processes.items() if process.is_alive}
    assert alive == {(worker.worker_id, worker.incarnation) for worker in world.view.workers}
    check_no_storm(world)


def check_no_storm(world: World) -> None:
    """Of three starts of a worker by one controller at most two come within a second."""
    for worker_id in (W0, W1):
        for epoch in {epoch for _, epoch, _, _ in world.starts}:
            times = [at_s for at_s, e, w, _ in world.starts if (e, w) == (epoch, worker_id)]
            gaps = [c - a for a, c in zip(times, times[2:], strict=False)]
            assert min(gaps, default=math.inf) >= 1.0, times
