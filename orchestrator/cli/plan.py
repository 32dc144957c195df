"""`phasewise plan`: which shape of a cluster serves a load best."""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

from orchestrator.bench.trace import read_trace
from orchestrator.cli import arguments, exit_codes, step_times, table
from orchestrator.control.slo import Slo
from orchestrator.errors import TraceError
from orchestrator.manifest.engine import MIB
from orchestrator.manifest.load import load as load_manifest
from orchestrator.planner import load as loads
from orchestrator.planner import manifest
from orchestrator.planner.load import Load
from orchestrator.planner.report import LONGER, Row, Verdict, as_json, chosen, interval_text, row, verdict
from orchestrator.planner.search import Found, search
from orchestrator.planner.shapes import Family, grids
from orchestrator.sim.capacity import MAX_SEEDS, Estimate
from orchestrator.sim.coarse_costs import why_not_encoding
from workers.errors import ProfileError
from workers.latency_model import LatencyModel

FORMAT = "phasewise-plan/v1"
#: Seconds between two lines of progress.
PROGRESS_S = 2.0
MIN_SEEDS, SEEDS = 3, 5
#: Seeds that candidates are chosen by: so far above those that the best are reported with.
SEARCH_SEED, NUM_SEARCH_SEEDS = 1000, 3
MAX_DEVICES = 64

