"""`phasewise status`: what the deployments of this machine are doing."""

import argparse
import asyncio
import json
import sys
from asyncio import sleep
from contextlib import nullcontext

import grpc
from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator import interruptible
from orchestrator.cli import exit_codes, status_text, target
from orchestrator.cli.status_text import DeploymentStatus, GatewayReport
from orchestrator.control.view_wire import view_from_pb
from orchestrator.errors import DeploymentNotFound
from orchestrator.runtime.registry import Registry, RunningDeployment
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceStub

ANSWER_TIMEOUT_S = 3.0
REFRESH_S = 1.0

EXAMPLES = """\
examples:
  phasewise status
  phasewise status laptop --watch
  phasewise status --json > status.json

With --json every deployment is one line of JSON. --watch shows it anew every second until Ctrl-C.

exit codes: 0 all answer (or the watching was ended), 2 wrong command line, 4 no such deployment, or one
does not answer
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "status",
        help="show the workers of the deployments that run",
        description="Show the deployments that were started on this machine: requests, controller, and\n"
        "each worker's state, KV blocks and leases.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one deployment (default: all)")
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    registry = Registry()
    try:
        if args.watch:
            interruptible.run(watch(registry, args))
        found = interruptible.run(statuses(registry, args.name))
    except KeyboardInterrupt:
        if not args.watch:
            raise
        return exit_codes.OK
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    print(_as_text(found, args))
    return exit_codes.OK if all(one.report for one in found) else exit_codes.UNREACHABLE


async def statuses(registry: Registry, name: str | None) -> list[DeploymentStatus]:
    """Of the deployment `name`, or of all. Raises DeploymentNotFound when there is none."""
    running = registry.list() if name is None else [target.find(registry, name)]
    if not running:
        raise DeploymentNotFound(None, ())
    return list(await asyncio.gather(*(ask(one) for one in running)))


async def ask(running: RunningDeployment) -> DeploymentStatus:
    """What the gateway of one deployment says now."""
    # A new channel each time: a kept one would wait longer and longer before it tries a lost gateway again.
    async with target.connect(running.control_address) as channel:
        try:
            stub = GatewayControlServiceStub(channel)
            answer = await stub.GetView(pb.GetViewRequest(), timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            return DeploymentStatus(running, None, target.describe(running.control_address, error))
    report = GatewayReport(
        view=view_from_pb(answer.view) if answer.HasField("view") else None,
        age_s=answer.age_s,
        num_running=answer.num_running_requests,
        num_waiting=answer.num_waiting_requests,
        num_finished=answer.num_finished_requests,
        num_failed=answer.num_failed_requests,
        num_refused=answer.num_refused_requests,
    )
    return DeploymentStatus(running, report)


def _as_text(found: list[DeploymentStatus], args: argparse.Namespace) -> str:
    if args.json:
        return "\n".join(json.dumps(status_text.as_json(one)) for one in found)
    return "\n\n".join("\n".join(status_text.lines(one)) for one in found)


async def watch(registry: Registry, args: argparse.Namespace) -> None:
    """Show it again and again, in place on a terminal, until it is cancelled.

    Raises DeploymentNotFound once there is none.
    """
    console = Console()
    in_place = console.is_terminal and not args.json
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop") if in_place else None
    with live or nullcontext():
        while True:
            text = _as_text(await statuses(registry, args.name), args)
            if live:
                live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            else:
                print(text, flush=True)
            await sleep(REFRESH_S)
