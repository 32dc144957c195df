"""`phasewise up`: start what a manifest declares."""

import argparse
import os
import sys
from pathlib import Path

from orchestrator.cli import exit_codes
from orchestrator.cli.progress import shown_progress
from orchestrator.errors import (
    AddressInUse,
    AddressUnusable,
    AlreadyRunning,
    LaunchFailed,
    ManifestError,
)
from orchestrator.manifest.declare import cpu_warnings
from orchestrator.manifest.load import load

EXAMPLES = """\
examples:
  start it on this machine, with a Ray cluster of its own:
    phasewise up deploy/manifests/laptop.yaml
  on the head node of a cluster that `ray up` has started:
    phasewise up deploy/manifests/laptop.yaml --ray-address auto

It returns when the deployment serves, and leaves it running; `phasewise down` stops it.
Ctrl-C before that stops what was started.

exit codes: 0 it serves, 1 it could not be started, 2 wrong command line, 3 manifest not valid, 130 interrupted
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "up",
        help="start what a manifest declares",
        description="Start gateway, controller and workers on Ray, and wait until they serve.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="YAML file of the deployment")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS"),
        metavar="ADDRESS",
        help="a running Ray cluster: host:port, or auto for the one of this node (default: $RAY_ADDRESS, "
        "else start one here)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    try:
        deployment = load(args.manifest)
    except ManifestError as error:
        print(error, file=sys.stderr)
        return exit_codes.INVALID_MANIFEST
    num_cpus = os.cpu_count() if args.ray_address is None else None
    for warning in cpu_warnings(deployment, num_cpus):
        print(f"warning: {args.manifest}: {warning}", file=sys.stderr)
    # Ray takes a second to import.
    from orchestrator.runtime.launch import launch

    try:
        with shown_progress() as progress:
            running = launch(deployment, progress, ray_address=args.ray_address).running
    except (AlreadyRunning, AddressInUse, AddressUnusable, LaunchFailed) as error:
        print(error, file=sys.stderr)
        return exit_codes.FAILURE
    print(f"deployment {running.name!r} serves at {running.address} (gRPC)")
    print(f"  ask it    phasewise chat 'What is the capital of France?' --name {running.name}")
    print(f"  watch it  phasewise status {running.name} --watch")
    print(f"  stop it   phasewise down {running.name}")
    return exit_codes.OK
