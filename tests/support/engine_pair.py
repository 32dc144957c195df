"""A prefill engine and a decode engine, and all that lies between them, without a loop, a model or a wire.

The owner of the requests submits each to both sides, and aborts at one what has ended at the other, as a
gateway does. A transfer is two halves with messages on their way between them. A test decides what happens next.
"""

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.codecs.codec import CodecId
from kvtransfer.kv_range import Coverage, KvRange
from kvtransfer.layout import blocks_needed
from kvtransfer.session import TransferReport
from tests.support.engine_fakes import DECODE, PREFILL, assert_empty, assert_ledger, expanded, make_engine
from tests.support.engine_fakes import submit as make_submit
from workers.api import (
    Abort,
    EngineConfig,
    KvTransferred,
    PrefillStarted,
    RequestFailed,
    RequestKey,
    Submit,
    TokensGenerated,
)
from workers.engine.messages import (
    BlocksReserved,
    CancelReservation,
    CommitTransfer,
    EndTransfer,
    FinishTransfer,
    KvReady,
    Message,
    Output,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
    TransferFailed,
    TransferSent,
)
from workers.engine.step_plan import Slice
from workers.engine.step_result import StepResult

CONFIG = EngineConfig(block_size=2, token_budget=7, max_running_sequences=3, max_waiting_requests=5)
NUM_BLOCKS = 14
NUM_LAYERS = 2
#: A transfer hears nothing for so long before it gives up, in seconds.
PATIENCE_S = 8.0


REPORT = TransferReport(
    num_bytes=1,
    num_wire_bytes=1,
    num_chunks=1,
    transfer_s=0.1,
    busy_s=0.1,
    exposed_s=0.0,
    transport="grpc",
    transport_reason="",
    codec=CodecId.NONE,
    num_resent_chunks=0,
    num_resumes=0,
)


def next_token(part: Slice) -> int:
    """A function of the prompt's length and the position, whoever computes it."""
    return expected_token(part.sequence.num_prompt_tokens, len(part.sequence.token_ids))


def expected_token(num_prompt: int, position: int) -> int:
    return 50 + (num_prompt * 7 + position * 3) % 40


@dataclass
class Half:
    """One side of a transfer, from its first message to its end."""

    block_ids: tuple[int, ...] = ()
    deadline_s: float = 0.0
    coverage: Coverage = field(default_factory=lambda: Coverage(0, 0))
    token_ids: tuple[int, ...] = ()
    token_digest: bytes = b""
    is_granted: bool = False
    is_over: bool = False


@dataclass
class Request:
    """What its owner knows."""

    submit: Submit
    tokens: dict[int, int] = field(default_factory=dict)
    end: str = ""

    @property
    def num_tokens(self) -> int:
        """Prompt and all that may be generated."""
        return len(self.submit.token_ids) + self.submit.sampling.max_new_tokens


