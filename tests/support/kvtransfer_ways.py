"""The ways on which a transfer is tested, each with a receiver at its end.

Control goes over queues of this process or over real gRPC, KV in chunks or by one of the transports.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from kvtransfer.config import KvTransferConfig
from kvtransfer.frames import Ack, Chunk, Frame
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel
from kvtransfer.server import KvTransferServer, add_kvtransfer_service
from kvtransfer.stream import MessageChannel, MessageStream
from kvtransfer.wire import decode
from tests.support.kvtransfer_fakes import FakeKvHost, Hook, QueueChannel, QueueStream, unchanged

#: Way -> control, transport of the KV, streams of its chunks.
_WAYS = {
    "queues": ("queues", "grpc", 1),
    "in_process": ("queues", "in_process", 1),
    "shm": ("grpc", "shm", 1),
    "nixl": ("queues", "nixl", 1),
    "grpc": ("grpc", "grpc", 1),
    "grpc_3_streams": ("grpc", "grpc", 3),
}
WAYS = tuple(_WAYS)


def transport_of(kind: str) -> str:
    """How KV goes on this way."""
    return _WAYS[kind][1]


class TappedStream:
    """The sender's end of a stream, whose messages pass the hooks of its channel."""

    def __init__(self, stream: MessageStream, tap: "TappedChannel") -> None:
        self._stream = stream
        self._tap = tap

    async def read(self) -> bytes | None:
        while True:
            message = await self._stream.read()
            if message is None:
                return None
            self._tap.count(message)
            arriving = self._tap.to_sender(message)
            if arriving:
                [only] = arriving
                return only

    async def write(self, *messages: bytes) -> None:
        for message in messages:
            self._tap.count(message)
            for leaving in self._tap.to_receiver(message):
                await self._stream.write(leaving)

    async def close(self) -> None:
        await self._stream.close()

    def break_(self) -> None:
        """It is lost to both ends."""
        if isinstance(self._stream, QueueStream):
            self._stream.cut()
        else:
            self._stream._call.cancel()  # type: ignore[attr-defined]


@dataclass
class TappedChannel:
    """A channel that can be made to misbehave, and that counts what passes."""

    channel: MessageChannel
    to_receiver: Hook = unchanged
    to_sender: Hook = unchanged
    num_messages: int = 0
    num_in_flight: int = 0
    max_in_flight: int = 0
    frames: list[Frame] = field(default_factory=list)
    streams: list[TappedStream] = field(default_factory=list)

    def open(self) -> MessageStream:
        stream = TappedStream(self.channel.open(), self)
        self.streams.append(stream)
        return stream

    def break_streams(self) -> None:
        """Every stream is lost, as by a network that fails."""
        for stream in self.streams:
            stream.break_()

    def count(self, message: bytes) -> None:
        """A message passes, before the hook sees it."""
        self.num_messages += 1
        frame = decode(message)
        self.frames.append(frame)
        self.num_in_flight += isinstance(frame, Chunk) - isinstance(frame, Ack)
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)

    def num_of(self, kind: type) -> int:
        """Frames of this kind that have passed."""
        return sum(isinstance(frame, kind) for frame in self.frames)


@dataclass
class Way:
    """vanish: the receiver's process is gone, without a word to anybody. data_channels: see KvSender."""

    channel: TappedChannel
    receiver: KvTransferServer
    vanish: Callable[[], Awaitable[None]]
    data_channels: Sequence[MessageChannel] = ()


@asynccontextmanager
async def way_to(
    kind: str, sources: Sequence[FakeKvHost], host: FakeKvHost, config: KvTransferConfig
) -> AsyncIterator[Way]:
    """A receiver that serves `host`, and the way to it from `sources`."""
    control, transport, num_streams = _WAYS[kind]
    others = {"in_process", "shm", "cuda_ipc", "nixl"} - {transport}
    for source in sources:
        source.watched.hides_from = tuple(others)
    serve = {"queues": _queues, "grpc": _grpc}[control]
    async with serve(host, config, num_streams) as way:
        yield way


@asynccontextmanager
async def _queues(host: FakeKvHost, config: KvTransferConfig, _num_streams: int) -> AsyncIterator[Way]:
    receiver = KvTransferServer(host, config)
    channel = QueueChannel(receiver.serve)

    async def vanish() -> None:
        channel.is_gone = True
        channel.cut()
        for task in channel.served:
            task.cancel()
        await asyncio.gather(*channel.served, return_exceptions=True)

    try:
        yield Way(TappedChannel(channel), receiver, vanish)
    finally:
        await receiver.close("the test is over")
        await asyncio.gather(*channel.served, return_exceptions=True)


@asynccontextmanager
async def _grpc(host: FakeKvHost, config: KvTransferConfig, num_streams: int) -> AsyncIterator[Way]:
    server = grpc.aio.server(options=GRPC_OPTIONS)
    receiver = add_kvtransfer_service(server, host, config)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def vanish() -> None:
        await server.stop(None)

    options = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    try:
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
                )
                for _ in range(num_streams if num_streams > 1 else 1)
            ]
            control = TappedChannel(GrpcChannel(channels[0]))
            data = [_Tap(GrpcChannel(channel), control) for channel in channels] if num_streams > 1 else []
            yield Way(control, receiver, vanish, data)
            await receiver.close("the test is over")
    finally:
        await server.stop(None)


class _Tap:
    """Another channel, whose streams pass the hooks of the one for control."""

    def __init__(self, channel: MessageChannel, tap: TappedChannel) -> None:
        self._channel = channel
        self._tap = tap

    def open(self) -> MessageStream:
        stream = TappedStream(self._channel.open(), self._tap)
        self._tap.streams.append(stream)
        return stream
