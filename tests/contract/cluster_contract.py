"""What every `Cluster` promises the controller.

A test file subclasses `ClusterContract` as `Test...` and gives a `harness` fixture.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from orchestrator.control.declared import DeclaredWorker
from orchestrator.control.observation import ProcessReport
from orchestrator.runtime.control_loop import Cluster
from workers.api import WorkerId

POLL_S = 0.02


class ClusterHarness(Protocol):
    """One place where processes run. It may outlive a test: no two tests use the same worker id."""

    #: Longest that a process may take to bind its address, or to be seen dead, in seconds.
    deadline_s: float

    def connect(self) -> Cluster:
        """A new object over the same processes, as after a restart of the controller."""
        ...

    def declare(self, worker_id: str) -> DeclaredWorker:
        """A worker that can run there."""
        ...

    async def kill(self, worker_id: WorkerId, incarnation: int) -> None:
        """Let its process die as by itself, not through the cluster."""
        ...


class ClusterContract:
    """The suite."""

    def test_a_started_process_is_listed_and_gets_an_address(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-start-0")
            await cluster.start(worker, 1)
            report = await _bound(harness, cluster, worker, 1)
            assert report.exit_reason is None
            await cluster.stop(worker.worker_id, 1, "the test is over")

        _run(harness, scenario)

    def test_two_workers_have_different_addresses(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster = harness.connect()
            workers = [harness.declare(f"contract-two-{i}") for i in range(2)]
            for worker in workers:
                await cluster.start(worker, 1)
            bound = [await _bound(harness, cluster, worker, 1) for worker in workers]
            assert bound[0].address != bound[1].address
            for worker in workers:
                await cluster.stop(worker.worker_id, 1, "the test is over")

        _run(harness, scenario)

    def test_starting_the_same_incarnation_twice_starts_one_process(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-twice-0")
            await cluster.start(worker, 1)
            await cluster.start(worker, 1)
            address = (await _bound(harness, cluster, worker, 1)).address
            await harness.connect().start(worker, 1)
            assert [report.address for report in await _reports(cluster, worker)] == [address]
            await cluster.stop(worker.worker_id, 1, "the test is over")

        _run(harness, scenario)

    def test_a_stopped_process_is_not_alive_any_more(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-stop-0")
            await cluster.start(worker, 1)
            await _bound(harness, cluster, worker, 1)
            await cluster.stop(worker.worker_id, 1, "the test wants it gone")
            await _until(harness, "it is gone", lambda: _is_gone(cluster, worker, 1))

        _run(harness, scenario)

    def test_a_process_can_be_stopped_before_it_has_an_address(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-early-0")
            await cluster.start(worker, 1)
            await cluster.stop(worker.worker_id, 1, "the test changed its mind")
            await _until(harness, "it is gone", lambda: _is_gone(cluster, worker, 1))

        _run(harness, scenario)

    def test_stopping_what_is_not_there_is_no_error(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-unknown-0")
            await cluster.stop(worker.worker_id, 5, "nobody knows it")
            assert await _reports(cluster, worker) == []
            await cluster.start(worker, 1)
            await cluster.stop(worker.worker_id, 1, "first")
            await cluster.stop(worker.worker_id, 1, "second")
            await _until(harness, "it is gone", lambda: _is_gone(cluster, worker, 1))

        _run(harness, scenario)

    def test_resources_may_be_asked_for_where_nobody_adds_nodes(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-resources-0")
            # More than there will ever be, then what there is.
            for num in (1000, 1):
                await cluster.request_resources([worker.resources] * num)
            assert await _reports(cluster, worker) == []

        _run(harness, scenario)

    def test_a_process_that_dies_by_itself_is_reported_with_the_reason(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-death-0")
            await cluster.start(worker, 1)
            await _bound(harness, cluster, worker, 1)
            await harness.kill(worker.worker_id, 1)

            async def is_reported() -> bool:
                return any(report.exit_reason for report in await _reports(cluster, worker))

            await _until(harness, "its death is reported", is_reported)

        _run(harness, scenario)

    def test_the_next_incarnation_runs_after_a_death(self, harness: ClusterHarness) -> None:
        async def scenario() -> None:
            cluster, worker = harness.connect(), harness.declare("contract-next-0")
            await cluster.start(worker, 1)
            await _bound(harness, cluster, worker, 1)
            await harness.kill(worker.worker_id, 1)
            await _until(harness, "it is gone", lambda: _is_gone(cluster, worker, 1))
            await cluster.start(worker, 2)
            await _bound(harness, cluster, worker, 2)
            assert await _is_gone(cluster, worker, 1)
            await cluster.stop(worker.worker_id, 2, "the test is over")

        _run(harness, scenario)

    def test_processes_survive_the_controller_and_are_listed_by_the_next(
        self, harness: ClusterHarness
    ) -> None:
        async def scenario() -> None:
            worker = harness.declare("contract-survive-0")
            first = harness.connect()
            await first.start(worker, 3)
            address = (await _bound(harness, first, worker, 3)).address
            second = harness.connect()
            assert (await _bound(harness, second, worker, 3)).address == address
            await second.stop(worker.worker_id, 3, "the test is over")
            await _until(harness, "it is gone", lambda: _is_gone(second, worker, 3))

        _run(harness, scenario)


def _run(harness: ClusterHarness, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(4 * harness.deadline_s):
            await scenario()

    asyncio.run(bounded())


async def _until(
    harness: ClusterHarness, what: str, condition: Callable[[], Coroutine[Any, Any, bool]]
) -> None:
    """Look until it holds; fail when the deadline of the harness has passed."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + harness.deadline_s
    while not await condition():
        assert loop.time() < deadline_s, f"not within {harness.deadline_s} s: {what}"
        await asyncio.sleep(POLL_S)


async def _reports(cluster: Cluster, worker: DeclaredWorker) -> list[ProcessReport]:
    return [report for report in await cluster.list_processes() if report.worker_id == worker.worker_id]


async def _is_gone(cluster: Cluster, worker: DeclaredWorker, incarnation: int) -> bool:
    return not any(
        report.is_alive for report in await _reports(cluster, worker) if report.incarnation == incarnation
    )


async def _bound(
    harness: ClusterHarness, cluster: Cluster, worker: DeclaredWorker, incarnation: int
) -> ProcessReport:
    """Its report, once it has an address."""
    found: list[ProcessReport] = []

    async def is_bound() -> bool:
        found[:] = [report for report in await _reports(cluster, worker) if report.incarnation == incarnation]
        assert len(found) <= 1, f"{worker.worker_id} is listed more than once: {found}"
        assert all(report.is_alive for report in found), found
        return bool(found and found[0].address)

    await _until(harness, f"{worker.worker_id} incarnation {incarnation} has an address", is_bound)
    return found[0]
