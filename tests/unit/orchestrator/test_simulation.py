"""A cluster in simulated time: the same for the same seed, right where the answer is known, and whole under faults."""

import gc
import random
from dataclasses import asdict, replace
from itertools import accumulate
from statistics import fmean

import pytest

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.bench.summary import summarise
from orchestrator.bench.trace import TraceRow
from orchestrator.cli.collector import without_collector
from orchestrator.control.slo import Slo
from orchestrator.sim.faults import Fault, FaultKind, random_faults
from orchestrator.sim.simulation import SimConfig, Simulation
from tests.support.sim import (
    BOTH,
    ENGINE,
    LLAMA_ON_H100,
    SHAPES,
    by_token,
    constant,
    load,
    random_load,
    run,
    worker,
)
from workers.api import WorkerId
from workers.engine.pacing import LayerPacing
from workers.latency_model import LatencyModel


@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_gets_all_its_tokens(shape: str) -> None:
    plan = random_load(seed=3)
    result, _ = run(SHAPES[shape], plan)
    assert [record.status for record in result.load.records] == [OK] * len(plan)
    assert [len(r.token_times_s) for r in result.load.records] == [one.output_tokens for one in plan]
    for record in result.load.records:
        assert list(record.token_times_s) == sorted(record.token_times_s)


@pytest.mark.parametrize("shape", ["two", "two apart"])
def test_one_seed_gives_one_result(shape: str) -> None:
    faults = random_faults(
        random.Random(5), [one.worker_id for one in SHAPES[shape]], rate_per_s=0.5, until_s=5
    )
    results = [run(SHAPES[shape], random_load(seed=1), seed=seed, faults=faults)[0] for seed in (7, 7, 8)]
    assert asdict(results[0]) == asdict(results[1])
    assert asdict(results[0]) != asdict(results[2])


def test_a_lone_request_takes_as_long_as_its_steps() -> None:
    # Two chunks of the prompt, of which the second gives the first token, and nine more tokens.
    result, _ = run([worker("w0", BOTH)], load([(0.0, 600, 10)]), constant(0.1), noise=0.0)
    (record,) = result.load.records
    assert record.token_times_s[0] == pytest.approx(0.2, abs=0.002)
    assert record.token_times_s[-1] == pytest.approx(1.1, abs=0.002)


NUM_QUEUED = 5_000


def poisson(rng: random.Random, rate: float) -> list[float]:
    """Times of NUM_QUEUED arrivals whose mean rate is exactly this."""
    times_s = list(accumulate(rng.expovariate(rate) for _ in range(NUM_QUEUED)))
    return [at_s * NUM_QUEUED / rate / times_s[-1] for at_s in times_s]


def sojourns(arrivals_s: list[float], services_s: list[float]) -> list[float]:
    """In a queue of one server, first come first served (Lindley's recursion)."""
    found, free_s = [], 0.0
    for at_s, service_s in zip(arrivals_s, services_s, strict=True):
        free_s = max(free_s, at_s) + service_s
        found.append(free_s - at_s)
    return found


def test_the_wait_for_a_server_of_constant_speed_is_the_known_one() -> None:
    """M/D/1: mean time to the first token D + R D^2 / (2 (1 - R D)), DistServe section 3."""
    service_s, rate = 0.1, 5.0
    arrivals_s = poisson(random.Random(11), rate)
    engine = replace(ENGINE, token_budget=16, is_prefix_cache_on=False)
    plan = load((at_s, 16, 1) for at_s in arrivals_s)
    result, _ = run([worker("w0", BOTH, engine)], plan, constant(service_s), noise=0.0, check_every=0)
    ttfts_s = [record.token_times_s[0] for record in result.load.records]
    assert ttfts_s == pytest.approx(sojourns(arrivals_s, [service_s] * NUM_QUEUED), abs=0.002)
    assert fmean(ttfts_s) == pytest.approx(
        service_s + rate * service_s**2 / (2 * (1 - rate * service_s)), rel=0.03
    )


def test_the_wait_for_a_server_of_random_speed_is_the_known_one() -> None:
    """M/M/1: mean sojourn 1 / (mu - r), semi-PD equation 2. One sequence at a time is one server."""
    mean_service_s, rate, rng = 0.1, 4.0, random.Random(12)
    arrivals_s = poisson(rng, rate)
    lengths = [max(1, round(rng.expovariate(1 / 1000))) for _ in arrivals_s]
    engine = replace(ENGINE, token_budget=4096, max_running_sequences=1, is_prefix_cache_on=False)
    plan = load((at_s, length, 1) for at_s, length in zip(arrivals_s, lengths, strict=True))
    latency = by_token(mean_service_s / 1000)
    result, _ = run([worker("w0", BOTH, engine)], plan, latency, noise=0.0, check_every=0)
    ttfts_s = [record.token_times_s[0] for record in result.load.records]
    services_s = [length * mean_service_s / 1000 for length in lengths]
    assert ttfts_s == pytest.approx(sojourns(arrivals_s, services_s), abs=0.002)
    assert fmean(ttfts_s) == pytest.approx(1 / (1 / mean_service_s - rate), rel=0.03)


