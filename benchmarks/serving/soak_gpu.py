"""Minutes at a part of capacity on one GPU: nothing may grow, fail or be stuck.

    python benchmarks/serving/soak_gpu.py --trace azure_llm_2023_conv.csv [--rate R] [--minutes M] [--policy NAME] [--quick] [--json FILE]

The engine and load of capacity_gpu.py, in rounds of the same requests. After each, when all have ended, it reads the memory of the process and of the
whole GPU, and asks the engine's books for what is left. The first round takes what is kept for good. After that a round may take something once, as
CUDA does for a kernel that is used for the first time, but nothing may grow: exit status 1 where most rounds add more than --slack-mib, or where all
together add more than --once-mib. It refuses to begin when the engine's tests fail here. `--tiny` runs on a CPU.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "kernels"))

import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.serving.capacity_engine import Machine, Policy, serve, tiny_config  # noqa: E402
from benchmarks.serving.capacity_gpu import TESTS, planned  # noqa: E402
from benchmarks.serving.capacity_rows import report, show  # noqa: E402
from benchmarks.serving.engine_gpu import LLAMA_3_8B  # noqa: E402
from orchestrator.bench.trace import read_trace  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402

#: Rounds at least: the first one takes what is kept.
MIN_ROUNDS = 4


def memory_mib(*, is_tiny: bool) -> dict[str, float]:
    """Of this process on the host, without what its allocator keeps for later, and of the whole GPU."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    found = {"host": psutil.Process().memory_info().rss / 2**20}
    if not is_tiny:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        found |= {
            "gpu": (total_bytes - free_bytes) / 2**20,
            "gpu_allocated": torch.cuda.memory_allocated() / 2**20,
        }
    return found


def growth_mib(rounds: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """What a round adds to each kind of memory, in the median of those after the first, and what they all add."""
    return {
        name: (
            statistics.median(after[name] - before[name] for before, after in pairwise(rounds[1:])),
            rounds[-1][name] - rounds[1][name],
        )
        for name in rounds[0]
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE")
    add("--first-row", type=int, default=200)
    add("--rate", type=float, default=20.0, metavar="R")
    add("--minutes", type=float, default=10.0, metavar="M")
    add("--round-s", type=float, default=60.0, metavar="S", help="of load in one round")
    add("--policy", default="slack@predicted", metavar="ORDER@BUDGET")
    add("--max-running", type=int, default=384, metavar="N")
    add("--slack-mib", type=float, default=1.0, metavar="MIB", help="that a round may add")
    add("--once-mib", type=float, default=256.0, metavar="MIB", help="that all rounds may add")
    add("--quick", action="store_true", help="four rounds of 20 seconds")
    add("--tiny", action="store_true")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main() -> int:
    """Returns the exit status."""
    args = parse()
    if not args.tiny and (problem := tests_problem(*TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    round_s = 20.0 if args.quick else args.round_s
    ends_s = time.monotonic() + (0.0 if args.quick else 60.0 * args.minutes)
    config = tiny_config() if args.tiny else LLAMA_3_8B
    policy, slo = Policy.of(args.policy), Slo(0.5, 0.03)
    load = planned(read_trace(args.trace), args.rate, round_s, args.first_row, config)
    machine = Machine(config, is_tiny=args.tiny, max_running=args.max_running)
    latency, facts = machine.latency(), describe_gpu()
    rows: list[dict[str, Any]] = []
    while len(rows) < MIN_ROUNDS or time.monotonic() + round_s < ends_s:
        # Raises where a request failed or has no end.
        served, engine, _ = serve(machine, policy, load, slo, latency)
        engine.check_invariants()
        counts = engine.block_counts()
        assert counts.free == counts.total, counts
        row = report(policy.name, args.rate, served, slo)
        del served, engine
        row["memory_mib"] = memory_mib(is_tiny=args.tiny)
        rows.append(row)
        show(row)
        print(
            "  " + ", ".join(f"{name} {value:.0f} MiB" for name, value in row["memory_mib"].items()),
            flush=True,
        )
        if args.json:
            result = {
                "format": "phasewise-soak-gpu/v1",
                "machine": facts,
                "trace": args.trace.name,
                "first_row": args.first_row,
                "round_s": round_s,
                "slo": asdict(slo),
                "rows": rows,
            }
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    growth = growth_mib([row["memory_mib"] for row in rows])
    shown = ", ".join(f"{name} {grown:+.1f} (all {total:+.1f})" for name, (grown, total) in growth.items())
    print(
        f"{len(rows)} rounds, {sum(row['num_requests'] for row in rows)} requests, none failed; a round adds MiB: {shown}"
    )
    grows = any(grown > args.slack_mib or total > args.once_mib for grown, total in growth.values())
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
