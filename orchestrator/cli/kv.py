"""`phasewise kv`: who holds the KV blocks of the workers."""

import argparse
import json
import sys

import grpc

from orchestrator import interruptible
from orchestrator.cli import exit_codes, ledger_text, target
from orchestrator.cli.ledger_text import WorkerLedger
from orchestrator.errors import DeploymentNotFound
from orchestrator.runtime.registry import Registry
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceStub
from workers.api import WorkerId
from workers.kv_wire import ledger_from_pb

#: The gateway gives each worker less.
ANSWER_TIMEOUT_S = 20.0

EXAMPLES = """\
examples:
  phasewise kv ledger
  phasewise kv ledger decode-0
  phasewise kv ledger --json > ledger.json

A worker that does not answer has a line that says why, and is no failure of the command.

exit codes: 0 every block is accounted for, 1 a worker has leaked blocks, or no worker of that name is
declared, 2 wrong command line, 4 no such deployment, or its gateway does not answer
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "kv",
        help="show who holds the KV blocks of the workers",
        description="What the workers' KV block pools are used for.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ledger = parser.add_subparsers(dest="what", required=True, metavar="ledger").add_parser(
        "ledger",
        help="every owner of KV blocks, its lease, generation and age",
        description="Every owner of KV blocks of each worker, with lease, generation and age, and totals that sum to\n"
        "the block pool.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ledger.add_argument("worker", nargs="?", default="", metavar="WORKER", help="one worker (default: all)")
    target.add_control_arguments(ledger)
    ledger.add_argument("--json", action="store_true", help="for programs")
    ledger.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        address = target.control_address(args, Registry())
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    try:
        found = interruptible.run(ask(address, args.worker))
    except grpc.RpcError as error:
        return target.failed(address, error)
    if args.json:
        print(json.dumps(ledger_text.as_json(found)))
    else:
        print("\n\n".join("\n".join(ledger_text.lines(one)) for one in found))
    wrong = [one.worker_id for one in found if not one.is_right]
    if wrong:
        print(f"the KV blocks of {', '.join(wrong)} do not add up: a bug, to be reported", file=sys.stderr)
    return exit_codes.FAILURE if wrong else exit_codes.OK


async def ask(address: str, worker_id: str) -> list[WorkerLedger]:
    """What the workers say by way of the gateway; all of them when `worker_id` is empty. Raises grpc.RpcError."""
    async with target.connect(address) as channel:
        answer = await GatewayControlServiceStub(channel).GetKvLedger(
            pb.GetKvLedgerRequest(worker_id=worker_id), timeout=ANSWER_TIMEOUT_S
        )
    return [
        WorkerLedger(
            WorkerId(one.worker_id),
            one.incarnation,
            ledger_from_pb(one.ledger) if one.HasField("ledger") else None,
            one.problem,
        )
        for one in answer.workers
    ]
