"""Nexus' costs: two regimes that meet, bandwidth that is shared within bounds, and stages without work."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.policies.nexus import Split, adjust
from orchestrator.control.policies.nexus_cost import (
    CostModel,
    Law,
    Operator,
    Peaks,
    PrefillTraffic,
    Scaling,
    decode_operators,
    prefill_operators,
    prefill_traffic,
    stage_s,
)
from workers.api import Phase
from workers.step_shape import chunk, decodes

LLAMA = MODELS["llama-3-8b"]
H100 = Peaks(DEVICES["h100"].flops_per_s, DEVICES["h100"].bytes_per_s)

scalings = st.builds(Scaling, st.floats(0.05, 1), st.floats(0, 1))
operators = st.builds(Operator, st.floats(0, 1e15), st.floats(0, 1e12), st.booleans(), scalings)
stages = st.lists(operators, max_size=5).map(tuple)
traffics = st.builds(
    PrefillTraffic, st.floats(0, 1), st.floats(0, 1e12), st.floats(0, 1e12), st.floats(1e-3, 10)
)


def serving(num_before: int = 0, context: int = 64 * 2048, law: Law = Law.RATE_SHARE) -> CostModel:
    return CostModel(
        prefill_operators(LLAMA, chunk(2048, num_before), num_before),
        decode_operators(LLAMA, decodes(64, context)),
        H100,
        law,
    )


# Two regimes.


@given(scaling=scalings, share=st.floats(0.01, 1), more=st.floats(0, 0.5))
def test_speed_grows_with_the_share_and_less_after_saturation(
    scaling: Scaling, share: float, more: float
) -> None:
    assert (
        scaling.effective(share) <= scaling.effective(share + more) <= scaling.effective(share) + more + 1e-12
    )
    assert 0 < scaling.effective(share) <= share


@given(scalings)
def test_the_regimes_meet_at_saturation(scaling: Scaling) -> None:
    below, above = scaling.effective(scaling.saturation), scaling.effective(scaling.saturation + 1e-9)
    assert below == scaling.saturation
    assert above == pytest.approx(below, abs=2e-9)


def test_the_ends_of_decay_are_a_plateau_and_ideal_growth() -> None:
    work = Operator(100.0, 0.0, scaling=Scaling(0.5, decay=0.0))
    assert work.compute_s(0.25, 1.0) == 400
    assert work.compute_s(0.5, 1.0) == work.compute_s(1.0, 1.0) == 200
    assert replace(work, scaling=Scaling(0.5, decay=1.0)).compute_s(1.0, 1.0) == 100
    assert replace(work, scaling=Scaling()).compute_s(1.0, 1.0) == 100


@given(stage=stages, share=st.floats(0.01, 1), more=st.floats(0, 0.5), part=st.floats(0.1, 1))
def test_more_sms_and_more_bandwidth_are_never_slower(
    stage: tuple[Operator, ...], share: float, more: float, part: float
) -> None:
    assert stage_s(stage, share, H100, part) >= stage_s(stage, share + more, H100, part)
    assert stage_s(stage, share, H100, part) >= stage_s(stage, share, H100)


# Shared bandwidth.


@given(traffic=traffics, law=st.sampled_from(Law), num_bytes=st.floats(1, 1e12))
def test_decode_gets_some_bandwidth_and_never_more_than_there_is(
    traffic: PrefillTraffic, law: Law, num_bytes: float
) -> None:
    assert 0 < traffic.bandwidth_part(law, num_bytes, H100.bytes_per_s) <= 1


def test_beside_nothing_decode_has_all_of_it() -> None:
    nothing = prefill_traffic((), 0.5, H100)
    without_bytes = prefill_traffic((Operator(1e12, 0.0),), 0.5, H100)
    for law in Law:
        assert nothing.bandwidth_part(law, 1e9, H100.bytes_per_s) == 1
        assert without_bytes.bandwidth_part(law, 1e9, H100.bytes_per_s) == 1


def test_the_published_law_halves_the_bandwidth_at_equal_bytes_however_long_the_chunk_takes() -> None:
    for seconds in (0.01, 10.0):
        same = PrefillTraffic(0.25, 1e9, 1e9, seconds)
        assert same.bandwidth_part(Law.BYTE_SHARE, 1e9, H100.bytes_per_s) == pytest.approx(0.5)
    # By rates a gigabyte in ten seconds is next to nothing.
    slow = PrefillTraffic(0.0, 0.0, 1e9, 10.0)
    assert slow.bandwidth_part(Law.RATE_SHARE, 1e9, H100.bytes_per_s) > 0.999


def test_each_kind_of_traffic_has_its_part_of_the_time() -> None:
    traffic = PrefillTraffic(0.25, attention_bytes=3e9, dense_bytes=1e9, seconds=1.0)
    assert traffic.bandwidth_part(Law.BYTE_SHARE, 1e9, 4e9) == pytest.approx(0.25 * 0.25 + 0.75 * 0.5)
    # 1 GB in 0.75 s beside 4 GB/s.
    assert traffic.bandwidth_part(Law.RATE_SHARE, 1e9, 4e9) == pytest.approx(
        0.25 * 0.5 + 0.75 * 4 / (4 + 4 / 3)
    )


@given(stage=stages, share=st.floats(0.05, 1))
def test_the_part_of_attention_is_a_part(stage: tuple[Operator, ...], share: float) -> None:
    traffic = prefill_traffic(stage, share, H100)
    assert 0 <= traffic.attention_part <= 1 + 1e-9


def test_by_bytes_more_sms_for_decode_may_be_slower() -> None:
    # Prefill takes longer, and moves weights, of which there are more, for more of its time.
    model = CostModel(
        prefill_operators(LLAMA, chunk(2048, 30_000), 30_000),
        (Operator(0.0, 17e9, is_attention=True),),
        H100,
        Law.BYTE_SHARE,
    )
    assert model.decode_s(70) > model.decode_s(30)


@given(
    stage=stages,
    percent=st.integers(1, 98),
    context=st.integers(64, 10**6),
)
def test_by_rates_more_sms_for_decode_are_never_slower_with_all_that_contends(
    stage: tuple[Operator, ...], percent: int, context: int
) -> None:
    model = CostModel(stage, decode_operators(LLAMA, decodes(64, context)), H100, Law.RATE_SHARE)
    assert model.decode_s(percent) >= model.decode_s(percent + 1) * (1 - 1e-9)


# Stages.


def test_a_stage_takes_for_ever_without_sms_and_no_time_without_work() -> None:
    model = serving()
    assert model.prefill_s(0) == model.decode_s(0) == math.inf
    idle = CostModel((), (), H100, Law.RATE_SHARE)
    assert idle.prefill_s(0) == idle.decode_s(0) == idle.prefill_s(50) == 0
    assert prefill_operators(LLAMA, chunk(0), 0) == decode_operators(LLAMA, decodes(0, 0)) == ()


@pytest.mark.parametrize("law", Law)
def test_a_chunk_slows_decode_and_a_later_one_no_more(law: Law) -> None:
    early, late = serving(0, law=law), serving(16_384, law=law)
    alone = replace(early, prefill=())
    slowdown = 1.448 if law is Law.BYTE_SHARE else 1.028
    assert early.decode_s(50) / alone.decode_s(50) == pytest.approx(slowdown, abs=5e-4)
    # The paper measured 36 % more for a longer prompt. With this model's shape neither law has it: a chunk reads mostly weights, and a later
    # one takes longer.
    assert alone.decode_s(50) < late.decode_s(50) < early.decode_s(50)


@pytest.mark.parametrize("law", Law)
def test_contention_alone_can_pass_the_slack_unless_the_best_has_the_same_traffic(law: Law) -> None:
    model = serving(16_384, context=16 * 16_384, law=law)

    def cost(phase: Phase, percent: int) -> float:
        return model.prefill_s(percent) if phase is Phase.PREFILL else model.decode_s(percent)

    uncontended_s = replace(model, prefill=()).decode_s(100)
    now = Split(50, 50)
    contended = adjust(Phase.PREFILL, now, cost, best_s=uncontended_s)
    fair = adjust(Phase.PREFILL, now, cost, best_s=model.decode_best_s(now.prefill))
    assert contended.prefill < fair.prefill
    assert model.decode_s(fair.decode) <= 1.1 * model.decode_best_s(now.prefill)
