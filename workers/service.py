"""The gRPC service of a worker: commands and events of gateways, and questions of the controller."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from workers.api import (
    FailureCode,
    KvLedger,
    ModelInfo,
    PhaseSet,
    PhasesRefused,
    RequestFailed,
    RequestId,
    RequestKey,
    WorkerState,
    WorkerStatus,
)
from workers.kv_wire import ledger_to_pb
from workers.sessions import GatewaySession, SessionTable
from workers.status_wire import model_to_pb, status_to_pb
from workers.wire import command_from_pb, event_to_pb, kv_event_to_pb, phases_from_pb

logger = logging.getLogger(__name__)

#: Blocks of a prefix that are looked up at a time; nobody fetches more at once.
MAX_HASHES = 2048
BUSY = "the engine is in a step that does not end"

Context = Any  # grpc.aio.ServicerContext, whose methods the stubs type for one message type each


@dataclass(frozen=True, slots=True)
class PrefixFound:
    """Blocks of a chain that are cached here as they were computed, from its first on.

    num_host_blocks: of these, blocks in host memory. link_bytes_per_s: what the way to whoever asks carries, as last
    measured by sending; 0 when it is not known. kv_dtype, weight_dtype: as in kvtransfer.layout.KvLayout.
    """

    num_blocks: int
    num_host_blocks: int
    link_bytes_per_s: float
    kv_dtype: str
    weight_dtype: str


class WorkerService(pb_grpc.WorkerServiceServicer):
    """WorkerService over the sessions of one worker.

    status: what to report now. model: what is loaded, None until then. ledger: who holds which KV blocks, None while there
    is no engine; raises TimeoutError when it does not answer. find_prefix: looks a chain of blocks up for the worker at an address, likewise. set_phases: see
    Worker. shut_down: begins to end the process.
    """

    def __init__(
        self,
        sessions: SessionTable,
        incarnation: int,
        *,
        status: Callable[[], WorkerStatus],
        model: Callable[[], ModelInfo | None],
        ledger: Callable[[], Awaitable[KvLedger | None]],
        find_prefix: Callable[[tuple[bytes, ...], str], Awaitable[PrefixFound | None]],
        set_phases: Callable[[int, PhaseSet, int], Awaitable[PhasesRefused | None]],
        shut_down: Callable[[], None],
    ) -> None:
        self._sessions = sessions
        self._incarnation = incarnation
        self._status = status
        self._model = model
        self._ledger = ledger
        self._find_prefix = find_prefix
        self._set_phases = set_phases
        self._shut_down = shut_down

    # The stubs know answers by iteration only; a coroutine that writes them is the faster other way.
    async def Session(self, _requests: object, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Commands in, batches of events out, until either side ends it."""
        session = self._sessions.open()
        tasks = [
            asyncio.create_task(self._read(session, context)),
            asyncio.create_task(self._write(session, context)),
            asyncio.create_task(session.overflowed.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._sessions.close(session)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        if session.overflowed.is_set():
            logger.warning("session_overflowed peer=%s", context.peer())
            reason = "too many events wait to be read; the requests of this session were aborted"
            try:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            except grpc.aio.AbortError:
                raise
            except grpc.aio.BaseError:
                # The gateway went away without reading even that.
                return

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: Context) -> pb.WorkerStatus:  # noqa: N802
        """See the proto."""
        return status_to_pb(self._status())

    async def GetModel(self, _request: pb.GetModelRequest, context: Context) -> pb.Model:  # noqa: N802
        """See the proto."""
        model = self._model()
        if model is None:
            status = self._status()
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"the worker is {status.state}: {status.message}"
            )
        assert model is not None
        return model_to_pb(model)

    async def GetKvLedger(self, _request: pb.GetKvLedgerRequest, context: Context) -> pb.KvLedger:  # noqa: N802
        """See the proto."""
        try:
            ledger = await self._ledger()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, BUSY)
        status = self._status()
        if ledger is None:
            is_without = status.state is WorkerState.READY
            problem = (
                "it serves encode alone and has no KV"
                if is_without
                else f"the worker is {status.state}: {status.message}"
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        assert ledger is not None
        return ledger_to_pb(ledger, status.worker_id, status.incarnation)

    async def FindPrefix(  # noqa: N802
        self, request: pb.FindPrefixRequest, context: Context
    ) -> pb.FindPrefixResponse:
        """See the proto. Whoever asks waits as long as it likes: the engine forgets a question that was given up."""
        try:
            found = await self._find_prefix(tuple(request.block_hashes[:MAX_HASHES]), request.address)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, BUSY)
        if found is None:
            status = self._status()
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"the worker is {status.state}: {status.message}"
            )
        assert found is not None
        return pb.FindPrefixResponse(
            num_blocks=found.num_blocks,
            num_host_blocks=found.num_host_blocks,
            link_bytes_per_s=found.link_bytes_per_s,
            kv_dtype=found.kv_dtype,
            weight_dtype=found.weight_dtype,
        )

    async def SetPhases(  # noqa: N802
        self, request: pb.SetPhasesRequest, context: Context
    ) -> pb.SetPhasesResponse:
        """See the proto."""
        try:
            refused = await self._set_phases(
                request.incarnation, phases_from_pb(request.phases), request.phase_epoch
            )
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, BUSY)
        if refused is None:
            return pb.SetPhasesResponse()
        return pb.SetPhasesResponse(
            problem=refused.reason, is_busy=refused.is_busy, needs_new_process=refused.needs_new_process
        )

    async def Shutdown(self, _request: pb.ShutdownRequest, context: Context) -> pb.ShutdownResponse:  # noqa: N802
        """See the proto. The server's grace lets the answer out."""
        logger.info("shutdown_asked peer=%s", context.peer())
        self._shut_down()
        return pb.ShutdownResponse()

    async def _read(self, session: GatewaySession, context: Context) -> None:
        while (batch := await _read_batch(context)) is not None:
            for command in batch.commands:
                self._handle(session, command)

    async def _write(self, session: GatewaySession, context: Context) -> None:
        while news := await session.take():
            batch = pb.EventBatch(
                incarnation=self._incarnation,
                events=map(event_to_pb, news.events),
                kv_events=map(kv_event_to_pb, news.kv_events),
            )
            try:
                await context.write(batch)
            except (grpc.aio.BaseError, asyncio.InvalidStateError):
                # The gateway is gone.
                return

    def _handle(self, session: GatewaySession, command: pb.Command) -> None:
        kind = command.WhichOneof("command")
        work = command.encode if kind == "encode" else command.submit
        key = RequestKey(RequestId(work.request_id), work.attempt)
        if kind in ("submit", "encode") and work.incarnation != self._incarnation:
            reason = f"this is incarnation {self._incarnation}, not {work.incarnation}"
            session.put([RequestFailed(key, FailureCode.INTERNAL, reason)])
            return
        if kind == "submit" and len(phases_from_pb(command.submit.phases)) != len(set(command.submit.phases)):
            reason = f"phases: {list(command.submit.phases)} has values that this version does not know"
            session.put([RequestFailed(key, FailureCode.INVALID, reason)])
            return
        try:
            message = command_from_pb(command)
        except ValueError as error:
            session.put([RequestFailed(key, FailureCode.INVALID, str(error))])
            return
        if message is not None:
            self._sessions.handle(session, message)


async def _read_batch(context: Context) -> pb.CommandBatch | None:
    """None when the gateway has ended the stream, or is gone."""
    try:
        batch = await context.read()
    except (grpc.aio.BaseError, asyncio.InvalidStateError):
        return None
    return batch if isinstance(batch, pb.CommandBatch) else None
