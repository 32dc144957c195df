"""Both machines of a transfer, two block pools, and a way between them that loses, doubles, reorders and damages.

No loop and no clock: a test decides what happens next. Every message is real bytes, so the checksums are
part of what is tested.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from kvtransfer.errors import CorruptFrame, MalformedFrame
from kvtransfer.frames import Chunk, Codec, Reserve
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.lease import LeaseTable
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.sender import SenderMachine
from kvtransfer.session import (
    Action,
    BlocksReserved,
    CancelReservation,
    CommitBlocks,
    End,
    FrameDamaged,
    KvReady,
    Machine,
    PrefillFinished,
    ReleaseBlocks,
    ReserveBlocks,
    SendChunk,
    SendFrame,
    Started,
    StreamBroke,
    TimePassed,
    TransferState,
    WriteChunk,
)
from kvtransfer.wire import decode, encode

LAYOUT = KvLayout(
    "d", "float16", block_size=2, num_layers=3, num_kv_heads=1, head_dim=1, position_encoding=""
)
PART_BYTES = LAYOUT.chunk_bytes(num_layers=1, num_blocks=1)
NUM_TOKENS = 7
NUM_BLOCKS = blocks_needed(NUM_TOKENS, LAYOUT.block_size)
NUM_RESERVED = NUM_BLOCKS + 1
LEASE_S = 9.0
TIMEOUT_S = 40.0
INCARNATION = 6
TOKEN_IDS = (11, 12)


@dataclass
class Side:
    """One machine and its worker's blocks. A block is owned by the transfer from the start to its return."""

    machine: Machine
    owned: set[int] = field(default_factory=set)
    cache: dict[tuple[int, int], bytes] = field(default_factory=dict)
    outbox: list[SendFrame | SendChunk] = field(default_factory=list)
    incoming: list[bytes] = field(default_factory=list)
    end: End | None = None
    num_returns: int = 0


