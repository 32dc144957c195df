"""The sender's chunks: each is waiting, on its way, to be repeated or there."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtransfer.chunk_queue import ChunkQueue
from kvtransfer.codecs.codec import CodecId
from kvtransfer.kv_range import KvRange

NONE = CodecId.NONE


def ranges(count: int) -> list[KvRange]:
    return [KvRange(i, i + 1, 0, 4) for i in range(count)]


def queue_of(num_chunks: int, num_taken: int = 0) -> ChunkQueue:
    queue = ChunkQueue()
    queue.extend(ranges(num_chunks))
    for _ in range(num_taken):
        number = queue.take(0.0)
        assert number is not None
        assert queue.was_read(number, NONE, 100 + number)
    return queue


def test_chunks_leave_in_the_order_in_which_they_became_ready() -> None:
    queue = queue_of(2)
    queue.extend([KvRange(7, 8, 0, 1)])
    assert [queue.take(0.0) for _ in range(4)] == [0, 1, 2, None]
    assert len(queue) == queue.num_sent == queue.num_in_flight == 3
    assert queue[2] == KvRange(7, 8, 0, 1)


def test_all_is_sent_when_everything_was_read_and_nothing_waits_to_go_again() -> None:
    queue = queue_of(2, num_taken=1)
    assert not queue.is_all_sent
    queue.take(0.0)
    assert not queue.is_all_sent
    queue.was_read(1, NONE, 101)
    assert queue.is_all_sent
    queue.reject(0)
    assert not queue.is_all_sent
    queue.take(0.0)
    assert queue.is_all_sent


def test_an_acknowledgement_counts_once() -> None:
    queue = queue_of(2, num_taken=2)
    queue.acknowledge(0, 1.0)
    queue.acknowledge(0, 5.0)
    assert queue.num_in_flight == 1
    assert queue.busy_s == 1.0


def test_busy_time_has_no_gaps_between_chunks_and_counts_none_twice() -> None:
    queue = queue_of(3)
    queue.take(0.0)
    queue.take(1.0)
    queue.acknowledge(0, 2.0)
    queue.acknowledge(1, 3.0)
    queue.take(10.0)
    queue.acknowledge(2, 11.0)
    assert queue.busy_s == 4.0


def test_what_has_to_go_again_goes_first_and_is_counted() -> None:
    queue = queue_of(3, num_taken=2)
    assert queue.reject(1) == 1
    assert queue.num_in_flight == 1
    assert [queue.take(0.0), queue.take(0.0)] == [1, 2]
    assert queue.num_resent == 1
    assert queue.reject(1) == 2


def test_a_rejection_of_what_waits_to_go_again_changes_nothing() -> None:
    queue = queue_of(2, num_taken=2)
    assert [queue.reject(0), queue.reject(0)] == [1, 1]
    assert [queue.take(0.0), queue.take(0.0)] == [0, None]


def test_once_all_has_arrived_nothing_goes_again() -> None:
    queue = queue_of(1, num_taken=1)
    queue.reject(0)
    queue.forget_repeats()
    assert queue.take(0.0) is None


def test_what_was_read_twice_must_be_the_same() -> None:
    queue = queue_of(1, num_taken=1)
    assert queue.was_read(0, NONE, 100)
    assert not queue.was_read(0, NONE, 101)
    assert not queue.was_read(0, CodecId.FP8, 100)
    assert list(queue.all_read()) == [(KvRange(0, 1, 0, 4), NONE, 100)]


def test_after_a_restart_what_is_not_there_goes_again_in_order() -> None:
    queue = queue_of(5, num_taken=4)
    queue.acknowledge(0, 1.0)
    queue.restart({0, 2})
    assert queue.num_in_flight == 0
    assert [queue.take(2.0) for _ in range(4)] == [1, 3, 4, None]


def test_a_late_rejection_of_what_goes_again_anyway_is_not_one() -> None:
    queue = queue_of(2, num_taken=2)
    queue.restart(set())
    assert queue.reject(0) == 0


class AnyOrder(RuleBasedStateMachine):
    """Each number is in exactly one of four places."""

    @initialize()
    def start(self) -> None:
        self.queue = ChunkQueue()
        self.waiting: list[int] = []
        self.in_flight: set[int] = set()
        self.to_repeat: list[int] = []
        self.num_sent = 0

    @rule(count=st.integers(1, 3))
    def extend(self, count: int) -> None:
        self.waiting += range(len(self.queue), len(self.queue) + count)
        self.queue.extend(ranges(count))

    @rule()
    def take(self) -> None:
        expected = None
        if self.to_repeat:
            expected = self.to_repeat.pop(0)
        elif self.waiting:
            expected = self.waiting.pop(0)
            self.num_sent += 1
        assert self.queue.take(0.0) == expected
        if expected is not None:
            self.in_flight.add(expected)

    @rule(number=st.integers(0, 20))
    def acknowledge(self, number: int) -> None:
        if number < self.num_sent:
            self.queue.acknowledge(number, 1.0)
            self.in_flight.discard(number)

    @rule(number=st.integers(0, 20))
    def reject(self, number: int) -> None:
        if number < self.num_sent:
            self.queue.reject(number)
            self.in_flight.discard(number)
            if number not in self.to_repeat:
                self.to_repeat.append(number)

    @rule(has=st.sets(st.integers(0, 20)))
    def restart(self, has: set[int]) -> None:
        self.queue.restart({number for number in has if number < self.num_sent})
        self.in_flight.clear()
        self.to_repeat = [number for number in range(self.num_sent) if number not in has]

    @invariant()
    def counts_agree(self) -> None:
        self.queue.check_invariants()
        assert self.queue.num_in_flight == len(self.in_flight)
        assert self.queue.num_sent == self.num_sent


TestAnyOrder = AnyOrder.TestCase
