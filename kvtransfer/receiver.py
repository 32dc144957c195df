"""The machine of the side that gets the KV. Pure.

From the moment the host hands blocks over until the machine releases or commits them, they are the
transfer's alone: no other sequence can own a block that a late chunk is written to.
"""

import math
from collections.abc import Callable

from kvtransfer.codecs.codec import CodecId
from kvtransfer.digest import transfer_digest
from kvtransfer.errors import (
    DeadlineExceeded,
    DigestMismatch,
    HostFailed,
    LeaseExpired,
    PhasewiseTransferError,
    ProtocolViolation,
    ReservationRefused,
    StreamLost,
    TransferAborted,
    TransferEnded,
)
from kvtransfer.frames import (
    Abort,
    Ack,
    Chunk,
    Commit,
    Committed,
    Ended,
    Finish,
    Granted,
    Nack,
    Refused,
    Renew,
    Reserve,
    Resume,
    Resumed,
    SenderFrame,
    Verified,
)
from kvtransfer.kv_range import Coverage, KvRange
from kvtransfer.layout import KvLayout, blocks_needed, head_bytes, incompatibility, inexactness, shared_heads
from kvtransfer.lease import LeaseTable
from kvtransfer.session import (
    LIVE,
    Action,
    BlocksReserved,
    CancelReservation,
    ChunkDamaged,
    ChunkWritten,
    CommitBlocks,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    Machine,
    PartsWhole,
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendFrame,
    StreamBroke,
    Table,
    TimePassed,
    TransferState,
    WriteChunk,
)

#: Of what a codec unpacks.
UNPACKED_DTYPE = "float32"
#: A transfer whose digest does not fit is sent once more as a whole.
MAX_DIGEST_MISMATCHES = 1
#: A chunk that has not come after Finish is asked for when nothing came for this part of a lease: on several
#: streams chunks may come after what was sent behind them.
MISSING_FRACTION = 1 / 4
#: Nor before so many times what the missing bytes would take at the rate of those that came: a link that is slow, or gets
#: slower, has lost nothing.
MISSING_PATIENCE = 4


