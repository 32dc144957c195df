"""phasewise.inference.v1.InferenceService: what clients call."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from orchestrator.control.request_actions import Fail, FailureKind
from orchestrator.errors import (
    DuplicateRequest,
    GatewayFull,
    GatewayStopping,
    ImagesFull,
    InvalidRequest,
    MessageTooLarge,
    NoModelYet,
    PhasewiseOrchestratorError,
    RequestTooLarge,
    TooLate,
    UnknownModel,
)
from orchestrator.gateway.answer import Answer
from orchestrator.gateway.config import GatewayConfig
from orchestrator.gateway.detokeniser import TextStream
from orchestrator.gateway.dispatcher import Dispatcher
from orchestrator.gateway.live_request import LiveRequest
from orchestrator.gateway.served_model import LoadedModel, ServedModel
from orchestrator.gateway.stop_strings import StopStrings
from orchestrator.gateway.turns import Turns
from orchestrator.gateway.validation import CheckedRequest, check_request
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServiceServicer
from workers.api import RequestId

#: A longer request, and any with pictures, is read in a thread: tokenising it takes milliseconds.
LONG_REQUEST_BYTES = 16 * 2**10
#: A longer message, its pictures not counted, is refused.
MAX_TEXT_BYTES = 4 * 2**20
#: Threads that do so at a time.
MAX_READER_THREADS = 2
DEADLINE_MARGIN_S = 0.1
#: Of a status: gRPC writes a byte as three at worst, and a client that gets more than 8 KiB of metadata sees
#: RESOURCE_EXHAUSTED in the status's place.
MAX_STATUS_MESSAGE_BYTES = 2000
#: Metadata at the end of a refusal: seconds after which the same request would be taken, as far as is known now.
RETRY_AFTER_S = "retry-after-s"

_STATUS_OF_KIND = {
    FailureKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    FailureKind.CANCELLED: grpc.StatusCode.CANCELLED,
}
_STATUS_OF_REFUSAL: dict[type[PhasewiseOrchestratorError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    RequestTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    GatewayFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooLate: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ImagesFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    GatewayStopping: grpc.StatusCode.UNAVAILABLE,
    NoModelYet: grpc.StatusCode.UNAVAILABLE,
}


class Unread:
    """A request as it came, until it is taken: gRPC holds what it gives to Generate for as long as the answer lasts."""

    __slots__ = ("_request",)

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request: pb.GenerateRequest | None = request

    @classmethod
    def parse(cls, message: bytes) -> "Unread":
        """The request in this message."""
        return cls(pb.GenerateRequest.FromString(message))

    def peek(self) -> pb.GenerateRequest:
        """The request, which has not been taken."""
        assert self._request is not None
        return self._request

    def take(self) -> pb.GenerateRequest:
        """The request, which is then its taker's alone."""
        request, self._request = self.peek(), None
        return request


