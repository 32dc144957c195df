"""Both machines of a transfer, two block pools, and a way between them that loses, doubles, reorders and damages.

No loop and no clock: a test decides what happens next. Every message is real bytes, so the checksums are part of what
is tested. What the loops of `driver`, `client` and `server` do around the machines is done here in the same order.
"""

import math
import random
from collections import Counter

from kvtransfer.digest import token_digest
from kvtransfer.errors import CorruptFrame
from kvtransfer.frames import Fetch, Nack
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import blocks_needed
from kvtransfer.lease import LeaseTable
from kvtransfer.session import (
    Action,
    BlocksReserved,
    CancelReservation,
    ChunkRead,
    CommitBlocks,
    End,
    FrameDamaged,
    KvReady,
    PartsWhole,
    PrefillFinished,
    Reconnect,
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendChunk,
    SendFrame,
    Started,
    StreamBroke,
    TimePassed,
    TransferState,
    WriteChunk,
)
from kvtransfer.wire import encode
from tests.support.kvtransfer_copies import event_of, read_chunk, write_chunk
from tests.support.kvtransfer_moves import moves
from tests.support.kvtransfer_serving import new_receiver, new_sender, request_of
from tests.support.kvtransfer_shape import (
    FIRST_INCARNATION,
    LEASE_S,
    NOT_ARRIVED,
    NUM_POOL_BLOCKS,
    RESUME_S,
    TIMEOUT_S,
    TOKEN_IDS,
    Shape,
    prefill_order,
)
from tests.support.kvtransfer_sides import Side, Stream, Transfer
from tests.support.kvtransfer_tiny_pool import TinyPool, random_kv


