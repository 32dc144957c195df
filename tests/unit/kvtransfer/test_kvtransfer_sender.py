"""The sender's machine: events in, actions out, each row of its table."""

from collections.abc import Iterator

import pytest

from kvtransfer.errors import (
    ChunkRejected,
    DeadlineExceeded,
    HostFailed,
    InvalidTransfer,
    LeaseExpired,
    MalformedFrame,
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
from kvtransfer.sender import MAX_RESENDS, TABLE, SenderMachine
from kvtransfer.session import (
    LIVE,
    Action,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    KvReady,
    PrefillFinished,
    ReleaseBlocks,
    SendChunk,
    SendFrame,
    Started,
    StreamBroke,
    TimePassed,
    TransferReport,
    TransferState,
)

# 2 layers and 3 blocks of 4 tokens; a block of a layer has 32 bytes.
LAYOUT = KvLayout(
    "d", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=1, position_encoding=""
)
REQUEST = Reserve("t1", LAYOUT, num_tokens=11, max_tokens=20, incarnation=6, timeout_s=60.0)
BLOCK_IDS = (8, 5, 2)
GRANT = Granted(lease_id=4, incarnation=6, credits=2, lease_s=9.0)
ALL = KvRange(0, 2, 0, 3)
#: One block of one layer, so six chunks.
SMALL = 32


class Sender:
    """A machine under test, whose invariants are checked after every event."""

    def __init__(self, max_chunk_bytes: int = SMALL) -> None:
        self.machine = SenderMachine(REQUEST, BLOCK_IDS, max_chunk_bytes=max_chunk_bytes, now_s=0.0)
        self.num_releases = 0

    def __call__(self, *events: object, now_s: float = 1.0) -> list[Action]:
        """The actions that answer the last of these events."""
        actions: list[Action] = []
        for event in events:
            actions = self.machine.handle(event, now_s)
            self.machine.check_invariants()
            self.num_releases += sum(isinstance(action, ReleaseBlocks) for action in actions)
        return actions

    @property
    def state(self) -> TransferState:
        return self.machine.state


@pytest.fixture
def sender() -> Iterator[Sender]:
    sender = Sender()
    yield sender
    assert sender.num_releases == (1 if sender.machine.is_ended else 0)


def frames(actions: list[Action]) -> list[Frame]:
    return [action.frame for action in actions if isinstance(action, SendFrame)]


def numbers(actions: list[Action]) -> list[int]:
    return [action.sequence_number for action in actions if isinstance(action, SendChunk)]


def assert_ended(
    sender: Sender,
    actions: list[Action],
    error: PhasewiseTransferError,
    *,
    state: TransferState = TransferState.ABORTED,
    tells_peer: bool = True,
) -> None:
    reason = str(error)
    told: list[Action] = [SendFrame(Abort(reason))] if tells_peer else []
    [*before, end] = actions
    assert before == [*told, ReleaseBlocks(BLOCK_IDS, reason)]
    assert isinstance(end, End)
    assert type(end.error) is type(error)
    assert str(end.error) == reason
    assert sender.state is state


def ready_to_verify(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), PrefillFinished((3,)), *(Ack(number) for number in range(6)))


def test_it_asks_before_it_sends(sender: Sender) -> None:
    assert sender(KvReady(ALL)) == []
    assert sender(Started()) == [SendFrame(REQUEST)]
    assert sender(PrefillFinished((3,))) == []
    assert sender.state is TransferState.REQUESTED
    assert numbers(sender(GRANT)) == [0, 1]
    assert sender.state is TransferState.RECEIVING


def test_a_grant_before_any_kv_is_ready_waits(sender: Sender) -> None:
    assert sender(Started(), GRANT) == []
    assert sender.state is TransferState.RESERVED


def test_a_chunk_names_lease_incarnation_range_and_pool_blocks(sender: Sender) -> None:
    sender = Sender(max_chunk_bytes=1000)
    actions = sender(Started(), GRANT, KvReady(KvRange(0, 2, 1, 3)))
    assert actions == [SendChunk(4, 6, 0, KvRange(0, 2, 1, 3), (5, 2))]


