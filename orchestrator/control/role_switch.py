"""A worker takes other phases while requests run: the checks before it, and its machine. Pure.

What it gives up gets nothing new, and what is there goes elsewhere: prompts that wait go back to the gateway, sequences move with
their KV. Then the worker is told, or, where it would need other weights, a new process takes its place. It is used for what it has
gained as soon as it says that it has it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.control.policies.policy import FIRST_SWITCH_COST, SwitchCost
from orchestrator.control.view import ClusterView, LifecycleState, SwitchState, SwitchView, WorkerView
from workers.api import Phase, PhaseSet, WorkerId

#: How long it may take until a worker has changed, and how long a new process may take to be ready, in seconds.
CHANGE_TIMEOUT_S = 60.0
REPLACE_TIMEOUT_S = 300.0
#: The effect of a switch is looked at so long after the worker has changed, in seconds.
OBSERVED_S = 15.0
#: A worker that was told and has not changed is told again after this, in seconds.
TELL_AGAIN_S = 1.0


class SwitchEvent(StrEnum):
    """What can happen to a switch."""

    #: Nothing here needs what it gives up.
    EMPTY = "empty"
    #: A request came after all, since its gateway did not know yet.
    NOT_EMPTY = "not_empty"
    #: It can only be done by a new process.
    NEEDS_NEW_PROCESS = "needs_new_process"
    #: It will not.
    REFUSED = "refused"
    #: It says that it has the new phases.
    CHANGED = "changed"
    #: It has computed a step in a phase that it had not before.
    FIRST_STEP = "first_step"
    LATE = "late"
    #: No other worker serves what it gives up any more.
    NEEDED = "needed"
    #: Its process is gone, and was not ended by the switch.
    LOST = "lost"


_LEAVING, _CHANGING = SwitchState.LEAVING, SwitchState.CHANGING
_CHANGED, _PROVEN, _UNDONE = SwitchState.CHANGED, SwitchState.PROVEN, SwitchState.UNDONE

_ROWS: dict[SwitchEvent, tuple[SwitchState | None, ...]] = {
    # where it is:                  LEAVING    CHANGING   CHANGED   PROVEN  UNDONE
    SwitchEvent.EMPTY:             (_CHANGING, None,      None,     None,   None),
    SwitchEvent.NOT_EMPTY:         (None,      _LEAVING,  None,     None,   None),
    SwitchEvent.NEEDS_NEW_PROCESS: (None,      _LEAVING,  None,     None,   None),
    SwitchEvent.REFUSED:           (None,      _UNDONE,   None,     None,   None),
    SwitchEvent.CHANGED:           (None,      _CHANGED,  None,     None,   None),
    SwitchEvent.FIRST_STEP:        (None,      None,      _PROVEN,  None,   None),
    SwitchEvent.LATE:              (_UNDONE,   _UNDONE,   None,     None,   None),
    SwitchEvent.LOST:              (_UNDONE,   _UNDONE,   None,     None,   None),
    SwitchEvent.NEEDED:            (_UNDONE,   _UNDONE,   None,     None,   None),
}  # fmt: skip

#: Next state by (state, event), for every pair; None: the event changes nothing there.
TRANSITIONS: dict[tuple[SwitchState, SwitchEvent], SwitchState | None] = {
    (state, event): next_state
    for event, row in _ROWS.items()
    for state, next_state in zip(SwitchState, row, strict=True)
}


@dataclass(frozen=True, slots=True)
class SwitchRequest:
    """Somebody wants a worker to serve these phases. switch_id: a name that no other one has.

    predicted: goodput after it over that before, where a policy wants it; digest: of what the policy saw.
    """

    switch_id: str
    worker_id: WorkerId
    phases: PhaseSet
    reason: str
    predicted: float | None = None
    digest: str = ""


@dataclass(slots=True)
class RoleSwitch:
    """One switch of one worker. `handle` changes it; everything else is read. Times are the controller's clock, in seconds."""

    request: SwitchRequest
    #: That it had, and the number of the switch among those of this worker.
    before: PhaseSet
    phase_epoch: int
    began_at_s: float
    #: Version of the first view that tells of it.
    view_version: int = 0
    state: SwitchState = SwitchState.LEAVING
    #: Why it is in this state.
    reason: str = ""
    #: All that it has goes, since a new process takes its place.
    needs_new_process: bool = False
    state_since_s: float = 0.0
    told_at_s: float | None = None
    changed_at_s: float | None = None
    #: From the beginning to its first step in a phase that it had not before.
    first_step_s: float | None = None
    #: Part of the requests that met their targets, in OBSERVED_S before it and after the worker had changed; None where none finished.
    met_before: float | None = None
    met_after: float | None = None

    @classmethod
    def begin(
        cls,
        request: SwitchRequest,
        before: PhaseSet,
        phase_epoch: int,
        now_s: float,
        *,
        needs_new_process: bool = False,
    ) -> "RoleSwitch":
        """It begins now."""
        return cls(
            request,
            before,
            phase_epoch,
            now_s,
            reason=request.reason,
            needs_new_process=needs_new_process,
            state_since_s=now_s,
        )

    @property
    def is_under_way(self) -> bool:
        """It has not come to an end, whichever."""
        return self.state in (SwitchState.LEAVING, SwitchState.CHANGING)

    @property
    def leaving(self) -> PhaseSet:
        """What it gives up."""
        return self.before if self.needs_new_process else self.before - self.request.phases

    @property
    def usable(self) -> PhaseSet:
        """What it may be used for now."""
        if self.is_under_way:
            return self.before - self.leaving
        return self.before if self.state is SwitchState.UNDONE else self.request.phases

    def handle(self, event: SwitchEvent, reason: str, now_s: float) -> None:
        """Apply one event; `reason` says why it happened."""
        next_state = TRANSITIONS[self.state, event]
        if next_state is None:
            return
        if event is SwitchEvent.NEEDS_NEW_PROCESS:
            self.needs_new_process = True
        if next_state is SwitchState.LEAVING:
            self.told_at_s = None
        if next_state is SwitchState.CHANGED:
            self.changed_at_s = now_s
        self.state, self.reason, self.state_since_s = next_state, reason, now_s

    def is_late(self, now_s: float) -> bool:
        """It takes too long."""
        if self.needs_new_process and self.state is SwitchState.CHANGING:
            return now_s - self.state_since_s > REPLACE_TIMEOUT_S
        return self.is_under_way and now_s - self.began_at_s > CHANGE_TIMEOUT_S

    def view(self) -> SwitchView:
        """As others see it."""
        changed_at_s = self.changed_at_s
        return SwitchView(
            switch_id=self.request.switch_id,
            worker_id=self.request.worker_id,
            before=self.before,
            phases=self.request.phases,
            state=self.state,
            reason=self.reason,
            why=self.request.reason,
            change_s=None if changed_at_s is None else changed_at_s - self.began_at_s,
            first_step_s=self.first_step_s,
            began_at_s=self.began_at_s,
            predicted=self.request.predicted,
            digest=self.request.digest,
            met_before=self.met_before,
            met_after=self.met_after,
            needs_new_process=self.needs_new_process,
        )

    def check_invariants(self) -> None:
        """What holds between events."""
        assert self.reason
        assert not self.usable & self.leaving or not self.is_under_way
        assert (self.changed_at_s is not None) == (self.state in (SwitchState.CHANGED, SwitchState.PROVEN))


