"""A worker without an engine, in this process: it says what its test wants, over real gRPC."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import grpc
import grpc.aio
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from kvtransfer.grpc_stream import GRPC_OPTIONS
from orchestrator.control.view import LifecycleState, WorkerView
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from workers.api import (
    Abort,
    Encode,
    Event,
    FinishReason,
    ImagesEncoded,
    ImagesWanted,
    KvEvent,
    KvLedger,
    KvTransferred,
    ModelInfo,
    PhaseSet,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    Submit,
    SubscribeKvEvents,
    TokensGenerated,
    WorkerId,
)
from workers.api import Phase as Phase
from workers.kv_wire import ledger_to_pb
from workers.status_wire import model_to_pb
from workers.wire import command_from_pb, event_to_pb, kv_event_to_pb

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if message['content'] == 'raise' %}{{ raise_exception('not this one') }}{% endif %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
PREFILL = frozenset({Phase.PREFILL})
DECODE = frozenset({Phase.DECODE})
ENCODE = frozenset({Phase.ENCODE})


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, after the special ones: a character may need several."""
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def byte_ids(text: str) -> list[int]:
    """The tokens of a text without special ones."""
    return list(byte_tokenizer().encode(text).ids)


def byte_model(**changes: Any) -> ModelInfo:
    """What a worker with this tokenizer tells of its model."""
    model = ModelInfo(
        tokenizer_json=byte_tokenizer().to_str().encode(),
        chat_template=CHAT_TEMPLATE,
        architecture="llama",
        max_context_tokens=512,
        vocab_size=3 + 256,
        eos_token_ids=(EOS,),
        model_digest="abc",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        max_sequence_tokens=256,
    )
    return replace(model, **changes)


def token_at(position: int) -> int:
    """What fake workers generate at a place of a sequence, whoever does."""
    return 3 + (position * 7) % 256


class KvNews(NamedTuple):
    """What is told of a cache in one message."""

    events: Sequence[KvEvent]


