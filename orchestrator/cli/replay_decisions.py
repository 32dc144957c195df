"""`phasewise replay-decisions`: what another policy would have decided from what the controller saw."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from google.protobuf.json_format import Parse, ParseError

from orchestrator.cli import exit_codes
from orchestrator.control.auto_switch import LOOK_EVERY_S, allowed_sets, phase_sets
from orchestrator.control.look import Look
from orchestrator.control.look_wire import look_from_pb
from orchestrator.control.policies.disaggregated import EpdQueue
from orchestrator.control.policies.phase_sets import PhaseSets
from orchestrator.control.policies.policy import Switch
from orchestrator.control.role_switch import phase_text
from orchestrator.control.scaling import Demand, Scaling
from orchestrator.control.view import LifecycleState, ScaleView
from orchestrator.control.worker_machine import WorkerMachine
from orchestrator.errors import LooksError
from protos import control_pb2 as pb
from workers.api import Phase, PhaseSet, WorkerId

#: Between two looks there is at most so much time: what lasts may have begun as much before it was seen.
GAP_S = 2 * LOOK_EVERY_S

WRITTEN_BY = "`phasewise decisions --looks FILE` writes one"

Decision = Switch | ScaleView
Tick = Callable[[Look], Sequence[Decision]]


def _phasewise(looks: Sequence[Look]) -> Tick:
    sets = phase_sets(looks[0], allowed_of(looks))
    scaling: Scaling | None = None

    def tick(look: Look) -> Sequence[Decision]:
        nonlocal scaling
        sets.learn(look.cost, look.tile_s, look.switch_cost)
        switches = sets.tick(look.at_s, look.load)
        if look.scaling is None:
            return switches
        hold_s, release_s = look.scaling.hold_s - GAP_S, look.scaling.release_s - GAP_S
        seen = replace(look.scaling, hold_s=max(0.0, hold_s), release_s=max(0.0, release_s))
        if scaling is None:
            scaling = Scaling(seen)
        scaling.config = seen
        return (*switches, *_scale(look, sets, scaling, is_moving=bool(switches)))

    return tick


def allowed_of(looks: Sequence[Look]) -> tuple[PhaseSet, ...]:
    """What a worker may come to serve. Looks of the version before do not tell: what any worker served at any time."""
    return looks[0].allowed or allowed_sets(worker.phases for look in looks for worker in look.load.workers)


def _scale(look: Look, sets: PhaseSets, scaling: Scaling, *, is_moving: bool) -> Sequence[ScaleView]:
    """What is decided about the number of workers; whether it is carried out the next looks say."""
    ready = (_machine(one.worker_id, LifecycleState.READY) for one in look.load.workers)
    waiting = (_machine(one, LifecycleState.STARTING) for one in look.waiting)
    machines = {one.worker_id: one for one in (*ready, *waiting)}
    served = {phase: sum(phase in one.phases for one in look.load.workers) for phase in Phase}
    one_more, before = sets.one_more(), scaling.num_decisions
    is_moving = is_moving or any(one.is_switching for one in look.load.workers)
    demand = None
    if sets.load is not None and one_more is not None:
        demand = Demand(sets.load, is_moving, one_more, look)
    scaling.tick(look.at_s, demand, machines, served)
    scaling.retiring.clear()
    return scaling.views()[-1:] if scaling.num_decisions > before else ()


def _machine(worker_id: WorkerId, state: LifecycleState) -> WorkerMachine:
    address = "seen" if state is LifecycleState.READY else ""
    return WorkerMachine(worker_id, state, incarnation=1, highest_incarnation=1, address=address)


def _epd_queue(_looks: Sequence[Look]) -> Tick:
    policy = EpdQueue()
    return lambda look: policy.tick(look.at_s, look.load)


#: Each made for all looks.
POLICIES: dict[str, Callable[[Sequence[Look]], Tick]] = {"phasewise": _phasewise, "epd_queue": _epd_queue}

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
    found = list(replay(looks, POLICIES[args.policy](looks)))
    for look, decision in found:
        print(f"{look.at_s - looks[0].at_s:8.1f} s  {_text(decision)} (seen {look.digest})")
    took_s = looks[-1].at_s - looks[0].at_s
    print(
        f"{len(found)} decisions of {args.policy} from {len(looks)} looks in {took_s:.1f} s", file=sys.stderr
    )
    return exit_codes.OK


def _text(decision: Decision) -> str:
    match decision:
        case Switch():
            return f"{decision.worker_id} -> {phase_text(decision.phases)}: {decision.reason}"
        case ScaleView():
            return f"{decision.num_before} -> {decision.num_wanted} workers: {decision.why}"


def replay(looks: Sequence[Look], tick: Tick) -> Iterator[tuple[Look, Decision]]:
    """Each decision, with what it was made from."""
    for look in looks:
        for decision in tick(look):
            yield look, decision


def read_looks(path: Path) -> Iterator[Look]:
    """Raises LooksError when it is no file of looks, in order of time, or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LooksError(str(path), None, f"cannot be read: {error.strerror}; {WRITTEN_BY}") from error
    except UnicodeDecodeError as error:
        raise LooksError(str(path), None, f"is no record of looks: {error}; {WRITTEN_BY}") from error
    last_s, is_empty = float("-inf"), True
    for number, line in enumerate(lines, start=1):
        try:
            look = look_from_pb(Parse(line, pb.Look()))
        except (ParseError, ValueError) as error:
            # After its first line protobuf lists all fields.
            why = str(error).partition("\n")[0].rstrip(".")
            raise LooksError(str(path), number, f"is no record of looks: {why}; {WRITTEN_BY}") from error
        if look.at_s < last_s:
            raise LooksError(str(path), number, f"at_s: {look.at_s:g} is before that of the line above")
        last_s, is_empty = look.at_s, False
        yield look
    if is_empty:
        raise LooksError(
            str(path), None, "it is empty; the controller looks while controller.roleSwitch is on or dryRun"
        )
