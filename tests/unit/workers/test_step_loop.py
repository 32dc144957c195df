"""The main loop: what it does with its mailbox, with steps that break, and with an engine that breaks."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.engine_fakes import (
    DECODE,
    PREFILL,
    FakeRunner,
    assert_empty,
    expanded,
    key,
    make_engine,
    submit,
)
from tests.support.waiting import until_in_thread
from workers.api import Abort, FailureCode, FinishReason, RequestFailed, TokensGenerated
from workers.engine.messages import KvReady, Output, ReservationRefused, ReserveBlocks, StartTransfer
from workers.engine.step_loop import MAX_BROKEN_STEPS, StepLoop
from workers.latency_model import LatencyModel
from workers.step_shape import DeviceShape, ModelShape, decodes

#: Its roofline says a second for each step, whatever is in it.
A_SECOND_A_STEP = (
    ModelShape("slow", 1, 0, 0.0, 1, 1, 1),
    DeviceShape("slow", 1e30, 1e30, 1e30, 1.0, 1e30, 1e30),
)


class Harness:
    """A loop over an engine without a model, whose clock tests set."""

    def __init__(self, **engine: object) -> None:
        self.engine = make_engine(**engine)  # type: ignore[arg-type]
        self.runner = FakeRunner()
        self.published: list[list[Output]] = []
        self.broken: list[str] = []
        self.now_s = 0.0
        self.loop = StepLoop(
            self.engine, self.runner, self.published.append, self.broken.append, clock=lambda: self.now_s
        )

    @property
    def outputs(self) -> list[Output]:
        return [output for batch in self.published for output in batch]

    def steps(self, *messages: object) -> int:
        """Hand over these and step until there is nothing to do; the number of steps."""
        for message in messages:
            self.engine.handle(message, self.now_s)  # type: ignore[arg-type]
        num_steps = 0
        while self.loop.step():
            num_steps += 1
        return num_steps

    @contextmanager
    def running(self) -> Iterator[None]:
        """The loop in a thread of its own."""
        thread = threading.Thread(target=self.loop.run, name="step_loop")
        thread.start()
        try:
            yield
        finally:
            self.loop.stop()
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_outputs_of_a_step_are_published_together(harness: Harness) -> None:
    assert harness.steps(submit("r1", max_new=2), submit("r2", max_new=2)) == 2
    # What admission said, then one batch for each step.
    assert [len(batch) for batch in harness.published] == [2, 2, 2]
    last = harness.published[-1]
    assert [o.finish_reason for o in last if isinstance(o, TokensGenerated)] == [FinishReason.LENGTH] * 2
    assert harness.loop.num_steps == 2
    assert_empty(harness.engine)


def test_an_idle_step_publishes_nothing(harness: Harness) -> None:
    assert harness.loop.step() is False
    assert harness.published == []
    assert harness.loop.num_steps == 0


def test_a_transfer_is_known_before_its_kv_is_and_layers_come_as_they_are_computed() -> None:
    harness = Harness(phases=PREFILL)
    harness.steps(submit(phases=PREFILL))
    kinds = [type(o) for o in harness.outputs if isinstance(o, StartTransfer | KvReady)]
    assert kinds == [StartTransfer, KvReady, KvReady]
    ready = [(o.layer_lo, o.layer_hi) for o in harness.outputs if isinstance(o, KvReady)]
    assert ready == [(0, 1), (1, 2)]


def test_what_is_admitted_has_time_left() -> None:
    # The clock passes the deadline between two looks at it.
    harness = Harness(phases=PREFILL)
    harness.engine.handle(submit(phases=PREFILL, timeout_s=1.0), 0.0)
    times_s = iter([0.5])
    loop = StepLoop(
        harness.engine,
        harness.runner,
        harness.published.append,
        harness.broken.append,
        lambda: next(times_s, 2.0),
    )
    loop.step()
    [start] = [o for o in harness.outputs if isinstance(o, StartTransfer)]
    assert start.timeout_s == 0.5


def test_late_requests_fail_before_the_step(harness: Harness) -> None:
    harness.engine.handle(submit(timeout_s=1.0), 0.0)
    harness.now_s = 1.0
    assert harness.loop.step() is False
    assert [o.code for o in harness.outputs if isinstance(o, RequestFailed)] == [FailureCode.DEADLINE]


def test_a_step_that_breaks_fails_its_requests_and_the_next_ones_run(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    harness.runner.failure = RuntimeError("no memory")
    harness.steps(submit("r1"))
    [failed] = [o for o in harness.outputs if isinstance(o, RequestFailed)]
    assert (failed.code, failed.reason) == (FailureCode.INTERNAL, "the step failed: no memory")
    assert "step_failed" in caplog.text
    assert harness.broken == []
    harness.runner.failure = None
    harness.steps(submit("r2"))
    assert sum(isinstance(o, TokensGenerated) for o in expanded(harness.outputs)) == 3
    assert_empty(harness.engine)


def test_steps_that_keep_breaking_are_told_once(harness: Harness) -> None:
    harness.runner.failure = RuntimeError("no memory")
    for i in range(2 * MAX_BROKEN_STEPS):
        harness.steps(submit(f"r{i}"))
    harness.runner.failure = None
    harness.steps(submit("good"))
    harness.runner.failure = RuntimeError("again")
    for i in range(MAX_BROKEN_STEPS):
        harness.steps(submit(f"s{i}"))
    assert harness.broken == ["3 steps in a row failed, the last with: no memory"]


def test_steps_teach_the_latency_model_what_they_took() -> None:
    harness = Harness()
    latency = LatencyModel(*A_SECOND_A_STEP)
    times_s = itertools.count(step=0.25)
    loop = StepLoop(
        harness.engine,
        harness.runner,
        harness.published.append,
        harness.broken.append,
        clock=lambda: next(times_s),
        latency=latency,
    )
    harness.engine.handle(submit(max_new=40), 0.0)
    assert loop.snapshot.step_costs == latency.costs()
    while loop.step():
        pass
    # The clock is read at a step's beginning, when its tokens are known, and when they are published.
    assert latency.num_observed == 40
    assert latency.step_s(decodes(1, 10)) == pytest.approx(0.5, rel=0.01)
    assert loop.snapshot.step_costs == latency.costs()


def test_a_step_that_breaks_teaches_nothing(harness: Harness) -> None:
    latency = LatencyModel(*A_SECOND_A_STEP)
    harness.loop = StepLoop(
        harness.engine, harness.runner, harness.published.append, harness.broken.append, latency=latency
    )
    harness.runner.failure = RuntimeError("no memory")
    harness.steps(submit())
    assert latency.num_observed == 0


def test_a_good_step_between_broken_ones_starts_the_count_anew(harness: Harness) -> None:
    for i in range(MAX_BROKEN_STEPS):
        harness.runner.failure = RuntimeError("now and then")
        harness.steps(submit(f"r{i}"))
        harness.runner.failure = None
        harness.steps(submit(f"good{i}"))
    assert harness.broken == []


def test_messages_from_any_thread_are_served_until_it_is_stopped(harness: Harness) -> None:
    with harness.running():
        for i in range(6):
            harness.loop.post(submit(f"r{i}", max_new=2))
        until_in_thread(lambda: _num_finished(harness.outputs) == 6, "six requests end")
        harness.loop.post(submit("late"))
        harness.loop.post(Abort(key("late")))
        harness.loop.call(harness.engine.check_invariants).result(timeout=30)
        until_in_thread(lambda: harness.loop.snapshot.num_running == 0, "the aborted request is gone")
    assert_empty(harness.engine)


def test_an_idle_loop_wakes_for_a_deadline() -> None:
    harness = Harness(phases=DECODE)
    with harness.running():
        harness.loop.post(submit(phases=DECODE, timeout_s=5.0))
        until_in_thread(lambda: harness.loop.snapshot.num_waiting == 1, "the request waits for its KV")
        harness.now_s = 5.0
        until_in_thread(lambda: len(harness.outputs) == 2, "the request and its transfer are ended")
    assert_empty(harness.engine)


def test_an_engine_that_breaks_ends_the_loop_and_says_so(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*_: object) -> None:
        raise AssertionError("a bug")

    for name in ("handle", "schedule"):
        broken = Harness()
        setattr(broken.engine, name, break_down)
        # It returns by itself, whatever part of the engine it was.
        broken.loop.post(submit())
        broken.loop.run()
        assert broken.broken == ["the engine failed; see the worker's log"]
    assert caplog.text.count("engine_broken") == 2


def test_a_call_that_raises_harms_only_its_caller(harness: Harness) -> None:
    def fail() -> None:
        raise ValueError("mine")

    with harness.running():
        with pytest.raises(ValueError, match="mine"):
            harness.loop.call(fail).result(timeout=30)
        harness.loop.post(ReserveBlocks("t1", 1, 1000, 50.0))
        until_in_thread(lambda: bool(harness.outputs), "the reservation is answered")
    assert isinstance(harness.outputs[0], ReservationRefused)


def _num_finished(outputs: list[Output]) -> int:
    return sum(isinstance(o, TokensGenerated) and o.finish_reason is not None for o in outputs)


def test_a_prefix_of_other_tokens_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness()
    monkeypatch.setattr(type(harness.engine), "num_wrong_prefixes", 1)
    harness.steps(submit())
    assert [record.message for record in caplog.records if "prefix" in record.message] == [
        "prefix_of_other_tokens num_so_far=1"
    ]
