"""The snapshot of the cluster that every decision starts from. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from workers.api import Phase, PhaseSet, WorkerId, WorkerStatus


class LifecycleState(StrEnum):
    """Where a declared worker is."""

    #: Not started yet.
    PENDING = "pending"
    #: The process is being placed, or loads its model.
    STARTING = "starting"
    READY = "ready"
    #: Its process is gone or silent; it will be started again.
    LOST = "lost"
    #: It cannot be started; tried again only from time to time.
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One declared worker as the controller last saw it."""

    worker_id: WorkerId
    incarnation: int
    phases: PhaseSet
    state: LifecycleState
    #: host:port; empty while there is no process.
    address: str = ""
    #: Why it is in this state.
    reason: str = ""
    num_restarts: int = 0
    status: WorkerStatus | None = None


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All declared workers. (controller_epoch, version) grows; a smaller one is older."""

    deployment: str
    controller_epoch: int
    version: int
    #: Served model name.
    model: str
    workers: tuple[WorkerView, ...] = ()
    controller_pid: int = 0

    def worker(self, worker_id: WorkerId) -> WorkerView | None:
        """The worker of this id, if it is declared."""
        return next((worker for worker in self.workers if worker.worker_id == worker_id), None)

    @property
    def is_ready(self) -> bool:
        """A request can pass through prefill and decode now."""
        served = {phase for w in self.workers if w.state is LifecycleState.READY for phase in w.phases}
        return {Phase.PREFILL, Phase.DECODE} <= served
