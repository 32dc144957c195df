"""Prompts by least slack and steps by prediction, in simulated time: the engine that serves."""

import random
from dataclasses import asdict, replace

import pytest

from orchestrator.bench.plan import PlannedRequest
from orchestrator.bench.records import OK
from orchestrator.bench.summary import summarise
from orchestrator.control.known_shapes import MODELS
from orchestrator.control.slo import Slo
from orchestrator.sim import coarse_replay
from orchestrator.sim.faults import random_faults
from orchestrator.sim.simulation import SimConfig
from tests.support.sim import BOTH, ENGINE, SHAPES, load, random_load, run, worker
from workers.api import EngineConfig, PrefillOrder, StepBudget
from workers.latency_model import LatencyModel
from workers.step_shape import DeviceShape, StepCosts

#: SmolLM2 on one core: 36 ms a step and 2.5 ms a token.
CPU = LatencyModel(
    MODELS["smollm2-135m"],
    DeviceShape("cpu", 1e11, 4e10, 2e10, 0.009, 64e9, 1e9, is_reading_hidden=False),
    is_learning=False,
)
SLO = Slo(2.0, 0.1)
SMALL = replace(ENGINE, max_running_sequences=16)
PREDICTED = replace(
    SMALL, token_budget=256, prefill_order=PrefillOrder.LEAST_SLACK, step_budget=StepBudget.PREDICTED
)


def chat(seed: int, rate_rps: float, num_requests: int) -> list[PlannedRequest]:
    """Prompts of some ten tokens, and a tenth of them five times as long."""
    rng, at_s, requests = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        at_s += rng.expovariate(rate_rps)
        prompt = rng.randrange(20, 100) * (5 if rng.random() < 0.1 else 1)
        requests.append((at_s, prompt, rng.randrange(5, 25)))
    return load(requests)


def attainment(engine: EngineConfig, plan: list[PlannedRequest]) -> float:
    result, _ = run([worker("w0", BOTH, engine)], plan, CPU, slo=SLO)
    assert {record.status for record in result.load.records} == {OK}
    found = summarise(result.load, SLO).attainment
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(3))
def test_near_saturation_more_requests_meet_both_targets(seed: int) -> None:
    plan = chat(seed, rate_rps=2.0, num_requests=100)
    fixed = max(attainment(replace(SMALL, token_budget=budget), plan) for budget in (32, 64, 128, 256))
    assert attainment(PREDICTED, plan) > fixed


def test_a_worker_begins_with_a_profile_of_what_is_simulated_and_with_no_other() -> None:
    measured = StepCosts(CPU.model, CPU.device, (2.0, 2.0, 2.0, 2.0), 100, 0.05, 1.1)
    other = replace(measured, model=MODELS["llama-3-8b"])
    # Few steps: of its own it has not enough before the end.
    plan = chat(seed=1, rate_rps=20.0, num_requests=8)
    begun_with = {
        name: asdict(
            run(
                [replace(worker("w0", BOTH, PREDICTED), profile=profile)],
                plan,
                LatencyModel.fitted(measured),
                slo=SLO,
            )[0]
        )
        for name, profile in (("roofline", None), ("other", other), ("profile", measured))
    }
    assert begun_with["other"] == begun_with["roofline"] != begun_with["profile"]


@pytest.mark.parametrize("shape", SHAPES)
def test_everybody_ends_and_one_seed_gives_one_result_with_faults(shape: str) -> None:
    options = {"prefill_order": PrefillOrder.LEAST_SLACK, "step_budget": StepBudget.PREDICTED}
    workers = [replace(one, engine=replace(one.engine, **options)) for one in SHAPES[shape]]  # type: ignore[arg-type]
    names = [one.worker_id for one in workers]
    faults = random_faults(random.Random(5), names, rate_per_s=0.3, until_s=5)
    results = [
        run(workers, random_load(seed=2), seed=3, faults=faults, slo=Slo(0.05, 0.008))[0] for _ in range(2)
    ]
    assert {record.status for record in results[0].load.records} == {OK}
    assert asdict(results[0]) == asdict(results[1])


@pytest.mark.parametrize("rate_rps", [2.0, 3.0])
def test_the_coarse_mode_does_the_same(rate_rps: float) -> None:
    """Beyond saturation too, where who is passed over decides."""
    plan = chat(seed=4, rate_rps=rate_rps, num_requests=100)
    fine = attainment(PREDICTED, plan)
    config = SimConfig((worker("w0", BOTH, PREDICTED),), CPU, slo=SLO)
    coarse = coarse_replay.replay(config, plan, plan[-1].arrival_s, SLO, lambda _done, _all: None)
    found = summarise(coarse.load, SLO).attainment
    assert found == pytest.approx(fine, abs=0.03)
