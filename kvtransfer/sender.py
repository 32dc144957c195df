"""The machine of the side that has the KV. Pure.

Its blocks stay as they are until the receiver has committed or the transfer is over, so a chunk is read only when a
credit lets it go, and again if it has to be repeated.
"""

import math

from kvtransfer.chunk_queue import ChunkQueue
from kvtransfer.codecs.codec import CodecId
from kvtransfer.digest import transfer_digest
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
    Resume,
    Resumed,
    Verified,
)
from kvtransfer.kv_range import Coverage, KvRange, split
from kvtransfer.session import (
    LIVE,
    ChunkRead,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    KvReady,
    Machine,
    PrefillFinished,
    Reconnect,
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
#: KV in one chunk that the receiver copies by itself: nothing of it has to be held in between. A copy in memory of the
#: host keeps the receiver from all else, a copy on a GPU takes a launch and a wait, whatever its size.
IN_PLACE_BYTES = {"in_process": 2**24, "shm": 2**25, "nixl": 2**23, "cuda_ipc": 2**30}
#: A sender that is silent for this part of a lease renews it.
RENEW_FRACTION = 1 / 3
#: Waits before the stream is opened again, in seconds; the last one is repeated. A request that was not answered is sent
#: again after all but the last: a receiver that is gone is soon known to be.
RECONNECT_DELAYS_S = (0.0, 0.05, 0.2, 1.0)
#: Streams one after the other that were resumed, and brought nothing there; one more ends the transfer.
MAX_FRUITLESS_RESUMES = 5


class SenderMachine(Machine):
    """Sends the KV of one sequence to one receiver.

    request: what to ask for; its timeout_s counts from now_s. block_ids: the transfer's blocks in the pool here.
    max_chunk_bytes: payload of a chunk. resume_s: how long a broken stream is opened again; 0 ends the transfer.
    """

    def __init__(
        self,
        request: Reserve,
        block_ids: tuple[int, ...],
        *,
        max_chunk_bytes: int,
        resume_s: float,
        now_s: float,
    ) -> None:
        super().__init__(TABLE)
        self._request = request
        self._block_ids = block_ids
        self._max_chunk_bytes = max_chunk_bytes
        self._resume_s = resume_s
        self._hard_deadline_s = now_s + request.timeout_s
        self._granted: Granted | None = None
        self._heard_at_s = now_s
        self._sent_at_s = now_s
        self._ready = Coverage(request.layout.num_layers, request.num_tokens)
        #: Ready, and not yet divided into chunks: how large they are depends on how they go.
        self._uncut: list[KvRange] = []
        self._chunks = ChunkQueue()
        self._token_ids: tuple[int, ...] | None = None
        #: On this stream, and on any.
        self._is_finish_sent = False
        self._was_finish_sent = False
        self._first_chunk_at_s: float | None = None
        self._prefill_finished_at_s = math.inf
        self._suspended_at_s = math.inf
        #: The state that a resumed transfer goes back to, and what broke the stream.
        self._state_before = TransferState.RESERVED
        self._broken_by = ""
        self._num_reconnects = 0
        self._num_resumes = 0
        self._num_fruitless_resumes = 0
        #: Chunks that the receiver had when it resumed last.
        self._num_there = 0
        self._num_wire_bytes = 0

    @property
    def transfer_id(self) -> str:
        """See Machine."""
        return self._request.transfer_id

    @property
    def next_deadline_s(self) -> float:
        """Earliest of: the hard deadline, the peer's silence, ours, after which we renew, and the end of trying again."""
        if self.is_ended:
            return math.inf
        if self._granted is None:
            return min(self._hard_deadline_s, self._suspended_at_s + self._resume_s)
        return min(
            self._hard_deadline_s,
            self._heard_at_s + self._granted.lease_s,
            self._suspended_at_s + self._resume_s,
            self._renewal_due_s,
        )

    @property
    def granted(self) -> Granted | None:
        """What the receiver granted, once it has."""
        return self._granted

    @property
    def num_in_flight(self) -> int:
        """See Machine."""
        return self._chunks.num_in_flight

    def check_invariants(self) -> None:
        """Credits are kept, and every chunk is waiting, in flight or acknowledged."""
        self._chunks.check_invariants()
        assert self._chunks.num_in_flight <= (self._granted.credits if self._granted else 0)
        assert not self._is_finish_sent or self._chunks.num_sent == len(self._chunks)
        assert not self._is_finish_sent or self._ready.is_complete
        assert self._token_ids is not None or self.state is not TransferState.VERIFIED
        is_suspended = self.state is TransferState.SUSPENDED
        assert is_suspended == (self._suspended_at_s < math.inf) or self.is_ended

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
        if now_s >= self._suspended_at_s + self._resume_s:
            lost = StreamLost(self.transfer_id, self._state_before, self._broken_by)
            return self._end(TransferState.EXPIRED, lost, tell_peer=False)
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
        offered = {offer.transport for offer in self._request.offers}
        if event.transport not in (*offered, "grpc"):
            return self._violation(f"it wants the KV by {event.transport}, which was not offered")
        lo, hi = self._request.layout.heads
        if not lo <= event.heads[0] < event.heads[1] <= hi:
            return self._violation(f"it wants KV heads {list(event.heads)} of {[lo, hi]}")
        self._granted = event
        self._num_reconnects = 0
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
        self._uncut.append(event.kv_range)
        return self._advance(now_s)

    def _finish_prefill(self, event: PrefillFinished, now_s: float) -> TransferState:
        problem = None
        if self._token_ids is not None:
            problem = "prefill finished twice"
        elif not self._ready.is_complete:
            problem = f"prefill finished with {self._ready.num_missing} tokens of layers not ready"
        if problem is not None:
            error = InvalidTransfer(self.transfer_id, problem)
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        self._token_ids = event.token_ids
        self._prefill_finished_at_s = now_s
        return self._advance(now_s)

    def _was_read(self, event: ChunkRead, now_s: float) -> TransferState:
        number = event.sequence_number
        if not self._chunks.was_read(number, self._codec, event.checksum):
            error = InvalidTransfer(self.transfer_id, f"the KV of chunk {number} changed while it was sent")
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        self._num_wire_bytes += event.num_bytes
        return self._advance(now_s)

    def _acknowledged(self, event: Ack, now_s: float) -> TransferState:
        if event.sequence_number >= self._chunks.num_sent:
            return self._violation(f"it acknowledges chunk {event.sequence_number}, which was never sent")
        self._chunks.acknowledge(event.sequence_number, now_s)
        # It gets on: the next break is one of its own.
        self._num_reconnects = self._num_fruitless_resumes = 0
        return self._advance(now_s)

    def _repeat(self, event: Nack, now_s: float) -> TransferState:
        number = event.sequence_number
        if number >= self._chunks.num_sent:
            return self._violation(f"it rejects chunk {number}, which was never sent")
        num_rejections = self._chunks.reject(number)
        if num_rejections > MAX_RESENDS:
            error = ChunkRejected(self.transfer_id, number, num_rejections, event.reason)
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        return self._advance(now_s)

    def _verified(self, _event: Verified, now_s: float) -> TransferState:
        if not self._was_finish_sent:
            return self._violation("it verified before Finish was sent")
        self._chunks.forget_repeats()
        if not self._is_finish_sent:
            # It had Finish from the stream that broke, and the missing chunks from others; Commit may be lost.
            assert self._token_ids is not None
            self._is_finish_sent = True
            self._send(Commit(self._token_ids), now_s)
        return TransferState.VERIFIED

    def _done(self, _event: Committed, now_s: float) -> TransferState:
        if not self._was_finish_sent:
            return self._violation("it committed before it was told to")
        assert self._granted is not None
        started_at_s = now_s if self._first_chunk_at_s is None else self._first_chunk_at_s
        heads = self._granted.heads[1] - self._granted.heads[0]
        layout = self._request.layout
        report = TransferReport(
            num_bytes=self._request.num_tokens
            * layout.num_layers
            * layout.token_bytes
            * heads
            // layout.num_heads,
            num_wire_bytes=self._num_wire_bytes,
            num_chunks=len(self._chunks),
            transfer_s=now_s - started_at_s,
            busy_s=self._chunks.busy_s,
            exposed_s=now_s - max(started_at_s, self._prefill_finished_at_s),
            transport=self._granted.transport,
            transport_reason=self._granted.transport_reason,
            codec=self._codec,
            num_resent_chunks=self._chunks.num_resent,
            num_resumes=self._num_resumes,
        )
        self._do(ReleaseBlocks(self._block_ids, "the receiver has committed"), End(None, report))
        return TransferState.RELEASED

    # A stream that broke.

    def _suspend(self, event: StreamBroke, now_s: float) -> TransferState:
        if self._resume_s <= 0:
            return self._stream_broke(event, now_s)
        self._state_before, self._broken_by = self.state, event.reason
        self._suspended_at_s = now_s
        return self._reconnect(event, now_s)

    def _reconnect(self, event: StreamBroke, now_s: float) -> TransferState:
        # The request was lost, or the answer to it.
        if self._granted is None and self._num_reconnects == len(RECONNECT_DELAYS_S) - 1:
            return self._stream_broke(event, now_s)
        delay_s = RECONNECT_DELAYS_S[min(self._num_reconnects, len(RECONNECT_DELAYS_S) - 1)]
        self._num_reconnects += 1
        self._do(Reconnect(delay_s))
        return TransferState.SUSPENDED

    def _ask_to_resume(self, _event: Started, now_s: float) -> TransferState:
        request = self._request
        if self._granted is None:
            # The same request twice is one request.
            self._suspended_at_s = math.inf
            self._send(request, now_s)
            return TransferState.REQUESTED
        self._send(
            Resume(request.transfer_id, request.part, self._granted.lease_id, request.incarnation), now_s
        )
        return TransferState.SUSPENDED

    def _resume(self, event: Resumed, now_s: float) -> TransferState:
        last = max((event.first_missing - 1, *event.received))
        if last >= self._chunks.num_sent:
            return self._violation(f"it has chunk {last}, which was never sent")
        has = {*range(event.first_missing), *event.received}
        self._num_fruitless_resumes = 0 if len(has) > self._num_there else self._num_fruitless_resumes + 1
        if self._num_fruitless_resumes > MAX_FRUITLESS_RESUMES:
            lost = StreamLost(self.transfer_id, self._state_before, self._broken_by)
            return self._end(TransferState.ABORTED, lost, tell_peer=True)
        self._num_there = len(has)
        self._suspended_at_s = math.inf
        self._num_resumes += 1
        self._chunks.restart(has)
        # What was said of the end may be lost; it is said once more when there is nothing to send before it.
        self._is_finish_sent = False
        self.state = self._state_before
        return self._advance(now_s)

    def _refused_to_resume(self, event: Refused, now_s: float) -> TransferState:
        """It may only be too busy to listen; then it closes the stream, and the next one may be heard."""
        return self.state if event.retryable else self._refused(event, now_s)

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
        if now_s < self._renewal_due_s:
            return self.state
        self._send(Renew(), now_s)
        return self.state

    # What handlers share.

    @property
    def _codec(self) -> CodecId:
        """What is copied in place is not packed."""
        is_in_place = self._granted is not None and self._granted.transport != "grpc"
        return CodecId.NONE if is_in_place else self._request.codec

    @property
    def _renewal_due_s(self) -> float:
        if self._granted is None or self.state is TransferState.SUSPENDED:
            return math.inf
        return self._sent_at_s + self._granted.lease_s * RENEW_FRACTION

    def _advance(self, now_s: float) -> TransferState:
        """Send what may be sent now: chunks as credits last, those to repeat first, then Finish."""
        if self._granted is None or self.state is TransferState.SUSPENDED:
            return self.state
        self._cut(self._granted)
        while self._chunks.num_in_flight < self._granted.credits:
            number = self._chunks.take(now_s)
            if number is None:
                break
            self._send_chunk(number, now_s)
        is_over = self._token_ids is not None and self._chunks.is_all_sent
        if is_over and not self._is_finish_sent:
            self._is_finish_sent = self._was_finish_sent = True
            self._send(Finish(len(self._chunks), self._digest()), now_s)
            # In advance: the receiver commits as soon as it has verified, a round trip earlier.
            assert self._token_ids is not None
            self._send(Commit(self._token_ids), now_s)
        return TransferState.RECEIVING if self._chunks.num_sent > 0 else TransferState.RESERVED

    def _cut(self, granted: Granted) -> None:
        if not self._uncut:
            return
        layout = self._request.layout
        max_bytes = (
            self._max_chunk_bytes if granted.transport == "grpc" else IN_PLACE_BYTES[granted.transport]
        )
        for kv_range in self._uncut:
            self._chunks.extend(
                split(
                    kv_range,
                    token_bytes=layout.token_bytes,
                    token_step=layout.block_size,
                    max_bytes=max_bytes,
                )
            )
        self._uncut.clear()

    def _digest(self) -> bytes:
        assert self._granted is not None
        request, heads = self._request, self._granted.heads
        return transfer_digest(request.layout, request.token_digest, heads, self._chunks.all_read())

    def _send(self, frame: Reserve | Resume | Renew | Finish | Commit, now_s: float) -> None:
        self._sent_at_s = now_s
        self._do(SendFrame(frame))

    def _send_chunk(self, number: int, now_s: float) -> None:
        granted = self._granted
        assert granted is not None
        if self._first_chunk_at_s is None:
            self._first_chunk_at_s = now_s
        self._sent_at_s = now_s
        self._do(
            SendChunk(
                granted.lease_id,
                granted.incarnation,
                number,
                self._chunks[number],
                granted.heads,
                self._codec,
                granted.transport,
            )
        )

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
#: States in which the receiver has granted a lease and the stream stands.
_LEASED = (_S.RESERVED, _S.RECEIVING, _S.VERIFIED)

TABLE: Table = {
    (_S.NEW, Started): _M._ask,  # -> REQUESTED
    (_S.REQUESTED, Granted): _M._begin,  # -> RESERVED or RECEIVING
    (_S.REQUESTED, Refused): _M._refused,  # -> ABORTED
    # Prefill goes on whatever the stream does; with the first KV RESERVED -> RECEIVING, else they stay.
    **{(state, KvReady): _M._queue for state in LIVE if state is not _S.VERIFIED},
    **{(state, PrefillFinished): _M._finish_prefill for state in LIVE if state is not _S.VERIFIED},
    (_S.RECEIVING, ChunkRead): _M._was_read,  # stays
    (_S.RECEIVING, Ack): _M._acknowledged,  # stays
    (_S.RECEIVING, Nack): _M._repeat,  # stays, or -> ABORTED when it was repeated too often
    (_S.RECEIVING, Verified): _M._verified,  # -> VERIFIED
    (_S.RECEIVING, Committed): _M._done,  # -> RELEASED: what came before it was lost
    (_S.VERIFIED, Committed): _M._done,  # -> RELEASED
    # A broken stream: -> SUSPENDED, and back to where it was; one that never stood ends the transfer.
    (_S.NEW, StreamBroke): _M._stream_broke,  # -> ABORTED
    (_S.REQUESTED, StreamBroke): _M._suspend,  # -> SUSPENDED, or ABORTED after some tries
    **{(state, StreamBroke): _M._suspend for state in _LEASED},  # -> SUSPENDED
    (_S.SUSPENDED, StreamBroke): _M._reconnect,  # stays, or -> ABORTED after some tries without a lease
    (_S.SUSPENDED, Started): _M._ask_to_resume,  # stays, or -> REQUESTED without a lease
    (_S.SUSPENDED, Resumed): _M._resume,  # -> RESERVED or RECEIVING
    (_S.SUSPENDED, Committed): _M._done,  # -> RELEASED: only the answer was lost
    (_S.SUSPENDED, Refused): _M._refused_to_resume,  # stays when it may be granted later, else -> ABORTED
    (_S.SUSPENDED, ChunkRead): _M._was_read,  # stays
    # Late and doubled answers, and the answer to Renew.
    (_S.VERIFIED, ChunkRead): _M._stay,
    (_S.VERIFIED, Ack): _M._stay,
    (_S.VERIFIED, Nack): _M._stay,
    (_S.VERIFIED, Verified): _M._stay,
    **{(state, Granted): _M._stay for state in _LEASED},
    **{(state, Resumed): _M._stay for state in _LEASED},
    # What may end it at any time: -> ABORTED.
    **{(state, Ended): _M._ended_by_peer for state in LIVE},
    **{(state, GivenUp): _M._give_up for state in LIVE},
    **{(state, HostBroke): _M._host_broke for state in LIVE},
    **{(state, FrameDamaged): _M._damaged for state in LIVE},
    # Deadlines end it before the table is asked; what is left to do is to renew.
    **{(state, TimePassed): _M._renew_if_silent for state in LIVE},
}
