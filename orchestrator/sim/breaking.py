"""Breaks processes, ways and the controller of a simulated cluster, as the faults say. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.sim.faults import Fault, FaultKind
from orchestrator.sim.network import CONTROLLER, GATEWAY, Host
from orchestrator.sim.worker import SimWorker

if TYPE_CHECKING:
    from orchestrator.sim.cluster import SimCluster


class Breaker:
    """Of one cluster, from its beginning to its end."""

    def __init__(self, cluster: "SimCluster", faults: Sequence[Fault]) -> None:
        self._cluster = cluster
        self._timers = cluster.timers
        self._network = cluster.network
        #: How long there is no controller, once it has ended in its next tick; None lets it live.
        self.no_controller_s: float | None = None
        for fault in faults:
            self._timers.call_at(fault.at_s, self._break, fault)

    def _break(self, fault: Fault) -> None:
        if fault.kind is FaultKind.CONTROLLER_CRASH:
            self.no_controller_s = fault.duration_s
            return
        if fault.kind is FaultKind.LOSS_OF_VIEWS:
            self._lose(CONTROLLER, [GATEWAY], fault)
            return
        living = self._cluster.living()
        process = next((one for one in living if one.spec.worker_id == fault.worker_id), None)
        if process is None:
            return
        match fault.kind:
            case FaultKind.CRASH:
                self._cluster.end(process)
            case FaultKind.PAUSE:
                process.pause(self._timers.now_s + fault.duration_s)
            case FaultKind.SLOW:
                process.slowdowns.append(fault.factor)
                self._timers.call_later(fault.duration_s, process.slowdowns.remove, fault.factor)
            case FaultKind.CUT_FROM_GATEWAY:
                self._cut(process, [GATEWAY], fault)
            case FaultKind.CUT_FROM_WORKERS:
                self._cut(process, self._others(process), fault)
            case FaultKind.LOSS_WITH_GATEWAY:
                process.stop_leap()
                self._lose(process.address, [GATEWAY], fault)
            case FaultKind.LOSS_WITH_WORKERS:
                self._lose(process.address, self._others(process), fault)

    def _others(self, process: SimWorker) -> list[Host]:
        return [one.address for one in self._cluster.living() if one is not process]

    def _cut(self, process: SimWorker, others: Sequence[Host], fault: Fault) -> None:
        process.stop_leap()
        for other in others:
            self._network.cut(process.address, other)
            self._timers.call_later(fault.duration_s, self._network.mend, process.address, other)

    def _lose(self, host: Host, others: Sequence[Host], fault: Fault) -> None:
        for other in others:
            self._network.make_lossy(host, other, fault.rate)
            self._timers.call_later(fault.duration_s, self._network.make_sound, host, other, fault.rate)
