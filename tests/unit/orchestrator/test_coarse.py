"""The coarse simulator: right where the answer is known, whole under any policy, and near the fine one."""

import random
from collections.abc import Callable
from dataclasses import asdict
from itertools import accumulate
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.plan import PlannedRequest
from orchestrator.control.policies.aggregated import PrefillFirst, StallFree
from orchestrator.control.policies.orders import ShortestFirst
from orchestrator.control.policies.policy import ClusterLoad, Switch, WorkerLoad
from orchestrator.control.slo import Slo, percentile, tpot_s
from orchestrator.sim.coarse import CoarseConfig, CoarseSimulation
from orchestrator.sim.coarse_costs import CoarseCosts, rates
from orchestrator.sim.coarse_request import CoarseRequest
from tests.support import sim
from tests.support.coarse import COSTS, SLO, D, E, P, policy, random_load, run, slack_order
from tests.support.sim import LLAMA_ON_H100
from workers.api import EngineConfig, Phase
from workers.latency_model import LatencyModel
from workers.step_choice import Exclusive, Head, Mixed, Split, Step
from workers.step_cost import StepCost
from workers.step_shape import chunk, decodes

SHAPES = {
    "one": (E | P | D,),
    "two": (E | P | D, E | P | D),
    "apart": (E, P, D),
    "many apart": (E, E, P, P, D, D),
    "mixed": (E | P | D, P, D, E | P),
}


