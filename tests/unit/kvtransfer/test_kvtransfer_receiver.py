"""The receiver's machine: events in, actions out, each row of its table."""

from collections.abc import Iterator

import pytest

from kvtransfer.errors import (
    CorruptFrame,
    DeadlineExceeded,
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
    Codec,
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
    Verified,
)
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout
from kvtransfer.lease import LeaseTable
from kvtransfer.receiver import TABLE, ReceiverMachine
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
    ReleaseBlocks,
    ReservationDenied,
    ReserveBlocks,
    SendFrame,
    StreamBroke,
    TimePassed,
    TransferState,
    WriteChunk,
)

# 2 layers and 3 blocks of 4 tokens; a block of a layer has 32 bytes.
LAYOUT = KvLayout(
    "d", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=1, position_encoding=""
)
REQUEST = Reserve("t1", LAYOUT, num_tokens=11, max_tokens=20, incarnation=6, timeout_s=60.0)
BLOCKS = BlocksReserved((9, 7, 5, 3, 1))
GRANT = Granted(lease_id=1, incarnation=6, credits=2, lease_s=9.0)
#: Two chunks that are all there is: the first two blocks, and the last.
HALVES = (KvRange(0, 2, 0, 2), KvRange(0, 2, 2, 3))


def chunk(
    number: int,
    kv_range: KvRange | None = None,
    *,
    lease_id: int = 1,
    incarnation: int = 6,
    cut_bytes: int = 0,
) -> Chunk:
    kv_range = kv_range or HALVES[number]
    payload = memoryview(bytes(kv_range.num_bytes(LAYOUT) - cut_bytes))
    return Chunk(lease_id, incarnation, number, kv_range, Codec.NONE, payload)


class Receiver:
    """A machine under test, whose invariants are checked after every event."""

    def __init__(self) -> None:
        self.leases = LeaseTable()
        self.machine = ReceiverMachine(LAYOUT, 6, self.leases, lease_s=9.0, max_in_flight=2, now_s=0.0)
        self.num_returns = 0
        self.num_given = 0

    def __call__(self, *events: object, now_s: float = 1.0) -> list[Action]:
        """The actions that answer the last of these events."""
        actions: list[Action] = []
        for event in events:
            self.num_given += isinstance(event, BlocksReserved)
            actions = self.machine.handle(event, now_s)
            self.machine.check_invariants()
            self.leases.check_invariants()
            self.num_returns += sum(isinstance(action, ReleaseBlocks | CommitBlocks) for action in actions)
        return actions

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


def test_a_reservation_is_asked_of_the_host_and_granted_under_a_lease(receiver: Receiver) -> None:
    assert receiver(REQUEST) == [ReserveBlocks("t1", num_tokens=11, max_tokens=20, timeout_s=60.0)]
    assert receiver.state is TransferState.REQUESTED
    assert receiver(BLOCKS, now_s=2.0) == [SendFrame(GRANT)]
    assert receiver.state is TransferState.RESERVED
    lease = receiver.leases.get(1)
    assert (lease.owner, lease.block_ids, lease.expires_at_s) == ("t1", BLOCKS.block_ids, 11.0)


def test_another_incarnation_is_fenced(receiver: Receiver) -> None:
    actions = receiver(Reserve("t1", LAYOUT, 11, 20, incarnation=5, timeout_s=60.0))
    reason = "this is incarnation 6, not 5"
    assert frames(actions) == [Refused(reason, retryable=False)]
    assert str(actions[-1].error) == str(ReservationRefused("t1", reason, False))  # type: ignore[union-attr]


def test_another_layout_is_refused_with_the_difference(receiver: Receiver) -> None:
    other = KvLayout("d", "float16", 4, 2, 1, 1, "")
    actions = receiver(Reserve("t1", other, 11, 20, incarnation=6, timeout_s=60.0))
    reason = "dtype is 'float16' at the sender and 'float32' at the receiver"
    assert frames(actions) == [Refused(reason, retryable=False)]


def test_the_host_may_deny_and_says_whether_later_is_better(receiver: Receiver) -> None:
    actions = receiver(REQUEST, ReservationDenied("the pool is full", retryable=True))
    assert frames(actions) == [Refused("the pool is full", retryable=True)]
    assert receiver.state is TransferState.ABORTED


def test_a_chunk_is_written_before_it_is_acknowledged(receiver: Receiver) -> None:
    first = chunk(0)
    assert receiver(REQUEST, BLOCKS, first) == [
        WriteChunk((9, 7), 0, 2, first.payload),
        SendFrame(Ack(0)),
    ]
    assert receiver.state is TransferState.RECEIVING


def test_a_doubled_chunk_is_acknowledged_and_not_written_again(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0))
    assert receiver(chunk(0)) == [SendFrame(Ack(0))]


def test_it_verifies_when_finish_was_seen_and_all_is_here(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0))
    assert frames(receiver(chunk(1))) == [Ack(1)]
    assert receiver(Finish(2)) == [SendFrame(Verified())]
    assert receiver.state is TransferState.VERIFIED


