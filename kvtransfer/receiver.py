"""The machine of the side that gets the KV. Pure.

From the moment the host hands blocks over until the machine releases or commits them, they are the
transfer's alone: no other sequence can own a block that a late chunk is written to.
"""

import math

from kvtransfer.errors import (
    DeadlineExceeded,
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
    SenderFrame,
    Verified,
)
from kvtransfer.kv_range import Coverage
from kvtransfer.layout import KvLayout, blocks_needed, incompatibility
from kvtransfer.lease import LeaseTable
from kvtransfer.session import (
    LIVE,
    Action,
    BlocksReserved,
    CancelReservation,
    CommitBlocks,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    Machine,
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


class ReceiverMachine(Machine):
    """Receives the KV of one sequence.

    leases: of this worker, shared by its transfers. lease_s: how long a silent sender keeps its blocks,
    and how long a stream may take to say what it wants. max_in_flight: chunks, the credits of the sender.
    """

    def __init__(
        self,
        layout: KvLayout,
        incarnation: int,
        leases: LeaseTable,
        *,
        lease_s: float,
        max_in_flight: int,
        now_s: float,
    ) -> None:
        super().__init__(TABLE)
        self._layout = layout
        self._incarnation = incarnation
        self._leases = leases
        self._lease_s = lease_s
        self._max_in_flight = max_in_flight
        self._hard_deadline_s = now_s + lease_s
        self._request: Reserve | None = None
        self._block_ids: tuple[int, ...] = ()
        self._lease_id: int | None = None
        self._coverage = Coverage(0, 0)
        self._received: set[int] = set()
        #: Rejected and not yet here.
        self._rejected: set[int] = set()
        #: Of Finish.
        self._num_chunks: int | None = None

    @property
    def transfer_id(self) -> str:
        """See Machine."""
        return self._request.transfer_id if self._request else ""

    @property
    def next_deadline_s(self) -> float:
        """End of the lease; before there is one, of what may be waited."""
        if self.is_ended:
            return math.inf
        if self._lease_id is None:
            return self._hard_deadline_s
        return self._leases.get(self._lease_id).expires_at_s

    def handle(self, event: object, now_s: float) -> list[Action]:
        """See Machine. Blocks that come after the end go straight back."""
        if self.is_ended and isinstance(event, BlocksReserved):
            return [ReleaseBlocks(event.block_ids, "the transfer had ended before its blocks came")]
        return super().handle(event, now_s)

    def check_invariants(self) -> None:
        """A lease, and blocks, are held in exactly the states that name them."""
        has_lease = self.state in _LEASED
        assert (self._lease_id is not None) == has_lease, self.state
        assert bool(self._block_ids) == has_lease, self.state
        if self._lease_id is not None:
            assert self._leases.get(self._lease_id).block_ids == self._block_ids
        if self.state in (TransferState.VERIFIED, TransferState.COMMITTED):
            assert self._coverage.is_complete
            assert self._received == set(range(self._num_chunks or 0))

    def _end_if_late(self, event: object, now_s: float) -> TransferState | None:
        if isinstance(event, BlocksReserved):
            # Ours from now on, also if it is too late to use them.
            self._block_ids = event.block_ids
        if now_s >= self._hard_deadline_s:
            timeout_s = self._request.timeout_s if self._request else self._lease_s
            error = DeadlineExceeded(self.transfer_id, self.state, timeout_s)
            return self._end(TransferState.EXPIRED, error, tell_peer=True)
        if self._lease_id is None:
            return None
        if self._leases.is_expired(self._lease_id, now_s):
            silence = LeaseExpired(self.transfer_id, self.state, self._lease_s)
            return self._end(TransferState.EXPIRED, silence, tell_peer=True)
        if isinstance(event, SenderFrame):
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
        if mismatch is not None:
            return self._refuse(mismatch, retryable=False)
        self._do(ReserveBlocks(event.transfer_id, event.num_tokens, event.max_tokens, event.timeout_s))
        return TransferState.REQUESTED

    def _grant(self, event: BlocksReserved, now_s: float) -> TransferState:
        assert self._request is not None
        num_blocks = blocks_needed(self._request.num_tokens, self._layout.block_size)
        assert len(event.block_ids) >= num_blocks, f"{len(event.block_ids)} blocks for {num_blocks}"
        self._coverage = Coverage(self._layout.num_layers, num_blocks)
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

    def _take_chunk(self, event: Chunk, _now_s: float) -> TransferState:
        if event.sequence_number in self._received and self._is_ours(event):
            self._do(SendFrame(Ack(event.sequence_number)))
            return self.state
        problem = self._chunk_problem(event)
        if problem is not None:
            return self._violation(problem)
        where = event.kv_range
        block_ids = self._block_ids[where.block_lo : where.block_hi]
        self._do(
            WriteChunk(block_ids, where.layer_lo, where.layer_hi, event.payload),
            SendFrame(Ack(event.sequence_number)),
        )
        self._coverage.add(where)
        self._received.add(event.sequence_number)
        self._rejected.discard(event.sequence_number)
        return self._verify_if_complete()

    def _finish(self, event: Finish, _now_s: float) -> TransferState:
        if event.num_chunks <= max(self._received, default=-1) or self._num_chunks not in (
            None,
            event.num_chunks,
        ):
            return self._violation(f"Finish with {event.num_chunks} chunks, which is not what was sent")
        if event.num_chunks > self._max_chunks:
            return self._violation(f"Finish with {event.num_chunks} chunks for {self._max_chunks} parts")
        self._num_chunks = event.num_chunks
        for number in range(event.num_chunks):
            # All are on their way or were: what is neither here nor asked for again has been lost.
            if number not in self._received:
                self._reject(number, "it has not arrived")
        return self._verify_if_complete()

    def _damaged(self, event: FrameDamaged, _now_s: float) -> TransferState:
        number = event.sequence_number
        if number is None or number >= self._max_chunks:
            return self._end(TransferState.ABORTED, event.error, tell_peer=True)
        if number not in self._received:
            self._rejected.discard(number)
            self._reject(number, str(event.error))
        return self.state

    def _renewed(self, _event: Renew, _now_s: float) -> TransferState:
        assert self._lease_id is not None
        self._do(SendFrame(self._granted(self._lease_id)))
        return self.state

    def _commit(self, event: Commit, _now_s: float) -> TransferState:
        self._do(
            CommitBlocks(self._block_ids, event.token_ids),
            SendFrame(Committed()),
            End(None),
        )
        self._forget_blocks()
        return TransferState.COMMITTED

    def _verified_again(self, _event: Finish, _now_s: float) -> TransferState:
        self._do(SendFrame(Verified()))
        return self.state

    # Handlers that may come at any time.

    def _aborted_by_peer(self, event: Abort, _now_s: float) -> TransferState:
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
        """A chunk holds at least one block of one layer."""
        assert self._request is not None
        num_blocks = blocks_needed(self._request.num_tokens, self._layout.block_size)
        return self._layout.num_layers * num_blocks

    def _is_ours(self, chunk: Chunk) -> bool:
        return (chunk.lease_id, chunk.incarnation) == (self._lease_id, self._incarnation)

    def _chunk_problem(self, chunk: Chunk) -> str | None:
        """Why this chunk may not be written; None when it may."""
        if not self._is_ours(chunk):
            return (
                f"a chunk for lease {chunk.lease_id} of incarnation {chunk.incarnation}; "
                f"this is lease {self._lease_id} of incarnation {self._incarnation}"
            )
        limit = self._max_chunks if self._num_chunks is None else self._num_chunks
        if chunk.sequence_number >= limit:
            return f"chunk {chunk.sequence_number} of {limit}"
        problem = self._coverage.problem(chunk.kv_range)
        if problem is not None:
            return f"chunk {chunk.sequence_number} holds {problem}"
        num_bytes = chunk.kv_range.num_bytes(self._layout)
        if len(chunk.payload) != num_bytes:
            return f"chunk {chunk.sequence_number} has {len(chunk.payload)} bytes for {num_bytes}"
        return None

    def _reject(self, number: int, reason: str) -> None:
        if number not in self._rejected:
            self._rejected.add(number)
            self._do(SendFrame(Nack(number, reason)))

    def _verify_if_complete(self) -> TransferState:
        if self._num_chunks is None or len(self._received) < self._num_chunks:
            return TransferState.RECEIVING
        if not self._coverage.is_complete:
            return self._violation(
                f"all {self._num_chunks} chunks are here, {self._coverage.num_missing} parts are not"
            )
        self._do(SendFrame(Verified()))
        return TransferState.VERIFIED

    def _granted(self, lease_id: int) -> Granted:
        return Granted(lease_id, self._incarnation, self._max_in_flight, self._lease_s)

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


_S = TransferState
_M = ReceiverMachine
#: States in which the transfer holds a lease.
_LEASED = (_S.RESERVED, _S.RECEIVING, _S.VERIFIED)

TABLE: Table = {
    (_S.NEW, Reserve): _M._ask_host,  # -> REQUESTED, or ABORTED with Refused
    (_S.REQUESTED, BlocksReserved): _M._grant,  # -> RESERVED
    (_S.REQUESTED, ReservationDenied): _M._denied,  # -> ABORTED with Refused
    (_S.RESERVED, Chunk): _M._take_chunk,  # -> RECEIVING, or ABORTED when it may not be written
    (_S.RESERVED, Finish): _M._finish,  # -> RECEIVING; it has overtaken the chunks
    (_S.RECEIVING, Chunk): _M._take_chunk,  # stays, or -> VERIFIED with the last one, or ABORTED
    (_S.RECEIVING, Finish): _M._finish,  # stays, or -> VERIFIED when all is here
    (_S.VERIFIED, Commit): _M._commit,  # -> COMMITTED
    # Damage: asked for again, where it can be known what it was.
    (_S.NEW, FrameDamaged): _M._damaged_early,  # -> ABORTED
    (_S.REQUESTED, FrameDamaged): _M._damaged_early,  # -> ABORTED
    **{(state, FrameDamaged): _M._damaged for state in _LEASED},  # stays, or -> ABORTED
    # Doubled frames, and Renew, which every state of a lease answers.
    (_S.REQUESTED, Reserve): _M._stay,
    **{(state, Reserve): _M._stay for state in _LEASED},
    (_S.VERIFIED, Chunk): _M._take_chunk,  # stays: all chunks are known
    (_S.VERIFIED, Finish): _M._verified_again,  # stays
    **{(state, Renew): _M._renewed for state in _LEASED},
    # What may end it at any time: -> ABORTED.
    **{(state, Abort): _M._aborted_by_peer for state in LIVE},
    **{(state, GivenUp): _M._give_up for state in LIVE},
    **{(state, HostBroke): _M._host_broke for state in LIVE},
    **{(state, StreamBroke): _M._stream_broke for state in LIVE},
    # Deadlines end it before the table is asked.
    **{(state, TimePassed): _M._stay for state in LIVE},
}
