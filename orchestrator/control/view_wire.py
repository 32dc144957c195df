"""Messages of phasewise.control.v1 to and from `control.view`; protobuf objects go no further. Pure."""

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from protos import control_pb2 as pb
from workers.api import WorkerId
from workers.wire import phases_from_pb, phases_to_pb, status_from_pb, status_to_pb

_STATES = {
    LifecycleState.PENDING: pb.LIFECYCLE_STATE_PENDING,
    LifecycleState.STARTING: pb.LIFECYCLE_STATE_STARTING,
    LifecycleState.READY: pb.LIFECYCLE_STATE_READY,
    LifecycleState.LOST: pb.LIFECYCLE_STATE_LOST,
    LifecycleState.FAILED: pb.LIFECYCLE_STATE_FAILED,
}
_STATE_OF = {value: key for key, value in _STATES.items()}


def view_to_pb(view: ClusterView) -> pb.ClusterView:
    """The whole view."""
    return pb.ClusterView(
        deployment=view.deployment,
        controller_epoch=view.controller_epoch,
        version=view.version,
        model=view.model,
        workers=[_worker_to_pb(worker) for worker in view.workers],
        controller_pid=view.controller_pid,
    )


def view_from_pb(message: pb.ClusterView) -> ClusterView:
    """The whole view. A worker in a state of a newer version counts as lost: not usable, and not given up."""
    return ClusterView(
        deployment=message.deployment,
        controller_epoch=message.controller_epoch,
        version=message.version,
        model=message.model,
        workers=tuple(_worker_from_pb(worker) for worker in message.workers),
        controller_pid=message.controller_pid,
    )


def _worker_to_pb(worker: WorkerView) -> pb.WorkerView:
    return pb.WorkerView(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        phases=phases_to_pb(worker.phases),
        state=_STATES[worker.state],
        address=worker.address,
        reason=worker.reason,
        num_restarts=worker.num_restarts,
        status=None if worker.status is None else status_to_pb(worker.status),
    )


def _worker_from_pb(message: pb.WorkerView) -> WorkerView:
    return WorkerView(
        worker_id=WorkerId(message.worker_id),
        incarnation=message.incarnation,
        phases=phases_from_pb(message.phases),
        state=_STATE_OF.get(message.state, LifecycleState.LOST),
        address=message.address,
        reason=message.reason,
        num_restarts=message.num_restarts,
        status=status_from_pb(message.status) if message.HasField("status") else None,
    )