@dataclass(frozen=True, slots=True)
class SwitchForecast:
    """What a switch would do now. problem: why it must not be; empty when it may.

    num_prompts: that would go back and be computed elsewhere. num_sequences: that would move with their KV. needs_new_process: all that
    it serves goes, for a while. about_s: until it has them.
    """

    gives_up: PhaseSet = frozenset()
    gains: PhaseSet = frozenset()
    num_prompts: int = 0
    num_sequences: int = 0
    problem: str = ""
    needs_new_process: bool = False
    about_s: float = 0.0


def forecast(view: ClusterView, worker_id: WorkerId, phases: PhaseSet) -> SwitchForecast:
    """Of this worker and these phases, as the view has them."""
    worker = view.worker(worker_id)
    problem = why_not(view, worker_id, phases)
    if worker is None or worker.status is None:
        return SwitchForecast(problem=problem or "the worker has said nothing yet")
    gives_up, work = _gives_up(worker, phases), worker.status.work
    needs_new_process = worker.status.needs_new_process(phases)
    return SwitchForecast(
        gives_up,
        phases - worker.phases,
        num_prompts=work.num_prefills if Phase.PREFILL in gives_up else 0,
        num_sequences=work.num_decodes if Phase.DECODE in gives_up else 0,
        problem=problem or "",
        needs_new_process=needs_new_process,
        about_s=switch_cost(view.switches).of(needs_new_process=needs_new_process),
    )


def switch_cost(switches: Iterable[SwitchView]) -> SwitchCost:
    """The mean of those that came to an end, of each kind."""
    took_s: dict[bool, list[float]] = {False: [], True: []}
    for switch in switches:
        if switch.change_s is not None:
            took_s[switch.needs_new_process].append(switch.change_s)
    change_s, replace_s = took_s[False], took_s[True]
    default = FIRST_SWITCH_COST
    return SwitchCost(
        sum(change_s) / len(change_s) if change_s else default.change_s,
        sum(replace_s) / len(replace_s) if replace_s else default.replace_s,
    )


def _gives_up(worker: WorkerView, phases: PhaseSet) -> PhaseSet:
    """What nobody may use it for, from the beginning of a switch to these on."""
    if worker.status is not None and worker.status.needs_new_process(phases):
        return worker.phases
    return worker.phases - phases


def why_not(view: ClusterView, worker_id: WorkerId, phases: PhaseSet) -> str | None:
    """Why this worker must not take these phases now; None when it may.

    Each phase that it gives up must be served by another worker that is ready and keeps it.
    """
    worker = view.worker(worker_id)
    if worker is None:
        known = ", ".join(one.worker_id for one in view.workers)
        return f"no worker {worker_id!r} is declared; there are {known}"
    if not phases:
        return "no phase is named; a worker serves one at least"
    if worker.leaving or any(one.worker_id == worker_id and one.is_under_way for one in view.switches):
        return f"{worker_id} is changing its phases already"
    if worker.state is not LifecycleState.READY:
        return f"{worker_id} is {worker.state}: {worker.reason}"
    if worker.phases == phases:
        return f"{worker_id} serves {phase_text(phases)} already"
    status = worker.status
    if Phase.ENCODE in phases and status is not None and status.loaded and not status.takes_pictures:
        return "phases: this model takes no pictures, which encode is about"
    gives_up = _gives_up(worker, phases)
    for phase in Phase:
        if phase in gives_up and not _is_served(view, phase, without=worker_id):
            why = "" if phase not in phases else ", and it would take a new process"
            return f"no other worker that is ready serves {phase}; {worker_id} must keep it{why}"
    return None


def _is_served(view: ClusterView, phase: Phase, *, without: WorkerId) -> bool:
    return any(
        phase in worker.phases and worker.state is LifecycleState.READY
        for worker in view.workers
        if worker.worker_id != without
    )


def phase_text(phases: PhaseSet) -> str:
    """For messages: `prefill+decode`, in the order in which requests pass them."""
    return "+".join(phase.value for phase in Phase if phase in phases)
