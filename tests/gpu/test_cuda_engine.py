"""The engine on a GPU: what it computes is what a CPU does, however its steps are made up."""

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.support.device_engine import (
    ENGINE,
    PROMPTS,
    TINY,
    DeviceEngine,
    first_logits,
    greedy,
    random_weights,
)
from workers.api import (
    CautiousDecoding,
    NgramDrafts,
    SamplingParams,
    SuperposedDecoding,
)
from workers.model.llama import Llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BUCKETS = (1, 2, 4, 8)
#: Of logits against those of a CPU in fp32, relative to the norm of the latter. The random weights are such that a
#: difference in the first layer grows tenfold until the last.
FP32_ERROR, FP16_ERROR, BF16_ERROR = 1e-5, 0.01, 0.08


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@cache
def on_cpu() -> DeviceEngine:
    return DeviceEngine(Llama(TINY, random_weights(TINY)), buckets=None)


@cache
def expected() -> list[list[int]]:
    return on_cpu().serve(PROMPTS, greedy())


def on_gpu(buckets: tuple[int, ...] = BUCKETS, dtype: torch.dtype = torch.float32, **options) -> DeviceEngine:
    model = Llama(TINY, random_weights(TINY, device="cuda", dtype=dtype))
    return DeviceEngine(model, buckets=buckets, **{"mixed_buckets": (16, 32, 64)} | options)


@pytest.mark.parametrize("buckets", [(), BUCKETS, (8,)])
def test_greedy_tokens_are_those_of_a_cpu(buckets: tuple[int, ...]) -> None:
    made = on_gpu(buckets)
    assert made.serve(PROMPTS, greedy()) == expected()
    assert (made.forward.num_replayed > 0) == bool(buckets)
    assert (made.forward.num_eager > 0) == (not buckets)


def test_graphs_that_are_garbage_do_not_end_a_capture() -> None:
    older = on_gpu()
    older.itself = older  # a cycle, as any object may be part of one
    del older
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        made = on_gpu()
    finally:
        gc.set_threshold(*thresholds)
    assert made.serve(PROMPTS, greedy()) == expected()


def test_steps_with_prompts_that_are_not_captured_compute_the_same() -> None:
    made = on_gpu(mixed_buckets=())
    assert made.serve(PROMPTS, greedy(), steps_between=1) == expected()
    assert made.forward.num_eager > 0


@pytest.mark.parametrize("steps_between", [0, 1, 3])
def test_overlapped_steps_compute_the_same(steps_between: int) -> None:
    made = on_gpu(is_overlapping=True)
    assert made.serve(PROMPTS, greedy(), steps_between=steps_between) == expected()


def test_preempted_sequences_compute_the_same_while_steps_overlap() -> None:
    config = replace(ENGINE, growth_reserve=0.0, is_prefix_cache_on=True)
    made = on_gpu(num_blocks=14, config=config, is_overlapping=True)
    assert made.serve(PROMPTS, greedy()) == expected()
    assert made.engine.num_preemptions > 0


def test_sampled_tokens_are_those_of_a_cpu_while_steps_overlap() -> None:
    def sampling(i: int) -> SamplingParams:
        if i % 4 == 3:
            return SamplingParams(12, repetition_penalty=1.5)
        return SamplingParams(
            9 + i, temperature=0.8, top_k=(0, 20)[i % 2], top_p=(1.0, 0.9)[i % 3 == 0], seed=i
        )

    wanted = DeviceEngine(on_cpu().runner._model, buckets=None).serve(PROMPTS, sampling)
    assert on_gpu(is_overlapping=True).serve(PROMPTS, sampling, steps_between=2) == wanted


def test_mixed_steps_compute_the_same() -> None:
    assert on_gpu().serve(PROMPTS, greedy(), steps_between=3) == expected()


def test_preempted_sequences_compute_the_same() -> None:
    made = on_gpu(num_blocks=14, config=replace(ENGINE, growth_reserve=0.0))
    assert made.serve(PROMPTS, greedy()) == expected()
    assert made.engine.num_preemptions > 0


def test_prompts_from_the_prefix_cache_compute_the_same() -> None:
    made = on_gpu(config=replace(ENGINE, is_prefix_cache_on=True))
    assert made.serve(PROMPTS, greedy()) == expected()
    before = made.engine.reuse_counts().num_cached_tokens
    assert made.serve(PROMPTS, greedy()) == expected()
    assert made.engine.reuse_counts().num_cached_tokens >= before + 200


@pytest.mark.parametrize("decoding", [NgramDrafts(4), CautiousDecoding(), SuperposedDecoding(2)])
def test_decoding_methods_do_what_they_do_on_a_cpu(decoding: object) -> None:
    def sampling(i: int) -> SamplingParams:
        temperature = 0.7 if isinstance(decoding, CautiousDecoding) else 0.0
        return SamplingParams(12, decoding=decoding, temperature=temperature, seed=i)

    wanted = DeviceEngine(on_cpu().runner._model, buckets=None).serve(PROMPTS[:5], sampling)
    assert on_gpu().serve(PROMPTS[:5], sampling) == wanted


def test_sampled_tokens_are_those_of_a_cpu() -> None:
    def sampling(i: int) -> SamplingParams:
        # With these seeds no draw is so near to the border between two tokens that rounding could move it across.
        return SamplingParams(
            20, temperature=0.8, top_k=(0, 20)[i % 2], top_p=(1.0, 0.9)[i % 3 == 0], seed=i + 10
        )

    wanted = DeviceEngine(on_cpu().runner._model, buckets=None).serve(PROMPTS, sampling)
    assert on_gpu().serve(PROMPTS, sampling) == wanted


def test_penalties_biases_and_logprobs_are_those_of_a_cpu() -> None:
    def sampling(i: int) -> SamplingParams:
        return SamplingParams(
            16,
            repetition_penalty=1.3,
            frequency_penalty=0.2,
            logit_bias=((5, 2.0),),
            num_logprobs=2,
            num_prompt_logprobs=1 if i % 2 else None,
        )

    wanted = DeviceEngine(on_cpu().runner._model, buckets=None).serve(PROMPTS, sampling)
    assert on_gpu().serve(PROMPTS, sampling) == wanted


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float32, FP32_ERROR), (torch.float16, FP16_ERROR), (torch.bfloat16, BF16_ERROR)],
)
def test_logits_are_near_those_of_a_cpu(dtype: torch.dtype, most: float) -> None:
    wanted = first_logits(DeviceEngine(on_cpu().runner._model, buckets=None))
    given = first_logits(on_gpu((), dtype))
    error = float((given - wanted).norm() / wanted.norm())
    print(f"logits in {dtype}: relative error {error:.2e}")
    assert error < most


def test_the_product_of_a_row() -> None:
    from tests.support.triton_checks import linear_of_row

    linear_of_row.check_outputs("cuda")
