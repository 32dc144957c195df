"""What the controller wants done. Pure."""

from dataclasses import dataclass

from orchestrator.control.declared import DeclaredWorker
from orchestrator.control.view import ClusterView
from workers.api import WorkerId


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


Action = StartWorker | StopWorker


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in the order in which they are to begin, and the view that holds once they have."""

    actions: tuple[Action, ...]
    view: ClusterView
