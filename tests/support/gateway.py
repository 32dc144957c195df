"""A real gateway in this process, its clients, and a look inside."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.control.view_wire import view_to_pb
from orchestrator.gateway import server
from orchestrator.gateway.config import GatewayConfig
from orchestrator.gateway.dispatcher import Dispatcher
from protos import control_pb2, control_pb2_grpc, inference_pb2_grpc
from protos import inference_pb2 as pb
from tests.support.fake_worker import FakeWorker, running
from tests.support.waiting import until
from workers.api import KvTransferred, RequestId

if TYPE_CHECKING:
    from protos.control_pb2_grpc import GatewayControlServiceAsyncStub
    from protos.inference_pb2_grpc import InferenceServiceAsyncStub

CONFIG = GatewayConfig(
    deployment="test",
    model="tiny",
    address="127.0.0.1:0",
    control_address="127.0.0.1:0",
    request_timeout_s=60.0,
    max_waiting_requests=16,
    max_running_requests=8,
)


@dataclass
class Gateway:
    """What tests need of one."""

    address: str
    control_address: str
    channel: grpc.aio.Channel
    client: "InferenceServiceAsyncStub"
    control: "GatewayControlServiceAsyncStub"
    dispatcher: Dispatcher
    stop: asyncio.Event
    ended: asyncio.Task[None]
    version: int = 0
    health: Any = field(init=False)

    def __post_init__(self) -> None:
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def publish(self, *workers: WorkerView, epoch: int = 1, version: int | None = None) -> None:
        """Be the controller."""
        self.version = self.version + 1 if version is None else version
        view = ClusterView("test", epoch, self.version, "tiny", workers, 4711)
        await self.control.PublishView(control_pb2.PublishViewRequest(view=view_to_pb(view)))

    async def use(self, *workers: FakeWorker) -> None:
        """Publish these workers, and wait until all are linked."""
        await self.publish(*(worker.view() for worker in workers))
        wanted = {(worker.worker_id, worker.incarnation) for worker in workers}
        await until(lambda: self.linked() == wanted, f"links to {wanted}")

    def linked(self) -> set[tuple[str, int]]:
        """Workers that can be used now."""
        return {
            (link.worker.worker_id, link.worker.incarnation)
            for link in self.dispatcher._links.open_links()  # type: ignore[attr-defined]
        }

    async def kv_transfer(self, request_id: str) -> KvTransferred:
        """Of a request of one attempt and one sample: it may be told of after the last token."""
        record = self.dispatcher.records.get(RequestId(request_id))
        assert record is not None
        ((attempt,),) = [one.attempts for one in record.samples]
        await until(lambda: attempt.transfer is not None, f"the KV transfer of {request_id}")
        assert attempt.transfer is not None
        return attempt.transfer

    async def is_serving(self, service: str = "") -> bool:
        """What the health service says."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def gateway(
    *workers: FakeWorker, config: GatewayConfig = CONFIG, grace_s: float = 5.0
) -> AsyncIterator[Gateway]:
    """Serve with these workers, started and linked. At the end nothing may be left in flight."""
    made: list[Dispatcher] = []

    def make(*both: Any, **arguments: Any) -> Dispatcher:
        made.append(Dispatcher(*both, **arguments))
        return made[-1]

    stop = asyncio.Event()
    bound: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    with patch.object(server, "Dispatcher", make):
        task = asyncio.create_task(
            server.serve(config, on_bound=lambda *both: bound.set_result(both), stop=stop, grace_s=grace_s)
        )
        await asyncio.wait((task, bound), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        bound.cancel()
        task.result()
    address, control_address = bound.result()
    async with (
        running(*workers),
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(control_address) as control_channel,
    ):
        it = Gateway(
            address,
            control_address,
            channel,
            inference_pb2_grpc.InferenceServiceStub(channel),
            control_pb2_grpc.GatewayControlServiceStub(control_channel),
            made[0],
            stop,
            task,
        )
        try:
            if workers:
                await it.use(*workers)
            yield it
            if not stop.is_set():
                await until(lambda: it.dispatcher._is_idle.is_set(), "the requests to be gone")
            it.dispatcher.check_invariants()
            assert it.dispatcher._ledger.loads == {}
        finally:
            stop.set()
            await task


def generate_request(*prompt: int, max_tokens: int = 4, **sampling: Any) -> pb.GenerateRequest:
    """Of token ids."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt or (10, 11, 12)),
        sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling),
    )


async def collect(call: Any) -> list[pb.GenerateResponse]:
    """All messages; the tokens of each sample must be in order and each there once, with one end."""
    messages: list[pb.GenerateResponse] = []
    num_tokens: Counter[int] = Counter()
    ended: set[int] = set()
    async for message in call:
        sample = message.sample_index
        assert sample not in ended
        assert not messages or not messages[-1].HasField("usage")
        assert message.first_token_index == num_tokens[sample]
        num_tokens[sample] += len(message.token_ids)
        is_end = message.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        assert message.HasField("timings") == is_end
        if is_end:
            ended.add(sample)
        messages.append(message)
    assert messages[-1].finish_reason != pb.FINISH_REASON_UNSPECIFIED
    assert messages[-1].HasField("usage")
    assert ended == set(num_tokens)
    return messages


def tokens_of(messages: list[pb.GenerateResponse], sample: int = 0) -> list[int]:
    """The tokens of one sample of an answer."""
    return [
        token_id for message in messages if message.sample_index == sample for token_id in message.token_ids
    ]


def text_of(messages: list[pb.GenerateResponse], sample: int = 0) -> str:
    """The text of one sample of an answer."""
    return "".join(message.text_delta for message in messages if message.sample_index == sample)


async def error_of(call: Any) -> tuple[str, str]:
    """Status and message of a call that fails, after however many messages."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    raise AssertionError("it did not fail")


def run(scenario: Callable[[], Any]) -> Any:
    """In a loop of its own."""
    return asyncio.run(scenario())
