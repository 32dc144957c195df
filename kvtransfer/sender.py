"""The machine of the side that has the KV. Pure.

Its blocks stay as they are until the receiver has committed or the transfer is over, so a chunk is
gathered only when a credit lets it go, and again if it has to be repeated.
"""

import math

from kvtransfer.errors import (
    ChunkRejected,
    DeadlineExceeded,
    HostFailed,
    InvalidTransfer,
    LeaseExpired,
    PhasewiseTransferError,
    ProtocolViolation,
    StreamLost,
    TransferAborted,
    TransferEnded,
    TransferRefused,
)
from kvtransfer.frames import (
    Abort,
    Ack,
    Commit,
    Committed,
    Ended,
    Finish,
    Granted,
    Nack,
    ReceiverFrame,
    Refused,
    Renew,
    Reserve,
    Verified,
)
from kvtransfer.kv_range import Coverage, KvRange, split
from kvtransfer.layout import blocks_needed
from kvtransfer.session import (
    LIVE,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    KvReady,
    Machine,
    PrefillFinished,
    ReleaseBlocks,
    SendChunk,
    SendFrame,
    Started,
    StreamBroke,
    Table,
    TimePassed,
    TransferReport,
    TransferState,
)

#: A chunk is sent again at most this often.
MAX_RESENDS = 3
#: A sender that is silent for this part of a lease renews it.
RENEW_FRACTION = 1 / 3


