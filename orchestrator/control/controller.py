"""What to start and what to stop, so that every declared worker runs. Pure.

`decide` is called every tick with all that was seen. It changes the `ControllerState` it is given and
returns a `Plan`; nothing else is kept between ticks. One process of a worker is wanted at a time: the newest,
while it starts or is ready. Every other living process is stopped, whoever started it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from orchestrator.control.auto_switch import AutoSwitch, SwitchMode
from orchestrator.control.declared import DeclaredWorker
from orchestrator.control.observation import GatewayNews, Observation, ProcessKey, ProcessReport
from orchestrator.control.plan import Action, Plan, StartWorker, StopWorker
from orchestrator.control.resizing import Resizing
from orchestrator.control.scaling import Scaling
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.control.switching import Switching
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.control.worker_machine import WorkerEvent, WorkerMachine
from workers.api import PhaseSet, WorkerId, WorkerState, WorkerStatus

#: A stop that has not ended its process is asked for again after this, in seconds.
STOP_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What is declared, and how long a worker may be silent."""

    deployment: str
    #: Served model name.
    model: str
    declared: tuple[DeclaredWorker, ...]
    #: For a worker that is ready.
    heartbeat_timeout_s: float = 5.0
    #: For one that is being placed or loads; it speaks while it loads.
    startup_timeout_s: float = 300.0
    controller_pid: int = 0
    #: Epochs and incarnations up to this one may have been used, even where no view tells of them.
    used_up: int = 0
    #: Of every request, for switches that the controller wants itself.
    slo: Slo = NO_SLO
    switch_mode: SwitchMode = SwitchMode.OFF
    #: Workers that may be added when the load asks for more, those of `scaling`; none where their number is fixed.
    extra: tuple[DeclaredWorker, ...] = ()
    scaling: ScalingConfig | None = None


@dataclass(slots=True)
class ControllerState:
    """All that the controller remembers. Made by `recover`, changed by `decide` alone."""

    #: One for each declared worker, in the order of the manifest, then those that were added.
    machines: dict[WorkerId, WorkerMachine]
    epoch: int
    version: int = 0
    decided_at_s: float | None = None
    switching: Switching = field(default_factory=lambda: Switching({}))
    #: None in switch mode off.
    auto: AutoSwitch | None = None
    #: None where the number of workers is fixed.
    resizing: Resizing | None = None
    #: When the stop of a process that still lives was last asked for.
    stops_asked_at_s: dict[ProcessKey, float] = field(default_factory=dict)

    def check_invariants(self) -> None:
        """What holds between ticks."""
        for worker_id, machine in self.machines.items():
            assert machine.worker_id == worker_id
            machine.check_invariants()
        assert self.switching.wanted.keys() == self.machines.keys()
        self.switching.check_invariants()


def recover(
    last_view: ClusterView | None,
    processes: Iterable[ProcessReport],
    config: ControllerConfig,
    now_s: float,
) -> ControllerState:
    """The state of a controller that has just started, perhaps in the place of one that died.

    last_view: what the gateway has; None when no controller ever told it anything. Living processes are
    adopted, and a worker that was ready is ready until the first `decide` hears otherwise, so the gateway
    does not stop using it. No incarnation of the view or of the processes is used again; without a view, which
    tells of those that have gone, none up to `config.used_up` either.
    """
    reports = tuple(processes)
    # A process that the last view does not tell of is one that was to be ended.
    seen = (
        {report.worker_id for report in reports if report.is_alive}
        if last_view is None
        else {worker.worker_id for worker in last_view.workers}
    )
    added = [one for one in config.extra if one.worker_id in seen]
    present = (*config.declared, *added)
    state = ControllerState(
        machines={declared.worker_id: WorkerMachine(declared.worker_id) for declared in present},
        epoch=1 + (config.used_up if last_view is None else last_view.controller_epoch),
        switching=Switching(
            {declared.worker_id: _last_phases(last_view, declared) for declared in present},
            () if last_view is None else last_view.switches,
        ),
        auto=_auto_switch(config),
    )
    if config.scaling is not None:
        resources = {one.worker_id: one.resources for one in (*config.declared, *config.extra)}
        state.resizing = Resizing(Scaling(config.scaling), resources, state.epoch)
        scales = () if last_view is None else last_view.scales
        state.resizing.scaling.recover(scales, [one.worker_id for one in added], now_s)
    for machine in state.machines.values():
        if last_view is None:
            machine.saw_incarnation(config.used_up)
        own = [report for report in reports if report.worker_id == machine.worker_id]
        last = None if last_view is None else last_view.worker(machine.worker_id)
        newest = max(
            [report.incarnation for report in own] + ([] if last is None else [last.incarnation]), default=0
        )
        if newest > 0:
            _recover_worker(machine, newest, last, own, now_s)
    return state


