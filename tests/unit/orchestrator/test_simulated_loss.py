"""Messages that are lost: sessions that break, transfers that are resumed, calls without an answer. Nothing is lost, doubled or held by that."""

import json
import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.control.request_record import SampleRecord
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.view import SwitchState, WorkerView
from orchestrator.sim.faults import Fault, FaultKind, random_rate
from orchestrator.sim.network import CONTROLLER, GATEWAY, NetworkShape, SimNetwork
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from orchestrator.sim.timers import SimTimers
from tests.support.sim import (
    BOTH,
    LLAMA_ON_H100,
    SHAPES,
    P,
    assert_nothing_held,
    constant,
    load,
    random_load,
    run,
)
from workers.api import RequestId, WorkerId

LOSSES = (FaultKind.LOSS_WITH_GATEWAY, FaultKind.LOSS_WITH_WORKERS, FaultKind.LOSS_OF_VIEWS)
LONG = 1.0


def loss(kind: FaultKind, name: str, rate: float, at_s: float = 0.0, duration_s: float = LONG) -> Fault:
    return Fault(at_s, kind, WorkerId(name), duration_s, rate=rate)


def random_losses(seed: int, names: list[str], num: int) -> tuple[Fault, ...]:
    rng = random.Random(seed)
    return tuple(
        loss(
            rng.choice(LOSSES), rng.choice(names), random_rate(rng), rng.uniform(0, 4), rng.uniform(0.1, 3.0)
        )
        for _ in range(num)
    )


def names_of(shape: str) -> list[str]:
    return [one.worker_id for one in SHAPES[shape]]


def load_and_later(seed: int) -> list[PlannedRequest]:
    """The last request comes when all is over."""
    return [*random_load(seed, 30), *load([(20.0, 500, 20)])]


def as_bytes(result: SimResult) -> bytes:
    return json.dumps(asdict(result.load), sort_keys=True).encode()


def sample_of(simulation: Simulation, index: int = 0) -> SampleRecord:
    record = simulation.dispatcher.records.get(RequestId(f"r{index}"))
    assert record is not None
    return record.samples[0]


class Losing(random.Random):
    """Of all messages that may be lost the one with this number is."""

    def __init__(self, number: int) -> None:
        super().__init__(1)
        self.number, self.num_drawn = number, 0

    def random(self) -> float:
        self.num_drawn += 1
        return 1.0 if self.num_drawn - 1 == self.number else 0.0

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * (self.number % 7) / 6


def losing(shape: str, kind: FaultKind, plan: list[PlannedRequest], number: int) -> tuple[Simulation, Losing]:
    """A run that loses one message of those that may be."""
    names = names_of(shape)
    faults = tuple(
        loss(kind, name, 0.5) for name in (names[:1] if kind is FaultKind.LOSS_OF_VIEWS else names)
    )
    config = SimConfig(
        SHAPES[shape], LLAMA_ON_H100, load_s=1.0, timeout_s=60.0, faults=faults, check_every=10
    )
    simulation = Simulation(config, plan, plan[-1].arrival_s)
    simulation.cluster.network._loss_rng = rng = Losing(number)
    result = simulation.run()
    assert {record.status for record in result.load.records} == {OK}
    assert [len(record.token_times_s) for record in result.load.records] == [
        one.output_tokens for one in plan
    ]
    assert result.num_wrong_tokens == 0
    assert_nothing_held(simulation)
    return simulation, rng


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", ["apart", "two apart"])
def test_any_one_message_may_be_lost(shape: str, kind: FaultKind) -> None:
    plan = load([(0.0, 100, 3), (0.01, 30, 2)])
    _, rng = losing(shape, kind, plan, -1)
    assert rng.num_drawn > 3
    for number in range(rng.num_drawn):
        losing(shape, kind, plan, number)


