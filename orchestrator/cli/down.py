"""`phasewise down`: stop a deployment."""

import argparse
import sys

from orchestrator.cli import exit_codes
from orchestrator.cli.progress import shown_progress
from orchestrator.errors import LaunchFailed
from orchestrator.runtime.registry import Registry, RunningDeployment

EXAMPLES = """\
examples:
  phasewise down laptop
  phasewise down            # the only one that runs
  phasewise down --all

Requests that still run end with UNAVAILABLE. A Ray cluster that `phasewise up` started ends too.

exit codes: 0 stopped, or nothing was running; 1 it could not be stopped; 2 wrong command line, or several run
and none was named; 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "down",
        help="stop a deployment",
        description="Stop gateway, controller and workers of a deployment at once.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", metavar="NAME", help="metadata.name of the deployment")
    which.add_argument("--all", action="store_true", help="every deployment started from this machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    registry = Registry()
    known = registry.list()
    if args.name is not None:
        chosen = [running for running in known if running.name == args.name]
    elif args.all or len(known) <= 1:
        chosen = known
    else:
        names = ", ".join(running.name for running in known)
        print(f"several deployments run: {names}; name one, or use --all", file=sys.stderr)
        return exit_codes.USAGE
    if not chosen:
        print(f"no deployment {args.name!r} runs" if args.name else "no deployment runs")
        return exit_codes.OK
    statuses = [_stop(running, registry) for running in chosen]
    return max(statuses)


def _stop(running: RunningDeployment, registry: Registry) -> int:
    # Ray takes a second to import.
    from orchestrator.runtime.launch import shut_down

    try:
        with shown_progress() as progress:
            progress(f"stopping {running.name}")
            shut_down(running, registry)
    except LaunchFailed as error:
        print(f"{running.name}: {error}", file=sys.stderr)
        return exit_codes.FAILURE
    print(f"deployment {running.name!r} is stopped")
    return exit_codes.OK