EXAMPLES = """\
examples:
  eight H100, with the best shape as a manifest:
    phasewise plan --trace azure.csv --slo-ttft-ms 500 --slo-tpot-ms 30 --devices 8 --out planned.yaml
  with the step times of a machine, as `phasewise calibrate` has measured them:
    phasewise plan --trace azure.csv --slo-ttft-ms 500 --slo-tpot-ms 30 --devices 4 --profile mine.json
  fewer settings and half the time, in seconds:
    phasewise plan --trace azure.csv --slo-ttft-ms 500 --slo-tpot-ms 30 --devices 4 --quick

Every candidate is simulated coarsely on the same requests (docs/planning.md). Nothing is started and no model is read.
One seed gives one plan.

exit codes: 0 planned, 1 the targets cannot be met at all, 2 wrong command line or trace, 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="find the shape of a cluster that serves a load best",
        description="Find the shape of a cluster that serves a load best: which workers serve which phases, with which settings.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="Azure CSV or Mooncake JSON lines"
    )
    parser.add_argument(
        "--slo-ttft-ms", type=arguments.number, required=True, metavar="MS", help="target of the first token"
    )
    parser.add_argument(
        "--slo-tpot-ms", type=arguments.number, required=True, metavar="MS", help="target of each later token"
    )
    parser.add_argument(
        "--devices",
        type=_devices,
        required=True,
        metavar="N",
        help=f"workers, one on each: 1 to {MAX_DEVICES}",
    )
    step_times.add_arguments(parser)
    parser.add_argument(
        "--attainment",
        type=_share,
        default=0.9,
        metavar="X",
        help="share of requests that meet both targets, above 0 to 1 (default: 0.9)",
    )
    parser.add_argument(
        "--images",
        type=arguments.count_or_zero,
        default=0,
        metavar="N",
        help="pictures of each request, of 10 tiles each (default: 0)",
    )
    parser.add_argument(
        "--max-context-tokens",
        type=arguments.count,
        default=32_768,
        metavar="N",
        help="longer requests are clipped (default: 32768)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help=f"loads that the best are judged by, {MIN_SEEDS} to {MAX_SEEDS} (default: {SEEDS}, or {MIN_SEEDS} with --quick)",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the first of them (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer settings, shorter loads, fewer seeds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the best shape as a new manifest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything that came out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    problem = step_times.problem(args) or _problem(args)
    if problem:
        return _failed(problem, exit_codes.USAGE)
    try:
        latency = step_times.latency_of(args)
        problem = _too_little(args, latency)
        if problem:
            return _failed(problem, exit_codes.USAGE)
        trace = loads.clipped(read_trace(args.trace), args.max_context_tokens)
    except (TraceError, ProfileError) as error:
        return _failed(str(error), exit_codes.USAGE)
    slo = Slo(args.slo_ttft_ms / 1000, args.slo_tpot_ms / 1000)
    hopeless = _hopeless(
        args, slo, loads.alone(trace, latency, num_devices=args.devices, num_images=args.images)
    )
    if hopeless:
        return _failed(hopeless, exit_codes.FAILURE)
    highest = loads.highest_rps(trace, latency, num_devices=args.devices, num_images=args.images)
    load = Load(
        trace,
        slo,
        args.attainment,
        latency,
        num_devices=args.devices,
        num_images=args.images,
        kv_cache_bytes=loads.kv_cache_mib(latency) * MIB,
        duration_s=loads.long_enough_s(trace, slo, highest, is_quick=args.quick),
        highest_rps=highest,
    )
    rows = _rows(args, load)
    aggregated = rows[0]
    verdicts = [verdict(aggregated, one) for one in rows[1:]]
    print("\n".join(_lines(args, load, rows, verdicts)))
    return _write(args, load, rows, verdicts)


def _devices(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_DEVICES:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = arguments.number(text)
    if value > 1:
        raise ValueError
    return value


def _seeds(text: str) -> int:
    value = int(text)
    if not MIN_SEEDS <= value <= MAX_SEEDS:
        raise ValueError
    return value


_devices.__name__ = f"number of devices, 1 to {MAX_DEVICES}"
_share.__name__ = "share above 0 and at most 1"
_seeds.__name__ = f"number of seeds, {MIN_SEEDS} to {MAX_SEEDS}"


def _failed(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code


def _problem(args: argparse.Namespace) -> str | None:
    """Why nothing can be planned, and what to do."""
    for name, path in (("--json", args.json), ("--out", args.out)):
        if path and not path.absolute().parent.is_dir():
            return f"{name} {path}: there is no such folder"
    if args.out and args.out.exists():
        return f"--out {args.out}: is there already; name a new file"
    if args.max_context_tokens < 2:
        return "--max-context-tokens 1: a request has a prompt and an answer, 2 tokens at least"
    return None


def _too_little(args: argparse.Namespace, latency: LatencyModel) -> str | None:
    """What is not known of the device, or is not there."""
    model, device = latency.model, latency.device
    if args.images and (why_not := why_not_encoding(device.name)):
        return f"--images with {step_times.device_option(args)}: {why_not}"
    num_tokens = loads.kv_cache_mib(latency) * MIB // model.kv_token_bytes
    if num_tokens < args.max_context_tokens:
        weights = (model.num_weights + model.num_head_weights) * model.weight_bytes
        return (
            f"{model.name} has {weights / 1e9:.0f} GB of weights and one {device.name} {device.memory_bytes / 1e9:.0f} GB "
            f"of memory: there is room for the KV of {max(0, num_tokens)} tokens, and --max-context-tokens is {args.max_context_tokens}"
        )
    return None


def _hopeless(args: argparse.Namespace, slo: Slo, alone: loads.Alone) -> str | None:
    """Why no number of devices would help."""
    share = alone.share_met(slo)
    if share >= args.attainment:
        return None
    least, wanted = alone.at(args.attainment), f"{100 * args.attainment:g} %"
    return (
        f"no plan meets these targets: alone on idle devices, {100 * share:.3g} % of the requests meet both, and {wanted} are to. "
        f"{wanted} of them get their first token within {least.ttft_s * 1e3:.3g} ms at best and each later one "
        f"within {least.tpot_s * 1e3:.3g} ms; the targets are {slo.ttft_s * 1e3:g} and {slo.tpot_s * 1e3:g} ms"
    )


def _rows(args: argparse.Namespace, load: Load) -> list[Row]:
    """The best of each family that so many devices can have; the aggregated one is first."""
    seeds = range(args.seed, args.seed + (args.seeds or (MIN_SEEDS if args.quick else SEEDS)))
    first = args.seed + SEARCH_SEED
    rows, progress = [], _Progress()
    for family, grid in grids(args.devices, has_images=args.images > 0, is_quick=args.quick).items():
        print(f"{family}: {len(grid.candidates())} candidates", file=sys.stderr)
        found = search(
            grid, load, seeds=range(first, first + NUM_SEARCH_SEEDS), tell=partial(progress.tried, family)
        )
        if found is not None:
            rows.append(row(family, found, load, seeds, partial(progress.judged, family, len(seeds))))
    return rows


class _Progress:
    """A line now and then, from PROGRESS_S on."""

    def __init__(self) -> None:
        self._told_s = time.monotonic()

    def tried(self, family: Family, found: Found) -> None:
        """Of a search."""
        best = f"{found.candidate.shape}, {found.capacity_rps:.1f} req/s"
        self._tell(f"{family}: {found.num_tried} of {found.num_all} tried; best so far {best}")

    def judged(self, family: Family, num_seeds: int, num_done: int) -> None:
        """Of the best of a family."""
        self._tell(f"{family}: the best is judged by {num_done} of {num_seeds} loads")

    def _tell(self, line: str) -> None:
        if time.monotonic() - self._told_s > PROGRESS_S:
            self._told_s = time.monotonic()
            print(line, file=sys.stderr)


def _lines(args: argparse.Namespace, load: Load, rows: list[Row], verdicts: list[Verdict]) -> list[str]:
    images = f", {args.images} picture{'s' if args.images > 1 else ''} each" if args.images else ""
    target = f"TTFT {args.slo_ttft_ms:g} ms, TPOT {args.slo_tpot_ms:g} ms, met by {100 * args.attainment:g} %"
    found = [
        f"load       {load.trace.file}, {len(load.trace.rows)} requests{images}; loads of {load.duration_s:.0f} s, of {LONGER * load.duration_s:.0f} s for the best",
        f"cluster    {args.devices} x {load.latency.device.name}, {load.latency.model.name}, {load.kv_cache_bytes // MIB} MiB of KV each",
        f"targets    {target}",
        "",
    ]
    header = (
        "family",
        "best shape",
        "tokenBudget",
        "maxRunning",
        "prefillOrder",
        "req/s",
        "per device",
        "limit",
        "tried",
    )
    found += table.lines(
        header,
        [_cells(one, args.devices) for one in rows],
        left={"family", "best shape", "prefillOrder", "limit"},
    )
    num = len(rows[0].by_seed_rps)
    found += [
        "",
        f"req/s: mean of {num} loads that the search has not seen, and half of its 95 % interval",
        "",
    ]
    found += [one.sentence for one in verdicts] or ["one device has all phases: nothing can be apart"]
    return found


def _cells(one: Row, num_devices: int) -> list[str]:
    knobs, goodput = one.found.candidate.knobs, one.goodput_rps
    each = Estimate(goodput.mean / num_devices, goodput.half / num_devices)
    return [
        one.family,
        str(one.found.candidate.shape),
        str(knobs.token_budget),
        str(knobs.max_running_sequences),
        knobs.prefill_order,
        interval_text(goodput),
        f"{each.mean:.2f} +- {each.half:.2f}",
        one.misses.limit,
        f"{one.found.num_tried}/{one.found.num_all}",
    ]


def _write(args: argparse.Namespace, load: Load, rows: list[Row], verdicts: list[Verdict]) -> int:
    try:
        if args.json:
            data = {"format": FORMAT, **as_json(load, rows, verdicts)}
            args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            print(f"saved      {args.json}")
        if args.out:
            best = chosen(rows, verdicts)
            text = manifest.text(
                best.found.candidate,
                model=load.latency.model.name,
                slo=load.slo,
                kv_cache_bytes=load.kv_cache_bytes,
                comment=_comment(args, load, best),
            )
            args.out.write_text(text, encoding="utf-8")
            load_manifest(args.out)
            print(f"manifest   {args.out}: {best.found.candidate.shape}")
    except OSError as error:
        return _failed(f"{error.filename} cannot be written: {error.strerror}", exit_codes.FAILURE)
    return exit_codes.OK


def _comment(args: argparse.Namespace, load: Load, best: Row) -> str:
    return (
        f"By phasewise plan: {args.devices} x {load.latency.device.name} with {load.latency.model.name} for {args.trace.name}.\n"
        f"Simulated goodput: {interval_text(best.goodput_rps)} requests/s, at which {100 * args.attainment:g} % meet both targets."
    )
