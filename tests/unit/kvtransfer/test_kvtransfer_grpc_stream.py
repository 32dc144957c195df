"""What the gRPC stream makes of a call that breaks at an awkward moment."""

import asyncio

import grpc.aio
import pytest

from kvtransfer.driver import MAX_TOGETHER_BYTES
from kvtransfer.grpc_stream import GRPC_OPTIONS, MAX_MESSAGE_BYTES, GrpcChannel, add_handler
from kvtransfer.stream import MessageStream
from kvtransfer.wire import CHUNK_HEADER_BYTES
from workers import limits


class BrokenCall:
    """A call that ends just as something is asked of it; gRPC then raises in any of these ways."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def write(self, _message: bytes) -> None:
        raise self._error

    async def done_writing(self) -> None:
        raise self._error


class OneCallChannel:
    """Stands for grpc.aio.Channel: every call of its one method is the same."""

    def __init__(self, call: object) -> None:
        self._call = call

    def stream_stream(self, _method: str) -> object:
        return lambda: self._call


@pytest.mark.parametrize(
    "error",
    [grpc.aio.UsageError("it is over"), asyncio.InvalidStateError("it is over"), asyncio.CancelledError()],
)
def test_closing_what_is_broken_does_nothing_and_writing_says_so(error: BaseException) -> None:
    async def scenario() -> None:
        stream = GrpcChannel(OneCallChannel(BrokenCall(error))).open()  # type: ignore[arg-type]
        await stream.close()
        with pytest.raises(ConnectionError):
            await stream.write(b"")

    asyncio.run(scenario())


class EchoingCall:
    """A call whose other end says what was said."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write(self, message: bytes) -> None:
        self.written.append(message)

    async def read(self) -> object:
        return self.written[-1] if self.written else grpc.aio.EOF


def test_messages_that_are_written_together_are_one_of_grpc_and_are_read_one_by_one() -> None:
    async def scenario() -> None:
        call = EchoingCall()
        stream = GrpcChannel(OneCallChannel(call)).open()  # type: ignore[arg-type]
        assert await stream.read() is None
        await stream.write(b"first", b"", b"third")
        assert len(call.written) == 1
        assert [await stream.read() for _ in range(3)] == [b"first", b"", b"third"]

    asyncio.run(scenario())


def test_the_largest_chunk_that_may_be_configured_passes() -> None:
    num_bytes = limits.MAX_CHUNK_KIB.most * limits.KIB + CHUNK_HEADER_BYTES
    assert num_bytes + MAX_TOGETHER_BYTES < MAX_MESSAGE_BYTES

    async def scenario() -> None:
        async def serve(stream: MessageStream) -> None:
            message = await stream.read()
            await stream.write(str(len(message or b"")).encode())

        server = grpc.aio.server(options=GRPC_OPTIONS)
        add_handler(server, serve)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) as channel:
            stream = GrpcChannel(channel).open()
            await stream.write(bytes(num_bytes))
            assert await stream.read() == str(num_bytes).encode()
            await stream.close()
        await server.stop(None)

    asyncio.run(scenario())