class SenderMachine(Machine):
    """Sends the KV of one sequence to one receiver.

    request: what to ask for; its timeout_s counts from now_s. block_ids: where the sequence's blocks lie
    in the pool here, in order. max_chunk_bytes: payload of a chunk.
    """

    def __init__(
        self, request: Reserve, block_ids: tuple[int, ...], *, max_chunk_bytes: int, now_s: float
    ) -> None:
        super().__init__(TABLE)
        self._request = request
        self._block_ids = block_ids
        self._max_chunk_bytes = max_chunk_bytes
        self._hard_deadline_s = now_s + request.timeout_s
        self._granted: Granted | None = None
        self._heard_at_s = now_s
        self._sent_at_s = now_s
        num_blocks = blocks_needed(request.num_tokens, request.layout.block_size)
        self._ready = Coverage(request.layout.num_layers, num_blocks)
        #: What each chunk holds; the index is its sequence number. Kept to the end, for repeats.
        self._chunks: list[KvRange] = []
        #: Chunks below this have been sent at least once.
        self._next_to_send = 0
        #: Sent and not acknowledged -> how often it was sent again.
        self._in_flight: dict[int, int] = {}
        self._token_ids: tuple[int, ...] | None = None
        self._is_finish_sent = False
        self._first_chunk_at_s: float | None = None
        self._prefill_finished_at_s = math.inf

    @property
    def transfer_id(self) -> str:
        """See Machine."""
        return self._request.transfer_id

    @property
    def next_deadline_s(self) -> float:
        """Earliest of: the hard deadline, the peer's silence, and ours, after which we renew."""
        if self.is_ended:
            return math.inf
        if self._granted is None:
            return self._hard_deadline_s
        lease_s = self._granted.lease_s
        return min(
            self._hard_deadline_s,
            self._heard_at_s + lease_s,
            self._sent_at_s + lease_s * RENEW_FRACTION,
        )

    def check_invariants(self) -> None:
        """Credits are kept, and every chunk is waiting, in flight or acknowledged."""
        max_in_flight = self._granted.credits if self._granted else 0
        assert len(self._in_flight) <= max_in_flight, self._in_flight
        assert all(0 <= number < self._next_to_send for number in self._in_flight)
        assert self._next_to_send <= len(self._chunks)
        assert not self._is_finish_sent or self._next_to_send == len(self._chunks)
        assert not self._is_finish_sent or self._ready.is_complete
        assert self._token_ids is not None or self.state is not TransferState.VERIFIED

    def _end_if_late(self, event: object, now_s: float) -> TransferState | None:
        if isinstance(event, ReceiverFrame):
            self._heard_at_s = now_s
        if isinstance(event, Committed):
            # It is done, however late we hear of it.
            return None
        if now_s >= self._hard_deadline_s:
            error = DeadlineExceeded(self.transfer_id, self.state, self._request.timeout_s)
            return self._end(TransferState.EXPIRED, error, tell_peer=True)
        if self._granted is not None and now_s >= self._heard_at_s + self._granted.lease_s:
            silence = LeaseExpired(self.transfer_id, self.state, self._granted.lease_s)
            return self._end(TransferState.EXPIRED, silence, tell_peer=True)
        return None

    def _unexpected(self, event: object) -> TransferState:
        problem = f"{type(event).__name__} is not expected"
        error: PhasewiseTransferError
        if isinstance(event, ReceiverFrame):
            error = ProtocolViolation(self.transfer_id, self.state, problem)
        else:
            error = InvalidTransfer(self.transfer_id, f"{problem} while {self.state}")
        return self._end(TransferState.ABORTED, error, tell_peer=True)

    # Handlers, in the order of a transfer's life.

    def _ask(self, _event: Started, now_s: float) -> TransferState:
        self._send(self._request, now_s)
        return TransferState.REQUESTED

    def _begin(self, event: Granted, now_s: float) -> TransferState:
        if event.incarnation != self._request.incarnation:
            return self._violation(f"incarnation {event.incarnation} answers")
        self._granted = event
        return self._advance(now_s)

    def _refused(self, event: Refused, _now_s: float) -> TransferState:
        error = TransferRefused(self.transfer_id, event.reason, event.retryable)
        return self._end(TransferState.ABORTED, error, tell_peer=False)

    def _queue(self, event: KvReady, now_s: float) -> TransferState:
        problem = self._ready.problem(event.kv_range)
        if problem is not None:
            error = InvalidTransfer(self.transfer_id, f"KV is ready for {problem}")
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        self._ready.add(event.kv_range)
        self._chunks.extend(split(event.kv_range, self._request.layout, self._max_chunk_bytes))
        return self._advance(now_s)

    def _finish_prefill(self, event: PrefillFinished, now_s: float) -> TransferState:
        problem = None
        if self._token_ids is not None:
            problem = "prefill finished twice"
        elif not event.token_ids:
            problem = "prefill finished without a token"
        elif not self._ready.is_complete:
            problem = f"prefill finished with {self._ready.num_missing} blocks of layers not ready"
        if problem is not None:
            error = InvalidTransfer(self.transfer_id, problem)
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        self._token_ids = event.token_ids
        self._prefill_finished_at_s = now_s
        return self._advance(now_s)

    def _acknowledged(self, event: Ack, now_s: float) -> TransferState:
        if event.sequence_number >= self._next_to_send:
            return self._violation(f"it acknowledges chunk {event.sequence_number}, which was never sent")
        self._in_flight.pop(event.sequence_number, None)
        return self._advance(now_s)

    def _repeat(self, event: Nack, now_s: float) -> TransferState:
        number = event.sequence_number
        if number >= self._next_to_send:
            return self._violation(f"it rejects chunk {number}, which was never sent")
        if number not in self._in_flight:
            return self.state
        self._in_flight[number] += 1
        if self._in_flight[number] > MAX_RESENDS:
            error = ChunkRejected(self.transfer_id, number, MAX_RESENDS + 1, event.reason)
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        self._send_chunk(number, now_s)
        return self.state

    def _commit(self, _event: Verified, now_s: float) -> TransferState:
        if not self._is_finish_sent or self._token_ids is None:
            return self._violation("it verified before Finish was sent")
        self._send(Commit(self._token_ids), now_s)
        return TransferState.VERIFIED

    def _done(self, _event: Committed, now_s: float) -> TransferState:
        started_at_s = now_s if self._first_chunk_at_s is None else self._first_chunk_at_s
        report = TransferReport(
            num_bytes=sum(chunk.num_bytes(self._request.layout) for chunk in self._chunks),
            num_chunks=len(self._chunks),
            transfer_s=now_s - started_at_s,
            exposed_s=now_s - max(started_at_s, self._prefill_finished_at_s),
        )
        self._do(ReleaseBlocks(self._block_ids, "the receiver has committed"), End(None, report))
        return TransferState.RELEASED

    # Handlers that may come at any time.

    def _ended_by_peer(self, event: Ended, _now_s: float) -> TransferState:
        error = TransferEnded(self.transfer_id, self.state, event.reason)
        return self._end(TransferState.ABORTED, error, tell_peer=False)

    def _give_up(self, event: GivenUp, _now_s: float) -> TransferState:
        error = TransferAborted(self.transfer_id, event.reason)
        return self._end(TransferState.ABORTED, error, tell_peer=True)

    def _host_broke(self, event: HostBroke, _now_s: float) -> TransferState:
        error = HostFailed(self.transfer_id, event.problem)
        return self._end(TransferState.ABORTED, error, tell_peer=True)

    def _stream_broke(self, event: StreamBroke, _now_s: float) -> TransferState:
        error = StreamLost(self.transfer_id, self.state, event.reason)
        return self._end(TransferState.ABORTED, error, tell_peer=False)

    def _damaged(self, event: FrameDamaged, _now_s: float) -> TransferState:
        return self._end(TransferState.ABORTED, event.error, tell_peer=True)

    def _renew_if_silent(self, _event: TimePassed, now_s: float) -> TransferState:
        if self._granted is None or now_s < self._sent_at_s + self._granted.lease_s * RENEW_FRACTION:
            return self.state
        self._send(Renew(), now_s)
        return self.state

    # What handlers share.

    def _advance(self, now_s: float) -> TransferState:
        """Send what may be sent now: chunks as credits last, then Finish."""
        if self._granted is None:
            return self.state
        while self._next_to_send < len(self._chunks) and len(self._in_flight) < self._granted.credits:
            self._in_flight[self._next_to_send] = 0
            self._send_chunk(self._next_to_send, now_s)
            self._next_to_send += 1
        is_all_sent = self._token_ids is not None and self._next_to_send == len(self._chunks)
        if is_all_sent and not self._is_finish_sent:
            self._is_finish_sent = True
            self._send(Finish(len(self._chunks)), now_s)
        return TransferState.RECEIVING if self._next_to_send > 0 else TransferState.RESERVED

    def _send(self, frame: Reserve | Renew | Finish | Commit, now_s: float) -> None:
        self._sent_at_s = now_s
        self._do(SendFrame(frame))

    def _send_chunk(self, number: int, now_s: float) -> None:
        assert self._granted is not None
        if self._first_chunk_at_s is None:
            self._first_chunk_at_s = now_s
        self._sent_at_s = now_s
        where = self._chunks[number]
        block_ids = self._block_ids[where.block_lo : where.block_hi]
        self._do(SendChunk(self._granted.lease_id, self._granted.incarnation, number, where, block_ids))

    def _violation(self, problem: str) -> TransferState:
        error = ProtocolViolation(self.transfer_id, self.state, problem)
        return self._end(TransferState.ABORTED, error, tell_peer=True)

    def _end(self, state: TransferState, error: PhasewiseTransferError, *, tell_peer: bool) -> TransferState:
        # What was to be sent before is void: the blocks go back now.
        if tell_peer and self.state is not TransferState.NEW:
            self._do(SendFrame(Abort(str(error))))
        self._do(ReleaseBlocks(self._block_ids, str(error)), End(error))
        return state


