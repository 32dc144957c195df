"""DeviceForward on a CPU: padded batches and staged inputs compute what the model's own forward pass does."""

import pytest
import torch

from tests.support.device_engine import ENGINE, PROMPTS, TINY, DeviceEngine, greedy, random_weights
from workers.api import NgramDrafts, SamplingParams
from workers.model.llama import Llama


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(TINY, random_weights(TINY))


@pytest.fixture(scope="module")
def expected(model: Llama) -> list[list[int]]:
    return DeviceEngine(model, buckets=None).serve(PROMPTS, greedy())


def test_the_model_does_not_repeat_itself(expected: list[list[int]]) -> None:
    assert sum(len(set(tokens)) > 8 for tokens in expected) >= 8


@pytest.mark.parametrize("buckets", [(), (1, 2, 4, 8), (8,)])
def test_tokens_are_those_of_the_models_own_forward_pass(
    model: Llama, expected: list[list[int]], buckets: tuple[int, ...]
) -> None:
    made = DeviceEngine(model, buckets=buckets)
    assert made.serve(PROMPTS, greedy()) == expected
    assert made.forward is not None
    assert (made.forward.num_replayed > 0) == bool(buckets)
    assert made.forward.num_eager > 0


def test_mixed_steps_compute_the_same(model: Llama, expected: list[list[int]]) -> None:
    made = DeviceEngine(model, buckets=(1, 2, 4, 8))
    assert made.serve(PROMPTS, greedy(), steps_between=3) == expected


def test_more_sequences_than_any_bucket_has_run_eagerly(model: Llama, expected: list[list[int]]) -> None:
    made = DeviceEngine(model, buckets=(2,))
    assert made.serve(PROMPTS, greedy()) == expected


def test_drafts_are_verified(model: Llama, expected: list[list[int]]) -> None:
    made = DeviceEngine(model, buckets=(1, 2, 4, 8))
    found = made.serve(PROMPTS, lambda i: SamplingParams(24 - i % 5, decoding=NgramDrafts(4)))
    assert found == expected


def test_rows_that_score_a_prompt_come_after_those_that_are_sampled(model: Llama) -> None:
    def sampling(i: int) -> SamplingParams:
        return SamplingParams(4, num_prompt_logprobs=1 if i % 2 else None)

    wanted = DeviceEngine(model, buckets=None).serve(PROMPTS, sampling)
    assert DeviceEngine(model, buckets=(1, 2, 4, 8)).serve(PROMPTS, sampling) == wanted


def test_slots_outside_the_cache_are_refused(model: Llama) -> None:
    made = DeviceEngine(model, config=ENGINE, num_blocks=64)
    made.forward._num_slots = 8
    with pytest.raises(ValueError, match="not all in the KV cache"):
        made.serve(PROMPTS[:2], greedy())


def test_padding_writes_nothing(model: Llama) -> None:
    made = DeviceEngine(model, buckets=(8,))
    made.serve(PROMPTS[:1], greedy(8))
    used = ~torch.isnan(made.kv_cache[0, 0]).all(dim=(-1, -2))
    assert int(used.sum()) == len(PROMPTS[0]) + 8 - 1