def test_two_workers_serve_more_than_one() -> None:
    plan = random_load(seed=4, num_requests=120, rate_rps=30.0)
    slo = Slo(0.5, 0.03)
    one, two = (summarise(run(SHAPES[name], plan)[0].load, slo) for name in ("one", "two"))
    assert one.ttft_s is not None
    assert two.ttft_s is not None
    assert two.ttft_s.p90 < one.ttft_s.p90
    assert (two.attainment or 0.0) >= (one.attainment or 0.0)


# Faults.


@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("shape", ["two", "two apart"])
def test_a_fault_costs_time_and_no_request(kind: FaultKind, shape: str) -> None:
    for worker_id in {one.worker_id for one in SHAPES[shape]}:
        fault = Fault(1.0, kind, worker_id, duration_s=2.0, factor=5.0, rate=0.1)
        result, _ = run(SHAPES[shape], random_load(seed=6, num_requests=20), faults=(fault,))
        assert {record.status for record in result.load.records} == {OK}, (kind, worker_id)


@pytest.mark.parametrize("kind", FaultKind)
def test_a_lone_worker_that_comes_back_goes_on(kind: FaultKind) -> None:
    fault = Fault(1.0, kind, WorkerId("w0"), duration_s=2.0, factor=5.0, rate=0.01)
    result, _ = run(SHAPES["one"], random_load(seed=6, num_requests=20), faults=(fault,))
    assert {record.status for record in result.load.records} == {OK}


@pytest.mark.parametrize("seed", range(24))
def test_whatever_breaks_every_request_has_one_end(seed: int) -> None:
    rng = random.Random(seed)
    shape = SHAPES[rng.choice(list(SHAPES))]
    worker_ids = [one.worker_id for one in shape]
    faults = random_faults(rng, worker_ids, rate_per_s=rng.uniform(0.2, 2.0), until_s=6.0)
    plan = random_load(seed, num_requests=40)
    result, _ = run(shape, plan, seed=seed, faults=faults, timeout_s=30.0)
    assert len(result.load.records) == len(plan)
    for record in result.load.records:
        if record.status == OK:
            assert len(record.token_times_s) == record.planned.output_tokens
        else:
            assert record.message


@pytest.mark.parametrize("seed", range(5))
def test_once_faults_stop_everything_is_served(seed: int) -> None:
    rng = random.Random(seed)
    shape = SHAPES["two apart"]
    faults = random_faults(rng, [one.worker_id for one in shape], rate_per_s=1.0, until_s=5.0)
    # The last faults, and starts of processes, are over by then.
    later = [(40.0 + i / 8, rng.randint(1, 3000), rng.randint(1, 60)) for i in range(30)]
    plan = [*random_load(seed, num_requests=30), *load(later)]
    result, _ = run(shape, plan, seed=seed, faults=faults)
    assert {record.status for record in result.load.records[30:]} == {OK}


# Prefix caches.


def conversations(num: int, num_turns: int) -> list[PlannedRequest]:
    """Each turn has all of the turn before it as its beginning."""
    found: list[tuple[float, TraceRow]] = []
    for turn in range(num_turns):
        for one in range(num):
            at_s = turn * 4.0 + one * 0.35
            hash_ids = tuple(1000 * one + block for block in range(turn + 1))
            found.append((at_s, TraceRow(len(found) + 1, at_s, 512 * (turn + 1), 8, hash_ids)))
    return [PlannedRequest(row, at_s, row.prompt_tokens, row.output_tokens) for at_s, row in found]


@pytest.mark.parametrize("shape", ["two", "two apart"])
def test_prompts_follow_their_beginning_to_where_it_is_cached(shape: str) -> None:
    plan = conversations(num=7, num_turns=5)
    cached = {}
    for is_told in (False, True):
        result, _ = run(SHAPES[shape], plan, is_cache_told=is_told)
        assert {record.status for record in result.load.records} == {OK}
        cached[is_told] = sum(use.num_cached_tokens for use in result.workers)
    # All but the first 512 tokens of each conversation and the last 512 of each turn.
    most = 7 * 512 * sum(range(1, 5))
    assert cached[True] >= 0.95 * most
    assert cached[False] < 0.9 * most


def test_what_is_known_of_caches_is_what_is_in_them() -> None:
    plan = conversations(num=4, num_turns=6)
    fault = Fault(9.0, FaultKind.CRASH, WorkerId("w0"))
    result, simulation = run(SHAPES["two"], plan, faults=(fault,))
    assert {record.status for record in result.load.records} == {OK}
    index = simulation.dispatcher._prefixes
    assert index.num_blocks_by_worker().keys() == {("w0", 2), ("w1", 1)}
    for key, process in simulation.cluster.processes.items():
        if process.is_alive:
            stored = set(process.engine.pool.index.names.values())
            assert index._blocks[key] == stored
            assert key == ("w0", 2) or stored


