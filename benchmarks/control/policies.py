"""Capacity of every policy, with every order of the queue, on loads that stay and loads that shift.

    python benchmarks/control/policies.py [--quick] [--only NAME[,NAME]] [--azure FILE] [--mooncake FILE] [--json FILE]

Eight H100 that serve Llama-3-8B's shape, with SigLIP for pictures, in the coarse simulator (docs/simulation.md). Capacity is the highest
rate at which 90 or 99 % of all requests meet both targets, by bisection; refused requests have not met them. Mean of the seeds and half of the
95 % interval (Student's t). The same loads for all policies. static_split and the beginning of epd_queue, epd_steady and phasewise_apart are the best of
all static shapes on a load of another seed; on that load distserve searches for its placement. Two processes.
"""

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.trace import Trace, read_trace  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.control.policies.aggregated import PrefillFirst  # noqa: E402
from orchestrator.control.policies.catalogue import (  # noqa: E402
    POLICIES,
    PREFILL_TOKENS,
    D,
    E,
    P,
    Setting,
    Workload,
    orders,
)
from orchestrator.control.policies.disaggregated import distserve_shape  # noqa: E402
from orchestrator.control.policies.orders import Fcfs  # noqa: E402
from orchestrator.control.policies.placing import LeastLoaded  # noqa: E402
from orchestrator.control.policies.policy import Policy  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from orchestrator.sim.capacity import NEAR, capacity_rps, estimate  # noqa: E402
from orchestrator.sim.coarse import CoarseConfig, CoarseSimulation  # noqa: E402
from orchestrator.sim.coarse_costs import CoarseCosts, rates  # noqa: E402
from orchestrator.sim.coarse_loads import Kind, of_trace, shifting  # noqa: E402
from orchestrator.sim.coarse_request import CoarseRequest  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402
from workers.step_choice import Layout  # noqa: E402

TRACES = ROOT / "tests" / "fixtures" / "traces"
NUM_DEVICES, KV_TOKENS, MAX_SEQUENCES = 8, 400_000, 256
SEEDS, SEARCH_SEED = range(5), 1000
ATTAINMENTS = (0.90, 0.99)
STEPS, QUICK_STEPS, ALONE_STEPS = 6, 4, 10
#: Workers of prefill that one of decode has beside it when its goodput is looked for.
NUM_FEEDING = 64
#: Of shifting loads.
DURATION_S = 40.0
LATENCY = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
COSTS = CoarseCosts.of(LATENCY)
#: SMs of decode beside 132 less that of prefill.
LAYOUTS = tuple(
    Layout(1 - sms / 132, sms / 132, *rates(1 - sms / 132, sms / 132)) for sms in range(16, 120, 8)
)
Make = Callable[[random.Random, float], list[CoarseRequest]]


@dataclass(frozen=True)
class Load:
    """rates_rps: between which capacity is looked for, and at which attainment is shown."""

    name: str
    slo: Slo
    make: Make
    rates_rps: tuple[float, float]
    shown_rps: tuple[float, ...]


@cache
def trace(path: Path) -> Trace:
    return read_trace(path)


def of_file(
    path: Path, slo: Slo, duration_s: float, rng: random.Random, rate_rps: float
) -> list[CoarseRequest]:
    return of_trace(trace(path), slo, rng, rate_rps=rate_rps, duration_s=duration_s)


def of_kinds(
    kinds: tuple[Kind, Kind], slo: Slo, first_share: float, rng: random.Random, rate_rps: float
) -> list[CoarseRequest]:
    return shifting(*kinds, slo, rng, rate_rps=rate_rps, duration_s=DURATION_S, first_share=first_share)


def loads(azure: Path, mooncake: Path) -> list[Load]:
    chat, long, image, epd = Slo(0.5, 0.03), Slo(3.0, 0.05), Slo(2.0, 0.04), Slo(1.4, 0.04)
    lengths = (Kind(512, 384), Kind(6000, 64))
    pictures = (Kind(800, 250), Kind(200, 60, 0.8, 3))
    outputs = (Kind(22, 50, 1.0, 2, 0.0), Kind(22, 500, 1.0, 2, 0.0))
    length_slo = Slo(1.0, 0.04)
    return [
        Load("azure", chat, partial(of_file, azure, chat, 15.0), (60, 280), (120, 160, 200)),
        Load("mooncake", long, partial(of_file, mooncake, long, 100.0), (2, 32), (5, 10, 15)),
        Load(
            "short to long", length_slo, partial(of_kinds, lengths, length_slo, 0.5), (15, 75), (20, 40, 50)
        ),
        Load("text to images", image, partial(of_kinds, pictures, image, 0.5), (12, 75), (20, 40, 50)),
        Load("10 x 50, 90 x 500", epd, partial(of_kinds, outputs, epd, 0.1), (12, 60), (20, 40, 46)),
    ]


