"""The `phasewise` command: finds the verb, imports its module and runs it.

Only the module of the verb in use is imported, since some of them take a second.
"""

import argparse
import difflib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NoReturn

from orchestrator.cli import exit_codes

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True, slots=True)
class Verb:
    """A module with `add_parser` and `run`, and its line in the list of verbs."""

    module: str
    summary: str


VERBS = {
    "up": Verb("orchestrator.cli.up", "start what a manifest declares"),
    "down": Verb("orchestrator.cli.down", "stop a deployment"),
    "status": Verb("orchestrator.cli.status", "show the workers of the deployments that run"),
    "explain": Verb("orchestrator.cli.explain", "tell what became of a request, and why"),
    "kv": Verb("orchestrator.cli.kv", "show who holds the KV blocks of the workers"),
    "switch": Verb("orchestrator.cli.switch", "have a worker serve other phases, while requests run"),
    "decisions": Verb(
        "orchestrator.cli.decisions",
        "show what was decided about phases, the number of workers and new requests, and what came of it",
    ),
    "replay-decisions": Verb(
        "orchestrator.cli.replay_decisions", "tell what another policy would have decided"
    ),
    "chat": Verb("orchestrator.cli.chat", "talk to the model, with its chat template"),
    "generate": Verb("orchestrator.cli.generate", "continue a text or token ids as they are"),
    "validate": Verb("orchestrator.cli.validate", "check a manifest without starting anything"),
    "bench": Verb("orchestrator.cli.bench", "replay a request trace and measure TTFT, TPOT, ITL and goodput"),
    "calibrate": Verb("orchestrator.cli.calibrate", "measure how long steps take on this machine"),
    "simulate": Verb("orchestrator.cli.simulate", "replay a request trace on a simulated cluster"),
    "plan": Verb("orchestrator.cli.plan", "find the shape of a cluster that serves a load best"),
}

EXAMPLES = """\
examples:
  phasewise validate deploy/manifests/laptop.yaml
  phasewise up deploy/manifests/laptop.yaml
  phasewise chat "What is the capital of France?" --timeline
  phasewise status --watch
  phasewise down laptop
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the one of this process; returns the exit code."""
    try:
        exit_code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    return exit_code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What `argv` asks for; `args.run(args)` does it. Exits as argparse does when it is wrong."""
    top = _top_parser()
    chosen = top.parse_args(argv)
    if chosen.version:
        chosen.run = _print_version
        return chosen
    if chosen.verb is None:
        top.print_help(sys.stderr)
        top.exit(exit_codes.USAGE, "\nphasewise: a verb is needed\n")
    if chosen.verb not in VERBS:
        top.error(unknown_verb(chosen.verb))
    parser = _VerbParser(prog="phasewise")
    module = importlib.import_module(VERBS[chosen.verb].module)
    subparsers = parser.add_subparsers(dest="verb")
    module.add_parser(subparsers)
    args, unknown = parser.parse_known_args([chosen.verb, *chosen.rest])
    if unknown:
        verb = subparsers.choices[chosen.verb]
        verb.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest_option(unknown[0], verb)}")
    args.log_level = chosen.log_level
    return args


def unknown_verb(verb: str) -> str:
    """The sentence for a verb that there is not, with the nearest one that there is."""
    nearest = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "`phasewise --help` lists them"
    return f"there is no verb {verb!r}; {hint}"


class _VerbParser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of some verbs would push it out of sight."""

    def error(self, message: str) -> NoReturn:
        self.exit(exit_codes.USAGE, f"{self.prog}: {message} (`{self.prog} --help` lists all options)\n")


def _nearest_option(unknown: str, verb: argparse.ArgumentParser) -> str:
    """The option that was meant, for the end of a message; empty when there is none."""
    options = [option for action in verb._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(unknown.partition("=")[0].replace("_", "-"), options, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _run(argv: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write what the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    args = parse(argv)
    logging.basicConfig(level=args.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    return int(args.run(args))


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phasewise",
        usage="phasewise [--log-level LEVEL] VERB ...",
        description="Serve language models with prefill and decode on separate workers.",
        epilog=_verbs_and_exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="warning",
        metavar="LEVEL",
        help="what is logged to stderr: " + ", ".join(LOG_LEVELS) + " (default: warning)",
    )
    parser.add_argument("verb", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _verbs_and_exit_codes() -> str:
    verbs = "\n".join(f"  {name:<9} {verb.summary}" for name, verb in VERBS.items())
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in exit_codes.MEANINGS.items())
    more = "`phasewise VERB --help` says more about a verb."
    return f"verbs:\n{verbs}\n\n{more}\n\n{EXAMPLES}\nexit codes:\n{codes}\n"


def _print_version(_args: argparse.Namespace) -> int:
    try:
        version = metadata.version("phasewise")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    print(f"phasewise {version}")
    return exit_codes.OK