def test_each_acknowledgement_lets_one_more_chunk_go(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL))
    assert numbers(sender(Ack(1))) == [2]
    assert numbers(sender(Ack(0))) == [3]


def test_a_doubled_acknowledgement_gives_no_credit(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), Ack(0))
    assert sender(Ack(0)) == []


def test_finish_follows_the_last_chunk_without_waiting_for_acknowledgements(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), PrefillFinished((3,)))
    for number in range(3):
        assert frames(sender(Ack(number))) == []
    actions = sender(Ack(3))
    assert numbers(actions) == [5]
    assert frames(actions) == [Finish(6)]


def test_a_rejected_chunk_is_sent_again_a_few_times_and_then_no_more(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL))
    for _ in range(MAX_RESENDS):
        assert numbers(sender(Nack(1, "damaged"))) == [1]
    actions = sender(Nack(1, "damaged"))
    assert_ended(sender, actions, ChunkRejected("t1", 1, MAX_RESENDS + 1, "damaged"))


def test_a_chunk_that_was_acknowledged_is_not_sent_again(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), Ack(0))
    assert sender(Nack(0, "late")) == []


@pytest.mark.parametrize("frame", [Ack(2), Nack(2, "")], ids=["ack", "nack"])
def test_a_chunk_that_was_never_sent_cannot_be_answered(sender: Sender, frame: Frame) -> None:
    actions = sender(Started(), GRANT, KvReady(ALL), frame)
    assert isinstance(actions[-1], End)
    assert isinstance(actions[-1].error, ProtocolViolation)


def test_it_commits_once_all_is_verified_and_releases_once_that_is_done(sender: Sender) -> None:
    ready_to_verify(sender)
    assert sender(Verified()) == [SendFrame(Commit((3,)))]
    assert sender.state is TransferState.VERIFIED
    assert sender(Verified(), Ack(2), Nack(2, "late")) == []
    actions = sender(Committed())
    assert actions == [
        ReleaseBlocks(BLOCK_IDS, "the receiver has committed"),
        End(None, TransferReport(num_bytes=192, num_chunks=6, transfer_s=0.0, exposed_s=0.0)),
    ]
    assert sender.state is TransferState.RELEASED


def test_the_report_counts_from_the_first_chunk_and_from_the_end_of_prefill(sender: Sender) -> None:
    sender(Started(), GRANT, now_s=1.0)
    sender(KvReady(ALL), now_s=2.0)
    sender(PrefillFinished((3,)), now_s=5.0)
    sender(*(Ack(number) for number in range(6)), Verified(), now_s=6.0)
    end = sender(Committed(), now_s=7.5)[-1]
    assert end == End(None, TransferReport(num_bytes=192, num_chunks=6, transfer_s=5.5, exposed_s=2.5))


def test_a_commit_that_is_heard_of_too_late_still_counts(sender: Sender) -> None:
    ready_to_verify(sender)
    sender(Verified())
    sender(Committed(), now_s=1000.0)
    assert sender.state is TransferState.RELEASED


def test_verified_before_finish_breaks_the_protocol(sender: Sender) -> None:
    actions = sender(Started(), GRANT, KvReady(ALL), Verified())
    problem = "it verified before Finish was sent"
    assert_ended(sender, actions, ProtocolViolation("t1", "receiving", problem))


def test_a_grant_of_another_incarnation_is_not_used(sender: Sender) -> None:
    actions = sender(Started(), Granted(4, 7, 2, 9.0))
    assert_ended(sender, actions, ProtocolViolation("t1", "requested", "incarnation 7 answers"))


def test_a_refusal_ends_it_with_the_reason(sender: Sender) -> None:
    actions = sender(Started(), Refused("no blocks", retryable=True))
    assert_ended(sender, actions, TransferRefused("t1", "no blocks", True), tells_peer=False)


