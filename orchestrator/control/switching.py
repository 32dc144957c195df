"""Drives the switches of all workers in a controller's tick: what was seen becomes events, states become actions. Pure."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from orchestrator.control.plan import SetPhases
from orchestrator.control.policies.policy import Totals
from orchestrator.control.role_switch import (
    OBSERVED_S,
    TELL_AGAIN_S,
    RoleSwitch,
    SwitchEvent,
    SwitchRequest,
    phase_text,
    why_not,
)
from orchestrator.control.view import ClusterView, LifecycleState, SwitchState, SwitchView, WorkerView
from orchestrator.control.worker_machine import WorkerEvent, WorkerMachine
from workers.api import Phase, PhaseSet, PhasesRefused, WorkerId, WorkerStatus

#: Switches that are remembered, those under way not counted.
MAX_REMEMBERED = 32
NO_PHASES: PhaseSet = frozenset()
ORPHANED = "its controller died before it ended"


class Switching:
    """The phases that each worker is to have, and the switches between them.

    wanted: of each declared worker; a process is started with these. earlier: switches of a controller that died; what became of those
    that were under way its workers say.
    """

    def __init__(self, wanted: dict[WorkerId, PhaseSet], earlier: Sequence[SwitchView] = ()) -> None:
        self.wanted = wanted
        #: Workers that are to be given up altogether.
        self.retiring: frozenset[WorkerId] = frozenset()
        #: Of the last view that the gateway has.
        self.known_version = 0
        self._switches: dict[WorkerId, RoleSwitch] = {}
        self._ended: list[SwitchView] = [one for one in earlier if not one.is_under_way]
        self._seen: dict[str, None] = {one.switch_id: None for one in earlier}
        #: Those of a controller that died half-way.
        self._orphans: dict[WorkerId, SwitchView] = {}
        for one in earlier:
            if one.is_under_way and one.worker_id in wanted:
                self._orphans[one.worker_id] = one
            elif one.is_under_way:
                self._end(
                    replace(one, state=SwitchState.UNDONE, reason=f"{ORPHANED}; there is no such worker")
                )
        #: Time, requests that had finished, and those of them that met their targets.
        self._served: deque[tuple[float, int, int]] = deque()

    @property
    def is_under_way(self) -> bool:
        """Some worker is between two sets of phases."""
        return any(switch.is_under_way for switch in self._switches.values())

    def views(self) -> tuple[SwitchView, ...]:
        """The last ones, in the order in which they began."""
        present = sorted(self._switches.values(), key=lambda switch: switch.began_at_s)
        return (*self._ended, *self._orphans.values(), *(switch.view() for switch in present))

    def phases(self, machine: WorkerMachine) -> tuple[PhaseSet, PhaseSet]:
        """What a worker may be used for, and what it is giving up."""
        switch, wanted = self._switches.get(machine.worker_id), self.wanted[machine.worker_id]
        if machine.worker_id in self.retiring:
            return NO_PHASES, wanted
        if switch is None:
            return wanted, NO_PHASES
        if switch.is_under_way:
            return switch.usable, switch.leaving
        status = machine.status
        if status is not None and machine.state is LifecycleState.READY:
            # One that was undone may have changed all the same, until it has changed back.
            wanted &= status.phases
        return wanted, NO_PHASES

    def add(self, worker_id: WorkerId, phases: PhaseSet) -> None:
        """A worker that was not declared; its process begins with these."""
        self.wanted[worker_id] = phases

    def forget(self, worker_id: WorkerId, now_s: float) -> None:
        """A worker that was added is there no more."""
        del self.wanted[worker_id]
        self._end_orphan(worker_id, SwitchState.UNDONE, "it is given up")
        switch = self._switches.pop(worker_id, None)
        if switch is not None:
            # Else it would be under way for ever.
            switch.handle(SwitchEvent.LOST, f"{worker_id} is given up", now_s)
            self._end(switch.view())

    def served(self, machines: Iterable[WorkerMachine]) -> Mapping[Phase, int]:
        """How many workers which are ready serve each phase, and are not giving it up."""
        sets = Counter(self.phases(one)[0] for one in machines if one.state is LifecycleState.READY)
        return {phase: sum(num for phases, num in sets.items() if phase in phases) for phase in Phase}

    def observe(self, totals: Totals | None, now_s: float) -> None:
        """Follow what was served, and give each switch the part of the requests that met their targets after it."""
        if totals is None:
            return
        if self._served and totals.num_finished < self._served[-1][1]:
            # A new gateway counts anew.
            self._served.clear()
        self._served.append((now_s, totals.num_finished, totals.num_met))
        while len(self._served) > 2 and self._served[1][0] <= now_s - OBSERVED_S:
            self._served.popleft()
        for switch in self._switches.values():
            changed_at_s = switch.changed_at_s
            if changed_at_s is None or switch.met_after is not None:
                continue
            if changed_at_s + OBSERVED_S <= now_s < changed_at_s + 2 * OBSERVED_S:
                switch.met_after = self.met()

    def met(self) -> float | None:
        """Of the requests that finished in the last OBSERVED_S."""
        if not self._served:
            return None
        (_, finished_before, met_before), (_, finished, met) = self._served[0], self._served[-1]
        return (met - met_before) / (finished - finished_before) if finished > finished_before else None

    def begin(
        self,
        requests: Sequence[SwitchRequest],
        view: ClusterView,
        now_s: float,
        *,
        is_dry_run: bool = False,
    ) -> int:
        """Begin what may begin; what may not is remembered as undone, with the reason. view: as of this tick.

        Returns how many began.
        """
        num_begun = 0
        for request in requests:
            if request.switch_id in self._seen:
                continue
            self._remember(request.switch_id)
            problem = why_not(view, request.worker_id, request.phases)
            is_new = _needs_new_process(request, view)
            last = self._switches.get(request.worker_id)
            if problem is None and last is not None and last.is_under_way:
                problem = f"{request.worker_id} is changing its phases already"
            if problem is None and self._is_last_of_a_phase(request, view, is_new=is_new):
                problem = "another worker is giving up the same phase"
            if problem is None and is_dry_run:
                problem = f"dry run: {request.reason}"
            if problem is not None:
                before = self.wanted.get(request.worker_id, frozenset())
                refused = SwitchView(
                    request.switch_id,
                    request.worker_id,
                    before,
                    request.phases,
                    SwitchState.UNDONE,
                    problem,
                    why=request.reason,
                    began_at_s=now_s,
                    predicted=request.predicted,
                    digest=request.digest,
                    met_before=self.met(),
                    needs_new_process=is_new,
                )
                self._end(refused)
                continue
            worker = view.worker(request.worker_id)
            assert worker is not None
            number = 1 + (worker.status.phase_epoch if worker.status is not None else 0)
            if last is not None:
                # One that was undone may have used the next one too.
                number = max(number, last.phase_epoch + 2)
                self._end(last.view())
            before = self.wanted[request.worker_id]
            switch = RoleSwitch.begin(request, before, number, now_s, needs_new_process=is_new)
            switch.view_version = view.version
            switch.met_before = self.met()
            self._switches[request.worker_id] = switch
            num_begun += 1
        return num_begun

    def follow(
        self,
        machine: WorkerMachine,
        served: Mapping[Phase, int],
        status: WorkerStatus | None,
        refusal: PhasesRefused | None,
        now_s: float,
    ) -> SetPhases | None:
        """Tell the worker's switch what was seen of it, and what to tell the worker. May have its process replaced.

        served: see there.
        """
        switch = self._switches.get(machine.worker_id)
        if switch is None:
            self._believe(machine, status)
            return None
        own = self.phases(machine)[0] if machine.state is LifecycleState.READY else frozenset()
        others = frozenset(phase for phase, num in served.items() if num > (phase in own))
        self._follow(switch, machine, status, refusal, others, now_s)
        if machine.state is not LifecycleState.READY:
            return None
        if switch.needs_new_process or switch.state is SwitchState.LEAVING:
            return None
        wanted = (
            switch.request.phases if switch.state is SwitchState.CHANGING else self.wanted[machine.worker_id]
        )
        return self._tell(switch, machine, status, wanted, now_s)

    def _believe(self, machine: WorkerMachine, status: WorkerStatus | None) -> None:
        """What it serves an earlier controller may have changed, in a switch that it did not see the end of."""
        worker_id = machine.worker_id
        serves = status.phases if status is not None and machine.state is LifecycleState.READY else None
        if serves:
            self.wanted[worker_id] = serves
        orphan = self._orphans.get(worker_id)
        if orphan is None:
            # So it is with nearly all of them.
            return
        if serves:
            has_changed = serves == orphan.phases
            state = SwitchState.CHANGED if has_changed else SwitchState.UNDONE
            self._end_orphan(worker_id, state, f"{worker_id} serves {phase_text(serves)}")
        elif machine.state in (LifecycleState.LOST, LifecycleState.FAILED):
            self._end_orphan(worker_id, SwitchState.UNDONE, f"{worker_id} is {machine.state}")

    def _end_orphan(self, worker_id: WorkerId, state: SwitchState, reason: str) -> None:
        orphan = self._orphans.pop(worker_id, None)
        if orphan is not None:
            self._end(replace(orphan, state=state, reason=f"{ORPHANED}; {reason}"))

    def check_invariants(self) -> None:
        """Of each switch."""
        for worker_id, switch in self._switches.items():
            assert switch.request.worker_id == worker_id
            switch.check_invariants()
        assert all(self.wanted.values())
        assert self._orphans.keys() <= self.wanted.keys() - self._switches.keys()

    def _follow(
        self,
        switch: RoleSwitch,
        machine: WorkerMachine,
        status: WorkerStatus | None,
        refusal: PhasesRefused | None,
        others: PhaseSet,
        now_s: float,
    ) -> None:
        """others: phases that other workers serve."""
        if switch.is_under_way and self._is_lost(switch, machine):
            switch.handle(
                SwitchEvent.LOST, f"{machine.worker_id} is {machine.state}: {machine.reason}", now_s
            )
        if refusal is not None and switch.state is SwitchState.CHANGING:
            self._refused(switch, refusal, now_s)
        missing = switch.leaving - others
        if switch.is_under_way and missing and not self._is_being_replaced(switch):
            reason = f"no other worker that is ready serves {phase_text(missing)}"
            switch.handle(SwitchEvent.NEEDED, f"{reason}; {machine.worker_id} must keep it", now_s)
        if status is not None:
            self._heard(switch, machine, status, now_s)
        if switch.is_late(now_s):
            switch.handle(SwitchEvent.LATE, f"{switch.state} took too long: {_left(switch, status)}", now_s)
        if switch.state is SwitchState.UNDONE and switch.needs_new_process:
            self._replace_back(switch, machine, status)

    def _heard(self, switch: RoleSwitch, machine: WorkerMachine, status: WorkerStatus, now_s: float) -> None:
        # A process that is to end has to bring away what it sends as well.
        num_left = status.work.of(switch.leaving) + (status.num_leases if switch.needs_new_process else 0)
        # While the gateway does not know of it more may come.
        is_known = self.known_version >= switch.view_version
        if switch.state is SwitchState.LEAVING and num_left == 0 and is_known:
            left = phase_text(switch.leaving)
            reason = f"nothing needs {left} there any more" if left else "it gives nothing up"
            switch.handle(SwitchEvent.EMPTY, reason, now_s)
            if switch.needs_new_process:
                self.wanted[machine.worker_id] = switch.request.phases
                machine.handle(WorkerEvent.REPLACE, f"to serve {phase_text(switch.request.phases)}", now_s)
        elif switch.state is SwitchState.CHANGING and self._has_changed(switch, machine, status):
            switch.handle(SwitchEvent.CHANGED, switch.request.reason, now_s)
            self.wanted[machine.worker_id] = switch.request.phases
        elif switch.state is SwitchState.CHANGED and status.first_step_s is not None:
            assert switch.changed_at_s is not None
            # The worker counts from when it changed, a little before we heard of it.
            changed_s = (switch.told_at_s or switch.changed_at_s) - switch.began_at_s
            switch.first_step_s = changed_s + status.first_step_s
            switch.handle(SwitchEvent.FIRST_STEP, switch.request.reason, now_s)

    def _replace_back(self, switch: RoleSwitch, machine: WorkerMachine, status: WorkerStatus | None) -> None:
        """Its next process has the phases of before; one that has others already goes."""
        self.wanted[machine.worker_id] = switch.before
        if status is not None and status.phases != switch.before:
            reason = f"to serve {phase_text(switch.before)} again: {switch.reason}"
            machine.handle(WorkerEvent.REPLACE, reason, switch.state_since_s)

    def _is_lost(self, switch: RoleSwitch, machine: WorkerMachine) -> bool:
        if self._is_being_replaced(switch):
            return machine.state in (LifecycleState.LOST, LifecycleState.FAILED)
        return machine.state is not LifecycleState.READY

    def _is_being_replaced(self, switch: RoleSwitch) -> bool:
        return switch.needs_new_process and switch.state is SwitchState.CHANGING

    def _has_changed(self, switch: RoleSwitch, machine: WorkerMachine, status: WorkerStatus) -> bool:
        if switch.needs_new_process:
            return machine.state is LifecycleState.READY and status.phases == switch.request.phases
        return status.phase_epoch == switch.phase_epoch and status.phases == switch.request.phases

    def _refused(self, switch: RoleSwitch, refusal: PhasesRefused, now_s: float) -> None:
        if refusal.needs_new_process:
            switch.handle(SwitchEvent.NEEDS_NEW_PROCESS, refusal.reason, now_s)
        elif refusal.is_busy:
            switch.handle(SwitchEvent.NOT_EMPTY, refusal.reason, now_s)
        else:
            switch.handle(SwitchEvent.REFUSED, refusal.reason, now_s)

    def _tell(
        self,
        switch: RoleSwitch,
        machine: WorkerMachine,
        status: WorkerStatus | None,
        wanted: PhaseSet,
        now_s: float,
    ) -> SetPhases | None:
        """Also when a switch was undone and the worker had changed: it is to change back."""
        has_epoch = switch.state is not SwitchState.CHANGING or (
            status is not None and status.phase_epoch == switch.phase_epoch
        )
        if status is None or (status.phases == wanted and has_epoch):
            return None
        if switch.told_at_s is not None and now_s - switch.told_at_s < TELL_AGAIN_S:
            return None
        switch.told_at_s = now_s
        epoch = switch.phase_epoch + (switch.state is SwitchState.UNDONE)
        return SetPhases(
            machine.worker_id, machine.incarnation, machine.address, wanted, epoch, switch.reason
        )

    def _is_last_of_a_phase(self, request: SwitchRequest, view: ClusterView, *, is_new: bool) -> bool:
        """With those that began in this very tick, which the view does not show yet."""
        wanted = self.wanted[request.worker_id]
        for phase in wanted if is_new else wanted - request.phases:
            keeps = [
                worker.worker_id
                for worker in view.workers
                if worker.worker_id != request.worker_id
                and worker.state is LifecycleState.READY
                and phase in self._kept(worker)
            ]
            if not keeps:
                return True
        return False

    def _kept(self, worker: WorkerView) -> PhaseSet:
        switch = self._switches.get(worker.worker_id)
        return switch.usable if switch is not None and switch.is_under_way else worker.phases

    def _end(self, switch: SwitchView) -> None:
        self._ended.append(switch)
        del self._ended[:-MAX_REMEMBERED]

    def _remember(self, switch_id: str) -> None:
        self._seen[switch_id] = None
        if len(self._seen) > 4 * MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]


def _needs_new_process(request: SwitchRequest, view: ClusterView) -> bool:
    worker = view.worker(request.worker_id)
    return (
        worker is not None and worker.status is not None and worker.status.needs_new_process(request.phases)
    )


def _left(switch: RoleSwitch, status: WorkerStatus | None) -> str:
    if status is None:
        return "the worker says nothing"
    if switch.state is SwitchState.LEAVING and not status.work.of(switch.leaving):
        return "the gateway does not answer, and may give it more"
    if switch.state is SwitchState.LEAVING:
        return f"{status.work.of(switch.leaving)} requests there still need {phase_text(switch.leaving)}"
    return f"it serves {phase_text(status.phases)}"
