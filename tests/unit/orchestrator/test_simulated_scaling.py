"""Workers that are added and go in the simulator: nothing is lost on the way."""

import random
from dataclasses import replace
from functools import cache

import pytest

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.bench.trace import TraceRow
from orchestrator.control.auto_switch import SwitchMode
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, ScaleState
from orchestrator.sim.pictures import Pictures
from orchestrator.sim.simulation import SimConfig, SimResult, Simulation
from tests.support.scaling import EXTRA, D, E, P
from tests.support.sim import ENGINE, LLAMA_ON_H100, load, worker


@cache
def run(seed: int, *, can_grow: bool) -> SimResult:
    """More prompts than two workers can do for 25 s, then next to none for as long."""
    engine = replace(ENGINE, kv_cache_bytes=20 * 10**9, token_budget=2048, max_running_sequences=256)
    rng, at_s, found = random.Random(seed), 0.0, []
    while at_s < 25.0:
        at_s += rng.expovariate(22.0)
        found.append((at_s, rng.randint(3000, 5000), rng.randint(2, 6)))
    while at_s < 60.0:
        at_s += rng.expovariate(2.0)
        found.append((at_s, rng.randint(50, 100), rng.randint(50, 400)))
    plan: list[PlannedRequest] = load(found)
    scaling = ScalingConfig(EXTRA[:2], hold_s=3.0, release_s=5.0)
    sim = SimConfig(
        tuple(worker(f"w-{i}", P | D, engine) for i in range(2)),
        LLAMA_ON_H100,
        slo=Slo(0.6, 0.03),
        switch_mode=SwitchMode.ON,
        load_s=1.0,
        seed=seed,
        extra=tuple(worker(one, P | D, engine) for one in EXTRA[:2]),
        scaling=scaling if can_grow else None,
    )
    return Simulation(sim, plan, plan[-1].arrival_s).run()


def num_met(result: SimResult) -> int:
    return sum(record.token_times_s[0] <= 0.6 for record in result.load.records if record.token_times_s)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_simulated_cluster_grows_and_shrinks_and_loses_nothing(seed: int) -> None:
    result = run(seed, can_grow=True)
    assert {record.status for record in result.load.records} == {OK}
    assert result.num_wrong_tokens == 0
    grown = [(one.num_before, one.num_wanted) for one in result.scales if one.state is ScaleState.DONE]
    assert grown[0][0] == 2
    assert max(wanted for _, wanted in grown) > 2
    assert grown[-1][1] < grown[-1][0]
    for one in result.scales:
        assert one.digest
        assert one.predicted is not None
    first = result.scales[0]
    assert first.predicted is not None
    assert first.predicted > 1
    assert first.met_before is not None
    assert num_met(result) > 1.2 * num_met(run(seed, can_grow=False))


def run_pictures(seed: int, drain_s: float) -> tuple[SimResult, bool]:
    """More pictures than one encoder can do, and settings with which one goes all the same; whether it had some then."""
    engine = replace(ENGINE, kv_cache_bytes=20 * 10**9, token_budget=2048, max_running_sequences=256)
    # Slow enough that pictures are there whenever a worker goes.
    pictures = replace(Pictures.of(LLAMA_ON_H100, tiles=3), batch_s=0.02, patch_s=4e-5)
    rng, at_s, plan = random.Random(seed), 0.0, []
    while at_s < 30.0:
        at_s += rng.expovariate(3.0)
        num_images = rng.randint(3, 6)
        prompt = rng.randint(1, 60) + num_images * pictures.num_tokens
        row = TraceRow(len(plan) + 1, at_s, prompt, rng.randint(2, 10), (), num_images)
        plan.append(PlannedRequest(row, at_s, prompt, row.output_tokens, num_images))
    sim = SimConfig(
        (worker("e-0", E, engine), worker("t-0", P | D, engine)),
        LLAMA_ON_H100,
        slo=Slo(0.6, 0.03),
        switch_mode=SwitchMode.ON,
        load_s=1.0,
        seed=seed,
        pictures=pictures,
        extra=tuple(worker(one, E, engine) for one in EXTRA[:2]),
        scaling=ScalingConfig(EXTRA[:2], hold_s=3.0, release_s=2.0, below=9.0, drain_s=drain_s),
    )
    simulation, had_some = Simulation(sim, plan, plan[-1].arrival_s), False
    update_view = simulation.dispatcher.update_view

    def on_view(view: ClusterView) -> bool:
        nonlocal had_some
        had_some |= any(
            one.leaving and one.status is not None and one.status.work.num_encodes > 0 for one in view.workers
        )
        return update_view(view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation.dispatcher, "update_view", on_view)
        return simulation.run(), had_some


@pytest.mark.parametrize("drain_s", [60.0, 0.2])
def test_an_encoder_that_goes_takes_no_picture_with_it(drain_s: float) -> None:
    """Also when it is ended with pictures that requests wait for: others encode them anew."""
    all_had_some, reasons = [], []
    for seed in range(1, 4):
        result, had_some = run_pictures(seed, drain_s)
        assert {record.status for record in result.load.records} == {OK}
        assert result.num_wrong_tokens == 0
        assert result.scales[0].num_wanted > 2
        all_had_some.append(had_some)
        reasons += [one.reason for one in result.scales if one.num_wanted < one.num_before]
    assert any(all_had_some)
    assert any(("in time" if drain_s < 1 else "is drained") in one for one in reasons)