def _auto_switch(config: ControllerConfig) -> AutoSwitch | None:
    if config.switch_mode is SwitchMode.OFF:
        return None
    block_sizes = {one.worker_id: one.engine.block_size for one in (*config.declared, *config.extra)}
    return AutoSwitch(config.slo, block_sizes, (one.phases for one in config.declared), config.scaling)


def _last_phases(last_view: ClusterView | None, declared: DeclaredWorker) -> PhaseSet:
    """Those that it had, or had before a switch that nobody follows any more."""
    last = last_view.worker(declared.worker_id) if last_view is not None else None
    return (last.phases | last.leaving if last is not None else None) or declared.phases


def _recover_worker(
    machine: WorkerMachine, newest: int, last: WorkerView | None, own: list[ProcessReport], now_s: float
) -> None:
    """Let the machine be where the last view and the processes say that the newest incarnation is."""
    machine.adopt(newest, "found by a new controller", now_s)
    if last is not None:
        machine.num_restarts = last.num_restarts + (newest > last.incarnation)
    ends = [report for report in own if report.incarnation == newest]
    is_alive = bool(ends) and all(report.is_alive for report in ends)
    last = last if last is not None and last.incarnation == newest else None
    if last is not None and last.state is LifecycleState.READY:
        machine.handle(WorkerEvent.HEARD_READY, "was ready when the controller restarted", now_s)
        machine.address, machine.status = last.address, last.status
    if is_alive:
        return
    if last is not None and last.state is LifecycleState.FAILED:
        machine.handle(WorkerEvent.HEARD_FAILED, last.reason or "had failed", now_s)
    else:
        why = next((report.exit_reason for report in ends if report.exit_reason), "its process was gone")
        machine.handle(WorkerEvent.EXITED, f"{why}, found by a new controller", now_s)


def decide(now_s: float, observation: Observation, state: ControllerState, config: ControllerConfig) -> Plan:
    """What to do now, and the view that the gateways are to have. Changes `state`."""
    elapsed_s = 0.0 if state.decided_at_s is None else max(0.0, now_s - state.decided_at_s)
    # A controller that was held up must not take its own deafness for the silence of the workers: one
    # look counts for half a timeout at most.
    listened_s = min(elapsed_s, config.heartbeat_timeout_s / 2)
    by_worker: dict[WorkerId, list[ProcessReport]] = {}
    for report in observation.processes:
        by_worker.setdefault(report.worker_id, []).append(report)

    for machine in state.machines.values():
        _follow_processes(machine, by_worker.get(machine.worker_id, []), now_s)
        status = observation.statuses.get((machine.worker_id, machine.incarnation))
        _follow_status(machine, status, listened_s, config, now_s)
    actions: list[Action] = []
    state.switching.known_version = observation.gateway.version
    served = state.switching.served(state.machines.values())
    for declared in (*config.declared, *config.extra):
        if declared.worker_id not in state.machines:
            continue
        machine = state.machines[declared.worker_id]
        key = machine.worker_id, machine.incarnation
        status, refusal = observation.statuses.get(key), observation.refusals.get(key)
        change = state.switching.follow(machine, served, status, refusal, now_s)
        start = _start_if_due(machine, declared, state.switching.wanted[machine.worker_id], now_s)
        actions += [one for one in (change, start) if one is not None]
    if state.resizing is not None:
        state.resizing.retire_drained(now_s, observation, state.machines, state.switching)
    stops = _stop_unwanted(observation.processes, state, now_s)
    state.decided_at_s = now_s
    state.version += 1
    state.switching.observe(observation.gateway.totals, now_s)
    view = _view(state, config)
    wanted = _begin_switches(now_s, view, observation.gateway, state, config)
    is_resized = _resize(now_s, view, state, has_moved=wanted)
    look = state.auto.last if state.auto is not None else None
    if state.resizing is not None:
        actions += state.resizing.tell_autoscaler(now_s, state.machines)
    return Plan((*stops, *actions), _view(state, config) if wanted or is_resized else view, look)


