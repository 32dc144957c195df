"""`phasewise switch`: have a worker serve other phases, while requests run."""

import argparse
import json
import sys

import grpc

from orchestrator import interruptible
from orchestrator.cli import exit_codes, target
from orchestrator.cli.switch_text import forecast_json, forecast_text, switch_json, switch_text
from orchestrator.control.view import SwitchState
from orchestrator.control.view_wire import switch_from_pb
from orchestrator.errors import DeploymentNotFound
from orchestrator.runtime.registry import Registry
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceStub
from workers.api import Phase, PhaseSet
from workers.wire import phases_to_pb

EXAMPLES = """\
examples:
  phasewise switch decode-0 prefill --dry-run
  phasewise switch decode-0 prefill
  phasewise switch worker-1 prefill,decode --reason "more prompts than answers today"

Phases are encode, prefill and decode, separated by commas. Prompts that wait at the worker go to others, sequences that it decodes
go on at others with their KV. Ctrl-C stops watching; the switch goes on, and `phasewise status` shows it.

exit codes: 0 the worker serves them (or may, with --dry-run), 1 it keeps those that it had, 2 wrong command line,
4 no such deployment, or its gateway or controller does not answer
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "switch",
        help="have a worker serve other phases, while requests run",
        description="Have a worker serve other phases, while requests run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("worker", metavar="WORKER", help="as `phasewise status` names it")
    parser.add_argument("phases", type=_phases, metavar="PHASES", help="such as prefill,decode")
    parser.add_argument("--dry-run", action="store_true", help="only say whether it may, and what would move")
    parser.add_argument("--reason", default="", metavar="TEXT", help="for whoever reads of it later")
    parser.add_argument("--json", action="store_true", help="a line for each state, for programs")
    target.add_control_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        address = target.control_address(args, Registry())
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    request = pb.SwitchPhasesRequest(
        worker_id=args.worker,
        phases=phases_to_pb(args.phases),
        is_dry_run=args.dry_run,
        reason=args.reason or "phasewise switch",
    )
    try:
        is_right = interruptible.run(_follow(address, request, is_json=args.json))
    except grpc.RpcError as error:
        return target.failed(address, error)
    return exit_codes.OK if is_right else exit_codes.FAILURE


async def _follow(address: str, request: pb.SwitchPhasesRequest, *, is_json: bool) -> bool:
    """Print what is said; whether the worker serves them at the end, or may."""
    is_right = False
    async with target.connect(address) as channel:
        async for progress in GatewayControlServiceStub(channel).SwitchPhases(request):
            if progress.HasField("forecast"):
                forecast = progress.forecast
                is_right = not forecast.problem
                print(json.dumps(forecast_json(forecast)) if is_json else forecast_text(forecast), flush=True)
            else:
                switch = switch_from_pb(progress.switch)
                is_right = switch.state in (SwitchState.CHANGED, SwitchState.PROVEN)
                print(json.dumps(switch_json(switch)) if is_json else switch_text(switch), flush=True)
    return is_right


def _phases(text: str) -> PhaseSet:
    try:
        found = frozenset(Phase(name.strip()) for name in text.replace("+", ",").split(","))
    except ValueError as error:
        known = ", ".join(phase.value for phase in Phase)
        raise argparse.ArgumentTypeError(f"{text!r}: phases are {known}, separated by commas") from error
    return found