class AnyStep:
    """Any step that a policy may ask for."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def step(self, _now_s: float, device: WorkerLoad, head: Head) -> Step:
        rng = self._rng
        kinds: list[Step] = [Mixed(device.num_decoding + rng.randint(1, 600), rng.randint(1, 9))]
        share = rng.uniform(0.1, 0.9)
        kinds.append(Split(share, 1 - share, rng.randint(1, 900), rng.randint(1, 9), rng.random() < 0.5))
        kinds.append(Split(1.0, 1.0, 512, 4))
        if head.num_tiles:
            kinds.append(Exclusive(Phase.ENCODE, rng.randint(1, 9)))
        if head.num_left:
            kinds.append(Exclusive(Phase.PREFILL, rng.randint(1, 900)))
        if device.num_decoding:
            kinds.append(Exclusive(Phase.DECODE, 0))
        return rng.choice(kinds)


def any_switches(rng: random.Random) -> Callable[[float, ClusterLoad], list[Switch]]:
    """Switches at random that leave every phase to somebody who is not switching."""

    def tick(_now_s: float, cluster: ClusterLoad) -> list[Switch]:
        worker = rng.choice(cluster.workers)
        phases = rng.choice((E, P, D, P | D, E | P, E | P | D))
        if worker.is_switching or phases == worker.phases or rng.random() < 0.3:
            return []
        others = [w for w in cluster.workers if w is not worker and not w.is_switching]
        if {phase for w in others for phase in w.phases} != set(Phase):
            return []
        return [Switch(worker.worker_id, phases, "any", 1.0)]

    return tick


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(sorted(SHAPES)),
    kv_tokens=st.sampled_from((4000, 20_000, 400_000)),
    is_slack=st.booleans(),
)
def test_whatever_a_policy_decides_every_request_gets_its_tokens(
    seed: int, shape: str, kv_tokens: int, is_slack: bool
) -> None:
    rng = random.Random(seed)
    one = policy(
        SHAPES[shape],
        stepping=AnyStep(rng),
        order=slack_order if is_slack else ShortestFirst,
        tick=any_switches(rng),
    )
    requests = random_load(seed, rate_rps=rng.choice((5.0, 20.0, 200.0)), has_images=True)
    result, simulation = run(one, requests, kv_tokens=kv_tokens)
    assert [record.request for record in result.records] == requests
    for record in result.records:
        assert record.status == "OK"
        assert 0 < record.first_s <= record.last_s
    totals = simulation.cluster.totals
    assert totals.num_finished == len(requests)
    assert totals.output_tokens == sum(one.output_tokens for one in requests)
    assert all(load.kv_tokens == load.decode_context == 0 for load in simulation.cluster.workers)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_one_seed_gives_one_result(seed: int) -> None:
    results = []
    for _ in range(2):
        rng = random.Random(seed)
        one = policy(SHAPES["mixed"], stepping=AnyStep(rng), tick=any_switches(rng))
        results.append(asdict(run(one, random_load(seed, has_images=True), kv_tokens=20_000)[0]))
    assert results[0] == results[1]


def test_what_fits_no_worker_is_refused() -> None:
    result, _ = run(policy([P | D]), [CoarseRequest(0.0, 900, 200, SLO)], kv_tokens=1000)
    assert result.records[0].status == "REJECTED"
    assert result.attainment == 0.0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), wanted=st.floats(0.05, 1.0))
def test_whether_so_many_meet_their_targets_is_known_before_the_end(seed: int, wanted: float) -> None:
    requests = random_load(seed, rate_rps=30.0)
    one = policy(SHAPES["one"])
    result, simulation = run(one, requests)
    config = CoarseConfig(COSTS, 400_000)
    early = CoarseSimulation(config, policy(SHAPES["one"]), requests)
    assert early.reaches(wanted) == (result.attainment >= wanted)
    assert early.timers.num_events <= simulation.timers.num_events


# Known answers.


def constant_cost(step_s: float) -> CoarseCosts:
    return CoarseCosts(StepCost(step_s, 0.0, 0.0, 0.0, 0.0, 0.0), 1e9, 0.0, message_s=0.0)


def test_a_lone_request_takes_as_long_as_its_steps() -> None:
    # Two chunks of the prompt, of which the second gives the first token, and nine more tokens.
    result, _ = run(policy([P | D]), [CoarseRequest(0.0, 600, 10, SLO)], costs=constant_cost(0.1))
    assert result.records[0].first_s == pytest.approx(0.2)
    assert result.records[0].last_s == pytest.approx(1.1)


def test_the_wait_for_a_server_of_constant_speed_is_the_known_one() -> None:
    """M/D/1: mean time to the first token D + R D^2 / (2 (1 - R D)), DistServe section 3."""
    rng, service_s, rate, num = random.Random(11), 0.1, 5.0, 20_000
    times = list(accumulate(rng.expovariate(rate) for _ in range(num)))
    requests = [CoarseRequest(at * num / rate / times[-1], 16, 1, SLO) for at in times]
    result, _ = run(policy([P | D], stepping=StallFree(16)), requests, costs=constant_cost(service_s))
    mean_s = fmean(record.first_s for record in result.records)
    assert mean_s == pytest.approx(service_s + rate * service_s**2 / (2 * (1 - rate * service_s)), rel=0.03)


def test_a_run_in_closed_form_is_its_steps() -> None:
    cost, num, context = COSTS.step, 37, 41_000
    each = [cost.step_s(num, context + num * i) for i in range(200)]
    for num_steps in (1, 2, 50, 200):
        assert cost.run_s(num, context, num_steps) == pytest.approx(sum(each[:num_steps]))
        assert cost.steps_until(num, context, cost.run_s(num, context, num_steps)) == num_steps
        assert cost.steps_until(num, context, cost.run_s(num, context, num_steps) + 1e-4) == num_steps + 1


@given(
    num=st.integers(0, 256),
    context=st.integers(0, 500_000),
    tokens=st.integers(0, 4096),
    before=st.integers(0, 30_000),
)
def test_six_numbers_say_what_the_latency_model_says(
    num: int, context: int, tokens: int, before: int
) -> None:
    shape = decodes(num, context) + chunk(tokens, before)
    if shape.num_tokens:
        expected_s = LLAMA_ON_H100.step_s(shape)
        assert COSTS.step.step_s(num, context, tokens, shape.prefill_pairs) == pytest.approx(expected_s)


@given(
    num=st.integers(1, 256),
    context=st.integers(1, 400_000),
    before=st.integers(0, 30_000),
    limit_s=st.floats(0.001, 0.2),
)
def test_what_is_planned_within_a_limit_stays_within_it(
    num: int, context: int, before: int, limit_s: float
) -> None:
    cost = COSTS.step
    tokens = cost.tokens_within(num, context, before, limit_s)
    if tokens:
        pairs = tokens * (before + (tokens + 1) / 2)
        assert cost.step_s(num, context, tokens, pairs) <= limit_s * 1.001


@pytest.mark.parametrize(
    ("decode_sms", "measured"), [(24, (0.99, 0.94, 0.88)), (40, (1.06, 1.00, 0.94)), (56, (1.09, 1.02, 0.97))]
)
def test_two_streams_do_together_what_was_measured(decode_sms: int, measured: tuple[float, ...]) -> None:
    """One H100: 132 SMs without those of decode for prefill; three batches."""
    together = sum(rates(1 - decode_sms / 132, decode_sms / 132))
    assert min(measured) - 0.01 <= together <= max(measured) + 0.01


def test_streams_that_nobody_divides_are_near_time_slicing() -> None:
    assert sum(rates(1.0, 1.0)) == pytest.approx(1.04, abs=0.02)


def test_prompts_first_stall_the_decodes_and_a_budget_does_not() -> None:
    requests = [CoarseRequest(0.0, 100, 100, SLO), CoarseRequest(0.3, 30_000, 2, SLO)]
    gaps = []
    for stepping in (PrefillFirst(32_768), StallFree(512)):
        record = run(policy([P | D], stepping=stepping), requests)[0].records[0]
        gaps.append(record.last_s)
    assert gaps[0] > gaps[1]


def test_sequences_that_come_from_elsewhere_count_against_the_batch_limit() -> None:
    requests = [CoarseRequest(0.001 * i, 100, 400, SLO) for i in range(12)]
    apart = policy((P, D))
    ends = {
        limit: [record.last_s for record in run(apart, requests, max_sequences=limit)[0].records]
        for limit in (3, 12)
    }
    # Four batches of three, one after the other, each about as fast as one of twelve.
    assert max(ends[3]) > 3.5 * max(ends[12])
    assert sorted(ends[3])[2] < 1.1 * max(ends[12])


def test_a_prefix_that_was_seen_costs_nothing_again() -> None:
    blocks = tuple(range(8))
    requests = [CoarseRequest(0.0, 4096, 2, SLO, blocks), CoarseRequest(2.0, 4096, 2, SLO, blocks)]
    first, again = run(policy([P | D]), requests)[0].records
    assert again.first_s < first.first_s / 5


# Beside the fine simulator.


def both(shape: str, plan: list[PlannedRequest]) -> list[tuple[list[float], list[float], float]]:
    """TTFTs, TPOTs and attainment of the fine and of the coarse mode."""
    engine = EngineConfig(
        kv_cache_bytes=50 * 10**9, token_budget=2048, max_running_sequences=256, max_waiting_requests=10_000
    )
    phases = {"one": (P | D,), "one apart": (P, D)}[shape]
    declared = [sim.worker(f"w{i}", one, engine) for i, one in enumerate(phases)]
    fine = sim.run(declared, plan, check_every=0)[0].load.records
    slo = Slo(0.5, 0.03)
    requests = [CoarseRequest.of(one, slo) for one in plan]
    kv_tokens = 50 * 10**9 // LLAMA_ON_H100.model.kv_token_bytes
    coarse = run(policy(phases, stepping=StallFree(2048)), requests, kv_tokens=kv_tokens)[0]
    times = [(record.token_times_s[0], tpot_s(record.token_times_s)) for record in fine]
    return [
        (
            sorted(ttft for ttft, _ in times),
            sorted(tpot for _, tpot in times if tpot is not None),
            fmean(slo.is_met(*one) for one in times),
        ),
        (
            sorted(record.first_s for record in coarse.records),
            sorted(record.tpot_s for record in coarse.records if record.tpot_s is not None),
            coarse.attainment,
        ),
    ]


@pytest.mark.parametrize(("shape", "rate_rps"), [("one", 8.0), ("one", 14.0), ("one apart", 14.0)])
def test_it_is_near_the_fine_one(shape: str, rate_rps: float) -> None:
    rng, at_s, rows = random.Random(5), 0.0, []
    for _ in range(150):
        at_s += rng.expovariate(rate_rps)
        rows.append((at_s, round(rng.lognormvariate(6.5, 0.8)), round(rng.lognormvariate(4.0, 0.5))))
    (ttft, tpot, met), (coarse_ttft, coarse_tpot, coarse_met) = both(shape, sim.load(rows))
    for percent in (50, 90):
        assert percentile(coarse_ttft, percent) == pytest.approx(percentile(ttft, percent), rel=0.1)
        assert percentile(coarse_tpot, percent) == pytest.approx(percentile(tpot, percent), rel=0.1)
    assert coarse_met == pytest.approx(met, abs=0.02)


def test_its_costs_come_from_the_latency_model() -> None:
    latency = LatencyModel(LLAMA_ON_H100.model, LLAMA_ON_H100.device, is_learning=False)
    assert CoarseCosts.of(latency) == COSTS
