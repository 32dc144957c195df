"""How many requests a second one GPU serves inside TTFT and TPOT targets: the engine itself, fed with rows of a trace.

    python benchmarks/serving/capacity_gpu.py --trace azure_llm_2023_conv.csv [--rates R,R] [--policies NAMES] [--quick] [--json FILE]

Llama-3-8B's shape with random weights in bfloat16, prefill and decode on one worker, no prefix cache, greedy, outputs as long as in the trace.
The engine runs in its own thread, as in a worker; requests are posted when they are due, and no gateway stands between. Rows from --first-row on, re-timed to each
rate with their bursts. Every request is served to its end; attainment is the share of all that met both targets.

Policies are an order of prompts and a budget of tokens for each step: `fcfs@2048` and `spf@2048` are Sarathi-Serve's batches with first come first
served and shortest prompt first; `slack@predicted` takes prompts by the slack to their target and as many tokens as the TPOT target leaves
beside the decodes, by the latency model that the engine fits to its own steps (before the first rate it serves some rows untimed).
It refuses to report when the engine's tests fail here. `--tiny` runs a tiny model on the CPU, to see that it works.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402

from benchmarks.serving.engine_gpu import LLAMA_3_8B, random_weights  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import PlannedRequest, plan_requests, take_slice  # noqa: E402
from orchestrator.bench.trace import Trace, read_trace  # noqa: E402
from orchestrator.control.slo import Slo, itl_s, percentiles, tpot_s  # noqa: E402
from workers.api import (  # noqa: E402
    EngineConfig,
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
from workers.device.buckets import decode_buckets, mixed_buckets  # noqa: E402
from workers.device.forward import DeviceForward  # noqa: E402
from workers.device.sampler import DeviceSampler  # noqa: E402
from workers.engine.engine import Engine  # noqa: E402
from workers.engine.messages import Output, TokensDecoded  # noqa: E402
from workers.engine.runner import ModelRunner  # noqa: E402
from workers.engine.step_loop import StepLoop  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402
from workers.limits import GPU_TILE_TOKENS  # noqa: E402
from workers.loaded_shapes import gpu_shape, model_shape  # noqa: E402
from workers.model.config import ModelConfig  # noqa: E402
from workers.model.llama import Llama  # noqa: E402

BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
ORDERS = {
    "fcfs": PrefillOrder.FCFS,
    "spf": PrefillOrder.SHORTEST_REMAINING,
    "slack": PrefillOrder.LEAST_SLACK,
}
#: What `predicted` may take at most in one step.
MOST_TOKENS = 2048
WARM_RPS, WARM_S = 12.0, 15.0
#: What the engine promises on a GPU.
TESTS = ("tests/gpu/test_cuda_engine.py",)


@dataclass(frozen=True, slots=True)
class Policy:
    """budget: tokens of a step; None where it is predicted."""

    name: str
    order: PrefillOrder
    budget: int | None

    @classmethod
    def of(cls, name: str) -> "Policy":
        """From ORDER@BUDGET. Raises ValueError."""
        order, _, budget = name.partition("@")
        if order not in ORDERS:
            raise ValueError(f"{name}: the order is one of {', '.join(ORDERS)}")
        return cls(name, ORDERS[order], None if budget == "predicted" else int(budget))


@dataclass(slots=True)
class Served:
    """One request: when it was due and when its tokens came, on the clock of the run."""

    plan: PlannedRequest
    due_s: float
    times_s: list[float]


class Machine:
    """A model on its device with captured decode steps, for as many engines as one wants, one after the other."""

    def __init__(self, config: ModelConfig, *, is_tiny: bool, max_running: int) -> None:
        self.config = config
        self._device = torch.device("cpu" if is_tiny else "cuda")
        self._dtype = torch.float32 if is_tiny else torch.bfloat16
        self.max_running = max_running
        self.tile_tokens = 1 if is_tiny else GPU_TILE_TOKENS
        model = Llama(config, tiny_weights() if is_tiny else random_weights(config))
        self.block_size = 16
        self.num_blocks = 512 if is_tiny else self._num_blocks(model)
        shape = model.kv_cache_shape(self.num_blocks, self.block_size)
        kv_cache = torch.zeros(shape, dtype=self._dtype, device=self._device)
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

    def _num_blocks(self, model: Llama) -> int:
        """What 90 % of the memory leaves beside weights and 6 GB for steps and graphs."""
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        room_bytes = int(0.9 * total_bytes) - (total_bytes - free_bytes) - 6 * 10**9
        block_bytes = math.prod(model.kv_cache_shape(1, self.block_size)) * self._dtype.itemsize
        return room_bytes // block_bytes

    def latency(self) -> LatencyModel:
        """As a worker begins with it."""
        dtype = WeightDtype.FLOAT32 if self._device.type == "cpu" else WeightDtype.BFLOAT16
        shape = model_shape(self.config, "llama-3-8b", dtype, kv_value_bytes=self._dtype.itemsize)
        return LatencyModel(shape, gpu_shape("h100", 80 * 10**9))


def serve(
    machine: Machine, policy: Policy, requests: Sequence[PlannedRequest], slo: Slo, latency: LatencyModel
) -> tuple[list[Served], Engine]:
    """All requests to their end."""
    config = EngineConfig(
        block_size=machine.block_size,
        token_budget=policy.budget or MOST_TOKENS,
        max_running_sequences=machine.max_running,
        max_waiting_requests=100_000,
        prefill_order=policy.order,
        tile_tokens=machine.tile_tokens,
        step_budget=StepBudget.PREDICTED if policy.budget is None else StepBudget.FIXED,
        is_prefix_cache_on=False,
        weight_dtype=WeightDtype.BFLOAT16,
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
    rng = random.Random(1)
    vocabulary = range(machine.config.vocab_size)
    prompts = [tuple(rng.choices(vocabulary, k=one.prompt_tokens)) for one in requests]
    served: dict[str, Served] = {}
    is_done = threading.Event()
    problems: list[RequestFailed | str] = []
    num_left = len(requests)

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
                        if num_left == 0:
                            is_done.set()
                case RequestFailed():
                    problems.append(output)
                    is_done.set()

    def broke(reason: str) -> None:
        problems.append(reason)
        is_done.set()

    loop = StepLoop(
        engine,
        machine.runner,
        publish,
        broke,
        latency=latency,
        overlapping=machine.runner if machine.runner.may_overlap else None,
    )
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    began_s = time.monotonic() + 0.1
    for number, (one, prompt) in enumerate(zip(requests, prompts, strict=True)):
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
    return list(served.values()), engine


def report(
    policy: Policy, rate_rps: float, served: Sequence[Served], engine: Engine, slo: Slo
) -> dict[str, Any]:
    """One row."""
    ttfts_s = [one.times_s[0] - one.due_s for one in served]
    tpots = [tpot_s(one.times_s) for one in served]
    tpots_s = [value for value in tpots if value is not None]
    met = [slo.is_met(ttft, tpot) for ttft, tpot in zip(ttfts_s, tpots, strict=True)]
    gaps_s = [gap for one in served for gap in itl_s(one.times_s)]
    first_s, last_s = min(one.due_s for one in served), max(one.times_s[-1] for one in served)
    num_tokens = sum(len(one.times_s) for one in served)
    shown = {
        name: asdict(found)
        for name, values in (("ttft_s", ttfts_s), ("tpot_s", tpots_s), ("itl_s", gaps_s))
        if (found := percentiles(values)) is not None
    }
    return {
        "policy": policy.name,
        "rate_rps": rate_rps,
        "num_requests": len(served),
        "attainment": sum(met) / len(met),
        "late_first_tokens": sum(ttft > slo.ttft_s for ttft in ttfts_s) / len(met),
        "slow_decodes": sum(value is not None and value > slo.tpot_s for value in tpots) / len(met),
        **shown,
        "longest_ttft_s": max(ttfts_s),
        "output_tokens_per_s": num_tokens / (last_s - first_s),
        "num_preemptions": engine.num_preemptions,
    }


def show(row: dict[str, Any]) -> None:
    """A line."""
    ttft, tpot, itl = (
        "/".join(f"{1e3 * row[name][p]:.1f}" if name != "ttft_s" else f"{1e3 * row[name][p]:.0f}" for p in ps)
        for name, ps in (
            ("ttft_s", ("p50", "p90", "p99")),
            ("tpot_s", ("p50", "p90", "p99")),
            ("itl_s", ("p99",)),
        )
    )
    print(
        f"{row['policy']:<18}{row['rate_rps']:>5g}/s  attainment {row['attainment']:.3f} (late {row['late_first_tokens']:.3f}, "
        f"slow {row['slow_decodes']:.3f})  TTFT {ttft}  TPOT {tpot}  ITL p99 {itl} ms  {row['output_tokens_per_s']:.0f} tok/s",
        flush=True,
    )


def planned(
    trace: Trace, rate_rps: float, duration_s: float, first_row: int, config: ModelConfig
) -> list[PlannedRequest]:
    part = take_slice(trace, rate_rps=rate_rps, duration_s=duration_s, first_row=first_row)
    return plan_requests(part, max_context_tokens=config.max_context_tokens)


def tests_problem() -> str | None:
    """What the engine's own tests say on this machine; None when they pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", *TESTS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return None if found.returncode == 0 else found.stdout[-3000:] + found.stderr[-1000:]


