"""The open loop: every request is sent when it is due, whatever became of those before it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from orchestrator.bench.plan import PlannedRequest, prompt_token_ids
from orchestrator.bench.records import (
    BROKEN_STREAM,
    INTERRUPTED,
    NOT_SENT,
    OK,
    GatewayTimings,
    LoadResult,
    RequestRecord,
)
from protos import inference_pb2 as pb

if TYPE_CHECKING:  # the stub's asynchronous form exists for type checkers only
    from protos.inference_pb2_grpc import InferenceServiceAsyncStub


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """How the load is sent, apart from what is in it."""

    vocab_size: int
    seed: int
    #: Deadline of each request.
    timeout_s: float
    #: Requests without an answer at a time; one more is NOT_SENT.
    max_in_flight: int


@dataclass(slots=True)
class LoadProgress:
    """How far the load is."""

    num_sent: int = 0
    num_finished: int = 0
    num_failed: int = 0


class OpenLoop:
    """Sends one plan once. When `stop` is set it sends no more and cancels what has no answer yet."""

    def __init__(
        self,
        stub: "InferenceServiceAsyncStub",
        config: LoadConfig,
        *,
        stop: asyncio.Event,
        clock: Callable[[], float],
        on_progress: Callable[[LoadProgress], None],
    ) -> None:
        self._stub = stub
        self._config = config
        self._stop = stop
        self._clock = clock
        self._on_progress = on_progress
        self._progress = LoadProgress()
        self._records: dict[int, RequestRecord] = {}
        self._calls: set[grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]] = set()
        self._num_in_flight = 0
        self._start_s = 0.0

    async def run(self, plan: Sequence[PlannedRequest], duration_s: float) -> LoadResult:
        """Send all of `plan`, which arrives within `duration_s`, and wait for every answer."""
        self._start_s = self._clock()
        watcher = asyncio.create_task(self._cancel_calls_on_stop())
        try:
            async with asyncio.TaskGroup() as group:
                for index, planned in enumerate(plan):
                    # Made before it is due, so that making it does not make it late.
                    request = self._request(planned)
                    await self._wait_until(planned.arrival_s)
                    if self._stop.is_set():
                        duration_s = min(duration_s, self._clock() - self._start_s)
                        break
                    if self._num_in_flight >= self._config.max_in_flight:
                        limit = f"{self._config.max_in_flight} requests are in flight"
                        self._record(index, RequestRecord(planned, NOT_SENT, limit))
                        continue
                    self._num_in_flight += 1
                    group.create_task(self._send(index, planned, request))
        finally:
            watcher.cancel()
        records = tuple(self._records[index] for index in sorted(self._records))
        return LoadResult(records, duration_s, self._clock() - self._start_s, self._stop.is_set())

    def _request(self, planned: PlannedRequest) -> pb.GenerateRequest:
        config = self._config
        token_ids = prompt_token_ids(
            planned.row, planned.prompt_tokens, vocab_size=config.vocab_size, seed=config.seed
        )
        sampling = pb.SamplingParams(max_tokens=planned.output_tokens, ignore_eos=True)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids), sampling=sampling)

    async def _wait_until(self, arrival_s: float) -> None:
        """Until that time or `stop`; lets others run also when it has passed."""
        delay_s = self._start_s + arrival_s - self._clock()
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(delay_s):
                await self._stop.wait()
        except TimeoutError:
            return

    async def _cancel_calls_on_stop(self) -> None:
        await self._stop.wait()
        for call in list(self._calls):
            call.cancel()

    async def _send(self, index: int, planned: PlannedRequest, request: pb.GenerateRequest) -> None:
        """One request to its end. Fails only when it is cancelled from outside."""
        if self._stop.is_set():
            self._num_in_flight -= 1
            return
        sent_s = self._clock()
        send_lag_s = sent_s - self._start_s - planned.arrival_s
        self._progress.num_sent += 1
        call = self._stub.Generate(request, timeout=self._config.timeout_s)
        self._calls.add(call)
        stream = _TokenStream()
        try:
            async for response in call:
                stream.take(response, self._clock() - sent_s)
            status, message = stream.outcome()
        except grpc.aio.AioRpcError as error:
            status, message = error.code().name, error.details() or ""
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise
            status, message = INTERRUPTED, "the benchmark was interrupted"
        finally:
            # Cancelled from outside before the request has left, the call would go on by itself.
            call.cancel()
            self._calls.discard(call)
            self._num_in_flight -= 1
        record = RequestRecord(
            planned=planned,
            status=status,
            message=message,
            send_lag_s=send_lag_s,
            token_times_s=tuple(stream.token_times_s),
            total_s=self._clock() - sent_s,
            gateway=stream.gateway,
        )
        self._record(index, record)

    def _record(self, index: int, record: RequestRecord) -> None:
        self._records[index] = record
        if record.status == OK:
            self._progress.num_finished += 1
        elif record.status != INTERRUPTED:
            self._progress.num_failed += 1
        self._on_progress(self._progress)


class _TokenStream:
    """Puts the messages of one answer together, and checks that it is whole."""

    def __init__(self) -> None:
        self.token_times_s: list[float] = []
        self.gateway: GatewayTimings | None = None
        self._problem = ""
        self._is_finished = False

    def take(self, response: pb.GenerateResponse, now_s: float) -> None:
        """Account for a message that came `now_s` after the request was sent."""
        if response.token_ids and response.first_token_index != len(self.token_times_s):
            self._problem = (
                f"token {response.first_token_index} came where {len(self.token_times_s)} was expected"
            )
        self.token_times_s += [now_s] * len(response.token_ids)
        self._is_finished = response.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        if response.HasField("timings"):
            self.gateway = _gateway_timings(response.timings)

    def outcome(self) -> tuple[str, str]:
        """Status and message of a stream that gRPC ended as OK."""
        if not self._problem and not (self._is_finished and self.token_times_s):
            self._problem = "the stream ended without a finish reason or without a token"
        return (BROKEN_STREAM, self._problem) if self._problem else (OK, "")


def _gateway_timings(timings: pb.Timings) -> GatewayTimings:
    return GatewayTimings(
        ttft_s=timings.ttft_s,
        queue_s=timings.queue_s,
        prefill_s=timings.prefill_s,
        kv_exposed_s=timings.kv_transfer.exposed_s if timings.HasField("kv_transfer") else None,
        prefill_worker_id=timings.prefill_worker_id,
        decode_worker_id=timings.decode_worker_id,
        attempts=timings.attempts,
    )
