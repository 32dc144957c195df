"""Streams over gRPC: raw bytes both ways, no protobuf around a payload. The only place that knows grpc.

gRPC checks that messages are complete and in order; that they are right is `wire`'s business.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from kvtransfer.bundle import bundled, unbundled
from kvtransfer.stream import MessageStream

SERVICE = "phasewise.kvtransfer.v1.KvTransferService"
METHOD = "Transfer"
#: The same for embeddings, which have leases and a pool of their own.
EMBEDDINGS = "TransferEmbeddings"
#: A longer message is refused by either side. The largest chunk that may be configured, 64 MiB, with its header.
MAX_MESSAGE_BYTES = 65 * 2**20
#: A peer whose machine is gone closes no connection. After so much silence it is asked whether it is there, and
#: has as long again to answer; then the connection is closed, and all that hangs on it ends.
KEEPALIVE_MS = 10_000
#: For the channel and for the server. A large frame spares work per chunk where malloc is not tuned.
GRPC_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    # Not grpc.keepalive_timeout_ms, which grpcio 1.85 takes and does not heed.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    # Ask as often as it takes. A server by itself takes more than one question in five minutes for an attack.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 2**24 - 1),
)


class GrpcChannel:
    """The way to one receiver, over a channel that may serve other services too.

    channel: made with GRPC_OPTIONS; its owner closes it. method: of KvTransferService.
    """

    def __init__(self, channel: grpc.aio.Channel, method: str = METHOD) -> None:
        self._transfer: grpc.aio.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
            f"/{SERVICE}/{method}"
        )

    def open(self) -> MessageStream:
        """See MessageChannel. Raises ConnectionError when the channel is closed."""
        with _map_errors():
            return _ClientStream(self._transfer())


class _ClientStream:
    def __init__(self, call: Any) -> None:
        self._call = call
        #: Of the last bundle, not yet asked for.
        self._arrived: deque[bytes] = deque()

    async def read(self) -> bytes | None:
        return await _next(self._call, self._arrived)

    async def write(self, *messages: bytes) -> None:
        try:
            with _map_errors():
                await self._call.write(bundled(messages))
        except asyncio.CancelledError:
            # gRPC does so too, but not before the call stands: its other end would wait for a first message.
            self._call.cancel()
            raise

    async def close(self) -> None:
        with contextlib.suppress(ConnectionError), _map_errors():
            await self._call.done_writing()


class _ServerStream:
    """Ends when the handler returns."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._arrived: deque[bytes] = deque()

    async def read(self) -> bytes | None:
        return await _next(self._context, self._arrived)

    async def write(self, *messages: bytes) -> None:
        with _map_errors():
            await self._context.write(bundled(messages))

    async def close(self) -> None:
        return


def add_handler(
    server: grpc.aio.Server, serve: Callable[[MessageStream], Awaitable[None]], method: str = METHOD
) -> None:
    """Let `serve` answer each stream of this method of KvTransferService on this server."""

    async def transfer(_requests: object, context: Any) -> None:
        await serve(_ServerStream(context))

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(transfer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {method: handler}),))


async def _next(call: Any, arrived: deque[bytes]) -> bytes | None:
    """One message of a call, or of the bundle that came last."""
    if not arrived:
        with _map_errors():
            message = await call.read()
        if message is grpc.aio.EOF:
            return None
        arrived.extend(unbundled(message))
    return arrived.popleft()


@contextmanager
def _map_errors() -> Iterator[None]:
    """gRPC's errors as ConnectionError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise ConnectionError(f"{error.code().name}: {error.details()}") from error
    except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    except asyncio.CancelledError as error:
        # So says a call that was cancelled under us, by its channel's end; our own task's is another.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the call was cancelled") from error
