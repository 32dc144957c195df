"""What the controller wants done. Pure."""

from dataclasses import dataclass

from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.look import Look
from orchestrator.control.view import ClusterView
from workers.api import PhaseSet, WorkerId


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start this incarnation of a declared worker; there was none of that number before."""

    declared: DeclaredWorker
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End this process. It may be gone already, or of no declared worker."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class SetPhases:
    """Tell a worker to serve these phases from now on. phase_epoch: the number of the switch among those of this worker."""

    worker_id: WorkerId
    incarnation: int
    address: str
    phases: PhaseSet
    phase_epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class RequestResources:
    """Tell the cluster's autoscaler what all workers together need; it takes the place of what was told before."""

    workers: tuple[WorkerResources, ...]
    reason: str


Action = StartWorker | StopWorker | SetPhases | RequestResources


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in the order in which they are to begin, and the view that holds once they have."""

    actions: tuple[Action, ...]
    view: ClusterView
    #: What the policy for phases saw, when it is to be told.
    look: Look | None = None
