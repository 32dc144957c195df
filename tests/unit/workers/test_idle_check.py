"""A worker with nothing to compute looks whether its books are right; one that computes never does."""

import pytest

from tests.support.engine_fakes import FakeRunner, make_engine, submit
from workers.engine.idle_check import IDLE_CHECK_S, IdleCheck
from workers.engine.messages import Output
from workers.engine.step_loop import StepLoop


class Idle:
    """A loop whose clock a test sets, and how often its engine was checked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = make_engine()
        self.now_s = 0.0
        self.num_checks = 0
        published: list[list[Output]] = []
        broken: list[str] = []
        self.loop = StepLoop(
            self.engine, FakeRunner(), published.append, broken.append, clock=lambda: self.now_s
        )
        check = self.engine.check_invariants

        def counted() -> None:
            self.num_checks += 1
            check()

        monkeypatch.setattr(self.engine, "check_invariants", counted)

    def turn(self, after_s: float = 0.0) -> bool:
        """One turn of the loop, this much later."""
        self.now_s += after_s
        return self.loop.step()


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Idle:
    return Idle(monkeypatch)


def test_an_idle_engine_is_checked_after_a_while_and_then_once_in_that_time(idle: Idle) -> None:
    idle.turn()
    idle.turn(IDLE_CHECK_S - 0.1)
    assert idle.num_checks == 0
    idle.turn(0.1)
    assert idle.num_checks == 1
    for _ in range(10):
        idle.turn(IDLE_CHECK_S / 20)
    assert idle.num_checks == 1
    idle.turn(IDLE_CHECK_S / 2)
    assert idle.num_checks == 2
    assert (idle.loop.snapshot.leaked_blocks, idle.loop.snapshot.num_invariant_failures) == (0, 0)


def test_an_engine_that_computes_is_not_checked(idle: Idle) -> None:
    idle.turn()
    idle.engine.handle(submit("r1", max_new=6, timeout_s=1000.0), idle.now_s)
    for _ in range(4):
        assert idle.turn(IDLE_CHECK_S / 2)
    assert idle.num_checks == 0
    while idle.turn():
        pass
    # It has been idle for no time yet.
    assert idle.num_checks == 0
    idle.turn(IDLE_CHECK_S)
    assert idle.num_checks == 1


def test_a_leak_is_told_once_counted_and_the_engine_goes_on(
    idle: Idle, caplog: pytest.LogCaptureFixture
) -> None:
    (leaked,) = idle.engine.pool.allocate(1)
    idle.turn()
    idle.turn(IDLE_CHECK_S)
    idle.turn(IDLE_CHECK_S)
    snapshot = idle.loop.snapshot
    assert (snapshot.leaked_blocks, snapshot.num_invariant_failures) == (1, 2)
    [record] = [one for one in caplog.records if "invariants_violated" in one.message]
    assert "1 blocks are leaked; AssertionError: in use" in record.message
    assert f"leaked: {leaked}" in record.message
    idle.engine.handle(submit("r1"), idle.now_s)
    num_steps = 0
    while idle.turn():
        num_steps += 1
    assert num_steps == 3


def test_another_problem_is_told_again(
    idle: Idle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise KeyError("r1")

    idle.turn()
    idle.engine.pool.allocate(1)
    idle.turn(IDLE_CHECK_S)
    monkeypatch.setattr(idle.engine, "check_invariants", broken)
    idle.turn(IDLE_CHECK_S)
    assert caplog.text.count("invariants_violated") == 2
    assert "KeyError: 'r1'" in caplog.text
    assert idle.loop.snapshot.num_invariant_failures == 2


def test_a_ledger_that_cannot_be_made_is_a_violation_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    check = IdleCheck(engine)

    def broken(_now_s: float) -> None:
        raise IndexError("gone")

    monkeypatch.setattr(engine, "ledger", broken)
    check.idle(0.0)
    assert check.idle(IDLE_CHECK_S)
    assert check.num_failures == 1
    assert "ledger=cannot be made" in caplog.text


def test_asking_for_the_ledger_finds_a_leak_without_waiting(idle: Idle) -> None:
    (leaked,) = idle.engine.pool.allocate(1)
    asked = idle.loop.ledger()
    given_up = idle.loop.ledger()
    given_up.cancel()
    idle.loop._drain_mailbox(0.0)
    assert asked.result(timeout=0).leaked_block_ids == (leaked,)
    # Whoever has gone costs nothing, and breaks nothing.
    assert given_up.cancelled()
    idle.turn()
    assert idle.loop.snapshot.leaked_blocks == 1
    assert idle.loop.snapshot.num_invariant_failures == 0
