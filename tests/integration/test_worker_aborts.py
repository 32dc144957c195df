"""Requests that end early, on one worker or two. Each leaves all blocks free and no lease; the helpers check that."""

import asyncio
import contextlib
import random
import threading
from pathlib import Path

import grpc
import grpc.aio
import pytest

from protos import worker_pb2 as pb
from tests.support.waiting import until
from tests.support.worker_client import (
    BOTH,
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    RunningWorker,
    StepGate,
    WorkerClient,
    at_start,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers import sessions
from workers.api import (
    FailureCode,
    Handoff,
    RequestFailed,
    WorkerState,
)
from workers.wire import command_to_pb
from workers.worker import Worker

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


@pytest.mark.parametrize("ends_by", ["abort", "session"])
@pytest.mark.parametrize("start", [0, 32, 100 + 2], ids=["first step", "mid prefill", "mid decode"])
def test_end_on_one_worker_frees_all(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, ends_by: str
) -> None:
    gate = StepGate(monkeypatch, at_start(start))

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, token_budget=SMALL_BUDGET)) as worker:
            await worker.send(submit(prompt(100), max_new_tokens=50))
            await gate.reached()
            await end(worker, ends_by)
            gate.open()
            await worker.assert_nothing_leaks()
            assert len(worker.tokens_of("r1")) <= 3

    asyncio.run(scenario())


@pytest.mark.parametrize("ends_by", ["abort", "session"])
def test_end_while_queued_frees_all(model_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str) -> None:
    gate = StepGate(monkeypatch, at_start(0))

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, max_running_sequences=1)) as worker:
            await worker.send(submit(prompt(20), request_id="first"))
            await gate.reached()
            await worker.send(submit(prompt(20), request_id="r1"))
            await end(worker, ends_by)
            gate.open()
            await worker.assert_nothing_leaks()
            assert not worker.events_of("r1")
            if ends_by == "abort":
                assert len(worker.tokens_of("first")) == 8

    asyncio.run(scenario())


async def end(worker: RunningWorker, ends_by: str) -> None:
    """End r1, and return once the worker has heard of it."""
    if ends_by == "abort":
        await worker.abort()
        # Commands are taken in order: the answer to this one says that the abort was taken.
        await worker.send(submit([], request_id="probe"))
        await worker.failure_of("probe")
    else:
        await worker.drop_session()
        await until(lambda: not worker.worker._sessions._sessions, "the end of the session")


@pytest.mark.parametrize("ends_at", ["prefill", "decode", "both"])
@pytest.mark.parametrize("ends_by", ["abort", "session"])
def test_end_in_mid_transfer_frees_all_on_both(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, ends_at: str, ends_by: str
) -> None:
    gate = StepGate(monkeypatch, at_start(64))

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET), worker_spec(model_path, DECODE)
        ) as (prefill, decode):
            to_prefill, to_decode = handed_off(submit(prompt(100)), decode)
            await decode.send(to_decode)
            await prefill.send(to_prefill)
            await gate.reached()
            await decode.wait_for_status(lambda status: status.blocks.leased > 0, "a lease at decode")
            if ends_at != "decode":
                await end(prefill, ends_by)
            if ends_at != "prefill":
                await end(decode, ends_by)
            gate.open()
            if ends_at == "decode":
                code, reason = await prefill.failure_of()
                assert code is FailureCode.TRANSFER
                assert "aborted" in reason
            if ends_at == "prefill":
                # The gateway would abort here too; without it the deadline does.
                await decode.abort()
            await prefill.assert_nothing_leaks()
            await decode.assert_nothing_leaks()

    asyncio.run(scenario())


def test_abort_while_the_transfer_waits_for_blocks_frees_all(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StepGate(monkeypatch, lambda plan: plan.slices[0].start == 24)

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL), worker_spec(model_path, BOTH, max_running_sequences=1)
        ) as (prefill, decode):
            # It fills decode's only place, and decode's steps stand still.
            await decode.send(submit(prompt(22), request_id="first"))
            await gate.reached()
            to_prefill, to_decode = handed_off(submit(prompt(40)), decode)
            await prefill.send(to_prefill)
            await prefill.wait_for_tokens("r1", 1)
            await decode.send(to_decode)
            await end(decode, "abort")
            gate.open()
            code, _reason = await prefill.failure_of()
            assert code is FailureCode.TRANSFER
            await prefill.assert_nothing_leaks()

    asyncio.run(scenario())


