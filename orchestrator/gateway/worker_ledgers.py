"""Asks workers who holds their KV blocks, each over a channel of its own."""

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio

from orchestrator.control.view import WorkerView
from protos import control_pb2 as pb
from protos import worker_pb2
from protos.worker_pb2_grpc import WorkerServiceStub

#: For the answer of each worker, in seconds.
ANSWER_TIMEOUT_S = 3.0
#: Workers that are asked at a time.
MAX_ASKED = 16
_CHANNEL_OPTIONS = (
    # Addresses are the cluster's own: no proxy.
    ("grpc.enable_http_proxy", 0),
    # An answer has an entry for each owner of blocks.
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),
)


async def ask_ledgers(workers: Sequence[WorkerView]) -> list[pb.WorkerLedger]:
    """One answer for each worker, in this order; one that does not answer has a problem in place of a ledger."""
    places = asyncio.Semaphore(MAX_ASKED)

    async def ask(worker: WorkerView) -> pb.WorkerLedger:
        async with places:
            return await _ask(worker)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(worker)) for worker in workers]
    return [task.result() for task in tasks]


async def _ask(worker: WorkerView) -> pb.WorkerLedger:
    answer = pb.WorkerLedger(worker_id=worker.worker_id, incarnation=worker.incarnation)
    if not worker.address:
        answer.problem = f"it is {worker.state}" + (f": {worker.reason}" if worker.reason else "")
        return answer
    async with grpc.aio.insecure_channel(worker.address, options=_CHANNEL_OPTIONS) as channel:
        try:
            ledger = await WorkerServiceStub(channel).GetKvLedger(
                worker_pb2.GetKvLedgerRequest(), timeout=ANSWER_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            answer.problem = f"{error.code().name}: {' '.join((error.details() or 'no reason').split())}"
            return answer
    # The port of a process that has gone may be another one's by now.
    if (ledger.worker_id, ledger.incarnation) != (worker.worker_id, worker.incarnation):
        answer.problem = f"incarnation {ledger.incarnation} of {ledger.worker_id!r} answers at its address"
    else:
        answer.ledger.CopyFrom(ledger)
    return answer
