"""The specification of the draw on a GPU, against the engine's sampler."""

import numpy as np
import pytest
import torch

from phasewise_kernels.sample.op import sample
from tests.support.triton_checks.sampling import (
    OPTIONS,
    arguments,
    by_engine,
    check_the_numbers_are_those_of_the_engine,
    logits_of,
)


@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "ties", "few"])
@pytest.mark.parametrize("vocab_size", [1, 50, 5000])
def test_it_draws_what_the_engine_draws(kind: str, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = logits_of(kind, 3 * len(OPTIONS), vocab_size, torch.float32, rng)
    given_arguments = arguments(list(OPTIONS) * 3, "cpu", rng)
    assert sample(logits, **given_arguments).tolist() == by_engine(logits, given_arguments)


def test_its_numbers_are_those_of_the_engine() -> None:
    check_the_numbers_are_those_of_the_engine("cpu")
