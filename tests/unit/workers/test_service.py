"""The gRPC service of a worker over a session table without an engine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServiceStub, add_WorkerServiceServicer_to_server
from tests.support.waiting import until
from tests.support.worker_client import submit
from workers.api import (
    BlockCounts,
    Command,
    KvBlocksRemoved,
    KvBlocksStored,
    KvLedger,
    LedgerEntry,
    LedgerKind,
    Phase,
    PhaseSet,
    PhasesRefused,
    SubscribeKvEvents,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.kv_wire import ledger_from_pb
from workers.service import MAX_HASHES, PrefixFound, WorkerService
from workers.sessions import SessionTable
from workers.wire import command_to_pb, kv_event_from_pb

INCARNATION = 3


async def no_ledger() -> KvLedger | None:
    """There is no engine."""
    return None


async def find_prefix(block_hashes: tuple[bytes, ...], address: str) -> PrefixFound | None:
    """What is asked for decides."""
    match address:
        case "busy:1":
            raise TimeoutError
        case "early:1":
            return None
    return PrefixFound(len(block_hashes), 1, 5e8, "bfloat16", "fp8")


async def set_phases(incarnation: int, phases: PhaseSet, phase_epoch: int) -> PhasesRefused | None:
    """The epoch decides."""
    assert (incarnation, phases) == (INCARNATION, frozenset({Phase.DECODE}))
    match phase_epoch:
        case 1:
            return PhasesRefused("1 requests here still need {prefill}", is_busy=True)
        case 2:
            return PhasesRefused("it would need weights", needs_new_process=True)
        case 3:
            raise TimeoutError
    return None


@asynccontextmanager
async def serving(
    table: SessionTable, ledger: Callable[[], Awaitable[KvLedger | None]] = no_ledger
) -> AsyncIterator[Any]:
    """The service of a worker that is ready; a client's stub."""
    status = WorkerStatus(WorkerId("w"), INCARNATION, frozenset(), WorkerState.READY, message="it is well")
    server = grpc.aio.server()
    service = WorkerService(
        table,
        INCARNATION,
        status=lambda: status,
        model=lambda: None,
        ledger=ledger,
        find_prefix=find_prefix,
        set_phases=set_phases,
        shut_down=lambda: None,
    )
    add_WorkerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield WorkerServiceStub(channel)
    finally:
        await server.stop(None)


@asynccontextmanager
async def session() -> AsyncIterator[tuple[SessionTable, list[Command], Any]]:
    """A table, the commands that it posts, and the stream of a gateway."""
    table, commands = SessionTable(), list[Command]()
    table.serve_with(commands.append, vocab_size=100)
    async with serving(table) as stub:
        call = stub.Session()
        yield table, commands, call
        call.cancel()


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


async def _ask_ledger(ledger: Callable[[], Awaitable[KvLedger | None]]) -> pb.KvLedger | tuple[str, str]:
    async with serving(SessionTable(), ledger) as stub:
        try:
            answer = await stub.GetKvLedger(pb.GetKvLedgerRequest())
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or ""
        assert isinstance(answer, pb.KvLedger)
        return answer


def test_the_ledger_is_told_with_whose_it_is() -> None:
    known = KvLedger((LedgerEntry("r1", LedgerKind.SEQUENCE, 2),), BlockCounts(6, 0, 2, 0, 8))

    async def ledger() -> KvLedger:
        return known

    answer = asyncio.run(_ask_ledger(ledger))
    assert isinstance(answer, pb.KvLedger)
    assert ledger_from_pb(answer) == known
    assert (answer.worker_id, answer.incarnation) == ("w", INCARNATION)


def test_without_an_engine_there_is_no_ledger() -> None:
    assert asyncio.run(_ask_ledger(no_ledger)) == (
        "FAILED_PRECONDITION",
        "it serves encode alone and has no KV",
    )


def test_an_engine_that_does_not_answer_is_said_to_be_in_a_step() -> None:
    async def ledger() -> KvLedger:
        raise TimeoutError

    status, reason = asyncio.run(_ask_ledger(ledger))
    assert (status, reason) == ("DEADLINE_EXCEEDED", "the engine is in a step that does not end")


async def _find(num_hashes: int, address: str) -> pb.FindPrefixResponse | str:
    async with serving(SessionTable()) as stub:
        try:
            answer = await stub.FindPrefix(
                pb.FindPrefixRequest(block_hashes=[b"x"] * num_hashes, address=address)
            )
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        assert isinstance(answer, pb.FindPrefixResponse)
        return answer


def test_what_is_cached_of_a_prefix_is_told() -> None:
    answer = pb.FindPrefixResponse(
        num_blocks=3, num_host_blocks=1, link_bytes_per_s=5e8, kv_dtype="bfloat16", weight_dtype="fp8"
    )
    assert asyncio.run(_find(3, "w:1")) == answer


def test_more_than_anybody_fetches_is_not_looked_up() -> None:
    answer = asyncio.run(_find(MAX_HASHES + 1, "w:1"))
    assert isinstance(answer, pb.FindPrefixResponse)
    assert answer.num_blocks == MAX_HASHES


def test_an_engine_that_cannot_look_says_why() -> None:
    assert asyncio.run(_find(1, "busy:1")) == "DEADLINE_EXCEEDED"
    assert asyncio.run(_find(1, "early:1")) == "FAILED_PRECONDITION"


def test_other_phases_are_taken_or_refused_with_the_reason() -> None:
    async def scenario() -> None:
        def request(phase_epoch: int) -> pb.SetPhasesRequest:
            return pb.SetPhasesRequest(
                incarnation=INCARNATION, phases=[pb.PHASE_DECODE], phase_epoch=phase_epoch
            )

        async with serving(SessionTable()) as stub:
            assert await stub.SetPhases(request(4)) == pb.SetPhasesResponse()
            busy = await stub.SetPhases(request(1))
            assert (busy.problem, busy.is_busy) == ("1 requests here still need {prefill}", True)
            other = await stub.SetPhases(request(2))
            assert (other.problem, other.needs_new_process) == ("it would need weights", True)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SetPhases(request(3))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    asyncio.run(scenario())
