"""Seeded simulations with faults and switches of phases: whatever happens, nothing is lost, doubled or held for ever.

    python benchmarks/control/safety.py [--quick] [--count N] [--first SEED] [--pictures] [--json FILE]

Each seed draws a shape of two to four workers, of which some encode in every third, a small load, with pictures there, up to three faults (crashes, pauses, slow steps, cuts, messages that are lost), up to four switches that
somebody asks for, whether the controller switches by itself, and whether it adds workers and gives them back. It is simulated with the code that serves (docs/simulation.md). What must
hold, at every view, at moments in between, and at the end:

    - every phase that is needed has a worker that is declared for it, and no worker is used for a phase that it is giving up;
    - the controller itself makes no more switches a minute than its cooldown allows;
    - every request has one end, with tokens that are right and in order; without faults that end is its last token;
    - no block, lease, transfer, embedding or picture is held when all requests are over;
    - what arrives once the faults are over is served.

The simulator that serves does not divide a device, so each seed also draws a small load for a policy that does, in the coarse one:

    - at every step its two sides have no more of a device's SMs for themselves than there are. Of shares that are set apart that is their sum. Those of semi_pd are limits of MPS
      processes, which may overlap: of them it is what the limit of the other side leaves.

A seed that fails is printed, and `--first SEED --count 1` runs it again.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import PlannedRequest  # noqa: E402
from orchestrator.bench.records import OK  # noqa: E402
from orchestrator.bench.trace import TraceRow  # noqa: E402
from orchestrator.control.auto_switch import SwitchMode  # noqa: E402
from orchestrator.control.declared import DeclaredWorker, WorkerResources  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.control.policies.catalogue import POLICIES, Setting, Workload, orders  # noqa: E402
from orchestrator.control.policies.policy import Stepping, WorkerLoad  # noqa: E402
from orchestrator.control.role_switch import SwitchRequest  # noqa: E402
from orchestrator.control.scaling_config import ScalingConfig  # noqa: E402
from orchestrator.control.slo import Slo  # noqa: E402
from orchestrator.control.view import ClusterView, SwitchState  # noqa: E402
from orchestrator.sim.coarse import CoarseConfig, CoarseSimulation  # noqa: E402
from orchestrator.sim.coarse_costs import CoarseCosts  # noqa: E402
from orchestrator.sim.coarse_loads import Kind, shifting  # noqa: E402
from orchestrator.sim.faults import Fault, FaultKind, random_rate  # noqa: E402
from orchestrator.sim.pictures import Pictures  # noqa: E402
from orchestrator.sim.simulation import SimConfig, Simulation  # noqa: E402
from tests.support.coarse import check_split  # noqa: E402
from workers.api import EngineConfig, KvTransferConfig, Phase, PhaseSet, WorkerId  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402
from workers.step_choice import Head, Layout, Split, Step  # noqa: E402

E, P, D = (frozenset({phase}) for phase in Phase)
BOTH = P | D
SHAPES: tuple[tuple[PhaseSet, ...], ...] = (
    (BOTH, BOTH),
    (P, P, D, D),
    (BOTH, P, D),
    (P, D, D),
    (BOTH, BOTH, BOTH),
)
#: Where pictures come.
PICTURE_SHAPES: tuple[tuple[PhaseSet, ...], ...] = (
    (E, P, D),
    (E, E, BOTH),
    (E | P, E | P, D, D),
    (E, BOTH, BOTH),
    (E | BOTH, E | BOTH),
    (E, E, P, D),
)
ENGINE = EngineConfig(
    kv_cache_bytes=10**9, token_budget=512, max_running_sequences=16, max_waiting_requests=100
)
LOSSES = (FaultKind.LOSS_WITH_GATEWAY, FaultKind.LOSS_WITH_WORKERS, FaultKind.LOSS_OF_VIEWS)
PICTURE_SHARE, PICTURES_PER_REQUEST = 1 / 3, 3
LATENCY = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
COARSE_COSTS = CoarseCosts.of(LATENCY)
#: Policies that divide a device, and divisions for phasewise, as if they cost little: with the speeds of an H100 it makes none.
DIVIDING = ("nexus", "semi_pd", "phasewise")
LAYOUTS = tuple(Layout(1 - sms / 132, sms / 132, 0.9, 0.9) for sms in range(16, 120, 8))
#: Faults and switches happen in so many seconds; requests that must be served arrive so long after them.
TROUBLE_S, CALM_S = 3.0, 45.0
#: After the last request nothing may be held any more.
HELD_S = 15.0
NUM_AFTER = 2
TIMEOUT_S = 60.0
#: One every two seconds, and those that are taken back.
MOST_SWITCHES_A_MINUTE = 31


@dataclass(frozen=True)
class Case:
    """What one seed draws."""

    config: SimConfig
    plan: tuple[PlannedRequest, ...]
    num_after: int


def has_pictures(seed: int) -> bool:
    """What `draw` draws first."""
    return random.Random(seed).random() < PICTURE_SHARE


def draw(seed: int) -> Case:
    """One case."""
    rng = random.Random(seed)
    pictures = Pictures.of(LATENCY, rng.randint(1, 4)) if rng.random() < PICTURE_SHARE else None
    shape = rng.choice(SHAPES if pictures is None else PICTURE_SHAPES)
    names = [f"w{i}" for i in range(len(shape))]
    declared = tuple(
        DeclaredWorker(
            WorkerId(name),
            phases,
            "simulated",
            WorkerResources(1),
            ENGINE,
            KvTransferConfig(lease_s=5.0, resume_s=1.0),
        )
        for name, phases in zip(names, shape, strict=True)
    )
    faults = tuple(
        Fault(
            rng.uniform(0, TROUBLE_S),
            rng.choice(list(FaultKind)),
            rng.choice(names),
            rng.uniform(0.1, 3.0),
            3.0,
            random_rate(rng),
        )
        for _ in range(rng.choice((0, 1, 1, 2, 3)))
    )
    sets = (P, D, BOTH) if pictures is None else (P, D, BOTH, E, E | P, E | BOTH)
    switches = tuple(
        (
            rng.uniform(0, TROUBLE_S),
            SwitchRequest(f"s{i}", WorkerId(rng.choice(names)), rng.choice(sets), "asked for"),
        )
        for i in range(rng.choice((0, 1, 2, 4)))
    )
    # Every twentieth case is a rush, in which the controller has a reason to act.
    is_rush = rng.random() < 0.05
    num_requests = rng.randint(60, 90) if is_rush else rng.randint(4, 12)
    arrivals = sorted(rng.uniform(0, TROUBLE_S) for _ in range(num_requests))
    arrivals += [CALM_S + i for i in range(NUM_AFTER)]
    plan = tuple(
        _request(rng, n, at_s, pictures, most_tokens=3000 if is_rush else 1500)
        for n, at_s in enumerate(arrivals, 1)
    )
    switch_mode = SwitchMode.ON if rng.random() < 0.5 else SwitchMode.OFF
    # With settings that make a worker come, and go again while requests run.
    is_scaled = switch_mode is SwitchMode.ON and rng.random() < 0.5
    extra = tuple(replace(declared[-1], worker_id=WorkerId(f"w{len(shape) + i}")) for i in range(2))
    above = rng.choice((1.0, 0.02))
    scaling = ScalingConfig(
        tuple(one.worker_id for one in extra),
        above=above,
        aim=0.7 * above,
        below=rng.choice((0.6, 2.0)) * above,
        hold_s=1.0,
        release_s=1.0,
    )
    config = SimConfig(
        declared,
        LATENCY,
        seed=seed,
        load_s=1.0,
        timeout_s=TIMEOUT_S,
        max_context_tokens=16_384,
        faults=faults,
        switches=switches,
        slo=Slo(0.05, 0.02),
        switch_mode=switch_mode,
        check_every=500,
        pictures=pictures,
        extra=extra if is_scaled else (),
        scaling=scaling if is_scaled else None,
    )
    return Case(config, plan, NUM_AFTER)


def _request(
    rng: random.Random, number: int, at_s: float, pictures: Pictures | None, *, most_tokens: int
) -> PlannedRequest:
    prompt, output = rng.randint(1, most_tokens), rng.randint(1, 60)
    num_images = rng.randint(0, PICTURES_PER_REQUEST) if pictures is not None else 0
    if pictures is not None:
        prompt += num_images * pictures.num_tokens
    return PlannedRequest(
        TraceRow(number, at_s, prompt, output, (), num_images), at_s, prompt, output, num_images
    )


def check_shares(seed: int) -> int:
    """Simulate a policy that divides devices; returns how many steps were divided."""
    rng = random.Random(f"shares {seed}")
    num_workers, slo = rng.randint(1, 3), Slo(rng.uniform(0.2, 2.0), rng.uniform(0.008, 0.04))
    kinds = [
        Kind(rng.randint(20, 4000), rng.randint(2, 400), rng.choice((0.0, 0.5)), rng.randint(1, 3))
        for _ in range(2)
    ]
    requests = shifting(
        *kinds, slo, rng, rate_rps=rng.uniform(2, 30) * num_workers, duration_s=4.0, first_share=0.5
    )
    means = Workload(kinds[0].prompt_tokens, kinds[0].output_tokens, 0.0)
    setting = Setting(
        num_workers,
        LATENCY,
        slo,
        means,
        (BOTH,) * num_workers,
        COARSE_COSTS.kv_token_s,
        COARSE_COSTS.tile_s,
        (BOTH,) * num_workers,
        LAYOUTS,
    )
    name = rng.choice(DIVIDING)
    policy = POLICIES[name](setting, orders(COARSE_COSTS.step, slo)["fcfs"])
    watched = Watched(policy.stepping)
    config = CoarseConfig(COARSE_COSTS, 400_000, 256)
    simulation = CoarseSimulation(config, replace(policy, stepping=watched), requests)
    simulation.run()
    simulation.check_invariants()
    return watched.num_divided


@dataclass
class Watched:
    """Counts the steps of a policy that divide a device, and checks their shares."""

    stepping: Stepping
    num_divided: int = 0

    def step(self, now_s: float, device: WorkerLoad, head: Head) -> Step:
        """See Stepping."""
        step = self.stepping.step(now_s, device, head)
        if isinstance(step, Split):
            self.num_divided += 1
            check_split(step)
        return step


def check_view(view: ClusterView, needed: PhaseSet) -> None:
    """What holds of each."""
    served = {phase for worker in view.workers for phase in worker.phases}
    assert served >= needed, view
    for worker in view.workers:
        assert not worker.phases & worker.leaving, worker


def run(seed: int) -> tuple[int, str, Counter[str]]:
    """The seed, what went wrong if anything did, and what happened."""
    counts: Counter[str] = Counter()
    try:
        case = draw(seed)
        simulation = Simulation(case.config, case.plan, case.plan[-1].arrival_s)
        update = simulation.dispatcher.update_view
        needed = frozenset(phase for one in case.config.declared for phase in one.phases)

        def checked(view: ClusterView) -> bool:
            check_view(view, needed)
            return update(view)

        simulation.dispatcher.update_view = checked  # type: ignore[method-assign]
        result = simulation.run()
        assert result.num_wrong_tokens == 0, "tokens are wrong"
        records = result.load.records
        assert len(records) == len(case.plan), "requests without an end"
        late = [record.status for record in records[-case.num_after :]]
        assert late == [OK] * case.num_after, f"not served once the faults were over: {late}"
        if not case.config.faults:
            assert {record.status for record in records} == {OK}, "a request failed without a fault"
        _check_nothing_held(simulation)
        own = [switch for switch in result.switches if switch.digest]
        done = [switch for switch in own if switch.state is not SwitchState.UNDONE]
        for first in done:
            in_minute = sum(0 <= one.began_at_s - first.began_at_s < 60 for one in done)
            assert in_minute <= MOST_SWITCHES_A_MINUTE, "flapping"
        counts.update(
            requests=len(records),
            served=sum(record.status == OK for record in records),
            faults=len(case.config.faults),
            losses=sum(fault.kind in LOSSES for fault in case.config.faults),
            lost=simulation.cluster.network.num_lost,
            pictures=sum(one.num_images for one in case.plan),
            switches_done=sum(switch.state is not SwitchState.UNDONE for switch in result.switches),
            switches_undone=sum(switch.state is SwitchState.UNDONE for switch in result.switches),
            switches_by_itself=len(done),
            workers_added=sum(max(0, one.num_wanted - one.num_before) for one in result.scales),
            workers_gone=sum(one.num_wanted < one.num_before for one in result.scales),
            events=result.num_events,
            divided_steps=check_shares(seed),
        )
    except Exception:  # noqa: BLE001 - told with its seed
        return seed, traceback.format_exc(), counts
    return seed, "", counts


def _check_nothing_held(simulation: Simulation) -> None:
    until_s = simulation.timers.time() + HELD_S
    while simulation.timers.run_next(until_s):
        pass
    simulation.check_invariants()
    for process in simulation.cluster.living():
        counts = process.engine.block_counts()
        assert counts.in_use == counts.leased == 0, (process.spec.worker_id, counts)
        if process.images is not None:
            images = process.images.store.counts()
            assert images.num_waiting == process.images.num_encodes == 0, (process.spec.worker_id, images)
            assert images.num_free + images.num_cached == images.num_blocks, (process.spec.worker_id, images)
        assert process.engine.num_leases == process.engine.num_waiting == process.engine.num_running == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="200 seeds instead of 10,000")
    parser.add_argument("--count", type=int, metavar="N", help="so many seeds")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (default: 0)")
    parser.add_argument("--pictures", action="store_true", help="leave out seeds without pictures")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at a time (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    count = args.count or (200 if args.quick else 10_000)
    began_s = time.monotonic()
    total: Counter[str] = Counter()
    failed: list[int] = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        drawn = (seed for seed in itertools.count(args.first) if has_pictures(seed) or not args.pictures)
        seeds = list(itertools.islice(drawn, count))
        for done, (seed, problem, counts) in enumerate(pool.imap_unordered(run, seeds, chunksize=8), 1):
            total += counts
            if problem:
                failed.append(seed)
                print(f"seed {seed}:\n{problem}", file=sys.stderr)
            if done % 100 == 0:
                print(f"{done} of {count}, {len(failed)} failed", file=sys.stderr)
    result = {
        "machine": describe_machine(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_seeds": count,
        "first_seed": args.first,
        "only_with_pictures": args.pictures,
        "failed_seeds": sorted(failed),
        "took_s": round(time.monotonic() - began_s, 1),
        **total,
    }
    print(
        f"{count} seeds, {len(failed)} failed: {total['requests']:,} requests, {total['served']:,} served, {total['pictures']:,} pictures, "
        f"{total['faults']:,} faults, of which {total['losses']:,} lost {total['lost']:,} messages, {total['switches_done']:,} switches ({total['switches_by_itself']:,} by the "
        f"controller itself), {total['switches_undone']:,} refused or undone, {total['workers_added']:,} workers asked for, {total['workers_gone']:,} given back, "
        f"{total['events']:,} events; {total['divided_steps']:,} steps that divided a device"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
