"""What is said of the workers while a deployment starts."""

from dataclasses import replace

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.runtime.readiness import describe
from workers.api import Phase, WorkerId, WorkerState, WorkerStatus

PHASES = frozenset({Phase.PREFILL})


def _view(*workers: WorkerView) -> ClusterView:
    return ClusterView("d", 1, 1, "m", workers)


def _worker(worker_id: str, state: LifecycleState, reason: str = "") -> WorkerView:
    return WorkerView(WorkerId(worker_id), 1, PHASES, state, reason=reason)


def test_without_a_view_the_controller_is_waited_for() -> None:
    assert describe(None) == "waiting for the controller"


def test_workers_that_do_the_same_are_named_together() -> None:
    ready = [_worker(f"p-{i}", LifecycleState.READY, "serves") for i in range(2)]
    lost = _worker("d-0", LifecycleState.LOST, "its process died")
    assert describe(_view(*ready, lost)) == "p-0, p-1: ready; d-0: its process died"


def test_a_worker_that_speaks_speaks_for_itself() -> None:
    worker = _worker("p-0", LifecycleState.STARTING, "waits for Ray to place and start it")
    status = WorkerStatus(
        worker.worker_id, 1, PHASES, WorkerState.LOADING, message="reading the model file 4%"
    )
    assert describe(_view(replace(worker, status=status))) == "p-0: reading the model file 4%"
