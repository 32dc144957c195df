"""One benchmark of one gateway: ask for its model, clip the requests to it, send them, sum up."""

import asyncio
import time
from collections.abc import Callable

from orchestrator.bench.load import LoadConfig, LoadProgress, OpenLoop
from orchestrator.bench.plan import Slice, plan_requests
from orchestrator.bench.records import BenchConfig, ServedModel
from orchestrator.bench.summary import BenchResult, summarise
from orchestrator.errors import GatewayUnreachable
from orchestrator.runtime.channel import open_channel
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServiceStub

MODEL_INFO_TIMEOUT_S = 10.0


async def run_bench(
    address: str,
    part: Slice,
    config: BenchConfig,
    *,
    stop: asyncio.Event,
    on_progress: Callable[[LoadProgress], None],
) -> BenchResult:
    """Send the rows of `part` to the gateway at `address`.

    Raises grpc.RpcError when it does not say what it serves, GatewayUnreachable when that is no model.

    Setting `stop` ends it early, with a result of what was done until then.
    """
    async with open_channel(address) as channel:
        stub = InferenceServiceStub(channel)
        info = await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=MODEL_INFO_TIMEOUT_S)
        model = ServedModel(info.model, info.model_digest, info.max_context_tokens, info.vocab_size)
        if model.max_context_tokens < 2 or model.vocab_size < 1:
            raise GatewayUnreachable(address, "what answers there describes no model")
        plan = plan_requests(
            part,
            max_context_tokens=model.max_context_tokens,
            max_prompt_tokens=config.max_prompt_tokens,
            max_output_tokens=config.max_output_tokens,
        )
        load_config = LoadConfig(model.vocab_size, config.seed, config.timeout_s, config.max_in_flight)
        loop = OpenLoop(stub, load_config, stop=stop, clock=time.perf_counter, on_progress=on_progress)
        load = await loop.run(plan, config.duration_s)
    return BenchResult(model, load, summarise(load, config.slo))
