"""The forward pass of a GPU on several ranks, here threads of a CPU: padded steps, and tokens that only rank 0 has."""

from dataclasses import replace

import pytest

from tests.support.device_engine import PROMPTS, TINY, DeviceEngine, greedy, random_weights
from tests.support.rank_threads import thread_engine
from workers.api import SamplingParams
from workers.model.llama import Llama

#: Of an odd size, so that the last rank's part of the logits is padded.
MODEL = replace(TINY, vocab_size=511)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return DeviceEngine(Llama(MODEL, random_weights(MODEL)), buckets=None).serve(PROMPTS, greedy())


@pytest.mark.parametrize(
    ("degree", "buckets", "is_overlapping"),
    [(2, (), False), (2, (), True), (2, (1, 2, 4, 8), True), (4, (1, 2, 4, 8), False)],
)
def test_tokens_are_those_of_one_rank(
    expected: list[list[int]], degree: int, buckets: tuple[int, ...], is_overlapping: bool
) -> None:
    options = {"buckets": buckets, "is_overlapping": is_overlapping}
    with thread_engine(MODEL, degree, **options) as (made, told):  # type: ignore[arg-type]
        assert made.serve(PROMPTS, greedy()) == expected
        assert made.serve(PROMPTS, greedy(), steps_between=3) == expected
    assert (told.num_shared > 0) == is_overlapping
    assert made.forward is not None
    assert (made.forward.num_replayed > 0) == bool(buckets)


def test_drawn_tokens_are_those_of_one_rank() -> None:
    def sampling(i: int) -> SamplingParams:
        return SamplingParams(20 - i, temperature=0.8, top_p=0.9, seed=i)

    alone = DeviceEngine(Llama(MODEL, random_weights(MODEL)), buckets=(4, 8), is_overlapping=True)
    with thread_engine(MODEL, 2, buckets=(4, 8), is_overlapping=True) as (made, _):
        assert made.serve(PROMPTS, sampling) == alone.serve(PROMPTS, sampling)