class FakeWorker(WorkerServiceServicer):
    """Answers a Submit with `answer`, in one message for each event; by default with all of its part.

    Of a Submit with pictures it wants them all, and says no more until told to: see `go_on`. An Encode is answered with
    `answer_encode`; by default it is done.
    """

    def __init__(
        self, name: str, phases: PhaseSet, model: ModelInfo | None = None, *, incarnation: int = 1
    ) -> None:
        self.worker_id = WorkerId(name)
        self.phases = phases
        self.incarnation = incarnation
        self.model: ModelInfo | None = model or byte_model()
        self.token_at: Callable[[int], int] = token_at
        self.answer: Callable[[Submit], Sequence[Event]] = self.begin
        self.answer_encode: Callable[[Encode], Sequence[Event]] = lambda encode: [self.encoded(encode)]
        self.address = ""
        self.ledger: KvLedger | None = None
        self.submits: list[Submit] = []
        self.encodes: list[Encode] = []
        self.aborts: list[RequestKey] = []
        #: What was submitted and has neither ended nor been aborted; its session's end drops it.
        self.held: dict[RequestKey, Submit | Encode] = {}
        self.num_sessions = 0
        #: Times that it was asked to tell of its cache.
        self.num_subscriptions = 0
        self.num_status_calls = 0
        self._outbox: asyncio.Queue[Sequence[Event] | KvNews | grpc.StatusCode] | None = None
        self._server: grpc.aio.Server | None = None

    # What tests do with it.

    def begin(self, submit: Submit) -> Sequence[Event]:
        """What a good worker says to this Submit at once."""
        if submit.images and Phase.PREFILL in submit.phases:
            return [ImagesWanted(submit.key, tuple(range(len(submit.images))))]
        return self.script(submit)

    def go_on(self) -> None:
        """The pictures of the last Submit are here: say the rest."""
        for event in self.script(self.submits[-1]):
            self.say(event)

    def encoded(self, encode: Encode) -> ImagesEncoded:
        """What a good worker says to this Encode."""
        num_tiles = encode.tile_hi - encode.tile_lo
        return ImagesEncoded(
            encode.key, num_tiles, 0, 4 * num_tiles, 512 * num_tiles, 0.125, 0.0625, 0.25, 0.03125, "grpc"
        )

    def script(self, submit: Submit) -> list[Event]:
        """All that a good worker says to this Submit."""
        key, length = submit.key, len(submit.token_ids)
        end = length + submit.sampling.max_new_tokens
        tokens: list[Event] = []
        for position in range(length, end):
            token_id = self.token_at(position)
            is_stop = token_id in submit.sampling.stop_token_ids
            reason = FinishReason.STOP if is_stop else FinishReason.LENGTH if position == end - 1 else None
            prefill_s = 0.25 if position == length and Phase.PREFILL in submit.phases else None
            tokens.append(TokensGenerated(key, (token_id,), position, reason, prefill_s))
            if is_stop:
                break
        if submit.handoff is None:
            return [PrefillStarted(key, 0.125), *tokens]
        if Phase.PREFILL in submit.phases:
            return [PrefillStarted(key, 0.125), tokens[0], KvTransferred(key, 1000, 2, 0.5, 0.0625)]
        return tokens[1:]

    def say(self, *events: Event) -> None:
        """Send these in one message."""
        assert self._outbox is not None
        for event in events:
            is_last = isinstance(event, KvTransferred | ImagesEncoded | RequestFailed)
            if is_last or getattr(event, "finish_reason", None) is not None:
                self.held.pop(event.key, None)
        self._outbox.put_nowait(events)

    def say_of_cache(self, *events: KvEvent) -> None:
        """Tell of its prefix cache, in one message."""
        assert self._outbox is not None
        self._outbox.put_nowait(KvNews(events))

    def break_session(self) -> None:
        """End the stream with an error; the worker lives on."""
        assert self._outbox is not None
        self._outbox.put_nowait(grpc.StatusCode.INTERNAL)

    async def die(self) -> None:
        """Everything ends at once."""
        assert self._server is not None
        await self._server.stop(None)

    def view(self, state: LifecycleState = LifecycleState.READY, reason: str = "") -> WorkerView:
        """As a controller would publish it."""
        return WorkerView(self.worker_id, self.incarnation, self.phases, state, self.address, reason)

    # WorkerService.

    async def start(self) -> None:
        """Listen at a free port."""
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        add_WorkerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.Model:
        if self.model is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "loading")
        return model_to_pb(self.model)

    async def Session(  # type: ignore[override] # noqa: N802
        self, request_iterator: AsyncIterator[pb.CommandBatch], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        self.num_sessions += 1
        outbox: asyncio.Queue[Sequence[Event] | KvNews | grpc.StatusCode] = asyncio.Queue()
        self._outbox = outbox
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while not isinstance(item := await outbox.get(), grpc.StatusCode):
                batch = pb.EventBatch(incarnation=self.incarnation)
                if isinstance(item, KvNews):
                    batch.kv_events.extend(map(kv_event_to_pb, item.events))
                else:
                    batch.events.extend(map(event_to_pb, item))
                await context.write(batch)
            await context.abort(item, "the test broke it")
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self.held.clear()

    async def _read(self, batches: AsyncIterator[pb.CommandBatch]) -> None:
        async for batch in batches:
            for message in batch.commands:
                command = command_from_pb(message)
                if isinstance(command, Submit):
                    self.submits.append(command)
                    self.held[command.key] = command
                    for event in self.answer(command):
                        self.say(event)
                elif isinstance(command, Encode):
                    self.encodes.append(command)
                    self.held[command.key] = command
                    for event in self.answer_encode(command):
                        self.say(event)
                elif isinstance(command, SubscribeKvEvents):
                    self.num_subscriptions += 1
                elif isinstance(command, Abort):
                    self.aborts.append(command.key)
                    self.held.pop(command.key, None)

    async def GetStatus(self, request: Any, context: Any) -> pb.WorkerStatus:  # noqa: N802
        self.num_status_calls += 1
        return pb.WorkerStatus(worker_id=self.worker_id, incarnation=self.incarnation)

    async def GetKvLedger(self, request: Any, context: Any) -> pb.KvLedger:  # noqa: N802
        if self.ledger is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "loading")
        assert self.ledger is not None
        return ledger_to_pb(self.ledger, self.worker_id, self.incarnation)

    async def Shutdown(self, request: Any, context: Any) -> pb.ShutdownResponse:  # noqa: N802
        return pb.ShutdownResponse()


def says_first(number: int, worker: FakeWorker) -> None:
    """Let a worker say only so much of its part, then be silent."""

    def answer(submit: Submit) -> Sequence[Event]:
        return worker.script(submit)[:number]

    worker.answer = answer


@asynccontextmanager
async def running(*workers: FakeWorker) -> AsyncIterator[None]:
    """Start these, and stop them at the end."""
    for worker in workers:
        await worker.start()
    try:
        yield
    finally:
        for worker in workers:
            await worker.die()


def without_byte_level() -> bytes:
    """A tokenizer.json that the gateway cannot serve."""
    described = json.loads(byte_tokenizer().to_str())
    described["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
    return json.dumps(described).encode()
