"""Asks workers over gRPC how they are."""

import asyncio
from dataclasses import dataclass

import grpc.aio

from orchestrator.errors import WorkerUnreachable
from orchestrator.runtime.channel import open_channel
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServiceStub
from workers.api import PhaseSet, PhasesRefused, WorkerStatus
from workers.status_wire import status_from_pb
from workers.wire import phases_to_pb

#: A question that was not answered after this is asked anew, in seconds.
ANSWER_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Line:
    """The way to one worker, and the question that it has not answered yet."""

    channel: grpc.aio.Channel
    question: "asyncio.Task[WorkerStatus | None] | None" = None


class WorkerProbe:
    """Implements StatusProbe. Made in the loop in which it is used; `close` it there.

    timeout_s: how long one `probe` waits. A question that is not answered by then stays open and the next
    `probe` waits for it again: a worker that is slow because it is busy must not pass for a silent one.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # Bounded by `keep_only`: one for each process that lives.
        self._lines: dict[str, _Line] = {}

    async def probe(self, address: str) -> WorkerStatus | None:
        """What the worker at this address says; None when it does not, or not in time."""
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = _Line(open_channel(address))
        question = line.question
        if question is None:
            question = line.question = asyncio.create_task(_ask(line.channel))
        await asyncio.wait({question}, timeout=self._timeout_s)
        if not question.done():
            return None
        if line.question is question:
            line.question = None
        return None if question.cancelled() else question.result()

    async def set_phases(
        self, address: str, incarnation: int, phases: PhaseSet, phase_epoch: int
    ) -> PhasesRefused | None:
        """Tell the worker at this address what to serve; why it does not, if it says so. Raises WorkerUnreachable."""
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = _Line(open_channel(address))
        request = pb.SetPhasesRequest(
            incarnation=incarnation, phases=phases_to_pb(phases), phase_epoch=phase_epoch
        )
        try:
            answer = await WorkerServiceStub(line.channel).SetPhases(request, timeout=ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise WorkerUnreachable(address, error.details() or error.code().name) from error
        if not answer.problem:
            return None
        return PhasesRefused(answer.problem, answer.is_busy, answer.needs_new_process)

    async def keep_only(self, addresses: frozenset[str]) -> None:
        """Drop the lines to all other addresses."""
        gone = [self._lines.pop(address) for address in self._lines.keys() - addresses]
        for line in gone:
            if line.question is not None:
                line.question.cancel()
                await asyncio.wait({line.question})
            await line.channel.close()

    async def close(self) -> None:
        """Drop them all."""
        await self.keep_only(frozenset())


async def _ask(channel: grpc.aio.Channel) -> WorkerStatus | None:
    try:
        return status_from_pb(
            await WorkerServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=ANSWER_TIMEOUT_S)
        )
    except grpc.aio.AioRpcError:
        return None
