"""Leaps of a simulation: whatever happens, all that is told of it is the same as with each step by itself."""

import random
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.slo import Slo
from orchestrator.sim.faults import random_faults
from orchestrator.sim.leap import token_of, tokens_of
from orchestrator.sim.simulation import SimConfig, Simulation
from tests.support.sim import BOTH, ENGINE, LLAMA_ON_H100, SHAPES, D, P, load, random_load, worker
from workers.api import EngineConfig, RequestId, WorkerId
from workers.latency_model import LatencyModel


def told(config: SimConfig, plan: list[PlannedRequest]) -> tuple[dict[str, Any], int]:
    """All that a simulation tells, what the gateway remembers of each request with it, and how many events it took."""
    simulation = Simulation(config, plan, plan[-1].arrival_s)
    found = asdict(simulation.run())
    num_events = found.pop("num_events")
    records = [simulation.dispatcher.records.get(RequestId(f"r{i}")) for i in range(len(plan))]
    return {**found, "records": [asdict(one) if one is not None else None for one in records]}, num_events


def assert_same(config: SimConfig, plan: list[PlannedRequest], check_every: int = 0) -> tuple[int, int]:
    """Returns the events that each took. check_every: of the one that leaps."""
    leaping, num_leaping = told(replace(config, is_leaping=True, check_every=check_every), plan)
    stepping, num_stepping = told(replace(config, is_leaping=False, check_every=0), plan)
    assert leaping == stepping
    return num_leaping, num_stepping


def config_of(shape: str, seed: int = 0, engine: EngineConfig = ENGINE, **more: Any) -> SimConfig:
    declared = tuple(worker(one.worker_id, one.phases, engine) for one in SHAPES[shape])
    latency: LatencyModel = LLAMA_ON_H100
    return SimConfig(
        declared, latency, seed=seed, load_s=1.0, timeout_s=60.0, max_context_tokens=16_384, **more
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_leaping_tells_the_same_in_fewer_events(shape: str) -> None:
    num_leaping, num_stepping = assert_same(config_of(shape), random_load(seed=2), check_every=150)
    assert num_leaping < 0.9 * num_stepping


@given(st.integers(0, 10**6), st.sampled_from(sorted(SHAPES)), st.data())
def test_faults_and_switches_come_in_between(seed: int, shape: str, data: st.DataObject) -> None:
    rng = random.Random(seed)
    names = [one.worker_id for one in SHAPES[shape]]
    faults = random_faults(rng, names, rate_per_s=data.draw(st.sampled_from((0.0, 0.3, 1.5))), until_s=4.0)
    switches = tuple(
        (rng.uniform(0, 4), SwitchRequest(f"s{i}", rng.choice(names), rng.choice((P, D, BOTH)), "asked for"))
        for i in range(data.draw(st.integers(0, 3)))
    )
    # Less memory than the load takes: blocks are evicted, and sequences preempted.
    kv_cache_bytes = data.draw(st.sampled_from((2 * 10**9, 5 * 10**8)))
    config = config_of(
        shape,
        seed,
        replace(ENGINE, kv_cache_bytes=kv_cache_bytes, max_running_sequences=16),
        noise=data.draw(st.sampled_from((0.0, 0.03))),
        faults=faults,
        switches=switches,
        slo=Slo(0.05, 0.02),
        switch_mode=data.draw(st.sampled_from((SwitchMode.OFF, SwitchMode.ON))),
        is_cache_told=data.draw(st.booleans()),
    )
    plan = random_load(seed, num_requests=data.draw(st.integers(1, 25)), rate_rps=10.0)
    assert_same(config, plan, check_every=data.draw(st.sampled_from((0, 23))))


@pytest.mark.parametrize("seed", [9, 18, 27])
def test_a_worker_comes_to_prefill_while_prompts_wait(seed: int) -> None:
    """Which of them it gets depends on how far each is by then."""
    switch = (random.Random(seed).uniform(0, 0.6), SwitchRequest("s0", WorkerId("d0"), BOTH, "asked for"))
    config = config_of("apart", seed, noise=0.0, switches=(switch,))
    assert_same(config, random_load(seed, num_requests=10, rate_rps=10.0))


def test_what_a_worker_says_after_it_has_seen_its_session_end_is_lost() -> None:
    """The gateway sees the end 40 ms later."""
    faults = random_faults(random.Random(1387), ["p0", "p1", "d0", "d1"], rate_per_s=1.5, until_s=4.0)
    engine = replace(ENGINE, kv_cache_bytes=5 * 10**8, max_running_sequences=16)
    config = config_of("two apart", 1387, engine, noise=0.0, faults=faults, slo=Slo(0.05, 0.02))
    assert_same(config, random_load(1387, num_requests=22, rate_rps=10.0))


def test_messages_of_one_process_that_come_at_one_moment_count_in_their_order() -> None:
    """Of blocks that were stored, told with a request's end, and of blocks that were then removed, told alone."""
    names = [one.worker_id for one in SHAPES["two apart"]]
    config = config_of(
        "two apart",
        1530,
        replace(ENGINE, kv_cache_bytes=5 * 10**8, max_running_sequences=16),
        noise=0.0,
        faults=random_faults(random.Random(1530), names, rate_per_s=1.5, until_s=4.0),
    )
    assert_same(config, random_load(1530, num_requests=10, rate_rps=10.0))


def test_a_deadline_ends_a_request_with_all_tokens_that_have_come() -> None:
    """No message, view or answer makes the gateway look just then."""
    config, plan = replace(config_of("one"), timeout_s=1.03), load([(0.0, 100, 1000)])
    assert_same(config, plan)
    (record,) = Simulation(config, plan, 0.0).run().load.records
    assert record.status == "DEADLINE"
    assert record.token_times_s[-1] > 1.0


@given(st.text(max_size=5), st.integers(0, 10**5), st.integers(0, 40))
def test_tokens_of_a_stretch_are_those_of_its_positions(name: str, start: int, num: int) -> None:
    assert tokens_of(name, start, start + num) == [token_of(name, start + i) for i in range(num)]
