"""How many requests a second one GPU serves inside TTFT and TPOT targets: the engine itself, fed with rows of a trace.

    python benchmarks/serving/capacity_gpu.py --trace azure_llm_2023_conv.csv [--rates R,R] [--policies NAMES] [--weights fp8] [--kv fp8] [--quick] [--json FILE] [--plot FILE.svg]

Llama-3-8B's shape with random weights in bfloat16, or what --weights and --kv say, prefill and decode on one worker, no prefix cache, greedy, outputs as long as in the trace.
The engine runs in its own thread, as in a worker; requests are posted when they are due, and no gateway stands between. Rows from --first-row on, re-timed to each
rate with their bursts. Every request is served to its end; attainment is the share of all that met both targets.

Policies have an order of prompts, ORDER: fcfs, spf (the shortest first) or slack (the least time to its target).
    sarathi+ORDER@BUDGET  Sarathi-Serve's batches of so many tokens; `fcfs@2048` is short for it. With the budget `predicted`: as many as the TPOT target leaves
                          beside the decodes, by the latency model that the engine fits to its own steps (before the first rate it serves some rows untimed)
    nexus+ORDER           prompts and decodes side by side, each on SMs of its own, by Nexus' cost model and search
    semi_pd+ORDER         the same by semi-PD's windows of what was observed
    phasewise+ORDER       predicted, and for each step the choice whether it is split, by prediction; `phasewise` is short for phasewise+slack
With one of the last three there are layouts of the SMs, each with captured steps, so that all policies of that run have less KV. Their rows say which part of the time the
device had which layout, and how often it changed.
`vllm@2048` is vLLM with so many batched tokens, where it is installed: the same requests at the same times in its AsyncLLM, with the same shape, random
weights, bfloat16, context, 90 % of the memory, greedy and without prefix cache; all else as `vllm serve` has it. It gets its own process, before our engine starts.
`--rows 400` takes so many rows for every rate, in place of a duration: each rate then has the same requests.
It refuses to report when the engine's tests fail here. `--tiny` runs a tiny model on the CPU, to see that it works.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "kernels"))

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.serving.capacity_engine import Machine, Policy, serve, tiny_config  # noqa: E402
from benchmarks.serving.capacity_plot import plot  # noqa: E402
from benchmarks.serving.capacity_rows import Load, report, show  # noqa: E402
from benchmarks.serving.capacity_vllm import (  # noqa: E402
    MISSING,
    PREFIX,
    fp8_settings,
    is_installed,
    vllm_serving,
)
from benchmarks.serving.engine_gpu import LLAMA_3_8B, add_dtypes  # noqa: E402
from orchestrator.bench.plan import plan_requests, take_slice  # noqa: E402
from orchestrator.bench.trace import Trace, read_trace  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from workers.api import KvDtype, WeightDtype  # noqa: E402
from workers.model.config import ModelConfig  # noqa: E402

#: What is served untimed, at no more than the rates that are asked for: prompts of some traces are long.
WARM_RPS, WARM_S = 12.0, 15.0
#: What the engine promises on a GPU.
TESTS = ("tests/gpu/test_cuda_engine.py", "tests/gpu/test_fp8.py", "tests/gpu/test_split_gpu.py")


def planned(trace: Trace, rate_rps: float, duration_s: float, first_row: int, config: ModelConfig) -> Load:
    """Rows of the trace from this one on, for so long at this rate."""
    part = take_slice(trace, rate_rps=rate_rps, duration_s=duration_s, first_row=first_row)
    return Load.of(plan_requests(part, max_context_tokens=config.max_context_tokens), config.vocab_size)


def our_rows(
    machine: Machine, policies: Sequence[Policy], warm: Load, loads: Mapping[float, Load], slo: Slo
) -> Iterator[dict[str, Any]]:
    """Of each rate by each policy. They share what the latency model learns."""
    latency = machine.latency()
    # Of steps on the whole device: those side by side tell the latency model nothing.
    serve(machine, Policy.of("slack@predicted"), warm, slo, latency)
    for rate, load in loads.items():
        for policy in policies:
            served, engine, more = serve(machine, policy, load, slo, latency)
            yield (
                report(policy.name, rate, served, slo)
                | more
                | {
                    "num_preemptions": engine.num_preemptions,
                    "latency_model_error": latency.mean_error,
                    "latency_model_factors": latency.factors,
                }
            )


def vllm_rows(
    name: str,
    batched_tokens: int,
    config: ModelConfig,
    warm: Load,
    loads: Mapping[float, Load],
    slo: Slo,
    more: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Of each rate by one vLLM. more: see vllm_serving."""
    began_s = time.monotonic()
    with vllm_serving(config, batched_tokens, more) as (serve_by_vllm, about):
        print(f"{name}: vLLM {about['version']}, ready in {time.monotonic() - began_s:.0f} s", flush=True)
        serve_by_vllm(warm)
        for rate, load in loads.items():
            yield report(name, rate, serve_by_vllm(load), slo) | {"vllm": about}


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
    add("--rows", type=int, metavar="N", help="of the trace, for each rate; in place of a duration")
    add("--policies", default="sarathi+fcfs@2048,sarathi+spf@2048,slack@predicted", metavar="NAME,...")
    add("--slo-ttft-ms", type=float, default=500.0)
    add("--slo-tpot-ms", type=float, default=30.0)
    add(
        "--max-context-tokens",
        type=int,
        metavar="N",
        help="of the model (default: 8192); longer prompts are clipped. mooncake_conversation.jsonl has up to 126,195",
    )
    add_dtypes(parser)
    add("--max-running", type=int, default=384, metavar="N")
    add("--quick", action="store_true", help="one rate, 20 seconds")
    add("--tiny", action="store_true")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE.svg", help="attainment against the rate")
    return parser.parse_args(argv)


