"""What is remembered of requests: small, bounded, and right at any moment."""

import gc

from orchestrator.control.encode_split import Shard
from orchestrator.control.prompt_images import ImageFile, PlacedTile, PromptImages
from orchestrator.control.record_wire import record_to_pb
from orchestrator.control.request_actions import WantEncoders
from orchestrator.control.request_machine import MAX_ATTEMPTS, RequestMachine, RequestState, RequestTimes
from orchestrator.control.request_record import RequestRecord, RequestRecords
from orchestrator.control.router import Route
from orchestrator.control.view import LifecycleState, WorkerView
from workers.api import (
    FailureCode,
    ImagesEncoded,
    ImagesWanted,
    ImageTile,
    KvTransferred,
    Phase,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    TokensGenerated,
    WorkerId,
)

PREFILL = WorkerView(WorkerId("p-0"), 3, frozenset({Phase.PREFILL}), LifecycleState.READY, "p:1")
DECODE = WorkerView(WorkerId("d-0"), 4, frozenset({Phase.DECODE}), LifecycleState.READY, "d:1")
ENCODE = WorkerView(WorkerId("e-0"), 5, frozenset({Phase.ENCODE}), LifecycleState.READY, "e:1")
ROUTE = Route(PREFILL, DECODE, "least loaded")


class One:
    """A machine with its record, driven as a gateway does."""

    def __init__(self, name: str = "r1") -> None:
        sampling = SamplingParams(max_new_tokens=4)
        self.machine = RequestMachine(RequestId(name), (1, 2, 3), sampling, 100.0, RequestTimes(1.0))
        self.record = RequestRecord.of([self.machine])
        self.sample = self.record.samples[0]

    def does(self, actions: object, now_s: float) -> None:
        if self.machine.state is not self.sample.state:
            self.sample.moved(self.machine, actions, now_s)  # type: ignore[arg-type]

    def routed(self, attempt: int, now_s: float) -> None:
        self.does(self.machine.routed(ROUTE, attempt, now_s), now_s)

    def tokens(self, worker: WorkerView, position: int, *token_ids: int, now_s: float) -> None:
        event = TokensGenerated(self.machine.key, token_ids, position, prefill_s=0.25)
        self.does(self.machine.worker_event(worker.worker_id, event, now_s), now_s)

    def fails(self, worker: WorkerView, now_s: float, reason: str = "full") -> None:
        event = RequestFailed(self.machine.key, FailureCode.OVERLOADED, reason)
        self.does(self.machine.worker_event(worker.worker_id, event, now_s), now_s)


def test_states_come_with_their_times_and_reasons() -> None:
    one = One()
    one.routed(11, 2.0)
    one.fails(DECODE, 3.0)
    one.routed(12, 4.0)
    one.tokens(PREFILL, 3, 50, now_s=5.0)
    one.tokens(DECODE, 4, 51, 52, 53, now_s=6.0)
    assert [(state.state, state.at_s, state.reason) for state in one.sample.states] == [
        (RequestState.QUEUED, 1.0, ""),
        (RequestState.PREFILL, 2.0, ""),
        (RequestState.QUEUED, 3.0, "d-0: full"),
        (RequestState.PREFILL, 4.0, ""),
        (RequestState.DECODE, 5.0, ""),
        (RequestState.FINISHED, 6.0, ""),
    ]
    first, second = one.sample.attempts
    assert (first.attempt, first.at_s, first.route, first.problem) == (11, 2.0, ROUTE, "d-0: full")
    assert (second.attempt, second.problem) == (12, "")
    assert one.sample.num_tokens == 4
    assert (one.sample.first_token_at_s, one.sample.second_token_at_s) == (5.0, 6.0)
    assert one.sample.prefill_s == 0.25


def test_what_ends_a_request_between_two_attempts_is_not_the_attempts_problem() -> None:
    one = One()
    one.routed(11, 2.0)
    one.fails(PREFILL, 3.0)
    one.does(one.machine.cancelled("the client left"), 4.0)
    assert one.sample.attempts[0].problem == "p-0: full"
    assert one.sample.states[-1].reason == "the client left"


def test_a_request_that_fails_for_good_has_all_its_attempts() -> None:
    one = One()
    for attempt in range(MAX_ATTEMPTS):
        one.routed(attempt + 1, 2.0 + attempt)
        one.fails(PREFILL, 2.5 + attempt, f"reason {attempt}")
    problems = [attempt.problem for attempt in one.sample.attempts]
    assert problems == [f"p-0: reason {i}" for i in range(MAX_ATTEMPTS)]
    assert one.sample.state is RequestState.FAILED