class World:
    """One transfer. `seed` decides how prefill divides the KV and how large chunks are."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.now_s = 0.0
        self.leases = LeaseTable()
        request = Reserve("t1", LAYOUT, NUM_TOKENS, NUM_TOKENS + 2, INCARNATION, TIMEOUT_S)
        self.source_ids = tuple(rng.sample(range(100), NUM_BLOCKS))
        self.target_ids = tuple(rng.sample(range(100), NUM_RESERVED))
        max_chunk_bytes = PART_BYTES * rng.randint(1, 6)
        sender = SenderMachine(request, self.source_ids, max_chunk_bytes=max_chunk_bytes, now_s=0.0)
        receiver = ReceiverMachine(
            LAYOUT, INCARNATION, self.leases, lease_s=LEASE_S, max_in_flight=rng.randint(1, 3), now_s=0.0
        )
        self.sender = Side(sender, owned=set(self.source_ids))
        self.receiver = Side(receiver)
        self.reservation: ReserveBlocks | None = None
        self.num_granted = 0
        self.committed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.is_cut = False
        self.to_compute = _prefill_order(rng)
        self.is_prefill_finished = False
        self._noise = rng
        self.post(self.sender, Started())

    # What can happen.

    def post(self, side: Side, event: object) -> None:
        """One event to one machine; its actions are done as the driver does them."""
        for action in side.machine.handle(event, self.now_s):
            self._perform(side, action)
        self.check()

    def compute(self) -> None:
        """Prefill gets on by one range, and ends with the last one."""
        if self.to_compute:
            kv_range = self.to_compute.pop()
            for layer in range(kv_range.layer_lo, kv_range.layer_hi):
                for block in range(kv_range.block_lo, kv_range.block_hi):
                    block_id = self.source_ids[block]
                    self.sender.cache[layer, block_id] = self._noise.randbytes(PART_BYTES)
            self.post(self.sender, KvReady(kv_range))
        elif not self.is_prefill_finished:
            self.is_prefill_finished = True
            self.post(self.sender, PrefillFinished(TOKEN_IDS))

    def grant(self) -> None:
        """The host gives blocks, perhaps to a transfer that has just ended."""
        assert self.reservation is not None
        self.reservation = None
        self.num_granted += 1
        self.receiver.owned = set(self.target_ids)
        self.post(self.receiver, BlocksReserved(self.target_ids))

    def write(self, side: Side) -> None:
        """The writer of this side sends the next item; a chunk is gathered only now."""
        item = side.outbox.pop(0)
        if isinstance(item, SendChunk):
            if side.machine.is_ended:
                return
            message = encode(self._gather(item))
        else:
            message = encode(item.frame)
        if not self.is_cut:
            self.other(side).incoming.append(message)

    def arrive(self, side: Side, index: int) -> None:
        """One of the messages on their way arrives; index 0 is the oldest."""
        message = side.incoming.pop(index)
        event: object
        try:
            event = decode(message)
        except CorruptFrame as error:
            event = FrameDamaged(error, error.sequence_number)
        except MalformedFrame as error:
            event = FrameDamaged(error)
        self.post(side, event)

    def damage(self, side: Side, index: int, bit: int) -> None:
        """A bit of a message on its way flips."""
        message = bytearray(side.incoming[index])
        bit %= len(message) * 8
        message[bit // 8] ^= 1 << (bit % 8)
        side.incoming[index] = bytes(message)

    def cut(self) -> None:
        """The stream breaks, with all that is on its way."""
        self.is_cut = True
        for side in self.sides:
            side.incoming.clear()
            self.post(side, StreamBroke("cut"))

    def wait(self, duration_s: float) -> None:
        """Time passes; the timers that are due fire, in order."""
        end_s = self.now_s + duration_s
        while min(side.machine.next_deadline_s for side in self.sides) <= end_s:
            due = min(self.sides, key=lambda side: side.machine.next_deadline_s)
            self.now_s = max(self.now_s, due.machine.next_deadline_s)
            self.post(due, TimePassed())
        self.now_s = end_s

    def step(self, pick: Callable[[int], int] = lambda _count: 0) -> bool:
        """One thing that can happen without a fault happens; False when there is none.

        pick(count): which of so many messages arrives; the oldest unless said.
        """
        for side in self.sides:
            if side.outbox:
                self.write(side)
                return True
        for side in self.sides:
            if side.incoming:
                self.arrive(side, pick(len(side.incoming)))
                return True
        if self.reservation is not None:
            self.grant()
            return True
        if self.to_compute or not self.is_prefill_finished:
            self.compute()
            return True
        return False

    def run_without_faults(self) -> None:
        """All that can still happen happens, oldest first, each part taking a moment."""
        while self.step():
            self.wait(0.01)

    # What a test asks.

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.sender, self.receiver

    def other(self, side: Side) -> Side:
        return self.receiver if side is self.sender else self.sender

    @property
    def is_over(self) -> bool:
        return all(side.machine.is_ended for side in self.sides)

    @property
    def has_committed(self) -> bool:
        return self.committed is not None

    def check(self) -> None:
        """What holds at every moment."""
        sender, receiver = self.sender, self.receiver
        assert isinstance(sender.machine, SenderMachine)
        assert isinstance(receiver.machine, ReceiverMachine)
        sender.machine.check_invariants()
        receiver.machine.check_invariants()
        self.leases.check_invariants()
        for side in self.sides:
            assert (side.end is not None) == side.machine.is_ended
        assert sender.num_returns == (1 if sender.machine.is_ended else 0)
        is_held = len(self.leases) == 1
        assert receiver.num_returns == self.num_granted - is_held
        assert bool(receiver.owned) == is_held
        assert self.has_committed == (receiver.machine.state is TransferState.COMMITTED)
        if sender.machine.state is TransferState.RELEASED:
            assert self.has_committed

    # Inside.

    def _perform(self, side: Side, action: Action) -> None:
        match action:
            case SendFrame() | SendChunk():
                side.outbox.append(action)
            case ReserveBlocks():
                self.reservation = action
            case CancelReservation():
                # The host may have given blocks already, which are then still on their way.
                if self._noise.random() < 0.5:
                    self.reservation = None
            case WriteChunk():
                self._scatter(action)
            case CommitBlocks():
                self._commit(action)
            case ReleaseBlocks():
                assert action.reason
                self._give_back(side, action.block_ids)
            case End():
                assert side.end is None
                side.end = action

    def _give_back(self, side: Side, block_ids: tuple[int, ...]) -> None:
        assert side.owned == set(block_ids), "blocks given back that are not the transfer's"
        side.owned = set()
        side.num_returns += 1

    def _commit(self, action: CommitBlocks) -> None:
        self._give_back(self.receiver, action.block_ids)
        self.committed = (action.block_ids, action.token_ids)
        assert action.token_ids == TOKEN_IDS
        for layer in range(LAYOUT.num_layers):
            for source_id, target_id in zip(self.source_ids, action.block_ids, strict=False):
                assert self.receiver.cache[layer, target_id] == self.sender.cache[layer, source_id]

    def _gather(self, item: SendChunk) -> Chunk:
        assert self.sender.owned.issuperset(item.block_ids)
        layers = range(item.kv_range.layer_lo, item.kv_range.layer_hi)
        payload = b"".join(self.sender.cache[layer, i] for layer in layers for i in item.block_ids)
        return Chunk(
            item.lease_id,
            item.incarnation,
            item.sequence_number,
            item.kv_range,
            Codec.NONE,
            memoryview(payload),
        )

    def _scatter(self, action: WriteChunk) -> None:
        assert self.receiver.owned.issuperset(action.block_ids), "a chunk written into blocks of others"
        parts = [(layer, i) for layer in range(action.layer_lo, action.layer_hi) for i in action.block_ids]
        for index, key in enumerate(parts):
            self.receiver.cache[key] = bytes(action.payload[index * PART_BYTES : (index + 1) * PART_BYTES])


def _prefill_order(rng: random.Random) -> list[KvRange]:
    """All of the KV, in the ranges in which prefill happens to finish it."""
    layer_cuts = sorted({0, LAYOUT.num_layers, rng.randint(0, LAYOUT.num_layers)})
    block_cuts = sorted({0, NUM_BLOCKS, rng.randint(0, NUM_BLOCKS)})
    ranges = [
        KvRange(layer_lo, layer_hi, block_lo, block_hi)
        for layer_lo, layer_hi in pairwise(layer_cuts)
        for block_lo, block_hi in pairwise(block_cuts)
    ]
    rng.shuffle(ranges)
    return ranges
