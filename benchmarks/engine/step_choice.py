"""Orders of prompts and budgets of steps in the live engine's scheduler: attainment against rate, in simulated time.

    python benchmarks/engine/step_choice.py [--quick] [--trace FILE] [--profile FILE] [--only SETUP] [--json FILE]

One worker that prefills and decodes, in the fine simulator: the engine that serves, whose steps take what a latency model says, with
3 % of noise. The model that the engine predicts by is another one, which begins with the roofline and learns from these steps. Three
setups: a core of a CPU with SmolLM2-135M, fitted to the steps that `phasewise calibrate` measured for docs/simulation.md (or another
profile of it, by --profile), the trace's lengths divided by 16, 2 s and 100 ms; cpu_long, the same with lengths divided by 4, of
which few are there at a time; and an H100 with Llama-3-8B's shape, 0.5 s and 30 ms.
Each seed is another place of the trace, and the same for all variants.
A fixed budget is chosen anew for each order and rate: the one of several with most attainment. Two processes.
"""

import argparse
import json
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import PlannedRequest  # noqa: E402
from orchestrator.bench.summary import summarise  # noqa: E402
from orchestrator.bench.trace import TraceRow, read_trace  # noqa: E402
from orchestrator.control.declared import DeclaredWorker, WorkerResources  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from orchestrator.sim.capacity import estimate  # noqa: E402
from orchestrator.sim.coarse_loads import of_trace  # noqa: E402
from orchestrator.sim.simulation import SimConfig, Simulation  # noqa: E402
from workers import profile  # noqa: E402
from workers.api import EngineConfig, KvTransferConfig, Phase, PrefillOrder, StepBudget, WorkerId  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402
from workers.step_shape import DeviceShape, chunk, decodes  # noqa: E402

TRACE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
SEEDS, QUICK_SEEDS = range(5), range(2)
MAX_CONTEXT_TOKENS = 8192
#: docs/simulation.md: what of SmolLM2-135M in float32 took how long on one thread of an AMD EPYC, in seconds.
CPU = DeviceShape("cpu", 80e9, 20e9, 12e9, 0.002, 64e9, 1e9, is_reading_hidden=False)
CPU_STEPS = (
    (decodes(1, 128), 0.0357),
    (decodes(8, 8 * 128), 0.0702),
    (decodes(32, 32 * 128), 0.1245),
    (decodes(8, 8 * 1024), 0.0998),
    (chunk(64), 0.1667),
    (chunk(512), 1.3287),
    (chunk(128, 1536), 0.5629),
    (decodes(8, 8 * 512) + chunk(248), 0.6832),
)
BOTH = frozenset({Phase.PREFILL, Phase.DECODE})


@dataclass(frozen=True)
class Setup:
    """divisor: of the lengths of the trace. budgets: fixed ones; the largest bounds those that are predicted."""

    name: str
    latency: LatencyModel
    slo: Slo
    divisor: int
    engine: EngineConfig
    budgets: tuple[int, ...]
    rates_rps: tuple[float, ...]
    num_requests: int


def cpu_model(path: Path | None) -> LatencyModel:
    if path is not None:
        return LatencyModel.fitted(profile.from_json(path.read_text(), file=str(path)).costs)
    model = LatencyModel(MODELS["smollm2-135m"], CPU)
    for _ in range(100):
        for shape, seconds in CPU_STEPS:
            model.observe(shape, seconds)
    return LatencyModel.fitted(model.costs())


def setups(path: Path | None) -> list[Setup]:
    cpu = cpu_model(path)
    h100 = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
    engine = EngineConfig(max_waiting_requests=10_000, growth_reserve=0.25)
    small = replace(engine, kv_cache_bytes=2**30, max_running_sequences=16)
    large = replace(engine, kv_cache_bytes=50 * 10**9, max_running_sequences=256)
    return [
        Setup("cpu", cpu, Slo(2.0, 0.1), 16, small, (32, 48, 64, 128, 256), (1.0, 1.5, 2.0, 2.5, 3.0), 200),
        Setup("cpu_long", cpu, Slo(2.0, 0.1), 4, small, (64, 128, 256), (0.15, 0.25, 0.35), 80),
        Setup("h100", h100, Slo(0.5, 0.03), 1, large, (512, 1024, 2048), (18, 21, 23, 25, 27), 400),
    ]


@dataclass(frozen=True)
class Variant:
    """budget: None where it is predicted."""

    order: PrefillOrder
    budget: int | None

    def engine(self, setup: Setup) -> EngineConfig:
        kind = StepBudget.FIXED if self.budget is not None else StepBudget.PREDICTED
        most = self.budget if self.budget is not None else max(setup.budgets)
        return replace(setup.engine, prefill_order=self.order, step_budget=kind, token_budget=most)


