"""Capacity by bisection."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sim.capacity import MAX_SEEDS, NEAR, capacity_rps, estimate


@given(st.floats(1.0, 90.0), st.none() | st.floats(1.0, 90.0))
def test_it_is_found_within_the_last_step_wherever_it_was_expected(
    truth: float, expected: float | None
) -> None:
    near = None if expected is None else (expected / NEAR, expected * NEAR)
    found = capacity_rps(lambda rate: rate <= truth, between=(1.0, 100.0), num_steps=8, near=near)
    # Half of the last interval of the wider search, in logarithms.
    assert abs(math.log(found / truth)) <= max(math.log(100.0) / 2**9, math.log(NEAR) / 2**4) + 1e-9


def test_what_bears_no_rate_has_none() -> None:
    assert capacity_rps(lambda _rate: False, between=(1.0, 100.0), num_steps=8, near=(5.0, 6.0)) == 0.0


def test_the_interval_is_that_of_student() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert estimate([4.0] * MAX_SEEDS).half == 0.0
