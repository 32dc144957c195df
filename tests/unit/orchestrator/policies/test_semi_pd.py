"""semi-PD: the published walks, the closed form that the loop must agree with, and fits that know when they cannot be made."""

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.control.policies.semi_pd import (
    Estimator,
    Partition,
    Settings,
    TpotCurve,
    TtftCurve,
    adjust,
    feasible_shares,
    fit_tpot,
    fit_ttft,
    observed_ttft_s,
    queueing_curve,
)
from orchestrator.control.slo import Slo

TTFT = TtftCurve(a=20, b=0.05, load=30)
TPOT = TpotCurve(a=2, b=0.01)
ttft_curves = st.builds(TtftCurve, st.floats(0.5, 60), st.floats(0, 0.5), st.floats(0, 60))
tpot_curves = st.builds(TpotCurve, st.floats(0.2, 10), st.floats(0, 0.1))
#: As the walk has them: one phase at 100 %, both at multiples of the step.
partitions = st.builds(
    lambda low, is_prefill: Partition(100, low) if is_prefill else Partition(low, 100),
    st.integers(2, 20).map(lambda n: 5 * n),
    st.booleans(),
)


def raise_prefill(start: Partition, target_s: float, curve: TtftCurve = TTFT, **settings: int) -> Partition:
    """TTFT misses its target, TPOT does not."""
    return adjust(
        start,
        ttft_s=target_s * 2,
        tpot_s=0.01,
        slo=Slo(target_s, 0.1),
        estimator=Estimator(curve, TPOT),
        settings=Settings(**settings),
    ).partition


# Golden walks.


def test_golden_one_step_from_the_middle() -> None:
    assert TTFT.seconds(50) == pytest.approx(1.05)
    assert raise_prefill(Partition(50, 50), 1.0) == Partition(55, 50)
    assert Partition(55, 50).prefill_share == pytest.approx(52.381, abs=5e-4)
    assert TTFT.seconds(Partition(55, 50).prefill_share) == pytest.approx(0.9436, abs=5e-5)


def test_golden_eight_steps_from_no_partition() -> None:
    walk = [raise_prefill(Partition(100, 100), 0.70, max_steps=n) for n in range(10)]
    assert [one.decode for one in walk] == [100, 95, 90, 85, 80, 75, 70, 65, 60, 60]
    assert {one.prefill for one in walk} == {100}
    shares = [50, 51.282, 52.632, 54.054, 55.556, 57.143, 58.824, 60.606, 62.5]
    assert [one.prefill_share for one in walk[:9]] == pytest.approx(shares, abs=5e-4)
    seconds = [1.05, 0.9898, 0.9337, 0.8815, 0.8326, 0.7868, 0.7439, 0.7035, 0.6654]
    assert [TTFT.seconds(one.prefill_share) for one in walk[:9]] == pytest.approx(seconds, abs=5e-5)


# The algorithm.


@given(start=partitions, curve=ttft_curves, target_s=st.floats(0.1, 5))
def test_the_loop_stops_where_the_closed_form_says(
    start: Partition, curve: TtftCurve, target_s: float
) -> None:
    settings = Settings(max_steps=100)
    reached = raise_prefill(start, target_s, curve, max_steps=100)
    least = curve.least_share(target_s)
    floor = Partition(100, settings.least)
    walk = [start]
    while walk[-1] != floor:
        prefill, decode = walk[-1].prefill, walk[-1].decode
        walk.append(Partition(prefill + 5, decode) if prefill < 100 else Partition(prefill, decode - 5))
    # At the share itself rounding decides.
    assume(all(abs(one.prefill_share - least) > 1e-6 for one in walk))
    assert reached == next((one for one in walk if one.prefill_share >= least), floor)


@given(start=partitions, curve=tpot_curves, target_s=st.floats(0.01, 1))
def test_raising_decode_mirrors_raising_prefill(start: Partition, curve: TpotCurve, target_s: float) -> None:
    settings = Settings(max_steps=100)
    reached = adjust(
        start,
        ttft_s=0.1,
        tpot_s=target_s * 2,
        slo=Slo(1.0, target_s),
        estimator=Estimator(TTFT, curve),
        settings=settings,
    ).partition
    mirrored = raise_prefill(
        Partition(start.decode, start.prefill), target_s, TtftCurve(curve.a, curve.b, 0.0), max_steps=100
    )
    assert reached == Partition(mirrored.decode, mirrored.prefill)