def test_many_requests_with_aborts_at_any_time_leave_nothing_behind(model_path: Path) -> None:
    """Decode has places for four at a time, so that transfers wait for blocks, too."""
    rng = random.Random(11)

    async def one(prefill: RunningWorker, decode: RunningWorker, i: int) -> None:
        request = submit(prompt(rng.randint(1, 120), seed=i), request_id=f"r{i}", max_new_tokens=10)
        to_prefill, to_decode = handed_off(request, decode, f"t{i}")
        orders = [(prefill, to_prefill), (decode, to_decode)]
        rng.shuffle(orders)
        for worker, order in orders:
            await worker.send(order)
        stage = rng.choice(["at once", "prefilled", "decoding", "never", "never"])
        if stage == "prefilled":
            await prefill.wait_for_tokens(f"r{i}", 1)
        elif stage == "decoding":
            await decode.wait_for_tokens(f"r{i}", 3)
        elif stage == "never":
            await decode.wait_for_tokens(f"r{i}", 9)
            return
        for worker in rng.sample([prefill, decode], 2):
            await worker.abort(f"r{i}")

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET),
            worker_spec(model_path, DECODE, max_running_sequences=4),
        ) as (prefill, decode):
            await asyncio.gather(*(one(prefill, decode, i) for i in range(60)))
            failed = [event for event in prefill.events + decode.events if isinstance(event, RequestFailed)]
            # Only what was aborted on one side first may fail on the other.
            assert {event.code for event in failed} <= {FailureCode.TRANSFER}

    asyncio.run(scenario())


def test_deadline_ends_a_decode_whose_kv_never_comes(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, DECODE)) as decode:
            request = submit(prompt(20), phases=DECODE, handoff=Handoff("t1"), timeout_s=0.2)
            await decode.send(request)
            assert (await decode.failure_of())[0] is FailureCode.DEADLINE

    asyncio.run(scenario())


def test_new_session_does_not_hear_of_an_old_ones_requests(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            await worker.send(submit(prompt(20), max_new_tokens=400))
            await worker.wait_for_tokens("r1", 2)
            other = WorkerClient(worker.address)
            # Of another session's request neither an abort nor a double may do anything.
            await other.abort()
            await other.send(submit(prompt(20)))
            assert (await other.failure_of())[0] is FailureCode.INVALID
            await worker.wait_for_tokens("r1", 10)
            await worker.drop_session()
            await worker.assert_nothing_leaks()
            assert len(other.events) == 1
            await other.close()

    asyncio.run(scenario())


def test_session_that_reads_nothing_is_ended_and_its_requests_aborted(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_PENDING_EVENTS", 1000)

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            silent = worker.stub.Session()
            running = submit(prompt(20), request_id="silent", max_new_tokens=480)
            refused = command_to_pb(submit([], request_id="x" * 250), 1)
            await silent.write(pb.CommandBatch(commands=[command_to_pb(running, 1)]))
            # More than the connection holds unread, then more than may wait.
            await silent.write(pb.CommandBatch(commands=[refused] * 900))
            await silent.write(pb.CommandBatch(commands=[refused] * 1001))
            await worker.wait_for_status(lambda status: status.num_running == 0, "the end of the request")
            await worker.assert_nothing_leaks()
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await silent.read() is not grpc.aio.EOF:
                    pass
            assert await silent.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(await worker.generate(submit(prompt(20)))) == 8

    asyncio.run(scenario())


def test_cancelled_worker_leaves_no_thread(model_path: Path) -> None:
    async def scenario() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        worker = Worker(worker_spec(model_path))
        serving = asyncio.create_task(worker.serve(on_bound=address.set_result, stop=asyncio.Event()))
        client = WorkerClient(await address)
        await client.wait_for_state(WorkerState.READY)
        await client.send(submit(prompt(20), max_new_tokens=400))
        await client.wait_for_tokens("r1", 1)
        serving.cancel()
        await asyncio.wait([serving])
        assert (await client.failure_of()) == (FailureCode.INTERNAL, "the worker is stopping")
        await client.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]

    asyncio.run(scenario())
