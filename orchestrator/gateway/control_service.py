"""phasewise.control.v1.GatewayControlService: what the controller and the command line call."""

import asyncio
from typing import Any

import grpc
import grpc.aio

from orchestrator.control.record_wire import record_to_pb
from orchestrator.control.view_wire import view_from_pb, view_to_pb
from orchestrator.errors import PhasewiseOrchestratorError, UnknownRequest, UnknownWorker
from orchestrator.gateway.dispatcher import Dispatcher
from orchestrator.gateway.worker_ledgers import ask_ledgers
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceServicer
from workers.api import RequestId


class ControlService(GatewayControlServiceServicer):
    """deployment: name of ours; the view of another one is refused."""

    def __init__(self, deployment: str, dispatcher: Dispatcher) -> None:
        self._deployment = deployment
        self._dispatcher = dispatcher

    async def PublishView(  # noqa: N802
        self, request: pb.PublishViewRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.PublishViewResponse:
        """See the .proto."""
        if request.view.deployment != self._deployment:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the view is of deployment {request.view.deployment!r}; this gateway serves {self._deployment!r}",
            )
        view = view_from_pb(request.view)
        is_used = self._dispatcher.update_view(view)
        present = self._dispatcher.view
        # Two that started without a gateway to ask have the same epoch.
        is_of_another = present is not None and (
            (present.controller_epoch, present.controller_pid) != (view.controller_epoch, view.controller_pid)
        )
        return pb.PublishViewResponse(is_superseded=not is_used and is_of_another)

    async def GetView(  # noqa: N802
        self, _request: pb.GetViewRequest, _context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetViewResponse:
        """See the .proto."""
        dispatcher = self._dispatcher
        response = pb.GetViewResponse(
            num_running_requests=dispatcher.num_running,
            num_waiting_requests=dispatcher.num_waiting,
            num_finished_requests=dispatcher.num_finished,
            num_failed_requests=dispatcher.num_failed,
        )
        if dispatcher.view is not None:
            response.view.CopyFrom(view_to_pb(dispatcher.view))
            response.age_s = dispatcher.view_age_s
        return response

    async def GetKvLedger(  # noqa: N802
        self, request: pb.GetKvLedgerRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetKvLedgerResponse:
        """See the .proto."""
        view = self._dispatcher.view
        workers = view.workers if view is not None else ()
        if request.worker_id:
            declared = tuple(worker.worker_id for worker in workers)
            workers = tuple(worker for worker in workers if worker.worker_id == request.worker_id)
            if not workers:
                await _not_found(context, UnknownWorker(request.worker_id, declared))
        return pb.GetKvLedgerResponse(workers=await ask_ledgers(workers))

    async def Explain(  # noqa: N802
        self, request: pb.ExplainRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ExplainResponse:
        """See the .proto."""
        records = self._dispatcher.records
        record = records.get(RequestId(request.request_id))
        if record is None:
            await _not_found(context, UnknownRequest(request.request_id, records.max_records))
        assert record is not None
        return pb.ExplainResponse(record=record_to_pb(record, asyncio.get_running_loop().time()))


async def _not_found(
    context: "grpc.aio.ServicerContext[Any, Any]", error: PhasewiseOrchestratorError
) -> None:
    await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