class ReceiverMachine(Machine):
    """Receives the KV of one sequence.

    leases: of this worker, shared by its transfers. lease_s: how long a silent sender keeps its blocks,
    and how long a stream may take to say what it wants. resume_s: how long the lease outlives a broken stream; 0
    ends it. max_in_flight: chunks, the credits of the sender. problem_of: why a request is not the one that is waited for.
    """

    def __init__(
        self,
        layout: KvLayout,
        incarnation: int,
        leases: LeaseTable,
        *,
        lease_s: float,
        resume_s: float,
        max_in_flight: int,
        now_s: float,
        problem_of: Callable[[Reserve], str | None] = lambda _request: None,
    ) -> None:
        super().__init__(TABLE)
        self._problem_of = problem_of
        self._resume_s = resume_s
        self._layout = layout
        self._incarnation = incarnation
        self._leases = leases
        self._lease_s = lease_s
        self._max_in_flight = max_in_flight
        self._hard_deadline_s = now_s + lease_s
        self._request: Reserve | None = None
        self._block_ids: tuple[int, ...] = ()
        self._lease_id: int | None = None
        self._transport = "grpc"
        self._transport_reason = ""
        self._heads = (0, 0)
        self._coverage = Coverage(0, 0)
        #: Being written, by their numbers.
        self._writing: dict[int, Chunk] = {}
        #: In the blocks: what the digest says of each.
        self._received: dict[int, tuple[KvRange, CodecId, int]] = {}
        #: Rejected and not yet here.
        self._rejected: set[int] = set()
        self._finish: Finish | None = None
        #: Of a Commit that came before all was verified.
        self._commit_ahead: Commit | None = None
        self.num_digest_mismatches = 0
        #: KV that was written, in bytes of the pool here.
        self.num_bytes_written = 0
        #: When chunks that are missing after Finish are asked for, and how often they were since anything came.
        self._ask_missing_at_s = math.inf
        self._num_asks = 0
        self._last_chunk_at_s = 0.0
        self._suspended_at_s = math.inf
        self._state_before = TransferState.RESERVED
        self._broken_by = ""

    @property
    def transfer_id(self) -> str:
        """See Machine."""
        return self._request.transfer_id if self._request else ""

    @property
    def next_deadline_s(self) -> float:
        """End of the lease, or earlier of what is waited for; before there is one, of what may be waited."""
        if self.is_ended:
            return math.inf
        if self._lease_id is None:
            return self._hard_deadline_s
        expires_at_s = self._leases.get(self._lease_id).expires_at_s
        return min(expires_at_s, self._suspended_at_s + self._resume_s, self._ask_missing_at_s)

    @property
    def request(self) -> Reserve | None:
        """What was asked for, once it was."""
        return self._request

    @property
    def lease_id(self) -> int | None:
        """Of the lease that it holds."""
        return self._lease_id

    @property
    def is_lossy(self) -> bool:
        """What has come is not exactly what would be computed here: a codec packed some of it, or the sender has other dtypes."""
        if self._request is not None and inexactness(self._request.layout, self._layout) is not None:
            return True
        return any(codec is not CodecId.NONE for _, codec, _ in self._received.values())

    @property
    def transport(self) -> str:
        """How the KV comes."""
        return self._transport

    @property
    def transport_reason(self) -> str:
        """Why not by a better way."""
        return self._transport_reason

    @property
    def is_unanswered(self) -> bool:
        """Nothing but the request was heard: its sender may not know yet that it was granted, and ask again."""
        state = self._state_before if self.state is TransferState.SUSPENDED else self.state
        return state in (TransferState.REQUESTED, TransferState.RESERVED) and self._commit_ahead is None

    @property
    def awaited_commit(self) -> Commit | None:
        """Of one part of a transfer: what it commits when all of them are whole, as this one is; None before."""
        state = self._state_before if self.state is TransferState.SUSPENDED else self.state
        return self._commit_ahead if state is TransferState.VERIFIED else None

    def wants(self, chunk: Chunk) -> bool:
        """See Machine."""
        is_new = self.state in _OPEN and chunk.sequence_number not in self._received
        return is_new and self._place_problem(chunk) is None

    def handle(self, event: object, now_s: float) -> list[Action]:
        """See Machine. Blocks that come after the end go straight back."""
        if self.is_ended and isinstance(event, BlocksReserved):
            return [ReleaseBlocks(event.block_ids, "the transfer had ended before its blocks came")]
        return super().handle(event, now_s)

    def check_invariants(self) -> None:
        """A lease, and blocks, are held in exactly the states that name them; what is written is covered."""
        has_lease = self.state in _LEASED
        assert (self._lease_id is not None) == has_lease, self.state
        assert bool(self._block_ids) == has_lease, self.state
        if self._lease_id is not None:
            assert self._leases.get(self._lease_id).block_ids == self._block_ids
        assert not self._received.keys() & self._rejected, "a chunk is here, and rejected"
        is_suspended = self.state is TransferState.SUSPENDED
        assert is_suspended == (self._suspended_at_s < math.inf) or self.is_ended
        if self.state in (TransferState.VERIFIED, TransferState.COMMITTED):
            assert self._coverage.is_complete, "verified while KV is missing"
            assert self._finish is not None
            assert self._received.keys() == set(range(self._finish.num_chunks))

    def _end_if_late(self, event: object, now_s: float) -> TransferState | None:
        if isinstance(event, BlocksReserved):
            # Ours from now on, also if it is too late to use them.
            self._block_ids = event.block_ids
        if isinstance(event, PartsWhole):
            # The others commit now: this one does too, however late it is.
            return None
        if now_s >= self._hard_deadline_s:
            timeout_s = self._request.timeout_s if self._request else self._lease_s
            error = DeadlineExceeded(self.transfer_id, self.state, timeout_s)
            return self._end(TransferState.EXPIRED, error, tell_peer=True)
        if self._lease_id is None:
            return None
        if self._leases.is_expired(self._lease_id, now_s):
            silence = LeaseExpired(self.transfer_id, self.state, self._lease_s)
            return self._end(TransferState.EXPIRED, silence, tell_peer=True)
        if now_s >= self._suspended_at_s + self._resume_s:
            lost = StreamLost(self.transfer_id, self._state_before, self._broken_by)
            return self._end(TransferState.EXPIRED, lost, tell_peer=False)
        if isinstance(event, SenderFrame) and self._is_fresh(event):
            self._leases.renew(self._lease_id, now_s)
        return None

    def _unexpected(self, event: object) -> TransferState:
        return self._violation(f"{type(event).__name__} is not expected")

    # Handlers, in the order of a transfer's life.

    def _ask_host(self, event: Reserve, now_s: float) -> TransferState:
        self._request = event
        self._hard_deadline_s = now_s + event.timeout_s
        if event.incarnation != self._incarnation:
            reason = f"this is incarnation {self._incarnation}, not {event.incarnation}"
            return self._refuse(reason, retryable=False)
        mismatch = incompatibility(event.layout, self._layout)
        if mismatch is None and event.num_parts == 1:
            mismatch = _missing_heads(event.layout, self._layout)
        mismatch = mismatch or self._problem_of(event)
        if mismatch is not None:
            return self._refuse(mismatch, retryable=False)
        self._do(ReserveBlocks(event))
        return TransferState.REQUESTED

    def _grant(self, event: BlocksReserved, now_s: float) -> TransferState:
        assert self._request is not None
        num_blocks = blocks_needed(self._request.num_tokens, self._layout.block_size)
        assert len(event.block_ids) >= num_blocks, f"{len(event.block_ids)} blocks for {num_blocks}"
        heads = shared_heads(self._request.layout, self._layout)
        assert heads is not None
        self._heads = heads
        self._transport, self._transport_reason = event.transport, event.transport_reason
        self._coverage = Coverage(self._layout.num_layers, self._request.num_tokens)
        lease = self._leases.grant(
            self.transfer_id,
            event.block_ids,
            now_s=now_s,
            lease_s=self._lease_s,
            hard_deadline_s=self._hard_deadline_s,
        )
        self._lease_id = lease.lease_id
        self._do(SendFrame(self._granted(lease.lease_id)))
        return TransferState.RESERVED

    def _denied(self, event: ReservationDenied, _now_s: float) -> TransferState:
        return self._refuse(event.reason, retryable=event.retryable)

    def _take_chunk(self, event: Chunk, now_s: float) -> TransferState:
        number = event.sequence_number
        if number in self._received and self._is_fresh(event):
            self._do(SendFrame(Ack(number)))
            return self.state
        problem = self._chunk_problem(event)
        if problem is not None:
            return self._violation(problem)
        assert self._request is not None
        self._rejected.discard(number)
        self._writing[number] = event
        dtype = self._request.layout.dtype if event.codec is CodecId.NONE else UNPACKED_DTYPE
        self._do(WriteChunk(event, self._block_ids, dtype))
        self._last_chunk_at_s = now_s
        return TransferState.RECEIVING

    def _written(self, event: ChunkWritten, now_s: float) -> TransferState:
        number = event.sequence_number
        chunk = self._writing.pop(number)
        self._coverage.add(chunk.kv_range)
        where, num_heads = chunk.kv_range, self._heads[1] - self._heads[0]
        head_bytes = self._layout.token_bytes // self._layout.num_heads
        self.num_bytes_written += where.num_layers * where.num_tokens * num_heads * head_bytes
        self._received[number] = chunk.kv_range, chunk.codec, chunk.checksum
        self._do(SendFrame(Ack(number)))
        self._ask_missing_later(now_s)
        return self._verify_if_complete(now_s)

    def _write_damaged(self, event: ChunkDamaged, now_s: float) -> TransferState:
        self._writing.pop(event.sequence_number)
        self._ask_missing_later(now_s)
        self._reject(event.sequence_number, event.reason)
        return self.state

    def _note_finish(self, event: Finish, now_s: float) -> TransferState:
        if event.num_chunks <= max(self._received, default=-1) or self._finish not in (None, event):
            return self._violation(f"Finish with {event.num_chunks} chunks, which is not what was sent")
        if event.num_chunks > self._max_chunks:
            return self._violation(f"Finish with {event.num_chunks} chunks for {self._max_chunks} parts")
        self._finish = event
        self._ask_missing_later(now_s)
        return self._verify_if_complete(now_s)

    def _damaged(self, event: FrameDamaged, _now_s: float) -> TransferState:
        number = event.sequence_number
        if number is None or number >= self._max_chunks:
            return self._end(TransferState.ABORTED, event.error, tell_peer=True)
        if number not in self._received:
            self._rejected.discard(number)
            self._reject(number, str(event.error))
        return self.state

    def _ask_for_missing(self, _event: TimePassed, now_s: float) -> TransferState:
        if self._finish is None or now_s < self._ask_missing_at_s:
            return self.state
        for number in range(self._finish.num_chunks):
            if number not in self._received and number not in self._writing:
                self._rejected.discard(number)
                self._reject(number, "it has not arrived")
        self._num_asks += 1
        self._ask_missing_at_s = now_s + self._missing_wait_s()
        return self.state

    def _renewed(self, _event: Renew, _now_s: float) -> TransferState:
        assert self._lease_id is not None
        self._do(SendFrame(self._granted(self._lease_id)))
        return self.state

    def _commit_later(self, event: Commit, _now_s: float) -> TransferState:
        """The sender wants nothing more than that all arrives."""
        if self._commit_ahead not in (None, event):
            return self._violation("two Commits differ")
        self._commit_ahead = event
        return self.state

    def _commit(self, event: Commit, now_s: float) -> TransferState:
        assert self._request is not None
        if self._request.num_parts > 1:
            # Who joins the parts says when: all of them, or none.
            return self._commit_later(event, now_s)
        return self._hand_over(event, now_s)

    def _commit_with_others(self, _event: PartsWhole, now_s: float) -> TransferState:
        commit = self.awaited_commit
        assert commit is not None
        return self._hand_over(commit, now_s)

    def _hand_over(self, event: Commit, now_s: float) -> TransferState:
        assert self._request is not None
        assert self._lease_id is not None
        self._leases.settle(self._lease_id, now_s)
        self._do(
            CommitBlocks(self._block_ids, event.token_ids, self._request.token_digest),
            SendFrame(Committed()),
            End(None),
        )
        self._forget_blocks()
        return TransferState.COMMITTED

    def _verified_again(self, _event: Finish, _now_s: float) -> TransferState:
        self._do(SendFrame(Verified()))
        return self.state

    # A stream that broke.

    def _granted_again(self, event: Reserve, _now_s: float) -> TransferState:
        """The sender did not hear of it. The same request changes nothing."""
        is_early = TransferState.RESERVED in (self.state, self._state_before)
        if event != self._request or not is_early:
            return self._violation("Reserve is another than before, or comes after chunks")
        assert self._lease_id is not None
        self._suspended_at_s = math.inf
        self._do(SendFrame(self._granted(self._lease_id)))
        return TransferState.RESERVED

    def _suspend(self, event: StreamBroke, now_s: float) -> TransferState:
        if self._resume_s <= 0:
            return self._stream_broke(event, now_s)
        self._state_before, self._broken_by = self.state, event.reason
        self._suspended_at_s = now_s
        self._ask_missing_at_s = math.inf
        return TransferState.SUSPENDED

    def _resume(self, event: Resume, now_s: float) -> TransferState:
        """Also while the old stream seems to stand: the sender knows better."""
        if not self._is_fresh(event):
            return self._violation(f"it resumes lease {event.lease_id} of incarnation {event.incarnation}")
        state = self._state_before if self.state is TransferState.SUSPENDED else self.state
        self._suspended_at_s = math.inf
        self._rejected.clear()
        if state is not TransferState.VERIFIED:
            self._ask_missing_later(now_s)
        first_missing = next(i for i in range(len(self._received) + 1) if i not in self._received)
        beyond = tuple(sorted(number for number in self._received if number > first_missing))
        self._do(SendFrame(Resumed(first_missing, beyond)))
        return state

    # Handlers that may come at any time.

    def _aborted_by_peer(self, event: Abort | Refused, _now_s: float) -> TransferState:
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

    def _damaged_early(self, event: FrameDamaged, _now_s: float) -> TransferState:
        return self._end(TransferState.ABORTED, event.error, tell_peer=True)

    # What handlers share.

    @property
    def _max_chunks(self) -> int:
        """A chunk holds at least one token of one layer."""
        assert self._request is not None
        return self._layout.num_layers * self._request.num_tokens

    def _is_fresh(self, event: object) -> bool:
        """False for a frame that speaks of another lease, or to an earlier process."""
        if not isinstance(event, (Chunk, Resume)):
            return True
        return (event.lease_id, event.incarnation) == (self._lease_id, self._incarnation)

    def _chunk_problem(self, chunk: Chunk) -> str | None:
        """Why this chunk may not be written; None when it may."""
        problem = self._place_problem(chunk)
        return self._size_problem(chunk) if problem is None else problem

    def _place_problem(self, chunk: Chunk) -> str | None:
        """The same, of all but its size: before its payload is looked at."""
        if not self._is_fresh(chunk):
            return (
                f"a chunk for lease {chunk.lease_id} of incarnation {chunk.incarnation}; "
                f"this is lease {self._lease_id} of incarnation {self._incarnation}"
            )
        number = chunk.sequence_number
        limit = self._max_chunks if self._finish is None else self._finish.num_chunks
        if number >= limit:
            return f"chunk {number} of {limit}"
        if number in self._writing:
            return f"chunk {number} comes while it is being written"
        problem = self._coverage.problem(chunk.kv_range)
        if problem is not None:
            return f"chunk {number} holds {problem}"
        if chunk.heads != self._heads:
            return f"chunk {number} holds KV heads {list(chunk.heads)}; {list(self._heads)} were asked for"
        if chunk.is_in_place != (self._transport != "grpc"):
            return f"chunk {number} does not come by {self._transport}"
        return None

    def _size_problem(self, chunk: Chunk) -> str | None:
        assert self._request is not None
        sender, where = self._request.layout, chunk.kv_range
        if chunk.is_in_place:
            num_blocks = blocks_needed(chunk.source_first_token + where.num_tokens, sender.block_size)
            if chunk.source_first_token < sender.block_size and len(chunk.source_block_ids) == num_blocks:
                return None
            return (
                f"chunk {chunk.sequence_number} names {len(chunk.source_block_ids)} blocks for {num_blocks}"
            )
        dtype = sender.dtype if chunk.codec is CodecId.NONE else UNPACKED_DTYPE
        num_heads = chunk.heads[1] - chunk.heads[0]
        per_token = 2 * where.num_layers * num_heads * head_bytes(dtype, sender.head_dim)
        num_bytes = where.num_tokens * per_token
        if len(chunk.payload) != num_bytes:
            return f"chunk {chunk.sequence_number} has {len(chunk.payload)} bytes for {num_bytes}"
        return None

    def _reject(self, number: int, reason: str) -> None:
        if number not in self._rejected:
            self._rejected.add(number)
            self._do(SendFrame(Nack(number, reason)))

    def _ask_missing_later(self, now_s: float) -> None:
        """Something has come: what is still missing has time again."""
        self._num_asks = 0
        if self._finish is not None and self.state is not TransferState.VERIFIED:
            self._ask_missing_at_s = now_s + self._missing_wait_s()

    def _missing_wait_s(self) -> float:
        """How long nothing may come after Finish before what is missing is taken for lost; for ever before a rate is known."""
        assert self._request is not None
        assert self._lease_id is not None
        num_missing = self._coverage.num_missing
        num_here = self._max_chunks - num_missing
        if num_here == 0:
            return math.inf
        took_s = self._last_chunk_at_s - self._leases.get(self._lease_id).granted_at_s
        expected_s = took_s * num_missing / num_here
        # Asking in vain makes a slow link slower.
        return math.ldexp(
            max(self._lease_s * MISSING_FRACTION, expected_s * MISSING_PATIENCE), self._num_asks
        )

    def _verify_if_complete(self, now_s: float) -> TransferState:
        finish = self._finish
        if finish is None or len(self._received) < finish.num_chunks:
            return TransferState.RECEIVING
        if not self._coverage.is_complete:
            return self._violation(
                f"all {finish.num_chunks} chunks are here, {self._coverage.num_missing} parts are not"
            )
        if self._digest() != finish.digest:
            return self._start_over()
        self._ask_missing_at_s = math.inf
        self._do(SendFrame(Verified()))
        assert self._request is not None
        if self._commit_ahead is not None and self._request.num_parts == 1:
            return self._hand_over(self._commit_ahead, now_s)
        return TransferState.VERIFIED

    def _digest(self) -> bytes:
        assert self._request is not None
        chunks = (self._received[number] for number in sorted(self._received))
        return transfer_digest(self._request.layout, self._request.token_digest, self._heads, chunks)

    def _start_over(self) -> TransferState:
        """Each chunk is whole, all together are not what was sent: everything comes once more, then no more."""
        self.num_digest_mismatches += 1
        if self.num_digest_mismatches > MAX_DIGEST_MISMATCHES:
            error = DigestMismatch(self.transfer_id, self.num_digest_mismatches)
            return self._end(TransferState.ABORTED, error, tell_peer=True)
        assert self._request is not None
        numbers = sorted(self._received)
        self._received.clear()
        self._coverage = Coverage(self._layout.num_layers, self._request.num_tokens)
        for number in numbers:
            self._reject(number, "the digest of the transfer does not fit")
        return TransferState.RECEIVING

    def _granted(self, lease_id: int) -> Granted:
        return Granted(
            lease_id,
            self._incarnation,
            self._max_in_flight,
            self._lease_s,
            self._transport,
            self._transport_reason,
            self._heads,
        )

    def _refuse(self, reason: str, *, retryable: bool) -> TransferState:
        error = ReservationRefused(self.transfer_id, reason, retryable)
        self._do(SendFrame(Refused(reason, retryable)), End(error))
        return TransferState.ABORTED

    def _violation(self, problem: str) -> TransferState:
        error = ProtocolViolation(self.transfer_id, self.state, problem)
        return self._end(TransferState.ABORTED, error, tell_peer=True)

    def _end(self, state: TransferState, error: PhasewiseTransferError, *, tell_peer: bool) -> TransferState:
        if self._block_ids:
            self._do(ReleaseBlocks(self._block_ids, str(error)))
        elif self.state is TransferState.REQUESTED:
            self._do(CancelReservation(str(error)))
        if tell_peer:
            self._do(SendFrame(Ended(str(error))))
        self._do(End(error))
        self._forget_blocks()
        return state

    def _forget_blocks(self) -> None:
        if self._lease_id is not None:
            self._leases.release(self._lease_id)
        self._lease_id = None
        self._block_ids = ()


