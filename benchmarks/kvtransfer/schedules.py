"""Random schedules of KV transfers: what they met, how they ended, and whether any broke a rule.

    python benchmarks/kvtransfer/schedules.py [--quick] [--count 100000] [--first-seed 0] [--jobs 2] [--json FILE]

Each seed is one schedule of both machines, of delay, loss, doubles, disorder, damage, cuts, aborts, expiry, refusals and
restarts, with real messages; see tests/support/kvtransfer_schedule.py. Fails when one breaks a rule, and when a row of
either machine's table, or a kind of fault, was never met.
"""

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from tests.support.kvtransfer_forgery import ROWS, Row  # noqa: E402
from tests.support.kvtransfer_schedule import Schedule, run_schedule  # noqa: E402

#: Seeds that a process takes at a time.
BATCH = 250
#: Failures that are printed.
MAX_SHOWN = 5


@dataclass(slots=True)
class Summary:
    """Of many schedules."""

    num_schedules: int = 0
    num_events: int = 0
    num_calm: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    rows: Counter[Row] = field(default_factory=Counter)
    #: Seed -> what did not hold.
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: "Summary") -> None:
        """Take another's counts."""
        self.num_schedules += other.num_schedules
        self.num_events += other.num_events
        self.num_calm += other.num_calm
        self.ends.update(other.ends)
        self.faults.update(other.faults)
        self.rows.update(other.rows)
        self.failures.update(other.failures)


def run_batch(first_seed: int, count: int) -> Summary:
    """These seeds."""
    summary = Summary()
    for seed in range(first_seed, first_seed + count):
        summary.num_schedules += 1
        try:
            outcome = run_schedule(seed)
        except Exception as error:  # noqa: BLE001 - counted, and makes the run fail
            summary.failures[seed] = f"{type(error).__name__}: {error}"
            continue
        summary.num_events += outcome.num_events
        summary.num_calm += outcome.is_calm
        summary.ends.update(outcome.ends)
        summary.faults.update(outcome.faults)
        summary.rows.update(outcome.rows)
    return summary


def run_all(first_seed: int, count: int, num_jobs: int) -> Summary:
    """All seeds, in so many processes."""
    firsts = range(first_seed, first_seed + count, BATCH)
    sizes = [min(BATCH, first_seed + count - first) for first in firsts]
    total = Summary()
    with ProcessPoolExecutor(num_jobs) as pool:
        for summary in pool.map(run_batch, firsts, sizes):
            total.add(summary)
            print(f"\r{total.num_schedules:>8,} schedules", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return total


def print_counts(title: str, counts: Counter[str]) -> None:
    """The most frequent first."""
    print(f"\n{title}")
    for name, count in counts.most_common():
        print(f"{count:>10,}  {name}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="5,000 schedules, for a look")
    parser.add_argument("--count", type=int, default=100_000, help="schedules (100000)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first (0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    count = min(args.count, 5000) if args.quick else args.count
    began_s = time.perf_counter()
    total = run_all(args.first_seed, count, args.jobs)
    wall_s = time.perf_counter() - began_s
    print(
        f"{total.num_schedules:,} schedules ({total.num_calm:,} calm), {total.num_events:,} events, {wall_s:.0f} s"
    )
    print_counts("how the sides of a transfer ended", total.ends)
    print_counts("faults", total.faults)
    rows = Counter({f"{name} {state} {event}": total.rows[name, state, event] for name, state, event in ROWS})
    print_counts("rows of the tables", rows)
    faults = {name: total.faults[name] for name in Schedule(0).faults.names}
    never = [name for name, number in (*rows.items(), *faults.items()) if number == 0]
    for name in never:
        print(f"never met: {name}")
    for seed, problem in list(total.failures.items())[:MAX_SHOWN]:
        print(f"seed {seed} failed: {problem}")
    print(f"\n{len(total.failures)} of {total.num_schedules:,} schedules broke a rule")
    if args.json:
        data = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "first_seed": args.first_seed,
            "num_schedules": total.num_schedules,
            "num_calm": total.num_calm,
            "num_events": total.num_events,
            "wall_s": round(wall_s, 1),
            "num_failures": len(total.failures),
            "failures": {str(seed): problem for seed, problem in total.failures.items()},
            "ends": dict(total.ends.most_common()),
            "faults": dict(total.faults.most_common()),
            "rows": dict(rows.most_common()),
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 1 if total.failures or never else 0


if __name__ == "__main__":
    sys.exit(main())
