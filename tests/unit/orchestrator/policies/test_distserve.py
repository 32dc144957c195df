"""DistServe: its queueing formulas and fits by their published numbers, and placements against a plain search."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.policies.distserve import (
    OPT_13B_DECODE,
    OPT_13B_PREFILL,
    HighAffinityPlacement,
    Parallelism,
    SegmentPair,
    pipelined_ttft_s,
    place_with_high_affinity,
    place_with_low_affinity,
    tensor_ttft_s,
    ttft_s,
)

# Queueing.


def test_golden_mean_ttft_of_the_three_layouts() -> None:
    found = ttft_s(0.1, 5), pipelined_ttft_s(0.1, 5), tensor_ttft_s(0.1, 5, 1.5)
    assert found == pytest.approx((0.1500, 0.1083, 0.0833), abs=5e-5)


def test_a_tensor_wins_at_a_low_rate_and_a_pipeline_at_a_high_one() -> None:
    assert tensor_ttft_s(0.1, 1, 1.5) < pipelined_ttft_s(0.1, 1)
    assert tensor_ttft_s(0.1, 14.5, 1.5) > pipelined_ttft_s(0.1, 14.5)


def test_a_queue_has_no_end_from_the_rate_on_that_a_layout_can_serve() -> None:
    assert math.isfinite(ttft_s(0.1, 9.9))
    assert ttft_s(0.1, 10) == pipelined_ttft_s(0.1, 20) == tensor_ttft_s(0.1, 15, 1.5) == math.inf
    assert ttft_s(0.1, 0) == pipelined_ttft_s(0.1, 0) == 0.1


@given(
    prefill_s=st.floats(0.001, 2), rate=st.floats(0, 100), more=st.floats(0, 10), speedup=st.floats(1.01, 2)
)
def test_no_layout_is_faster_at_a_higher_rate(
    prefill_s: float, rate: float, more: float, speedup: float
) -> None:
    assert ttft_s(prefill_s, rate) <= ttft_s(prefill_s, rate + more)
    assert pipelined_ttft_s(prefill_s, rate) <= pipelined_ttft_s(prefill_s, rate + more)
    assert tensor_ttft_s(prefill_s, rate, speedup) <= tensor_ttft_s(prefill_s, rate + more, speedup)
    # Two devices are never slower than one.
    assert max(pipelined_ttft_s(prefill_s, rate), tensor_ttft_s(prefill_s, rate, speedup)) <= ttft_s(
        prefill_s, rate
    ) * (1 + 1e-9)


# Fits.


def test_golden_prefill() -> None:
    fit = OPT_13B_PREFILL
    found = fit.seconds([512]), fit.seconds([512], pipeline=2), fit.seconds([256, 256])
    assert [1000 * one for one in found] == pytest.approx([73.14, 38.07, 72.21], abs=5e-3)


def test_golden_decode_as_printed() -> None:
    found = [OPT_13B_DECODE.printed_s(num, num * 512) for num in (32, 128, 94, 95)]
    # At 95 sequences a step is said to be faster than at 94.
    assert [1000 * one for one in found] == pytest.approx([31.43, 65.40, 53.73, 50.39], abs=6e-3)


@given(num=st.integers(1, 300), context=st.integers(0, 300_000), pipeline=st.integers(1, 8))
def test_more_sequences_and_context_never_take_less_time(num: int, context: int, pipeline: int) -> None:
    fits = OPT_13B_DECODE
    here = fits.seconds(num, context, pipeline=pipeline)
    assert here <= fits.seconds(num + 1, context, pipeline=pipeline)
    assert here <= fits.seconds(num, context + 512, pipeline=pipeline)
    assert here >= fits.printed_s(num, context, pipeline=pipeline)


# Placement.


def goodput(one: Parallelism) -> float:
    """Some function that prefers tensor 2 with pipeline 3."""
    return one.num_devices * 10.0 / (1 + abs(one.tensor - 2) + abs(one.pipeline - 3))


def test_each_phase_has_its_best_parallelism_and_as_many_as_the_rate_needs() -> None:
    found = place_with_high_affinity(
        100.0,
        max_nodes=2,
        node_devices=4,
        fits=lambda one: one.num_devices > 1,
        prefill_goodput_rps=goodput,
        decode_goodput_rps=lambda one: 7.0 if one == Parallelism(1, 2) else 0.1,
    )
    assert isinstance(found, HighAffinityPlacement)
    assert (found.prefill.parallelism, found.prefill.goodput_rps, found.prefill.num) == (
        Parallelism(2, 3),
        60.0,
        2,
    )
    assert (found.decode.parallelism, found.decode.num) == (Parallelism(1, 2), 15)
    assert found.num_devices == 2 * 6 + 15 * 2


def test_only_what_fits_is_simulated_and_all_that_does() -> None:
    asked: list[Parallelism] = []

    def record(one: Parallelism) -> float:
        asked.append(one)
        return 1.0

    place_with_high_affinity(
        1.0,
        max_nodes=2,
        node_devices=4,
        fits=lambda one: one.num_devices >= 2,
        prefill_goodput_rps=record,
        decode_goodput_rps=lambda one: 1.0,
    )
    # Pipelines of up to 8, 4, 2 and 2 stages, without one device alone.
    assert len(asked) == len(set(asked)) == 8 + 4 + 2 + 2 - 1
    assert all(2 <= one.num_devices <= 8 for one in asked)


def test_parts_of_one_stage_share_a_node() -> None:
    asked: list[SegmentPair] = []

    def record(one: SegmentPair) -> float:
        asked.append(one)
        return 1.0 + one.pipeline * (one.prefill_tensor == 2)

    found = place_with_low_affinity(
        10.0, max_nodes=2, node_devices=4, fits=lambda one: True, goodput_rps=record
    )
    assert all(one.prefill_tensor + one.decode_tensor <= 4 for one in asked)
    # Two parts of one device each: two stages in a node, four in two nodes. Of three or four devices one stage.
    assert max(one.pipeline for one in asked) == 4
    assert len(asked) == len(set(asked)) == 4 + 5 * 2
    assert found is not None
    assert found.num == math.ceil(10.0 / found.goodput_rps)
    assert found.goodput_rps / found.pair.num_devices == max(
        (1.0 + one.pipeline * (one.prefill_tensor == 2)) / one.num_devices for one in asked
    )
    assert found.num_devices == found.num * found.pair.num_devices


def test_nothing_that_fits_or_serves_is_no_placement() -> None:
    def place(*, is_fitting: bool, rps: float) -> tuple[object, object]:
        return (
            place_with_high_affinity(
                1.0,
                max_nodes=1,
                node_devices=2,
                fits=lambda one: is_fitting,
                prefill_goodput_rps=lambda one: 1.0,
                decode_goodput_rps=lambda one: rps,
            ),
            place_with_low_affinity(
                1.0, max_nodes=1, node_devices=2, fits=lambda one: is_fitting, goodput_rps=lambda one: rps
            ),
        )

    assert place(is_fitting=False, rps=1.0) == (None, None)
    assert place(is_fitting=True, rps=0.0) == (None, None)
    assert None not in place(is_fitting=True, rps=1.0)


@given(
    rate=st.floats(0.1, 1000),
    table=st.dictionaries(st.tuples(st.integers(1, 4), st.integers(1, 8)), st.floats(0.1, 50), min_size=1),
)
def test_the_replicas_are_just_enough_and_nothing_has_more_goodput_per_device(
    rate: float, table: dict[tuple[int, int], float]
) -> None:
    def rps(one: Parallelism) -> float:
        return table.get((one.tensor, one.pipeline), 0.0)

    found = place_with_high_affinity(
        rate,
        max_nodes=2,
        node_devices=4,
        fits=lambda one: True,
        prefill_goodput_rps=rps,
        decode_goodput_rps=rps,
    )
    possible = [
        value / (tensor * pipeline) for (tensor, pipeline), value in table.items() if tensor * pipeline <= 8
    ]
    if not possible:
        assert found is None
        return
    assert found is not None
    one = found.prefill
    assert one == found.decode
    assert one.goodput_rps / one.parallelism.num_devices == max(possible)
    assert one.num * one.goodput_rps >= rate * (1 - 1e-9)
    assert (one.num - 1) * one.goodput_rps < rate