def test_a_transfer_whose_stream_breaks_is_resumed_and_a_chunk_that_is_not_whole_is_read_again() -> None:
    plan = load([(0.0, 100, 2)])
    _, rng = losing("apart", FaultKind.LOSS_WITH_WORKERS, plan, -1)
    found = []
    for number in range(rng.num_drawn):
        simulation, _ = losing("apart", FaultKind.LOSS_WITH_WORKERS, plan, number)
        attempts = sample_of(simulation).attempts
        # Whatever is lost between the workers, the gateway need not know of it.
        assert len(attempts) == 1
        found.append(attempts[0].transfer)
    # The sender hears of each that it has committed, also where the answer was lost.
    transfers = [one for one in found if one is not None]
    assert len(transfers) == len(found)
    assert any(one.num_resumes == 1 for one in transfers)
    assert any(one.num_resumes == 0 and one.num_resent_chunks == 1 for one in transfers)


def test_a_session_that_breaks_is_opened_again_and_what_came_by_it_is_aborted() -> None:
    plan = load([(0.0, 100, 300)])
    # While it decodes: at most one message more passes.
    faults = (loss(FaultKind.LOSS_WITH_GATEWAY, "w0", 1.0, at_s=1.0, duration_s=0.03),)
    config = SimConfig(SHAPES["one"], constant(0.02), load_s=1.0, timeout_s=60.0, faults=faults)
    simulation = Simulation(config, plan, 0.0)
    num_running: list[int] = []

    def look() -> None:
        (process,) = simulation.cluster.living()
        num_running.append(process.engine.num_running)

    # Arrivals begin after two seconds; the second attempt runs by then, and the first would too.
    simulation.timers.call_at(5.0, look)
    (record,) = simulation.run().load.records
    assert record.status == OK
    assert record.gateway is not None
    assert record.gateway.attempts == 2
    assert num_running == [1]
    # Tokens that had come are kept.
    assert sample_of(simulation).num_tokens == 300
    assert_nothing_held(simulation)


def test_a_worker_that_cannot_be_reached_is_tried_until_it_can_be() -> None:
    faults = (loss(FaultKind.LOSS_WITH_GATEWAY, "w0", 1.0, at_s=0.5, duration_s=4.0),)
    result, simulation = run(SHAPES["two"], random_load(1, num_requests=60), faults=faults)
    assert {record.status for record in result.load.records} == {OK}
    # It was not silent for so long that it was given up.
    assert simulation.cluster.processes.keys() == {("w0", 1), ("w1", 1)}
    assert all(
        simulation.cluster.links is not None and simulation.cluster.links.is_open(worker)
        for worker in view_workers(simulation)
    )
    later = [one for one in result.load.records if one.planned.arrival_s > 6.0 and one.gateway is not None]
    assert {one.gateway.prefill_worker_id for one in later if one.gateway is not None} == {"w0", "w1"}


def view_workers(simulation: Simulation) -> list[WorkerView]:
    view = simulation.dispatcher.view
    assert view is not None
    return list(view.workers)


def test_a_crash_in_a_time_without_views_is_seen_after_it() -> None:
    faults = (
        loss(FaultKind.LOSS_OF_VIEWS, "w0", 1.0, at_s=0.5, duration_s=8.0),
        Fault(1.0, FaultKind.CRASH, WorkerId("w0")),
    )
    plan = load([(0.1, 500, 20), (20.0, 500, 20)])
    result, simulation = run(SHAPES["one"], plan, faults=faults)
    assert {record.status for record in result.load.records} == {OK}
    assert [one.incarnation for one in view_workers(simulation)] == [2]


def test_a_switch_that_is_asked_for_while_answers_are_lost_is_made_once() -> None:
    switches = ((1.0, SwitchRequest("s0", WorkerId("d1"), BOTH, "asked for")),)
    faults = (loss(FaultKind.LOSS_OF_VIEWS, "d1", 0.7, duration_s=6.0),)
    for seed in range(8):
        result, simulation = run(
            SHAPES["two apart"], load_and_later(seed), seed=seed, switches=switches, faults=faults
        )
        assert {record.status for record in result.load.records} == {OK}
        (switch,) = result.switches
        assert switch.state is not SwitchState.UNDONE
        assert not switch.is_under_way
        (worker,) = [one for one in view_workers(simulation) if one.worker_id == "d1"]
        assert worker.phases == BOTH


