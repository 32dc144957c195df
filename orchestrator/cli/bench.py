"""`phasewise bench`: replay a request trace against a deployment and measure it."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from orchestrator.bench.load import LoadProgress
from orchestrator.bench.machine import describe_machine
from orchestrator.bench.plan import Slice, take_slice
from orchestrator.bench.records import BenchConfig
from orchestrator.bench.report import as_json, lines
from orchestrator.bench.runner import run_bench
from orchestrator.bench.summary import BenchResult
from orchestrator.bench.trace import Trace, read_trace
from orchestrator.cli import arguments, exit_codes, target
from orchestrator.cli.progress import shown_progress
from orchestrator.control.slo import Slo
from orchestrator.errors import (
    AddressInUse,
    AddressUnusable,
    AlreadyRunning,
    GatewayUnreachable,
    LaunchFailed,
    ManifestError,
    TraceError,
)
from orchestrator.manifest.load import load
from orchestrator.manifest.models import Deployment

DEFAULT_TIMEOUT_S = 300.0

EXAMPLES = """\
examples:
  start the deployment, measure it, stop it; targets come from the manifest:
    phasewise bench deploy/manifests/laptop.yaml --trace azure.csv --rate 0.5 --duration 60
  measure what runs already:
    phasewise bench --address 127.0.0.1:8480 --trace mooncake.jsonl --rate 2 --duration 120 \\
        --slo-ttft-ms 2000 --slo-tpot-ms 100 --max-prompt-tokens 1024 --json result.json

Ctrl-C sends no more requests, cancels those without an answer and still reports.

exit codes: 0 measured, 1 no request finished, the deployment did not start or the result cannot be saved,
2 wrong command line or trace, 3 manifest not valid, 4 no gateway at the address, 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="replay a request trace and measure TTFT, TPOT, ITL and goodput",
        description="Replay a request trace in an open loop: requests are sent when they are due, whatever\n"
        "became of those before. What the numbers mean is in docs/benchmarking.md.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "manifest", nargs="?", type=Path, metavar="MANIFEST", help="start this deployment first"
    )
    where.add_argument(
        "--address", type=arguments.address, metavar="HOST:PORT", help="a gateway that runs already"
    )
    parser.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="Azure CSV or Mooncake JSON lines"
    )
    parser.add_argument(
        "--rate", type=arguments.number, required=True, metavar="R", help="mean requests per second"
    )
    parser.add_argument(
        "--duration", type=arguments.number, required=True, metavar="S", help="seconds of arrivals"
    )
    parser.add_argument(
        "--slo-ttft-ms", type=arguments.number, metavar="MS", help="target (default: the manifest's)"
    )
    parser.add_argument(
        "--slo-tpot-ms", type=arguments.number, metavar="MS", help="target (default: the manifest's)"
    )
    parser.add_argument(
        "--first-row", type=arguments.count, default=1, metavar="N", help="row to begin with (default: 1)"
    )
    parser.add_argument("--max-prompt-tokens", type=arguments.count, metavar="N", help="clip longer prompts")
    parser.add_argument("--max-output-tokens", type=arguments.count, metavar="N", help="clip longer outputs")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens in the prompts (default: 0)")
    parser.add_argument(
        "--timeout-s",
        type=arguments.number,
        metavar="S",
        help=f"deadline of a request (default: the manifest's, or {DEFAULT_TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--max-in-flight",
        type=arguments.count,
        default=2000,
        metavar="N",
        help="requests without an answer; one more is not sent and counts as failed (default: 2000)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything that was measured")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        deployment = load(args.manifest) if args.manifest else None
        config = _config(args, deployment)
        trace = read_trace(args.trace)
        part = take_slice(
            trace, rate_rps=config.rate_rps, duration_s=config.duration_s, first_row=config.first_row
        )
        if any(row.num_images for row in part.rows):
            print(
                f"{args.trace}: its pictures are not sent; prompts have their lengths as they are",
                file=sys.stderr,
            )
        with _gateway(args, deployment) as address:
            print(f"{address}: {len(part.rows)} requests in {config.duration_s:g} s", file=sys.stderr)
            try:
                result = asyncio.run(_measure(address, part, config))
            except grpc.RpcError as error:
                return target.failed(address, error)
    except ManifestError as error:
        return _failed(str(error), exit_codes.INVALID_MANIFEST)
    except (TraceError, argparse.ArgumentTypeError) as error:
        return _failed(str(error), exit_codes.USAGE)
    except GatewayUnreachable as error:
        return _failed(str(error), exit_codes.UNREACHABLE)
    except (AlreadyRunning, AddressInUse, AddressUnusable, LaunchFailed) as error:
        return _failed(str(error), exit_codes.FAILURE)
    return _report(args, trace, part, config, result)


