"""Pictures in the simulator: the path that serves them, with simulated encoders."""

import random
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.bench.summary import summarise
from orchestrator.bench.trace import TraceRow
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.declared import DeclaredWorker
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.slo import Slo
from orchestrator.control.view import SwitchState
from orchestrator.sim import coarse_replay
from orchestrator.sim.faults import Fault, FaultKind, random_faults
from orchestrator.sim.pictures import Pictures
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from tests.support.sim import ENGINE, LLAMA_ON_H100, worker
from workers.api import Phase, PhaseSet, WorkerId

E, P, D = (frozenset({phase}) for phase in Phase)
PICTURES = Pictures.of(LLAMA_ON_H100, tiles=3)
BIG = replace(ENGINE, kv_cache_bytes=20 * 10**9, token_budget=2048, max_running_sequences=256)
SHAPES: dict[str, tuple[PhaseSet, ...]] = {
    "EPD": (E | P | D,),
    "E+P+D": (E, P, D),
    "2E+PD": (E, E, P | D),
    "EP+D": (E | P, D),
    "EPD+EPD": (E | P | D, E | P | D),
}


def shape(*sets: PhaseSet) -> tuple[DeclaredWorker, ...]:
    return tuple(worker(f"w{i}", phases, BIG) for i, phases in enumerate(sets))


def load(seed: int, num: int = 30, rate_rps: float = 10.0, share: float = 0.6) -> list[PlannedRequest]:
    rng, at_s, found = random.Random(seed), 0.0, []
    for number in range(1, num + 1):
        at_s += rng.expovariate(rate_rps)
        num_images = rng.randint(1, 4) if rng.random() < share else 0
        prompt = rng.randint(1, 600) + num_images * PICTURES.num_tokens
        row = TraceRow(number, at_s, prompt, rng.randint(1, 60), (), num_images)
        found.append(PlannedRequest(row, at_s, prompt, row.output_tokens, num_images))
    return found


def run(
    sets: tuple[PhaseSet, ...], plan: list[PlannedRequest], **more: object
) -> tuple[SimResult, Simulation]:
    config = SimConfig(shape(*sets), LLAMA_ON_H100, load_s=1.0, pictures=PICTURES, check_every=50)
    config = replace(config, **more)  # type: ignore[arg-type]
    simulation = Simulation(config, plan, plan[-1].arrival_s)
    return simulation.run(), simulation


@pytest.mark.parametrize("name", SHAPES)
def test_every_picture_is_encoded_once_in_every_shape(name: str) -> None:
    plan = load(1)
    result, simulation = run(SHAPES[name], plan)
    assert {record.status for record in result.load.records} == {OK}
    assert result.num_wrong_tokens == 0
    living = [one.images for one in simulation.cluster.living() if one.images is not None]
    num_tiles = PICTURES.tiles * sum(one.num_images for one in plan)
    assert sum(one.num_tiles_encoded for one in living) == num_tiles
    assert all(one.num_encodes == 0 for one in living)
    assert simulation.dispatcher.totals.tiles == num_tiles


@pytest.mark.parametrize("seed", [4, 11])
def test_a_worker_that_encodes_and_prefills_does_one_thing_at_a_time(seed: int) -> None:
    """A batch of pictures began while a turn was due, and a step beside it; the next step began before that one had ended."""
    result, simulation = run((E | P, E | P, D, D), load(seed, 60, 30.0), slo=Slo(0.05, 0.02))
    assert {record.status for record in result.load.records} == {OK}
    for process in simulation.cluster.living():
        # Nobody works for longer than there is time.
        assert process.busy_s <= simulation.timers.time()


def test_one_seed_gives_the_same_run_byte_for_byte() -> None:
    faults = random_faults(random.Random(4), ["w0", "w1", "w2"], rate_per_s=1.0, until_s=3.0)  # type: ignore[list-item]
    first, _ = run(SHAPES["2E+PD"], load(2), seed=3, faults=faults)
    again, _ = run(SHAPES["2E+PD"], load(2), seed=3, faults=faults)
    assert repr(first) == repr(again)


def test_a_picture_takes_as_long_as_its_encoder_and_its_way() -> None:
    # One token of text, so that nothing is computed while it is encoded, in one batch.
    num = PICTURES.num_tokens + 1
    row = TraceRow(1, 0.0, num, 2, (), 1)
    result, simulation = run(SHAPES["E+P+D"], [PlannedRequest(row, 0.0, num, 2, 1)], noise=0.0)
    [record] = result.load.records
    encode_s = PICTURES.batch_s + PICTURES.tiles * PICTURES.patches * PICTURES.patch_s
    text, _ = run(SHAPES["E+P+D"], [PlannedRequest(replace(row, num_images=0), 0.0, num, 2)], noise=0.0)
    extra_s = record.token_times_s[0] - text.load.records[0].token_times_s[0]
    # Beyond that: messages of wanted, encode and news, the file and the embeddings.
    assert 0.0 < extra_s - encode_s < 0.002
    assert simulation.dispatcher.totals.tiles == PICTURES.tiles


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(SHAPES)), st.integers(0, 3))
def test_whatever_breaks_every_request_has_its_end_and_nothing_is_held(
    seed: int, name: str, num_faults: int
) -> None:
    rng, sets = random.Random(seed), SHAPES[name]
    faults = tuple(
        Fault(
            rng.uniform(0, 2),
            rng.choice(list(FaultKind)),
            WorkerId(f"w{rng.randrange(len(sets))}"),
            rng.uniform(0.1, 2),
            3.0,
            rate=0.3,
        )
        for _ in range(num_faults)
    )
    plan = load(seed, 16)
    late = TraceRow(99, 40.0, 1000, 5, (), 2)
    plan.append(PlannedRequest(late, 40.0, 1000, 5, 2))
    result, simulation = run(sets, plan, seed=seed, faults=faults, timeout_s=60.0)
    assert result.num_wrong_tokens == 0
    assert result.load.records[-1].status == OK
    if not faults:
        assert {record.status for record in result.load.records} == {OK}
    until_s = simulation.timers.time() + 15.0
    while simulation.timers.run_next(until_s):
        pass
    simulation.check_invariants()
    for process in simulation.cluster.living():
        assert process.images is not None
        counts = process.images.store.counts()
        assert counts.num_waiting == 0
        assert counts.num_free + counts.num_cached == counts.num_blocks
        assert process.images.num_encodes == 0


