"""`phasewise validate`: is this manifest one that `phasewise up` would take?"""

import argparse
import json
import sys
from pathlib import Path

from orchestrator.cli import exit_codes
from orchestrator.errors import ManifestError
from orchestrator.manifest.declare import cpu_warnings
from orchestrator.manifest.load import load
from orchestrator.manifest.models import Deployment

EXAMPLES = """\
examples:
  phasewise validate deploy/manifests/laptop.yaml
  phasewise validate --schema > phasewise.schema.json

exit codes: 0 valid, 2 wrong command line, 3 not valid
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "validate",
        help="check a manifest without starting anything",
        description="Check a manifest without starting anything. Every problem is printed with its line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("manifest", nargs="?", type=Path, metavar="MANIFEST", help="YAML file to check")
    what.add_argument("--schema", action="store_true", help="print the JSON Schema of manifests instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    if args.schema:
        print(json.dumps(Deployment.model_json_schema(), indent=2))
        return exit_codes.OK
    try:
        deployment = load(args.manifest)
    except ManifestError as error:
        print(error, file=sys.stderr)
        return exit_codes.INVALID_MANIFEST
    # Where it will run is not known here.
    for warning in cpu_warnings(deployment):
        print(f"warning: {args.manifest}: {warning}", file=sys.stderr)
    print(f"valid: {args.manifest}: {summary(deployment)}")
    return exit_codes.OK


def summary(deployment: Deployment) -> str:
    """One line on what would be started."""
    spec = deployment.spec
    groups = ", ".join(f"{group.replicas} x {'+'.join(group.phases)}" for group in spec.workers)
    num_workers = sum(group.replicas for group in spec.workers)
    workers = f"{num_workers} worker{'s' if num_workers > 1 else ''} ({groups})"
    model = spec.model.served_name
    return (
        f"deployment {deployment.metadata.name!r}, model {model!r}, {workers}, gateway {spec.gateway.address}"
    )