def _resize(now_s: float, view: ClusterView, state: ControllerState, *, has_moved: bool) -> bool:
    """Decide how many workers there are to be; whether anything is to change."""
    if state.resizing is None or state.auto is None:
        return False
    demand = state.auto.demand(view, has_moved=has_moved)
    before = state.resizing.scaling.num_decisions
    is_resized = state.resizing.tick(now_s, demand, view.version, state.machines, state.switching)
    if state.resizing.scaling.num_decisions > before:
        state.auto.tell()
    return is_resized


def _begin_switches(
    now_s: float, view: ClusterView, gateway: GatewayNews, state: ControllerState, config: ControllerConfig
) -> bool:
    """What somebody asked for, then what the controller wants itself; whether there was any of it."""
    switching = state.switching
    switching.begin(gateway.wanted_switches, view, now_s)
    wanted = state.auto.tick(now_s, view, gateway.totals) if state.auto is not None else ()
    if wanted and state.auto is not None:
        is_dry_run = config.switch_mode is SwitchMode.DRY_RUN
        if not switching.begin(wanted, view, now_s, is_dry_run=is_dry_run):
            state.auto.not_made(now_s)
    return bool(gateway.wanted_switches or wanted)


def _follow_processes(machine: WorkerMachine, reports: list[ProcessReport], now_s: float) -> None:
    """Tell the machine what the cluster says of its processes."""
    if len(reports) == 1 and reports[0].incarnation == machine.incarnation and reports[0].exit_reason is None:
        # So it is with nearly all of them.
        machine.is_listed = True
        _follow_placement(machine, reports[0], now_s)
        return
    ended: dict[int, str] = {}
    alive: dict[int, ProcessReport] = {}
    for report in reports:
        machine.saw_incarnation(report.incarnation)
        if report.exit_reason is None:
            alive[report.incarnation] = report
        else:
            ended[report.incarnation] = report.exit_reason
    newest = max(alive.keys() - ended.keys() if ended else alive, default=0)
    if newest > machine.incarnation:
        machine.adopt(newest, f"incarnation {newest} was started by somebody else", now_s)

    if machine.incarnation in ended:
        machine.is_listed = True
        machine.handle(
            WorkerEvent.EXITED, f"exited: {ended[machine.incarnation] or 'no reason given'}", now_s
        )
    elif machine.incarnation in alive:
        machine.is_listed = True
        _follow_placement(machine, alive[machine.incarnation], now_s)
    elif machine.is_listed:
        machine.handle(WorkerEvent.EXITED, "exited: its process is not listed any more", now_s)


def _follow_placement(machine: WorkerMachine, report: ProcessReport, now_s: float) -> None:
    if not machine.wants_process:
        return
    if not report.address:
        if report.detail and machine.status is None:
            machine.handle(WorkerEvent.PLACEMENT_REPORTED, report.detail, now_s)
    elif report.address != machine.address:
        moved = f"moved from {machine.address} to" if machine.address else "listens at"
        machine.handle(WorkerEvent.BOUND, f"{moved} {report.address}", now_s)
        machine.address = report.address


