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


class SwitchState(StrEnum):
    """Where a worker is that takes other phases."""

    #: What it gives up goes elsewhere.
    LEAVING = "leaving"
    #: It has been told, or a new process takes its place.
    CHANGING = "changing"
    #: It has them.
    CHANGED = "changed"
    #: It has computed a step in a phase that it had not before.
    PROVEN = "proven"
    #: It keeps those that it had.
    UNDONE = "undone"


@dataclass(frozen=True, slots=True)
class SwitchView:
    """One change of a worker's phases.

    change_s: from its beginning until it had them; first_step_s: from its beginning to its first step in a phase that it had not
    before; None until then. began_at_s: on the controller's clock. predicted, digest: see SwitchRequest. met_before, met_after: part of
    the requests that met their targets, for a while before and after it; None until then, and where none finished.
    """

    switch_id: str
    worker_id: WorkerId
    before: PhaseSet
    phases: PhaseSet
    state: SwitchState
    #: Why it is in this state.
    reason: str
    #: Why it was wanted.
    why: str = ""
    change_s: float | None = None
    first_step_s: float | None = None
    began_at_s: float = 0.0
    predicted: float | None = None
    digest: str = ""
    met_before: float | None = None
    met_after: float | None = None
    #: A new process takes the place of the worker's.
    needs_new_process: bool = False

    @property
    def is_under_way(self) -> bool:
        """It has not come to an end, whichever."""
        return self.state in (SwitchState.LEAVING, SwitchState.CHANGING)


class ScaleState(StrEnum):
    """Where a decision about the number of workers is."""

    #: Nodes have been asked for, or a worker is being drained.
    ASKED = "asked"
    DONE = "done"
    #: No node came, or the worker stays.
    UNDONE = "undone"


@dataclass(frozen=True, slots=True)
class ScaleView:
    """One decision about the number of workers. began_at_s: on the controller's clock. digest: of what the policy saw.

    predicted, met_before, met_after: as of SwitchView; after it is when all are ready, or one has gone.
    """

    scale_id: str
    began_at_s: float
    num_before: int
    num_wanted: int
    state: ScaleState
    #: Why it is in this state, and why it was decided.
    reason: str
    why: str
    digest: str = ""
    predicted: float | None = None
    met_before: float | None = None
    met_after: float | None = None


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
    #: Phases that it still has and gives up: nothing new for these, and what is there goes elsewhere.
    leaving: PhaseSet = frozenset()


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All declared workers, and those that were added. (controller_epoch, version) grows; a smaller one is older."""

    deployment: str
    controller_epoch: int
    version: int
    #: Served model name.
    model: str
    workers: tuple[WorkerView, ...] = ()
    controller_pid: int = 0
    #: The last changes of phases, in the order in which they began.
    switches: tuple[SwitchView, ...] = ()
    #: The last decisions about the number of workers, in order.
    scales: tuple[ScaleView, ...] = ()

    def worker(self, worker_id: WorkerId) -> WorkerView | None:
        """The worker of this id, if it is declared."""
        return next((worker for worker in self.workers if worker.worker_id == worker_id), None)

    @property
    def is_ready(self) -> bool:
        """A request can pass through prefill and decode now."""
        served = {phase for w in self.workers if w.state is LifecycleState.READY for phase in w.phases}
        return {Phase.PREFILL, Phase.DECODE} <= served
