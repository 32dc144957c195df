"""DeviceForward on a CPU: padded batches and staged inputs compute what the model's own forward pass does."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.device_engine import ENGINE, PROMPTS, TINY, DeviceEngine, greedy, random_weights
from tests.support.tiny_encoders import ENCODERS
from workers.api import NgramDrafts, SamplingParams
from workers.device.forward import no_collection
from workers.device.step_graph import MAX_PROMPTS
from workers.model.forward_batch import Embeds, ForwardBatch
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


@pytest.mark.parametrize("steps_between", [0, 3])
def test_captured_mixed_steps_compute_the_same(
    model: Llama, expected: list[list[int]], steps_between: int
) -> None:
    made = DeviceEngine(model, buckets=(1, 2, 4, 8), mixed_buckets=(16, 32, 64))
    assert made.serve(PROMPTS, greedy(), steps_between=steps_between) == expected
    assert made.forward is not None
    assert made.forward.num_eager == 0


def test_what_no_graph_computes_runs_eagerly_beside_those_that_do(
    model: Llama, expected: list[list[int]]
) -> None:
    def sampling(i: int) -> SamplingParams:
        return SamplingParams(24 - i % 5, num_prompt_logprobs=1 if i % 3 == 0 else None)

    made = DeviceEngine(model, buckets=(1, 2, 4, 8), mixed_buckets=(32,))
    assert made.serve(PROMPTS, sampling, steps_between=1) == expected
    assert made.forward is not None
    assert made.forward.num_eager > 0
    assert made.forward.num_replayed > 0


def test_layers_that_are_told_of_one_by_one_are_not_replayed(model: Llama) -> None:
    batch = ForwardBatch(
        token_ids=torch.arange(5),
        positions=torch.arange(5),
        slots=torch.arange(5),
        block_tables=np.zeros((1, 1), np.int32),
        query_lens=np.array([5]),
        context_lens=np.array([5]),
        logit_rows=torch.tensor([4]),
    )
    made = DeviceEngine(model, buckets=(1, 8), mixed_buckets=(16,))
    assert made.forward is not None
    told: list[tuple[int, int]] = []
    expected = made.forward(batch).clone()
    assert made.forward.num_replayed == 1
    made.forward(batch, layer_group_size=TINY.num_layers)
    assert made.forward.num_replayed == 2
    found = made.forward(batch, layer_group_size=1, on_layers=lambda lo, hi: told.append((lo, hi)))
    assert made.forward.num_eager == 1
    assert told == [(i, i + 1) for i in range(TINY.num_layers)]
    torch.testing.assert_close(found, expected)


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
    with pytest.raises(AssertionError, match="not all in the KV cache"):
        made.serve(PROMPTS[:2], greedy())


def test_padding_writes_nothing(model: Llama) -> None:
    made = DeviceEngine(model, buckets=(8,))
    made.serve(PROMPTS[:1], greedy(8))
    used = ~torch.isnan(made.kv_cache[0, 0]).all(dim=(-1, -2))
    assert int(used.sum()) == len(PROMPTS[0]) + 8 - 1


def test_warming_up_leaves_nothing_behind(model: Llama, expected: list[list[int]]) -> None:
    made = DeviceEngine(model, buckets=(1, 2, 4, 8))
    told: list[float] = []
    made.forward.warm_up(8, lambda _what, done: told.append(done))
    assert told == sorted(told)
    assert made.serve(PROMPTS, greedy()) == expected


OVERLAPPED = {"buckets": (1, 2, 4, 8), "mixed_buckets": (16, 32, 64), "is_overlapping": True}


@pytest.mark.parametrize("steps_between", [0, 1, 3])
def test_overlapped_steps_compute_the_same(
    model: Llama, expected: list[list[int]], steps_between: int
) -> None:
    made = DeviceEngine(model, **OVERLAPPED)
    assert made.serve(PROMPTS, greedy(), steps_between=steps_between) == expected


def test_sequences_that_end_by_a_stop_token_end_there(model: Llama, expected: list[list[int]]) -> None:
    def sampling(i: int) -> SamplingParams:
        return SamplingParams(
            24 - i % 5, stop_token_ids=frozenset(expected[i][3 * (i % 4) : 3 * (i % 4) + 1])
        )

    made = DeviceEngine(model, **OVERLAPPED)
    found = made.serve(PROMPTS, sampling)
    assert found == DeviceEngine(model, buckets=None).serve(PROMPTS, sampling)
    assert found[1] == expected[1][: len(found[1])]
    assert len(found[1]) < len(expected[1])
    assert made.engine.block_counts().free == 64


def test_a_preempted_sequence_computes_the_same_while_steps_overlap(
    model: Llama, expected: list[list[int]]
) -> None:
    config = replace(ENGINE, growth_reserve=0.0, is_prefix_cache_on=True)
    made = DeviceEngine(model, config=config, num_blocks=14, **OVERLAPPED)
    assert made.serve(PROMPTS, greedy()) == expected
    assert made.engine.num_preemptions > 0


def test_an_aborted_request_disturbs_nobody(model: Llama, expected: list[list[int]]) -> None:
    made = DeviceEngine(model, **OVERLAPPED)
    found = made.serve(PROMPTS, greedy(), aborted={4: 0, 6: 3, 9: 8})
    for i in range(len(PROMPTS)):
        if i in (0, 3, 8):
            assert found[i] == expected[i][: len(found[i])]
            assert len(found[i]) < len(expected[i])
        else:
            assert found[i] == expected[i]


def test_requests_that_need_the_host_go_beside_others(model: Llama) -> None:
    def sampling(i: int) -> SamplingParams:
        match i % 4:
            case 0:
                return SamplingParams(12, repetition_penalty=1.5)
            case 1:
                return SamplingParams(9 + i, temperature=0.8, top_k=20, top_p=0.9, seed=i)
            case 2:
                return SamplingParams(10, num_logprobs=1)
            case _:
                return SamplingParams(8 + i)

    wanted = DeviceEngine(model, buckets=None).serve(PROMPTS, sampling)
    assert DeviceEngine(model, **OVERLAPPED).serve(PROMPTS, sampling, steps_between=2) == wanted


@pytest.mark.parametrize(("num_prompts", "is_replayed"), [(MAX_PROMPTS, True), (MAX_PROMPTS + 1, False)])
def test_a_step_with_more_prompts_than_a_launch_has_tiles_for_is_not_replayed(
    model: Llama, num_prompts: int, is_replayed: bool
) -> None:
    num_tokens = 2 * num_prompts
    batch = ForwardBatch(
        token_ids=torch.arange(num_tokens) + 3,
        positions=torch.arange(2).repeat(num_prompts),
        slots=(16 * torch.arange(num_prompts)[:, None] + torch.arange(2)).flatten(),
        block_tables=np.arange(num_prompts, dtype=np.int32)[:, None],
        query_lens=np.full(num_prompts, 2),
        context_lens=np.full(num_prompts, 2),
        logit_rows=2 * torch.arange(num_prompts) + 1,
    )
    expected = DeviceEngine(model).forward(batch)  # type: ignore[misc]
    made = DeviceEngine(model, buckets=(1, 64), mixed_buckets=(128,))
    assert made.forward is not None
    torch.testing.assert_close(made.forward(batch), expected)
    assert (made.forward.num_replayed, made.forward.num_eager) == (int(is_replayed), int(not is_replayed))


def test_nothing_is_collected_while_steps_are_captured_and_the_rest_after() -> None:
    collected: list[int] = []

    class Kept:
        def __del__(self) -> None:
            collected.append(1)

    def cycle() -> None:
        one = Kept()
        one.itself = one

    cycle()
    with no_collection():
        assert collected == [1]
        cycle()
        assert not gc.isenabled()
    assert collected == [1]
    assert gc.isenabled()
    with pytest.raises(RuntimeError), no_collection():
        raise RuntimeError
    assert gc.isenabled()


@pytest.mark.parametrize("sections", [(), (10, 11, 11)], ids=["rope", "mrope"])
def test_captured_steps_with_pictures_compute_the_same(sections: tuple[int, ...]) -> None:
    config = replace(TINY, rope=replace(TINY.rope, mrope_section=sections), vision=ENCODERS["idefics3"])
    model = Llama(config, random_weights(config))
    made = DeviceEngine(model, buckets=(1, 2, 8), mixed_buckets=(16, 32))
    assert made.forward is not None
    theirs = torch.zeros_like(made.kv_cache)
    made.kv_cache.zero_()
    for batch in batches_with_pictures():
        expected = model.forward(batch, theirs)
        torch.testing.assert_close(made.forward(batch), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made.kv_cache, theirs, atol=1e-4, rtol=1e-4)
    assert made.forward.num_eager == 0


def batches_with_pictures() -> Iterator[ForwardBatch]:
    """A chunk of text, two with embeddings beside each other, a token that is an embedding, a decode, and text again."""
    yield chunks([(0, 12)], {})
    rows = {2: 0, 3: 1, 9: 2}
    yield chunks([(12, 7), (0, 5)], rows, moved=True)
    yield chunks([(19, 1), (5, 1)], {1: 0}, moved=True)
    yield chunks([(20, 1), (6, 1)], {}, moved=True)
    yield chunks([(21, 9)], {})


def chunks(
    sequences: Sequence[tuple[int, int]], embedded: Mapping[int, int], *, moved: bool = False
) -> ForwardBatch:
    """(tokens before, new tokens) of each. embedded: row -> which embedding. moved: positions are not places."""
    lens = np.array([new for _, new in sequences])
    places = np.concatenate([np.arange(before, before + new) for before, new in sequences])
    owners = np.repeat(np.arange(len(sequences)), lens)
    axes = np.stack([places, places + 2 * (places > 3), places + 5 * (places > 3)])
    values = torch.randn(
        len(embedded), TINY.hidden_size, generator=torch.Generator().manual_seed(len(places))
    )
    return ForwardBatch(
        token_ids=torch.from_numpy((7 * places + 3) % TINY.vocab_size),
        positions=torch.from_numpy(places),
        # Two blocks each.
        slots=torch.from_numpy(2 * owners * ENGINE.block_size + places),
        block_tables=np.array([[2 * i, 2 * i + 1] for i in range(len(sequences))], np.int32),
        query_lens=lens,
        context_lens=np.array([before + new for before, new in sequences]),
        logit_rows=torch.from_numpy(np.cumsum(lens) - 1),
        embeds=Embeds(torch.tensor(list(embedded)), values[list(embedded.values())]) if embedded else None,
        rope_positions=torch.from_numpy(axes) if moved else None,
    )
