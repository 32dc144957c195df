"""Bugs that are planted into the machines, and what of the random schedules finds each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvtransfer.chunk_queue import ChunkQueue
from kvtransfer.codecs.codec import CodecId
from kvtransfer.errors import CorruptFrame
from kvtransfer.frames import Chunk, Commit, Frame, Nack, Reserve, Resume, Resumed, Verified
from kvtransfer.lease import LeaseTable
from kvtransfer.receiver import TABLE as RECEIVER_TABLE
from kvtransfer.receiver import ReceiverMachine
from kvtransfer.sender import TABLE as SENDER_TABLE
from kvtransfer.sender import SenderMachine
from kvtransfer.session import (
    Action,
    BlocksReserved,
    CancelReservation,
    ChunkDamaged,
    ChunkWritten,
    FrameDamaged,
    ReleaseBlocks,
    SendFrame,
    StreamBroke,
    TimePassed,
    TransferState,
    WriteChunk,
)
from kvtransfer.wire import CHUNK_HEADER_BYTES, KIND_CHUNK, decode
from tests.support import kvtransfer_copies
from tests.support.kvtransfer_schedule import run_schedule
from tests.support.kvtransfer_sides import Side
from tests.support.kvtransfer_world import World

NUM_SEEDS = 2000

#: What finds it, as the schedule says it.
NOT_COMMITTED = "kept a transfer from succeeding"
WRONG_KV = "committed KV is not what was computed"
NOT_ITS_BLOCKS = "blocks given back that are not the transfer's"
OF_ANOTHER_LEASE = "a chunk of another lease is written"
CHUNK_LOST = "lost a chunk on a stream that stands"
OTHER_TOKENS = "a commit of other tokens"
WAKES = "wakes for ever|it was to end at"
HAS_BLOCKS = "has blocks .* while"

Patch = pytest.MonkeyPatch
S = TransferState


@dataclass(frozen=True, slots=True)
class Mutant:
    """plant: puts the bug in. found_by: what the failing schedule says."""

    name: str
    plant: Callable[[Patch], None]
    found_by: str


def _instead(
    patch: Patch, table: Any, state: TransferState, event: type, handler: Callable[..., Any]
) -> None:
    patch.setitem(table, (state, event), handler)


def _release_twice(patch: Patch) -> None:
    end = ReceiverMachine._end

    def mutant(self: ReceiverMachine, state: TransferState, error: Any, *, tell_peer: bool) -> TransferState:
        block_ids = self._block_ids
        ended = end(self, state, error, tell_peer=tell_peer)
        if block_ids:
            self._do(ReleaseBlocks(block_ids, "once more"))
        return ended

    patch.setattr(ReceiverMachine, "_end", mutant)


def _release_after_commit(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: Commit, now_s: float) -> TransferState:
        block_ids = self._block_ids
        ended = ReceiverMachine._commit(self, event, now_s)
        self._do(ReleaseBlocks(block_ids, "the transfer is over"))
        return ended

    _instead(patch, RECEIVER_TABLE, S.VERIFIED, Commit, mutant)


def _no_incarnation_fence_on_chunks(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: object) -> bool:
        return not isinstance(event, (Chunk, Resume)) or event.lease_id == self._lease_id

    patch.setattr(ReceiverMachine, "_is_fresh", mutant)


def _no_incarnation_fence_on_requests(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: Reserve, now_s: float) -> TransferState:
        known, self._incarnation = self._incarnation, event.incarnation
        state = ReceiverMachine._ask_host(self, event, now_s)
        self._incarnation = known
        return state

    _instead(patch, RECEIVER_TABLE, S.NEW, Reserve, mutant)


def _no_lease_fence_on_chunks(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: object) -> bool:
        return not isinstance(event, (Chunk, Resume)) or event.incarnation == self._incarnation

    patch.setattr(ReceiverMachine, "_is_fresh", mutant)


def _credit_lost(patch: Patch) -> None:
    patch.setattr(ChunkQueue, "acknowledge", lambda self, number, now_s: None)


def _credit_gained(patch: Patch) -> None:
    patch.setattr(ChunkQueue, "num_in_flight", property(lambda self: max(0, len(self._in_flight) - 1)))


def _released_before_committed(patch: Patch) -> None:
    def mutant(self: SenderMachine, event: Verified, now_s: float) -> TransferState:
        self._do(ReleaseBlocks(self._block_ids, "it has arrived"))
        return SenderMachine._verified(self, event, now_s)

    _instead(patch, SENDER_TABLE, S.RECEIVING, Verified, mutant)


def _commit_of_what_is_not_verified(patch: Patch) -> None:
    _instead(patch, RECEIVER_TABLE, S.RECEIVING, Commit, ReceiverMachine._commit)


def _verified_without_looking(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, now_s: float) -> TransferState:
        if self._finish is None:
            return TransferState.RECEIVING
        self._do(SendFrame(Verified()))
        return TransferState.VERIFIED

    patch.setattr(ReceiverMachine, "_verify_if_complete", mutant)


def _checksum_not_compared(patch: Patch) -> None:
    patch.setattr(kvtransfer_copies, "is_whole", lambda chunk, checksum: True)


def _damage_is_taken_for_a_chunk(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: ChunkDamaged, now_s: float) -> TransferState:
        return ReceiverMachine._written(self, ChunkWritten(event.sequence_number), now_s)

    _instead(patch, RECEIVER_TABLE, S.RECEIVING, ChunkDamaged, mutant)


def _damaged_frames_are_believed(patch: Patch) -> None:
    def mutant(message: bytes) -> Frame:
        try:
            return decode(message)
        except CorruptFrame:
            crc = kvtransfer_copies.crc_of(message[4:])
            return decode(crc.to_bytes(4, "little") + message[4:])

    patch.setattr(kvtransfer_copies, "decode", mutant)


def _damaged_header_is_believed_to_name_its_chunk(patch: Patch) -> None:
    hear = World._hear

    def mutant(self: World, side: Side, message: bytes) -> None:
        event = kvtransfer_copies.event_of(message)
        is_chunk = len(message) > CHUNK_HEADER_BYTES and message[4] == KIND_CHUNK
        if is_chunk and isinstance(event, FrameDamaged) and isinstance(event.error, CorruptFrame):
            self.post(side, FrameDamaged(event.error, int.from_bytes(message[16:20], "little")))
        else:
            hear(self, side, message)

    patch.setattr(World, "_hear", mutant)


def _unanswered_request_is_not_repeated(patch: Patch) -> None:
    _instead(patch, SENDER_TABLE, S.REQUESTED, StreamBroke, SenderMachine._stream_broke)


def _request_is_granted_twice(patch: Patch) -> None:
    patch.setattr(ReceiverMachine, "is_unanswered", property(lambda self: False))


def _digest_not_compared(patch: Patch) -> None:
    patch.setattr(ReceiverMachine, "_digest", lambda self: self._finish.digest)


def _late_chunk_is_written(patch: Patch) -> None:
    handle, forget = ReceiverMachine.handle, ReceiverMachine._forget_blocks
    last_blocks: dict[int, tuple[int, ...]] = {}

    def remember(self: ReceiverMachine) -> None:
        last_blocks[id(self)] = self._block_ids
        forget(self)

    def mutant(self: ReceiverMachine, event: object, now_s: float) -> list[Action]:
        if self.is_ended and isinstance(event, Chunk) and last_blocks.get(id(self)):
            return [WriteChunk(event, last_blocks[id(self)], "float16")]
        return handle(self, event, now_s)

    patch.setattr(ReceiverMachine, "_forget_blocks", remember)
    patch.setattr(ReceiverMachine, "handle", mutant)


def _resumed_one_too_late(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: Resume, now_s: float) -> TransferState:
        state = ReceiverMachine._resume(self, event, now_s)
        for i, action in enumerate(self._actions):
            if isinstance(action, SendFrame) and isinstance(action.frame, Resumed):
                self._actions[i] = SendFrame(Resumed(action.frame.first_missing + 1))
        return state

    _instead(patch, RECEIVER_TABLE, S.SUSPENDED, Resume, mutant)


def _what_was_in_flight_is_forgotten(patch: Patch) -> None:
    patch.setattr(ChunkQueue, "restart", lambda self, has: self._in_flight.clear())


def _double_counted_twice(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: Chunk, now_s: float) -> TransferState:
        if event.sequence_number not in self._received or not self._is_fresh(event):
            return ReceiverMachine._take_chunk(self, event, now_s)
        self._writing[event.sequence_number] = event
        self._do(WriteChunk(event, self._block_ids, "float16" if event.codec is CodecId.NONE else "float32"))
        return TransferState.RECEIVING

    _instead(patch, RECEIVER_TABLE, S.RECEIVING, Chunk, mutant)


def _lease_not_renewed(patch: Patch) -> None:
    patch.setattr(LeaseTable, "renew", lambda self, lease_id, now_s: None)


def _sender_does_not_renew(patch: Patch) -> None:
    for state in (S.RESERVED, S.RECEIVING, S.VERIFIED):
        _instead(patch, SENDER_TABLE, state, TimePassed, SenderMachine._stay)


def _receiver_looks_at_no_deadline(patch: Patch) -> None:
    def mutant(self: ReceiverMachine, event: object, now_s: float) -> None:
        if isinstance(event, BlocksReserved):
            self._block_ids = event.block_ids

    patch.setattr(ReceiverMachine, "_end_if_late", mutant)


def _sender_looks_at_no_deadline(patch: Patch) -> None:
    patch.setattr(SenderMachine, "_end_if_late", lambda self, event, now_s: None)


def _nack_ignored(patch: Patch) -> None:
    _instead(patch, SENDER_TABLE, S.RECEIVING, Nack, SenderMachine._stay)


def _without(kind: type) -> Callable[[Patch], None]:
    """The end of a receiver's transfer leaves this action out."""
    end = ReceiverMachine._end

    def mutant(self: ReceiverMachine, state: TransferState, error: Any, *, tell_peer: bool) -> TransferState:
        ended = end(self, state, error, tell_peer=tell_peer)
        self._actions = [action for action in self._actions if not isinstance(action, kind)]
        return ended

    return lambda patch: patch.setattr(ReceiverMachine, "_end", mutant)


