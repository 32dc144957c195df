"""Our engine under a load: a model on its device, and its requests served by a policy."""

import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.serving.capacity_rows import Load, Served
from benchmarks.serving.capacity_sharing import SemiPdSharing, Sharer, shared_row
from benchmarks.serving.engine_gpu import kv_block_bytes, kv_torch_dtype, random_weights
from orchestrator.control.slo import Slo, tpot_s
from workers.api import (
    EngineConfig,
    KvDtype,
    Phase,
    PrefillOrder,
    RequestFailed,
    RequestId,
    RequestKey,
    SamplingParams,
    StepBudget,
    Submit,
    TokensGenerated,
    WeightDtype,
)
from workers.device.buckets import decode_buckets, mixed_buckets
from workers.device.forward import DeviceForward
from workers.device.sampler import DeviceSampler
from workers.device.sm_layouts import SmLayout
from workers.device.sm_share import SmShares, open_sm_shares
from workers.device.split_runner import SplitRunner, open_split
from workers.engine.engine import Engine
from workers.engine.messages import Output, TokensDecoded
from workers.engine.runner import ModelRunner
from workers.engine.running import Splitting
from workers.engine.sharing import Sharing, SharingLog
from workers.engine.step_loop import StepLoop
from workers.latency_model import LatencyModel
from workers.limits import GPU_TILE_TOKENS
from workers.loaded_shapes import gpu_shape, model_shape
from workers.model.config import ModelConfig
from workers.model.fp8 import all_quantised
from workers.model.llama import Llama

BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
ORDERS = {
    "fcfs": PrefillOrder.FCFS,
    "spf": PrefillOrder.SHORTEST_REMAINING,
    "slack": PrefillOrder.LEAST_SLACK,
}
#: What `predicted` may take at most in one step.
MOST_TOKENS = 2048
PHASES = (Phase.PREFILL, Phase.DECODE)
#: Memory for steps and graphs, and for those of the layouts.
RESERVED_BYTES, SPLIT_BYTES = 6 * 10**9, 8 * 10**9
#: Layouts differ by so many groups of SMs: on an H100 by 16, from 16 for decodes to 112.
STEP_GROUPS = 2


#: Prompts and decodes as they say, on streams with shares of the SMs; their steps of prompts have up to MOST_TOKENS. Those of both phases that phasewise chooses have
#: the predicted budget.
SHARING = ("nexus", "semi_pd", "phasewise")


@dataclass(frozen=True, slots=True)
class Policy:
    """budget: tokens of a step; None where it is predicted. sharing: who says how the phases share the device; None has them in one step."""

    name: str
    order: PrefillOrder
    budget: int | None
    sharing: str | None = None

    @classmethod
    def of(cls, name: str) -> "Policy":
        """phasewise+ORDER, nexus+ORDER, semi_pd+ORDER, sarathi+ORDER@BUDGET, or ORDER@BUDGET, which is the same; `phasewise` has slack. Raises ValueError."""
        kind, plus, rest = ("phasewise+slack" if name == "phasewise" else name).rpartition("+")
        order, at, budget = rest.partition("@")
        is_shared = kind in SHARING
        is_kind = is_shared or kind == "sarathi" or not plus
        is_budget = not at if is_shared else budget == "predicted" or (budget.isdecimal() and int(budget) > 0)
        if not (is_kind and is_budget and order in ORDERS):
            raise ValueError(
                f"{name}: sarathi+ORDER@BUDGET, nexus+ORDER, semi_pd+ORDER or phasewise+ORDER; the order is one of {', '.join(ORDERS)}, "
                "the budget a number of tokens or predicted"
            )
        if is_shared:
            return cls(name, ORDERS[order], None if kind == "phasewise" else MOST_TOKENS, kind)
        return cls(name, ORDERS[order], None if budget == "predicted" else int(budget))


