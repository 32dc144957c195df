"""`phasewise explain`: what became of a request, and why."""

import argparse
import json
import sys
from typing import Any

import grpc

from orchestrator import interruptible
from orchestrator.cli import arguments, exit_codes, explain_text, target
from orchestrator.cli.proto_json import fields
from orchestrator.errors import DeploymentNotFound
from orchestrator.runtime.registry import Registry
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceStub

ANSWER_TIMEOUT_S = 3.0

EXAMPLES = """\
examples:
  phasewise generate "Once upon a time" --json | head -1     # has the request_id
  phasewise explain 5f3c21a94d
  phasewise explain 5f3c21a94d --json

The gateway remembers the requests that run and the last 1000 that ended, until it is stopped.

exit codes: 0 told, 1 no request of this id is remembered, 2 wrong command line, 4 no such deployment, or its
gateway does not answer
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "explain",
        help="tell what became of a request, and why",
        description="Tell the states that a request went through, its workers and why they were chosen, how its KV was\n"
        "transferred, and why it was tried again or failed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("request_id", type=arguments.utf8, metavar="REQUEST_ID", help="as in the answer")
    target.add_control_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        address = target.control_address(args, Registry())
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    try:
        record = interruptible.run(ask(address, args.request_id))
    except grpc.RpcError as error:
        return target.failed(address, error)
    if args.json:
        print(json.dumps(as_json(record)))
    else:
        print("\n".join(explain_text.lines(record)))
    return exit_codes.OK


def as_json(record: pb.RequestRecord) -> dict[str, Any]:
    """The names are those of control.proto; durations are in seconds. `transfer` is null where there was none."""
    return {**fields(record), "samples": [_sample(sample) for sample in record.samples]}


def _sample(sample: pb.SampleRecord) -> dict[str, Any]:
    return {
        **fields(sample),
        "states": [{**fields(one), "state": explain_text.state_name(one.state)} for one in sample.states],
        "attempts": [
            {
                **fields(one),
                "transfer": fields(one.transfer) if one.HasField("transfer") else None,
                "encodes": [fields(shard) for shard in one.encodes],
            }
            for one in sample.attempts
        ],
    }


async def ask(address: str, request_id: str) -> pb.RequestRecord:
    """What the gateway remembers. Raises grpc.RpcError."""
    async with target.connect(address) as channel:
        answer = await GatewayControlServiceStub(channel).Explain(
            pb.ExplainRequest(request_id=request_id), timeout=ANSWER_TIMEOUT_S
        )
    return answer.record
