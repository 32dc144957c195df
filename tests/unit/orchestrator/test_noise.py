"""Noise of simulated steps: the numbers that `random` has."""

import random
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sim.noise import noise_factors


@given(st.integers(0, 2**32), st.floats(0.001, 2.0))
def test_factors_are_those_of_lognormvariate(seed: int, deviation: float) -> None:
    rng = random.Random(seed)
    expected = [rng.lognormvariate(0.0, deviation) for _ in range(50)]
    assert list(islice(noise_factors(random.Random(seed), deviation), 50)) == expected


def test_without_a_deviation_nothing_varies_and_nothing_is_drawn() -> None:
    rng = random.Random(1)
    before = rng.getstate()
    assert list(islice(noise_factors(rng, 0.0), 3)) == [1.0, 1.0, 1.0]
    assert rng.getstate() == before
