"""A worker that takes other phases, as the controller sees it: its machine, the checks, and ticks over fake processes."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.controller import ControllerConfig, ControllerState, decide, recover
from orchestrator.control.observation import GatewayNews, Observation, ProcessKey
from orchestrator.control.plan import Plan, SetPhases, StartWorker, StopWorker
from orchestrator.control.policies.policy import Totals
from orchestrator.control.role_switch import (
    CHANGE_TIMEOUT_S,
    OBSERVED_S,
    TRANSITIONS,
    RoleSwitch,
    SwitchEvent,
    SwitchRequest,
    forecast,
)
from orchestrator.control.view import LifecycleState, SwitchState, SwitchView, WorkerView
from tests.support.fake_cluster import FakeMachines, FakeProcess, controller_config, declare
from workers.api import Phase, PhaseSet, PhasesRefused, PhaseWork, WorkerId

E, P, D = (frozenset({phase}) for phase in Phase)
S = SwitchState
NAMES = ("p-0", "p-1", "d-0", "d-1")


def config_of(**phases: PhaseSet) -> ControllerConfig:
    declared = tuple(declare(name.replace("_", "-"), *sorted(of)) for name, of in phases.items())
    return replace(controller_config(), declared=declared)


APART = config_of(p_0=P, p_1=P, d_0=D, d_1=D)


def wanted(worker_id: str, phases: PhaseSet, switch_id: str = "s1") -> SwitchRequest:
    return SwitchRequest(switch_id, WorkerId(worker_id), phases, "more prompts")


@dataclass
class World:
    """A controller over fake machines."""

    config: ControllerConfig = field(default_factory=lambda: APART)
    machines: FakeMachines = field(default_factory=FakeMachines)
    now_s: float = 0.0
    state: ControllerState = field(init=False)
    plan: Plan = field(init=False)
    refusals: dict[ProcessKey, PhasesRefused] = field(default_factory=dict)
    #: The gateway gets the views.
    is_reachable: bool = True
    known_version: int = 0

    def __post_init__(self) -> None:
        self.state = recover(None, (), self.config, 0.0)
        for _ in range(4):
            self.tick()
        assert all(worker.state is LifecycleState.READY for worker in self.plan.view.workers)

    def tick(self, *requests: SwitchRequest, elapsed_s: float = 0.1, totals: Totals | None = None) -> Plan:
        self.now_s += elapsed_s
        self.machines.advance()
        observation = Observation(
            self.machines.reports(),
            self.machines.statuses(),
            GatewayNews(requests, replace(totals) if totals else None, self.known_version),
            dict(self.refusals),
        )
        self.refusals.clear()
        self.plan = decide(self.now_s, observation, self.state, self.config)
        self.state.check_invariants()
        if self.is_reachable:
            self.known_version = self.plan.view.version
        for action in self.plan.actions:
            key = (
                action.declared.worker_id if isinstance(action, StartWorker) else action.worker_id,
                action.incarnation,
            )
            match action:
                case StartWorker():
                    self.machines.start(action.declared, action.incarnation)
                case StopWorker():
                    self.machines.stop(key)
                case SetPhases():
                    refused = self.machines.processes[key].set_phases(action.phases, action.phase_epoch)
                    if refused is not None:
                        self.refusals[key] = refused
        return self.plan

    def worker(self, worker_id: str) -> WorkerView:
        found = self.plan.view.worker(WorkerId(worker_id))
        assert found is not None
        return found

    def process(self, worker_id: str) -> FakeProcess:
        return self.machines.newest(worker_id)

    @property
    def switch(self) -> SwitchView:
        return self.plan.view.switches[-1]


def test_the_table_names_every_state_and_every_event() -> None:
    assert set(TRANSITIONS) == {(state, event) for state in SwitchState for event in SwitchEvent}


def test_a_switch_that_has_ended_changes_no_more() -> None:
    for state in (S.PROVEN, S.UNDONE):
        assert all(TRANSITIONS[state, event] is None for event in SwitchEvent)


@given(st.lists(st.sampled_from(SwitchEvent), max_size=12), st.sampled_from([P, D, P | D]))
def test_any_events_leave_a_switch_sound(events: list[SwitchEvent], phases: PhaseSet) -> None:
    switch = RoleSwitch.begin(wanted("d-0", phases), D | E, 1, 0.0)
    for now_s, event in enumerate(events):
        was = switch.state
        switch.handle(event, "why", float(now_s))
        switch.check_invariants()
        assert switch.state in (was, TRANSITIONS[was, event])
        # It is never used for what it does not have, or is giving up.
        if switch.is_under_way:
            assert switch.usable <= switch.before & (phases | switch.before - switch.leaving)
            assert not switch.usable & switch.leaving


def test_a_worker_leaves_then_changes_then_serves() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick(wanted("d-1", P))
    assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (frozenset(), D)
    assert (world.switch.state, world.switch.before, world.switch.phases) == (S.LEAVING, D, P)
    world.tick()
    assert world.switch.state is S.LEAVING
    world.process("d-1").work = PhaseWork()
    [action] = world.tick().actions
    assert action == SetPhases(WorkerId("d-1"), 1, "d-1.1:1", P, 1, "nothing needs decode there any more")
    # Until it says so it is used for nothing.
    assert (world.switch.state, world.worker("d-1").phases) == (S.CHANGING, frozenset())
    assert world.tick().actions == ()
    assert (world.switch.state, world.switch.reason) == (S.CHANGED, "more prompts")
    assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (P, frozenset())
    assert world.switch.change_s == pytest.approx(0.3)
    world.process("d-1").first_step_s = 0.05
    world.tick()
    assert world.switch.state is S.PROVEN
    assert world.switch.first_step_s == pytest.approx(0.25)


def test_a_worker_that_only_gains_a_phase_keeps_serving_the_other() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick(wanted("d-1", P | D))
    assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (D, frozenset())
    world.tick()
    world.tick()
    assert (world.switch.state, world.worker("d-1").phases) == (S.CHANGED, P | D)


def test_a_request_that_came_after_all_is_waited_for() -> None:
    world = World()
    world.tick(wanted("d-1", P))
    world.process("d-1").refusal = PhasesRefused("1 requests here still need {decode}", is_busy=True)
    for _ in range(5):
        # It is asked again in each tick, and used for nothing meanwhile.
        assert isinstance(world.tick().actions[0], SetPhases)
        assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (frozenset(), D)
    world.process("d-1").refusal = None
    for _ in range(3):
        world.tick()
    assert world.switch.state is S.CHANGED


def test_nothing_is_given_up_that_the_gateway_may_still_use() -> None:
    world = World()
    world.is_reachable = False
    world.tick(wanted("d-1", P))
    for _ in range(5):
        assert world.tick().actions == ()
    assert world.switch.state is S.LEAVING
    world.is_reachable = True
    for _ in range(4):
        world.tick()
    assert world.switch.state is S.CHANGED


def test_a_switch_that_the_gateway_never_hears_of_is_undone() -> None:
    world = World()
    world.is_reachable = False
    world.tick(wanted("d-1", P))
    world.tick(elapsed_s=CHANGE_TIMEOUT_S + 1)
    assert world.switch.state is S.UNDONE
    assert world.switch.reason == "leaving took too long: the gateway does not answer, and may give it more"


def test_a_refusal_leaves_it_as_it_was() -> None:
    world = World()
    world.process("d-1").refusal = PhasesRefused("phases: this model takes no pictures")
    for _ in range(3):
        world.tick(wanted("d-1", D | E))
    assert (world.switch.state, world.switch.reason) == (S.UNDONE, "phases: this model takes no pictures")
    assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (D, frozenset())
    assert world.tick().actions == ()


def test_one_that_needs_other_weights_is_drained_and_replaced() -> None:
    world = World(config_of(e_0=E, e_1=E, p_0=P, p_1=P, d_0=D))
    world.process("p-1").refusal = PhasesRefused("it would need weights", needs_new_process=True)
    world.tick(wanted("p-1", E))
    world.process("p-1").work = PhaseWork(num_prefills=1)
    world.tick()
    assert (world.switch.state, world.worker("p-1").leaving) == (S.LEAVING, P)
    world.process("p-1").work = PhaseWork()
    for _ in range(2):
        world.tick()
    stop, start = world.plan.actions if len(world.plan.actions) == 2 else world.tick().actions
    assert isinstance(stop, StopWorker)
    assert isinstance(start, StartWorker)
    assert (start.declared.phases, start.incarnation) == (E, 2)
    for _ in range(4):
        world.tick()
    assert (world.switch.state, world.worker("p-1").phases) == (S.CHANGED, E)
    assert world.worker("p-1").incarnation == 2
    # It keeps them when it is lost.
    world.machines.crash((WorkerId("p-1"), 2))
    for _ in range(5):
        world.tick()
    assert (world.worker("p-1").incarnation, world.process("p-1").phases) == (3, E)


def test_a_worker_that_is_lost_on_the_way_keeps_its_phases() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick(wanted("d-1", P))
    world.machines.crash((WorkerId("d-1"), 1))
    for _ in range(5):
        world.tick()
    assert world.switch.state is S.UNDONE
    assert "d-1 is lost" in world.switch.reason
    assert (world.worker("d-1").phases, world.worker("d-1").incarnation) == (D, 2)


def test_one_that_cannot_be_emptied_is_used_again() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick(wanted("d-1", P))
    world.tick(elapsed_s=CHANGE_TIMEOUT_S + 1)
    assert world.switch.state is S.UNDONE
    assert world.switch.reason == "leaving took too long: 2 requests there still need decode"
    assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (D, frozenset())


def test_one_that_changed_too_late_is_told_to_change_back() -> None:
    world = World()
    world.tick(wanted("d-1", P))
    process = world.process("d-1")
    process.is_mute = True
    world.tick()
    world.tick(elapsed_s=4.0)
    process.is_mute = False
    process.refusal = PhasesRefused("later", is_busy=True)
    world.tick()
    world.tick(elapsed_s=CHANGE_TIMEOUT_S + 1)
    assert world.switch.state is S.UNDONE
    process.refusal, process.phases = None, P
    world.tick(elapsed_s=2.0)
    assert process.phases == D


def restarted(world: World) -> None:
    world.state = recover(world.plan.view, world.machines.reports(), world.config, world.now_s)
    world.state.check_invariants()


def test_a_new_controller_undoes_what_it_finds_half_done_and_says_so() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick(wanted("d-1", P))
    restarted(world)
    # The gateway may not know yet that it was carried out.
    world.tick(wanted("d-1", P))
    assert (world.worker("d-1").phases, world.worker("d-1").leaving) == (D, frozenset())
    [switch] = world.plan.view.switches
    assert (switch.switch_id, switch.state, switch.why) == ("s1", S.UNDONE, "more prompts")
    assert switch.reason == "its controller died before it ended; d-1 serves decode"
    world.process("d-1").work = PhaseWork()
    for _ in range(4):
        world.tick(wanted("d-1", P, "s2"))
    assert [one.state for one in world.plan.view.switches] == [S.UNDONE, S.CHANGED]


def test_a_new_controller_tells_of_a_switch_that_was_done_without_one() -> None:
    world = World()
    world.tick(wanted("d-1", P))
    world.tick()
    assert (world.switch.state, world.process("d-1").phases) == (S.CHANGING, P)
    restarted(world)
    world.tick()
    [switch] = world.plan.view.switches
    assert (switch.state, world.worker("d-1").phases) == (S.CHANGED, P)
    assert switch.reason == "its controller died before it ended; d-1 serves prefill"


@pytest.mark.parametrize("is_started", [False, True])
def test_a_new_controller_finds_a_worker_between_two_processes(*, is_started: bool) -> None:
    world = World(config_of(e_0=E, e_1=E, p_0=P, p_1=P, d_0=D))
    world.process("p-1").refusal = PhasesRefused("it would need weights", needs_new_process=True)
    for _ in range(4):
        world.tick(wanted("p-1", E))
    assert world.switch.state is S.CHANGING
    if not is_started:
        # The view was told, and nothing else.
        world.machines.stop((WorkerId("p-1"), 2))
    restarted(world)
    for _ in range(8):
        world.tick(elapsed_s=1.0)
        assert len(world.plan.view.switches) == 1
    assert world.worker("p-1").state is LifecycleState.READY
    assert world.switch.state is (S.CHANGED if is_started else S.UNDONE)
    assert world.worker("p-1").phases == (E if is_started else P) == world.process("p-1").phases


def test_a_worker_that_is_lost_with_its_controller_ends_the_switch() -> None:
    world = World()
    world.tick(wanted("d-1", P))
    world.machines.crash((WorkerId("d-1"), 1))
    restarted(world)
    world.tick()
    assert (world.switch.state, world.switch.reason) == (
        S.UNDONE,
        "its controller died before it ended; d-1 is lost",
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("want"), st.sampled_from(NAMES), st.sampled_from([P, D, P | D])),
            st.tuples(st.just("work"), st.sampled_from(NAMES), st.integers(0, 1)),
            st.tuples(st.sampled_from(["restart", "cut", "heal", "tick"]), st.none(), st.none()),
            st.tuples(st.just("crash"), st.sampled_from(NAMES), st.none()),
        ),
        max_size=25,
    )
)
def test_every_switch_has_an_end_however_often_controllers_die(steps: list[tuple[str, str, object]]) -> None:
    world, seen = World(), set[str]()
    for number, (what, name, value) in enumerate(steps):
        requests: tuple[SwitchRequest, ...] = ()
        match what:
            case "want":
                assert isinstance(value, frozenset)
                requests = (wanted(name, value, f"s{number}"),)
            case "work":
                for process in world.machines.processes.values():
                    if process.declared.worker_id == name and isinstance(value, int):
                        process.work = PhaseWork(num_decodes=value, num_prefills=value)
            case "crash":
                for (worker_id, _), process in world.machines.processes.items():
                    if worker_id == name:
                        process.exit_reason = "killed"
            case "restart" if world.is_reachable:
                # It starts from the view that the gateway has.
                restarted(world)
            case "cut" | "heal":
                world.is_reachable = what == "heal"
        before = {one.switch_id: one.state for one in world.plan.view.switches}
        world.tick(*requests, elapsed_s=0.5)
        now = {one.switch_id: one.state for one in world.plan.view.switches}
        seen |= now.keys()
        assert before.keys() <= now.keys()
        for switch_id, state in before.items():
            assert state in (S.LEAVING, S.CHANGING, S.CHANGED) or now[switch_id] is state
    world.is_reachable = True
    for process in world.machines.processes.values():
        process.work = PhaseWork()
    for _ in range(90):
        world.tick(elapsed_s=1.0)
    assert {one.switch_id for one in world.plan.view.switches} == seen
    assert not any(one.is_under_way for one in world.plan.view.switches)
    for worker in world.plan.view.workers:
        assert (worker.state, worker.leaving) == (LifecycleState.READY, frozenset())
        assert worker.phases == world.process(worker.worker_id).phases


def test_a_new_controller_believes_a_worker_that_has_changed() -> None:
    world = World()
    for _ in range(4):
        world.tick(wanted("d-1", P))
    world.state = recover(None, world.machines.reports(), world.config, world.now_s)
    world.tick()
    assert world.worker("d-1").phases == P


def test_one_request_is_carried_out_once() -> None:
    world = World()
    for _ in range(6):
        world.tick(wanted("d-1", P))
    assert [switch.switch_id for switch in world.plan.view.switches] == ["s1"]
    world.tick(wanted("d-1", D, "s2"))
    for _ in range(3):
        world.tick()
    assert [switch.state for switch in world.plan.view.switches] == [S.CHANGED, S.CHANGED]
    assert world.process("d-1").phase_epoch == 3


def test_what_a_switch_would_do() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick()
    found = forecast(world.plan.view, WorkerId("d-1"), P)
    assert (found.gives_up, found.gains, found.num_sequences, found.num_prompts, found.problem) == (
        D,
        P,
        2,
        0,
        "",
    )
    assert forecast(world.plan.view, WorkerId("d-1"), D).problem == "d-1 serves decode already"


@settings(max_examples=60)
@given(st.data())
def test_every_phase_keeps_a_worker_whatever_is_asked_for(data: st.DataObject) -> None:
    world = World()
    for number in range(data.draw(st.integers(1, 30))):
        for name in NAMES:
            num = data.draw(st.sampled_from([0, 0, 1]))
            world.process(name).work = PhaseWork(num_prefills=num, num_decodes=num)
        requests = []
        if data.draw(st.booleans()):
            phases = data.draw(st.sampled_from([P, D, P | D]))
            requests.append(wanted(data.draw(st.sampled_from(NAMES)), phases, f"s{number}"))
        world.tick(*requests, elapsed_s=data.draw(st.sampled_from([0.1, 3.0, 200.0])))
        workers = world.plan.view.workers
        assert {phase for worker in workers for phase in worker.phases} >= P | D
        for worker in workers:
            assert not worker.phases & worker.leaving
            # Nobody is used for what its process does not have.
            assert worker.phases <= world.process(worker.worker_id).phases or worker.leaving


def test_one_that_needs_a_new_process_keeps_the_last_of_another_phase() -> None:
    world = World(config_of(a_0=P | D, b_0=P))
    world.process("a-0").refusal = PhasesRefused("it would need memory for pictures", needs_new_process=True)
    world.process("a-0").work = PhaseWork(num_decodes=1)
    for _ in range(4):
        world.tick(wanted("a-0", D))
        assert world.worker("a-0").phases >= D
    assert (world.switch.state, world.switch.why) == (S.UNDONE, "more prompts")
    assert world.switch.reason == "no other worker that is ready serves decode; a-0 must keep it"


def test_one_whose_last_sibling_is_lost_on_the_way_stays() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    world.tick(wanted("d-1", P))
    world.machines.crash((WorkerId("d-0"), 1))
    world.tick()
    assert (world.switch.state, world.worker("d-1").phases) == (S.UNDONE, D)
    assert world.switch.reason == "no other worker that is ready serves decode; d-1 must keep it"


def test_one_that_had_changed_when_its_last_sibling_was_lost_changes_back() -> None:
    world = World()
    world.tick(wanted("d-1", P))
    world.tick()
    # It has been told, and its status has not been seen.
    world.machines.crash((WorkerId("d-0"), 1))
    for _ in range(2):
        world.process("d-1").is_mute = not world.process("d-1").is_mute
        world.tick()
    if world.switch.state is S.UNDONE:
        world.tick(elapsed_s=2.0)
        assert world.process("d-1").phases == D
    else:
        assert world.switch.state is S.CHANGED


def test_a_process_that_still_sends_is_not_replaced() -> None:
    world = World(config_of(e_0=E, e_1=E, p_0=P, p_1=P, d_0=D))
    world.process("p-1").refusal = PhasesRefused("it would need weights", needs_new_process=True)
    world.process("p-1").num_leases = 1
    world.tick(wanted("p-1", E))
    for _ in range(4):
        world.tick()
    assert world.switch.state is S.LEAVING
    world.process("p-1").num_leases = 0
    for _ in range(6):
        world.tick()
    assert (world.switch.state, world.worker("p-1").incarnation) == (S.CHANGED, 2)


def test_a_worker_that_has_the_phases_already_is_told_the_new_epoch() -> None:
    world = World()
    world.tick(wanted("d-1", P))
    process = world.process("d-1")
    world.tick()
    process.is_mute = True
    world.tick(elapsed_s=4.0)
    world.tick(elapsed_s=CHANGE_TIMEOUT_S + 1)
    process = world.process("d-1")
    process.is_mute = False
    for _ in range(6):
        world.tick()
    assert world.worker("d-1").phases in (P, D)
    world.tick(wanted("d-1", P, "s2"))
    for _ in range(5):
        world.tick()
    assert world.worker("d-1").phases == P


def test_the_effect_is_that_after_the_change() -> None:
    world = World()
    world.process("d-1").work = PhaseWork(num_decodes=2)
    totals = Totals(num_finished=100, num_met=50)
    world.tick(totals=totals)
    totals.num_finished, totals.num_met = 110, 55
    world.tick(wanted("d-1", P), totals=totals)
    assert world.switch.met_before == 0.5
    world.tick(elapsed_s=20.0, totals=totals)
    assert world.switch.met_after is None
    world.process("d-1").work = PhaseWork()
    world.tick(totals=totals)
    world.tick(totals=totals)
    totals.num_finished, totals.num_met = 120, 65
    world.tick(elapsed_s=OBSERVED_S + 0.1, totals=totals)
    assert world.switch.met_after == 1.0


def test_a_gateway_that_counts_anew_is_no_effect() -> None:
    world = World()
    world.tick(totals=Totals(num_finished=100, num_met=90))
    world.tick(wanted("d-1", P), totals=Totals(num_finished=2, num_met=1))
    assert world.switch.met_before is None


def test_a_new_process_that_is_known_to_be_needed_is_not_asked_for_at_the_worker() -> None:
    world = World(config_of(e_0=E, p_0=P | D, p_1=P | D))
    for process in world.machines.processes.values():
        process.loaded, process.takes_pictures = process.phases, True
    world.process("p-1").work = PhaseWork(num_decodes=1)
    world.tick()
    found = forecast(world.plan.view, WorkerId("p-1"), E)
    assert (found.needs_new_process, found.gives_up, found.about_s) == (True, P | D, 9.0)
    # It would get more than it has, and nobody else does what it does meanwhile.
    found = forecast(world.plan.view, WorkerId("e-0"), E | P)
    assert found.needs_new_process
    assert (
        found.problem
        == "no other worker that is ready serves encode; e-0 must keep it, and it would take a new process"
    )
    world.tick(wanted("p-1", E))
    assert (world.switch.state, world.switch.needs_new_process) == (S.LEAVING, True)
    assert world.worker("p-1").leaving == P | D
    world.process("p-1").work = PhaseWork()
    actions = [action for _ in range(6) for action in world.tick().actions]
    assert not [one for one in actions if isinstance(one, SetPhases)]
    assert (world.switch.state, world.worker("p-1").incarnation) == (S.CHANGED, 2)
    assert world.switch.change_s is not None
    # The next one is expected to take as long.
    for process in world.machines.processes.values():
        process.loaded, process.takes_pictures = process.phases, True
    world.tick()
    assert forecast(world.plan.view, WorkerId("p-1"), P).about_s == world.switch.change_s


def test_a_model_without_pictures_gets_no_process_that_encodes() -> None:
    world = World()
    for process in world.machines.processes.values():
        process.loaded = P | D
    world.tick()
    world.tick(wanted("d-1", E))
    assert (world.switch.state, world.worker("d-1").phases) == (S.UNDONE, D)
    assert "takes no pictures" in world.switch.reason
