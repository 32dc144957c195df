"""EncodeShards: a lost shard is encoded elsewhere, and only it; whatever happens, each tile is in one place."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.control.encode_shards import MAX_TRIES, EncodeShards, ShardFailed
from orchestrator.control.encode_split import Shard
from orchestrator.control.prompt_images import ImageFile, PlacedTile, PromptImages
from orchestrator.control.view import LifecycleState, WorkerView
from workers.api import (
    Abort,
    Encode,
    FailureCode,
    ImagesEncoded,
    ImageTile,
    Phase,
    RequestId,
    RequestKey,
    WorkerId,
)

REQUEST = RequestId("r")
PREFILL = WorkerView(WorkerId("p-0"), 4, frozenset({Phase.PREFILL}), LifecycleState.READY, "127.0.0.1:9")


def _encoder(name: str) -> WorkerView:
    return WorkerView(WorkerId(name), 1, frozenset({Phase.ENCODE}), LifecycleState.READY, "127.0.0.1:8")


E0, E1 = _encoder("e-0"), _encoder("e-1")


def _images(*files: int) -> PromptImages:
    tiles = [
        PlacedTile(file, number, 16, ImageTile(0, 4, f"{file}/{number}".encode()))
        for file, num in enumerate(files)
        for number in range(num)
    ]
    pictures = [ImageFile(f"file {i}".encode(), "image/png", 10 + i, 20 + i) for i in range(len(files))]
    return PromptImages(tuple(pictures), tuple(tiles))


def _give(encodes: EncodeShards, *shards: tuple[int, Shard]) -> list[Encode]:
    key = RequestKey(REQUEST, 77)
    sends = encodes.given(shards, PREFILL, key, salt="s", timeout_s=9.0, now_s=1.0)
    commands = [send.command for send in sends]
    assert all(isinstance(command, Encode) for command in commands)
    return [command for command in commands if isinstance(command, Encode)]


def _done(attempt: int) -> ImagesEncoded:
    return ImagesEncoded(RequestKey(REQUEST, attempt), 1, 0, 4, 64, 0.0, 0.0, 0.1, 0.0)


def test_each_shard_has_its_own_picture_and_tiles() -> None:
    encodes = EncodeShards(REQUEST, _images(1, 3))
    encodes.want((0, 1, 2, 3))
    first, second = _give(encodes, (5, Shard(E0, 0, 1)), (6, Shard(E1, 2, 2)))
    assert (first.image, first.width, first.tile_lo, first.tile_hi, first.first_tile) == (
        b"file 0",
        10,
        0,
        1,
        0,
    )
    assert (second.image, second.width, second.tile_lo, second.tile_hi) == (b"file 1", 11, 1, 3)
    assert second.keys == (b"1/1", b"1/2")
    assert (second.first_tile, second.prefill.attempt, second.prefill_worker) == (2, 77, PREFILL.worker_id)
    assert encodes.wanted == {1}


def test_only_the_lost_shard_is_wanted_again() -> None:
    encodes = EncodeShards(REQUEST, _images(1, 1, 1))
    encodes.want((0, 1, 2))
    _give(encodes, (5, Shard(E0, 0, 2)), (6, Shard(E1, 2, 1)))
    assert encodes.lost(E0, "killed", 2.0) is None
    assert encodes.wanted == {0, 1}
    assert encodes.avoided == {E0.worker_id}
    assert encodes.done(E1.worker_id, _done(6), 3.0) == Shard(E1, 2, 1)
    assert not encodes.running


def test_an_event_of_a_shard_that_was_given_up_changes_nothing() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    encodes.want((0,))
    _give(encodes, (5, Shard(E0, 0, 1)))
    encodes.lost(E0, "killed", 2.0)
    assert encodes.done(E0.worker_id, _done(5), 3.0) is None
    assert encodes.failed(E0.worker_id, 5, FailureCode.INVALID, "late", 3.0) is None
    _give(encodes, (6, Shard(E1, 0, 1)))
    # Nor one of another worker.
    assert encodes.done(E0.worker_id, _done(6), 3.0) is None


def test_a_tile_that_is_wanted_again_before_its_encoder_has_reported_is_encoded_again() -> None:
    encodes = EncodeShards(REQUEST, _images(1, 1))
    encodes.want((0, 1))
    _give(encodes, (5, Shard(E0, 0, 1)), (6, Shard(E1, 1, 1)))
    encodes.want((1,))
    assert not encodes.wanted
    encodes.done(E0.worker_id, _done(5), 2.0)
    assert not encodes.wanted
    encodes.done(E1.worker_id, _done(6), 3.0)
    assert encodes.wanted == {1}
    _give(encodes, (7, Shard(E1, 1, 1)))
    encodes.done(E1.worker_id, _done(7), 4.0)
    assert not encodes.wanted
    encodes.check_invariants()


def test_a_tile_that_was_encoded_may_be_wanted_any_number_of_times() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    for attempt in range(1, 3 * MAX_TRIES):
        encodes.want((0,))
        _give(encodes, (attempt, Shard(E0, 0, 1)))
        encodes.done(E0.worker_id, _done(attempt), 2.0)
        encodes.check_invariants()
    encodes.want((0,))
    _give(encodes, (99, Shard(E0, 0, 1)))
    assert encodes.failed(E0.worker_id, 99, FailureCode.OVERLOADED, "full", 2.0) is None


def test_a_bad_picture_is_the_end_of_it() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    encodes.want((0,))
    _give(encodes, (5, Shard(E0, 0, 1)))
    failure = encodes.failed(E0.worker_id, 5, FailureCode.INVALID, "it is truncated", 2.0)
    assert failure == ShardFailed(FailureCode.INVALID, "e-0 could not encode image 1: it is truncated")


def test_an_error_says_which_picture_it_is() -> None:
    encodes = EncodeShards(REQUEST, _images(2, 3, 1))
    encodes.want(range(6))
    _give(encodes, (5, Shard(E0, 3, 2)))
    failure = encodes.failed(E0.worker_id, 5, FailureCode.INVALID, "image: this PNG ends too early", 2.0)
    assert failure is not None
    assert failure.reason == "e-0 could not encode image 2: this PNG ends too early"


def test_once_the_prompt_is_computed_what_becomes_of_its_shards_is_nothing_to_it() -> None:
    encodes = EncodeShards(REQUEST, _images(1, 1, 1))
    encodes.want((0, 1, 2))
    _give(encodes, (5, Shard(E0, 0, 1)), (6, Shard(E1, 1, 1)))
    encodes.prompt_computed()
    assert not encodes.wanted
    # Preempted, and computed again: the first picture is wanted once more.
    encodes.want((0,))
    assert encodes.failed(E1.worker_id, 6, FailureCode.INVALID, "broken", 2.0) is None
    assert encodes.lost(E0, "it died", 2.0) is None
    assert encodes.wanted == {0}
    encodes.check_invariants()
    _give(encodes, (7, Shard(E1, 0, 1)))
    assert encodes.failed(E1.worker_id, 7, FailureCode.INVALID, "broken", 3.0) is not None


def test_a_tile_is_tried_so_often_and_no_more() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    encodes.want((0,))
    for attempt in range(1, MAX_TRIES + 1):
        _give(encodes, (attempt, Shard(E0, 0, 1)))
        failure = encodes.failed(E0.worker_id, attempt, FailureCode.INTERNAL, "broken", 2.0)
        assert (failure is None) == (attempt < MAX_TRIES)


def test_a_worker_without_room_costs_no_try_and_its_last_refusal_is_remembered() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    encodes.want((0,))
    for attempt in range(1, 10 * MAX_TRIES, 2):
        for number, one in ((attempt, E0), (attempt + 1, E1)):
            _give(encodes, (number, Shard(one, 0, 1)))
            assert encodes.failed(one.worker_id, number, FailureCode.OVERLOADED, "full", 2.0) is None
            encodes.check_invariants()
    assert encodes.wanted == {0}
    assert not encodes.avoided
    assert [record.worker_id for record in encodes.records] == [E0.worker_id, E1.worker_id]
    _give(encodes, (99, Shard(E0, 0, 1)))
    encodes.done(E0.worker_id, _done(99), 3.0)


def test_two_encoders_that_cannot_reach_the_prefill_worker_are_not_at_fault() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    encodes.want((0,))
    _give(encodes, (5, Shard(E0, 0, 1)))
    assert encodes.failed(E0.worker_id, 5, FailureCode.TRANSFER, "no answer", 2.0) is None
    _give(encodes, (6, Shard(E1, 0, 1)))
    failure = encodes.failed(E1.worker_id, 6, FailureCode.TRANSFER, "no answer", 2.0)
    assert failure == ShardFailed(FailureCode.TRANSFER, "e-1 could not encode image 1: no answer", True)
    assert not encodes.avoided


def test_an_encoder_that_alone_cannot_reach_the_prefill_worker_has_its_tries() -> None:
    encodes = EncodeShards(REQUEST, _images(1))
    encodes.want((0,))
    failures = []
    for attempt in range(MAX_TRIES):
        _give(encodes, (attempt, Shard(E0, 0, 1)))
        failures.append(encodes.failed(E0.worker_id, attempt, FailureCode.TRANSFER, "no answer", 2.0))
    assert failures[:-1] == [None] * (MAX_TRIES - 1)
    assert failures[-1] is not None
    assert failures[-1].is_prefill_at_fault


def test_an_encoder_that_cannot_reach_the_prefill_worker_is_at_fault_when_another_can() -> None:
    encodes = EncodeShards(REQUEST, _images(1, 1))
    encodes.want((0, 1))
    _give(encodes, (5, Shard(E0, 0, 1)), (6, Shard(E1, 1, 1)))
    encodes.failed(E0.worker_id, 5, FailureCode.TRANSFER, "no answer", 2.0)
    encodes.done(E1.worker_id, _done(6), 2.0)
    _give(encodes, (7, Shard(E1, 0, 1)))
    assert encodes.failed(E1.worker_id, 7, FailureCode.TRANSFER, "no answer", 2.0) is None


def test_dropped_it_ends_what_is_with_workers() -> None:
    encodes = EncodeShards(REQUEST, _images(1, 1))
    encodes.want((0, 1))
    _give(encodes, (5, Shard(E0, 0, 1)))
    assert [send.command for send in encodes.drop()] == [Abort(RequestKey(REQUEST, 5))]
    assert not encodes.wanted
    assert not encodes.running


class _AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.encodes = EncodeShards(REQUEST, _images(2, 3, 1))
        self.attempt = 0
        self.has_failed = False

    @rule(tiles=st.sets(st.integers(-1, 8)))
    def want(self, tiles: set[int]) -> None:
        self.encodes.want(sorted(tiles))

    @precondition(lambda self: self.encodes.wanted and not self.has_failed)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        tile = data.draw(st.sampled_from(sorted(self.encodes.wanted)))
        self.attempt += 1
        _give(self.encodes, (self.attempt, Shard(data.draw(st.sampled_from([E0, E1])), tile, 1)))

    @precondition(lambda self: self.attempt > 0)
    @rule(data=st.data(), code=st.sampled_from([None, *FailureCode]))
    def end(self, data: st.DataObject, code: FailureCode | None) -> None:
        attempt = data.draw(st.integers(1, self.attempt))
        worker = data.draw(st.sampled_from([E0, E1]))
        if code is None:
            self.encodes.done(worker.worker_id, _done(attempt), 1.0)
        elif self.encodes.failed(worker.worker_id, attempt, code, "no", 1.0) is not None:
            self.has_failed = True

    @rule(worker=st.sampled_from([E0, E1]))
    def lose(self, worker: WorkerView) -> None:
        if self.encodes.lost(worker, "gone", 1.0) is not None:
            self.has_failed = True

    @rule()
    def drop(self) -> None:
        self.encodes.drop()
        self.has_failed = False

    @invariant()
    def holds(self) -> None:
        if not self.has_failed:
            self.encodes.check_invariants()


_AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnyOrder = _AnyOrder.TestCase
