"""What can go wrong in a `World`, by name."""

import math
import random
from collections import Counter
from collections.abc import Callable

from kvtransfer.frames import Chunk, Fetch, Nack
from kvtransfer.kv_range import KvRange
from kvtransfer.lease import LeaseTable
from kvtransfer.sender import SenderMachine
from kvtransfer.session import (
    FrameDamaged,
    GivenUp,
    HostBroke,
    SendChunk,
    TimePassed,
    TransferState,
)
from kvtransfer.wire import CHUNK_HEADER_BYTES, KIND_CHUNK, KIND_CHUNK_IN_PLACE
from tests.support.kvtransfer_copies import event_of
from tests.support.kvtransfer_forgery import Row, forged, hears_others, misuses, unasked
from tests.support.kvtransfer_moves import function_of, moves, pick
from tests.support.kvtransfer_shape import LEASE_S, NUM_POOL_BLOCKS, TIMEOUT_S
from tests.support.kvtransfer_sides import Side, Stream, Transfer
from tests.support.kvtransfer_tiny_pool import TinyPool, crc_of
from tests.support.kvtransfer_world import World

#: Moments between two tries to open a stream, in seconds.
TICK_S = 0.001
#: States in which the sender's stream may break without an end of the transfer.
RESUMABLE = (
    TransferState.REQUESTED,
    TransferState.RESERVED,
    TransferState.RECEIVING,
    TransferState.VERIFIED,
    TransferState.SUSPENDED,
)
#: Frames and headers that are damaged in a calm schedule.
MAX_HEADERS = 2
_NUMBER_BYTES = range(16, 20)
_KIND_BYTE = 4