def plan_of(setup: Setup, path: Path, rate_rps: float, seed: int) -> tuple[list[PlannedRequest], float]:
    duration_s = setup.num_requests / rate_rps
    found = of_trace(
        read_trace(path), setup.slo, random.Random(seed), rate_rps=rate_rps, duration_s=duration_s
    )
    plan = []
    for number, one in enumerate(found, start=1):
        output = max(1, one.output_tokens // setup.divisor)
        prompt = min(max(1, one.prompt_tokens // setup.divisor), MAX_CONTEXT_TOKENS - output)
        row = TraceRow(number, one.arrival_s, prompt, output, ())
        plan.append(PlannedRequest(row, one.arrival_s, prompt, output))
    return plan, duration_s


def attainment(job: tuple[Variant, float, int], setup: Setup, path: Path) -> dict[str, float]:
    variant, rate_rps, seed = job
    plan, duration_s = plan_of(setup, path, rate_rps, seed)
    declared = DeclaredWorker(
        WorkerId("both-0"),
        BOTH,
        "simulated",
        WorkerResources(1, 0, None),
        variant.engine(setup),
        KvTransferConfig(),
    )
    config = SimConfig(
        (declared,),
        setup.latency,
        seed=seed,
        slo=setup.slo,
        max_context_tokens=MAX_CONTEXT_TOKENS,
    )
    load = Simulation(config, plan, duration_s).run().load
    found = summarise(load, setup.slo)
    assert found.ttft_s is not None
    assert found.tpot_s is not None
    return {
        "attainment": found.attainment or 0.0,
        "ttft_p50_s": found.ttft_s.p50,
        "ttft_p90_s": found.ttft_s.p90,
        "ttft_p99_s": found.ttft_s.p99,
        "tpot_p90_s": found.tpot_s.p90,
    }


def measure(setup: Setup, path: Path, seeds: range, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """A row for each variant and rate, with all seeds."""
    variants = [Variant(order, budget) for order in PrefillOrder for budget in (*setup.budgets, None)]
    jobs = [(variant, rate, seed) for variant in variants for rate in setup.rates_rps for seed in seeds]
    found = list(pool.map(partial(attainment, setup=setup, path=path), jobs))
    rows = []
    for first in range(0, len(jobs), len(seeds)):
        variant, rate, _ = jobs[first]
        some = found[first : first + len(seeds)]
        share = estimate([one["attainment"] for one in some])
        means = {name: sum(one[name] for one in some) / len(some) for name in some[0]}
        rows.append(
            {
                "setup": setup.name,
                "order": variant.order.value,
                "budget": variant.budget,
                "rate_rps": rate,
                **means,
                "half_interval": share.half,
                "by_seed": [one["attainment"] for one in some],
            }
        )
    return rows


def shown(rows: list[dict[str, Any]], setup: Setup) -> list[str]:
    """Attainment with half of its interval, and TTFT at p99 in seconds; beside fixed budgets the one that it is of."""
    lines = [f"{'order':<20}{'budget':<11}" + "".join(f"{f'{rate:g}/s':>27}" for rate in setup.rates_rps)]
    for order in PrefillOrder:
        for is_fixed in (True, False):
            cells = ""
            for rate in setup.rates_rps:
                some = [
                    one
                    for one in rows
                    if (one["order"], one["rate_rps"]) == (order, rate)
                    and (one["budget"] is not None) == is_fixed
                ]
                best = max(some, key=lambda one: (one["attainment"], -(one["budget"] or 0)))
                of = f" @{best['budget']}" if is_fixed else ""
                share = f"{best['attainment']:.1%} +-{best['half_interval']:.1%}"
                cells += format(f"{share}, {best['ttft_p99_s']:.2f}{of}", ">27")
            lines.append(f"{order.value:<20}{'best fixed' if is_fixed else 'predicted':<11}{cells}")
    return lines


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, three rates")
    parser.add_argument("--trace", type=Path, default=TRACE, metavar="FILE", help="Azure CSV")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of `phasewise calibrate`, for cpu")
    parser.add_argument("--only", choices=("cpu", "cpu_long", "h100"), help="one setup")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    began_s = time.monotonic()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[dict[str, Any]] = []
    about = {"date": date, "machine": describe_machine(), "trace": args.trace.name}
    with ProcessPoolExecutor(2) as pool:
        for setup in setups(args.profile):
            if args.only not in (None, setup.name):
                continue
            if args.quick:
                setup = replace(setup, rates_rps=setup.rates_rps[::2], num_requests=100)
            found = measure(setup, args.trace, QUICK_SEEDS if args.quick else SEEDS, pool)
            slo = setup.slo
            print(
                f"\n{setup.name}: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s * 1e3:g} ms; attainment, TTFT p99 in s"
            )
            print("\n".join(shown(found, setup)), flush=True)
            rows += found
            if args.json:
                result = {"format": "phasewise-step-choice/v1", **about, "rows": rows}
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