def _missing_heads(sender: KvLayout, receiver: KvLayout) -> str | None:
    """Why this sender alone cannot fill the receiver's blocks; None when it can."""
    if shared_heads(sender, receiver) == receiver.heads:
        return None
    return f"the sender has KV heads {list(sender.heads)} of {list(receiver.heads)}: the others must send theirs too"


_S = TransferState
_M = ReceiverMachine
#: States in which the stream stands and the transfer holds a lease.
_OPEN = (_S.RESERVED, _S.RECEIVING, _S.VERIFIED)
#: States in which the transfer holds a lease.
_LEASED = (*_OPEN, _S.SUSPENDED)

TABLE: Table = {
    (_S.NEW, Reserve): _M._ask_host,  # -> REQUESTED, or ABORTED with Refused
    (_S.REQUESTED, BlocksReserved): _M._grant,  # -> RESERVED
    (_S.REQUESTED, ReservationDenied): _M._denied,  # -> ABORTED with Refused
    (_S.RESERVED, Chunk): _M._take_chunk,  # -> RECEIVING, or ABORTED when it may not be written
    (_S.RESERVED, Finish): _M._note_finish,  # -> RECEIVING; it has overtaken the chunks
    (_S.RECEIVING, Chunk): _M._take_chunk,  # stays, or -> ABORTED
    (_S.RECEIVING, ChunkWritten): _M._written,  # stays, or -> VERIFIED with the last one
    (_S.RECEIVING, ChunkDamaged): _M._write_damaged,  # stays
    (_S.RECEIVING, Finish): _M._note_finish,  # stays, or -> VERIFIED when all is here
    (_S.RESERVED, Commit): _M._commit_later,  # stays, or -> ABORTED when it is another than before
    (_S.RECEIVING, Commit): _M._commit_later,  # stays, and -> COMMITTED when all is verified
    (_S.VERIFIED, Commit): _M._commit,  # -> COMMITTED
    # What makes no sense ends it; of a chunk that cannot be unpacked it is known which one to ask for again.
    (_S.NEW, Refused): _M._aborted_by_peer,  # -> ABORTED: of a fetch that is not listened to
    (_S.NEW, FrameDamaged): _M._damaged_early,  # -> ABORTED
    (_S.REQUESTED, FrameDamaged): _M._damaged_early,  # -> ABORTED
    **{(state, FrameDamaged): _M._damaged for state in _OPEN},  # stays, or -> ABORTED
    # Of a transfer that comes in parts.
    (_S.VERIFIED, PartsWhole): _M._commit_with_others,  # -> COMMITTED
    (_S.SUSPENDED, PartsWhole): _M._commit_with_others,  # -> COMMITTED
    # A broken stream: -> SUSPENDED, and back to where it was; before there is a lease it ends the transfer.
    (_S.NEW, StreamBroke): _M._stream_broke,  # -> ABORTED
    (_S.REQUESTED, StreamBroke): _M._stream_broke,  # -> ABORTED
    **{(state, StreamBroke): _M._suspend for state in _OPEN},  # -> SUSPENDED
    (_S.SUSPENDED, StreamBroke): _M._stay,
    # By a stream for chunks alone, which stands longer: it will be sent again.
    (_S.SUSPENDED, Chunk): _M._stay,
    (_S.SUSPENDED, FrameDamaged): _M._stay,
    **{(state, Resume): _M._resume for state in _LEASED},  # -> RESERVED, RECEIVING or VERIFIED
    (_S.SUSPENDED, Reserve): _M._granted_again,  # -> RESERVED: the first answer was lost
    # Doubled frames, and Renew, which every state of a lease answers.
    (_S.REQUESTED, Reserve): _M._stay,
    (_S.RESERVED, Reserve): _M._granted_again,  # stays
    (_S.RECEIVING, Reserve): _M._stay,
    (_S.VERIFIED, Reserve): _M._stay,
    (_S.VERIFIED, Chunk): _M._take_chunk,  # stays: all chunks are known
    (_S.VERIFIED, Finish): _M._verified_again,  # stays
    **{(state, Renew): _M._renewed for state in _OPEN},
    # What may end it at any time: -> ABORTED.
    **{(state, Abort): _M._aborted_by_peer for state in LIVE},
    **{(state, GivenUp): _M._give_up for state in LIVE},
    **{(state, HostBroke): _M._host_broke for state in LIVE},
    # Deadlines end it before the table is asked; what is left is to ask for chunks that do not come.
    **{(state, TimePassed): _M._stay for state in LIVE},
    (_S.RECEIVING, TimePassed): _M._ask_for_missing,  # stays
}