class Machine:
    """A model on its device with captured decode steps, for as many engines as one wants, one after the other.

    is_split: with layouts of its SMs, each with captured steps of its own, which leaves less memory for KV.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        is_tiny: bool,
        max_running: int,
        weights: WeightDtype = WeightDtype.BFLOAT16,
        kv: KvDtype = KvDtype.AUTO,
        is_split: bool = False,
    ) -> None:
        self.config = config
        self._device = torch.device("cpu" if is_tiny else "cuda")
        #: A tiny model has float32 where others have bfloat16.
        self.weights = WeightDtype.FLOAT32 if is_tiny and weights is not WeightDtype.FP8 else weights
        is_float32 = is_tiny and kv is KvDtype.AUTO
        self._kv_dtype = torch.float32 if is_float32 else kv_torch_dtype(weights, kv)
        self.max_running = max_running
        self.tile_tokens = 1 if is_tiny else GPU_TILE_TOKENS
        model = Llama(config, tiny_weights(self.weights) if is_tiny else random_weights(config, weights))
        self.block_size = 16
        reserved_bytes = RESERVED_BYTES + (SPLIT_BYTES if is_split else 0)
        self.num_blocks = 512 if is_tiny else self._num_blocks(model, reserved_bytes)
        shape = model.kv_cache_shape(self.num_blocks, self.block_size, self._kv_dtype)
        kv_cache = torch.zeros(shape, dtype=self._kv_dtype, device=self._device)
        self._kv_head_bytes = kv_cache[0, 0, 0, 0, 0].nbytes
        self.forward = DeviceForward(
            model,
            kv_cache,
            max_context_tokens=config.max_context_tokens,
            buckets=decode_buckets(max_running),
            mixed_buckets=mixed_buckets(MOST_TOKENS),
        )
        self.forward.warm_up(max_running, shown)
        self.forward.capture(shown)
        sampler = None if is_tiny else DeviceSampler(self._device)
        self.runner = ModelRunner(model, kv_cache, self.block_size, forward=self.forward, sampler=sampler)
        self.layouts: tuple[SmLayout, ...] = ()
        self.split: SplitRunner | None = None
        if is_split:
            shares = tiny_shares() if is_tiny else open_sm_shares(0, PHASES, step_groups=STEP_GROUPS)
            self.layouts = tuple(live.layout for live in shares.layouts)
            self.split = open_split(
                *(self.runner, model, kv_cache, shares),
                max_context_tokens=config.max_context_tokens,
                decode_buckets=decode_buckets(max_running),
                prefill_buckets=mixed_buckets(MOST_TOKENS),
                progress=shown,
            )

    def _num_blocks(self, model: Llama, reserved_bytes: int) -> int:
        """What 90 % of the memory leaves beside weights and what is reserved for steps and graphs."""
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        room_bytes = int(0.9 * total_bytes) - (total_bytes - free_bytes) - reserved_bytes
        return room_bytes // kv_block_bytes(model, self.block_size, self._kv_dtype)

    def latency(self) -> LatencyModel:
        """As a worker begins with it."""
        shape = model_shape(self.config, "llama-3-8b", self.weights, kv_head_bytes=self._kv_head_bytes)
        return LatencyModel(shape, gpu_shape("h100", 80 * 10**9, self.weights))


def serve(
    machine: Machine, policy: Policy, load: Load, slo: Slo, latency: LatencyModel
) -> tuple[list[Served], Engine, dict[str, Any]]:
    """All requests to their end; the last are more columns of the row."""
    config = EngineConfig(
        block_size=machine.block_size,
        token_budget=policy.budget or MOST_TOKENS,
        max_running_sequences=machine.max_running,
        max_waiting_requests=100_000,
        prefill_order=policy.order,
        tile_tokens=machine.tile_tokens,
        step_budget=StepBudget.PREDICTED if policy.budget is None else StepBudget.FIXED,
        is_prefix_cache_on=False,
        weight_dtype=machine.weights,
    )
    engine = Engine(
        config,
        BOTH,
        num_blocks=machine.num_blocks,
        max_context_tokens=machine.config.max_context_tokens,
        claim_s=5.0,
        attention_tokens=machine.config.attention_tokens,
        latency=latency,
    )
    served: dict[str, Served] = {}
    is_done = threading.Event()
    problems: list[RequestFailed | str] = []
    num_left = len(load.requests)

    sharing: Sharing | None = None
    splitting: Splitting | None = None
    if policy.sharing is not None:
        assert machine.split is not None
        sharer = Sharer(latency, slo, machine.block_size, machine.layouts)
        sharing = sharer.of(policy.sharing)
        splitting = Splitting(sharing, machine.split, SharingLog())

    def publish(outputs: list[Output]) -> None:
        nonlocal num_left
        now_s = time.monotonic()
        for output in outputs:
            match output:
                case TokensDecoded():
                    for key in output.keys:
                        served[key.request_id].times_s.append(now_s)
                case TokensGenerated():
                    served[output.key.request_id].times_s += [now_s] * len(output.token_ids)
                    if output.finish_reason is not None:
                        num_left -= 1
                        if isinstance(sharing, SemiPdSharing):
                            one = served[output.key.request_id]
                            sharing.told(now_s, one.times_s[0] - one.due_s, tpot_s(one.times_s))
                        if num_left == 0:
                            is_done.set()
                case RequestFailed():
                    problems.append(output)
                    is_done.set()

    def broke(reason: str) -> None:
        problems.append(reason)
        is_done.set()

    # All streams are ordered where steps of any kind were computed before.
    runner = machine.split or machine.runner
    loop = StepLoop(
        engine,
        runner,
        publish,
        broke,
        latency=latency,
        overlapping=runner if runner.may_overlap else None,
        splitting=splitting,
    )
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    began_s = time.monotonic() + 0.1
    for number, (one, prompt) in enumerate(zip(load.requests, load.prompts, strict=True)):
        due_s = began_s + one.arrival_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        name = f"r{number}"
        served[name] = Served(one, due_s, [])
        sampling = SamplingParams(one.output_tokens)
        ttft_left_s = slo.ttft_s - (time.monotonic() - due_s)
        loop.post(
            Submit(
                RequestKey(RequestId(name), 1),
                BOTH,
                prompt,
                sampling,
                1e6,
                ttft_left_s=ttft_left_s,
                tpot_target_s=slo.tpot_s,
            )
        )
    is_done.wait(timeout=300)
    loop.stop()
    thread.join(timeout=60)
    if problems or num_left:
        raise RuntimeError(f"{policy.name}: {num_left} requests have no end: {problems[:3]}")
    more: dict[str, Any] = {}
    if splitting is not None:
        splitting.log.note(time.monotonic(), None)
        more = shared_row(splitting.log)
    return list(served.values()), engine, more


def shown(what: str, done: float) -> None:
    """Progress, on one line."""
    print(f"\r{what} {done:.0%}   ", end="", file=sys.stderr)


def tiny_config() -> ModelConfig:
    from tests.support.device_engine import TINY

    return TINY


def tiny_shares() -> SmShares:
    from tests.support.split_shares import fake_shares

    return fake_shares()


def tiny_weights(dtype: WeightDtype) -> dict[str, torch.Tensor]:
    from tests.support.device_engine import random_weights as tiny

    weights = tiny(tiny_config())
    return all_quantised(weights) if dtype is WeightDtype.FP8 else weights
