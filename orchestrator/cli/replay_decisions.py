"""`phasewise replay-decisions`: what another policy would have decided from what the controller saw."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from google.protobuf.json_format import Parse, ParseError

from orchestrator.cli import exit_codes
from orchestrator.control.auto_switch import allowed_sets, phase_sets
from orchestrator.control.look import Look
from orchestrator.control.look_wire import look_from_pb
from orchestrator.control.policies.disaggregated import EpdQueue
from orchestrator.control.policies.policy import Switch
from orchestrator.control.role_switch import phase_text
from orchestrator.errors import LooksError
from protos import control_pb2 as pb

Tick = Callable[[Look], Sequence[Switch]]


def _phasewise(first: Look) -> Tick:
    sets = phase_sets(first, allowed_sets(worker.phases for worker in first.load.workers))

    def tick(look: Look) -> Sequence[Switch]:
        sets.learn(look.cost, look.tile_s, look.switch_cost)
        return sets.tick(look.at_s, look.load)

    return tick


def _epd_queue(_first: Look) -> Tick:
    policy = EpdQueue()
    return lambda look: policy.tick(look.at_s, look.load)


#: Each made for the first look.
POLICIES: dict[str, Callable[[Look], Tick]] = {"phasewise": _phasewise, "epd_queue": _epd_queue}

EXAMPLES = """\
examples:
  phasewise decisions --looks looks.jsonl
  phasewise replay-decisions looks.jsonl --policy epd_queue

Each policy decides from what was seen, and never sees what its own decisions would have led to. Time 0 is the first look.

exit codes: 0 it was replayed, 1 the file is none of looks, 2 wrong command line
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "replay-decisions",
        help="tell what another policy would have decided",
        description="Tell what another policy would have decided from what the controller saw.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what `phasewise decisions --looks` wrote")
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        default="phasewise",
        help=f"one of {', '.join(POLICIES)} (default: phasewise)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        looks = list(read_looks(args.file))
    except LooksError as error:
        print(error, file=sys.stderr)
        return exit_codes.FAILURE
    found = list(replay(looks, POLICIES[args.policy](looks[0])))
    for look, switch in found:
        at_s = look.at_s - looks[0].at_s
        print(
            f"{at_s:8.1f} s  {switch.worker_id} -> {phase_text(switch.phases)}: {switch.reason} (seen {look.digest})"
        )
    took_s = looks[-1].at_s - looks[0].at_s
    print(
        f"{len(found)} decisions of {args.policy} from {len(looks)} looks in {took_s:.1f} s", file=sys.stderr
    )
    return exit_codes.OK


def replay(looks: Sequence[Look], tick: Tick) -> Iterator[tuple[Look, Switch]]:
    """Each decision, with what it was made from."""
    for look in looks:
        for switch in tick(look):
            yield look, switch


def read_looks(path: Path) -> Iterator[Look]:
    """Raises LooksError when it is no file of looks, in order of time, or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LooksError(str(path), None, str(error)) from error
    last_s, is_empty = float("-inf"), True
    for number, line in enumerate(lines, start=1):
        try:
            look = look_from_pb(Parse(line, pb.Look()))
        except (ParseError, ValueError) as error:
            raise LooksError(str(path), number, str(error)) from error
        if look.at_s < last_s:
            raise LooksError(str(path), number, f"at_s: {look.at_s:g} is before that of the line above")
        last_s, is_empty = look.at_s, False
        yield look
    if is_empty:
        raise LooksError(
            str(path), None, "it is empty; the controller looks while controller.roleSwitch is on or dryRun"
        )
