"""How long `phasewise up` takes on this machine, and what the demo's question costs then.

python benchmarks/serving/startup.py [--quick] [--json FILE]

Starts deploy/manifests/laptop.yaml as `phasewise up` does, several times; the model was converted before. In
each deployment the demo's question is asked once at first and then again and again, one at a time, greedily.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.bench.machine import describe_machine
from orchestrator.cli import request
from orchestrator.manifest.load import load
from orchestrator.manifest.models import Deployment
from orchestrator.runtime.launch import Progress, local_deployment
from protos import inference_pb2 as pb

MANIFEST = Path(__file__).resolve().parent.parent.parent / "deploy" / "manifests" / "laptop.yaml"
QUESTION = "What is the capital of France?"


class Stopwatch:
    """When each stage of the start began, from what `launch` says it is doing."""

    def __init__(self) -> None:
        self.began_s: dict[str, float] = {}

    def take(self, doing: str) -> None:
        """Note the first time of this stage; what workers say is one stage."""
        stage = doing if doing.startswith(("starting", "stopping")) else "waiting for the workers"
        self.began_s.setdefault(stage, time.monotonic())

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """For `local_deployment`."""
        yield self.take


def ask(address: str) -> dict[str, float]:
    """One answer to the question."""
    asked = pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=QUESTION)]),
        sampling=pb.SamplingParams(max_tokens=64),
    )
    last = asyncio.run(request.stream(address, asked, timeout_s=120, on_message=lambda _message: None))
    timings = last.timings
    return {
        "ttft_s": timings.ttft_s,
        "tpot_s": timings.tpot_s,
        "total_s": timings.total_s,
        "kv_bytes": timings.kv_transfer.num_bytes,
        "kv_transfer_s": timings.kv_transfer.transfer_s,
        "kv_exposed_s": timings.kv_transfer.exposed_s,
    }


def measure(deployment: Deployment, num_asks: int) -> dict[str, Any]:
    """One start, the questions, one stop."""
    watch = Stopwatch()
    began_s = time.monotonic()
    with local_deployment(deployment, watch.shown) as running:
        ready_s = time.monotonic()
        answers = [ask(running.address) for _ in range(num_asks)]
        stop_s = time.monotonic()
    ended_s = time.monotonic()
    begins = [*(at_s for stage, at_s in watch.began_s.items() if stage != "stopping"), ready_s]
    names = [stage for stage in watch.began_s if stage != "stopping"]
    stages = {name: later - earlier for name, earlier, later in zip(names, begins, begins[1:], strict=False)}
    return {"start_s": ready_s - began_s, "stages_s": stages, "stop_s": ended_s - stop_s, "answers": answers}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one start, few questions")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    num_starts, num_asks = (1, 3) if args.quick else (5, 11)
    deployment = load(MANIFEST)
    runs = []
    for number in range(num_starts):
        print(f"start {number + 1} of {num_starts}", file=sys.stderr, flush=True)
        runs.append(measure(deployment, num_asks))
    later = [answer for run in runs for answer in run["answers"][1:]]
    first = [run["answers"][0] for run in runs]

    def median(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.median(row[key] for row in rows)

    summary = {
        "start_s": median(runs, "start_s"),
        "stop_s": median(runs, "stop_s"),
        **{f"stage: {name}": median([run["stages_s"] for run in runs], name) for name in runs[0]["stages_s"]},
        "first ttft_s": median(first, "ttft_s"),
        **{key: median(later, key) for key in later[0]},
    }
    for name, value in summary.items():
        print(f"{name:<34} {value:10.4g}")
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "medians": summary, "runs": runs}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