def _failed(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code


def _config(args: argparse.Namespace, deployment: Deployment | None) -> BenchConfig:
    """What was asked for. Raises argparse.ArgumentTypeError when something is missing."""
    ttft_ms = args.slo_ttft_ms or (deployment.spec.slo.ttft_ms if deployment else None)
    tpot_ms = args.slo_tpot_ms or (deployment.spec.slo.tpot_ms if deployment else None)
    if ttft_ms is None or tpot_ms is None:
        raise argparse.ArgumentTypeError("with --address, --slo-ttft-ms and --slo-tpot-ms are needed")
    if args.json and not args.json.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"--json {args.json}: there is no such folder")
    timeout_s = deployment.spec.gateway.request_timeout_s if deployment else DEFAULT_TIMEOUT_S
    return BenchConfig(
        rate_rps=args.rate,
        duration_s=args.duration,
        first_row=args.first_row,
        slo=Slo(ttft_ms / 1000, tpot_ms / 1000),
        seed=args.seed,
        timeout_s=args.timeout_s or timeout_s,
        max_in_flight=args.max_in_flight,
        max_prompt_tokens=args.max_prompt_tokens,
        max_output_tokens=args.max_output_tokens,
    )


@contextmanager
def _gateway(args: argparse.Namespace, deployment: Deployment | None) -> Iterator[str]:
    """The address of the gateway; a deployment is started for it and stopped afterwards."""
    if deployment is None:
        yield str(args.address)
        return
    # Ray takes seconds to import, and only this way in needs it.
    from orchestrator.runtime.launch import local_deployment

    with local_deployment(deployment, shown_progress) as running:
        yield running.address


async def _measure(address: str, part: Slice, config: BenchConfig) -> BenchResult:
    stop = asyncio.Event()
    with _stopped_by_signals(stop), _progress_bar(len(part.rows)) as on_progress:
        return await run_bench(address, part, config, stop=stop, on_progress=on_progress)


@contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; the second does what it did before."""
    loop = asyncio.get_running_loop()
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in earlier.items():
            if loop.remove_signal_handler(number):
                signal.signal(number, handler)

    def stop_once() -> None:
        stop.set()
        restore()

    for number in earlier:
        loop.add_signal_handler(number, stop_once)
    try:
        yield
    finally:
        restore()


@contextmanager
def _progress_bar(num_requests: int) -> Iterator[Callable[[LoadProgress], None]]:
    """On a terminal; elsewhere a line for each tenth of the answers."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(num_requests)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answered, {task.fields[sent]} sent, {task.fields[failed]} failed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("requests", total=num_requests, sent=0, failed=0)

        def update(now: LoadProgress) -> None:
            answered = now.num_finished + now.num_failed
            bar.update(task, completed=answered, sent=now.num_sent, failed=now.num_failed)

        yield update


def _progress_lines(num_requests: int) -> Callable[[LoadProgress], None]:
    num_tenths = 0

    def update(now: LoadProgress) -> None:
        nonlocal num_tenths
        answered = now.num_finished + now.num_failed
        if 10 * answered // num_requests > num_tenths:
            num_tenths = 10 * answered // num_requests
            text = f"{answered}/{num_requests} answered, {now.num_sent} sent, {now.num_failed} failed"
            print(text, file=sys.stderr)

    return update


def _report(
    args: argparse.Namespace, trace: Trace, part: Slice, config: BenchConfig, result: BenchResult
) -> int:
    print("\n".join(lines(trace, part, config, result)))
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = as_json(trace, part, config, result, machine=describe_machine(), date=date)
        try:
            args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return _failed(f"{args.json} cannot be written: {error.strerror}", exit_codes.FAILURE)
        print(f"saved      {args.json}")
    if result.load.was_interrupted:
        return exit_codes.INTERRUPTED
    return exit_codes.OK if result.summary.num_finished else exit_codes.FAILURE