def test_a_worker_that_took_other_phases_and_could_not_say_so_serves_them() -> None:
    switches = ((1.0, SwitchRequest("s0", WorkerId("d1"), P, "asked for")),)
    faults = (loss(FaultKind.LOSS_WITH_GATEWAY, "d1", 0.5, at_s=0.9, duration_s=3.0),)
    for seed in range(8):
        result, simulation = run(
            SHAPES["two apart"], load_and_later(seed), seed=seed, switches=switches, faults=faults
        )
        (switch,) = result.switches
        assert not switch.is_under_way
        (worker,) = [one for one in view_workers(simulation) if one.worker_id == "d1"]
        process = simulation.cluster.processes[worker.worker_id, worker.incarnation]
        assert worker.phases == process.phases


# One seed, one result.


@pytest.mark.parametrize("shape", ["two", "two apart", "mixed"])
def test_one_seed_gives_one_result_byte_for_byte(shape: str) -> None:
    faults = random_losses(5, names_of(shape), num=6)
    results = [run(SHAPES[shape], random_load(seed=1), seed=seed, faults=faults)[0] for seed in (7, 7, 8)]
    assert as_bytes(results[0]) == as_bytes(results[1])
    assert as_bytes(results[0]) != as_bytes(results[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_what_may_be_lost_and_is_not_changes_nothing(shape: str) -> None:
    plan = random_load(seed=1)
    none = tuple(loss(kind, name, 0.0) for kind in LOSSES for name in names_of(shape))
    results = [run(SHAPES[shape], plan, seed=7, faults=faults)[0] for faults in ((), none)]
    assert as_bytes(results[0]) == as_bytes(results[1])


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(sorted(SHAPES)), st.integers(1, 6), st.booleans())
def test_whatever_is_lost_every_request_has_one_end_and_later_ones_are_served(
    seed: int, shape: str, num: int, is_leaping: bool
) -> None:
    """And it is told the same with leaps as with each step by itself."""
    rng = random.Random(seed)
    later = [(45.0 + i / 4, rng.randint(1, 2000), rng.randint(1, 40)) for i in range(4)]
    plan = [*random_load(seed, num_requests=15), *load(later)]
    config = SimConfig(
        SHAPES[shape],
        LLAMA_ON_H100,
        seed=seed,
        load_s=1.0,
        timeout_s=30.0,
        max_context_tokens=16_384,
        faults=random_losses(seed, names_of(shape), num),
        check_every=200,
    )
    results = []
    for one in (is_leaping, not is_leaping):
        simulation = Simulation(replace(config, is_leaping=one), plan, plan[-1].arrival_s)
        result = simulation.run()
        results.append(as_bytes(result))
        assert result.num_wrong_tokens == 0
        for record in result.load.records:
            if record.status == OK:
                assert len(record.token_times_s) == record.planned.output_tokens
            else:
                assert record.message
        assert {record.status for record in result.load.records[15:]} == {OK}
        assert_nothing_held(simulation)
    assert results[0] == results[1]


# The network.


def network(seed: int = 0) -> SimNetwork:
    return SimNetwork(SimTimers(), NetworkShape(1e9), random.Random(seed), random.Random(seed + 1))


def test_losses_of_a_pair_come_together_and_end_one_by_one() -> None:
    one = network()
    for rate in (0.5, 0.5, 0.2):
        one.make_lossy("a", "b", rate)
    lost = sum(one.loses("b", "a") for _ in range(20_000))
    assert lost / 20_000 == pytest.approx(1 - 0.5 * 0.5 * 0.8, abs=0.015)
    assert one.num_lost == lost
    for rate in (0.5, 0.2, 0.5):
        assert not one.is_sound("a", "b")
        one.make_sound("b", "a", rate)
    assert one.is_sound("a", "b")
    assert not one.loses("a", "b")


def test_nothing_is_drawn_for_a_pair_that_is_sound() -> None:
    one, state = network(), random.Random(1).getstate()
    one.make_lossy(CONTROLLER, GATEWAY, 1.0)
    assert not one.loses("a", GATEWAY)
    assert one._loss_rng.getstate() == state
    assert one.loses(GATEWAY, CONTROLLER)
    assert one._loss_rng.getstate() != state
