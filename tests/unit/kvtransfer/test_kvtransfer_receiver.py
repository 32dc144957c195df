"""The receiver's machine: events in, actions out, each row of its table."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvtransfer.codecs.codec import CodecId
from kvtransfer.digest import token_digest, transfer_digest
from kvtransfer.errors import (
    DeadlineExceeded,
    DigestMismatch,
    HostFailed,
    LeaseExpired,
    MalformedFrame,
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
    Frame,
    Granted,
    Nack,
    Refused,
    Renew,
    Reserve,
    Resume,
    Resumed,
    Verified,
)
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout
from kvtransfer.lease import LeaseTable
from kvtransfer.receiver import MISSING_FRACTION, MISSING_PATIENCE, TABLE, ReceiverMachine
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
    PartsWhole,
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendFrame,
    StreamBroke,
    TimePassed,
    TransferState,
    WriteChunk,
)

# 2 layers and 11 tokens in 3 blocks of 4; a token of a layer has 8 bytes.
LAYOUT = KvLayout(
    "d", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=1, position_encoding=""
)
TOKENS = token_digest(range(11))
REQUEST = Reserve(
    "t1", LAYOUT, num_tokens=11, max_tokens=20, incarnation=6, timeout_s=60.0, token_digest=TOKENS
)
BLOCKS = BlocksReserved((9, 7, 5, 3, 1))
GRANT = Granted(lease_id=1, incarnation=6, credits=2, lease_s=9.0, heads=(0, 1))
RESUME = Resume("t1", 0, lease_id=1, incarnation=6)
RESUME_S = 5.0
#: Two chunks that are all there is: seven tokens, and the last four.
HALVES = (KvRange(0, 2, 0, 7), KvRange(0, 2, 7, 11))


def chunk(
    number: int,
    kv_range: KvRange | None = None,
    *,
    lease_id: int = 1,
    incarnation: int = 6,
    cut_bytes: int = 0,
    heads: tuple[int, int] = (0, 1),
    codec: CodecId = CodecId.NONE,
) -> Chunk:
    kv_range = kv_range or HALVES[number]
    payload = memoryview(bytes(kv_range.num_layers * kv_range.num_tokens * 8 - cut_bytes))
    return Chunk(lease_id, incarnation, number, kv_range, heads, codec, 100 + number, payload)


def in_place(number: int, block_ids: tuple[int, ...], first_token: int) -> Chunk:
    """The same, as it lies in blocks of four tokens at the sender."""
    return replace(
        chunk(number),
        payload=memoryview(b""),
        source_block_ids=block_ids,
        source_first_token=first_token,
    )


def finish(num_chunks: int = 2, checksums: tuple[int, ...] = (100, 101)) -> Finish:
    chunks = [(HALVES[i], CodecId.NONE, checksum) for i, checksum in enumerate(checksums)]
    return Finish(num_chunks, transfer_digest(LAYOUT, TOKENS, (0, 1), chunks))


class Receiver:
    """A machine under test, whose invariants are checked after every event."""

    def __init__(self, layout: KvLayout = LAYOUT, resume_s: float = RESUME_S) -> None:
        self.leases = LeaseTable()
        self.machine = ReceiverMachine(
            layout, 6, self.leases, lease_s=9.0, resume_s=resume_s, max_in_flight=2, now_s=0.0
        )
        self.num_returns = 0
        self.num_given = 0
        #: Chunks that are not whole when they are written.
        self.damaged: set[int] = set()

    def __call__(self, *events: object, now_s: float = 1.0) -> list[Action]:
        """The actions that answer the last of these events, and its writes."""
        actions: list[Action] = []
        for event in events:
            actions = self._handle(event, now_s)
            for action in list(actions):
                if isinstance(action, WriteChunk):
                    actions += self._handle(self._written(action.chunk.sequence_number), now_s)
        return actions

    def _handle(self, event: object, now_s: float) -> list[Action]:
        self.num_given += isinstance(event, BlocksReserved)
        actions = self.machine.handle(event, now_s)
        self.machine.check_invariants()
        self.leases.check_invariants()
        self.num_returns += sum(isinstance(action, ReleaseBlocks | CommitBlocks) for action in actions)
        return actions

    def _written(self, number: int) -> ChunkWritten | ChunkDamaged:
        return (
            ChunkDamaged(number, "its checksum is another")
            if number in self.damaged
            else ChunkWritten(number)
        )

    @property
    def state(self) -> TransferState:
        return self.machine.state


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    assert receiver.num_returns == (receiver.num_given if receiver.machine.is_ended else 0)
    if receiver.machine.is_ended:
        assert len(receiver.leases) == 0


def frames(actions: list[Action]) -> list[Frame]:
    return [action.frame for action in actions if isinstance(action, SendFrame)]


def assert_ended(
    receiver: Receiver,
    actions: list[Action],
    error: PhasewiseTransferError,
    *,
    state: TransferState = TransferState.ABORTED,
    tells_peer: bool = True,
    has_blocks: bool = True,
) -> None:
    reason = str(error)
    expected: list[Action] = [ReleaseBlocks(BLOCKS.block_ids, reason)] if has_blocks else []
    if tells_peer:
        expected.append(SendFrame(Ended(reason)))
    [*before, end] = actions
    assert before == expected
    assert isinstance(end, End)
    assert type(end.error) is type(error)
    assert str(end.error) == reason
    assert receiver.state is state


def verified(receiver: Receiver, now_s: float = 1.0) -> list[Action]:
    return receiver(REQUEST, BLOCKS, chunk(0), chunk(1), finish(), now_s=now_s)


def test_a_reservation_is_asked_of_the_host_and_granted_under_a_lease(receiver: Receiver) -> None:
    assert receiver(REQUEST) == [ReserveBlocks(REQUEST)]
    assert receiver.state is TransferState.REQUESTED
    assert receiver(BLOCKS, now_s=2.0) == [SendFrame(GRANT)]
    assert receiver.state is TransferState.RESERVED
    lease = receiver.leases.get(1)
    assert (lease.owner, lease.block_ids, lease.expires_at_s) == ("t1", BLOCKS.block_ids, 11.0)


def test_the_grant_says_how_the_kv_is_to_come_and_why_not_by_a_better_way(receiver: Receiver) -> None:
    blocks = replace(BLOCKS, transport="shm", transport_reason="no GPU")
    grant = replace(GRANT, transport="shm", transport_reason="no GPU")
    assert receiver(REQUEST, blocks) == [SendFrame(grant)]
    assert (receiver.machine.transport, receiver.machine.transport_reason) == ("shm", "no GPU")


def test_another_incarnation_is_fenced(receiver: Receiver) -> None:
    actions = receiver(replace(REQUEST, incarnation=5))
    reason = "this is incarnation 6, not 5"
    assert frames(actions) == [Refused(reason, retryable=False)]
    assert str(actions[-1].error) == str(ReservationRefused("t1", reason, False))  # type: ignore[union-attr]


def test_another_model_is_refused_with_the_difference(receiver: Receiver) -> None:
    actions = receiver(replace(REQUEST, layout=replace(LAYOUT, model_digest="e")))
    reason = "model_digest is 'e' at the sender and 'd' at the receiver"
    assert frames(actions) == [Refused(reason, retryable=False)]


def test_another_block_size_and_dtype_are_taken(receiver: Receiver) -> None:
    receiver(replace(REQUEST, layout=replace(LAYOUT, block_size=16, dtype="float16")))
    assert receiver.state is TransferState.REQUESTED


TWO_HEADS = replace(LAYOUT, num_kv_heads=2)


def test_of_more_heads_than_it_has_it_asks_for_its_own() -> None:
    receiver = Receiver(layout=replace(TWO_HEADS, head_lo=1, head_hi=2))
    assert receiver(replace(REQUEST, layout=TWO_HEADS), BLOCKS) == [SendFrame(replace(GRANT, heads=(1, 2)))]


def test_a_sender_that_lacks_heads_must_be_one_of_several() -> None:
    request = replace(REQUEST, layout=replace(TWO_HEADS, head_lo=0, head_hi=1))
    alone = Receiver(layout=TWO_HEADS)
    [refused] = frames(alone(request))
    assert isinstance(refused, Refused)
    assert "the others must send theirs too" in refused.reason
    assert Receiver(layout=TWO_HEADS)(replace(request, num_parts=2), BLOCKS) == [SendFrame(GRANT)]


def test_the_host_may_deny_and_says_whether_later_is_better(receiver: Receiver) -> None:
    actions = receiver(REQUEST, ReservationDenied("the pool is full", retryable=True))
    assert frames(actions) == [Refused("the pool is full", retryable=True)]
    assert receiver.state is TransferState.ABORTED


def test_a_chunk_is_acknowledged_when_it_is_written(receiver: Receiver) -> None:
    first = chunk(0)
    receiver(REQUEST, BLOCKS)
    machine = receiver.machine
    assert machine.handle(first, 1.0) == [WriteChunk(first, BLOCKS.block_ids, "float32")]
    assert machine.handle(ChunkWritten(0), 1.0) == [SendFrame(Ack(0))]
    assert receiver.state is TransferState.RECEIVING


def test_what_a_codec_unpacked_has_its_dtype() -> None:
    receiver = Receiver(layout=replace(LAYOUT, dtype="float16"))
    packed = chunk(0, codec=CodecId.FP8)
    actions = receiver(replace(REQUEST, layout=replace(LAYOUT, dtype="float16")), BLOCKS, packed)
    assert actions[0] == WriteChunk(packed, BLOCKS.block_ids, "float32")


@pytest.mark.parametrize(
    ("sender", "here", "is_lossy"),
    [
        ("float8_e4m3fn", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("bfloat16", "float8_e4m3fn", False),
        ("float8_e4m3fn", "float8_e4m3fn", False),
    ],
)
def test_kv_of_fewer_bits_is_not_what_would_be_computed_here(sender: str, here: str, is_lossy: bool) -> None:
    receiver = Receiver(layout=replace(LAYOUT, dtype=here))
    receiver(replace(REQUEST, layout=replace(LAYOUT, dtype=sender)), BLOCKS)
    assert receiver.machine.is_lossy is is_lossy


@pytest.mark.parametrize(
    ("sender", "here", "is_lossy"),
    [("fp8", "bfloat16", True), ("bfloat16", "fp8", True), ("float32", "int8", True), ("fp8", "fp8", False)],
)
def test_kv_of_other_weights_is_not_what_would_be_computed_here(
    sender: str, here: str, is_lossy: bool
) -> None:
    receiver = Receiver(layout=replace(LAYOUT, weight_dtype=here))
    receiver(replace(REQUEST, layout=replace(LAYOUT, weight_dtype=sender)), BLOCKS)
    assert receiver.machine.is_lossy is is_lossy


def test_a_chunk_that_is_not_whole_when_it_is_written_is_asked_for_again(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS)
    receiver.damaged = {0}
    for _ in range(2):
        assert frames(receiver(chunk(0))) == [Nack(0, "its checksum is another")]
    receiver.damaged = set()
    assert frames(receiver(chunk(0))) == [Ack(0)]
    assert receiver.machine.num_bytes_written == 112


def test_a_doubled_chunk_is_acknowledged_and_not_written_again(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0))
    assert receiver(chunk(0)) == [SendFrame(Ack(0))]


def test_it_verifies_when_finish_was_seen_and_all_is_here(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0))
    assert frames(receiver(chunk(1))) == [Ack(1)]
    assert receiver(finish()) == [SendFrame(Verified())]
    assert receiver.state is TransferState.VERIFIED
    assert receiver(chunk(1), now_s=2.0) == [SendFrame(Ack(1))]


def test_finish_may_overtake_chunks_which_are_asked_for_when_they_take_long(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(1))
    assert receiver(finish()) == []
    late_s = 1.0 + 9.0 * MISSING_FRACTION
    assert receiver.machine.next_deadline_s == late_s
    assert receiver(TimePassed(), now_s=late_s - 0.1) == []
    assert receiver(TimePassed(), now_s=late_s) == [SendFrame(Nack(0, "it has not arrived"))]
    # To ask in vain makes a slow link slower: the next time it waits longer.
    assert receiver.machine.next_deadline_s == late_s + 2 * 9.0 * MISSING_FRACTION
    assert receiver(finish(), now_s=late_s) == []
    assert frames(receiver(chunk(0), now_s=late_s)) == [Ack(0), Verified()]
    assert receiver(finish(), now_s=late_s) == [SendFrame(Verified())]


def test_on_a_slow_link_what_is_on_its_way_is_not_asked_for(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS)
    # Seven of eleven tokens took six seconds, so the other four take more than a quarter of a lease.
    receiver(chunk(0), now_s=7.0)
    assert receiver(finish(), now_s=7.0) == []
    wait_s = 6.0 * 4 / 7 * MISSING_PATIENCE
    for now_s in (9.0, 11.0, 15.0, 19.0):
        assert frames(receiver(Renew(), TimePassed(), now_s=now_s)) == []
    assert wait_s > 9.0
    assert frames(receiver(chunk(1), now_s=20.0)) == [Ack(1), Verified()]


def test_a_link_of_which_no_rate_is_known_is_not_asked_for_anything(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, finish())
    for now_s in (8.0, 16.0, 24.0, 32.0):
        assert frames(receiver(Renew(), TimePassed(), now_s=now_s)) == []
    assert receiver.state is TransferState.RECEIVING


def test_finish_may_come_before_any_chunk(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, finish())
    assert receiver.state is TransferState.RECEIVING
    assert frames(receiver(chunk(0), chunk(1))) == [Ack(1), Verified()]


def test_a_digest_that_does_not_fit_has_all_sent_once_more_and_then_no_more(receiver: Receiver) -> None:
    wrong = finish(checksums=(100, 7))
    reason = "the digest of the transfer does not fit"
    actions = receiver(REQUEST, BLOCKS, chunk(0), chunk(1), wrong)
    assert frames(actions) == [Nack(0, reason), Nack(1, reason)]
    assert receiver.state is TransferState.RECEIVING
    assert_ended(
        receiver,
        [one for one in receiver(chunk(0), chunk(1)) if one != SendFrame(Ack(1))][1:],
        DigestMismatch("t1", 2),
    )
    assert receiver.machine.num_digest_mismatches == 2


def test_what_is_sent_once_more_may_fit(receiver: Receiver) -> None:
    other = replace(chunk(1), checksum=7)
    receiver(REQUEST, BLOCKS, chunk(0), other, finish())
    assert frames(receiver(chunk(0), chunk(1))) == [Ack(1), Verified()]


def test_a_commit_of_what_is_verified_hands_the_blocks_over(receiver: Receiver) -> None:
    verified(receiver)
    assert receiver(Commit((3,))) == [
        CommitBlocks(BLOCKS.block_ids, (3,), TOKENS),
        SendFrame(Committed()),
        End(None),
    ]
    assert receiver.state is TransferState.COMMITTED
    assert receiver.leases.is_settled(1)


def test_a_commit_in_advance_is_one_of_what_will_be_verified(receiver: Receiver) -> None:
    assert receiver(REQUEST, BLOCKS, Commit((3,)), Commit((3,))) == []
    assert receiver(chunk(0), finish(), Commit((3,))) == []
    assert receiver(chunk(1))[1:] == [
        SendFrame(Ack(1)),
        SendFrame(Verified()),
        CommitBlocks(BLOCKS.block_ids, (3,), TOKENS),
        SendFrame(Committed()),
        End(None),
    ]


def test_two_commits_in_advance_must_agree(receiver: Receiver) -> None:
    actions = receiver(REQUEST, BLOCKS, Commit((3,)), Commit((4,)))
    assert_ended(receiver, actions, ProtocolViolation("t1", "reserved", "two Commits differ"))


@pytest.mark.parametrize("events", [(chunk(0),), (chunk(0), chunk(1)), (chunk(0), finish())])
def test_nothing_that_is_not_verified_is_committed(receiver: Receiver, events: tuple[object, ...]) -> None:
    actions = receiver(REQUEST, BLOCKS, *events, Commit((3,)))
    assert actions == []
    assert receiver.state is TransferState.RECEIVING


def test_what_has_another_digest_is_not_committed_in_advance(receiver: Receiver) -> None:
    actions = receiver(REQUEST, BLOCKS, Commit((3,)), chunk(0), chunk(1), finish(checksums=(1, 2)))
    assert not any(isinstance(action, CommitBlocks) for action in actions)


def test_a_chunk_that_cannot_be_unpacked_is_asked_for_again(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS)
    damage = FrameDamaged(MalformedFrame("its checksum is another", 100), 0)
    nack = SendFrame(Nack(0, "malformed frame of 100 bytes: its checksum is another"))
    assert receiver(damage) == [nack]
    assert receiver(damage) == [nack]
    # It is on its way already when Finish comes.
    assert frames(receiver(chunk(1), finish())) == []
    assert frames(receiver(chunk(0))) == [Ack(0), Verified()]


def test_damage_to_a_chunk_that_is_here_changes_nothing(receiver: Receiver) -> None:
    assert receiver(REQUEST, BLOCKS, chunk(0), FrameDamaged(MalformedFrame("no", 100), 0)) == []


@pytest.mark.parametrize("number", [None, 22, 2**32 - 1])
def test_damage_that_cannot_be_repaired_ends_it(receiver: Receiver, number: int | None) -> None:
    damage = MalformedFrame("nonsense", 100)
    assert_ended(receiver, receiver(REQUEST, BLOCKS, FrameDamaged(damage, number)), damage)


@pytest.mark.parametrize("events", [(), (REQUEST,)], ids=["new", "requested"])
def test_damage_before_there_are_blocks_ends_it(receiver: Receiver, events: tuple[object, ...]) -> None:
    damage = MalformedFrame("nonsense", 100)
    actions = receiver(*events, FrameDamaged(damage, 0))
    actions = [action for action in actions if not isinstance(action, CancelReservation)]
    assert_ended(receiver, actions, damage, has_blocks=False)


def bad_chunks() -> list[tuple[str, Chunk]]:
    return [
        ("a chunk for lease 2 of incarnation 6", chunk(1, lease_id=2)),
        ("a chunk for lease 1 of incarnation 5", chunk(1, incarnation=5)),
        ("chunk 22 of 22", chunk(22, HALVES[1])),
        ("tokens [7, 12) of 2 layers and 11 tokens", chunk(1, KvRange(0, 2, 7, 12))),
        ("layers [0, 3)", chunk(1, KvRange(0, 3, 7, 8))),
        ("overlap what came before", chunk(1, KvRange(1, 2, 6, 11))),
        ("chunk 1 has 60 bytes for 64", chunk(1, cut_bytes=4)),
        ("chunk 1 holds KV heads [0, 2]; [0, 1] were asked for", chunk(1, heads=(0, 2))),
        ("chunk 1 does not come by grpc", in_place(1, (5, 6), 3)),
    ]


@pytest.mark.parametrize(("problem", "bad"), bad_chunks(), ids=[problem for problem, _ in bad_chunks()])
def test_a_chunk_that_does_not_fit_is_never_written(receiver: Receiver, problem: str, bad: Chunk) -> None:
    actions = receiver(REQUEST, BLOCKS, chunk(0), bad)
    assert_never_written(actions, problem)


@pytest.mark.parametrize(
    "bad", [one for problem, one in bad_chunks() if "bytes" not in problem], ids=lambda one: str(one.kv_range)
)
def test_a_chunk_that_does_not_fit_is_not_unpacked(receiver: Receiver, bad: Chunk) -> None:
    receiver(REQUEST, BLOCKS, chunk(0))
    packed = replace(chunk(1), codec=CodecId.FP8, payload=memoryview(b"packed"))
    assert receiver.machine.wants(packed)
    assert not receiver.machine.wants(replace(bad, codec=CodecId.FP8))
    assert not receiver.machine.wants(replace(chunk(0), codec=CodecId.FP8)), "it is known"
    receiver(StreamBroke("gone"))
    assert not receiver.machine.wants(packed)


def assert_never_written(actions: list[Action], problem: str) -> None:
    assert not any(isinstance(action, WriteChunk) for action in actions)
    assert isinstance(actions[-1], End)
    assert isinstance(actions[-1].error, ProtocolViolation)
    assert problem in str(actions[-1].error)


SHM_BLOCKS = replace(BLOCKS, transport="shm")


def test_a_chunk_in_place_names_the_blocks_where_its_tokens_lie(receiver: Receiver) -> None:
    # Tokens 7 to 10: the last place of a block, and three of the next.
    second = in_place(1, (5, 6), 3)
    assert receiver(REQUEST, SHM_BLOCKS, second)[0] == WriteChunk(second, BLOCKS.block_ids, "float32")


@pytest.mark.parametrize(
    ("problem", "bad"),
    [
        ("chunk 1 does not come by shm", chunk(1)),
        ("chunk 1 names 1 blocks for 2", in_place(1, (5,), 3)),
        ("chunk 1 names 3 blocks for 2", in_place(1, (5, 6, 7), 3)),
        ("chunk 1 names 2 blocks for 3", in_place(1, (5, 6), 5)),
        ("chunk 1 names 2 blocks for 2", in_place(1, (5, 6), 4)),
    ],
)
def test_a_chunk_in_place_that_does_not_fit_is_never_read(
    receiver: Receiver, problem: str, bad: Chunk
) -> None:
    assert_never_written(receiver(REQUEST, SHM_BLOCKS, bad), problem)


def test_a_chunk_that_comes_while_it_is_being_written_breaks_the_protocol(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS)
    receiver.machine.handle(chunk(0), 1.0)
    assert_never_written(receiver(chunk(0)), "chunk 0 comes while it is being written")


def test_a_stale_double_of_another_lease_is_not_acknowledged(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), chunk(0, lease_id=2))
    assert receiver.state is TransferState.ABORTED


@pytest.mark.parametrize("num_chunks", [0, 1, 23])
def test_a_finish_that_contradicts_the_chunks_ends_it(receiver: Receiver, num_chunks: int) -> None:
    receiver(REQUEST, BLOCKS, chunk(1), Finish(num_chunks))
    assert receiver.state is TransferState.ABORTED


def test_two_finishes_must_agree(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), finish(2), finish(3))
    assert receiver.state is TransferState.ABORTED


def test_all_chunks_without_all_kv_is_not_verified(receiver: Receiver) -> None:
    actions = receiver(REQUEST, BLOCKS, chunk(0), Finish(1))
    problem = "all 1 chunks are here, 8 parts are not"
    assert_ended(receiver, actions, ProtocolViolation("t1", "receiving", problem))


# A transfer in parts.

PART = replace(REQUEST, num_parts=2)


def test_a_part_that_is_whole_commits_when_the_others_are(receiver: Receiver) -> None:
    receiver(PART, BLOCKS, chunk(0), chunk(1))
    assert receiver.machine.awaited_commit is None
    assert receiver(finish()) == [SendFrame(Verified())]
    assert receiver(Commit((3,))) == []
    assert receiver.machine.awaited_commit == Commit((3,))
    assert receiver(PartsWhole())[-2:] == [SendFrame(Committed()), End(None)]
    assert receiver.state is TransferState.COMMITTED


def test_a_part_whose_commit_came_in_advance_waits_too(receiver: Receiver) -> None:
    assert receiver(PART, BLOCKS, Commit((3,)), chunk(0), chunk(1), finish()) == [SendFrame(Verified())]
    assert receiver.state is TransferState.VERIFIED
    assert receiver.machine.awaited_commit == Commit((3,))


def test_a_part_commits_with_the_others_however_late_and_without_a_stream(receiver: Receiver) -> None:
    receiver(PART, BLOCKS, chunk(0), chunk(1), finish(), Commit((3,)), StreamBroke("gone"))
    assert receiver.machine.awaited_commit == Commit((3,))
    actions = receiver(PartsWhole(), now_s=1000.0)
    assert actions[0] == CommitBlocks(BLOCKS.block_ids, (3,), TOKENS)
    # Its sender asks when it is back.
    assert receiver.leases.is_settled(1)


# A request that was not answered.


def test_a_request_that_is_made_again_gets_the_same_grant(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS)
    assert receiver.machine.is_unanswered
    assert receiver(REQUEST) == [SendFrame(GRANT)]
    receiver(StreamBroke("gone"))
    assert receiver.machine.is_unanswered
    assert receiver(REQUEST, now_s=2.0) == [SendFrame(GRANT)]
    assert receiver.state is TransferState.RESERVED
    assert receiver.leases.get(1).expires_at_s == 11.0
    receiver(chunk(0))
    assert not receiver.machine.is_unanswered


@pytest.mark.parametrize("events", [(), (StreamBroke("gone"),)], ids=["reserved", "suspended"])
def test_another_request_of_that_name_breaks_the_protocol(
    receiver: Receiver, events: tuple[object, ...]
) -> None:
    receiver(REQUEST, BLOCKS, *events, replace(REQUEST, num_tokens=10))
    assert receiver.state is TransferState.ABORTED


def test_after_chunks_nothing_is_begun_again(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), StreamBroke("gone"), REQUEST)
    assert receiver.state is TransferState.ABORTED


def test_a_fetch_that_is_not_listened_to_ends_with_the_reason(receiver: Receiver) -> None:
    actions = receiver(Refused("too many", retryable=True))
    assert_ended(receiver, actions, TransferEnded("", "new", "too many"), tells_peer=False, has_blocks=False)


# A stream that breaks.


def test_a_transfer_whose_stream_broke_keeps_its_blocks_and_says_what_it_has(receiver: Receiver) -> None:
    assert receiver(REQUEST, BLOCKS, chunk(0), StreamBroke("gone"), now_s=2.0) == []
    assert receiver.state is TransferState.SUSPENDED
    assert receiver.machine.next_deadline_s == 2.0 + RESUME_S
    assert receiver(RESUME, now_s=3.0) == [SendFrame(Resumed(1))]
    assert receiver.state is TransferState.RECEIVING
    assert frames(receiver(chunk(1), finish(), now_s=3.0)) == [Verified()]


def test_it_resumes_at_the_first_missing_chunk_and_names_those_beyond(receiver: Receiver) -> None:
    thirds = [KvRange(0, 2, 0, 4), KvRange(0, 2, 4, 8), KvRange(0, 2, 8, 11)]
    receiver(REQUEST, BLOCKS, chunk(1, thirds[1]), chunk(2, thirds[2]), StreamBroke("gone"))
    assert receiver(RESUME) == [SendFrame(Resumed(0, (1, 2)))]
    receiver(StreamBroke("gone"), RESUME, chunk(0, thirds[0]), StreamBroke("gone"))
    assert receiver(RESUME) == [SendFrame(Resumed(3))]


@pytest.mark.parametrize("events", [(), (chunk(0),), (chunk(0), chunk(1), finish())])
def test_each_state_is_gone_on_with(receiver: Receiver, events: tuple[object, ...]) -> None:
    receiver(REQUEST, BLOCKS, *events)
    state = receiver.state
    receiver(StreamBroke("gone"), StreamBroke("once more"), RESUME)
    assert receiver.state is state


def test_a_sender_that_knows_better_resumes_a_stream_that_seems_to_stand(receiver: Receiver) -> None:
    assert receiver(REQUEST, BLOCKS, chunk(0), RESUME) == [SendFrame(Resumed(1))]


def test_a_verified_transfer_waits_for_nothing_more_after_a_resume(receiver: Receiver) -> None:
    verified(receiver)
    receiver(StreamBroke("gone"), RESUME, now_s=2.0)
    assert receiver.machine.next_deadline_s == 11.0


def test_chunks_by_other_streams_are_not_taken_while_it_is_suspended(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), StreamBroke("gone"))
    assert receiver(chunk(1), FrameDamaged(MalformedFrame("no", 100), 1), chunk(1)) == []
    assert receiver(RESUME) == [SendFrame(Resumed(1))]


@pytest.mark.parametrize("stale", [replace(RESUME, lease_id=2), replace(RESUME, incarnation=5)])
def test_another_lease_is_not_resumed(receiver: Receiver, stale: Resume) -> None:
    receiver(REQUEST, BLOCKS, StreamBroke("gone"))
    problem = f"it resumes lease {stale.lease_id} of incarnation {stale.incarnation}"
    assert_ended(receiver, receiver(stale), ProtocolViolation("t1", "suspended", problem))


def test_a_stream_that_does_not_come_back_gives_the_blocks_back(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), StreamBroke("gone"), now_s=2.0)
    actions = receiver(TimePassed(), now_s=2.0 + RESUME_S)
    error = StreamLost("t1", "receiving", "gone")
    assert_ended(receiver, actions, error, state=TransferState.EXPIRED, tells_peer=False)


def test_a_lease_that_ends_earlier_is_not_resumed(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, now_s=1.0)
    receiver(StreamBroke("gone"), now_s=8.0)
    assert receiver.machine.next_deadline_s == 10.0
    assert receiver(RESUME, now_s=10.0)[1:-1] == [
        SendFrame(Ended("transfer t1: no word of the other side for 9 s while suspended"))
    ]


def test_without_time_to_resume_a_broken_stream_ends_it() -> None:
    receiver = Receiver(resume_s=0.0)
    actions = receiver(REQUEST, BLOCKS, chunk(0), StreamBroke("gone"))
    assert_ended(receiver, actions, StreamLost("t1", "receiving", "gone"), tells_peer=False)


@pytest.mark.parametrize("events", [(), (REQUEST,)], ids=["new", "requested"])
def test_a_stream_that_breaks_before_there_is_a_lease_ends_it(
    receiver: Receiver, events: tuple[object, ...]
) -> None:
    actions = receiver(*events, StreamBroke("gone"))
    error = StreamLost("t1" if events else "", "requested" if events else "new", "gone")
    assert_ended(receiver, actions[len(events) :], error, tells_peer=False, has_blocks=False)


# Time.


def test_every_frame_of_the_sender_renews_the_lease(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, now_s=1.0)
    receiver(chunk(0), now_s=5.0)
    assert receiver.machine.next_deadline_s == 14.0
    assert receiver(Renew(), now_s=13.0) == [SendFrame(GRANT)]
    assert receiver.machine.next_deadline_s == 22.0


def test_expired_lease_refuses_late_chunk(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, now_s=1.0)
    actions = receiver(chunk(0), now_s=10.0)
    error = LeaseExpired("t1", "reserved", 9.0)
    assert_ended(receiver, actions, error, state=TransferState.EXPIRED)
    assert receiver(chunk(0), now_s=10.0) == []


def test_a_commit_after_expiry_is_refused(receiver: Receiver) -> None:
    verified(receiver, now_s=1.0)
    receiver(Commit((3,)), now_s=10.0)
    assert receiver.state is TransferState.EXPIRED


def test_renewals_do_not_reach_past_the_deadline_of_the_request(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, now_s=1.0)
    for now_s in range(2, 61):
        receiver(Renew(), now_s=now_s)
    assert receiver.machine.next_deadline_s == 61.0
    error = DeadlineExceeded("t1", "reserved", 60.0)
    assert_ended(receiver, receiver(TimePassed(), now_s=61.0), error, state=TransferState.EXPIRED)


def test_a_stream_that_says_nothing_ends_after_a_lease(receiver: Receiver) -> None:
    assert receiver.machine.next_deadline_s == 9.0
    actions = receiver(TimePassed(), now_s=9.0)
    error = DeadlineExceeded("", "new", 9.0)
    assert_ended(receiver, actions, error, state=TransferState.EXPIRED, has_blocks=False)


def test_waiting_for_blocks_ends_with_the_deadline(receiver: Receiver) -> None:
    receiver(REQUEST, now_s=1.0)
    actions = receiver(TimePassed(), now_s=61.0)
    reason = "transfer t1 was still requested after 60 s"
    assert actions[:2] == [CancelReservation(reason), SendFrame(Ended(reason))]


def test_blocks_that_come_too_late_go_back(receiver: Receiver) -> None:
    receiver(REQUEST, now_s=1.0)
    actions = receiver(BLOCKS, now_s=61.0)
    error = DeadlineExceeded("t1", "requested", 60.0)
    assert_ended(receiver, actions, error, state=TransferState.EXPIRED)


def test_blocks_that_come_after_the_end_go_back(receiver: Receiver) -> None:
    receiver(REQUEST, GivenUp("shutting down"))
    reason = "the transfer had ended before its blocks came"
    assert receiver(BLOCKS) == [ReleaseBlocks(BLOCKS.block_ids, reason)]


def ways_to_end() -> list[tuple[object, PhasewiseTransferError, bool]]:
    damage = MalformedFrame("too short", 2)
    return [
        (Abort("the client left"), TransferEnded("t1", "receiving", "the client left"), False),
        (GivenUp("shutting down"), TransferAborted("t1", "shutting down"), True),
        (HostBroke("no such block"), HostFailed("t1", "no such block"), True),
        (FrameDamaged(damage), damage, True),
        (Verified(), ProtocolViolation("t1", "receiving", "Verified is not expected"), True),
    ]


@pytest.mark.parametrize(("event", "error", "tells_peer"), ways_to_end())
def test_each_way_to_end_says_why_and_releases(
    receiver: Receiver, event: object, error: PhasewiseTransferError, tells_peer: bool
) -> None:
    actions = receiver(REQUEST, BLOCKS, chunk(0), event)
    assert_ended(receiver, actions, error, tells_peer=tells_peer)


def test_an_abort_while_it_waits_for_blocks_withdraws_the_reservation(receiver: Receiver) -> None:
    actions = receiver(REQUEST, Abort("no"))
    assert isinstance(actions[0], CancelReservation)
    assert frames(actions) == []


def test_doubled_reserve_changes_nothing(receiver: Receiver) -> None:
    assert receiver(REQUEST, REQUEST) == []
    assert receiver(BLOCKS, REQUEST) == [SendFrame(GRANT)]
    assert receiver(chunk(0), REQUEST) == []


def test_a_chunk_before_reserve_breaks_the_protocol(receiver: Receiver) -> None:
    actions = receiver(chunk(0))
    error = ProtocolViolation("", "new", "Chunk is not expected")
    assert_ended(receiver, actions, error, has_blocks=False)


def test_after_the_end_nothing_happens(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, GivenUp("no"))
    for event in (REQUEST, chunk(0), Finish(1), Commit((1,)), Renew(), TimePassed(), StreamBroke("gone")):
        assert receiver(event, now_s=1000.0) == []
    assert receiver.machine.next_deadline_s == float("inf")


def test_every_row_of_the_table_starts_in_a_live_state() -> None:
    assert {state for state, _ in TABLE} == set(LIVE)
