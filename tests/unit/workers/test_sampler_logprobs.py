"""Logprobs, ranks and the likeliest tokens: what the model gave, before any option."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.api import SamplingParams, TokenLogprobs
from workers.engine.sampler import SampleRow, sample, score_prompt
from workers.engine.sampling.order import most_likely

INF = float("inf")


def expected(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    """By sorting everything."""
    logprobs = torch.log_softmax(logits.double(), dim=-1).tolist()
    order = sorted(range(len(logprobs)), key=lambda i: (-float(logits[i]), i))
    top = tuple((i, logprobs[i]) for i in order[:num_top])
    return TokenLogprobs(token, logprobs[token], order.index(token) + 1, top)


def assert_close(found: TokenLogprobs, wanted: TokenLogprobs) -> None:
    assert (found.token_id, found.rank) == (wanted.token_id, wanted.rank)
    assert found.logprob == pytest.approx(wanted.logprob, abs=1e-10)
    assert [token for token, _ in found.top] == [token for token, _ in wanted.top]
    assert [p for _, p in found.top] == pytest.approx([p for _, p in wanted.top], abs=1e-10)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 21, 640, 2048]),
    st.sampled_from([0, 1, 5, 20]),
    st.sampled_from([0.1, 4.0, 60.0]),
    st.booleans(),
)
def test_a_prompt_is_scored_as_by_sorting_everything(
    seed: int, vocab: int, num_top: int, spread: float, has_ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(19, vocab, generator=generator) * spread
    if has_ties:
        logits = logits.round()
    tokens = torch.randint(0, vocab, (19,), generator=generator).tolist()
    before = logits.clone()
    found = score_prompt(logits, tokens, num_top)
    assert torch.equal(logits, before)
    for row, token, one in zip(logits, tokens, found, strict=True):
        assert_close(one, expected(row, token, num_top))


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    assert score_prompt(torch.empty(0, 50), [], 5) == []


def test_equal_tokens_rank_by_their_ids() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]] * 4)
    found = score_prompt(logits, [0, 1, 2, 3], 2)
    assert [one.rank for one in found] == [4, 1, 2, 3]
    assert [token for token, _ in found[0].top] == [1, 2]


def test_logprobs_are_of_the_model_and_not_of_the_options() -> None:
    logits = torch.randn(4, 640, generator=torch.Generator().manual_seed(4)) * 3
    sampling = SamplingParams(
        8,
        0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.5,
        logit_bias=((600, 90.0),),
        num_logprobs=4,
    )
    rows = [
        SampleRow(sampling, 2, [5, 6], 1),
        SampleRow(SamplingParams(8), 2),
        SampleRow(SamplingParams(8, num_logprobs=0), 2),
        SampleRow(SamplingParams(8, 1.0, num_logprobs=1), 2),
    ]

    def rule_out(changed: torch.Tensor) -> None:
        changed[2, 300:] = -INF

    result = sample(logits.clone(), rows, rule_out)
    assert result.token_ids[0] == 600
    assert set(result.logprobs) == {0, 2, 3}
    for i, one in result.logprobs.items():
        num_top = rows[i].sampling.num_logprobs or 0
        assert_close(one, expected(logits[i], result.token_ids[i], num_top))
    assert result.logprobs[2].top == ()


def test_logprobs_stay_exact_for_large_logits() -> None:
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    [found] = score_prompt(logits, [2], 1)
    assert found.logprob == pytest.approx(-2000.0 - math.log1p(math.exp(-1.0)), abs=1e-9)
    assert found.top[0][1] == pytest.approx(-math.log1p(math.exp(-1.0)), abs=1e-12)


def test_what_the_model_itself_rules_out_is_not_among_the_likeliest() -> None:
    [found] = score_prompt(torch.tensor([[-INF, 1.0, -INF, -INF]]), [1], 3)
    assert found == TokenLogprobs(1, 0.0, 1, ((1, 0.0),))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(300, 256), (8192, 256), (8192, 3), (4128, 1000), (257, 256)]),
    st.sampled_from([0.3, 1.0, 50.0]),
    st.booleans(),
)
def test_the_likeliest_tokens_are_the_first_of_a_stable_sort(
    seed: int, sizes: tuple[int, int], spread: float, has_ties: bool
) -> None:
    vocab, num = sizes
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if has_ties:
        logits = logits.round()
    logits[2] = 1.5
    logits[3, 7:] = -INF
    found = most_likely(logits, num)
    values, token_ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    is_possible = values[:, :num] > -INF
    assert torch.equal(found.values, values[:, :num])
    assert torch.equal(found.token_ids[is_possible], token_ids[:, :num][is_possible])