def _follow_status(
    machine: WorkerMachine,
    status: WorkerStatus | None,
    listened_s: float,
    config: ControllerConfig,
    now_s: float,
) -> None:
    """Tell the machine what the newest process said, or for how long it said nothing."""
    if not machine.wants_process:
        return
    if status is not None:
        machine.silent_s = 0.0
        machine.status = status
        match status.state:
            case WorkerState.LOADING:
                machine.handle(WorkerEvent.HEARD_LOADING, status.message or "loads its model", now_s)
            case WorkerState.READY:
                machine.handle(WorkerEvent.HEARD_READY, status.message or "serves", now_s)
            case WorkerState.FAILED:
                machine.handle(WorkerEvent.HEARD_FAILED, status.message or "gave no reason", now_s)
        return
    machine.silent_s += listened_s
    is_ready = machine.state is LifecycleState.READY
    timeout_s = config.heartbeat_timeout_s if is_ready else config.startup_timeout_s
    if machine.silent_s > timeout_s:
        doing = "" if is_ready else f" while it started ({machine.reason})"
        machine.handle(WorkerEvent.SILENT, f"silent for {machine.silent_s:.1f} s{doing}", now_s)


def _start_if_due(
    machine: WorkerMachine, declared: DeclaredWorker, phases: PhaseSet, now_s: float
) -> StartWorker | None:
    if not machine.wants_process and now_s >= machine.retry_at_s:
        machine.handle(WorkerEvent.RETRY_DUE, f"starts again: {machine.reason}", now_s)
    if machine.state is not LifecycleState.PENDING:
        return None
    machine.handle(WorkerEvent.PLACEMENT_ASKED, machine.reason, now_s)
    return StartWorker(replace(declared, phases=phases), machine.incarnation, machine.reason)


def _stop_unwanted(
    processes: tuple[ProcessReport, ...], state: ControllerState, now_s: float
) -> list[StopWorker]:
    """Stop every living process but the newest, wanted one of each declared worker."""
    unwanted: dict[ProcessKey, str] = {}
    for report in processes:
        if report.exit_reason is None:
            why = _why_unwanted(report, state.machines.get(report.worker_id))
            if why is not None:
                unwanted[report.key] = why
    asked_at_s = {key: at_s for key, at_s in state.stops_asked_at_s.items() if key in unwanted}
    due = [key for key in unwanted if now_s - asked_at_s.get(key, -math.inf) >= STOP_RETRY_S]
    state.stops_asked_at_s = asked_at_s | dict.fromkeys(due, now_s)
    return [StopWorker(*key, unwanted[key]) for key in due]


def _why_unwanted(report: ProcessReport, machine: WorkerMachine | None) -> str | None:
    if machine is None:
        return "no such worker is declared"
    if report.incarnation < machine.incarnation:
        loss = f": {machine.last_loss}" if machine.last_loss else ""
        return f"incarnation {machine.incarnation} takes its place{loss}"
    if not machine.wants_process:
        return f"{machine.state}: {machine.reason}"
    return None


def _view(state: ControllerState, config: ControllerConfig) -> ClusterView:
    """Grows with every tick, so that an age can be told from it."""
    return ClusterView(
        deployment=config.deployment,
        controller_epoch=state.epoch,
        version=state.version,
        model=config.model,
        workers=tuple(
            _worker_view(machine, *state.switching.phases(machine)) for machine in state.machines.values()
        ),
        controller_pid=config.controller_pid,
        switches=state.switching.views(),
        scales=state.resizing.scaling.views() if state.resizing is not None else (),
    )


def _worker_view(machine: WorkerMachine, phases: PhaseSet, leaving: PhaseSet) -> WorkerView:
    # A ready worker that missed the last look is still used; the view says how old its status is.
    is_silent = machine.state is LifecycleState.READY and machine.silent_s > 0
    return WorkerView(
        machine.worker_id,
        machine.incarnation,
        phases,
        machine.state,
        machine.address,
        f"silent for {machine.silent_s:.1f} s" if is_silent else machine.reason,
        machine.num_restarts,
        machine.status,
        leaving,
    )
