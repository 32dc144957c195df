"""`phasewise decisions`: what was decided about phases, the number of workers and new requests, from what, and what came of it."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from orchestrator import interruptible
from orchestrator.cli import exit_codes, table, target
from orchestrator.cli.switch_text import refusals_json, refusals_text, scale_json, switch_json
from orchestrator.cli.transfer_text import counted, seconds
from orchestrator.cli.writable import file_problem, sentence
from orchestrator.control.role_switch import phase_text
from orchestrator.control.view import ScaleView, SwitchView
from orchestrator.control.view_wire import scale_from_pb, switch_from_pb
from orchestrator.errors import DeploymentNotFound
from orchestrator.runtime.registry import Registry
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceStub

ANSWER_TIMEOUT_S = 10.0
#: Refusals with less than this between them are told of as one in the table.
EPISODE_S = 60.0

EXAMPLES = """\
examples:
  phasewise decisions
  phasewise decisions --looks looks.jsonl
  phasewise replay-decisions looks.jsonl --policy epd_queue

PREDICTED is goodput after the decision over that before, as the policy expected it. MET is the part of the requests that met their
targets for 15 s before it was made and after it was carried out. WORKER (new) are requests that were refused. SEEN names what the policy saw, in the file that --looks writes.

exit codes: 0 it was told, 1 the file cannot be written, 2 wrong command line, 4 no such deployment, or its gateway does not answer
"""
_HEADER = ("AGO", "WORKER", "FROM", "TO", "STATE", "PREDICTED", "MET", "SEEN", "WHY")
_LEFT = ("WORKER", "FROM", "TO", "STATE", "MET", "SEEN", "WHY")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "decisions",
        help="show what was decided about phases, the number of workers and new requests, and what came of it",
        description="Show what was decided about phases, the number of workers and new requests, from what, and what came of it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target.add_control_arguments(parser)
    parser.add_argument("--json", action="store_true", help="a line for each decision, for programs")
    parser.add_argument(
        "--looks", type=Path, metavar="FILE", help="write what the policy saw, for replay-decisions"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    if args.looks and not args.looks.absolute().parent.is_dir():
        print(f"--looks {args.looks}: there is no such folder", file=sys.stderr)
        return exit_codes.USAGE
    if args.looks and (problem := file_problem(args.looks)):
        return _failed(problem)
    try:
        address = target.control_address(args, Registry())
    except DeploymentNotFound as error:
        print(error, file=sys.stderr)
        return exit_codes.UNREACHABLE
    try:
        answer = interruptible.run(ask(address, with_looks=args.looks is not None))
    except grpc.RpcError as error:
        return target.failed(address, error)
    if args.looks:
        lines = [json.dumps(MessageToDict(look, preserving_proto_field_name=True)) for look in answer.looks]
        try:
            args.looks.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            return _failed(sentence(args.looks, error))
        print(f"{len(lines)} looks are in {args.looks}", file=sys.stderr)
    if args.json:
        for one in answer.decisions:
            print(json.dumps({"age_s": one.age_s, **_json(one)}))
    else:
        print("\n".join(text_lines(answer)))
    return exit_codes.OK


def _failed(message: str) -> int:
    print(message, file=sys.stderr)
    return exit_codes.FAILURE


async def ask(address: str, *, with_looks: bool) -> pb.GetDecisionsResponse:
    """What the gateway remembers. Raises grpc.RpcError."""
    async with target.connect(address) as channel:
        request = pb.GetDecisionsRequest(with_looks=with_looks)
        return await GatewayControlServiceStub(channel).GetDecisions(request, timeout=ANSWER_TIMEOUT_S)


def text_lines(answer: pb.GetDecisionsResponse) -> list[str]:
    """A table, the latest last."""
    rows = [_any_row(one) for one in _episodes(answer.decisions)]
    if not rows:
        return ["nothing has been decided yet"]
    return table.lines(_HEADER, rows, left=_LEFT)


def _episodes(decisions: Iterable[pb.Decision]) -> Iterator[pb.Decision]:
    """With refusals that follow each other within EPISODE_S, and that no other decision is between, as one."""
    told: pb.Decision | None = None
    for one in decisions:
        if told is not None and _is_same_episode(told, one):
            told = _joined(told, one)
            continue
        if told is not None:
            yield told
        told = one
    if told is not None:
        yield told


def _is_same_episode(one: pb.Decision, later: pb.Decision) -> bool:
    if not one.HasField("refusals") or not later.HasField("refusals"):
        return False
    quiet_s = one.age_s - one.refusals.lasted_s - later.age_s
    return quiet_s < EPISODE_S and one.refusals.target_s == later.refusals.target_s


def _joined(one: pb.Decision, later: pb.Decision) -> pb.Decision:
    first, last = one.refusals, later.refusals
    joined = pb.Refusals(
        num=first.num + last.num,
        lasted_s=one.age_s - later.age_s + last.lasted_s,
        target_s=first.target_s,
        least_ttft_s=min(first.least_ttft_s, last.least_ttft_s),
        most_ttft_s=max(first.most_ttft_s, last.most_ttft_s),
        least_retry_after_s=min(first.least_retry_after_s, last.least_retry_after_s),
        most_retry_after_s=max(first.most_retry_after_s, last.most_retry_after_s),
    )
    return pb.Decision(refusals=joined, age_s=one.age_s)


def _json(decision: pb.Decision) -> dict[str, Any]:
    if decision.HasField("refusals"):
        return refusals_json(decision.refusals)
    if decision.HasField("scale"):
        return scale_json(scale_from_pb(decision.scale))
    return switch_json(switch_from_pb(decision.switch))


def _any_row(decision: pb.Decision) -> tuple[str, ...]:
    if decision.HasField("refusals"):
        why = refusals_text(decision.refusals)
        return (seconds(decision.age_s), "(new)", "-", "-", "refused", "-", "- -> -", "-", why)
    if decision.HasField("scale"):
        return _scale_row(decision.age_s, scale_from_pb(decision.scale))
    return _row(decision.age_s, switch_from_pb(decision.switch))


def _row(age_s: float, switch: SwitchView) -> tuple[str, ...]:
    before, after = phase_text(switch.before), phase_text(switch.phases)
    return (seconds(age_s), switch.worker_id, before, after, *_told(switch))


def _scale_row(age_s: float, scale: ScaleView) -> tuple[str, ...]:
    before, wanted = counted(scale.num_before, "worker"), counted(scale.num_wanted, "worker")
    return (seconds(age_s), "(all)", before, wanted, *_told(scale))


def _told(decision: SwitchView | ScaleView) -> tuple[str, ...]:
    """What is told of both kinds."""
    return (
        decision.state.value,
        "-" if decision.predicted is None else f"{decision.predicted:.2f}x",
        f"{_share(decision.met_before)} -> {_share(decision.met_after)}",
        decision.digest or "-",
        "; ".join(dict.fromkeys(text for text in (decision.why, decision.reason) if text)),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