class World:
    """Two workers. `rng` decides how prefill divides the KV, and what the hosts do where they may choose."""

    def __init__(self, rng: random.Random, shape: Shape | None = None) -> None:
        self.rng = rng
        self.shape = shape or Shape.draw(rng)
        self.now_s = 0.0
        self.incarnation = FIRST_INCARNATION
        self.leases = LeaseTable()
        self.sender_pool = TinyPool(self.shape.sender_layout, NUM_POOL_BLOCKS, rng)
        self.receiver_pool = TinyPool(self.shape.receiver_layout, NUM_POOL_BLOCKS, rng)
        self.transfers: list[Transfer] = []
        #: Every side there was, with those that a restart or a retry has replaced.
        self.all_sides: list[Side] = []
        self.sessions: dict[str, Side] = {}
        #: How often each row of a table was used: (side, state, event).
        self.rows: Counter[tuple[str, TransferState, str]] = Counter()
        self.num_events = 0
        #: Chunks that the receiver missed.
        self.num_asked_for = 0
        #: Nothing that is written arrives.
        self.is_silent = False
        #: Streams that will not open.
        self.num_failing_opens = 0
        #: Bits that flip when the next chunks are copied.
        self.num_bad_copies = 0
        #: A chunk is not read at once.
        self.is_reading_slow = False
        self.is_reserving_refused = False

    # How a transfer begins.

    def begin(self, transfer_id: str = "t1", incarnation: int | None = None) -> Transfer:
        """A prefill worker begins to hand over. incarnation: of the receiver, as it knows it."""
        transfer = self._new_transfer(transfer_id)
        request = request_of(self, transfer, self.incarnation if incarnation is None else incarnation)
        transfer.sender = new_sender(self, transfer, request, RESUME_S)
        return transfer

    def begin_fetch(self, transfer_id: str = "t1") -> Transfer:
        """A worker asks another for what that one has cached."""
        transfer = self._new_transfer(transfer_id)
        transfer.is_fetch = True
        side = new_receiver(self, transfer, LeaseTable(), resume_s=0.0)
        side.stream = Stream()
        hashes = (b"hash",)
        frame = Fetch(transfer_id, self.shape.receiver_layout, self.incarnation, hashes, 1, TIMEOUT_S)
        self._send(side, encode(frame))
        return transfer

    def _new_transfer(self, transfer_id: str) -> Transfer:
        layout, num_tokens = self.shape.sender_layout, self.shape.num_tokens
        transfer = Transfer(
            transfer_id,
            num_tokens,
            token_digest(self.rng.choices(range(1000), k=num_tokens)),
            random_kv(layout, num_tokens, self.rng),
            prefill_order(layout.num_layers, num_tokens, self.rng),
        )
        self.transfers.append(transfer)
        return transfer

    # One event.

    def post(self, side: Side, event: object) -> None:
        """One event to one machine; its actions are done as the driver does them."""
        if side.is_dead:
            return
        self.num_events += 1
        state, was_ended = side.machine.state, side.machine.is_ended
        side.note_before(event, self.now_s)
        for action in side.machine.handle(event, self.now_s):
            self._perform(side, action)
        side.note_after(event, self.now_s)
        if not was_ended:
            if side.machine.state is not TransferState.EXPIRED:
                self.rows[side.name, state, type(event).__name__] += 1
            if side.machine.is_ended:
                self._forget(side)
        side.check(self.now_s)
        if side.name == "receiver":
            self.leases.check_invariants()

    def _forget(self, side: Side) -> None:
        if self.sessions.get(side.transfer.transfer_id) is side:
            del self.sessions[side.transfer.transfer_id]
        if side.stream is None:
            side.outbox.clear()
        elif not side.outbox:
            side.stream.left_by.add(side.name)

    def _perform(self, side: Side, action: Action) -> None:
        match action:
            case SendFrame():
                self.num_asked_for += isinstance(action.frame, Nack) and action.frame.reason == NOT_ARRIVED
                side.outbox.append(action)
            case SendChunk():
                side.unanswered.add(action.sequence_number)
                side.outbox.append(action)
            case Reconnect():
                side.reconnect_at_s = self.now_s + action.delay_s
            case ReserveBlocks():
                assert action.request.incarnation == side.incarnation, (
                    "blocks for a request to an earlier process"
                )
                side.reservation = action
            case CancelReservation():
                # The host may have given blocks already, which are then still on their way.
                side.is_reservation_cancelled = True
                if self.rng.random() < 0.5:
                    side.reservation = None
            case WriteChunk():
                self.post(side, write_chunk(side, action, self._flip))
            case CommitBlocks():
                self._commit(side, action)
            case ReleaseBlocks():
                assert action.reason
                assert side.blocks == action.block_ids, "blocks given back that are not the transfer's"
                side.blocks = ()
                side.pool.give_back(side.transfer, action.block_ids)
            case End():
                assert side.end is None, "a machine that ends twice"
                side.end = action
                if side.machine.state is TransferState.RELEASED:
                    assert side.transfer.committed is not None, "released without a commit"

    def _flip(self, content: bytearray) -> None:
        if self.num_bad_copies > 0:
            self.num_bad_copies -= 1
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)

    def _commit(self, side: Side, action: CommitBlocks) -> None:
        transfer = side.transfer
        assert side.blocks == action.block_ids, "a commit of blocks that are not the transfer's"
        assert transfer.committed is None, "committed twice"
        expected = () if transfer.is_fetch else TOKEN_IDS
        assert (action.token_ids, action.token_digest) == (expected, transfer.token_digest), (
            "a commit of other tokens"
        )
        transfer.committed = action
        side.blocks = ()
        side.pool.hand_over(transfer, action.block_ids, to=action)
        self.check_committed(side)

    def check_committed(self, side: Side) -> None:
        """Byte for byte what was computed."""
        transfer, layout = side.transfer, side.pool.layout
        assert transfer.committed is not None
        everything = KvRange(0, layout.num_layers, 0, transfer.num_tokens)
        span = side.pool.span(transfer.committed.block_ids, everything, layout.heads)
        assert all(side.pool.owners[i] is transfer.committed for i in transfer.committed.block_ids)
        lo, hi = layout.heads
        here, truth = side.pool.read(span), transfer.truth[:, :, :, lo:hi]
        assert here.tobytes() == truth.tobytes(), "committed KV is not what was computed"

    # What can happen without a fault.

    def compute(self, transfer: Transfer) -> None:
        """Prefill gets on by one range, and ends with the last one."""
        side = transfer.sender
        assert side is not None
        if side.is_over:
            transfer.to_compute, transfer.is_prefill_finished = [], True
        elif transfer.to_compute:
            self._compute(side, transfer.to_compute.pop())
        else:
            transfer.is_prefill_finished = True
            self.post(side, PrefillFinished(() if transfer.is_fetch else TOKEN_IDS))

    def _compute(self, side: Side, where: KvRange) -> None:
        span = side.pool.span(side.blocks, where, side.pool.layout.heads)
        layers, tokens = slice(where.layer_lo, where.layer_hi), slice(where.token_lo, where.token_hi)
        side.pool.write(span, side.transfer.truth[layers, :, tokens], side.transfer)
        self.post(side, KvReady(where))

    def grant(self, side: Side) -> None:
        """The host gives blocks, perhaps to a transfer that has just ended; or refuses."""
        reservation, side.reservation = side.reservation, None
        assert reservation is not None
        if self.is_reserving_refused:
            if not side.is_reservation_cancelled:
                self.post(side, ReservationDenied("the pool is full", retryable=True))
            return
        num_blocks = blocks_needed(reservation.request.max_tokens, side.pool.layout.block_size)
        blocks = side.pool.take(side.transfer, num_blocks)
        offers = reservation.request.offers
        transport = offers[0].transport if offers else "grpc"
        self.post(side, BlocksReserved(blocks, transport, "" if offers else "no offer"))

    def write(self, side: Side) -> None:
        """The writer of this side sends the next item; a chunk is read only now."""
        item = side.outbox.pop(0)
        if isinstance(item, SendChunk):
            if not side.machine.is_ended and side.machine.state is not TransferState.SUSPENDED:
                side.reading = item
                if not self.is_reading_slow:
                    self.finish_reading(side)
        else:
            self._send(side, encode(item.frame))
        if side.machine.is_ended and not side.outbox and side.stream is not None:
            side.stream.left_by.add(side.name)

    def finish_reading(self, side: Side) -> None:
        item, side.reading = side.reading, None
        assert item is not None
        if side.machine.is_ended:
            return
        message, checksum = read_chunk(side, item)
        self.post(side, ChunkRead(item.sequence_number, checksum, len(message)))
        if not side.machine.is_ended:
            self._send(side, message)

    def _send(self, side: Side, message: bytes) -> None:
        stream = side.stream
        if stream is not None and not stream.left_by and not self.is_silent:
            stream.to("receiver" if side.name == "sender" else "sender").append(message)

    def arrive(self, side: Side, index: int) -> None:
        """One of the messages on their way arrives; index 0 is the oldest."""
        assert side.stream is not None
        message = side.stream.to(side.name).pop(index)
        side.stream.heard_by.add(side.name)
        self._hear(side, message)

    def _hear(self, side: Side, message: bytes) -> None:
        event = event_of(message)
        if not isinstance(event, FrameDamaged) or not isinstance(event.error, CorruptFrame):
            self.post(side, event)
        elif side.stream is not None:
            self.notice_break(side)

    def parts_whole(self, side: Side) -> None:
        """The others are, which have no place in this world."""
        self.post(side, PartsWhole())

    def notice_break(self, side: Side) -> None:
        """The stream is seen to have ended."""
        stream, side.stream = side.stream, None
        assert stream is not None
        stream.left_by.add(side.name)
        self.post(side, StreamBroke("the other side closed the stream"))
        if side.name == "receiver" and self.rng.random() < 0.1:
            self.post(side, StreamBroke("its call was cancelled"))
        side.outbox.clear()

    # The ends that streams are opened to.

    def open(self, side: Side) -> None:
        """A sender's stream, the first one or another after that broke."""
        side.reading = None
        if self.num_failing_opens > 0:
            self.num_failing_opens -= 1
            self.post(side, StreamBroke("connection refused"))
            return
        side.stream = Stream()
        side.reconnect_at_s = math.inf
        self.post(side, Started())

    def stray_arrives(self, transfer: Transfer) -> None:
        message = transfer.strays.pop(0)
        assert transfer.receiver is not None
        self._hear(transfer.receiver, message)

    # Time.

    def wait(self, duration_s: float) -> None:
        """Time passes; the timers that are due fire, in order. Nothing arrives meanwhile."""
        end_s = self.now_s + duration_s
        while True:
            live = [side for side in self.all_sides if not side.is_over]
            due = min(live, key=lambda side: side.machine.next_deadline_s, default=None)
            if due is None or due.machine.next_deadline_s > end_s:
                break
            self.now_s = max(self.now_s, due.machine.next_deadline_s)
            self.post(due, TimePassed())
            assert due.machine.next_deadline_s > self.now_s, (
                f"{due.name} is {due.machine.state} and wakes for ever"
            )
        self.now_s = end_s
        for side in live:
            if not side.is_over:
                side.check_in_time(self.now_s)

    def settle(self) -> None:
        """Faults stop. All that can still happen happens, until every transfer has ended; nothing is left behind."""
        self.is_silent = self.is_reading_slow = self.is_reserving_refused = False
        self.num_failing_opens = self.num_bad_copies = 0
        end_s = self.now_s + TIMEOUT_S + LEASE_S
        self._until_next_move(end_s)
        while possible := moves(self):
            possible[0]()
            self._until_next_move(end_s)
        self.check_over()

    def _until_next_move(self, end_s: float) -> None:
        if moves(self):
            self.wait(0.001)
        while not moves(self) and not self.is_over:
            assert self.now_s < end_s, "nothing happens any more, and it is not over"
            due_s = [min(one.machine.next_deadline_s, one.reconnect_at_s) for one in self.live_sides()]
            self.wait(max(0.0, min(due_s) - self.now_s))

    def check_over(self) -> None:
        """Every block is back, or its sequence's; what was committed is still whole."""
        assert self.is_over
        assert len(self.leases) == 0, "a lease outlives its transfer"
        committed = [
            one
            for one in self.all_sides
            if one.machine.state is TransferState.COMMITTED and one.pool is self.receiver_pool
        ]
        for side in committed:
            self.check_committed(side)
        kept = sum(
            len(one.transfer.committed.block_ids) for one in committed if one.transfer.committed is not None
        )
        assert self.receiver_pool.num_free + kept == NUM_POOL_BLOCKS, "the receiver's blocks leak"
        assert self.sender_pool.num_free == NUM_POOL_BLOCKS, "the sender's blocks leak"

    # What a test asks.

    @property
    def is_over(self) -> bool:
        return all(side.is_over for side in self.all_sides)

    def live_sides(self) -> list[Side]:
        return [side for side in self.all_sides if not side.is_over]
