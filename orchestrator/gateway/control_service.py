"""phasewise.control.v1.GatewayControlService: what the controller and the command line call."""

import asyncio
import uuid
from typing import Any

import grpc
import grpc.aio

from orchestrator.control.record_wire import record_to_pb
from orchestrator.control.role_switch import SwitchRequest, forecast
from orchestrator.control.view_wire import switch_to_pb, totals_to_pb, view_from_pb, view_to_pb
from orchestrator.errors import PhasewiseOrchestratorError, UnknownRequest, UnknownWorker
from orchestrator.gateway.decision_log import DecisionLog
from orchestrator.gateway.dispatcher import Dispatcher
from orchestrator.gateway.wanted_switches import TAKEN_WITHIN_S, WantedSwitches
from orchestrator.gateway.worker_ledgers import ask_ledgers
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceServicer
from workers.api import RequestId, WorkerId
from workers.wire import phases_from_pb, phases_to_pb


class ControlService(GatewayControlServiceServicer):
    """deployment: name of ours; the view of another one is refused."""

    def __init__(self, deployment: str, dispatcher: Dispatcher) -> None:
        self._deployment = deployment
        self._dispatcher = dispatcher
        self._switches = WantedSwitches()
        self._decisions = DecisionLog()

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
        if not is_used:
            return pb.PublishViewResponse(is_superseded=is_of_another)
        self._switches.view_came(view)
        look = request.look if request.HasField("look") else None
        self._decisions.came(view, look, asyncio.get_running_loop().time())
        wanted = [
            pb.WantedSwitch(
                switch_id=one.switch_id,
                worker_id=one.worker_id,
                phases=phases_to_pb(one.phases),
                reason=one.reason,
            )
            for one in self._switches.untold()
        ]
        return pb.PublishViewResponse(wanted_switches=wanted, totals=totals_to_pb(self._dispatcher.totals))

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
            num_refused_requests=dispatcher.refusals.num,
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

    async def SwitchPhases(  # type: ignore[override] # noqa: N802 - a coroutine that writes is the third kind of handler
        self, request: pb.SwitchPhasesRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """See the .proto."""
        view, phases = self._dispatcher.view, phases_from_pb(request.phases)
        worker_id = WorkerId(request.worker_id)
        if view is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no controller has published a view yet")
        assert view is not None
        if view.worker(worker_id) is None:
            declared = tuple(worker.worker_id for worker in view.workers)
            await _not_found(context, UnknownWorker(worker_id, declared))
        if request.is_dry_run:
            found = forecast(view, worker_id, phases)
            message = pb.SwitchForecast(
                gives_up=phases_to_pb(found.gives_up),
                gains=phases_to_pb(found.gains),
                num_prompts=found.num_prompts,
                num_sequences=found.num_sequences,
                problem=found.problem,
                needs_new_process=found.needs_new_process,
                about_s=found.about_s,
            )
            await context.write(pb.SwitchProgress(forecast=message))
            return
        if self._switches.is_full:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many switches wait for the controller"
            )
        wanted = SwitchRequest(uuid.uuid4().hex[:12], worker_id, phases, request.reason or "asked for")
        try:
            async for switch in self._switches.follow(wanted):
                await context.write(pb.SwitchProgress(switch=switch_to_pb(switch)))
        except TimeoutError:
            reason = f"no controller has spoken of it for {TAKEN_WITHIN_S:g} s"
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)
        except LookupError:
            reason = "a new controller came and does not know of it; the status shows what the worker serves"
            await context.abort(grpc.StatusCode.ABORTED, reason)

    async def GetDecisions(  # noqa: N802
        self, request: pb.GetDecisionsRequest, _context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetDecisionsResponse:
        """See the .proto."""
        now_s = asyncio.get_running_loop().time()
        return self._decisions.answer(now_s, self._dispatcher.refusals, with_looks=request.with_looks)

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
