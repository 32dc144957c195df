"""Breaks processes, ways and the controller of a simulated cluster, as the faults say, and keeps what came of each. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import starmap
from typing import TYPE_CHECKING

from orchestrator.control.observation import ProcessKey
from orchestrator.control.view import ClusterView, LifecycleState
from orchestrator.sim.faults import Fault, FaultKind, FaultOutcome
from orchestrator.sim.network import CONTROLLER, GATEWAY, Host
from orchestrator.sim.worker import SimWorker

if TYPE_CHECKING:
    from orchestrator.sim.cluster import SimCluster


class Breaker:
    """Of one cluster, from its beginning to its end. start_s: on the cluster's clock, when that of the faults begins."""

    def __init__(self, cluster: "SimCluster", faults: Sequence[Fault], start_s: float) -> None:
        self._cluster = cluster
        self._timers = cluster.timers
        self._network = cluster.network
        self._start_s = start_s
        self._outcomes = [FaultOutcome(fault, "the run had ended") for fault in faults]
        #: Numbers of faults that the controller ends by in its next tick, and of those it has ended by, until another one begins.
        self._ends: list[int] = []
        self._ended: list[int] = []
        #: By numbers of faults: processes that have ended, until one that is READY has taken their place, and those that a fault lasts on.
        self._crashed: dict[int, ProcessKey] = {}
        self._broken: dict[int, SimWorker] = {}
        for number, fault in enumerate(faults):
            self._timers.call_at(start_s + fault.at_s, self._break, number, fault)

    def outcomes(self) -> tuple[FaultOutcome, ...]:
        """Of all faults, in their order, by now."""
        return tuple(starmap(self._by_now, enumerate(self._outcomes)))

    def _by_now(self, number: int, outcome: FaultOutcome) -> FaultOutcome:
        """What lasts is over with its process, and not yet if that is later."""
        over_at_s, process = outcome.over_at_s, self._broken.get(number)
        if over_at_s is None:
            return outcome
        if process is not None and process.ended_at_s is not None:
            over_at_s = min(over_at_s, process.ended_at_s - self._start_s)
        return replace(outcome, over_at_s=over_at_s if over_at_s <= self._now_s else None)

    def came(self, view: ClusterView) -> None:
        """The gateway has this view now."""
        for number, (worker_id, incarnation) in list(self._crashed.items()):
            worker = view.worker(worker_id)
            if (
                worker is not None
                and worker.incarnation > incarnation
                and worker.state is LifecycleState.READY
            ):
                del self._crashed[number]
                self._is_over(number, self._now_s)

    def controller_ends(self) -> float | None:
        """How long there is none, where it ends in this tick; None lets it live."""
        if not self._ends:
            return None
        faults = [self._outcomes[number].fault for number in self._ends]
        for number, fault in zip(self._ends, faults, strict=True):
            self._outcomes[number] = FaultOutcome(fault, "")
        self._ended += self._ends
        self._ends = []
        return faults[-1].duration_s

    def controller_began(self) -> None:
        """Another one, in place of one that has ended."""
        for number in self._ended:
            self._is_over(number, self._now_s)
        self._ended = []

    @property
    def _now_s(self) -> float:
        """On the clock of the faults."""
        return self._timers.now_s - self._start_s

    def _is_over(self, number: int, at_s: float) -> None:
        self._outcomes[number] = replace(self._outcomes[number], over_at_s=at_s)

    def _break(self, number: int, fault: Fault) -> None:
        if fault.kind is FaultKind.CONTROLLER_CRASH:
            self._ends.append(number)
            return
        why_not = self._do(number, fault)
        is_timed = not why_not and fault.kind is not FaultKind.CRASH
        self._outcomes[number] = FaultOutcome(
            fault, why_not, fault.at_s + fault.duration_s if is_timed else None
        )

    def _do(self, number: int, fault: Fault) -> str:
        """Returns why nothing is broken by it."""
        if fault.kind is FaultKind.LOSS_OF_VIEWS:
            self._lose(CONTROLLER, [GATEWAY], fault)
            return ""
        living = self._cluster.living()
        process = next((one for one in living if one.spec.worker_id == fault.worker_id), None)
        if process is None:
            return "no process of it lived"
        others = [one.address for one in living if one is not process]
        if fault.kind in (FaultKind.CUT_FROM_WORKERS, FaultKind.LOSS_WITH_WORKERS) and not others:
            return "no other worker lived"
        if fault.kind is not FaultKind.CRASH:
            self._broken[number] = process
        match fault.kind:
            case FaultKind.CRASH:
                self._crashed[number] = process.key
                self._cluster.end(process)
            case FaultKind.PAUSE:
                process.pause(self._timers.now_s + fault.duration_s)
            case FaultKind.SLOW:
                process.slowdowns.append(fault.factor)
                self._timers.call_later(fault.duration_s, process.slowdowns.remove, fault.factor)
            case FaultKind.CUT_FROM_GATEWAY:
                self._cut(process, [GATEWAY], fault)
            case FaultKind.CUT_FROM_WORKERS:
                self._cut(process, others, fault)
            case FaultKind.LOSS_WITH_GATEWAY:
                process.stop_leap()
                self._lose(process.address, [GATEWAY], fault)
            case FaultKind.LOSS_WITH_WORKERS:
                self._lose(process.address, others, fault)
        return ""

    def _cut(self, process: SimWorker, others: Sequence[Host], fault: Fault) -> None:
        process.stop_leap()
        for other in others:
            self._network.cut(process.address, other)
            self._timers.call_later(fault.duration_s, self._network.mend, process.address, other)

    def _lose(self, host: Host, others: Sequence[Host], fault: Fault) -> None:
        for other in others:
            self._network.make_lossy(host, other, fault.rate)
            self._timers.call_later(fault.duration_s, self._network.make_sound, host, other, fault.rate)
