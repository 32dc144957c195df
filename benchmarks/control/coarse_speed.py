"""How many times faster than it would serve a cluster of a thousand workers is simulated coarsely, and what one decision takes.

    python benchmarks/control/coarse_speed.py [--quick] [--json FILE]

Lengths of the Azure conversation trace, Poisson arrivals at 5 and 10 requests a second and worker (its capacity is about 20), Llama-3-8B's shape on H100 (docs/simulation.md).
One tick of phasewise decides the phases of all workers. Times are of the processor, in one process: what else a machine does is not in them.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.trace import read_trace  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.control.policies.catalogue import POLICIES, D, P, Setting, Workload, orders  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from orchestrator.sim.coarse import CoarseConfig, CoarseSimulation  # noqa: E402
from orchestrator.sim.coarse_costs import CoarseCosts  # noqa: E402
from orchestrator.sim.coarse_request import CoarseRequest  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402

TRACE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
RATES_RPS, NUM_TICKS = (5.0, 10.0), 50
SLO = Slo(0.5, 0.03)
LATENCY = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
COSTS = CoarseCosts.of(LATENCY)


def poisson(rate_rps: float, duration_s: float) -> list[CoarseRequest]:
    rng, rows = random.Random(1), read_trace(TRACE).rows
    at_s, found = 0.0, []
    while at_s < duration_s:
        row = rng.choice(rows)
        found.append(CoarseRequest(at_s, row.prompt_tokens, row.output_tokens, SLO))
        at_s += rng.expovariate(rate_rps)
    return found


def measure(name: str, num_workers: int, rate_rps: float, duration_s: float) -> dict[str, Any]:
    split = (P,) * (num_workers // 2) + (D,) * (num_workers // 2)
    setting = Setting(
        num_workers, LATENCY, SLO, Workload(1155.0, 211.0, 0.0), split, COSTS.kv_token_s, COSTS.tile_s, split
    )
    order = "slack" if name.startswith("phasewise") else "fcfs"
    policy = POLICIES[name](setting, orders(COSTS.step, SLO)[order])
    requests = poisson(rate_rps * num_workers, duration_s)
    simulation = CoarseSimulation(CoarseConfig(COSTS, 400_000), policy, requests)
    began_s = time.process_time()
    result = simulation.run()
    cpu_s = time.process_time() - began_s
    row: dict[str, Any] = {
        "policy": name,
        "num_workers": num_workers,
        "rate_rps_each": rate_rps,
        "num_requests": len(requests),
        "simulated_s": result.elapsed_s,
        "cpu_s": cpu_s,
        "request_us": 1e6 * cpu_s / len(requests),
        "attainment": result.attainment,
    }
    if name.startswith("phasewise"):
        row["tick_ms"] = tick_ms(simulation)
    return row


def tick_ms(simulation: CoarseSimulation) -> dict[str, float]:
    """Of a cluster that is too busy for its shape, so that every move is looked at: the median, and the slowest."""
    cluster, tick = simulation.cluster, simulation.policy.tick
    now_s, found = simulation.timers.time() + 1e6, []
    for _ in range(NUM_TICKS):
        now_s += 100.0
        for one in cluster.prefill:
            one.prefill_tokens = 200_000
        began_s = time.process_time()
        tick(now_s, cluster)
        found.append(1e3 * (time.process_time() - began_s))
    return {"p50": statistics.median(found), "max": max(found)}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    gc.disable()
    duration_s, rows = 2.0 if args.quick else 10.0, []
    print(
        f"{'policy':<18}{'workers':>8}{'req/s each':>11}{'requests':>10}{'simulated s':>12}{'CPU s':>8}{'times real':>11}{'us/request':>11}  tick ms"
    )
    for name in ("sarathi", "static_split", "phasewise", "phasewise_apart"):
        for num_workers, rate in product((8, 1000), RATES_RPS):
            row = measure(name, num_workers, rate, duration_s)
            rows.append(row)
            tick = row.get("tick_ms")
            shown = f"{tick['p50']:.2f} (max {tick['max']:.2f})" if tick else ""
            times = row["simulated_s"] / row["cpu_s"]
            numbers = (
                f"{row['simulated_s']:>12.1f}{row['cpu_s']:>8.2f}{times:>11.1f}{row['request_us']:>11.0f}"
            )
            print(
                f"{name:<18}{num_workers:>8}{rate:>11g}{row['num_requests']:>10}{numbers}  {shown}",
                flush=True,
            )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
