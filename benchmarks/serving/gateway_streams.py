"""How many tokens a second a gateway passes on, and what a new request waits for its first one when there are more.

python benchmarks/serving/gateway_streams.py [--quick] [--json FILE]

A worker in a process of its own computes nothing: each of its steps takes --step-ms, whatever runs in it, and gives each of its
requests a token, all in one message, as a worker on a GPU with a small model does. The gateway is a process too; this one is the client,
with so many requests at a time, each followed by another. The worker answers a new request at its next step: what its first token takes
beyond that is the gateway's and the client's.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc
import grpc.aio

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.control.slo import percentile  # noqa: E402
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView  # noqa: E402
from orchestrator.control.view_wire import view_to_pb  # noqa: E402
from orchestrator.gateway import server  # noqa: E402
from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc  # noqa: E402
from tests.support.fake_worker import FakeWorker  # noqa: E402
from tests.support.gateway import CONFIG  # noqa: E402
from workers.api import Event, Phase, RequestKey, Submit, WorkerId  # noqa: E402

BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
NUM_TOKENS = 200
NUMBERS = (4, 16, 32, 64)


class PacedWorker(FakeWorker):
    """A step each step_s, for all that it has."""

    def __init__(self, step_s: float) -> None:
        super().__init__("paced-0", BOTH)
        self._step_s = step_s
        #: What is left to say of each.
        self._running: dict[RequestKey, list[Event]] = {}
        self.answer = self._begin

    def _begin(self, submit: Submit) -> list[Event]:
        started, *tokens = self.script(submit)
        self._running[submit.key] = tokens[::-1]
        return [started]

    async def run(self) -> None:
        """Until it is cancelled."""
        next_s = time.perf_counter()
        while True:
            next_s = max(next_s + self._step_s, time.perf_counter())
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            for key in [key for key in self._running if key not in self.held]:
                del self._running[key]
            events = [tokens.pop() for tokens in self._running.values()]
            for key in [key for key, tokens in self._running.items() if not tokens]:
                del self._running[key]
            if events:
                self.say(*events)


async def be_worker(step_s: float) -> None:
    """Of the process that is one."""
    worker = PacedWorker(step_s)
    await worker.start()
    print(worker.address, flush=True)
    await worker.run()


async def be_gateway() -> None:
    """Of the process that is one."""
    config = replace(CONFIG, max_running_requests=1024, max_waiting_requests=1024, request_timeout_s=600.0)
    await server.serve(config, on_bound=lambda *both: print(*both, flush=True), stop=asyncio.Event())


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[list[str]]:
    """This file in another role; yields the words of its first line."""
    command = sys.executable, __file__, *arguments
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    try:
        yield (await child.stdout.readline()).decode().split()
    finally:
        child.kill()
        await child.wait()


@dataclass(frozen=True, slots=True)
class Row:
    """Of a load. Seconds are milliseconds where they say so; tokens per message: of the gateway's answers."""

    num_requests_at_a_time: int
    made_tokens_per_s: float
    tokens_per_s: float
    tokens_per_message: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    gap_ms_p50: float
    gap_ms_p99: float


class Clients:
    """num at a time. Requests that begin after warm_up_s count."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
        self._stub = stub
        self.ttfts_s: list[float] = []
        self.gaps_s: list[float] = []
        self.num_tokens = self.num_messages = 0

    async def run(self, num: int, duration_s: float, warm_up_s: float) -> float:
        """Returns the seconds that count."""
        began_s = time.perf_counter()
        end_s = began_s + warm_up_s + duration_s
        await asyncio.gather(*(self._one(began_s + warm_up_s, end_s, i / num) for i in range(num)))
        return time.perf_counter() - began_s - warm_up_s

    async def _one(self, from_s: float, end_s: float, phase: float) -> None:
        # Not all at once.
        await asyncio.sleep(phase * NUM_TOKENS * 2.5e-3)
        while (began_s := time.perf_counter()) < end_s:
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=range(10, 42)),
                sampling=inference_pb2.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
            )
            last_s = None
            async for message in self._stub.Generate(request):
                now_s = time.perf_counter()
                if now_s >= from_s:
                    self.num_tokens += len(message.token_ids)
                    self.num_messages += 1
                    if last_s is not None:
                        self.gaps_s.append(now_s - last_s)
                    elif began_s >= from_s:
                        self.ttfts_s.append(now_s - began_s)
                last_s = now_s


async def measured(num: int, step_s: float, duration_s: float) -> Row:
    """With a worker and a gateway of its own."""
    async with process("--worker", str(step_s)) as (worker,), process("--gateway") as (address, control):
        view = ClusterView(
            "test",
            1,
            1,
            "tiny",
            (WorkerView(WorkerId("paced-0"), 1, BOTH, LifecycleState.READY, worker, ""),),
            1,
        )
        async with (
            grpc.aio.insecure_channel(address) as channel,
            grpc.aio.insecure_channel(control) as control_channel,
        ):
            publish = control_pb2_grpc.GatewayControlServiceStub(control_channel).PublishView
            await publish(control_pb2.PublishViewRequest(view=view_to_pb(view)))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            while True:
                try:
                    await stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
            clients = Clients(stub)
            seconds = await clients.run(num, duration_s, 2.0)
    return Row(
        num,
        num / step_s,
        clients.num_tokens / seconds,
        clients.num_tokens / clients.num_messages,
        *(1e3 * percentile(sorted(clients.ttfts_s), one) for one in (50, 99)),
        *(1e3 * percentile(sorted(clients.gaps_s), one) for one in (50, 99)),
    )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four seconds of each load")
    parser.add_argument("--step-ms", type=float, default=2.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=float, metavar="S", help=argparse.SUPPRESS)
    parser.add_argument("--gateway", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        asyncio.run(be_worker(args.worker))
        return 0
    if args.gateway:
        asyncio.run(be_gateway())
        return 0
    rows = []
    for num in NUMBERS:
        rows.append(asyncio.run(measured(num, args.step_ms / 1e3, 4.0 if args.quick else 15.0)))
        print(rows[-1], flush=True)
    if args.json:
        found = {
            "machine": describe_machine(),
            "step_ms": args.step_ms,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