def setting_of(load: Load, split: tuple[Any, ...], placed: tuple[Any, ...]) -> Setting:
    requests = load.make(random.Random(SEARCH_SEED), load.shown_rps[1])
    means = Workload(
        statistics.fmean(one.prompt_tokens for one in requests),
        statistics.fmean(one.output_tokens for one in requests),
        statistics.fmean(one.num_tiles for one in requests),
    )
    return Setting(
        NUM_DEVICES,
        LATENCY,
        load.slo,
        means,
        split,
        COSTS.kv_token_s,
        COSTS.tile_s,
        placed,
        LAYOUTS,
    )


@dataclass(frozen=True)
class Case:
    """One policy with one order on one load."""

    load: Load
    split: tuple[Any, ...]
    policy: str
    order: str
    placed: tuple[Any, ...] = ()

    def simulation(self, seed: int, rate_rps: float) -> CoarseSimulation:
        one = POLICIES[self.policy](
            setting_of(self.load, self.split, self.placed), orders(COSTS.step, self.load.slo)[self.order]
        )
        requests = self.load.make(random.Random(seed), rate_rps)
        return CoarseSimulation(CoarseConfig(COSTS, KV_TOKENS, MAX_SEQUENCES), one, requests)

    def reaches(self, seed: int, attainment: float, rate_rps: float) -> bool:
        found = self.simulation(seed, rate_rps).reaches(attainment)
        gc.collect()
        return found

    def capacity_rps(
        self, seed: int, attainment: float, num_steps: int, near: tuple[float, float] | None
    ) -> float:
        """See orchestrator.sim.capacity; 0 when the lowest rate of the load is too much."""
        reaches = partial(self.reaches, seed, attainment)
        return capacity_rps(reaches, between=self.load.rates_rps, num_steps=num_steps, near=near)

    def capacities(self, seeds: range, num_steps: int) -> dict[float, list[float]]:
        """By attainment, for each seed; looked for near that of the first seed, and that of 99 % below that of 90 %."""
        found: dict[float, list[float]] = {attainment: [] for attainment in ATTAINMENTS}
        for seed in seeds:
            above = math.inf
            for attainment in ATTAINMENTS:
                near = None
                if found[attainment] and found[attainment][0]:
                    near = (found[attainment][0] / NEAR, found[attainment][0] * NEAR)
                elif above < math.inf:
                    near = (above / NEAR**2, above * 1.05)
                above = self.capacity_rps(seed, attainment, num_steps, near)
                found[attainment].append(above)
        return found


def best_split(load: Load, num_steps: int) -> tuple[Any, ...]:
    """Of one phase to a worker, by capacity at 90 % on a load that is not reported."""
    has_tiles = any(one.num_tiles for one in load.make(random.Random(SEARCH_SEED), load.shown_rps[0]))
    shapes = [
        (E,) * e + (P,) * p + (D,) * (NUM_DEVICES - e - p)
        for e in (range(1, NUM_DEVICES - 1) if has_tiles else (0,))
        for p in range(1, NUM_DEVICES - e)
    ]
    found = [
        (Case(load, one, "static_split", "fcfs").capacity_rps(SEARCH_SEED, 0.9, num_steps, None), -i)
        for i, one in enumerate(shapes)
    ]
    return shapes[-max(found)[1]]


@dataclass(frozen=True)
class Placed:
    """What DistServe's placement search found, and the goodput of one device that does a phase alone."""

    prefill_rps: float
    decode_rps: float
    shape: tuple[Any, ...]


def place(load: Load) -> Placed:
    """By goodputs that are simulated on the load of `best_split`, as DistServe does."""
    has_tiles = any(one.num_tiles for one in load.make(random.Random(SEARCH_SEED), load.shown_rps[0]))
    lowest_rps, highest_rps = load.rates_rps[0] / 2 / NUM_DEVICES, load.rates_rps[1]
    found = [
        capacity_rps(
            partial(reaches_alone, load, phases), between=(lowest_rps, highest_rps), num_steps=ALONE_STEPS
        )
        for phases in (E | P if has_tiles else P, D)
    ]
    shape = distserve_shape(NUM_DEVICES, prefill_rps=found[0], decode_rps=found[1], has_tiles=has_tiles)
    return Placed(*found, shape)


def reaches_alone(load: Load, phases: Any, rate_rps: float) -> bool:
    """Whether one worker meets the target of its phase for 90 % of the requests. Decode has more prefill beside it than it needs.

    It gets one of eight requests of a cluster, as it would there: those of a trace that come at once would all be its own. And so
    do seven others.
    """
    requests = load.make(random.Random(SEARCH_SEED), NUM_DEVICES * rate_rps)
    if phases == D:
        slo = replace(load.slo, ttft_s=math.inf)
        requests = [replace(one, slo=slo) for one in requests]
        shape = (E | P,) * NUM_FEEDING + (D,)
    else:
        requests = [replace(one, output_tokens=1) for one in requests]
        shape = (phases, D)
    alone = Policy("alone", shape, Fcfs, LeastLoaded(), PrefillFirst(PREFILL_TOKENS))
    config = CoarseConfig(COSTS, KV_TOKENS, MAX_SEQUENCES)
    runs = (CoarseSimulation(config, alone, requests[i::NUM_DEVICES]).run() for i in range(NUM_DEVICES))
    num_met = sum(record.is_met for run in runs for record in run.records)
    return num_met >= 0.9 * len(requests)


