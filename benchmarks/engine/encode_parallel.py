"""Eight pictures of one request, encoded by one encode worker and by two: how long encoding takes, and the first token.

    python benchmarks/engine/encode_parallel.py [--quick] [--json FILE] [--images 8] [--rounds N]

An encoder of SigLIP-base's shape (12 layers of 768, patches of 16, as in SmolVLM-256M; random weights; tiles of 256 pixels
instead of 512, one for each picture) with SmolLM2-135M. Encode workers have one thread and a core each. One worker
prefills and decodes, on the second core; it is the same one in both cases, and so is the work. Pictures are all
different, and never seen before. The cases take turns, one request at a time.

`encode` is from the first time that the prefill worker wants pictures to the last that has come, as the gateway sees it. The
two encode workers share the second core with prefill, which computes what comes before the first missing picture;
the one encode worker does not.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving.image_models import SIGLIP_BASE, picture, smollm2_prompt, write_model  # noqa: E402
from benchmarks.serving.image_shapes import (  # noqa: E402
    Answer,
    D,
    E,
    P,
    Served,
    WorkerOption,
    image_request,
    served,
    two_cores,
)
from orchestrator.bench.machine import describe_machine  # noqa: E402

#: Encode workers of each case.
CASES = (1, 2)
COMMON = ("--threads", "1", "--kv-cache-mib", "128")
NUM_WARM_UP = 1
AIM = 1.6


@dataclass(frozen=True, slots=True)
class Row:
    """One number of encode workers. Times in ms, medians; ratios to one encode worker, above 1 is faster."""

    num_encoders: int
    encode_ms: float
    encode_min_ms: float
    encode_max_ms: float
    encode_ratio: float
    ttft_ms: float
    ttft_ratio: float
    num_shards: float


async def measure(num_images: int, num_rounds: int) -> list[Row]:
    """Medians of both cases."""
    first, second = two_cores()
    found: dict[int, list[Answer]] = {case: [] for case in CASES}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="encode-parallel-")))
        model = str(write_model(folder / "model", SIGLIP_BASE, None))
        shapes: dict[int, Served] = {}
        for case in CASES:
            encoders = [WorkerOption(E, core, COMMON) for core in (first, second)[:case]]
            workers = [*encoders, WorkerOption(P | D, second, COMMON)]
            shapes[case] = await stack.enter_async_context(served(model, workers, folder, f"{case}e"))
        for number in range(NUM_WARM_UP + num_rounds):
            for case, shape in shapes.items():
                images = [picture((case, number, i), SIGLIP_BASE.tile_size) for i in range(num_images)]
                answer = await shape.ask(image_request(smollm2_prompt(num_images), images, 2))
                check(case, num_images, answer)
                if number >= NUM_WARM_UP:
                    found[case].append(answer)
    return [row_of(case, found) for case in CASES]


def check(case: int, num_images: int, answer: Answer) -> None:
    """Say what is not as it should be: each picture is encoded once, and all encode workers take part."""
    encodes = answer.timings.encodes
    num_tiles = sum(encode.num_tiles for encode in encodes)
    num_workers = len({encode.worker_id for encode in encodes})
    num_cached = sum(encode.num_cached_tiles for encode in encodes)
    if (num_tiles, num_workers, num_cached) != (num_images, case, 0):
        print(
            f"{case} encode workers: {num_tiles} tiles, {num_cached} of them cached, by {num_workers} workers",
            file=sys.stderr,
        )


def row_of(case: int, found: dict[int, list[Answer]]) -> Row:
    """Medians of all rounds."""

    def encode_ms(which: int) -> list[float]:
        return [answer.timings.encode_s * 1000 for answer in found[which]]

    def ttft_ms(which: int) -> float:
        return statistics.median(answer.token_times_s[0] * 1000 for answer in found[which])

    times = encode_ms(case)
    return Row(
        num_encoders=case,
        encode_ms=statistics.median(times),
        encode_min_ms=min(times),
        encode_max_ms=max(times),
        encode_ratio=statistics.median(encode_ms(1)) / statistics.median(times),
        ttft_ms=ttft_ms(case),
        ttft_ratio=ttft_ms(1) / ttft_ms(case),
        num_shards=statistics.median(len(answer.timings.encodes) for answer in found[case]),
    )


def show(rows: list[Row]) -> None:
    """As a table."""
    print(
        f"{'encoders':>8}{'shards':>8}{'encode ms':>11}{'min':>8}{'max':>8}{'shorter':>9}{'TTFT ms':>9}{'shorter':>9}"
    )
    for row in rows:
        print(
            f"{row.num_encoders:>8}{row.num_shards:>8.0f}{row.encode_ms:>11.0f}{row.encode_min_ms:>8.0f}"
            f"{row.encode_max_ms:>8.0f}{row.encode_ratio:>8.2f}x{row.ttft_ms:>9.0f}{row.ttft_ratio:>8.2f}x"
        )
    print(f"encode time is to be {AIM} times shorter with two")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="pictures of a request")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="requests of each case")
    args = parser.parse_args()
    num_rounds = 2 if args.quick else args.rounds
    rows = asyncio.run(measure(args.images, num_rounds))
    print(f"{args.images} pictures of {SIGLIP_BASE.num_patches} patches, {num_rounds} rounds")
    show(rows)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {
            "date": date,
            "machine": describe_machine(),
            "images": args.images,
            "rounds": num_rounds,
            "encoder": asdict(SIGLIP_BASE),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