def test_finish_may_overtake_chunks_which_are_then_asked_for(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(1))
    assert receiver(Finish(2)) == [SendFrame(Nack(0, "it has not arrived"))]
    assert receiver(Finish(2)) == []
    assert frames(receiver(chunk(0))) == [Ack(0), Verified()]
    assert receiver(Finish(2)) == [SendFrame(Verified())]


def test_a_commit_of_what_is_verified_hands_the_blocks_over(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), chunk(1), Finish(2))
    assert receiver(Commit((3,))) == [
        CommitBlocks(BLOCKS.block_ids, (3,)),
        SendFrame(Committed()),
        End(None),
    ]
    assert receiver.state is TransferState.COMMITTED


@pytest.mark.parametrize("events", [(), (chunk(0),), (chunk(0), chunk(1)), (chunk(0), Finish(2))])
def test_nothing_that_is_not_verified_is_committed(receiver: Receiver, events: tuple[object, ...]) -> None:
    actions = receiver(REQUEST, BLOCKS, *events, Commit((3,)))
    assert not any(isinstance(action, CommitBlocks) for action in actions)
    assert receiver.state is TransferState.ABORTED


def test_a_damaged_chunk_is_asked_for_again(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS)
    damage = FrameDamaged(CorruptFrame(100, 0), 0)
    nack = SendFrame(Nack(0, "malformed frame of 100 bytes: checksum mismatch"))
    assert receiver(damage) == [nack]
    assert receiver(damage) == [nack]
    # It is on its way already when Finish comes.
    assert frames(receiver(chunk(1), Finish(2))) == []
    assert frames(receiver(chunk(0))) == [Ack(0), Verified()]


def test_damage_to_a_chunk_that_is_here_changes_nothing(receiver: Receiver) -> None:
    assert receiver(REQUEST, BLOCKS, chunk(0), FrameDamaged(CorruptFrame(100, 0), 0)) == []


@pytest.mark.parametrize("number", [None, 6, 2**32 - 1])
def test_damage_that_cannot_be_repaired_ends_it(receiver: Receiver, number: int | None) -> None:
    damage = CorruptFrame(100, number)
    assert_ended(receiver, receiver(REQUEST, BLOCKS, FrameDamaged(damage, number)), damage)


def test_damage_before_the_first_frame_ends_it(receiver: Receiver) -> None:
    damage = CorruptFrame(100, 0)
    assert_ended(receiver, receiver(FrameDamaged(damage, 0)), damage, has_blocks=False)


def bad_chunks() -> list[tuple[str, Chunk]]:
    return [
        ("a chunk for lease 2 of incarnation 6", chunk(1, lease_id=2)),
        ("a chunk for lease 1 of incarnation 5", chunk(1, incarnation=5)),
        ("chunk 6 of 6", chunk(6, HALVES[1])),
        ("blocks [2, 4) of 2 layers and 3 blocks", chunk(1, KvRange(0, 2, 2, 4))),
        ("layers [0, 3)", chunk(1, KvRange(0, 3, 2, 3))),
        ("overlap what came before", chunk(1, KvRange(1, 2, 1, 3))),
        ("chunk 1 has 60 bytes for 64", chunk(1, cut_bytes=4)),
    ]


@pytest.mark.parametrize(("problem", "bad"), bad_chunks(), ids=[problem for problem, _ in bad_chunks()])
def test_a_chunk_that_does_not_fit_is_never_written(receiver: Receiver, problem: str, bad: Chunk) -> None:
    actions = receiver(REQUEST, BLOCKS, chunk(0), bad)
    assert not any(isinstance(action, WriteChunk) for action in actions)
    assert isinstance(actions[-1], End)
    assert isinstance(actions[-1].error, ProtocolViolation)
    assert problem in str(actions[-1].error)


def test_a_stale_double_of_another_lease_is_not_acknowledged(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), chunk(0, lease_id=2))
    assert receiver.state is TransferState.ABORTED


@pytest.mark.parametrize("num_chunks", [0, 1, 7])
def test_a_finish_that_contradicts_the_chunks_ends_it(receiver: Receiver, num_chunks: int) -> None:
    receiver(REQUEST, BLOCKS, chunk(1), Finish(num_chunks))
    assert receiver.state is TransferState.ABORTED


def test_two_finishes_must_agree(receiver: Receiver) -> None:
    receiver(REQUEST, BLOCKS, chunk(0), Finish(2), Finish(3))
    assert receiver.state is TransferState.ABORTED


def test_all_chunks_without_all_kv_is_not_verified(receiver: Receiver) -> None:
    actions = receiver(REQUEST, BLOCKS, chunk(0), Finish(1))
    problem = "all 1 chunks are here, 2 parts are not"
    assert_ended(receiver, actions, ProtocolViolation("t1", "receiving", problem))


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
    receiver(REQUEST, BLOCKS, chunk(0), chunk(1), Finish(2), now_s=1.0)
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
        (StreamBroke("gone"), StreamLost("t1", "receiving", "gone"), False),
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
    assert receiver(BLOCKS, REQUEST) == []


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