def test_a_running_request_is_told_as_it_is_now() -> None:
    records, one = RequestRecords(), One()
    records.begin(one.record, [one.machine])
    one.routed(11, 2.0)
    one.tokens(PREFILL, 3, 50, now_s=5.0)
    one.tokens(DECODE, 4, 51, now_s=6.0)
    found = records.get(RequestId("r1"))
    assert found is one.record
    assert found.samples[0].num_tokens == 2
    assert records.get(RequestId("r2")) is None


def test_a_transfer_that_is_told_of_after_the_end_is_kept() -> None:
    records, one = RequestRecords(), One()
    records.begin(one.record, [one.machine])
    one.routed(11, 2.0)
    key = one.machine.key
    one.does(one.machine.cancelled("enough"), 3.0)
    records.end(one.record)
    event = KvTransferred(key, 100, 2, 0.5, 0.1, transport="shm")
    records.transferred(event)
    assert one.sample.attempts[0].transfer == event
    # Of a request, or an attempt, that nobody remembers.
    records.transferred(KvTransferred(RequestKey(RequestId("other"), 1), 1, 1, 1.0, 1.0))
    records.transferred(KvTransferred(RequestKey(key.request_id, 99), 1, 1, 1.0, 1.0))
    assert one.sample.attempts[0].transfer == event


def test_shards_of_pictures_are_remembered_with_the_attempt_that_they_were_for() -> None:
    one = One()
    tile = PlacedTile(0, 0, 16, ImageTile(1, 1, b"key"))
    one.machine.images = PromptImages((ImageFile(b"file", "image/png", 8, 8),), (tile,))
    one.machine.encodes.images = one.machine.images
    for attempt, shard in ((11, 21), (12, 22)):
        one.routed(attempt, 2.0)
        wanted = one.machine.worker_event(PREFILL.worker_id, ImagesWanted(one.machine.key, (0,)), 3.0)
        assert wanted == [WantEncoders()]
        one.machine.encoders_chosen([(shard, Shard(ENCODE, 0, 1))], 4.0)
        if attempt == 11:
            one.fails(PREFILL, 4.5)
    report = ImagesEncoded(RequestKey(one.machine.request_id, 22), 1, 0, 1, 64, 0.0, 0.1, 0.2, 0.3, "shm")
    assert one.machine.worker_event(ENCODE.worker_id, report, 5.0) == []
    assert one.machine.times.images_wanted_at_s == 3.0
    assert one.machine.times.images_encoded_at_s == 5.0
    one.machine.check_invariants()
    first, second = record_to_pb(one.record, 6.0).samples[0].attempts
    (given_up,), (done,) = first.encodes, second.encodes
    assert (given_up.worker_id, given_up.problem, given_up.HasField("duration_s")) == (
        "e-0",
        "given up",
        False,
    )
    assert (done.at_s, done.duration_s, done.encode_s, done.transport) == (3.0, 1.0, 0.2, "shm")
    assert (done.first_tile, done.num_tiles, done.problem) == (0, 1, "")
    # The files are the machine's alone: a record stays small.
    assert not any(
        isinstance(part, PromptImages) for part in gc.get_referents(one.sample, *one.sample.encodes)
    )


def test_the_last_that_ended_are_kept_and_all_that_run() -> None:
    records = RequestRecords(max_records=2)
    ones = [One(f"r{i}") for i in range(5)]
    for one in ones:
        records.begin(one.record, [one.machine])
    assert len(records) == 5
    for i in (3, 0, 2):
        records.end(ones[i].record)
    assert [records.get(RequestId(f"r{i}")) is not None for i in range(5)] == [True, True, True, False, True]
    assert len(records) == 4


def test_an_id_that_is_used_again_is_of_the_later_request() -> None:
    records = RequestRecords()
    first, second = One(), One()
    records.begin(first.record, [first.machine])
    records.end(first.record)
    records.begin(second.record, [second.machine])
    assert records.get(RequestId("r1")) is second.record
    assert len(records) == 1
    records.end(second.record)
    assert records.get(RequestId("r1")) is second.record


def test_a_request_that_ended_leaves_numbers_and_no_tokens() -> None:
    records, one = RequestRecords(), One()
    records.begin(one.record, [one.machine])
    one.routed(11, 2.0)
    one.does(one.machine.cancelled("enough"), 3.0)
    records.end(one.record)
    assert records._running == {}
    assert not hasattr(one.record.samples[0], "machine")