_S = TransferState
_M = SenderMachine
#: States in which the receiver has granted a lease.
_LEASED = (_S.RESERVED, _S.RECEIVING, _S.VERIFIED)

TABLE: Table = {
    (_S.NEW, Started): _M._ask,  # -> REQUESTED
    (_S.NEW, KvReady): _M._queue,  # stays
    (_S.NEW, PrefillFinished): _M._finish_prefill,  # stays
    (_S.REQUESTED, KvReady): _M._queue,  # stays
    (_S.REQUESTED, PrefillFinished): _M._finish_prefill,  # stays
    (_S.REQUESTED, Granted): _M._begin,  # -> RESERVED or RECEIVING
    (_S.REQUESTED, Refused): _M._refused,  # -> ABORTED
    (_S.RESERVED, KvReady): _M._queue,  # -> RECEIVING
    (_S.RESERVED, PrefillFinished): _M._finish_prefill,  # -> ABORTED: nothing was ready
    (_S.RECEIVING, KvReady): _M._queue,  # stays
    (_S.RECEIVING, PrefillFinished): _M._finish_prefill,  # stays
    (_S.RECEIVING, Ack): _M._acknowledged,  # stays
    (_S.RECEIVING, Nack): _M._repeat,  # stays, or -> ABORTED when it was repeated too often
    (_S.RECEIVING, Verified): _M._commit,  # -> VERIFIED
    (_S.VERIFIED, Committed): _M._done,  # -> RELEASED
    # Late and doubled answers, and the answer to Renew.
    (_S.VERIFIED, Ack): _M._stay,
    (_S.VERIFIED, Nack): _M._stay,
    (_S.VERIFIED, Verified): _M._stay,
    **{(state, Granted): _M._stay for state in _LEASED},
    # What may end it at any time: -> ABORTED.
    **{(state, Ended): _M._ended_by_peer for state in LIVE},
    **{(state, GivenUp): _M._give_up for state in LIVE},
    **{(state, HostBroke): _M._host_broke for state in LIVE},
    **{(state, StreamBroke): _M._stream_broke for state in LIVE},
    **{(state, FrameDamaged): _M._damaged for state in LIVE},
    # Deadlines end it before the table is asked; what is left to do is to renew.
    **{(state, TimePassed): _M._renew_if_silent for state in LIVE},
}
