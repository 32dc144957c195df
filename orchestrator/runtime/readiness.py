"""Asks a gateway whether its deployment serves yet, and says what it waits for."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import grpc.aio

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.control.view_wire import view_from_pb
from orchestrator.errors import LaunchFailed
from orchestrator.runtime.channel import open_channel
from orchestrator.runtime.registry import RunningDeployment
from protos import control_pb2, inference_pb2
from protos.control_pb2_grpc import GatewayControlServiceStub
from protos.inference_pb2_grpc import InferenceServiceStub
from workers.api import WorkerId

if TYPE_CHECKING:  # the stubs' asynchronous forms exist for type checkers only
    from protos.control_pb2_grpc import GatewayControlServiceAsyncStub
    from protos.inference_pb2_grpc import InferenceServiceAsyncStub

#: A worker may convert its model first.
READY_TIMEOUT_S = 900.0
POLL_S = 0.1
RPC_TIMEOUT_S = 2.0

#: Told what is being done now; the text may grow a percentage.
Progress = Callable[[str], None]


async def wait_until_ready(
    running: RunningDeployment, progress: Progress, is_there: Callable[[], bool]
) -> None:
    """Until every declared worker is ready, or has failed and the others can serve without it.

    is_there: whether there is still something to wait for; asked when the gateway does not answer.
    Raises LaunchFailed when they cannot, when it takes too long, or when somebody stopped it.
    """
    async with (
        open_channel(running.control_address) as control_channel,
        open_channel(running.address) as channel,
    ):
        control, inference = GatewayControlServiceStub(control_channel), InferenceServiceStub(channel)
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            view = await _view(control)
            if view is None and not is_there():
                raise LaunchFailed(
                    "it was stopped while it started, or Ray broke down", "Start it again, or see Ray's logs"
                )
            progress(describe(view))
            if view is not None and _is_settled(view):
                if not view.is_ready:
                    raise LaunchFailed(_failures(view), "Correct the manifest or the machine and try again")
                if await _answers(inference):
                    return
            if time.monotonic() > deadline_s:
                problem = f"not ready after {READY_TIMEOUT_S:g} s: {describe(view)}"
                raise LaunchFailed(problem, "See `phasewise status` and Ray's logs")
            await asyncio.sleep(POLL_S)


async def has_gateway(control_address: str) -> bool:
    """Whether a gateway answers there."""
    async with open_channel(control_address) as channel:
        try:
            await GatewayControlServiceStub(channel).GetView(
                control_pb2.GetViewRequest(), timeout=RPC_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return False
        return True


def describe(view: ClusterView | None) -> str:
    """One line: what the workers are doing, those that do the same together."""
    if view is None:
        return "waiting for the controller"
    return _by_reason({worker.worker_id: _doing(worker) for worker in view.workers})


def _doing(worker: WorkerView) -> str:
    if worker.state is LifecycleState.READY:
        return "ready"
    told = worker.status.message if worker.status is not None else ""
    return told or worker.reason or worker.state


def _by_reason(reasons: Mapping[WorkerId, str]) -> str:
    """`prefill-0, prefill-1: ready; decode-0: loading`."""
    workers: dict[str, list[str]] = {}
    for worker_id, reason in reasons.items():
        workers.setdefault(reason, []).append(worker_id)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in workers.items())


async def _view(control: "GatewayControlServiceAsyncStub") -> ClusterView | None:
    try:
        response = await control.GetView(control_pb2.GetViewRequest(), timeout=RPC_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None
    return view_from_pb(response.view) if response.HasField("view") else None


async def _answers(inference: "InferenceServiceAsyncStub") -> bool:
    try:
        await inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=RPC_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return True


def _is_settled(view: ClusterView) -> bool:
    done = (LifecycleState.READY, LifecycleState.FAILED)
    return bool(view.workers) and all(worker.state in done for worker in view.workers)


def _failures(view: ClusterView) -> str:
    failed = (worker for worker in view.workers if worker.state is LifecycleState.FAILED)
    return _by_reason({worker.worker_id: worker.reason for worker in failed})