def main() -> int:
    """Returns the exit status."""
    args = parse()
    names = args.policies.split(",")
    if any(name.startswith(PREFIX) for name in names) and not is_installed():
        print(MISSING, file=sys.stderr)
        return 2
    if args.kv == KvDtype.INT4 and any(name.startswith(PREFIX) for name in names):
        print("vLLM keeps no KV in four bits: measure it without --kv int4", file=sys.stderr)
        return 2
    batched_tokens = {name: int(name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX)}
    policies = [Policy.of(name) for name in names if name not in batched_tokens]
    rates = [float(rate) for rate in args.rates.split(",")][: 1 if args.quick else None]
    duration_s = 20.0 if args.quick else args.duration
    if policies and not args.tiny and (problem := tests_problem(*TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    config = tiny_config() if args.tiny else LLAMA_3_8B
    if args.max_context_tokens is not None:
        config = replace(config, max_context_tokens=args.max_context_tokens)
    slo = Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)
    trace = read_trace(args.trace)
    warm = planned(trace, min(WARM_RPS, *rates), 1.0 if args.tiny else WARM_S, 1, config)
    durations_s = {rate: args.rows / rate if args.rows else duration_s for rate in rates}
    loads = {rate: planned(trace, rate, durations_s[rate], args.first_row, config) for rate in rates}
    rows: list[dict[str, Any]] = []
    about = {
        "format": "phasewise-capacity-gpu/v1",
        "machine": describe_gpu(),
        "trace": args.trace.name,
        "first_row": args.first_row,
        "rows_of_trace": args.rows,
        "duration_s": None if args.rows else duration_s,
        "slo": asdict(slo),
        "max_running": args.max_running,
        "max_context_tokens": config.max_context_tokens,
        "weights": args.weights,
        "kv": args.kv,
    }

    def keep(row: dict[str, Any]) -> None:
        """Each time: what is measured by then is kept."""
        rows.append(row)
        show(row)
        if args.json:
            args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        if args.plot:
            args.plot.write_text(plot(rows, slo), encoding="utf-8")

    # vLLM first: its processes take the GPU with them when they end, and ours would keep it.
    more = fp8_settings(is_weights=args.weights == WeightDtype.FP8, is_kv=args.kv == KvDtype.FP8)
    for name, num_tokens in batched_tokens.items():
        for row in vllm_rows(name, num_tokens, config, warm, loads, slo, more):
            keep(row)
    if not policies:
        return 0
    began_s = time.monotonic()
    machine = Machine(
        config,
        is_tiny=args.tiny,
        max_running=args.max_running,
        weights=WeightDtype(args.weights),
        kv=KvDtype(args.kv),
        is_split=any(policy.sharing is not None for policy in policies),
    )
    if machine.split is not None:
        about["layout_bytes"] = {str(layout): num for layout, num in machine.split.layout_bytes.items()}
    about["kv_tokens"] = machine.num_blocks * machine.block_size
    print(f"\r{about['kv_tokens']} tokens of KV; ready in {time.monotonic() - began_s:.0f} s")
    for row in our_rows(machine, policies, warm, loads, slo):
        keep(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
