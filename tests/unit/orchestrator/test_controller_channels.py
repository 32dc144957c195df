"""The controller's gRPC ends: what it asks workers and what it tells the gateway."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.control.view_wire import view_to_pb
from orchestrator.errors import ControllerSuperseded, GatewayUnreachable
from orchestrator.runtime.view_publisher import GatewayPublisher
from orchestrator.runtime.worker_probe import WorkerProbe
from protos import control_pb2, worker_pb2
from protos.control_pb2_grpc import GatewayControlServiceServicer, add_GatewayControlServiceServicer_to_server
from protos.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from workers.api import Phase, WorkerId, WorkerState, WorkerStatus
from workers.status_wire import status_to_pb

STATUS = WorkerStatus(WorkerId("w-0"), 3, frozenset({Phase.DECODE}), WorkerState.READY, num_running=2)
VIEW = ClusterView(
    deployment="test",
    controller_epoch=2,
    version=5,
    model="tiny",
    workers=(
        WorkerView(
            WorkerId("w-0"), 3, frozenset({Phase.DECODE}), LifecycleState.READY, "a:1", "serves", 2, STATUS
        ),
    ),
    controller_pid=7,
)


class Worker(WorkerServiceServicer):
    """Answers when it may."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_asked = 0

    async def GetKvLedger(self, request: Any, context: Any) -> worker_pb2.KvLedger:  # noqa: N802
        return worker_pb2.KvLedger()

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.WorkerStatus:  # noqa: N802 - gRPC's name
        self.num_asked += 1
        await self.may_answer.wait()
        return status_to_pb(STATUS)


class Gateway(GatewayControlServiceServicer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.views: list[control_pb2.ClusterView] = []
        self.has_another = False

    async def PublishView(self, request: Any, context: Any) -> control_pb2.PublishViewResponse:  # noqa: N802
        self.views.append(request.view)
        return control_pb2.PublishViewResponse(is_superseded=self.has_another)

    async def GetKvLedger(self, request: Any, context: Any) -> control_pb2.GetKvLedgerResponse:  # noqa: N802
        return control_pb2.GetKvLedgerResponse()

    async def Explain(self, request: Any, context: Any) -> control_pb2.ExplainResponse:  # noqa: N802
        return control_pb2.ExplainResponse()

    async def GetView(self, request: Any, context: Any) -> control_pb2.GetViewResponse:  # noqa: N802
        return control_pb2.GetViewResponse(view=self.views[-1] if self.views else None)


@asynccontextmanager
async def serving(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def serving_worker(worker: Worker) -> AbstractAsyncContextManager[str]:
    return serving(lambda server: add_WorkerServiceServicer_to_server(worker, server))


@asynccontextmanager
async def probing(timeout_s: float = 5.0) -> AsyncIterator[WorkerProbe]:
    probe = WorkerProbe(timeout_s)
    try:
        yield probe
    finally:
        await probe.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def test_a_probe_brings_the_status() -> None:
    async def scenario() -> None:
        worker = Worker()
        async with serving_worker(worker) as address, probing() as probe:
            assert await probe.probe(address) == STATUS
            assert await probe.probe(address) == STATUS
            assert worker.num_asked == 2

    run(scenario)


def test_a_probe_of_nobody_brings_nothing() -> None:
    async def scenario() -> None:
        async with serving(lambda _: None) as address:
            pass
        async with probing() as probe:
            assert await probe.probe(address) is None

    run(scenario)


def test_a_probe_of_something_else_brings_nothing() -> None:
    async def scenario() -> None:
        async with serving(lambda _: None) as address, probing() as probe:
            assert await probe.probe(address) is None

    run(scenario)


def test_a_slow_answer_is_heard_by_a_later_probe_and_asked_for_once() -> None:
    async def scenario() -> None:
        worker = Worker()
        worker.may_answer.clear()
        async with serving_worker(worker) as address, probing(timeout_s=0.05) as probe:
            while worker.num_asked == 0:
                assert await probe.probe(address) is None
            assert await probe.probe(address) is None
            worker.may_answer.set()
            answer = None
            while answer is None:
                answer = await probe.probe(address)
            assert (answer, worker.num_asked) == (STATUS, 1)

    run(scenario)


def test_an_address_that_left_is_dropped_with_its_open_question() -> None:
    async def scenario() -> None:
        worker = Worker()
        async with serving_worker(worker) as address, probing(timeout_s=0.05) as probe:
            worker.may_answer.clear()
            while worker.num_asked == 0:
                assert await probe.probe(address) is None
            await probe.keep_only(frozenset({"elsewhere:1"}))
            worker.may_answer.set()
            answer = None
            while answer is None:
                answer = await probe.probe(address)
            assert worker.num_asked == 2
            await probe.keep_only(frozenset({address}))

    run(scenario)


def test_the_gateway_gets_the_view_and_gives_it_back() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        async with serving(lambda s: add_GatewayControlServiceServicer_to_server(gateway, s)) as address:
            publisher = GatewayPublisher(address)
            assert await publisher.last_view() is None
            await publisher.publish(VIEW)
            assert gateway.views == [view_to_pb(VIEW)]
            assert await publisher.last_view() == VIEW
            await publisher.close()

    run(scenario)


def test_a_gateway_that_has_another_controller_is_a_typed_error() -> None:
    async def scenario() -> None:
        gateway = Gateway()
        gateway.has_another = True
        async with serving(lambda s: add_GatewayControlServiceServicer_to_server(gateway, s)) as address:
            publisher = GatewayPublisher(address)
            with pytest.raises(ControllerSuperseded, match="of epoch 2"):
                await publisher.publish(VIEW)
            await publisher.close()

    run(scenario)


def test_a_gateway_that_is_gone_is_a_typed_error() -> None:
    async def scenario() -> None:
        async with serving(lambda _: None) as address:
            pass
        publisher = GatewayPublisher(address)
        with pytest.raises(GatewayUnreachable, match=address):
            await publisher.publish(VIEW)
        await publisher.close()

    run(scenario)