class EnginePair:
    """`sides` are the engines; `mail` is what is on its way to each, and to each half of a transfer."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.engines = {
            "prefill": make_engine(PREFILL, config=CONFIG, num_blocks=NUM_BLOCKS),
            "decode": make_engine(DECODE, config=CONFIG, num_blocks=NUM_BLOCKS),
        }
        self.mail: dict[str, deque[Callable[[], None]]] = defaultdict(deque)
        self.requests: dict[RequestKey, Request] = {}
        self.senders: dict[str, Half] = {}
        self.receivers: dict[str, Half] = {}

    # What can happen.

    def submit(self, num_prompt: int, max_new: int, timeout_s: float) -> RequestKey:
        """A new request, on its way to both."""
        name = f"r{len(self.requests)}"
        submits = [
            make_submit(name, phases, num_prompt=num_prompt, max_new=max_new, timeout_s=timeout_s)
            for phases in (PREFILL, DECODE)
        ]
        self.requests[submits[0].key] = Request(submits[0])
        for side, submit in zip(("prefill", "decode"), submits, strict=True):
            self._post(side, submit)
        return submits[0].key

    def cancel(self, key: RequestKey) -> None:
        """Its owner does not want it any more."""
        self._end(key, "cancelled")

    def deliver(self, name: str) -> None:
        """The oldest message of this queue arrives."""
        self.mail[name].popleft()()
        self.check()

    def step(self, side: str) -> bool:
        """One step of an engine; False when it had nothing to compute."""
        engine = self.engines[side]
        engine.expire(self.now_s)
        plan = engine.schedule(self.now_s)
        self._read(side)
        if plan is not None:
            for layer in range(NUM_LAYERS):
                for ready in engine.kv_ready(plan, layer, layer + 1):
                    self._kv_ready(ready)
            tokens = [next_token(part) for part in plan.slices if part.yields_token]
            engine.complete(plan, StepResult(tokens), self.now_s)
            self._read(side)
        self.check()
        return plan is not None

    def wait(self, duration_s: float) -> None:
        """Time passes: engines expire what is late, and so do transfers."""
        self.now_s += duration_s
        for side, engine in self.engines.items():
            engine.expire(self.now_s)
            self._read(side)
        for halves, end in ((self.senders, self._sender_ends), (self.receivers, self._receiver_ends)):
            for transfer_id in [i for i, half in halves.items() if half.deadline_s <= self.now_s]:
                end(transfer_id, "too late", tells_peer=True)
        self.check()

    def break_stream(self, transfer_id: str) -> None:
        """Both halves hear that their stream broke, and what is on its way between them is lost."""
        self.mail[f"to receiver {transfer_id}"].clear()
        self.mail[f"to sender {transfer_id}"].clear()
        self._sender_ends(transfer_id, "broke", tells_peer=False)
        self._receiver_ends(transfer_id, "broke", tells_peer=False)

    def anything(self) -> bool:
        """Something that is due happens; False when nothing is."""
        queues = [name for name, queue in self.mail.items() if queue]
        if queues and self.rng.random() < 0.7:
            self.deliver(self.rng.choice(queues))
            return True
        sides = ["prefill", "decode"]
        self.rng.shuffle(sides)
        num_stepped = sum(self.step(side) for side in sides)
        if num_stepped:
            return True
        if queues:
            self.deliver(self.rng.choice(queues))
        return bool(queues)

    def settle(self) -> None:
        """All that is due happens."""
        for _ in range(10_000):
            if not self.anything():
                return
        raise AssertionError("it never settles")

    def check(self) -> None:
        """What holds at every moment."""
        for engine in self.engines.values():
            engine.check_invariants()
            assert_ledger(engine, self.now_s)

    def assert_over(self) -> None:
        """Nothing is left anywhere."""
        assert all(request.end for request in self.requests.values()), self.requests
        assert not any(self.mail.values())
        assert all(half.is_over for half in (*self.senders.values(), *self.receivers.values()))
        for engine in self.engines.values():
            assert_empty(engine)

    # Requests.

    def _end(self, key: RequestKey, why: str) -> None:
        request = self.requests[key]
        if request.end:
            return
        request.end = why
        for side in self.engines:
            self._post(side, Abort(key))

    def _event(self, event: Output) -> None:
        match event:
            case TokensGenerated():
                request = self.requests[event.key]
                assert not request.end or request.end in ("cancelled", "failed")
                [token_id] = event.token_ids
                assert event.first_position not in request.tokens
                request.tokens[event.first_position] = token_id
                is_last = event.first_position == request.num_tokens - 1
                assert is_last == (event.finish_reason is not None)
                # The last token may overtake the first: both have to be here.
                if len(request.tokens) == request.submit.sampling.max_new_tokens:
                    self._end(event.key, "done")
            case RequestFailed():
                self._end(event.key, "failed")
            case PrefillStarted() | KvTransferred():
                assert event.key in self.requests

    # Transfers. What is called `_..._ends` ends one half once.

    def _read(self, side: str) -> None:
        for output in expanded(self.engines[side].take_outputs()):
            match output:
                case StartTransfer():
                    self._start(output)
                case FinishTransfer():
                    self.senders[output.transfer_id].token_ids = output.token_ids
                    self._commit_if_complete(output.transfer_id)
                case BlocksReserved():
                    self._granted(output)
                case ReservationRefused():
                    self._receiver_ends(output.transfer_id, output.reason, tells_peer=True, is_refused=True)
                case EndTransfer():
                    self._sender_ends(output.transfer_id, output.reason, tells_peer=True)
                    self._receiver_ends(output.transfer_id, output.reason, tells_peer=True)
                case _:
                    self.mail[f"events of {side}"].append(lambda event=output: self._event(event))  # type: ignore[misc]

    def _start(self, start: StartTransfer) -> None:
        assert start.transfer_id not in self.senders
        num_blocks = blocks_needed(start.num_tokens, CONFIG.block_size)
        assert len(start.block_ids) == num_blocks
        deadline_s = self.now_s + min(start.timeout_s, PATIENCE_S)
        self.senders[start.transfer_id] = Half(
            start.block_ids,
            deadline_s,
            coverage=Coverage(NUM_LAYERS, start.num_tokens),
            token_digest=start.token_digest,
        )
        reserve = ReserveBlocks(start.transfer_id, start.num_tokens, start.max_tokens, deadline_s)

        def ask() -> None:
            self.receivers[start.transfer_id] = Half(deadline_s=deadline_s)
            self._post("decode", reserve)

        self.mail[f"to receiver {start.transfer_id}"].append(ask)

    def _granted(self, granted: BlocksReserved) -> None:
        half = self.receivers[granted.transfer_id]
        if half.is_over:
            # Withdrawn, but the engine had not heard of it.
            self._post("decode", ReleaseTransfer(granted.transfer_id, granted.block_ids, "withdrawn"))
            return
        half.block_ids, half.is_granted = granted.block_ids, True
        self.mail[f"to sender {granted.transfer_id}"].append(lambda: self._hears_grant(granted.transfer_id))

    def _hears_grant(self, transfer_id: str) -> None:
        self.senders[transfer_id].is_granted = True
        self._commit_if_complete(transfer_id)

    def _kv_ready(self, ready: KvReady) -> None:
        half = self.senders[ready.transfer_id]
        kv_range = KvRange(ready.layer_lo, ready.layer_hi, ready.token_lo, ready.token_hi)
        if not half.is_over:
            assert half.coverage.problem(kv_range) is None
            half.coverage.add(kv_range)

    def _commit_if_complete(self, transfer_id: str) -> None:
        """All KV is there and prefill has ended: the receiver takes it, and says so."""
        half = self.senders[transfer_id]
        if half.is_over or not half.is_granted or not half.token_ids:
            return
        assert half.coverage.is_complete
        self.mail[f"to receiver {transfer_id}"].append(lambda: self._commit(transfer_id, half.token_ids))

    def _commit(self, transfer_id: str, token_ids: tuple[int, ...]) -> None:
        half = self.receivers[transfer_id]
        if half.is_over:
            return
        half.is_over = True
        self._post(
            "decode",
            CommitTransfer(transfer_id, half.block_ids, token_ids, self.senders[transfer_id].token_digest),
        )
        self.mail[f"to sender {transfer_id}"].append(lambda: self._sent(transfer_id))

    def _sent(self, transfer_id: str) -> None:
        half = self.senders[transfer_id]
        if half.is_over:
            return
        half.is_over = True
        self._post("prefill", ReleaseTransfer(transfer_id, half.block_ids, "committed"))
        self._post("prefill", TransferSent(transfer_id, REPORT))

    def _sender_ends(self, transfer_id: str, reason: str, *, tells_peer: bool) -> None:
        half = self.senders.get(transfer_id)
        if half is None or half.is_over:
            return
        half.is_over = True
        self._post("prefill", ReleaseTransfer(transfer_id, half.block_ids, reason))
        self._post("prefill", TransferFailed(transfer_id, reason))
        if tells_peer:
            queue = self.mail[f"to receiver {transfer_id}"]
            queue.append(lambda: self._receiver_ends(transfer_id, reason, tells_peer=False))

    def _receiver_ends(
        self, transfer_id: str, reason: str, *, tells_peer: bool, is_refused: bool = False
    ) -> None:
        half = self.receivers.get(transfer_id)
        if half is None or half.is_over:
            return
        half.is_over = True
        if half.is_granted:
            self._post("decode", ReleaseTransfer(transfer_id, half.block_ids, reason))
        elif not is_refused:
            self._post("decode", CancelReservation(transfer_id))
        if tells_peer:
            queue = self.mail[f"to sender {transfer_id}"]
            queue.append(lambda: self._sender_ends(transfer_id, reason, tells_peer=False))

    def _post(self, side: str, message: Message) -> None:
        def arrive() -> None:
            self.engines[side].handle(message, self.now_s)
            self._read(side)

        # Requests come by another way than transfers.
        way = "requests" if isinstance(message, Submit | Abort) else "transfers"
        self.mail[f"{way} of {side}"].append(arrive)