def variants() -> list[tuple[str, str]]:
    """Published ones with both orders; ours, and the best of the others without admission, with that of ours too."""
    both = [
        (policy, order) for policy in POLICIES for order in ("fcfs", "spf") if policy != "phasewise_apart"
    ]
    return [*both, ("sarathi", "slack"), ("phasewise", "slack"), ("phasewise_apart", "slack")]


def cell(case: Case, seeds: range, num_steps: int) -> dict[str, Any]:
    """A row of the table."""
    # The objects of a simulation refer to each other, and are looked for once after each.
    gc.disable()
    load = case.load
    row: dict[str, Any] = {"load": load.name, "policy": case.policy, "order": case.order}
    for attainment, found in case.capacities(seeds, num_steps).items():
        capacity = estimate(found)
        row[f"capacity_{attainment * 100:.0f}"] = {
            "mean_rps": capacity.mean,
            "half_interval_rps": capacity.half,
            "by_seed": found,
        }
    row["attainment"] = {}
    for rate in load.shown_rps:
        result = case.simulation(0, rate).run()
        row["attainment"][f"{rate:g}"] = result.attainment
        row["switches_per_min"] = 60 * len(result.switches) / result.elapsed_s
    return row


def shape_text(split: tuple[Any, ...]) -> str:
    names = ((E, "E"), (E | P, "EP"), (P, "P"), (D, "D"))
    return "+".join(f"{split.count(phases)}{name}" for phases, name in names if phases in split)


def print_load(load: Load, split: tuple[Any, ...], placed: Placed, rows: list[dict[str, Any]]) -> None:
    target = f"TTFT {load.slo.ttft_s:g} s, TPOT {load.slo.tpot_s * 1e3:g} ms"
    print(f"\n{load.name}: {target}; best static split {shape_text(split)}")
    print(
        f"placed by distserve: {shape_text(placed.shape)}; alone, one device has {placed.prefill_rps:.1f} req/s of prefill, "
        f"{placed.decode_rps:.1f} of decode"
    )
    shown = "".join(f"{f'at {rate:g}':>8}" for rate in load.shown_rps)
    print(f"{'policy':<28}{'order':<7}{'90 %, req/s':>15}{'99 %, req/s':>15}{shown}{'switches/min':>14}")
    for row in rows:
        cells = ""
        for key in ("capacity_90", "capacity_99"):
            one = row[key]
            cells += f"{one['mean_rps']:>9.1f} +-{one['half_interval_rps']:<4.1f}"
        curve = "".join(f"{value:>8.1%}" for value in row["attainment"].values())
        print(
            f"{row['policy']:<28}{row['order']:<7}{cells}{curve}{row['switches_per_min']:>10.1f}", flush=True
        )


def named_policies(text: str) -> set[str]:
    """Raises argparse.ArgumentTypeError."""
    found = set(text.split(","))
    unknown = sorted(found - set(POLICIES))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no policy is called {unknown[0]!r}; there are {', '.join(POLICIES)}"
        )
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds and a coarser search")
    parser.add_argument(
        "--only",
        type=named_policies,
        default=set(POLICIES),
        metavar="NAME[,NAME]",
        help=f"of the policies: {', '.join(POLICIES)}",
    )
    parser.add_argument("--azure", type=Path, default=TRACES / "azure_llm_2023_conv.csv", metavar="FILE")
    parser.add_argument(
        "--mooncake", type=Path, default=TRACES / "mooncake_conversation.jsonl", metavar="FILE"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    seeds, num_steps = (range(2), QUICK_STEPS) if args.quick else (SEEDS, STEPS)
    began_s, rows, splits, placements = time.monotonic(), [], {}, {}
    all_loads = loads(args.azure, args.mooncake)
    with ProcessPoolExecutor(2) as pool:
        best = pool.map(partial(best_split, num_steps=QUICK_STEPS), all_loads)
        for load, placed, split in zip(all_loads, pool.map(place, all_loads), best, strict=True):
            splits[load.name] = shape_text(split)
            placements[load.name] = asdict(placed) | {"shape": shape_text(placed.shape)}
            cases = [
                Case(load, split, policy, order, placed.shape)
                for policy, order in variants()
                if policy in args.only
            ]
            found = list(pool.map(partial(cell, seeds=seeds, num_steps=num_steps), cases))
            print_load(load, split, placed, found)
            rows += found
    print(f"\n{time.monotonic() - began_s:.0f} s")
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        names = {"azure": args.azure.name, "mooncake": args.mooncake.name}
        data = {
            "date": date,
            "machine": describe_machine(),
            "num_devices": NUM_DEVICES,
            "num_seeds": len(seeds),
        }
        data |= {"traces": names, "static_splits": splits, "placements": placements, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
