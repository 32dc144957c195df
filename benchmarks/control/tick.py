"""One tick of the controller over many workers: processes and statuses in, view, actions and switches out.

    python benchmarks/control/tick.py [--quick] [--json FILE]

All workers are ready and busy, as many prefill as decode, and the controller switches by itself. Processor time of `decide`, without the looking
and telling around it; collections of garbage in between are in it, and look past what was there at the beginning, as in the controller's process.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.control.auto_switch import SwitchMode  # noqa: E402
from orchestrator.control.controller import ControllerConfig, decide, recover  # noqa: E402
from orchestrator.control.declared import DeclaredWorker, WorkerResources  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.control.observation import GatewayNews, Observation, ProcessReport  # noqa: E402
from orchestrator.control.policies.policy import Totals  # noqa: E402
from orchestrator.control.slo import Slo, percentile  # noqa: E402
from workers.api import (  # noqa: E402
    BlockCounts,
    EngineConfig,
    KvTransferConfig,
    Phase,
    PhaseWork,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.latency_model import LatencyModel  # noqa: E402
from workers.step_shape import FactorSource  # noqa: E402

P, D = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
TICK_S = 0.5


def measure(num_workers: int, num_ticks: int) -> dict[str, float]:
    """Milliseconds of one tick."""
    costs = replace(LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"]).costs(), source=FactorSource.FITTED)
    declared = tuple(
        DeclaredWorker(
            WorkerId(f"w{i}"), P if i % 2 else D, "m", WorkerResources(1), EngineConfig(), KvTransferConfig()
        )
        for i in range(num_workers)
    )
    config = ControllerConfig("bench", "m", declared, slo=Slo(0.5, 0.03), switch_mode=SwitchMode.ON)
    reports = tuple(ProcessReport(one.worker_id, 1, f"{one.worker_id}:1") for one in declared)
    statuses = {
        (one.worker_id, 1): WorkerStatus(
            one.worker_id,
            1,
            one.phases,
            WorkerState.READY,
            blocks=BlockCounts(100, 100, 800, 0, 1000),
            work=PhaseWork(0, 4 if one.phases == P else 0, 60 if one.phases == D else 0, 4000, 50, 50_000),
            step_costs=costs,
        )
        for one in declared
    }
    state = recover(None, reports, config, 0.0)
    took_ms = []
    gc.collect()
    gc.freeze()
    for i in range(num_ticks):
        totals = Totals(100 * i, 100_000 * i, 0, 100 * i, 20_000 * i, 90 * i)
        observation = Observation(reports, statuses, GatewayNews((), totals, state.version))
        began_s = time.process_time()
        decide(i * TICK_S, observation, state, config)
        took_ms.append(1000 * (time.process_time() - began_s))
    # The first ones make all workers ready.
    ordered = sorted(took_ms[3:])
    return {
        "median_ms": statistics.median(ordered),
        "p99_ms": percentile(ordered, 99.0),
        "max_ms": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="40 ticks instead of 400")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    rows = [{"num_workers": num, **measure(num, 40 if args.quick else 400)} for num in (10, 100, 1000)]
    for row in rows:
        print(
            f"{row['num_workers']:5} workers: median {row['median_ms']:.2f} ms, p99 {row['p99_ms']:.2f}, max {row['max_ms']:.2f}"
        )
    if args.json:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        args.json.write_text(
            json.dumps({"machine": describe_machine(), "at": at, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
