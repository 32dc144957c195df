"""How long steps take, as a command line says: of a known model on a known device, or as a profile has it."""

import argparse
from pathlib import Path

from orchestrator.control.known_shapes import DEVICES, MODELS
from workers import profile
from workers.latency_model import LatencyModel

DEFAULT_MODEL, DEFAULT_DEVICE = "llama-3-8b", "h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --device and --profile."""
    parser.add_argument(
        "--model", choices=MODELS, help=f"one of {', '.join(MODELS)} (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--device", choices=DEVICES, help=f"one of {', '.join(DEVICES)} (default: {DEFAULT_DEVICE})"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of `phasewise calibrate`, in place of --model and --device",
    )


def problem(args: argparse.Namespace) -> str | None:
    """Why they do not go together."""
    if args.profile and (args.model or args.device):
        return "--profile: it says which model and which device; leave out --model and --device"
    return None


def latency_of(args: argparse.Namespace) -> LatencyModel:
    """What they say. Raises ProfileError."""
    if args.profile is None:
        model, device = MODELS[args.model or DEFAULT_MODEL], DEVICES[args.device or DEFAULT_DEVICE]
        return LatencyModel(model, device, is_learning=False)
    return LatencyModel.fitted(profile.read(args.profile).costs)


def device_option(args: argparse.Namespace) -> str:
    """What says which device it is, for a message."""
    return f"--profile {args.profile}" if args.profile else f"--device {args.device or DEFAULT_DEVICE}"
