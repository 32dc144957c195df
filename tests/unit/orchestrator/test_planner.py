"""The planner: shapes, search, verdicts and manifests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.trace import read_trace
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.slo import Slo
from orchestrator.errors import TraceError
from orchestrator.manifest.declare import worker_specs
from orchestrator.manifest.engine import MIB
from orchestrator.manifest.load import parse
from orchestrator.planner import manifest
from orchestrator.planner.load import (
    Load,
    Misses,
    alone,
    clipped,
    highest_rps,
    kv_cache_mib,
    long_enough_s,
)
from orchestrator.planner.report import Row, chosen, row, verdict
from orchestrator.planner.search import Found, bayesian, exhaustive, search
from orchestrator.planner.shapes import Candidate, D, E, Family, Grid, Knobs, P, Shape, grids
from workers.api import Phase, PrefillOrder
from workers.latency_model import LatencyModel

ROOT = Path(__file__).parents[3]
TRACE = clipped(read_trace(ROOT / "tests" / "fixtures" / "traces" / "azure_llm_2023_conv.csv"), 32_768)
MOONCAKE = ROOT / "tests" / "fixtures" / "traces" / "mooncake_conversation.jsonl"
LATENCY = LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False)
SLO = Slo(0.5, 0.03)
KNOBS = Knobs(2048, 256, PrefillOrder.FCFS)
FULL = Candidate(Shape(((P | D, 2),)), KNOBS)
APART = Candidate(Shape(((P, 1), (D, 1))), KNOBS)


def load_of(num_devices: int, *, slo: Slo = SLO, num_images: int = 0, duration_s: float = 3.0) -> Load:
    highest = highest_rps(TRACE, LATENCY, num_devices=num_devices, num_images=num_images)
    kv_bytes = kv_cache_mib(LATENCY) * MIB
    return Load(TRACE, slo, 0.9, LATENCY, num_devices, num_images, kv_bytes, duration_s, highest)


def no_one(_found: Found) -> None:
    """Does not listen."""


@given(st.integers(1, 12), st.booleans(), st.booleans())
def test_every_shape_has_all_workers_and_one_for_every_phase(num: int, has_images: bool, quick: bool) -> None:
    needed = set(Phase) if has_images else {Phase.PREFILL, Phase.DECODE}
    for family, grid in grids(num, has_images=has_images, is_quick=quick).items():
        candidates = grid.candidates()
        assert len(set(candidates)) == len(candidates)
        for one in candidates:
            workers = one.shape.workers
            assert len(workers) == num
            assert set().union(*workers) == needed
            sizes = {len(phases) for phases in workers}
            assert (family is Family.AGGREGATED) == (sizes == {len(needed)})
            assert (family is Family.DISAGGREGATED) == (sizes == {1})


def test_eight_devices_have_the_known_numbers_of_shapes() -> None:
    def num(family: Family, *, has_images: bool) -> int:
        grid = grids(8, has_images=has_images, is_quick=True)[family]
        return len({one.shape for one in grid.candidates()})

    # All triples of workers, as orchestrator.control.policies.epd_queue has them.
    assert num(Family.DISAGGREGATED, has_images=True) == 21
    assert num(Family.DISAGGREGATED, has_images=False) == 7
    assert num(Family.MIXED, has_images=False) == 7 + 21
    assert num(Family.AGGREGATED, has_images=True) == 1


def test_a_family_that_needs_more_devices_has_no_shape() -> None:
    assert not grids(1, has_images=False, is_quick=True)[Family.DISAGGREGATED].candidates()
    assert not grids(2, has_images=True, is_quick=True)[Family.DISAGGREGATED].candidates()
    grid = grids(2, has_images=True, is_quick=True)[Family.DISAGGREGATED]
    assert search(grid, load_of(2), seeds=(0,), tell=no_one) is None


@given(st.integers(1, 9), st.booleans(), st.data())
def test_a_manifest_loads_as_what_was_planned(num: int, has_images: bool, data: st.DataObject) -> None:
    found = grids(num, has_images=has_images, is_quick=False).values()
    one = data.draw(st.sampled_from([c for grid in found for c in grid.candidates()]))
    text = manifest.text(
        one, model="llama-3-8b", slo=SLO, kv_cache_bytes=54_350 * MIB, comment="two\nlines: of # it"
    )
    deployment = parse(text)
    specs = worker_specs(deployment)
    assert tuple(spec.phases for spec in specs) == one.shape.workers
    for spec in specs:
        expected = replace(
            one.knobs.engine(54_350 * MIB),
            max_waiting_requests=spec.engine.max_waiting_requests,
            num_threads=spec.engine.num_threads,
            weight_dtype=spec.engine.weight_dtype,
        )
        assert spec.engine == expected
    assert (deployment.spec.slo.ttft_ms, deployment.spec.slo.tpot_ms) == (500.0, 30.0)
    assert parse(text) == deployment


@dataclass(frozen=True)
class Hill:
    """Bears most where workers, budget, limit and order are as this one has them, and less the further away."""

    top: Candidate

    def rate(self, candidate: Candidate) -> float:
        here, there = dict(candidate.shape.groups), dict(self.top.shape.groups)
        rate = 100.0 - 3 * sum(abs(here.get(one, 0) - there.get(one, 0)) for one in here | there)
        mine, best = candidate.knobs, self.top.knobs
        rate -= abs(mine.token_budget - best.token_budget) / 100
        rate -= abs(mine.max_running_sequences - best.max_running_sequences) / 10
        return rate - 5 * (mine.prefill_order is not best.prefill_order)

    def reaches(self, candidate: Candidate, seed: int, rate_rps: float) -> bool:
        return rate_rps <= self.capacity_rps(candidate, seed)

    def capacity_rps(self, candidate: Candidate, seed: int, near_rps: float = 0.0) -> float:
        return max(0.0, self.rate(candidate) + 0.2 * (seed % 3))


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_both_searches_find_the_top_of_a_hill(data: st.DataObject) -> None:
    grid = grids(8, has_images=False, is_quick=False)[Family.MIXED]
    hill = Hill(data.draw(st.sampled_from(grid.candidates())))
    assert exhaustive(grid.candidates(), hill, seeds=(0, 1, 2), tell=no_one).candidate == hill.top
    found = bayesian(grid, hill, seeds=(0, 1, 2), tell=no_one)
    assert found.candidate == hill.top
    assert found.num_tried <= found.num_all // 3


def test_the_bayesian_search_comes_near_the_exhaustive_one_on_a_real_load() -> None:
    load = load_of(4, duration_s=1.0)
    budgets, limits = (512, 1024, 2048), (64, 256)
    grid = Grid(4, ((P, D), (P | D, P)), budgets, limits, tuple(PrefillOrder))
    best = search(grid, load, seeds=(0,), tell=no_one)
    found = search(grid, load, seeds=(0,), tell=no_one, max_exhaustive=0)
    assert best is not None
    assert found is not None
    assert best.num_tried == best.num_all == found.num_all == 108
    assert found.capacity_rps >= 0.95 * best.capacity_rps


def test_one_seed_gives_one_search() -> None:
    grid = grids(8, has_images=True, is_quick=False)[Family.DISAGGREGATED]
    hill = Hill(grid.candidates()[100])
    first, second = (bayesian(grid, hill, seeds=(0, 1, 2), tell=no_one) for _ in range(2))
    assert first == second


def test_nothing_that_bears_any_rate_is_said_so() -> None:
    load = load_of(2, slo=Slo(1e-4, 1e-4), duration_s=1.0)
    found = exhaustive([FULL, APART], load, seeds=(0,), tell=no_one)
    assert found.capacity_rps == 0.0
    assert row(Family.AGGREGATED, found, load, (0, 1, 2)).by_seed_rps == (0.0, 0.0, 0.0)


def test_a_best_is_judged_with_what_limits_it() -> None:
    load = load_of(2)
    apart = row(Family.DISAGGREGATED, Found(APART, 30.0, 1, 1), load, (0, 1, 2))
    assert len(apart.by_seed_rps) == 3
    assert 0 < apart.goodput_rps.mean < load.highest_rps
    # One worker computes all prompts and the other decodes with time to spare.
    assert apart.misses.limit == "TTFT"
    assert apart.misses.ttft > 0.1


@pytest.mark.parametrize(
    ("misses", "limit"),
    [
        (Misses(0.2, 0.05, 0.0), "TTFT"),
        (Misses(0.05, 0.2, 0.0), "TPOT"),
        (Misses(0.2, 0.15, 0.0), "TTFT and TPOT"),
        (Misses(0.1, 0.1, 0.3), "memory"),
    ],
)
def test_the_limit_is_what_is_missed_most(misses: Misses, limit: str) -> None:
    assert misses.limit == limit


def rows(aggregated: Sequence[float], other: Sequence[float]) -> tuple[Row, Row]:
    misses = Misses(0.1, 0.0, 0.0)
    return (
        Row(Family.AGGREGATED, Found(FULL, 1.0, 1, 1), tuple(aggregated), misses),
        Row(Family.DISAGGREGATED, Found(APART, 1.0, 1, 1), tuple(other), misses),
    )


@pytest.mark.parametrize(
    ("other", "pays", "words"),
    [
        ((15.0, 15.2, 15.4), False, "disaggregated does not pay: 1 x prefill + 1 x decode 15.2 +- 0.5"),
        ((25.0, 25.3, 25.6), True, "% more"),
        ((20.0, 22.0, 21.5), None, "is inside its interval"),
    ],
)
def test_whether_it_pays_is_said_plainly(other: Sequence[float], pays: bool | None, words: str) -> None:
    aggregated, apart = rows((21.1, 21.3, 21.5), other)
    found = verdict(aggregated, apart)
    assert found.pays is pays
    assert words in found.sentence
    assert chosen((aggregated, apart), (found,)) is (apart if pays else aggregated)


def test_a_lone_request_is_the_best_case() -> None:
    found = alone(TRACE, LATENCY, num_devices=2, num_images=0)
    assert found.share_met(SLO) == 1.0
    assert found.share_met(Slo(1e-3, 1.0)) == 0.0
    least = found.at(0.9)
    assert found.share_met(least) >= 0.8
    load = load_of(2, slo=Slo(least.ttft_s / 2, least.tpot_s / 2))
    assert not load.reaches(FULL, 0, 1.0)
    with_pictures = alone(TRACE, LATENCY, num_devices=2, num_images=1)
    assert min(b - a for a, b in zip(found.ttfts_s, with_pictures.ttfts_s, strict=True)) > 0


def test_a_prefix_that_came_before_costs_a_lone_request_nothing() -> None:
    trace = read_trace(MOONCAKE)
    cached = alone(trace, LATENCY, num_devices=1, num_images=0)
    rows = tuple(replace(one, hash_ids=()) for one in trace.rows)
    computed = alone(replace(trace, rows=rows), LATENCY, num_devices=1, num_images=0)
    assert sum(cached.ttfts_s) < sum(computed.ttfts_s)
    assert all(a <= b for a, b in zip(cached.ttfts_s, computed.ttfts_s, strict=True))


def test_pictures_need_encoding_and_tokens() -> None:
    requests = load_of(3, num_images=2).requests(0, 20.0)
    plain = load_of(3).requests(0, 20.0)
    assert all(one.num_tiles == 20 for one in requests)
    assert [a.prompt_tokens - b.prompt_tokens for a, b in zip(requests, plain, strict=True)] == [1280] * len(
        plain
    )
    shape = Shape(((E, 1), (P, 1), (D, 1)))
    result = load_of(3, num_images=2).simulation(Candidate(shape, KNOBS), 0, 5.0).run()
    assert result.attainment == 1.0


def test_loads_of_the_search_are_long_enough_for_a_queue_to_grow() -> None:
    long = long_enough_s(TRACE, SLO, 300.0, is_quick=False)
    assert long >= 4 * (SLO.ttft_s + 100 * SLO.tpot_s)
    assert long_enough_s(TRACE, SLO, 300.0, is_quick=True) == long / 2
    assert long_enough_s(TRACE, SLO, 1.0, is_quick=False) == 8000.0


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(TraceError, match="has 99 rows; a plan needs 100"):
        clipped(replace(TRACE, rows=TRACE.rows[:99]), 32_768)
    same = tuple(replace(one, arrival_s=1.0) for one in TRACE.rows)
    with pytest.raises(TraceError, match="all arrive at once"):
        clipped(replace(TRACE, rows=same), 32_768)


def test_requests_are_clipped_to_the_context() -> None:
    rows = clipped(TRACE, 300).rows
    assert max(one.prompt_tokens + one.output_tokens for one in rows) == 300
    assert min(one.prompt_tokens for one in rows) >= 1
