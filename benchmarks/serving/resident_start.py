"""How long a worker on a GPU takes to start, with weights of its own and with those that a keeper has, and what each takes of the memory.

    python benchmarks/serving/resident_start.py [--model MODEL] [--weight-dtype DTYPE] [--runs N] [--quick] [--json FILE]

Plain worker processes, one after the other, from the start of the interpreter until they are ready; the model was converted before, and its file is in the
page cache. `own`: it loads its weights. `first`: its keeper does. `next`: another worker has them mapped. `again`: the only one was killed a moment
ago. Stages are what the worker says it is doing, asked every 10 ms. Without --model: a Llama of a billion random weights, which is written first.
It refuses to begin when the tests of weights in common fail here.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "kernels"))

import grpc  # noqa: E402
import torch  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from protos import worker_pb2 as pb  # noqa: E402
from protos import worker_pb2_grpc as pb_grpc  # noqa: E402
from tests.support.tiny_model import write_tiny_gguf  # noqa: E402
from tests.support.worker_process import next_line  # noqa: E402
from workers.api import WorkerState  # noqa: E402
from workers.device import keeper  # noqa: E402
from workers.status_wire import status_from_pb  # noqa: E402

TESTS = "tests/gpu/test_resident_weights.py"
POLL_S, BOUND_S = 0.01, 600.0
VARIANTS = ("own", "first", "next", "again")


class Start:
    """A worker that is started, and ready. stages_s: by what it did, in order; total_s: of all."""

    def __init__(self, arguments: Sequence[str]) -> None:
        began_s = time.monotonic()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "workers.main",
                "--worker-id",
                "w",
                "--phases",
                "prefill,decode",
                *arguments,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        )
        assert self._process.stdout is not None
        line = next_line(self._process.stdout, "listening on ")
        begins = {"until it listens": began_s}
        with grpc.insecure_channel(line.split()[-1]) as channel:
            stub = pb_grpc.WorkerServiceStub(channel)
            while True:
                status = status_from_pb(stub.GetStatus(pb.GetStatusRequest()))
                if status.state is not WorkerState.LOADING:
                    break
                begins.setdefault(re.sub(r"( \(.*\))? \d+%$", "", status.message), time.monotonic())
                assert time.monotonic() - began_s < BOUND_S, status.message
                time.sleep(POLL_S)
        ended_s = time.monotonic()
        assert status.state is WorkerState.READY, status.message
        self.total_s = ended_s - began_s
        ends = [*list(begins.values())[1:], ended_s]
        self.stages_s = {name: end - at for (name, at), end in zip(begins.items(), ends, strict=True)}

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.communicate()


def write_large(path: Path) -> Path:
    """A Llama of 0.97 billion random weights."""
    return write_tiny_gguf(
        path, num_layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192, max_context_tokens=4096
    )


def used_mib() -> float:
    """Of the whole GPU."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return (total_bytes - free_bytes) / 2**20


def wait_for_no_keeper() -> None:
    """The grace of those that were there is over."""
    began_s = time.monotonic()
    while list(keeper.ROOT.glob(f"phasewise-weights-{os.geteuid()}-*")):
        assert time.monotonic() - began_s < BOUND_S, "a keeper stays"
        time.sleep(0.1)


def measure(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One start of each kind."""
    resident = [*arguments, "--resident-weights"]
    rows: dict[str, dict[str, Any]] = {}

    def start(variant: str, options: Sequence[str]) -> Start:
        before_mib = used_mib()
        found = Start(options)
        rows[variant] = {
            "total_s": found.total_s,
            "stages_s": found.stages_s,
            "taken_mib": used_mib() - before_mib,
        }
        return found

    start("own", arguments).kill()
    wait_for_no_keeper()
    first = start("first", resident)
    start("next", resident).kill()
    first.kill()
    start("again", resident).kill()
    wait_for_no_keeper()
    return rows


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as that of a worker")
    parser.add_argument("--weight-dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    problem = tests_problem(TESTS)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        model = args.model or str(write_large(Path(folder) / "model.gguf"))
        arguments = ["--model", model, "--device", "cuda", "--weight-dtype", args.weight_dtype]
        arguments += ["--kv-cache-mib", "1024", "--gpu-memory-fraction", "0.4"]
        # As many as the keeper has, which converts the weights as a worker does.
        arguments += ["--threads", str(torch.get_num_threads())]
        # Converts the model, compiles kernels.
        Start(arguments).kill()
        runs = []
        for number in range(1 if args.quick else args.runs):
            print(f"run {number + 1}", file=sys.stderr, flush=True)
            runs.append(measure(arguments))
    for variant in VARIANTS:
        rows = [run[variant] for run in runs]
        total, taken = (statistics.median(row[key] for row in rows) for key in ("total_s", "taken_mib"))
        print(f"{variant:<8} {total:7.2f} s, {taken:8.0f} MiB")
        for stage in rows[0]["stages_s"]:
            took_s = statistics.median(row["stages_s"].get(stage, 0.0) for row in rows)
            print(f"         {took_s:7.3f} s  {stage}")
    if args.json:
        data = describe_gpu() | {"weight_dtype": args.weight_dtype, "model": args.model, "runs": runs}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
