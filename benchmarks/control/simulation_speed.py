"""How many times faster than it would serve a cluster is simulated, and what the time of that goes to.

    python benchmarks/control/simulation_speed.py [--quick] [--json FILE]

Rows of the Azure conversation trace at 20 requests a second on workers of Llama-3-8B's shape, an H100 each (docs/simulation.md). Time of the
processor, in one process, from the first arrival to the last answer and with the check at the end; reading the trace is left out. The least of
the runs is told, since others use most machines too. `stepping` takes each step by itself (orchestrator/sim/leap.py), in the same rounds. What the time goes to is sampled, each
millisecond of processor time, in further runs.
"""

import argparse
import json
import signal
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import PlannedRequest, plan_requests, take_slice  # noqa: E402
from orchestrator.bench.trace import read_trace  # noqa: E402
from orchestrator.cli.collector import without_collector  # noqa: E402
from orchestrator.control.declared import DeclaredWorker, WorkerResources  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.sim.simulation import SimConfig, Simulation  # noqa: E402
from workers.api import EngineConfig, KvTransferConfig, Phase, PhaseSet, WorkerId  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402

TRACE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
RATE_RPS = 20.0
PREFILL, DECODE = frozenset({Phase.PREFILL}), frozenset({Phase.DECODE})
SHAPES: dict[str, tuple[PhaseSet, ...]] = {
    "1 x prefill and decode": (PREFILL | DECODE,),
    "8 x prefill and decode": (PREFILL | DECODE,) * 8,
    "4 x prefill, 4 x decode": (PREFILL,) * 4 + (DECODE,) * 4,
}
ENGINE = EngineConfig(
    kv_cache_bytes=50 * 10**9, token_budget=2048, max_running_sequences=256, max_waiting_requests=10_000
)
LATENCY = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
#: Seen from the inside: the first of these that a sample is in is what it counts for.
PARTS = {
    "Simulation.check_invariants": "check at the end",
    "SimCluster._tick": "controller's ticks",
    "Simulation._arrive": "arrivals: tokens of the prompt, routing",
    "SimWorker._fill_blocks": "blocks that a leap fills: names, books, index",
    "SimWorker._steps": "other steps of leaps",
    "SimLinks._read": "tokens that came before: gateway, client",
    "SimLinks.events_came": "other messages: gateway, client",
    "SimLinks.read_caches": "the gateway's index of blocks",
    "SimWorker._turn": "engine, before a step: requests, plan, blocks of prompts",
    "SimWorker._step_done": "engine, after a step",
    "SimWorker._layers_done": "transfers",
    "SimTransfers.frame_came": "transfers",
    "SimTransfers.handle": "transfers",
    "_Side.post": "transfers",
}


def simulation_of(
    shape: str, plan: list[PlannedRequest], duration_s: float, *, is_leaping: bool = True
) -> Simulation:
    declared = tuple(
        DeclaredWorker(WorkerId(f"w-{i}"), one, "simulated", WorkerResources(1), ENGINE, KvTransferConfig())
        for i, one in enumerate(SHAPES[shape])
    )
    config = SimConfig(declared, LATENCY, max_context_tokens=32_768, is_leaping=is_leaping)
    return Simulation(config, plan, duration_s)


def cpu_s(simulation: Simulation) -> tuple[float, float]:
    """Of a run: seconds of the processor, and that were simulated."""
    # As `phasewise simulate` does.
    with without_collector():
        began_s = time.process_time()
        simulated_s = simulation.run().load.elapsed_s
        return time.process_time() - began_s, simulated_s


class Sampler:
    """Counts the parts in which the processor is while it is on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)

    def _sample(self, _signal: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code.co_qualname not in PARTS:
            frame = frame.f_back
        self.counts[PARTS[frame.f_code.co_qualname] if frame is not None else "clock and its heap"] += 1

    def shares(self) -> dict[str, float]:
        return {part: num / self.counts.total() for part, num in self.counts.most_common()}


def measure(shape: str, plan: list[PlannedRequest], duration_s: float, num_rounds: int) -> dict[str, Any]:
    leaping, stepping, simulated_s = [], [], 0.0
    for _ in range(num_rounds):
        leaping_s, simulated_s = cpu_s(simulation_of(shape, plan, duration_s))
        leaping.append(leaping_s)
        stepping.append(cpu_s(simulation_of(shape, plan, duration_s, is_leaping=False))[0])
    sampler = Sampler()
    # The kernel takes few samples in a run.
    for _ in range(2 * num_rounds):
        simulation = simulation_of(shape, plan, duration_s)
        with without_collector(), sampler:
            simulation.run()
    return {
        "shape": shape,
        "simulated_s": simulated_s,
        "cpu_s": min(leaping),
        "stepping_cpu_s": min(stepping),
        "runs_s": leaping,
        "shares": sampler.shares(),
    }


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests, one round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    duration_s, num_rounds = (2.5, 1) if args.quick else (10.0, 9)
    plan = plan_requests(
        take_slice(read_trace(TRACE), rate_rps=RATE_RPS, duration_s=duration_s), max_context_tokens=32_768
    )
    num_tokens = sum(one.output_tokens for one in plan)
    rows = []
    print(f"{len(plan)} requests, {num_tokens} tokens of output")
    print(
        f"{'shape':<26}{'simulated s':>12}{'CPU s':>8}{'times real':>12}{'us a token':>12}{'times stepping':>16}"
    )
    for shape in SHAPES:
        row = measure(shape, plan, duration_s, num_rounds)
        rows.append(row)
        times, token_us = row["simulated_s"] / row["cpu_s"], row["cpu_s"] / num_tokens * 1e6
        faster = row["stepping_cpu_s"] / row["cpu_s"]
        print(
            f"{shape:<26}{row['simulated_s']:>12.1f}{row['cpu_s']:>8.2f}{times:>12.1f}{token_us:>12.1f}{faster:>16.2f}",
            flush=True,
        )
    for row in rows:
        print(f"\n{row['shape']}:")
        for part, share in row["shares"].items():
            print(f"{share:>7.1%}{share * row['cpu_s'] / len(plan) * 1e6:>7.0f} us a request  {part}")
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "rate_rps": RATE_RPS, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