def test_silence_of_a_third_of_a_lease_renews_it(sender: Sender) -> None:
    sender(Started(), GRANT, now_s=1.0)
    sender(KvReady(ALL), now_s=2.0)
    assert sender.machine.next_deadline_s == 5.0
    assert sender(TimePassed(), now_s=4.9) == []
    assert sender(TimePassed(), now_s=5.0) == [SendFrame(Renew())]
    assert sender.machine.next_deadline_s == 8.0
    assert sender(GRANT, now_s=6.0) == []


def test_silence_of_the_receiver_for_a_lease_ends_it(sender: Sender) -> None:
    sender(Started(), GRANT, now_s=1.0)
    actions = sender(TimePassed(), now_s=10.0)
    error = LeaseExpired("t1", "reserved", 9.0)
    assert_ended(sender, actions, error, state=TransferState.EXPIRED)


def test_whatever_the_receiver_says_shows_that_it_lives(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), now_s=1.0)
    sender(Ack(0), now_s=9.9)
    assert sender(TimePassed(), now_s=10.0) == []


@pytest.mark.parametrize("event", [TimePassed(), GRANT, KvReady(ALL)], ids=lambda event: type(event).__name__)
def test_the_hard_deadline_ends_it_whatever_comes(sender: Sender, event: object) -> None:
    sender(Started())
    assert sender.machine.next_deadline_s == 60.0
    actions = sender(event, now_s=60.0)
    error = DeadlineExceeded("t1", "requested", 60.0)
    assert_ended(sender, actions, error, state=TransferState.EXPIRED)


def ways_to_end() -> list[tuple[object, PhasewiseTransferError, bool]]:
    damage = MalformedFrame("too short", 2)
    return [
        (Ended("shutting down"), TransferEnded("t1", "receiving", "shutting down"), False),
        (GivenUp("the client left"), TransferAborted("t1", "the client left"), True),
        (HostBroke("no such block"), HostFailed("t1", "no such block"), True),
        (StreamBroke("gone"), StreamLost("t1", "receiving", "gone"), False),
        (FrameDamaged(damage), damage, True),
        (
            Refused("no", retryable=False),
            ProtocolViolation("t1", "receiving", "Refused is not expected"),
            True,
        ),
        (KvReady(ALL), InvalidTransfer("t1", f"KV is ready for {ALL} overlap what came before"), True),
        (PrefillFinished(()), InvalidTransfer("t1", "prefill finished without a token"), True),
    ]


@pytest.mark.parametrize(("event", "error", "tells_peer"), ways_to_end())
def test_each_way_to_end_says_why_and_releases(
    sender: Sender, event: object, error: PhasewiseTransferError, tells_peer: bool
) -> None:
    actions = sender(Started(), GRANT, KvReady(ALL), event)
    assert_ended(sender, actions, error, tells_peer=tells_peer)


def test_prefill_cannot_finish_twice(sender: Sender) -> None:
    actions = sender(Started(), GRANT, KvReady(ALL), PrefillFinished((1,)), PrefillFinished((1,)))
    assert_ended(sender, actions, InvalidTransfer("t1", "prefill finished twice"))


def test_prefill_that_finishes_with_kv_missing_is_not_sent(sender: Sender) -> None:
    actions = sender(Started(), KvReady(KvRange(0, 2, 0, 2)), PrefillFinished((1,)))
    problem = "prefill finished with 2 blocks of layers not ready"
    assert_ended(sender, actions, InvalidTransfer("t1", problem))


def test_giving_up_before_the_start_tells_nobody(sender: Sender) -> None:
    actions = sender(GivenUp("no"))
    assert_ended(sender, actions, TransferAborted("t1", "no"), tells_peer=False)


def test_after_the_end_nothing_happens(sender: Sender) -> None:
    sender(Started(), GivenUp("no"))
    for event in (GRANT, Committed(), KvReady(ALL), PrefillFinished((1,)), TimePassed(), GivenUp("again")):
        assert sender(event, now_s=1000.0) == []
    assert sender.machine.next_deadline_s == float("inf")


def test_every_row_of_the_table_starts_in_a_live_state() -> None:
    assert {state for state, _ in TABLE} == set(LIVE) - {TransferState.COMMITTED}
