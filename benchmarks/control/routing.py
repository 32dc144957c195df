"""Routing by what workers have cached: what a decision takes, and what it brings on a trace of conversations.

    python benchmarks/control/routing.py [--quick] [--only decision|simulation] [--json FILE]

A decision: which workers have the beginning of a prompt, from an index of 1,048,576 blocks over 256 workers, and which of them gets
it, by tokens and by seconds that are predicted from what workers have learnt of their steps; what these cost a worker is computed once for
each view, and timed. The names of the prompt's blocks are computed before, once for a request, and are timed apart. Times are of the
processor; collections of garbage in between are in them, and look past what was loaded at the beginning, as in the gateway's process. Half of the workers have
room for a prompt. A view: what a gateway does with one while it has 10,000 prompts at 256 workers, of which one has room, and 255 none; and with one of which none has. What it
brings is simulated (docs/simulation.md): sixteen workers of Llama-3-8B's shape on an H100 each, with 50 GB of KV, and the Mooncake conversation trace at 8 and 12
requests a second, two parts of it. The
baseline routes by load alone; both have the same prefix caches, and in both a worker finds what it has.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.bench.machine import describe_machine  # noqa: E402
from orchestrator.bench.plan import plan_requests, take_slice  # noqa: E402
from orchestrator.bench.summary import summarise  # noqa: E402
from orchestrator.bench.trace import read_trace  # noqa: E402
from orchestrator.control.declared import DeclaredWorker, WorkerResources  # noqa: E402
from orchestrator.control.known_shapes import DEVICES, MODELS  # noqa: E402
from orchestrator.control.prefill_speed import PrefillSpeed, prefill_speeds  # noqa: E402
from orchestrator.control.prefix_index import PrefixIndex, PromptChain  # noqa: E402
from orchestrator.control.router import (  # noqa: E402
    LoadLedger,
    PromptLoad,
    Route,
    choose_route,
    rooms_of,
)
from orchestrator.control.slo import Slo, percentile  # noqa: E402
from orchestrator.control.transfer_paths import LEAST_BYTES, TransferPaths  # noqa: E402
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView  # noqa: E402
from orchestrator.gateway.dispatcher import Dispatcher  # noqa: E402
from orchestrator.gateway.validation import CheckedRequest  # noqa: E402
from orchestrator.sim.simulation import SimConfig, Simulation  # noqa: E402
from orchestrator.sim.timers import SimTimers  # noqa: E402
from tests.support.quiet_workers import OpenLinks  # noqa: E402
from workers.api import (  # noqa: E402
    Abort,
    Command,
    EngineConfig,
    KvBlocksStored,
    KvDirection,
    KvPeer,
    KvTransferConfig,
    ModelInfo,
    Phase,
    PhaseSet,
    PhaseWork,
    RequestId,
    SamplingParams,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.block_hash import root_hash  # noqa: E402
from workers.latency_model import LatencyModel  # noqa: E402
from workers.step_shape import FactorSource  # noqa: E402

BOTH = frozenset({Phase.PREFILL, Phase.DECODE})
NUM_WAITING = 10_000
NUM_WORKERS, NUM_BLOCKS, BLOCK_SIZE = 256, 2**20, 16
PROMPT_TOKENS = 8192
SLO = Slo(3.0, 0.05)
ENGINE = EngineConfig(
    kv_cache_bytes=50 * 10**9,
    token_budget=1024,
    max_running_sequences=256,
    max_waiting_requests=10_000,
)
SHAPES: dict[str, tuple[PhaseSet, ...]] = {
    "16 x prefill and decode": (BOTH,) * 16,
    "10 x prefill, 6 x decode": (frozenset({Phase.PREFILL}),) * 10 + (frozenset({Phase.DECODE}),) * 6,
}


def worker_view(name: str, rng: random.Random) -> WorkerView:
    """A worker with sequences, that has learnt what its steps take: a little else than others have."""
    latency = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
    c0, c1, c2, c3 = (rng.uniform(0.9, 1.1) * factor for factor in latency.factors)
    work = PhaseWork(num_decoding=32, decode_context=32 * rng.randrange(100, 8000))
    costs = replace(latency.costs(), factors=(c0, c1, c2, c3), source=FactorSource.FITTED)
    status = WorkerStatus(
        WorkerId(name),
        1,
        BOTH,
        WorkerState.READY,
        step_costs=costs,
        work=work,
        room_tokens=rng.choice((0, 100_000)),
    )
    return WorkerView(WorkerId(name), 1, BOTH, LifecycleState.READY, f"{name}:1", status=status)


def apart(workers: Sequence[WorkerView], rng: random.Random) -> ClusterView:
    """The same where half of them prefill and half decode, on hosts of eight, and every pair has met."""
    half = len(workers) // 2
    views = []
    for i, worker in enumerate(workers):
        assert worker.status is not None
        phases = frozenset({Phase.PREFILL}) if i < half else frozenset({Phase.DECODE})
        targets = range(half, len(workers)) if i < half else ()
        peers = tuple(
            KvPeer(
                host(j, half), KvDirection.SENDING, "grpc", "", "none", 1, LEAST_BYTES, rng.uniform(1e9, 2e10)
            )
            for j in targets
        )
        status = replace(worker.status, phases=phases, peers=peers)
        views.append(replace(worker, phases=phases, address=host(i, half), status=status))
    return ClusterView("d", 1, 1, "m", tuple(views))


def host(number: int, half: int) -> str:
    """Four that prefill and four that decode share one."""
    return f"10.0.0.{number % half // 4}:{number}"


def time_decisions(num_decisions: int) -> dict[str, float]:
    """In seconds."""
    gc.collect()
    gc.freeze()
    rng = random.Random(1)
    root = root_hash("model", "tokenizer", "")
    workers = tuple(worker_view(f"w-{i}", rng) for i in range(NUM_WORKERS))
    view, ledger, index = ClusterView("d", 1, 1, "m", workers), LoadLedger(), PrefixIndex()
    chains = []
    for worker in workers:
        index.add(worker, BLOCK_SIZE)
        ledger.add(
            worker.worker_id, prefill_tokens=rng.randrange(8192), decode_sequences=rng.randrange(1, 64)
        )
    num_prompts = NUM_BLOCKS * BLOCK_SIZE // PROMPT_TOKENS
    for number in range(num_prompts):
        tokens = [rng.randrange(32_000) for _ in range(PROMPT_TOKENS + 1)]
        chain = PromptChain(root, tokens, len(tokens))
        names = tuple(chain.hashes(BLOCK_SIZE))
        for worker in rng.sample(workers, 1 + number % 8):
            index.apply(worker, [KvBlocksStored(root, names)])
        if number % 16 == 0:
            # Some beginnings are everywhere, and of another length at each worker.
            for worker in workers:
                index.apply(worker, [KvBlocksStored(root, names[: rng.randrange(len(names))])])
        chains.append(chain)
        if number % 100 == 0:
            print(f"\rindex of {index.num_blocks:,} blocks", end="", file=sys.stderr)
    print(file=sys.stderr)
    began_s = time.process_time()
    speeds = prefill_speeds(view, {})
    speeds_s = time.process_time() - began_s
    divided = apart(workers, rng)
    began_s = time.process_time()
    paths = TransferPaths.of(divided)
    paths_s = time.process_time() - began_s
    naming_s = []
    by: dict[str, tuple[ClusterView, dict[WorkerId, PrefillSpeed] | None, TransferPaths | None]] = {
        "tokens": (view, None, None),
        "seconds": (view, speeds, None),
        "paths": (divided, prefill_speeds(divided, {}), paths),
    }
    deciding_s: dict[str, list[float]] = {name: [] for name in by}
    for _ in range(num_decisions):
        known = rng.choice(chains)
        fresh = PromptChain(root, known._token_ids, known.num_prompt_tokens)
        began_s = time.process_time()
        deque(fresh.hashes(BLOCK_SIZE), maxlen=0)
        named_s = time.process_time()
        naming_s.append(named_s - began_s)
        for name, (seen, known_speeds, known_paths) in by.items():
            rooms = rooms_of(seen)
            began_s = time.process_time()
            cached = index.cached_tokens(fresh)
            prompt = PromptLoad(
                PROMPT_TOKENS + 1, cached, index.num_blocks_by_worker(), max_tokens=PROMPT_TOKENS + 500
            )
            route = choose_route(seen, ledger, lambda _: True, prompt, known_speeds, known_paths, rooms)
            deciding_s[name].append(time.process_time() - began_s)
            assert isinstance(route, Route)
            assert (route.predicted is None) == (known_speeds is None)
    return {
        "num_blocks": index.num_blocks,
        "num_workers": NUM_WORKERS,
        "prompt_tokens": PROMPT_TOKENS,
        "speeds_s": speeds_s,
        "tokens_p50_s": statistics.median(deciding_s["tokens"]),
        "tokens_p99_s": percentile(sorted(deciding_s["tokens"]), 99),
        "seconds_p50_s": statistics.median(deciding_s["seconds"]),
        "seconds_p99_s": percentile(sorted(deciding_s["seconds"]), 99),
        "paths_s": paths_s,
        "paths_p50_s": statistics.median(deciding_s["paths"]),
        "paths_p99_s": percentile(sorted(deciding_s["paths"]), 99),
        "naming_p50_s": statistics.median(naming_s),
    }


class Everywhere(OpenLinks):
    """Links to all workers, which hear nothing."""

    num_aborts = 0

    def send(self, _worker: WorkerView, command: Command) -> None:
        self.num_aborts += isinstance(command, Abort)


def time_views(num_views: int) -> dict[str, float]:
    """In seconds. Each view is 1 s after the one before."""
    timers, rng, links = SimTimers(), random.Random(2), Everywhere()
    gateway = Dispatcher(
        timers,
        lambda _listener: links,
        max_waiting_requests=NUM_WAITING,
        max_running_requests=2 * NUM_WAITING,
        learn_model=learn_nothing,
        slo=SLO,
    )
    workers = [worker_view(f"w-{i}", rng) for i in range(NUM_WORKERS)]
    version = 0

    def publish(num_roomy: int, room: int) -> float:
        nonlocal version
        version += 1
        timers.now_s += 1.0
        views = []
        for i, worker in enumerate(workers):
            assert worker.status is not None
            work = replace(worker.status.work, prefill_tokens=40 * 2000)
            status = replace(worker.status, work=work, room_tokens=room if i < num_roomy else 0)
            views.append(replace(worker, status=status))
        view = ClusterView("d", 1, version, "m", tuple(views))
        began_s = time.process_time()
        gateway.update_view(view)
        return time.process_time() - began_s

    publish(NUM_WORKERS, 10**6)
    root = root_hash("model", "tokenizer", "")
    for number in range(NUM_WAITING):
        prompt = tuple(rng.randrange(32_000) for _ in range(2000))
        checked = CheckedRequest(RequestId(f"r{number}"), prompt, SamplingParams(500), prefix_root=root)
        gateway.submit(checked, arrived_at_s=timers.now_s, deadline_s=timers.now_s + 10**6)
        if number % 100 == 0:
            print(f"\r{number:,} requests", end="", file=sys.stderr)
    print(file=sys.stderr)
    gc.collect()
    gc.freeze()
    full_s = sorted(publish(0, 0) for _ in range(num_views))
    room_s = sorted(publish(1, 10**9) for _ in range(num_views))
    return {
        "num_waiting": NUM_WAITING,
        "view_full_p50_s": statistics.median(full_s),
        "view_full_p99_s": percentile(full_s, 99),
        "view_room_p50_s": statistics.median(room_s),
        "view_room_p99_s": percentile(room_s, 99),
        "moved_per_view": links.num_aborts / num_views,
    }


async def learn_nothing(_worker: WorkerView, _model: ModelInfo) -> None:
    """No model."""


def simulate(
    trace: Path, phases: tuple[PhaseSet, ...], rate: float, duration_s: float, seed: int, *, by_cache: bool
) -> dict[str, Any]:
    """One run."""
    part = take_slice(read_trace(trace), rate_rps=rate, duration_s=duration_s, first_row=1 + 3000 * seed)
    plan = plan_requests(part, max_context_tokens=131_072)
    declared = tuple(
        DeclaredWorker(WorkerId(f"w-{i}"), one, "simulated", WorkerResources(1), ENGINE, KvTransferConfig())
        for i, one in enumerate(phases)
    )
    latency = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
    config = SimConfig(declared, latency, seed=seed, is_cache_told=by_cache)
    result = Simulation(config, plan, duration_s).run()
    summary = summarise(result.load, SLO)
    assert summary.ttft_s is not None
    assert summary.tpot_s is not None
    assert summary.num_failed == 0
    num_prompt = sum(one.prompt_tokens for one in plan)
    return {
        "ttft_p50_s": summary.ttft_s.p50,
        "ttft_p90_s": summary.ttft_s.p90,
        "tpot_p90_s": summary.tpot_s.p90,
        "attainment": summary.attainment,
        "cached_share": sum(use.num_cached_tokens for use in result.workers) / num_prompt,
    }


def decide(num_decisions: int) -> dict[str, float]:
    """Time decisions, and print that."""
    times = time_decisions(num_decisions) | time_views(max(10, num_decisions // 50))
    print(
        f"{times['num_blocks']:,} blocks over {NUM_WORKERS} workers, prompts of {PROMPT_TOKENS:,} tokens: a decision by tokens "
        f"takes {times['tokens_p50_s'] * 1e3:.3f} ms, p99 {times['tokens_p99_s'] * 1e3:.3f}; by seconds "
        f"{times['seconds_p50_s'] * 1e3:.3f} ms, p99 {times['seconds_p99_s'] * 1e3:.3f}, and {times['speeds_s'] * 1e3:.2f} ms for each "
        f"view; with ways of KV between {NUM_WORKERS // 2} and {NUM_WORKERS // 2} {times['paths_p50_s'] * 1e3:.3f} ms, p99 "
        f"{times['paths_p99_s'] * 1e3:.3f}, and {times['paths_s'] * 1e3:.2f} ms for each view; naming the blocks {times['naming_p50_s'] * 1e3:.2f} ms\n"
        f"a view while {times['num_waiting']:,} prompts wait for room: {times['view_full_p50_s'] * 1e3:.1f} ms, p99 "
        f"{times['view_full_p99_s'] * 1e3:.1f}, where no worker has any; {times['view_room_p50_s'] * 1e3:.1f} ms, p99 "
        f"{times['view_room_p99_s'] * 1e3:.1f}, where one has and gets {times['moved_per_view']:g} of them"
    )
    return times


def compare(trace: Path, *, is_quick: bool) -> list[dict[str, Any]]:
    """Simulate all shapes and rates with and without, and print that."""
    rows = []
    is_small = len(read_trace(trace).rows) < 2000
    seeds, duration_s = ((0,), 10.0) if is_quick or is_small else ((0, 1), 60.0)
    heads = f"{'shape':<26}{'req/s':>6} {'routed by':<12}{'TTFT p50':>9}{'p90':>8} s{'TPOT p90':>10} ms"
    print(f"{heads}{'met':>7}{'cached':>8}")
    for name, phases in list(SHAPES.items())[: 1 if is_quick else None]:
        for rate in (1.0,) if is_quick or is_small else (8.0, 12.0):
            for by_cache in (False, True):
                runs = [simulate(trace, phases, rate, duration_s, seed, by_cache=by_cache) for seed in seeds]
                means = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
                rows.append({"shape": name, "rate_rps": rate, "by_cache": by_cache, "runs": runs})
                print(
                    f"{name:<26}{rate:>6g} {'cache, load' if by_cache else 'load':<12}{means['ttft_p50_s']:>9.2f}"
                    f"{means['ttft_p90_s']:>8.2f} s{means['tpot_p90_s'] * 1e3:>10.1f} ms{means['attainment']:>7.0%}"
                    f"{means['cached_share']:>8.0%}",
                    flush=True,
                )
    return rows


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer decisions, one seed and one shape")
    parser.add_argument("--only", choices=("decision", "simulation"), help="one of the two parts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        default=ROOT / "tests" / "fixtures" / "traces" / "mooncake_conversation.jsonl",
        help="the whole Mooncake conversation trace (default: the few rows that tests have)",
    )
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.only != "simulation":
        found["decision"] = decide(200 if args.quick else 5000)
    if args.only != "decision":
        found["rows"] = compare(args.trace, is_quick=args.quick)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), **found}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
