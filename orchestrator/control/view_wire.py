"""Messages of phasewise.control.v1 to and from `control.view`; protobuf objects go no further. Pure."""

from dataclasses import asdict

from orchestrator.control.policies.policy import Totals
from orchestrator.control.view import (
    ClusterView,
    LifecycleState,
    ScaleState,
    ScaleView,
    SwitchState,
    SwitchView,
    WorkerView,
)
from protos import control_pb2 as pb
from workers.api import WorkerId
from workers.status_wire import status_from_pb, status_to_pb
from workers.wire import phases_from_pb, phases_to_pb

_STATES = {
    LifecycleState.PENDING: pb.LIFECYCLE_STATE_PENDING,
    LifecycleState.STARTING: pb.LIFECYCLE_STATE_STARTING,
    LifecycleState.READY: pb.LIFECYCLE_STATE_READY,
    LifecycleState.LOST: pb.LIFECYCLE_STATE_LOST,
    LifecycleState.FAILED: pb.LIFECYCLE_STATE_FAILED,
}
_STATE_OF = {value: key for key, value in _STATES.items()}
_SWITCH_STATES = {
    SwitchState.LEAVING: pb.SWITCH_STATE_LEAVING,
    SwitchState.CHANGING: pb.SWITCH_STATE_CHANGING,
    SwitchState.CHANGED: pb.SWITCH_STATE_CHANGED,
    SwitchState.PROVEN: pb.SWITCH_STATE_PROVEN,
    SwitchState.UNDONE: pb.SWITCH_STATE_UNDONE,
}
_SWITCH_STATE_OF = {value: key for key, value in _SWITCH_STATES.items()}
_SCALE_STATES = {
    ScaleState.ASKED: pb.SCALE_STATE_ASKED,
    ScaleState.DONE: pb.SCALE_STATE_DONE,
    ScaleState.UNDONE: pb.SCALE_STATE_UNDONE,
}
_SCALE_STATE_OF = {value: key for key, value in _SCALE_STATES.items()}


def view_to_pb(view: ClusterView) -> pb.ClusterView:
    """The whole view."""
    return pb.ClusterView(
        deployment=view.deployment,
        controller_epoch=view.controller_epoch,
        version=view.version,
        model=view.model,
        workers=[_worker_to_pb(worker) for worker in view.workers],
        controller_pid=view.controller_pid,
        switches=map(switch_to_pb, view.switches),
        scales=map(scale_to_pb, view.scales),
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
        switches=tuple(map(switch_from_pb, message.switches)),
        scales=tuple(map(scale_from_pb, message.scales)),
    )


def scale_to_pb(scale: ScaleView) -> pb.ScaleView:
    """One decision about the number of workers."""
    return pb.ScaleView(
        scale_id=scale.scale_id,
        began_at_s=scale.began_at_s,
        num_before=scale.num_before,
        num_wanted=scale.num_wanted,
        state=_SCALE_STATES[scale.state],
        reason=scale.reason,
        why=scale.why,
        digest=scale.digest,
        predicted=scale.predicted,
        met_before=scale.met_before,
        met_after=scale.met_after,
    )


def scale_from_pb(message: pb.ScaleView) -> ScaleView:
    """One decision about the number of workers. A state of a newer version counts as asked."""
    return ScaleView(
        message.scale_id,
        message.began_at_s,
        message.num_before,
        message.num_wanted,
        _SCALE_STATE_OF.get(message.state, ScaleState.ASKED),
        message.reason,
        message.why,
        message.digest,
        message.predicted if message.HasField("predicted") else None,
        message.met_before if message.HasField("met_before") else None,
        message.met_after if message.HasField("met_after") else None,
    )


def switch_to_pb(switch: SwitchView) -> pb.SwitchView:
    """One change of phases."""
    return pb.SwitchView(
        switch_id=switch.switch_id,
        worker_id=switch.worker_id,
        before=phases_to_pb(switch.before),
        phases=phases_to_pb(switch.phases),
        state=_SWITCH_STATES[switch.state],
        reason=switch.reason,
        change_s=switch.change_s,
        first_step_s=switch.first_step_s,
        began_at_s=switch.began_at_s,
        predicted=switch.predicted,
        digest=switch.digest,
        met_before=switch.met_before,
        met_after=switch.met_after,
        why=switch.why,
        needs_new_process=switch.needs_new_process,
    )


def switch_from_pb(message: pb.SwitchView) -> SwitchView:
    """One change of phases. A state of a newer version counts as changing."""
    return SwitchView(
        switch_id=message.switch_id,
        worker_id=WorkerId(message.worker_id),
        before=phases_from_pb(message.before),
        phases=phases_from_pb(message.phases),
        state=_SWITCH_STATE_OF.get(message.state, SwitchState.CHANGING),
        reason=message.reason,
        change_s=message.change_s if message.HasField("change_s") else None,
        first_step_s=message.first_step_s if message.HasField("first_step_s") else None,
        began_at_s=message.began_at_s,
        predicted=message.predicted if message.HasField("predicted") else None,
        digest=message.digest,
        met_before=message.met_before if message.HasField("met_before") else None,
        met_after=message.met_after if message.HasField("met_after") else None,
        why=message.why,
        needs_new_process=message.needs_new_process,
    )


def totals_to_pb(totals: Totals) -> pb.Totals:
    """What a gateway has served."""
    return pb.Totals(**asdict(totals))


def totals_from_pb(message: pb.Totals) -> Totals:
    """What a gateway has served."""
    return Totals(
        message.num_requests,
        message.prompt_tokens,
        message.tiles,
        message.num_finished,
        message.output_tokens,
        message.num_met,
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
        leaving=phases_to_pb(worker.leaving),
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
        leaving=phases_from_pb(message.leaving),
    )
