"""One multiplexed Session stream to one incarnation of a worker: commands down, batches of events up."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from orchestrator.control.view import WorkerView
from orchestrator.errors import UnusableModel
from orchestrator.gateway.links import LinkListener
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServiceStub
from workers.api import Abort, Command, Encode, RequestKey
from workers.status_wire import model_from_pb
from workers.wire import command_to_pb, event_from_pb, kv_event_from_pb

if TYPE_CHECKING:
    SessionCall = grpc.aio.StreamStreamCall[bytes, pb.EventBatch]

logger = logging.getLogger(__name__)

#: For each of the answers before the stream, and for the stream to open, in seconds.
CONNECT_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
#: After so much silence a worker is asked whether it is there, and has as long again to answer. Workers take one
#: such question every five seconds.
KEEPALIVE_MS = 10_000
#: A worker that leaves more commands than this unread, or more bytes of pictures, is given up.
MAX_QUEUED_COMMANDS = 4096
MAX_QUEUED_BYTES = 256 * 2**20
#: In one message, so that prompts of any length stay below the worker's limit of a message.
MAX_COMMANDS_PER_BATCH = 64
_SESSION = f"/{pb.DESCRIPTOR.services_by_name['WorkerService'].full_name}/Session"
_CHANNEL_OPTIONS = (
    # Addresses are the cluster's own: no proxy.
    ("grpc.enable_http_proxy", 0),
    # A worker whose machine is gone closes no connection, and there may be no controller to tell.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    # Not grpc.keepalive_timeout_ms, which grpcio 1.85 takes and does not heed.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # A tokenizer may be tens of megabytes long.
    ("grpc.max_receive_message_length", 256 * 2**20),
    # Each attempt connects anew, without the back-off of the one before.
    ("grpc.use_local_subchannel_pool", 1),
)


class WorkerLink:
    """`run` opens the stream, and opens it again when it breaks, until it is cancelled."""

    def __init__(self, worker: WorkerView, listener: LinkListener) -> None:
        self.worker = worker
        self.block_size = 0
        self._listener = listener
        self._is_open = False
        #: Both together have at most MAX_QUEUED_COMMANDS; emptied when the stream breaks. Encodes are apart, since they are
        #: large and may be overtaken.
        self._outbox: deque[Command] = deque()
        self._encodes: dict[RequestKey, Encode] = {}
        #: Of the pictures of `_encodes`; at most MAX_QUEUED_BYTES.
        self._num_unsent_bytes = 0
        self._has_commands = asyncio.Event()
        self._has_encodes = asyncio.Event()
        #: A stream takes one message at a time.
        self._turn = asyncio.Lock()
        self._call: SessionCall | None = None
        self._reason = ""

    @property
    def is_open(self) -> bool:
        """Commands can be sent."""
        return self._is_open

    @property
    def num_unsent_bytes(self) -> int:
        """Of pictures that are queued."""
        return self._num_unsent_bytes

    def send(self, command: Command) -> None:
        """Queue a command; it leaves with all others that are queued then, in order. An Encode may leave after later ones,
        and never does once its Abort is here.

        Without an open stream it is dropped, since a worker drops what came by a stream that ended.
        """
        if not self._is_open:
            return
        if isinstance(command, Abort) and self._take_encode(command.key):
            return
        if len(self._outbox) + len(self._encodes) >= MAX_QUEUED_COMMANDS:
            self._end(f"{MAX_QUEUED_COMMANDS} commands are unread")
        elif not isinstance(command, Encode):
            self._outbox.append(command)
            self._has_commands.set()
        elif self._num_unsent_bytes + len(command.image) > MAX_QUEUED_BYTES:
            self._end(f"{self._num_unsent_bytes} bytes of pictures are unread")
        else:
            self._encodes[command.key] = command
            self._num_unsent_bytes += len(command.image)
            self._has_encodes.set()

    def _take_encode(self, key: RequestKey) -> bool:
        """It is no longer queued; False when it was not."""
        encode = self._encodes.pop(key, None)
        if encode is None:
            return False
        self._num_unsent_bytes -= len(encode.image)
        return True

    async def run(self) -> None:
        """MAIN LOOP of one link."""
        backoff_s = FIRST_BACKOFF_S
        last_reason = ""
        while True:
            try:
                reason = await self._session()
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except (TimeoutError, UnusableModel, grpc.aio.BaseError) as error:
                reason = str(error) or type(error).__name__
            except Exception as error:
                logger.exception(
                    "link_failed worker_id=%s incarnation=%d", self.worker.worker_id, self.worker.incarnation
                )
                reason = f"{type(error).__name__}: {error}"
            finally:
                was_open, self._is_open = self._is_open, False
                self._outbox.clear()
                self._encodes.clear()
                self._num_unsent_bytes = 0
            if was_open:
                backoff_s = FIRST_BACKOFF_S
            # A worker that stays away is told of once.
            if was_open or reason != last_reason:
                self._listener.link_broke(self, reason)
            last_reason = reason
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _session(self) -> str:
        """One stream from beginning to end; returns why it ended."""
        async with grpc.aio.insecure_channel(self.worker.address, options=_CHANNEL_OPTIONS) as channel:
            stub = WorkerServiceStub(channel)
            status = await stub.GetStatus(pb.GetStatusRequest(), timeout=CONNECT_TIMEOUT_S)
            # The port of a process that has gone may be another one's by now.
            wanted = (self.worker.worker_id, self.worker.incarnation)
            if (status.worker_id, status.incarnation) != wanted:
                return f"incarnation {status.incarnation} of {status.worker_id!r} answers at its address"
            model = await stub.GetModel(pb.GetModelRequest(), timeout=CONNECT_TIMEOUT_S)
            await self._listener.model_found(self.worker, model_from_pb(model))
            self.block_size = model.block_size
            # It takes messages that are serialised already: those with pictures are in a thread.
            call: SessionCall = channel.stream_stream(
                _SESSION, response_deserializer=pb.EventBatch.FromString
            )()
            writer: asyncio.Task[None] | None = None
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await call.wait_for_connection()
                self._call, self._reason, self._is_open = call, "the worker ended the stream", True
                self._has_commands.clear()
                self._has_encodes.clear()
                self._listener.link_opened(self)
                writer = asyncio.create_task(self._write(call))
                await self._read(call)
            finally:
                self._call = None
                call.cancel()
                if writer is not None:
                    writer.cancel()
                    (error,) = await asyncio.gather(writer, return_exceptions=True)
                    if isinstance(error, Exception):
                        logger.error("link_writer_failed worker_id=%s", self.worker.worker_id, exc_info=error)
        return self._reason

    async def _read(self, call: "SessionCall") -> None:
        """Until the stream ends. Raises AioRpcError when it ends with an error."""
        try:
            while True:
                batch = await call.read()
                if not isinstance(batch, pb.EventBatch):
                    return
                events = [event for message in batch.events if (event := event_from_pb(message)) is not None]
                if batch.kv_events:
                    found = map(kv_event_from_pb, batch.kv_events)
                    self._listener.cache_changed(self, [event for event in found if event is not None])
                if events:
                    self._listener.events_came(self, events)
        except asyncio.CancelledError:
            # So says a call that `_end` cancelled; our own task's is another.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise

    async def _write(self, call: "SessionCall") -> None:
        """Until the stream ends."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._until_it_ends(self._write_commands, call))
            group.create_task(self._until_it_ends(self._write_encodes, call))

    async def _until_it_ends(
        self, write: Callable[["SessionCall"], Awaitable[None]], call: "SessionCall"
    ) -> None:
        # The reader sees the same end, and says why.
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            try:
                await write(call)
            finally:
                self._end("commands can no longer be written")

    async def _write_commands(self, call: "SessionCall") -> None:
        """All that is queued in one message."""
        while True:
            await self._has_commands.wait()
            async with self._turn:
                commands = [
                    self._outbox.popleft() for _ in range(min(len(self._outbox), MAX_COMMANDS_PER_BATCH))
                ]
                if not self._outbox:
                    self._has_commands.clear()
                await call.write(_serialised(commands, self.worker.incarnation))

    async def _write_encodes(self, call: "SessionCall") -> None:
        """Each in a message of its own, which others pass while it is made."""
        while True:
            await self._has_encodes.wait()
            while self._encodes:
                key, encode = next(iter(self._encodes.items()))
                message = await asyncio.to_thread(_serialised, [encode], self.worker.incarnation)
                async with self._turn:
                    # Unless it has been aborted meanwhile. An Abort that comes from now on gets the next turn.
                    if self._take_encode(key):
                        await call.write(message)
            self._has_encodes.clear()

    def _end(self, reason: str) -> None:
        """Cancel the call; the reader then ends the session."""
        if self._call is not None and not self._call.done():
            self._reason = reason
            self._call.cancel()


def _serialised(commands: Sequence[Command], incarnation: int) -> bytes:
    """One message."""
    batch = pb.CommandBatch(commands=[command_to_pb(command, incarnation) for command in commands])
    return batch.SerializeToString()