def test_a_failure_is_told_when_it_happens() -> None:
    shape = [worker(f"w{i}", BOTH) for i in range(8)]
    # Whichever it goes to next dies too, until it has been tried often enough.
    faults = tuple(Fault(0.5 + 0.3 * i, FaultKind.CRASH, WorkerId(f"w{i}")) for i in range(8))
    result, _ = run(shape, load([(0.0, 100, 3000)]), constant(0.05), faults=faults)
    (record,) = result.load.records
    assert record.status == "UNAVAILABLE"
    assert record.total_s is not None
    assert record.total_s < 5.0


def test_a_process_that_is_suspended_says_nothing() -> None:
    fault = Fault(0.15, FaultKind.PAUSE, WorkerId("w0"), duration_s=1.5)
    result, _ = run(SHAPES["one"], load([(0.0, 16, 5)]), constant(0.1), faults=(fault,), noise=0.0)
    (record,) = result.load.records
    assert record.token_times_s[0] == pytest.approx(0.1, abs=0.01)
    assert record.token_times_s[1] == pytest.approx(1.65, abs=0.01)


def test_faults_that_overlap_add_up() -> None:
    faults = (
        Fault(0.0, FaultKind.SLOW, WorkerId("w0"), duration_s=1.0, factor=2.0),
        Fault(0.5, FaultKind.SLOW, WorkerId("w0"), duration_s=60.0, factor=10.0),
    )
    result, _ = run(SHAPES["one"], load([(0.0, 16, 12)]), constant(0.1), faults=faults, noise=0.0)
    (record,) = result.load.records
    assert record.token_times_s[-1] > 8.0


def test_a_worker_may_be_slower_than_the_others_and_messages_slower_than_the_network() -> None:
    plan = load([(0.0, 16, 5)])
    config = SimConfig(SHAPES["one"], constant(0.1), noise=0.0)
    slower = replace(config, latency_of={WorkerId("w0"): constant(0.25)}, message_s=0.05)
    (plain,) = Simulation(config, plan, 1.0).run().load.records
    (slow,) = Simulation(slower, plan, 1.0).run().load.records
    assert plain.token_times_s == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.001)
    # There and back again, each up to a fifth slower.
    assert 0.35 <= slow.token_times_s[0] <= 0.37
    assert slow.token_times_s[-1] - slow.token_times_s[0] == pytest.approx(1.0, abs=0.01)


def test_what_is_over_is_kept_by_nothing() -> None:
    _, simulation = run(SHAPES["one"], random_load(seed=2))
    assert not simulation._clients
    waiting = [timer for timer in simulation.timers._heap if timer[2] is not None]
    assert len(waiting) < 5
    assert all(timer[3] is None for timer in simulation.timers._heap if timer[2] is None)


def test_a_record_says_where_the_time_of_a_request_went() -> None:
    result, _ = run(SHAPES["two apart"], load([(0.001 * i, 3000, 20) for i in range(20)]))
    for record in result.load.records:
        gateway = record.gateway
        assert gateway is not None
        assert gateway.prefill_worker_id.startswith("p")
        assert gateway.decode_worker_id.startswith("d")
        assert gateway.queue_s + gateway.prefill_s <= gateway.ttft_s <= record.token_times_s[0]
        assert gateway.kv_exposed_s is not None
        assert gateway.attempts == 1
    waits_s = [record.gateway.queue_s for record in result.load.records if record.gateway]
    assert max(waits_s) > 10 * min(waits_s)


def test_requests_come_once_a_controller_that_looks_seldom_has_seen_the_workers() -> None:
    shape = next(iter(SHAPES.values()))
    config = SimConfig(shape, LLAMA_ON_H100, load_s=1.0, tick_s=20.0)
    result = Simulation(config, random_load(seed=3), 5.0).run()
    waits_s = [record.gateway.queue_s for record in result.load.records if record.gateway]
    assert len(waits_s) == len(result.load.records)
    assert max(waits_s) < 5.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_leaves_nothing_to_the_garbage_collector(shape: str) -> None:
    """It is off in a run: a request that stayed with its tokens would fill the memory of a long one."""
    simulation = Simulation(SimConfig(SHAPES[shape], LLAMA_ON_H100, load_s=1.0), random_load(seed=3), 5.0)
    with without_collector():
        simulation.run()
        assert gc.collect() == 0


@pytest.mark.parametrize("is_on_gpu", [True, False])
def test_kv_of_a_step_that_is_one_graph_leaves_when_that_is_over(
    is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of workers on a GPU, where a step in groups of layers is launched kernel by kernel."""
    sizes: list[int] = []
    group_size = LayerPacing.group_size

    def look(pacing: LayerPacing, num_tokens: int) -> int:
        sizes.append(group_size(pacing, num_tokens))
        return sizes[-1]

    monkeypatch.setattr(LayerPacing, "group_size", look)
    device = replace(LLAMA_ON_H100.device, is_reading_hidden=is_on_gpu)
    run(SHAPES["apart"], load([(0.0, 100, 2)]), LatencyModel(LLAMA_ON_H100.model, device, is_learning=False))
    (size,) = sizes
    assert (size == LLAMA_ON_H100.model.num_layers) is is_on_gpu