def test_an_encoder_is_switched_while_pictures_come() -> None:
    asked = SwitchRequest("s1", WorkerId("w1"), P | D, "asked for")
    result, simulation = run(SHAPES["2E+PD"], load(5, 60), switches=((1.0, asked),))
    assert {record.status for record in result.load.records} == {OK}
    [switch] = result.switches
    assert switch.state in (SwitchState.CHANGED, SwitchState.PROVEN)
    # It had not loaded the text model.
    assert switch.needs_new_process
    assert ("w1", 2) in simulation.cluster.processes


@cache
def shifting(mode: SwitchMode) -> SimResult:
    """Text, then pictures, then text."""
    rng, at_s, plan = random.Random(6), 0.0, []
    while at_s < 45.0:
        is_picture = 10.0 <= at_s < 30.0
        at_s += rng.expovariate(28.0 if is_picture else 26.0)
        num_images = 4 if is_picture else 0
        prompt = 100 + num_images * PICTURES.num_tokens if is_picture else rng.randint(2000, 3500)
        row = TraceRow(len(plan) + 1, at_s, prompt, 8, (), num_images)
        plan.append(PlannedRequest(row, at_s, prompt, 8, num_images))
    return run((E, P | D, P | D, P | D), plan, slo=Slo(0.6, 0.03), switch_mode=mode, check_every=20_000)[0]


def test_the_controller_follows_pictures_and_comes_back() -> None:
    result, as_it_is = shifting(SwitchMode.ON), shifting(SwitchMode.OFF)
    for one in (result, as_it_is):
        assert {record.status for record in one.load.records} == {OK}
        assert one.num_wrong_tokens == 0
    done = [(one.before, one.phases) for one in result.switches if one.state is not SwitchState.UNDONE]
    assert done[0] == (P | D, E)
    assert (E, P | D) in done
    slo = Slo(0.6, 0.03)
    met, met_as_it_is = (summarise(one.load, slo).attainment or 0.0 for one in (result, as_it_is))
    assert met > met_as_it_is + 0.05


@pytest.mark.parametrize("name", SHAPES)
def test_the_coarse_mode_is_near_the_fine_one_and_never_sooner(name: str) -> None:
    """It begins a prompt when all its pictures are encoded; the engine computes its text meanwhile, and tiles as they come."""
    plan = load(7, 200, rate_rps=12.0)
    fine, simulation = run(SHAPES[name], plan, noise=0.0, check_every=0)
    slo = Slo(1.0, 0.05)
    coarse = coarse_replay.replay(simulation._config, plan, plan[-1].arrival_s, slo, lambda _done, _all: None)
    a, b = summarise(fine.load, slo), summarise(coarse.load, slo)
    assert a.ttft_s is not None
    assert b.ttft_s is not None
    assert a.tpot_s is not None
    assert b.tpot_s is not None
    assert 0.98 < b.ttft_s.p50 / a.ttft_s.p50 < 1.45
    assert 0.98 < b.ttft_s.p90 / a.ttft_s.p90 < 1.45
    assert b.tpot_s.p50 == pytest.approx(a.tpot_s.p50, rel=0.1)


class Second(random.Random):
    """Of all messages that may be lost the second one is, and that is heard of late."""

    num_drawn = 0

    def random(self) -> float:
        self.num_drawn += 1
        return 1.0 if self.num_drawn == 2 else 0.0

    def uniform(self, a: float, b: float) -> float:
        return b


def test_an_encoder_that_is_lost_after_its_pictures_are_used_is_charged_for_nothing() -> None:
    """That they have come is lost, so that the gateway still waits for the encoder when the prompt is computed, and then that ends."""
    num = PICTURES.num_tokens + 100
    plan = [PlannedRequest(TraceRow(1, 0.0, num, 60, (), 1), 0.0, num, 60, 1)]
    faults = (
        Fault(0.0, FaultKind.LOSS_WITH_WORKERS, WorkerId("w0"), 5.0, rate=0.5),
        Fault(0.3, FaultKind.CRASH, WorkerId("w0")),
    )
    config = SimConfig(
        shape(E, P | D), LLAMA_ON_H100, load_s=1.0, pictures=PICTURES, faults=faults, check_every=1
    )
    simulation = Simulation(config, plan, 0.0)
    simulation.cluster.network._loss_rng = Second()
    (record,) = simulation.run().load.records
    assert record.status == OK
    assert record.token_times_s[0] < 0.3 < record.token_times_s[-1]