@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(0.5, 0.05), (2.0, 0.2), (None, 0.2), (2.0, None)])
def test_nothing_changes_when_both_pass_both_fail_or_one_is_unknown(
    ttft_s: float | None, tpot_s: float | None
) -> None:
    found = adjust(
        Partition(50, 50),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        slo=Slo(1.0, 0.1),
        estimator=Estimator(TTFT, TPOT),
        settings=Settings(),
    )
    assert found.partition == Partition(50, 50)
    assert found.reason


def test_nothing_changes_soon_after_a_switch() -> None:
    def after(since_s: float) -> Partition:
        return adjust(
            Partition(50, 50),
            ttft_s=2.0,
            tpot_s=0.05,
            slo=Slo(1.0, 0.1),
            estimator=Estimator(TTFT, TPOT),
            settings=Settings(cooldown_s=10),
            since_switch_s=since_s,
        ).partition

    assert after(9.9) == Partition(50, 50)
    assert after(10.0) != Partition(50, 50)


def test_an_overload_leaves_decode_its_floor() -> None:
    overloaded = TtftCurve(20, 0.05, load=120)
    assert raise_prefill(Partition(100, 100), 1.0, overloaded, max_steps=100) == Partition(100, 10)
    assert raise_prefill(Partition(100, 10), 1.0, overloaded) == Partition(100, 10)


@given(
    start=partitions,
    ttft=ttft_curves,
    tpot=tpot_curves,
    slo=st.builds(Slo, st.floats(0.1, 5), st.floats(0.01, 1)),
)
def test_it_settles_where_both_targets_are_met_if_there_is_such_a_partition(
    start: Partition, ttft: TtftCurve, tpot: TpotCurve, slo: Slo
) -> None:
    feasible = feasible_shares(ttft, tpot, slo)
    # A step changes the share by 4 at most; the floors leave 9.1 to 90.9 percent.
    assume(feasible is not None and min(feasible[1], 90) - max(feasible[0], 10) > 4.1)
    assert feasible is not None
    now = start
    for _ in range(40):
        new = adjust(
            now,
            ttft_s=ttft.seconds(now.prefill_share),
            tpot_s=tpot.seconds(now.decode_share),
            slo=slo,
            estimator=Estimator(ttft, tpot),
            settings=Settings(),
        ).partition
        if new == now:
            break
        now = new
    assert feasible[0] - 1e-6 <= now.prefill_share <= feasible[1] + 1e-6


# The curves.


@given(curve=ttft_curves, share=st.floats(1, 100), more=st.floats(0, 50))
def test_more_sms_are_never_predicted_to_be_slower(curve: TtftCurve, share: float, more: float) -> None:
    assert curve.seconds(share) >= curve.seconds(share + more) >= curve.b
    assert TPOT.seconds(share) >= TPOT.seconds(share + more)


def test_at_the_load_and_below_it_the_wait_has_no_end() -> None:
    assert TTFT.seconds(30) == TTFT.seconds(10) == math.inf
    assert TPOT.seconds(0) == math.inf
    # No partition helps against what does not depend on it.
    assert TTFT.least_share(0.05) == TPOT.least_share(0.01) == math.inf
    assert feasible_shares(TTFT, TPOT, Slo(0.05, 1.0)) is None


@given(curve=ttft_curves, tpot=tpot_curves, target_s=st.floats(0.1, 5))
def test_the_least_share_just_meets_the_target(curve: TtftCurve, tpot: TpotCurve, target_s: float) -> None:
    for one in (curve, tpot):
        least = one.least_share(target_s)
        if least < 1000:
            assert one.seconds(least) == pytest.approx(target_s, rel=1e-6)


@given(curve=ttft_curves, share=st.floats(5, 100), seconds=st.floats(0.01, 10), tpot=tpot_curves)
def test_a_curve_can_be_put_through_any_value(
    curve: TtftCurve, share: float, seconds: float, tpot: TpotCurve
) -> None:
    for one in (curve.through(share, seconds), tpot.through(share, seconds)):
        assert one.seconds(share) == pytest.approx(seconds, rel=1e-6)
        assert one.a > 0
        assert one.b >= 0


