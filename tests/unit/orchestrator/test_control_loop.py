"""The controller's loop: it sees, acts, and lives through what goes wrong."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.control.view import LifecycleState
from orchestrator.errors import ControllerSuperseded
from orchestrator.runtime.control_loop import MAX_BACKOFF_S, ControlLoop
from tests.support.fake_cluster import (
    FakeClock,
    FakeCluster,
    FakeGateway,
    FakeMachines,
    FakeProbe,
    controller_config,
)
from workers.api import WorkerId

TICK_S = 0.5
W0 = WorkerId("w-0")


@dataclass
class Stage:
    """A loop and all that it works with. `restart` puts another controller in its place."""

    machines: FakeMachines = field(default_factory=FakeMachines)
    gateway: FakeGateway = field(default_factory=FakeGateway)
    tick_s: float = TICK_S

    def __post_init__(self) -> None:
        self.restart()

    def restart(self, max_sleeps: int = 10) -> None:
        self.stop = asyncio.Event()
        self.clock = FakeClock(max_sleeps, self.stop)
        self.cluster = FakeCluster(self.machines)
        self.probe = FakeProbe(self.machines)
        self.loop = ControlLoop(
            self.cluster,
            self.probe,
            self.gateway,
            controller_config("w-0", "w-1"),
            tick_s=self.tick_s,
            clock=self.clock.time,
            sleep=self.clock.sleep,
            stop=self.stop,
        )

    async def ticks(self, num_ticks: int) -> None:
        for _ in range(num_ticks):
            await self.loop.tick()
            self.clock.now_s += self.tick_s
        assert self.loop.state is not None
        self.loop.state.check_invariants()

    def states(self) -> dict[str, LifecycleState]:
        assert self.gateway.view is not None
        return {worker.worker_id: worker.state for worker in self.gateway.view.workers}

    def all_ready(self) -> bool:
        return set(self.states().values()) == {LifecycleState.READY}


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def messages(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(event)]


def test_run_brings_all_workers_up_and_tells_the_gateway() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.loop.run()
        assert stage.all_ready()
        assert stage.clock.sleeps == [TICK_S] * 10
        assert stage.machines.num_starts == 2
        assert stage.gateway.view is not None
        assert stage.gateway.view.version == 10

    run(scenario)


def test_run_ends_in_the_middle_of_a_sleep_when_told_to_stop() -> None:
    async def scenario() -> None:
        stage = Stage()
        asleep = asyncio.Event()

        async def sleep(_delay_s: float) -> None:
            asleep.set()
            await asyncio.Event().wait()

        loop = ControlLoop(
            stage.cluster,
            stage.probe,
            stage.gateway,
            controller_config("w-0"),
            tick_s=TICK_S,
            clock=stage.clock.time,
            sleep=sleep,
            stop=stage.stop,
        )
        running = asyncio.create_task(loop.run())
        await asleep.wait()
        stage.stop.set()
        await running
        assert stage.machines.newest("w-0").is_alive

    run(scenario)


def test_run_can_be_cancelled() -> None:
    async def scenario() -> None:
        stage = Stage(tick_s=10.0)
        await stage.ticks(2)
        stage.probe.hanging = {"w-0.1:1"}
        running = asyncio.create_task(stage.loop.run())
        await stage.probe.is_hanging.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    run(scenario)


def test_a_crash_is_repaired_and_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        assert stage.all_ready()
        stage.machines.crash((W0, 1), "killed by signal 9")
        caplog.clear()
        await stage.ticks(4)
        assert stage.all_ready()

    run(scenario)
    assert messages(caplog, "worker_start_asked") == [
        "worker_start_asked worker_id=w-0 incarnation=2 reason='starts again: exited: killed by signal 9'"
    ]
    assert [line.split(" reason")[0] for line in messages(caplog, "worker_state_changed")] == [
        "worker_state_changed worker_id=w-0 incarnation=2 from=ready to=starting",
        "worker_state_changed worker_id=w-0 incarnation=2 from=starting to=ready",
    ]


def test_ticks_that_change_nothing_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        caplog.clear()
        await stage.ticks(20)

    run(scenario)
    assert messages(caplog, "") == []


def test_a_silent_worker_is_stopped_through_the_cluster_and_replaced() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        stage.machines.newest("w-0").is_mute = True
        await stage.ticks(15)
        assert stage.all_ready()
        assert stage.cluster.stopped == [(W0, 1, "incarnation 2 takes its place: silent for 5.5 s")]
        assert stage.probe.addresses == {"w-0.2:1", "w-1.1:1"}

    run(scenario)


def test_an_unreachable_gateway_does_not_stop_reconciling(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        stage.gateway.is_reachable = False
        stage.machines.crash((W0, 1))
        await stage.ticks(6)
        assert stage.machines.newest("w-0").incarnation == 2
        assert stage.loop.failures.counts == {"publish": 6}
        assert stage.states()["w-0"] is LifecycleState.READY  # as the gateway last heard
        stage.gateway.is_reachable = True
        await stage.ticks(1)
        assert stage.gateway.view is not None
        assert stage.gateway.view.version == 11
        assert stage.loop.failures.last == {}

    run(scenario)
    assert len(messages(caplog, "control_failed")) == 1


def test_a_gateway_that_hangs_does_not_stop_reconciling(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)

        async def hang(_view: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(stage.gateway, "publish", hang)
        stage.machines.crash((W0, 1))
        await stage.ticks(1)
        assert stage.machines.newest("w-0").incarnation == 2
        assert stage.loop.failures.counts == {"publish": 1}

    run(scenario)


def test_a_probe_that_breaks_is_silence_and_does_not_stop_reconciling() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        stage.probe.broken = RuntimeError("no more files")
        stage.machines.crash((W0, 1))
        await stage.ticks(3)
        assert stage.machines.newest("w-0").incarnation == 2
        assert stage.loop.failures.last == {"probe": "RuntimeError: no more files"}
        stage.probe.broken = None
        await stage.ticks(3)
        assert stage.all_ready()
        assert stage.loop.failures.last == {}
        assert stage.machines.num_starts == 3

    run(scenario)


def test_a_probe_that_hangs_costs_one_tick_and_only_its_own_worker() -> None:
    async def scenario() -> None:
        stage = Stage(tick_s=0.02)
        await stage.ticks(4)
        stage.probe.hanging = {"w-0.1:1"}
        await stage.ticks(1)
        assert stage.gateway.view is not None
        by_id = {worker.worker_id: worker for worker in stage.gateway.view.workers}
        assert by_id[W0].reason.startswith("silent for ")
        assert by_id[WorkerId("w-1")].reason == "serves"

    run(scenario)


def test_a_start_that_is_refused_is_tried_again_later() -> None:
    async def scenario() -> None:
        stage = Stage()
        stage.cluster.broken_start = RuntimeError("no node has 64 CPUs")
        await stage.ticks(2)
        assert stage.gateway.view is not None
        worker = stage.gateway.view.workers[0]
        assert worker.state is LifecycleState.LOST
        assert worker.reason == "exited: could not be started: RuntimeError: no node has 64 CPUs"
        assert stage.loop.failures.counts == {"start": 2}
        stage.cluster.broken_start = None
        await stage.ticks(6)
        assert stage.all_ready()

    run(scenario)


def test_a_broken_cluster_is_logged_once_and_never_spun_on(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        stage = Stage()
        stage.cluster.broken = RuntimeError("the head is gone")
        await stage.loop.run()
        assert stage.loop.failures.counts == {"tick": 10}
        assert stage.clock.sleeps == [1.0, 2.0, 4.0, 8.0, *[MAX_BACKOFF_S] * 6]

    run(scenario)
    (record,) = [r for r in caplog.records if r.getMessage().startswith("control_failed")]
    assert "the head is gone" in record.getMessage()
    assert record.exc_info is not None


def test_another_error_is_logged_again_and_so_is_the_end_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        stage = Stage()
        problems = ["first", "first", "second"]

        async def sleep(_delay_s: float) -> None:
            stage.cluster.broken = RuntimeError(problems.pop(0)) if problems else None
            await stage.clock.sleep(0.1)

        loop = ControlLoop(
            stage.cluster,
            stage.probe,
            stage.gateway,
            controller_config("w-0"),
            tick_s=TICK_S,
            clock=stage.clock.time,
            sleep=sleep,
            stop=stage.stop,
        )
        await loop.run()
        assert loop.failures.counts == {"tick": 3}

    run(scenario)
    assert [line.split("error=")[1] for line in messages(caplog, "control_failed")] == [
        "'RuntimeError: first'",
        "'RuntimeError: second'",
    ]
    assert len(messages(caplog, "control_works_again")) == 1


def test_a_new_controller_takes_over_without_touching_what_works() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        stage.restart()
        await stage.ticks(1)
        assert stage.all_ready()
        assert stage.gateway.view is not None
        assert (stage.gateway.view.controller_epoch, stage.gateway.view.version) == (2, 1)
        assert stage.machines.num_starts == 2
        assert stage.cluster.stopped == []

    run(scenario)


def test_a_controller_whose_place_was_taken_ends_without_touching_anything() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        old = stage.loop
        stage.restart()
        await stage.ticks(1)
        view = stage.gateway.view
        # The old one would start another process in the place of this one.
        stage.machines.crash((W0, 1))
        with pytest.raises(ControllerSuperseded):
            await old.run()
        assert stage.gateway.view is view
        assert (stage.machines.num_starts, stage.cluster.stopped) == (2, [])
        await stage.ticks(4)
        assert stage.all_ready()

    run(scenario)


def test_a_new_controller_touches_nothing_until_the_gateway_has_answered() -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        stage.machines.crash((W0, 1))
        del stage.machines.processes[W0, 1]
        stage.restart(max_sleeps=3)
        stage.gateway.is_reachable = False
        await stage.loop.run()
        assert (stage.loop.state, stage.machines.num_starts) == (None, 2)
        stage.gateway.is_reachable = True
        await stage.ticks(4)
        assert stage.all_ready()
        assert stage.machines.newest("w-0").incarnation == 2

    run(scenario)


def test_the_gateway_hears_of_a_start_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stage = Stage()
        seen: list[int] = []
        start = stage.cluster.start

        async def start_and_look(*args: Any) -> None:
            assert stage.gateway.view is not None
            seen.extend(worker.incarnation for worker in stage.gateway.view.workers)
            await start(*args)

        monkeypatch.setattr(stage.cluster, "start", start_and_look)
        await stage.ticks(1)
        assert seen == [1, 1, 1, 1]

    run(scenario)


def test_an_answer_of_another_process_at_an_old_address_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stage = Stage()
        await stage.ticks(4)
        # The port of w-0 belongs to a process that is not listed any more.
        newest = stage.machines.newest("w-0")
        stale = newest.status()
        newest.is_mute = True

        async def answer(_address: str) -> Any:
            return type(stale)(WorkerId("w-9"), 1, stale.phases, stale.state)

        monkeypatch.setattr(stage.probe, "probe", answer)
        await stage.ticks(1)
        assert stage.gateway.view is not None
        assert {worker.reason for worker in stage.gateway.view.workers} == {"silent for 0.5 s"}

    run(scenario)
