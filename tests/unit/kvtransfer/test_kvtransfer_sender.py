"""The sender's machine: events in, actions out, each row of its table."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvtransfer.codecs.codec import CodecId
from kvtransfer.digest import token_digest, transfer_digest
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
    Resume,
    Resumed,
    Verified,
)
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout
from kvtransfer.pool import PoolOffer
from kvtransfer.sender import MAX_FRUITLESS_RESUMES, MAX_RESENDS, RECONNECT_DELAYS_S, TABLE, SenderMachine
from kvtransfer.session import (
    LIVE,
    Action,
    ChunkRead,
    End,
    FrameDamaged,
    GivenUp,
    HostBroke,
    KvReady,
    PrefillFinished,
    Reconnect,
    ReleaseBlocks,
    SendChunk,
    SendFrame,
    Started,
    StreamBroke,
    TimePassed,
    TransferReport,
    TransferState,
)

# 2 layers and 11 tokens in 3 blocks of 4; a token of a layer has 8 bytes.
LAYOUT = KvLayout(
    "d", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=1, position_encoding=""
)
TOKENS = token_digest(range(11))
REQUEST = Reserve(
    "t1", LAYOUT, num_tokens=11, max_tokens=20, incarnation=6, timeout_s=60.0, token_digest=TOKENS
)
BLOCK_IDS = (8, 5, 2)
GRANT = Granted(lease_id=4, incarnation=6, credits=2, lease_s=9.0, heads=(0, 1))
ALL = KvRange(0, 2, 0, 11)
#: One block of one layer, so six chunks.
SMALL = 32
RESUME_S = 5.0


class Sender:
    """A machine under test, whose invariants are checked after every event."""

    def __init__(
        self, max_chunk_bytes: int = SMALL, request: Reserve = REQUEST, resume_s: float = RESUME_S
    ) -> None:
        self.machine = SenderMachine(
            request, BLOCK_IDS, max_chunk_bytes=max_chunk_bytes, resume_s=resume_s, now_s=0.0
        )
        self.num_releases = 0

    def __call__(self, *events: object, now_s: float = 1.0) -> list[Action]:
        """The actions that answer the last of these events. Chunks are read as soon as they may go."""
        actions: list[Action] = []
        for event in events:
            actions = self._handle(event, now_s)
            for action in list(actions):
                if isinstance(action, SendChunk):
                    actions += self._handle(read(action.sequence_number), now_s)
        return actions

    def _handle(self, event: object, now_s: float) -> list[Action]:
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


def read(number: int, checksum: int | None = None) -> ChunkRead:
    return ChunkRead(number, 100 + number if checksum is None else checksum, 50)


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


#: The six chunks of all KV.
CHUNKS = [KvRange(layer, layer + 1, lo, min(lo + 4, 11)) for layer in (0, 1) for lo in (0, 4, 8)]
FINISH = Finish(
    6,
    transfer_digest(LAYOUT, TOKENS, (0, 1), [(where, 0, 100 + i) for i, where in enumerate(CHUNKS)]),
)
REPORT = TransferReport(
    num_bytes=176,
    num_wire_bytes=300,
    num_chunks=6,
    transfer_s=0.0,
    busy_s=0.0,
    exposed_s=0.0,
    transport="grpc",
    transport_reason="",
    codec=CodecId.NONE,
    num_resent_chunks=0,
    num_resumes=0,
)


def send_all(sender: Sender) -> list[Action]:
    return sender(
        Started(), GRANT, KvReady(ALL), PrefillFinished((3,)), *(Ack(number) for number in range(6))
    )


def suspend(sender: Sender, *acks: int, now_s: float = 1.0) -> list[Action]:
    """Four chunks are ready, two of them sent; then the stream breaks."""
    ready = KvReady(KvRange(0, 1, 0, 11))
    return sender(
        Started(), GRANT, ready, *(Ack(number) for number in acks), StreamBroke("gone"), now_s=now_s
    )


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
    assert sender.machine.granted == GRANT


def test_a_chunk_names_lease_incarnation_range_and_heads() -> None:
    sender = Sender(max_chunk_bytes=1000)
    actions = sender(Started(), GRANT, KvReady(KvRange(0, 2, 4, 11)))
    assert actions == [SendChunk(4, 6, 0, KvRange(0, 2, 4, 11), (0, 1), CodecId.NONE, "grpc")]


def test_chunks_are_divided_between_tokens_at_the_ends_of_blocks() -> None:
    sender = Sender(max_chunk_bytes=40)
    actions = sender(Started(), replace(GRANT, credits=9), KvReady(KvRange(0, 1, 3, 11)))
    ranges = [action.kv_range for action in actions if isinstance(action, SendChunk)]
    assert ranges == [KvRange(0, 1, 3, 4), KvRange(0, 1, 4, 8), KvRange(0, 1, 8, 11)]


OFFERING = replace(REQUEST, offers=(PoolOffer("shm", b"name"),), codec=CodecId.FP8)


def test_what_the_receiver_copies_itself_goes_in_large_chunks_and_unpacked() -> None:
    sender = Sender(request=OFFERING)
    grant = replace(GRANT, transport="shm", transport_reason="no GPU")
    actions = sender(Started(), grant, KvReady(ALL))
    assert actions == [SendChunk(4, 6, 0, ALL, (0, 1), CodecId.NONE, "shm")]


def test_payloads_are_packed_by_the_codec_that_was_asked_for() -> None:
    actions = Sender(request=OFFERING)(Started(), GRANT, KvReady(ALL))
    assert [action.codec for action in actions if isinstance(action, SendChunk)] == [CodecId.FP8] * 2


def test_each_acknowledgement_lets_one_more_chunk_go(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL))
    assert numbers(sender(Ack(1))) == [2]
    assert numbers(sender(Ack(0))) == [3]


def test_a_doubled_acknowledgement_gives_no_credit(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), Ack(0))
    assert sender(Ack(0)) == []


def test_finish_and_commit_follow_the_last_chunk_as_soon_as_it_was_read(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), PrefillFinished((3,)))
    for number in range(3):
        assert frames(sender(Ack(number))) == []
    actions = sender(Ack(3))
    assert numbers(actions) == [5]
    assert frames(actions) == [FINISH, Commit((3,))]
    assert isinstance(actions[0], SendChunk)


def test_nothing_is_said_of_the_end_before_prefill_has_sampled(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), *(Ack(number) for number in range(6)))
    assert frames(sender(PrefillFinished((3,)))) == [FINISH, Commit((3,))]


def test_the_digest_speaks_of_what_was_read(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), PrefillFinished((3,)))
    machine = sender.machine
    for number in range(4):
        machine.handle(Ack(number), 1.0)
    for number in (2, 3, 4):
        machine.handle(read(number), 1.0)
    [finish, _commit] = machine.handle(read(5, checksum=7), 1.0)
    assert isinstance(finish, SendFrame)
    assert finish.frame != FINISH


def test_a_rejected_chunk_is_sent_again_a_few_times_and_then_no_more(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL))
    for _ in range(MAX_RESENDS):
        assert numbers(sender(Nack(1, "damaged"))) == [1]
    actions = sender(Nack(1, "damaged"))
    assert_ended(sender, actions, ChunkRejected("t1", 1, MAX_RESENDS + 1, "damaged"))


def test_a_chunk_that_was_acknowledged_is_sent_again_when_the_digest_does_not_fit(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL), Ack(0))
    # Both credits are in use.
    assert sender(Nack(0, "the digest")) == []
    assert numbers(sender(Ack(1))) == [0]


def test_kv_that_is_not_as_it_was_when_it_was_read_before_is_not_sent(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL))
    sender.machine.handle(Nack(1, "damaged"), 1.0)
    actions = sender(read(1, checksum=7))
    assert_ended(sender, actions, InvalidTransfer("t1", "the KV of chunk 1 changed while it was sent"))


@pytest.mark.parametrize("frame", [Ack(2), Nack(2, "")], ids=["ack", "nack"])
def test_a_chunk_that_was_never_sent_cannot_be_answered(sender: Sender, frame: Frame) -> None:
    actions = sender(Started(), GRANT, KvReady(ALL), frame)
    assert isinstance(actions[-1], End)
    assert isinstance(actions[-1].error, ProtocolViolation)


def test_it_releases_once_it_hears_of_the_commit(sender: Sender) -> None:
    send_all(sender)
    assert sender(Verified()) == []
    assert sender.state is TransferState.VERIFIED
    assert sender(Verified(), Ack(2), Nack(2, "late"), read(2), GRANT) == []
    actions = sender(Committed())
    assert actions == [ReleaseBlocks(BLOCK_IDS, "the receiver has committed"), End(None, REPORT)]
    assert sender.state is TransferState.RELEASED


def test_a_commit_whose_verified_was_lost_counts(sender: Sender) -> None:
    send_all(sender)
    assert sender(Committed())[-1] == End(None, REPORT)


def test_the_report_counts_from_the_first_chunk_and_from_the_end_of_prefill(sender: Sender) -> None:
    sender(Started(), GRANT, now_s=1.0)
    sender(KvReady(ALL), now_s=2.0)
    sender(Ack(0), Ack(1), Nack(2, "damaged"), Ack(2), now_s=3.0)
    sender(PrefillFinished((3,)), now_s=5.0)
    sender(Ack(3), Ack(4), Ack(5), Verified(), now_s=6.0)
    end = sender(Committed(), now_s=7.5)[-1]
    assert isinstance(end, End)
    assert end.report == replace(
        REPORT, num_wire_bytes=350, num_resent_chunks=1, transfer_s=5.5, busy_s=4.0, exposed_s=2.5
    )


def test_a_commit_that_is_heard_of_too_late_still_counts(sender: Sender) -> None:
    send_all(sender)
    sender(Verified())
    sender(Committed(), now_s=1000.0)
    assert sender.state is TransferState.RELEASED


@pytest.mark.parametrize(
    ("frame", "problem"),
    [(Verified(), "it verified before Finish was sent"), (Committed(), "it committed before it was told to")],
)
def test_an_answer_to_what_was_not_said_breaks_the_protocol(
    sender: Sender, frame: Frame, problem: str
) -> None:
    actions = sender(Started(), GRANT, KvReady(ALL), frame)
    assert_ended(sender, actions, ProtocolViolation("t1", "receiving", problem))


def test_a_grant_of_another_incarnation_is_not_used(sender: Sender) -> None:
    actions = sender(Started(), replace(GRANT, incarnation=7))
    assert_ended(sender, actions, ProtocolViolation("t1", "requested", "incarnation 7 answers"))


def test_a_way_that_was_not_offered_is_not_taken(sender: Sender) -> None:
    problem = "it wants the KV by nixl, which was not offered"
    actions = sender(Started(), replace(GRANT, transport="nixl"))
    assert_ended(sender, actions, ProtocolViolation("t1", "requested", problem))


def test_heads_that_are_not_here_are_not_sent(sender: Sender) -> None:
    problem = "it wants KV heads [0, 2] of [0, 1]"
    actions = sender(Started(), replace(GRANT, heads=(0, 2)))
    assert_ended(sender, actions, ProtocolViolation("t1", "requested", problem))


def test_a_refusal_ends_it_with_the_reason(sender: Sender) -> None:
    actions = sender(Started(), Refused("no blocks", retryable=True))
    assert_ended(sender, actions, TransferRefused("t1", "no blocks", True), tells_peer=False)


# A stream that breaks.


def test_a_transfer_whose_stream_breaks_opens_another(sender: Sender) -> None:
    assert suspend(sender) == [Reconnect(0.0)]
    assert sender.state is TransferState.SUSPENDED
    assert sender(Started()) == [SendFrame(Resume("t1", 0, 4, 6))]


def test_it_waits_longer_each_time_a_stream_does_not_stand(sender: Sender) -> None:
    suspend(sender)
    delays = [sender(StreamBroke("refused")) for _ in range(4)]
    assert delays == [[Reconnect(delay_s)] for delay_s in (*RECONNECT_DELAYS_S[1:], RECONNECT_DELAYS_S[-1])]


def test_what_did_not_arrive_is_sent_again_the_first_missing_one_first(sender: Sender) -> None:
    suspend(sender, 1)
    # Chunk 1 is there, 0 and 2 were on their way.
    assert numbers(sender(Started(), Resumed(0, (1,)))) == [0, 2]
    assert sender.state is TransferState.RECEIVING


def test_while_it_is_suspended_prefill_goes_on_and_nothing_is_sent(sender: Sender) -> None:
    suspend(sender, 0, 1)
    assert sender(KvReady(KvRange(1, 2, 0, 11)), PrefillFinished((3,)), read(2)) == []
    assert numbers(sender(Started(), Resumed(3))) == [3, 4]


def test_a_transfer_that_had_sent_nothing_resumes_with_nothing(sender: Sender) -> None:
    sender(Started(), GRANT, StreamBroke("gone"), Started())
    assert sender(Resumed(0)) == []
    assert sender.state is TransferState.RESERVED


def test_after_a_resume_the_end_is_said_once_more(sender: Sender) -> None:
    send_all(sender)
    sender(StreamBroke("gone"), Started())
    assert frames(sender(Resumed(6))) == [FINISH, Commit((3,))]
    assert sender(Verified(), Committed())[-1] == End(None, replace(REPORT, num_resumes=1))


def test_a_receiver_that_knew_finish_may_verify_before_it_is_said_again(sender: Sender) -> None:
    send_all(sender)
    sender(StreamBroke("gone"), Started(), Resumed(2))
    assert frames(sender(Verified())) == [Commit((3,))]


def test_a_commit_whose_answer_was_lost_is_heard_of_after_the_break(sender: Sender) -> None:
    send_all(sender)
    sender(Verified(), StreamBroke("gone"), Started())
    assert sender(Committed())[-1] == End(None, REPORT)


@pytest.mark.parametrize("resumed", [Resumed(3), Resumed(0, (2,)), Resumed(2**32 - 1)])
def test_a_receiver_that_has_what_was_never_sent_breaks_the_protocol(
    sender: Sender, resumed: Resumed
) -> None:
    suspend(sender)
    actions = sender(Started(), resumed)
    last = max((resumed.first_missing - 1, *resumed.received))
    problem = f"it has chunk {last}, which was never sent"
    assert_ended(sender, actions, ProtocolViolation("t1", "suspended", problem))


def test_a_late_double_of_resumed_changes_nothing(sender: Sender) -> None:
    suspend(sender)
    assert sender(Started(), Resumed(0), Resumed(0)) == []


def test_a_stream_that_does_not_come_back_ends_it_in_time(sender: Sender) -> None:
    suspend(sender, now_s=2.0)
    assert sender.machine.next_deadline_s == 2.0 + RESUME_S
    sender(StreamBroke("refused"), now_s=3.0)
    actions = sender(TimePassed(), now_s=2.0 + RESUME_S)
    error = StreamLost("t1", "receiving", "gone")
    assert_ended(sender, actions, error, state=TransferState.EXPIRED, tells_peer=False)


def test_a_lease_that_is_not_known_any_more_ends_it(sender: Sender) -> None:
    suspend(sender)
    actions = sender(Started(), Ended("not known"))
    assert_ended(sender, actions, TransferEnded("t1", "suspended", "not known"), tells_peer=False)


def test_a_refusal_to_resume_ends_it(sender: Sender) -> None:
    suspend(sender)
    actions = sender(Started(), Refused("no", retryable=False))
    assert_ended(sender, actions, TransferRefused("t1", "no", False), tells_peer=False)


def test_a_receiver_that_is_too_busy_to_listen_is_tried_again(sender: Sender) -> None:
    suspend(sender)
    assert sender(Started(), Refused("too many", retryable=True)) == []
    assert sender(StreamBroke("closed")) == [Reconnect(RECONNECT_DELAYS_S[1])]
    assert numbers(sender(Started(), Resumed(0))) == [0, 1]


def test_streams_that_bring_nothing_there_end_it(sender: Sender) -> None:
    suspend(sender)
    for _ in range(MAX_FRUITLESS_RESUMES):
        assert numbers(sender(Started(), Resumed(0))) == [0, 1]
        sender(StreamBroke("gone"))
    actions = sender(Started(), Resumed(0))
    assert_ended(sender, actions, StreamLost("t1", "receiving", "gone"))


def test_streams_that_bring_something_are_resumed_as_often_as_it_takes(sender: Sender) -> None:
    sender(Started(), GRANT, KvReady(ALL))
    for number in range(6):
        for _ in range(MAX_FRUITLESS_RESUMES):
            sender(StreamBroke("gone"), Started(), Resumed(number))
    assert sender.state is TransferState.RECEIVING


# A request that is not answered.


def test_a_request_that_is_not_answered_is_made_again(sender: Sender) -> None:
    assert sender(Started(), StreamBroke("gone")) == [Reconnect(0.0)]
    assert sender(KvReady(ALL)) == []
    assert sender(Started()) == [SendFrame(REQUEST)]
    assert numbers(sender(GRANT)) == [0, 1]
    # The next break is one of its own.
    assert sender(StreamBroke("gone")) == [Reconnect(0.0)]


def test_who_does_not_answer_a_few_times_is_gone(sender: Sender) -> None:
    delays = [sender(Started(), StreamBroke("gone")) for _ in RECONNECT_DELAYS_S[:-1]]
    assert delays == [[Reconnect(delay_s)] for delay_s in RECONNECT_DELAYS_S[:-1]]
    actions = sender(Started(), StreamBroke("gone"))
    assert_ended(sender, actions, StreamLost("t1", "requested", "gone"), tells_peer=False)


def test_a_stream_that_cannot_be_opened_to_ask_again_ends_it_in_time(sender: Sender) -> None:
    sender(Started(), StreamBroke("gone"), now_s=2.0)
    assert sender.machine.next_deadline_s == 2.0 + RESUME_S
    actions = sender(TimePassed(), now_s=2.0 + RESUME_S)
    error = StreamLost("t1", "requested", "gone")
    assert_ended(sender, actions, error, state=TransferState.EXPIRED, tells_peer=False)


def test_without_time_to_resume_a_broken_stream_ends_it() -> None:
    sender = Sender(resume_s=0.0)
    actions = suspend(sender)
    assert_ended(sender, actions, StreamLost("t1", "receiving", "gone"), tells_peer=False)


def test_a_stream_that_never_stood_ends_it(sender: Sender) -> None:
    actions = sender(StreamBroke("gone"))
    assert_ended(sender, actions, StreamLost("t1", "new", "gone"), tells_peer=False)


# Time.


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
        (FrameDamaged(damage), damage, True),
        (
            Refused("no", retryable=False),
            ProtocolViolation("t1", "receiving", "Refused is not expected"),
            True,
        ),
        (KvReady(ALL), InvalidTransfer("t1", f"KV is ready for {ALL} overlap what came before"), True),
        (Resume("t1", 0, 4, 6), InvalidTransfer("t1", "Resume is not expected while receiving"), True),
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
    actions = sender(Started(), KvReady(KvRange(0, 2, 0, 9)), PrefillFinished((1,)))
    problem = "prefill finished with 4 tokens of layers not ready"
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
