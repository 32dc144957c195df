"""CPU time that the engine itself takes in a step, without a model: a table of what pytest-benchmark measures.

    python benchmarks/engine/scheduler_step.py [--quick] [--json FILE]

Every running sequence decodes one token in each step, so this is the cost that is added to the forward pass
of each token of a batch. Time is the process's own CPU time; steps are timed one by one after a warm-up.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.control.slo import percentile  # noqa: E402

TESTS = Path(__file__).resolve().parent / "test_scheduler_overhead.py"
NUM_STEPS, NUM_QUICK_STEPS = 3000, 200


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result; times in microseconds of CPU per step."""

    what: str
    num_sequences: int
    num_steps: int
    p50_us: float
    p95_us: float
    mean_us: float


class Steps:
    """Tells the tests how many steps to time."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    @pytest.fixture
    def num_steps(self) -> int:
        return self._num_steps


def measure(num_steps: int) -> list[Row]:
    """Raises RuntimeError when a test fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        arguments = [str(TESTS), "-q", "--no-header", "--timeout=0", "-p", "no:cacheprovider"]
        arguments += [f"--rootdir={ROOT}", "--benchmark-quiet", "--benchmark-disable-gc"]
        arguments += ["--benchmark-timer=time.process_time", f"--benchmark-json={path}"]
        if pytest.main(arguments, plugins=[Steps(num_steps)]) != pytest.ExitCode.OK:
            raise RuntimeError("the benchmark failed; see above")
        found: dict[str, Any] = json.loads(path.read_text())
    return [row_of(entry) for entry in found["benchmarks"]]


def row_of(entry: dict[str, Any]) -> Row:
    """From one of the benchmarks in pytest-benchmark's file."""
    times_us = sorted(seconds * 1e6 for seconds in entry["stats"]["data"])
    return Row(
        what=entry["name"].partition("[")[0].removeprefix("test_").replace("_", " "),
        num_sequences=entry["params"]["num_sequences"],
        num_steps=len(times_us),
        p50_us=round(percentile(times_us, 50), 1),
        p95_us=round(percentile(times_us, 95), 1),
        mean_us=round(sum(times_us) / len(times_us), 1),
    )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    arguments = parser.parse_args()
    rows = measure(NUM_QUICK_STEPS if arguments.quick else NUM_STEPS)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['num_cpus']} CPUs, Python {machine['python']}")
    print(f"{'':<22}{'sequences':>10}{'steps':>8}{'p50':>9}{'p95':>9}{'mean':>9}  (us)")
    for row in rows:
        print(
            f"{row.what:<22}{row.num_sequences:>10}{row.num_steps:>8}{row.p50_us:>9.1f}{row.p95_us:>9.1f}"
            f"{row.mean_us:>9.1f}"
        )
    if arguments.json is not None:
        result = {
            "format": "phasewise-engine-step/v2",
            "machine": machine,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
