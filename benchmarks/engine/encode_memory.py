"""Memory of a worker that only encodes, beside one that does all: measured here, and counted for published models.

    python benchmarks/engine/encode_memory.py [--quick] [--json FILE] [--kv-tokens 32768] [--embeddings 16384]

Measured: resident memory (RSS) of worker processes after requests with pictures, one shape at a time. `pages of files` are
in it: the model's converted weights are mapped, and so are Python and torch. `over an idle process` leaves out what a process
has that has loaded the same code and no model. Models: the one in examples/tiny_vlm, if it is there, and SmolVLM-256M's shape
with random weights.

Counted: weights and KV of 2 bytes a value, embeddings of 4, as the pools of this project have them. A full worker holds the
encoder, the language model, KV of --kv-tokens tokens and --embeddings embeddings; an encode worker the encoder
and as many embeddings. Weights alone are what the paper's "95 % lower" is about; activations are left out. The last
table has what encoding a tile costs beside the prefill of its embeddings.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.engine.published_shapes import MODELS, Published  # noqa: E402
from benchmarks.serving.image_models import SIGLIP_BASE, picture, smollm2_prompt, write_model  # noqa: E402
from benchmarks.serving.image_shapes import (  # noqa: E402
    D,
    E,
    P,
    WorkerOption,
    image_request,
    served,
)
from orchestrator.bench.machine import describe_machine  # noqa: E402
from workers.api import Phase, PhaseSet  # noqa: E402

TINY_VLM = ROOT / "examples" / "tiny_vlm" / "model"
#: Shapes; of the first, the encode worker is looked at, of the second the worker that does all.
APART, TOGETHER = (E, P | D), (E | P | D,)
KV_CACHE_MIB, IMAGE_CACHE_MIB = 256, 64
OPTIONS = ("--threads", "1", "--kv-cache-mib", str(KV_CACHE_MIB), "--image-cache-mib", str(IMAGE_CACHE_MIB))
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Measured:
    """One worker process. MiB."""

    model: str
    phases: str
    rss_mib: float
    file_pages_mib: float
    over_idle_mib: float


@dataclass(frozen=True, slots=True)
class Counted:
    """A published model. MiB; `less` is what an encode worker has less, in percent."""

    model: str
    encoder_mib: float
    text_mib: float
    kv_mib: float
    embeddings_mib: float
    less_weights: float
    less_in_all: float
    tile_patches: int
    tile_embeddings: int
    encode_to_prefill: float


def count(model: Published, kv_tokens: int, num_embeddings: int) -> Counted:
    """Memory of both kinds of worker."""
    encoder, text = 2 * model.encoder.num_weights, 2 * model.text.num_weights
    kv = 2 * kv_tokens * model.text.kv_values
    embeddings = 4 * num_embeddings * model.text.hidden_size
    return Counted(
        model.name,
        encoder / MIB,
        text / MIB,
        kv / MIB,
        embeddings / MIB,
        100 * (1 - encoder / (encoder + text)),
        100 * (1 - (encoder + embeddings) / (encoder + text + kv + embeddings)),
        model.tile_patches,
        model.tile_embeddings,
        model.encode_to_prefill,
    )


def idle_mib() -> float:
    """RSS of a process that has loaded a worker's code and no model."""
    code = "import workers.main, workers.worker, sys; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        found = psutil.Process(process.pid).memory_info().rss / MIB
        process.stdin.close()
    return float(found)


async def measure(
    name: str, model: str, num_requests: int, side: int, prompt: str, logs: Path
) -> list[Measured]:
    """Both kinds of worker, after so many requests of two pictures."""
    idle = idle_mib()
    found = []
    for shape in (APART, TOGETHER):
        async with AsyncExitStack() as stack:
            workers = [WorkerOption(phases, None, OPTIONS) for phases in shape]
            it = await stack.enter_async_context(served(model, workers, logs, name))
            for number in range(num_requests):
                images = [picture((number, i), side) for i in range(2)]
                await it.ask(image_request(prompt, images, 8))
            memory = psutil.Process(it.pids[0]).memory_info()
            found.append(
                Measured(
                    name, _phases(shape[0]), memory.rss / MIB, memory.shared / MIB, memory.rss / MIB - idle
                )
            )
    return found


def _phases(phases: PhaseSet) -> str:
    return ",".join(phase for phase in Phase if phase in phases)


def show(measured: Sequence[Measured], counted: Sequence[Counted]) -> None:
    """As tables of markdown."""
    print(
        "| model | phases | RSS MiB | pages of files MiB | over an idle process MiB |\n|---|---|---|---|---|"
    )
    for row in measured:
        print(
            f"| {row.model} | {row.phases} | {row.rss_mib:.0f} | {row.file_pages_mib:.0f} | {row.over_idle_mib:.0f} |"
        )
    for encode, full in zip(measured[::2], measured[1::2], strict=True):
        less, less_over = 1 - encode.rss_mib / full.rss_mib, 1 - encode.over_idle_mib / full.over_idle_mib
        print(
            f"\n{encode.model}: {less:.0%} less with encode alone; over an idle process {less_over:.0%} less"
        )
    print(
        "\n| model | encoder MiB | language model MiB | KV MiB | embeddings MiB | less weights | less in all |"
        "\n|---|---|---|---|---|---|---|"
    )
    for one in counted:
        print(
            f"| {one.model} | {one.encoder_mib:.0f} | {one.text_mib:.0f} | {one.kv_mib:.0f} | {one.embeddings_mib:.0f} | "
            f"{one.less_weights:.1f} % | {one.less_in_all:.1f} % |"
        )
    print("\n| model | patches of a tile | embeddings | encode to prefill, FLOPs |\n|---|---|---|---|")
    for one in counted:
        print(f"| {one.model} | {one.tile_patches} | {one.tile_embeddings} | {one.encode_to_prefill:.2f} |")


async def measure_all(num_requests: int) -> list[Measured]:
    """Of the shipped model, if it is there, and of SmolVLM-256M's shape."""
    found: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="encode-memory-") as path:
        logs = Path(path)
        if (TINY_VLM / "model.safetensors").is_file():
            found += await measure("tiny_vlm", str(TINY_VLM), num_requests, 128, smollm2_prompt(2), logs)
        folder = str(write_model(logs / "model", SIGLIP_BASE, None))
        name = "SmolVLM-256M-shape"
        found += await measure(name, folder, num_requests, SIGLIP_BASE.tile_size, smollm2_prompt(2), logs)
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--kv-tokens", type=int, default=32768, metavar="N", help="of a counted full worker")
    parser.add_argument("--embeddings", type=int, default=16384, metavar="N", help="of a counted worker")
    args = parser.parse_args()
    counted = [count(model, args.kv_tokens, args.embeddings) for model in MODELS]
    measured = asyncio.run(measure_all(2 if args.quick else 10))
    show(measured, counted)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {
            "date": date,
            "machine": describe_machine(),
            "kv_cache_mib": KV_CACHE_MIB,
            "image_cache_mib": IMAGE_CACHE_MIB,
            "kv_tokens": args.kv_tokens,
            "embeddings": args.embeddings,
            "measured": [asdict(row) for row in measured],
            "counted": [asdict(row) for row in counted],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
