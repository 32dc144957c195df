"""The open loop against an inference service in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from orchestrator.bench.load import LoadConfig, LoadProgress, OpenLoop
from orchestrator.bench.plan import PlannedRequest, prompt_token_ids
from orchestrator.bench.records import BROKEN_STREAM, INTERRUPTED, NOT_SENT, OK, LoadResult
from orchestrator.bench.trace import TraceRow
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.support.waiting import until

Answer = Callable[["FakeService", pb.GenerateRequest], AsyncIterator[pb.GenerateResponse]]


def message(*token_ids: int, first: int = 0, is_last: bool = False) -> pb.GenerateResponse:
    response = pb.GenerateResponse(token_ids=token_ids, first_token_index=first)
    if is_last:
        response.finish_reason = pb.FINISH_REASON_LENGTH
        response.timings.CopyFrom(pb.Timings(ttft_s=0.25, prefill_worker_id="p-0", attempts=1))
    return response


class FakeService(pb_grpc.InferenceServiceServicer):
    """Answers as `answer` says; counts what it sees."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[pb.GenerateRequest] = []
        self.num_cancelled = 0
        self.arrived = asyncio.Condition()

    async def Generate(  # type: ignore[override] # noqa: N802 - a coroutine that writes, as the gateway's
        self, request: pb.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        async with self.arrived:
            self.requests.append(request)
            self.arrived.notify_all()
        try:
            async for response in self.answer(self, request):
                await context.write(response)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        except Refusal as refusal:
            await context.abort(refusal.code, "as the test wants it")

    async def num_requests(self, number: int) -> None:
        """Until this many requests have arrived."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= number)


class Refusal(Exception):  # noqa: N818
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__(code)
        self.code = code


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[FakeService, "pb_grpc.InferenceServiceAsyncStub"]]:
    server = grpc.aio.server()
    service = FakeService(answer)
    pb_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield service, pb_grpc.InferenceServiceStub(channel)
    finally:
        await server.stop(None)


class Clock:
    """Time that only tests move."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plan(*output_tokens: int, arrivals_s: Sequence[float] | None = None) -> list[PlannedRequest]:
    return [
        PlannedRequest(TraceRow(i + 1, 0.0, 3, tokens), arrivals_s[i] if arrivals_s else 0.0, 3, tokens)
        for i, tokens in enumerate(output_tokens)
    ]


def open_loop(
    stub: "pb_grpc.InferenceServiceAsyncStub",
    *,
    stop: asyncio.Event | None = None,
    clock: Callable[[], float] | None = None,
    on_progress: Callable[[LoadProgress], None] = lambda progress: None,
    timeout_s: float = 60.0,
    max_in_flight: int = 100,
) -> OpenLoop:
    config = LoadConfig(vocab_size=1000, seed=5, timeout_s=timeout_s, max_in_flight=max_in_flight)
    return OpenLoop(
        stub, config, stop=stop or asyncio.Event(), clock=clock or Clock(), on_progress=on_progress
    )


def statuses(result: LoadResult) -> list[str]:
    return [record.status for record in result.records]


async def at_once(service: FakeService, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield message(*range(request.sampling.max_tokens), is_last=True)


async def never(service: FakeService, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield message(7)
    await asyncio.Event().wait()


def test_arrivals_never_wait_for_answers() -> None:
    async def when_all_have_come(
        service: FakeService, request: pb.GenerateRequest
    ) -> AsyncIterator[pb.GenerateResponse]:
        await service.num_requests(20)
        yield message(1, is_last=True)

    async def scenario() -> LoadResult:
        async with serving(when_all_have_come) as (_, stub):
            return await open_loop(stub).run(plan(*[1] * 20), 1.0)

    assert statuses(asyncio.run(scenario())) == [OK] * 20


def test_requests_carry_the_planned_tokens_and_lengths() -> None:
    async def scenario() -> list[pb.GenerateRequest]:
        async with serving(at_once) as (service, stub):
            await open_loop(stub).run(plan(4), 1.0)
            return service.requests

    (request,) = asyncio.run(scenario())
    assert list(request.token_ids.ids) == prompt_token_ids(TraceRow(1, 0.0, 3, 4), 3, vocab_size=1000, seed=5)
    assert request.sampling.max_tokens == 4
    assert request.sampling.ignore_eos


def test_token_times_count_from_sending_and_the_gateways_timings_are_kept() -> None:
    clock = Clock()

    async def later(service: FakeService, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        clock.now_s += 0.5
        yield message(1, 2, is_last=True)

    async def scenario() -> LoadResult:
        async with serving(later) as (_, stub):
            return await open_loop(stub, clock=clock).run(plan(2), 1.0)

    (record,) = asyncio.run(scenario()).records
    assert record.token_times_s == (0.5, 0.5)
    assert record.total_s == 0.5
    assert record.gateway is not None
    assert (record.gateway.ttft_s, record.gateway.kv_exposed_s) == (0.25, None)


def test_lateness_of_sending_is_measured_from_the_due_time() -> None:
    # Time jumps between the start and the first look at the request, which is due 1 s after the start.
    readings_s = iter([100.0])

    async def scenario() -> LoadResult:
        async with serving(at_once) as (_, stub):
            loop = open_loop(stub, clock=lambda: next(readings_s, 103.0))
            return await loop.run(plan(1, arrivals_s=[1.0]), 2.0)

    (record,) = asyncio.run(scenario()).records
    assert record.send_lag_s == 2.0


def test_errors_keep_their_status_and_harm_no_other_request() -> None:
    async def some_fail(
        service: FakeService, request: pb.GenerateRequest
    ) -> AsyncIterator[pb.GenerateResponse]:
        tokens = request.sampling.max_tokens
        if tokens == 2:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED)
        yield message(5)
        if tokens == 3:
            raise Refusal(grpc.StatusCode.UNAVAILABLE)
        if tokens == 4:
            yield message(6, first=2, is_last=True)
            return
        if tokens == 5:
            return
        yield message(*range(tokens - 1), first=1, is_last=True)

    async def scenario() -> tuple[LoadResult, list[int]]:
        seen = []
        async with serving(some_fail) as (_, stub):
            loop = open_loop(stub, on_progress=lambda now: seen.append(now.num_failed))
            return await loop.run(plan(1 + 9, 2, 3, 4, 5), 1.0), seen

    result, seen = asyncio.run(scenario())
    assert statuses(result) == [OK, "RESOURCE_EXHAUSTED", "UNAVAILABLE", BROKEN_STREAM, BROKEN_STREAM]
    assert result.records[1].message == "as the test wants it"
    assert len(result.records[0].token_times_s) == 10
    assert len(result.records[2].token_times_s) == 1
    assert max(seen) == 4


def test_a_request_that_never_ends_is_ended_by_its_deadline() -> None:
    async def scenario() -> LoadResult:
        async with serving(never) as (_, stub):
            return await open_loop(stub, timeout_s=0.05).run(plan(5), 1.0)

    assert statuses(asyncio.run(scenario())) == ["DEADLINE_EXCEEDED"]


def test_stop_cancels_what_runs_and_sends_no_more() -> None:
    async def scenario() -> tuple[LoadResult, FakeService]:
        stop = asyncio.Event()
        async with serving(never) as (service, stub):

            async def stop_after_two() -> None:
                await service.num_requests(2)
                stop.set()

            async with asyncio.TaskGroup() as group:
                group.create_task(stop_after_two())
                loop = open_loop(stub, stop=stop)
                run = group.create_task(loop.run(plan(5, 5, 5, arrivals_s=[0.0, 0.0, 1e6]), 2e6))
            await until(lambda: service.num_cancelled == 2, "both requests are cancelled at the service")
            return run.result(), service

    result, service = asyncio.run(scenario())
    assert statuses(result) == [INTERRUPTED, INTERRUPTED]
    assert result.was_interrupted
    assert result.arrivals_duration_s == 0.0
    assert len(service.requests) == 2


def test_stop_after_the_last_arrival_ends_the_waiting_too() -> None:
    async def scenario() -> LoadResult:
        stop = asyncio.Event()
        async with serving(never) as (service, stub):
            async with asyncio.TaskGroup() as group:
                run = group.create_task(open_loop(stub, stop=stop).run(plan(5), 3.0))
                await service.num_requests(1)
                stop.set()
            return run.result()

    result = asyncio.run(scenario())
    assert statuses(result) == [INTERRUPTED]


def test_above_the_bound_in_flight_a_request_is_not_sent_and_counts_as_failed() -> None:
    async def scenario() -> LoadResult:
        release = asyncio.Event()

        async def held(
            service: FakeService, request: pb.GenerateRequest
        ) -> AsyncIterator[pb.GenerateResponse]:
            await release.wait()
            yield message(1, is_last=True)

        async with serving(held) as (_, stub):
            loop = open_loop(stub, max_in_flight=1, on_progress=lambda now: release.set())
            return await loop.run(plan(1, 1), 1.0)

    result = asyncio.run(scenario())
    assert statuses(result) == [OK, NOT_SENT]
    assert result.records[1].send_lag_s is None


def test_cancelling_the_benchmark_from_outside_cancels_its_requests() -> None:
    async def scenario() -> None:
        async with serving(never) as (service, stub):
            run = asyncio.create_task(open_loop(stub).run(plan(5, 5), 1.0))
            await service.num_requests(2)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            await until(lambda: service.num_cancelled == 2, "both requests are cancelled at the service")

    asyncio.run(scenario())
