"""The gRPC service of a worker over a session table without an engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServiceStub, add_WorkerServiceServicer_to_server
from tests.support.waiting import until
from tests.support.worker_client import submit
from workers.api import (
    Command,
    KvBlocksRemoved,
    KvBlocksStored,
    SubscribeKvEvents,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.service import WorkerService
from workers.sessions import SessionTable
from workers.wire import command_to_pb, kv_event_from_pb

INCARNATION = 3


@asynccontextmanager
async def session() -> AsyncIterator[tuple[SessionTable, list[Command], Any]]:
    """A table, the commands that it posts, and the stream of a gateway."""
    table, commands = SessionTable(), list[Command]()
    table.serve_with(commands.append, vocab_size=100)
    status = WorkerStatus(WorkerId("w"), INCARNATION, frozenset(), WorkerState.READY)
    server = grpc.aio.server()
    service = WorkerService(
        table, INCARNATION, status=lambda: status, model=lambda: None, shut_down=lambda: None
    )
    add_WorkerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = WorkerServiceStub(channel).Session()
            yield table, commands, call
            call.cancel()
    finally:
        await server.stop(None)


def test_kv_events_come_by_the_stream_that_asked_for_them() -> None:
    stored, removed = KvBlocksStored(b"p", (b"a", b"b")), KvBlocksRemoved((b"a",))

    async def scenario() -> None:
        async with session() as (table, commands, call):
            await call.write(pb.CommandBatch(commands=[command_to_pb(SubscribeKvEvents(), INCARNATION)]))
            await until(lambda: commands == [SubscribeKvEvents()], "the subscription")
            table.deliver_kv([stored, removed])
            batch = await call.read()
            assert batch.incarnation == INCARNATION
            assert [kv_event_from_pb(event) for event in batch.kv_events] == [stored, removed]
            assert not batch.events

    asyncio.run(scenario())


def test_a_grammar_of_a_newer_kind_is_refused_and_the_stream_goes_on() -> None:
    async def scenario() -> None:
        async with session() as (_, commands, call):
            newer = command_to_pb(submit([1], request_id="new"), INCARNATION)
            newer.submit.sampling.grammar.kind = 99  # type: ignore[assignment]
            known = command_to_pb(submit([1], request_id="known"), INCARNATION)
            await call.write(pb.CommandBatch(commands=[newer, known]))
            (event,) = (await call.read()).events
            assert (event.request_id, event.request_failed.code) == ("new", pb.FAILURE_CODE_INVALID)
            assert "sampling.grammar.kind: is 99" in event.request_failed.reason
            await until(lambda: len(commands) == 1, "the other request")

    asyncio.run(scenario())
