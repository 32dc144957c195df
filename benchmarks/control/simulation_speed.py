"""How many times faster than it would serve a cluster is simulated.

    python benchmarks/control/simulation_speed.py [--quick] [--json FILE]

Rows of the Azure conversation trace at 20 requests a second on workers of Llama-3-8B's shape, an H100 each (docs/simulation.md), on one core.
The time of the simulation is from its first arrival to its last answer; reading the trace is left out.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import plan_requests, take_slice  # noqa: E402
from orchestrator.bench.trace import read_trace  # noqa: E402
from orchestrator.control.declared import DeclaredWorker, WorkerResources  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.sim.simulation import SimConfig, Simulation  # noqa: E402
from workers.api import EngineConfig, KvTransferConfig, Phase, WorkerId  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402

TRACE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
RATE_RPS = 20.0
PREFILL, DECODE = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
SHAPES = {
    "1 x prefill and decode": (PREFILL | DECODE,),
    "8 x prefill and decode": (PREFILL | DECODE,) * 8,
    "4 x prefill, 4 x decode": (PREFILL,) * 4 + (DECODE,) * 4,
}
ENGINE = EngineConfig(
    kv_cache_bytes=50 * 10**9, token_budget=2048, max_running_sequences=256, max_waiting_requests=10_000
)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    duration_s = 2.5 if args.quick else 10.0
    plan = plan_requests(
        take_slice(read_trace(TRACE), rate_rps=RATE_RPS, duration_s=duration_s), max_context_tokens=32_768
    )
    num_tokens = sum(one.output_tokens for one in plan)
    latency = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
    rows = []
    print(f"{len(plan)} requests, {num_tokens} tokens of output")
    print(f"{'shape':<26}{'simulated s':>12}{'wall s':>8}{'times real':>12}{'us a token':>12}")
    for name, phases in SHAPES.items():
        declared = tuple(
            DeclaredWorker(
                WorkerId(f"w-{i}"), one, "simulated", WorkerResources(1), ENGINE, KvTransferConfig()
            )
            for i, one in enumerate(phases)
        )
        simulation = Simulation(SimConfig(declared, latency, max_context_tokens=32_768), plan, duration_s)
        began_s = time.perf_counter()
        simulated_s = simulation.run().load.elapsed_s
        wall_s = time.perf_counter() - began_s
        row = {"shape": name, "simulated_s": simulated_s, "wall_s": wall_s, "token_s": wall_s / num_tokens}
        rows.append(row)
        times, token_us = simulated_s / wall_s, wall_s / num_tokens * 1e6
        print(f"{name:<26}{simulated_s:>12.1f}{wall_s:>8.2f}{times:>12.1f}{token_us:>12.1f}", flush=True)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "rate_rps": RATE_RPS, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