class InferenceService(InferenceServiceServicer):
    """Checks what comes, lets the dispatcher run it, and writes what comes of it. Made in the loop.

    draw_seed: a random number below 2**64.
    """

    def __init__(
        self,
        config: GatewayConfig,
        dispatcher: Dispatcher,
        served: ServedModel,
        draw_seed: Callable[[], int],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._served = served
        self._draw_seed = draw_seed
        self._readers = asyncio.Semaphore(MAX_READER_THREADS)
        self._num_reading = 0
        #: Of the pictures of all requests that are here; at most config.max_image_bytes.
        self._num_image_bytes = 0
        self._clock = asyncio.get_running_loop().time
        self._turns = Turns()

    async def Generate(  # type: ignore[override] # noqa: N802 - a coroutine that writes is the third kind of handler
        self, request: Unread, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """See the .proto, and `Unread`."""
        arrived_at_s = self._clock()
        client_timeout_s = context.time_remaining()
        timeout_s = min(
            self._config.request_timeout_s, math.inf if client_timeout_s is None else client_timeout_s
        )
        deadline_s = arrived_at_s + timeout_s
        failure: Fail | None
        try:
            # The dispatcher keeps the deadline. This bounds what it does not know of: the reading of a long
            # prompt, and a client that does not read its answer.
            async with asyncio.timeout_at(deadline_s + DEADLINE_MARGIN_S):
                failure = await self._answer(request, context, arrived_at_s, deadline_s)
        except TimeoutError:
            failure = Fail(
                FailureKind.DEADLINE, f"the deadline passed: {timeout_s:.3g} s after the request came"
            )
        except PhasewiseOrchestratorError as error:
            metadata = ((RETRY_AFTER_S, f"{error.retry_after_s:.3f}"),) if isinstance(error, TooLate) else ()
            await context.abort(_STATUS_OF_REFUSAL[type(error)], _status_message(str(error)), metadata)
        if failure is not None:
            await context.abort(_STATUS_OF_KIND[failure.kind], _status_message(failure.reason))

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, _context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.AbortResponse:
        """See the .proto."""
        return pb.AbortResponse(found=self._dispatcher.abort(RequestId(request.request_id)))

    async def GetModelInfo(  # noqa: N802
        self, _request: pb.GetModelInfoRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetModelInfoResponse:
        """See the .proto."""
        try:
            loaded = self._served.get(self._dispatcher.why_not())
        except NoModelYet as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, _status_message(str(error)))
        return pb.GetModelInfoResponse(
            model=self._config.model,
            architecture=loaded.info.architecture,
            max_context_tokens=loaded.info.max_context_tokens,
            vocab_size=loaded.info.vocab_size,
            eos_token_ids=loaded.info.eos_token_ids,
            has_chat_template=loaded.texts.has_chat_template,
            model_digest=loaded.info.model_digest,
        )

    async def _answer(
        self,
        unread: Unread,
        context: "grpc.aio.ServicerContext[Any, Any]",
        arrived_at_s: float,
        deadline_s: float,
    ) -> Fail | None:
        self._dispatcher.check_room(self._num_reading)
        loaded = self._served.get(self._dispatcher.why_not())
        num_image_bytes = _image_bytes(unread.peek())
        num_text_bytes = unread.peek().ByteSize() - num_image_bytes
        if num_text_bytes > MAX_TEXT_BYTES:
            raise MessageTooLarge(num_text_bytes, MAX_TEXT_BYTES)
        # Before anything is waited for, so that those that are being read are bounded too.
        with self._room_for_images(num_image_bytes):
            checked = await self._read(unread, loaded)
            live = self._dispatcher.submit(checked, arrived_at_s=arrived_at_s, deadline_s=deadline_s)
            return await self._stream(live, checked, loaded, context)

    @contextlib.contextmanager
    def _room_for_images(self, num_bytes: int) -> Iterator[None]:
        """Count them while the request is here. Raises ImagesFull."""
        if num_bytes and self._num_image_bytes + num_bytes > self._config.max_image_bytes:
            raise ImagesFull(num_bytes, self._num_image_bytes, self._config.max_image_bytes)
        self._num_image_bytes += num_bytes
        try:
            yield
        finally:
            self._num_image_bytes -= num_bytes

    async def _stream(
        self,
        live: LiveRequest,
        checked: CheckedRequest,
        loaded: LoadedModel,
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> Fail | None:
        """The answer, until it ends; the failure, if that was one."""
        stops = StopStrings(checked.stop_strings) if checked.stop_strings else None

        def new_text() -> TextStream:
            return loaded.texts.text_stream(
                stops,
                min_tokens=checked.sampling.min_new_tokens,
                is_continuation=not checked.is_chat,
            )

        answer = Answer(
            live, new_text=new_text, token_text=loaded.texts.token_text, stop=self._dispatcher.text_stopped
        )
        try:
            while not answer.is_over:
                await live.wait_for_news()
                await self._turns.take()
                # All that came until now.
                news = live.take_now()
                if isinstance(news, Fail):
                    return news
                if news is not None:
                    await context.write(answer.message(news, self._clock()))
        finally:
            self._dispatcher.release(live)
        return None

    async def _read(self, unread: Unread, loaded: LoadedModel) -> CheckedRequest:
        """What to run. The message is gone after that: what is kept of it are copies."""

        def check() -> CheckedRequest:
            checked = check_request(
                unread.take(),
                model=loaded.info,
                texts=loaded.texts,
                served_name=self._config.model,
                draw_seed=self._draw_seed,
                vision=loaded.vision,
                default_reduction=self._config.image_reduction,
            )
            return replace(checked, prefix_root=loaded.prefix_root(checked.cache_salt))

        if not _has_pictures(unread.peek()) and unread.peek().ByteSize() <= LONG_REQUEST_BYTES:
            return check()
        self._num_reading += 1
        try:
            async with self._readers:
                return await asyncio.to_thread(check)
        finally:
            self._num_reading -= 1


def add_inference_service(service: InferenceService, server: grpc.aio.Server) -> None:
    """As the generated code does, but Generate is given a request that it can let go of."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(
            service.Generate,
            request_deserializer=Unread.parse,
            response_serializer=pb.GenerateResponse.SerializeToString,
        ),
        "Abort": grpc.unary_unary_rpc_method_handler(
            service.Abort,
            request_deserializer=pb.AbortRequest.FromString,
            response_serializer=pb.AbortResponse.SerializeToString,
        ),
        "GetModelInfo": grpc.unary_unary_rpc_method_handler(
            service.GetModelInfo,
            request_deserializer=pb.GetModelInfoRequest.FromString,
            response_serializer=pb.GetModelInfoResponse.SerializeToString,
        ),
    }
    described = pb.DESCRIPTOR.services_by_name["InferenceService"]
    assert handlers.keys() == {method.name for method in described.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(described.full_name, handlers),))


def _pictures(request: pb.GenerateRequest) -> Iterator[pb.Image]:
    yield from request.images
    for message in request.chat.messages:
        for part in message.parts:
            if part.HasField("image"):
                yield part.image


def _has_pictures(request: pb.GenerateRequest) -> bool:
    return any(True for _ in _pictures(request))


def _image_bytes(request: pb.GenerateRequest) -> int:
    """Of the files in it, as they lie in the message. The data is not looked at: that would copy it."""
    return sum(image.ByteSize() - len(image.media_type) for image in _pictures(request))


def _status_message(text: str) -> str:
    """The text, or as much of its beginning as a status can carry."""
    encoded = text.encode()
    if len(encoded) <= MAX_STATUS_MESSAGE_BYTES:
        return text
    return encoded[:MAX_STATUS_MESSAGE_BYTES].decode(errors="ignore") + "..."
