"""How much of a hand-off prefill hides in service, and what it adds to the second token.

    python benchmarks/kvtransfer/hidden.py [--quick] [--json FILE]

Starts deploy/manifests/laptop.yaml, a prefill and a decode worker with SmolLM2-135M on this machine, once for each way and
group size, and sends prompts of 2,048 tokens one at a time. What is hidden is the part of the time from the first chunk
to the commit that lies before the end of prefill.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
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
NUM_TOKENS = 2048
#: (transport, layers of a group; None chooses).
SHAPES: tuple[tuple[str, int | None], ...] = (
    ("auto", None),
    ("grpc", None),
    ("grpc", 1),
    ("grpc", 30),
)


@contextmanager
def silent() -> Iterator[Progress]:
    """For `local_deployment`."""
    yield lambda _doing: None


def ask(address: str, number: int) -> dict[str, Any]:
    """One prompt that nobody has seen before."""
    rng = random.Random(number)
    token_ids = [rng.randrange(1000, 40000) for _ in range(NUM_TOKENS)]
    asked = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=token_ids), sampling=pb.SamplingParams(max_tokens=8, ignore_eos=True)
    )
    last = asyncio.run(request.stream(address, asked, timeout_s=120, on_message=lambda _message: None))
    timings, transfer = last.timings, last.timings.kv_transfer
    return {
        "transport": transfer.transport,
        "num_bytes": transfer.num_bytes,
        "num_chunks": transfer.num_chunks,
        "prefill_s": timings.prefill_s,
        "transfer_s": transfer.transfer_s,
        "exposed_s": transfer.exposed_s,
        "hidden": 1 - transfer.exposed_s / transfer.transfer_s,
        "second_token_s": timings.second_token_s,
        "tpot_s": timings.tpot_s,
    }


def with_shape(deployment: Deployment, transport: str, group_size: int | None) -> Deployment:
    """The same with another way and group size."""
    changes = {"transport": transport, "layer_group_size": group_size}
    kv_transfer = deployment.spec.kv_transfer.model_copy(update=changes)
    return deployment.model_copy(
        update={"spec": deployment.spec.model_copy(update={"kv_transfer": kv_transfer})}
    )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape, few prompts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    shapes, num_asks = (SHAPES[:1], 2) if args.quick else (SHAPES, 5)
    deployment = load(MANIFEST)
    rows = []
    print(
        f"{'transport':<10}{'group':>6}{'chunks':>8}{'MB':>7}{'prefill s':>11}{'transfer s':>12}"
        f"{'exposed ms':>12}{'hidden':>8}{'2nd token ms':>14}{'tpot ms':>9}"
    )
    for transport, group_size in shapes:
        with contextlib.ExitStack() as stack:
            running = stack.enter_context(
                local_deployment(with_shape(deployment, transport, group_size), silent)
            )
            # The first ones teach the worker how fast it is.
            found = [ask(running.address, number) for number in range(num_asks + 2)][2:]
        row: dict[str, Any] = {
            key: statistics.median(one[key] for one in found) for key in found[0] if key != "transport"
        }
        row |= {"asked": transport, "transport": found[0]["transport"], "layer_group_size": group_size}
        rows.append(row)
        print(
            f"{row['transport']:<10}{group_size or 'auto':>6}{row['num_chunks']:>8.0f}{row['num_bytes'] / 1e6:>7.1f}"
            f"{row['prefill_s']:>11.2f}{row['transfer_s']:>12.2f}{row['exposed_s'] * 1e3:>12.1f}{row['hidden']:>8.1%}"
            f"{row['second_token_s'] * 1e3:>14.1f}{row['tpot_s'] * 1e3:>9.1f}"
        )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "num_tokens": NUM_TOKENS, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