def _lease_left_behind(patch: Patch) -> None:
    patch.setattr(LeaseTable, "release", lambda self, lease_id: self._leases[lease_id])


def _commit_not_remembered(patch: Patch) -> None:
    patch.setattr(LeaseTable, "is_settled", lambda self, lease_id: False)


def _changed_source_is_sent(patch: Patch) -> None:
    def mutant(self: ChunkQueue, number: int, codec: Any, checksum: int) -> bool:
        self._read[number] = (codec, checksum)
        return True

    patch.setattr(ChunkQueue, "was_read", mutant)


def _stray_chunk_ends_a_suspended_transfer(patch: Patch) -> None:
    patch.delitem(RECEIVER_TABLE, (S.SUSPENDED, Chunk))  # type: ignore[arg-type]


MUTANTS = (
    Mutant("blocks are released twice", _release_twice, NOT_ITS_BLOCKS),
    Mutant("blocks are released after they were committed", _release_after_commit, NOT_ITS_BLOCKS),
    Mutant("no fence by incarnation on chunks", _no_incarnation_fence_on_chunks, OF_ANOTHER_LEASE),
    Mutant(
        "no fence by incarnation on requests",
        _no_incarnation_fence_on_requests,
        "blocks for a request to an earlier process",
    ),
    Mutant("no fence by lease on chunks", _no_lease_fence_on_chunks, OF_ANOTHER_LEASE),
    Mutant("a credit is lost", _credit_lost, NOT_COMMITTED),
    Mutant("a credit is gained", _credit_gained, "more chunks in flight than credits"),
    Mutant("blocks are released before the commit is heard of", _released_before_committed, HAS_BLOCKS),
    Mutant("a commit of what is not verified", _commit_of_what_is_not_verified, WRONG_KV),
    Mutant(
        "verified at the word of the sender",
        _verified_without_looking,
        f"{WRONG_KV}|verified while KV is missing",
    ),
    Mutant("a checksum is not compared", _checksum_not_compared, WRONG_KV),
    Mutant("a damaged chunk is taken for a whole one", _damage_is_taken_for_a_chunk, WRONG_KV),
    Mutant(
        "damaged frames are believed",
        _damaged_frames_are_believed,
        f"{NOT_COMMITTED}|{OTHER_TOKENS}|out of bounds",
    ),
    Mutant(
        "a damaged header is believed to name its chunk",
        _damaged_header_is_believed_to_name_its_chunk,
        NOT_COMMITTED,
    ),
    Mutant(
        "a request that was not answered is not repeated", _unanswered_request_is_not_repeated, NOT_COMMITTED
    ),
    Mutant("a request that is repeated is another", _request_is_granted_twice, NOT_COMMITTED),
    Mutant("the digest is not compared", _digest_not_compared, WRONG_KV),
    Mutant("a late chunk is written after the release", _late_chunk_is_written, OF_ANOTHER_LEASE),
    Mutant("resumed one chunk too late", _resumed_one_too_late, f"{CHUNK_LOST}|{NOT_COMMITTED}"),
    Mutant(
        "what was in flight is not sent again",
        _what_was_in_flight_is_forgotten,
        f"{CHUNK_LOST}|{NOT_COMMITTED}",
    ),
    Mutant(
        "a double is counted twice",
        _double_counted_twice,
        f"{NOT_COMMITTED}|a chunk is here, and rejected",
    ),
    Mutant("a lease is not renewed", _lease_not_renewed, NOT_COMMITTED),
    Mutant("a silent sender does not renew", _sender_does_not_renew, WAKES),
    Mutant("the receiver looks at no deadline", _receiver_looks_at_no_deadline, WAKES),
    Mutant("the sender looks at no deadline", _sender_looks_at_no_deadline, WAKES),
    Mutant("a Nack is ignored", _nack_ignored, NOT_COMMITTED),
    Mutant(
        "an abort leaves the reservation",
        _without(CancelReservation),
        "the reservation outlives its transfer",
    ),
    Mutant("an abort leaves the blocks", _without(ReleaseBlocks), HAS_BLOCKS),
    Mutant("a lease is left behind", _lease_left_behind, "a lease outlives its transfer"),
    Mutant("a commit is not remembered", _commit_not_remembered, NOT_COMMITTED),
    Mutant("KV that changed is sent again", _changed_source_is_sent, WRONG_KV),
    Mutant("a stray chunk ends a suspended transfer", _stray_chunk_ends_a_suspended_transfer, NOT_COMMITTED),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_random_schedules_find_a_planted_bug(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError), match=mutant.found_by):
        _run_all()


def _run_all() -> None:
    for seed in range(NUM_SEEDS):
        run_schedule(seed)


def test_without_a_planted_bug_they_find_nothing() -> None:
    for seed in range(200):
        run_schedule(seed)