def test_the_queue_of_the_theory() -> None:
    # 2 requests a second of 0.1 s with all SMs: with half of them 1 / (5 - 2) s.
    assert queueing_curve(2.0, 0.1).seconds(50) == pytest.approx(1 / (1 / 0.2 - 2))


# Fits.

SHARES = (35.0, 42.0, 50.0, 60.0, 75.0)


@given(a=st.floats(1, 60), b=st.floats(0, 0.5), load=st.floats(0, 30))
def test_the_fit_finds_the_curve_that_made_the_samples(a: float, b: float, load: float) -> None:
    truth = TtftCurve(a, b, load)
    found = fit_ttft([(share, truth.seconds(share)) for share in SHARES])
    assert found is not None
    assert [found.seconds(share) for share in (*SHARES, 90.0)] == pytest.approx(
        [truth.seconds(share) for share in (*SHARES, 90.0)], rel=1e-3
    )


@given(a=st.floats(1, 60), b=st.floats(0, 0.5))
def test_two_shares_are_enough_for_decode(a: float, b: float) -> None:
    found = fit_tpot([(30.0, a / 30 + b), (60.0, a / 60 + b)])
    assert found is not None
    assert (found.a, found.b) == pytest.approx((a, b), abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from(SHARES), st.floats(0.01, 10)), min_size=1, max_size=20))
def test_a_fit_is_a_possible_curve_or_none(samples: list[tuple[float, float]]) -> None:
    ttft, tpot = fit_ttft(samples), fit_tpot(samples)
    if ttft is not None:
        assert ttft.a > 0
        assert ttft.b >= 0
        assert 0 <= ttft.load < min(share for share, _ in samples)
    if tpot is not None:
        assert tpot.a > 0
        assert tpot.b >= 0


def test_too_few_shares_and_latencies_that_grow_with_the_share_give_no_fit() -> None:
    assert fit_ttft([(50.0, 1.0)] * 9) is None
    assert fit_ttft([(50.0, 1.0), (60.0, 0.9)]) is None
    assert fit_tpot([(50.0, 1.0)] * 9) is None
    assert fit_ttft([(40.0, 1.0), (50.0, 2.0), (60.0, 3.0)]) is None


def test_one_partition_moves_the_load_and_nothing_else() -> None:
    estimator = Estimator(TTFT, TPOT)
    for _ in range(20):
        estimator.observe(Partition(50, 50), 2.05, 0.06)
    assert (estimator.ttft.a, estimator.ttft.b, estimator.ttft.load) == pytest.approx((20, 0.05, 40))
    assert (estimator.tpot.a, estimator.tpot.b) == pytest.approx((2, 0.02))


def test_what_is_older_than_the_window_is_forgotten() -> None:
    rng, estimator = random.Random(1), Estimator(TTFT, TPOT, memory=12)
    for truth in (TtftCurve(20, 0.05, 10), TtftCurve(20, 0.05, 33)):
        for _ in range(12):
            one = Partition(rng.choice([60, 75, 90, 100]), rng.choice([80, 100]))
            estimator.observe(one, truth.seconds(one.prefill_share), None)
    assert estimator.ttft.load == pytest.approx(33, abs=0.05)
    assert estimator.tpot == TPOT


# What is observed.


def test_a_queue_that_grows_is_seen_before_it_finishes() -> None:
    assert observed_ttft_s([], [], 90) is None
    assert observed_ttft_s([0.1, 0.2], [], 100) == 0.2
    assert observed_ttft_s([0.1, 0.2], [5.0], 100) == 5.0
    assert observed_ttft_s([], [5.0, 1.0], 100) == 5.0


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=20),
    st.lists(st.floats(0, 10), max_size=20),
    st.floats(0, 100),
)
def test_ages_never_lower_what_is_observed(
    finished_s: list[float], ages_s: list[float], percent: float
) -> None:
    with_ages = observed_ttft_s(finished_s, ages_s, percent)
    without = observed_ttft_s(finished_s, [], percent)
    assert with_ages is not None
    assert without is not None
    assert with_ages >= without