class Faults:
    """Each fault is a method that returns whether anything happened.

    is_calm: they stay within what a transfer survives. target: the row of a table that `ambush` waits for.
    """

    def __init__(
        self,
        world: World,
        rng: random.Random,
        *,
        is_calm: bool,
        is_fetch: bool,
        target: Row | None = None,
    ) -> None:
        self.world = world
        self.rng = rng
        self.is_calm = is_calm
        self.is_fetch = is_fetch
        #: How often each happened.
        self.counts: Counter[str] = Counter()
        #: Chunks that the network keeps for later.
        self.kept: list[bytes] = []
        self.target = target
        #: Of `timely_cut`.
        self._moment = rng.choice(
            ("it is granted", "chunks are on their way", "all is verified", "it is committed")
        )
        self._num_headers = 0
        self._num_early_breaks = 0
        self._by_name = self._all()

    @property
    def names(self) -> list[str]:
        """Of all faults."""
        return list(self._by_name)

    def happen(self, name: str) -> None:
        """One of them, if it can now."""
        self.counts[name] += self._by_name[name]()

    def ambush(self) -> None:
        """A side that is in the state of the row that is waited for gets the event of that row."""
        assert self.target is not None
        name, state, event_name = self.target
        for side in self.world.live_sides():
            can_hear = side.stream is not None or hears_others(side)
            if (side.name, side.machine.state) == (name, state) and can_hear:
                events = [one for one in unasked(self.world, side) if type(one).__name__ == event_name]
                if events:
                    self.counts["ambush"] += 1
                    self.world.post(side, self.rng.choice(events))
                self.target = None
                return

    # What a fault is done to.

    def _streams(self) -> list[tuple[Transfer, Stream]]:
        pairs = [(one, side.stream) for one in self.world.transfers for side in one.sides if side.stream]
        return list({id(stream): (transfer, stream) for transfer, stream in pairs}.values())

    def _queues(self) -> list[tuple[Transfer, Stream, str]]:
        """Every queue with a message in it: of which stream, and to whom."""
        return [
            (transfer, stream, name)
            for transfer, stream in self._streams()
            for name in ("sender", "receiver")
            if stream.to(name)
        ]

    def _side(self, name: str | None = None) -> Side | None:
        """Any that lives."""
        sides = [side for side in self.world.live_sides() if name is None or side.name == name]
        return self.rng.choice(sides) if sides else None

    # Faults that a transfer survives. Each returns whether anything happened.

    def pause(self) -> bool:
        """What is on its way arrives; then prefill, and perhaps the host, do nothing for long."""
        world = self.world
        if world.is_over or world.now_s > TIMEOUT_S / 2:
            return False
        waits_for = {world.compute} if self.rng.random() < 0.5 else {world.compute, world.grant}
        for _ in range(self.rng.randint(1, 8)):
            while possible := [move for move in moves(world) if function_of(move) not in waits_for]:
                pick(self.rng, possible)()
            opens_s = min((one.reconnect_at_s for one in world.live_sides()), default=math.inf)
            world.wait(min(LEASE_S / 6, max(TICK_S, opens_s - world.now_s)))
        return True

    def double(self) -> bool:
        """A message comes twice."""
        return self._on_message(self._double)

    def _double(self, _transfer: Transfer, queue: list[bytes], index: int) -> bool:
        if self.is_calm:
            event = event_of(queue[index])
            if isinstance(event, (Nack, Fetch, FrameDamaged)):
                # It would ask for one more of the few repeats.
                return False
            if isinstance(event, Chunk) and not event.is_in_place and crc_of(event.payload) != event.checksum:
                return False
        queue.insert(self.rng.randint(index, len(queue)), queue[index])
        return True

    def disorder(self) -> bool:
        """A message overtakes others; in calm schedules not the first of a stream."""
        sides = [one for one in self.world.all_sides if one.stream and len(one.stream.to(one.name)) > 1]
        sides = [one for one in sides if not one.is_dead]
        if self.is_calm:
            sides = [one for one in sides if one.stream and one.name in one.stream.heard_by]
        if not sides:
            return False
        side = self.rng.choice(sides)
        assert side.stream is not None
        self.world.arrive(side, self.rng.randrange(len(side.stream.to(side.name))))
        return True

    def cut(self) -> bool:
        """A stream breaks, with some of what is on its way. Chunks on other streams may still come."""
        streams = self._streams()
        if self.is_calm or self.rng.random() < 0.8:
            streams = [one for one in streams if one[0].sender and one[0].sender.machine.state in RESUMABLE]
        if not streams or self.counts["cut"] == 2:
            return False
        transfer, stream = self.rng.choice(streams)
        if not self._may_break(transfer):
            return False
        self._break(transfer, stream)
        return True

    def _may_break(self, transfer: Transfer) -> bool:
        """Whether the transfer survives it; in others than calm schedules it need not."""
        if not self.is_calm:
            return True
        machine = transfer.sender.machine if transfer.sender is not None else None
        if self.is_fetch or machine is None or machine.state not in RESUMABLE:
            return False
        assert isinstance(machine, SenderMachine)
        if machine.granted is None:
            # It asks a few times only.
            self._num_early_breaks += 1
            return self._num_early_breaks == 1
        return True

    def timely_cut(self) -> bool:
        """A stream breaks with all that is on its way, when that matters most."""
        for transfer, stream in self._streams():
            sender, receiver = transfer.sender, transfer.receiver
            if sender is None or receiver is None or sender.machine.state not in RESUMABLE:
                continue
            is_time = {
                "it is granted": sender.machine.state is TransferState.REQUESTED
                and receiver.machine.state is TransferState.RESERVED,
                "chunks are on their way": any(one[_KIND_BYTE:5] == b"\1" for one in stream.to_receiver),
                "all is verified": receiver.machine.state is TransferState.VERIFIED,
                "it is committed": receiver.machine.state is TransferState.COMMITTED,
            }
            if is_time[self._moment] and not self.is_fetch and self._may_break(transfer):
                self._break(transfer, stream, keeps=0.0)
                return True
        return False

    def _break(self, transfer: Transfer, stream: Stream, keeps: float = 1.0) -> None:
        for name in ("sender", "receiver"):
            queue = stream.to(name)
            first_lost = self.rng.randint(0, int(len(queue) * keeps))
            lost, queue[first_lost:] = queue[first_lost:], []
            chunks = [message for message in lost if _number(message) is not None]
            if self.rng.random() < 0.5:
                transfer.strays.extend(one for one in chunks if one[_KIND_BYTE] == KIND_CHUNK)
            self.kept.extend(chunks[:2])
        stream.left_by |= {"sender", "receiver"}

    def fail_to_open(self) -> bool:
        """The next streams break before they stand."""
        is_first = any(one.machine.state is TransferState.NEW for one in self.world.live_sides())
        if self.is_calm and (is_first or self.counts["fail_to_open"]):
            return False
        self.world.num_failing_opens = self.rng.randint(1, 2 if self.is_calm else 6)
        return True

    def damage(self) -> bool:
        """A bit flips; in calm schedules once for a chunk, and in few frames and headers of chunks."""
        return self._on_message(self._damage)

    def _damage(self, transfer: Transfer, queue: list[bytes], index: int) -> bool:
        message = bytearray(queue[index])
        if not message:
            return False
        place, number = self.rng.randrange(len(message)), _number(queue[index])
        if number is not None and self.rng.random() < 0.5:
            place = self.rng.randrange(min(len(message) - 1, CHUNK_HEADER_BYTES), len(message))
        is_payload = (
            number is not None and queue[index][_KIND_BYTE] == KIND_CHUNK and place >= CHUNK_HEADER_BYTES
        )
        if not self._may_damage(transfer, number if is_payload else None):
            return False
        message[place] ^= 1 << self.rng.randrange(8)
        queue[index] = bytes(message)
        return True

    def _may_damage(self, transfer: Transfer, number: int | None) -> bool:
        """number: of the chunk whose payload it is; None for a header and for other frames, which break the stream."""
        if not self.is_calm:
            return True
        if number is not None:
            transfer.num_damaged[number] += 1
            return transfer.num_damaged[number] == 1
        if self._num_headers == MAX_HEADERS or not self._may_break(transfer):
            return False
        self._num_headers += 1
        return True

    def misnumber(self) -> bool:
        """A chunk comes under the number of another."""
        chunks = [
            (transfer, stream.to_receiver, index)
            for transfer, stream, name in self._queues()
            if name == "receiver"
            for index, message in enumerate(stream.to_receiver)
            if _number(message) is not None
        ]
        if not chunks:
            return False
        transfer, queue, index = self.rng.choice(chunks)
        if not self._may_damage(transfer, None):
            return False
        message = bytearray(queue[index])
        message[_NUMBER_BYTES.start] ^= self.rng.randint(1, 3)
        queue[index] = bytes(message)
        return True

    def bad_copy(self) -> bool:
        """A bit flips while a chunk is copied."""
        if self.is_calm and self.counts["bad_copy"]:
            return False
        self.world.num_bad_copies += 1
        return True

    def misname(self) -> bool:
        """Two chunks go out under each other's ranges."""
        side = self._side("sender")
        if (
            side is None
            or side.transfer.misnamed
            or side.reading
            or (self.is_calm and self.counts["misname"])
        ):
            return False
        chunks = [item for item in side.outbox if isinstance(item, SendChunk)]
        pairs = [
            (a, b)
            for a in chunks
            for b in chunks
            if a.sequence_number < b.sequence_number
            and _shape(a.kv_range) == _shape(b.kv_range)
            and a.kv_range.token_lo % side.pool.layout.block_size
            == b.kv_range.token_lo % side.pool.layout.block_size
        ]
        if not pairs:
            return False
        a, b = self.rng.choice(pairs)
        side.transfer.misnamed.update({a.sequence_number: b.kv_range, b.sequence_number: a.kv_range})
        return True

    def slow_reading(self) -> bool:
        """Things happen while a chunk is read."""
        self.world.is_reading_slow = True
        return True

    def early_timer(self) -> bool:
        """A timer fires whose deadline has moved away."""
        side = self._side()
        if side is None:
            return False
        self.world.post(side, TimePassed())
        return True

    # Faults that may end it.

    def lose(self) -> bool:
        """A message is lost on a stream that stands."""
        return self._on_message(self._lose)

    def _lose(self, _transfer: Transfer, queue: list[bytes], index: int) -> bool:
        message = queue.pop(index)
        if _number(message) is not None:
            self.kept.append(message)
        return True

    def truncate(self) -> bool:
        """A message comes short, or with something behind it."""
        return self._on_message(self._truncate)

    def _truncate(self, _transfer: Transfer, queue: list[bytes], index: int) -> bool:
        message = queue[index]
        end = self.rng.randint(0, len(message) + 4)
        queue[index] = message[:end] + bytes(max(0, end - len(message)))
        return True

    def stall(self) -> bool:
        """Nothing arrives for so long."""
        self.world.wait(self.rng.choice((0.1, LEASE_S / 3, LEASE_S / 2, LEASE_S, TIMEOUT_S / 2)))
        return True

    def silence(self) -> bool:
        """Nothing arrives any more, and nobody says so; or again."""
        self.world.is_silent = not self.world.is_silent
        return True

    def give_up(self) -> bool:
        """One side does not want it any more."""
        return self._post_to_any(GivenUp("no longer wanted"))

    def host_breaks(self) -> bool:
        """Reading or writing a cache raises."""
        return self._post_to_any(HostBroke("out of range"))

    def refuse(self) -> bool:
        """The receiver's pool is full, or has room again."""
        self.world.is_reserving_refused = not self.world.is_reserving_refused
        return True

    def misuse(self) -> bool:
        """Prefill says what cannot be."""
        side = self._side("sender")
        if side is None:
            return False
        self.world.post(side, self.rng.choice(misuses(side)))
        return True

    def change_source(self) -> bool:
        """A sequence writes to KV that was sent."""
        side = self._side("sender")
        ranges = side.transfer.ranges_read if side is not None else {}
        if side is None or not ranges:
            return False
        where = self.rng.choice(list(ranges.values()))
        span = side.pool.span(side.blocks, where, side.pool.layout.heads)
        side.pool.write(span, side.pool.read(span) + side.pool.read(span).dtype.type(1), side.transfer)
        return True

    def kill_sender(self) -> bool:
        """The prefill worker is gone, with its memory."""
        world = self.world
        sides = [one for one in world.all_sides if one.name == "sender" and not one.is_dead]
        if not sides:
            return False
        self._kill(sides)
        world.sender_pool = TinyPool(world.shape.sender_layout, NUM_POOL_BLOCKS, self.rng)
        return True

    def restart_receiver(self) -> bool:
        """The decode worker is gone; one that knows nothing of leases takes its place."""
        world = self.world
        has_chunks = any(
            _number(one) is not None for _, stream in self._streams() for one in stream.to_receiver
        )
        if self.rng.random() > (0.5 if has_chunks else 0.03):
            return False
        self._kill([one for one in world.all_sides if one.name == "receiver" and not one.is_dead])
        world.sessions.clear()
        world.leases = LeaseTable()
        world.incarnation += 1
        world.receiver_pool = TinyPool(world.shape.receiver_layout, NUM_POOL_BLOCKS, self.rng)
        return True

    def _kill(self, sides: list[Side]) -> None:
        for side in sides:
            side.is_dead = True
            side.reservation = None
            if side.stream is not None:
                self._break(side.transfer, side.stream)

    def late_chunk(self) -> bool:
        """A chunk that was lost comes after all, perhaps to another attempt."""
        side = self._side("receiver")
        if side is None or not self.kept:
            return self._on_message(self._keep)
        if side.machine.state in (TransferState.NEW, TransferState.REQUESTED):
            return False
        side.transfer.strays.append(self.kept.pop(self.rng.randrange(len(self.kept))))
        return True

    def _keep(self, _transfer: Transfer, queue: list[bytes], _index: int) -> bool:
        chunks = [message for message in queue if _number(message) is not None]
        self.kept.extend(chunks[:1])
        return bool(chunks)

    def forge(self) -> bool:
        """A frame of nobody: anything but what would say that it is done."""
        side = self._side()
        if side is None or not (side.stream or hears_others(side)):
            return False
        self.world.post(side, self.rng.choice(forged(self.world, side)))
        return True

    # Inside.

    def _on_message(self, act: Callable[[Transfer, list[bytes], int], bool]) -> bool:
        queues = self._queues()
        if not queues:
            return False
        transfer, stream, name = self.rng.choice(queues)
        queue = stream.to(name)
        return act(transfer, queue, self.rng.randrange(len(queue)))

    def _post_to_any(self, event: object) -> bool:
        side = self._side()
        if side is None:
            return False
        self.world.post(side, event)
        return True

    def _all(self) -> dict[str, Callable[[], bool]]:
        survivable = (
            self.pause,
            self.double,
            self.disorder,
            self.cut,
            self.timely_cut,
            self.fail_to_open,
            self.damage,
            self.misnumber,
            self.bad_copy,
            self.misname,
            self.slow_reading,
            self.early_timer,
        )
        others = (
            self.lose,
            self.truncate,
            self.stall,
            self.silence,
            self.give_up,
            self.host_breaks,
            self.refuse,
            self.misuse,
            self.change_source,
            self.kill_sender,
            self.restart_receiver,
            self.late_chunk,
            self.forge,
        )
        return {one.__name__: one for one in (*survivable, *others)}


def _number(message: bytes) -> int | None:
    """Of a chunk; None of any other message."""
    if len(message) < CHUNK_HEADER_BYTES or message[_KIND_BYTE] not in (KIND_CHUNK, KIND_CHUNK_IN_PLACE):
        return None
    return int.from_bytes(message[_NUMBER_BYTES.start : _NUMBER_BYTES.stop], "little")


def _shape(where: KvRange) -> tuple[int, int]:
    return where.num_layers, where.num_tokens