def about_gpu() -> dict[str, Any]:
    """What the numbers depend on."""
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = (
        subprocess.run(query, capture_output=True, text=True, check=True)
        .stdout.strip()
        .splitlines()[0]
        .split(", ")
    )
    return {"gpu": name, "driver": driver, "cuda": torch.version.cuda}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--trace",
        type=Path,
        required=True,
        metavar="FILE",
        help="azure_llm_2023_conv.csv, or a Mooncake trace",
    )
    add("--first-row", type=int, default=200)
    add("--rates", default="20,23,26", metavar="R,R")
    add("--duration", type=float, default=60.0, metavar="S", help="of each rate")
    add("--policies", default="fcfs@2048,spf@2048,slack@predicted", metavar="ORDER@BUDGET,...")
    add("--slo-ttft-ms", type=float, default=500.0)
    add("--slo-tpot-ms", type=float, default=30.0)
    add("--max-running", type=int, default=384, metavar="N")
    add("--quick", action="store_true", help="one rate, 20 seconds")
    add("--tiny", action="store_true")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main() -> int:
    """Returns the exit status."""
    args = parse()
    policies = [Policy.of(name) for name in args.policies.split(",")]
    rates = [float(rate) for rate in args.rates.split(",")][: 1 if args.quick else None]
    duration_s = 20.0 if args.quick else args.duration
    if not args.tiny and (problem := tests_problem()) is not None:
        print(f"no numbers: the tests fail here\n{problem}", file=sys.stderr)
        return 1
    config = tiny_config() if args.tiny else LLAMA_3_8B
    slo = Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)
    trace = read_trace(args.trace)
    began_s = time.monotonic()
    machine = Machine(config, is_tiny=args.tiny, max_running=args.max_running)
    print(
        f"\r{machine.num_blocks * machine.block_size} tokens of KV; ready in {time.monotonic() - began_s:.0f} s"
    )
    latency = machine.latency()
    warm = planned(trace, WARM_RPS, WARM_S, 1, config)
    serve(machine, policies[0], warm, slo, latency)
    rows: list[dict[str, Any]] = []
    about = {
        "format": "phasewise-capacity-gpu/v1",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine() | about_gpu(),
        "trace": args.trace.name,
        "first_row": args.first_row,
        "duration_s": duration_s,
        "slo": asdict(slo),
        "max_running": args.max_running,
        "kv_tokens": machine.num_blocks * machine.block_size,
    }
    for rate in rates:
        requests = planned(trace, rate, duration_s, args.first_row, config)
        for policy in policies:
            served, engine = serve(machine, policy, requests, slo, latency)
            rows.append(report(policy, rate, served, engine, slo))
            rows[-1]["latency_model_error"] = latency.mean_error
            rows[-1]["latency_model_factors"] = latency.factors
            show(rows[-1])
            # Each time: what is measured by then is kept.
            if args.json:
                args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def shown(what: str, done: float) -> None:
    """Progress, on one line."""
    print(f"\r{what} {done:.0%}   ", end="", file=sys.stderr)


def tiny_config() -> ModelConfig:
    from tests.support.device_engine import TINY

    return TINY


def tiny_weights() -> dict[str, torch.Tensor]:
    from tests.support.device_engine import random_weights as tiny

    return tiny(tiny_config())


if __name__ == "__main__":
    sys.exit(main())
