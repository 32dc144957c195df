"""Workers in the test's own loop, and a gateway's end of their gRPC service."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from tests.support.tiny_model import EOS_TOKEN_ID
from tests.support.waiting import until
from workers.api import (
    Abort,
    Command,
    EngineConfig,
    Event,
    FailureCode,
    Handoff,
    KvEvent,
    KvTransferConfig,
    Phase,
    PhaseSet,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
    WorkerId,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
)
from workers.engine.runner import ModelRunner
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.status_wire import status_from_pb
from workers.wire import command_to_pb, event_from_pb, kv_event_from_pb
from workers.worker import Worker

#: Nothing that a test waits for takes this long on a working machine.
PATIENCE_S = 30.0
#: But a worker's first start on a GPU, which compiles kernels.
START_PATIENCE_S = 100.0
PREFILL, DECODE = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
BOTH = PREFILL | DECODE
#: Of a worker whose prompts are to take several chunks.
SMALL_BUDGET = 32
#: KV of the tests' tiny model: three layers, K and V, 16 tokens, 2 KV heads of 16 dimensions, fp32.
BLOCK_BYTES = 3 * 2 * 16 * 2 * 16 * 4


def worker_spec(
    model: Path | str,
    phases: PhaseSet = BOTH,
    *,
    incarnation: int = 1,
    kv_cache_bytes: int = 2 * 2**20,
    lease_s: float = 20.0,
    layer_group_size: int = 1,
    **engine: float,
) -> WorkerSpec:
    """A small worker; 2 MiB hold 170 blocks of 16 tokens of a tiny model with three layers."""
    return WorkerSpec(
        worker_id=WorkerId("-".join(sorted(phases)) + "-0"),
        incarnation=incarnation,
        phases=phases,
        model_source=str(model),
        engine=EngineConfig(kv_cache_bytes=kv_cache_bytes, **engine),  # type: ignore[arg-type]
        kv_transfer=KvTransferConfig(lease_s=lease_s, layer_group_size=layer_group_size),
    )


def submit(
    token_ids: Sequence[int],
    *,
    request_id: str = "r1",
    attempt: int = 1,
    phases: PhaseSet = BOTH,
    max_new_tokens: int = 8,
    timeout_s: float = PATIENCE_S,
    handoff: Handoff | None = None,
    stop_token_ids: Iterable[int] = (),
) -> Submit:
    """A greedy request."""
    return Submit(
        key=RequestKey(RequestId(request_id), attempt),
        phases=phases,
        token_ids=tuple(token_ids),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=frozenset(stop_token_ids)),
        timeout_s=timeout_s,
        handoff=handoff,
    )


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random tokens of the tiny model's, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 384, (num_tokens,), generator=generator).tolist()
    return token_ids


def greedy_submit(length: int, max_new_tokens: int = 12) -> Submit:
    """For a prompt of this length; the request is named after it."""
    return submit(
        prompt(length),
        request_id=f"r{length}",
        max_new_tokens=max_new_tokens,
        stop_token_ids={EOS_TOKEN_ID},
    )


async def eventually(
    condition: Callable[[], Awaitable[object]], what: str, patience_s: float = PATIENCE_S
) -> None:
    """Return once it is true; fail with what was waited for."""
    try:
        async with asyncio.timeout(patience_s):
            while not await condition():  # noqa: ASYNC110 - the condition lies in another process or thread
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"waited {patience_s:g} s for: {what}")


class WorkerClient:
    """One gateway's session with one worker, and the unary calls."""

    def __init__(self, address: str, incarnation: int = 1) -> None:
        self.address = address
        self.incarnation = incarnation
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = pb_grpc.WorkerServiceStub(self.channel)
        self.session = self.stub.Session()
        self.events: list[Event] = []
        #: Only after SubscribeKvEvents.
        self.kv_events: list[KvEvent] = []
        self.batch_sizes: list[int] = []
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def send(self, *commands: Command) -> None:
        """All in one message."""
        await self.send_raw(*(command_to_pb(command, self.incarnation) for command in commands))

    async def send_raw(self, *commands: pb.Command) -> None:
        # A stream takes one write at a time.
        async with self._writing:
            await self.session.write(pb.CommandBatch(commands=commands))

    async def abort(self, request_id: str = "r1", attempt: int = 1) -> None:
        await self.send(Abort(RequestKey(RequestId(request_id), attempt)))

    def events_of(self, request_id: str) -> list[Event]:
        return [event for event in self.events if event.key.request_id == request_id]

    def tokens_of(self, request_id: str) -> list[int]:
        """Checks that each position comes once, in order."""
        tokens: list[int] = []
        first_position = None
        for event in self.events_of(request_id):
            if isinstance(event, TokensGenerated):
                first_position = event.first_position if first_position is None else first_position
                assert event.first_position == first_position + len(tokens)
                tokens += event.token_ids
        return tokens

    async def wait_for(
        self, condition: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S
    ) -> None:
        """Until it holds for the events."""
        try:
            async with asyncio.timeout(patience_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            pytest.fail(f"waited {patience_s:g} s for: {what}; the last that came: {self.events[-10:]}")

    async def wait_for_tokens(self, request_id: str, num_tokens: int) -> list[int]:
        await self.wait_for(lambda: len(self.tokens_of(request_id)) >= num_tokens, f"{num_tokens} tokens")
        return self.tokens_of(request_id)

    async def generate(self, request: Submit, *, patience_s: float = PATIENCE_S) -> list[int]:
        """The tokens of a request that ends well here."""
        request_id = request.key.request_id
        await self.send(request)
        await self.wait_for(
            lambda: any(
                isinstance(event, RequestFailed)
                or (isinstance(event, TokensGenerated) and event.finish_reason is not None)
                for event in self.events_of(request_id)
            ),
            f"the end of {request_id}",
            patience_s=patience_s,
        )
        assert not [event for event in self.events_of(request_id) if isinstance(event, RequestFailed)]
        return self.tokens_of(request_id)

    async def failure_of(self, request_id: str = "r1") -> tuple[FailureCode, str]:
        """The failure of a request, which is its last event."""

        def failed() -> list[Event]:
            return [event for event in self.events_of(request_id) if isinstance(event, RequestFailed)]

        await self.wait_for(lambda: bool(failed()), f"the failure of {request_id}")
        event = self.events_of(request_id)[-1]
        assert isinstance(event, RequestFailed)
        return event.code, event.reason

    async def status(self) -> WorkerStatus:
        return status_from_pb(await self.stub.GetStatus(pb.GetStatusRequest()))

    async def wait_for_state(self, state: WorkerState) -> WorkerStatus:
        async def is_there() -> bool:
            status = await self.status()
            assert status.state in (state, WorkerState.LOADING), status
            return status.state is state

        await eventually(is_there, f"state {state}", START_PATIENCE_S)
        return await self.status()

    async def wait_for_status(self, condition: Callable[[WorkerStatus], bool], what: str) -> None:
        async def holds() -> bool:
            return condition(await self.status())

        await eventually(holds, what)

    async def drop_session(self) -> None:
        """As a gateway that died."""
        self.session.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self.channel.close()

    async def _read(self) -> None:
        while (batch := await self.session.read()) is not grpc.aio.EOF:
            assert batch.incarnation == self.incarnation
            events = [event for event in map(event_from_pb, batch.events) if event is not None]
            async with self._changed:
                self.events += events
                self.kv_events += [e for e in map(kv_event_from_pb, batch.kv_events) if e is not None]
                self.batch_sizes.append(len(events))
                self._changed.notify_all()


class RunningWorker(WorkerClient):
    """A client with the worker that it talks to, both in this loop."""

    def __init__(self, worker: Worker, address: str) -> None:
        super().__init__(address, worker.spec.incarnation)
        self.worker = worker

    async def assert_nothing_leaks(self) -> None:
        """All blocks come back, of KV and of embeddings, cached or not, no lease stays, and the invariants hold."""
        has_engine = self.worker.spec.phases != frozenset({Phase.ENCODE})
        await self.wait_for_status(
            lambda status: (
                status.blocks.free + status.blocks.cached == status.blocks.total
                and (status.blocks.total > 0) == has_engine
                and status.num_leases == status.num_waiting == status.num_running == 0
                and self._holds_no_embeddings()
            ),
            f"all blocks of {self.worker.spec.worker_id} to be free",
        )
        await self.worker.check_invariants()

    def _holds_no_embeddings(self) -> bool:
        counts = self.worker.status().embeddings
        is_idle = counts.num_waiting == counts.num_encodes_running == 0
        return is_idle and counts.num_free + counts.num_cached == counts.num_blocks


@asynccontextmanager
async def running_worker(
    spec: WorkerSpec, *, is_ready: bool = True, stop: asyncio.Event | None = None
) -> AsyncIterator[RunningWorker]:
    """Serve until the block ends; checks that nothing leaked unless is_ready is False."""
    stop = stop if stop is not None else asyncio.Event()
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    worker = Worker(spec)
    serving = asyncio.create_task(worker.serve(on_bound=address.set_result, stop=stop))
    await asyncio.wait((serving, address), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    running = RunningWorker(worker, address.result())
    try:
        if is_ready:
            await running.wait_for_state(WorkerState.READY)
        yield running
        if is_ready:
            await running.assert_nothing_leaks()
    finally:
        await running.close()
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await serving


@asynccontextmanager
async def running_pair(
    prefill: WorkerSpec, decode: WorkerSpec
) -> AsyncIterator[tuple[RunningWorker, RunningWorker]]:
    """A prefill worker and a decode worker."""
    async with running_worker(prefill) as prefill_worker, running_worker(decode) as decode_worker:
        yield prefill_worker, decode_worker


def handed_off(request: Submit, decode: WorkerClient, transfer_id: str = "t1") -> tuple[Submit, Submit]:
    """The same request for the prefill worker and for the decode worker."""
    handoff = Handoff(transfer_id, decode.address, decode.incarnation)
    return (
        replace(request, phases=PREFILL, handoff=handoff),
        replace(request, phases=DECODE, handoff=Handoff(transfer_id)),
    )


@asynccontextmanager
async def standing_still(*workers: RunningWorker) -> AsyncIterator[None]:
    """Their engines do nothing until the block ends, between two steps; what comes for them waits."""
    go_on = threading.Event()
    loops = [one.worker.text.step_loop for one in workers if one.worker.text is not None]
    held = [loop.call(go_on.wait) for loop in loops]
    try:
        await until(lambda: all(one.running() for one in held), "the engines to stand still")
        yield
    finally:
        go_on.set()


class StepGate:
    """Holds the engine thread before the first step that `is_it` describes, until `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_it: Callable[[StepPlan], bool]) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()
        run = ModelRunner.run

        def gated(runner: ModelRunner, plan: StepPlan, on_layers: Callable[[int, int], None]) -> StepResult:
            if not self._opened.is_set() and is_it(plan):
                self._reached.set()
                assert self._opened.wait(PATIENCE_S)
            return run(runner, plan, on_layers)

        monkeypatch.setattr(ModelRunner, "run", gated)

    async def reached(self) -> None:
        """The engine stands before that step."""
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)

    def open(self) -> None:
        self._opened.set()


def at_start(start: int) -> Callable[[StepPlan], bool]:
    """For StepGate: the step whose first slice begins there."""
    return lambda plan: plan.slices[0].start == start
