"""A worker as a process of its own, without Ray, and a gateway's end of its gRPC service."""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import grpc.aio

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from workers.api import (
    Abort,
    Command,
    Event,
    Phase,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    Submit,
    TokensGenerated,
    WorkerStatus,
    is_last,
)
from workers.status_wire import status_from_pb
from workers.wire import command_to_pb, event_from_pb

ROOT = Path(__file__).resolve().parent.parent.parent
PHASES = frozenset({Phase.PREFILL, Phase.DECODE})
INCARNATION = 1
START_PATIENCE_S = 300.0
STOP_PATIENCE_S = 30.0
TIMEOUT_S = 600.0


class WorkerLink:
    """One session with a worker, for many requests at once. Made by `open_link`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = pb_grpc.WorkerServiceStub(channel)
        self._session = self._stub.Session()
        self._writing = asyncio.Lock()
        # Bounded by what one request may be told: its tokens, and a few events beside them.
        self._events: dict[RequestKey, asyncio.Queue[Event | None]] = {}
        self._numbers = count()

    def new_key(self) -> RequestKey:
        """Of a request that this session has not had yet."""
        return RequestKey(RequestId(f"request-{next(self._numbers)}"), 1)

    async def events(self, request: Submit) -> AsyncGenerator[Event, None]:
        """Send it; yields all that is said of it until it ends. Whoever stops listening aborts it."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._events[request.key] = queue
        has_ended = False
        try:
            await self._send(request)
            while not has_ended:
                event = await queue.get()
                if event is None:
                    raise RuntimeError("the worker ended the session; see its log")
                has_ended = is_last(event)
                yield event
        finally:
            del self._events[request.key]
            if not has_ended:
                await self._send(Abort(request.key))

    async def greedy(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[Sequence[int]]:
        """See `Stream`."""
        sampling = SamplingParams(num_tokens)
        request = Submit(self.new_key(), PHASES, tuple(prompt), sampling, TIMEOUT_S)
        async for event in self.events(request):
            if isinstance(event, RequestFailed):
                raise RuntimeError(f"{request.key.request_id} failed: {event.code}: {event.reason}")  # noqa: TRY004 - an event, not an argument
            if isinstance(event, TokensGenerated):
                yield event.token_ids

    async def status(self) -> WorkerStatus:
        """What the worker says of itself."""
        return status_from_pb(await self._stub.GetStatus(pb.GetStatusRequest(), timeout=10))

    async def read(self) -> None:
        """Hand out events until the session ends."""
        try:
            while isinstance(batch := await self._session.read(), pb.EventBatch):
                for event in map(event_from_pb, batch.events):
                    # Those of an aborted request may still be on their way.
                    queue = self._events.get(event.key) if event is not None else None
                    if queue is not None:
                        queue.put_nowait(event)
        finally:
            for queue in self._events.values():
                queue.put_nowait(None)

    async def _send(self, command: Command) -> None:
        # A stream takes one write at a time.
        async with self._writing:
            await self._session.write(pb.CommandBatch(commands=[command_to_pb(command, INCARNATION)]))


@asynccontextmanager
async def open_link(address: str) -> AsyncIterator[WorkerLink]:
    """A session with the worker that listens there (host:port)."""
    async with grpc.aio.insecure_channel(address) as channel:
        link = WorkerLink(channel)
        reading = asyncio.create_task(link.read())
        try:
            yield link
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def worker_process(model: str, log: Path, *options: str) -> AsyncIterator[tuple[str, int]]:
    """Start `python -m workers.main` with these options; its address (host:port) and process id once it is ready.

    log: what it writes to stderr. Raises RuntimeError when it does not become ready.
    """
    command = [sys.executable, "-m", "workers.main", "--worker-id", "bench-0", "--phases", "prefill,decode"]
    with log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, "--model", model, *options, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
    try:
        async with asyncio.timeout(START_PATIENCE_S):
            address = await _ready_address(process, log)
        yield address, process.pid
    finally:
        await stop_process(process)


async def _ready_address(process: asyncio.subprocess.Process, log: Path) -> str:
    assert process.stdout is not None
    address = ""
    while line := (await process.stdout.readline()).decode().strip():
        if line.startswith("listening on "):
            address = line.removeprefix("listening on ")
        elif line.startswith("ready"):
            return address
        elif line.startswith("failed"):
            raise RuntimeError(f"the worker says {line}; its log is {log}")
    raise RuntimeError(f"the worker ended before it was ready; its log is {log}")


async def stop_process(process: asyncio.subprocess.Process) -> None:
    """Ask it to end, and make it end if it does not."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_PATIENCE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
