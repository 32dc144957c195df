"""Every option of sampling at once: against a slow reference, against transformers, and row by row."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.api import CautiousDecoding, SamplingParams
from workers.engine.decoding.cautious import num_branches
from workers.engine.sampler import SampleResult, SampleRow, sample, uniform
from workers.engine.sampling.draw import NUM_CANDIDATES
from workers.engine.sequence import NO_TOKEN

INF = float("inf")
FEW, MANY = NUM_CANDIDATES
#: Vocabularies that fit among the first candidates, just do not, and are split into groups.
VOCABS = [7, FEW, FEW + 1, FEW * 4, MANY + 32, FEW * 32]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other take most of the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def warped(logits: torch.Tensor, row: SampleRow) -> tuple[list[int], list[float]]:
    """The tokens that are kept, likeliest first, and their probabilities, in plain words, for one row."""
    sampling = row.sampling
    values = [float(value) for value in logits]
    output = list(row.token_ids[row.num_prompt_tokens :])
    if len(output) < sampling.min_new_tokens:
        for token in sampling.stop_token_ids:
            values[token] = -INF
    for token, bias in sampling.logit_bias:
        values[token] = float(np.float32(values[token] + bias))
    for token in set(row.token_ids):
        factor = sampling.repetition_penalty if values[token] < 0 else 1 / sampling.repetition_penalty
        values[token] = float(np.float32(values[token] * factor))
    for token, count in Counter(output).items():
        less = sampling.presence_penalty + sampling.frequency_penalty * count
        values[token] = float(np.float32(values[token] - less))
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if sampling.temperature == 0:
        return order[:1], [1.0]
    weights = np.exp([(values[token] - values[order[0]]) / sampling.temperature for token in order])
    weights = weights[weights > 0]
    if sampling.top_k:
        weights = weights[: sampling.top_k]
    if sampling.top_p < 1:
        cumulative = np.cumsum(weights / weights.sum())
        weights = weights[: int((cumulative < sampling.top_p).sum()) + 1]
    weights = weights[weights >= sampling.min_p * weights[0]]
    return order[: len(weights)], [float(weight) for weight in weights / weights.sum()]


def drawn(order: list[int], probabilities: list[float], chance: float) -> tuple[int, float]:
    """The token at this place of the cumulative distribution, and its logprob."""
    place = int(np.searchsorted(np.cumsum(probabilities), chance, side="right"))
    place = min(place, len(order) - 1)
    return order[place], math.log(probabilities[place])


# Limits that no sum of a few equal probabilities hits: there, rounding would decide.
samplings = st.builds(
    SamplingParams,
    max_new_tokens=st.just(8),
    temperature=st.sampled_from([0.0, 1e-6, 0.31, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 40, FEW, FEW + 9, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.3183, 0.9071, 0.99913]),
    min_p=st.sampled_from([0.0, 0.0, 0.0517, 0.6131, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.6, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
    logit_bias=st.sampled_from([(), ((2, 5.0),), ((0, -INF), (5, -100.0)), ((6, 100.0), (1, -3.5))]),
    seed=st.integers(0, 2**64 - 1),
    min_new_tokens=st.sampled_from([0, 2, 7]),
    stop_token_ids=st.sampled_from([frozenset(), frozenset({0}), frozenset({3, 4})]),
    num_logprobs=st.sampled_from([None, None, 0, 3]),
)
rows_of_options = st.lists(
    st.builds(
        lambda sampling, tokens, num_prompt, stream: SampleRow(
            sampling,
            len(tokens),
            tokens,
            min(num_prompt, len(tokens)),
            stream=stream,
            wants_warped_logprob=True,
        ),
        samplings,
        st.lists(st.integers(0, 6), min_size=1, max_size=12),
        st.integers(1, 6),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


def logits_for(seed: int, num_rows: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def of_row(result: SampleResult, i: int) -> tuple[object, ...]:
    return (
        result.token_ids[i],
        result.logprobs.get(i),
        result.warped_logprobs.get(i),
        result.branches.get(i),
    )


@given(
    rows_of_options,
    st.integers(0, 2**32 - 1),
    st.sampled_from(VOCABS),
    st.sampled_from([0.5, 3.0, 12.0]),
    st.booleans(),
)
def test_all_options_together_are_what_the_reference_says(
    rows: list[SampleRow], seed: int, vocab: int, spread: float, has_ties: bool
) -> None:
    logits = logits_for(seed, len(rows), vocab, spread)
    if has_ties:
        logits = logits.round()
    result = sample(logits.clone(), rows)
    for i, row in enumerate(rows):
        chance = uniform(row.sampling.seed, row.position, row.stream)
        token, logprob = drawn(*warped(logits[i], row), chance)
        assert result.token_ids[i] == token
        assert result.warped_logprobs[i] == pytest.approx(logprob, abs=1e-9)


@given(rows_of_options, st.integers(0, 2**32 - 1), st.sampled_from(VOCABS), st.randoms())
def test_a_rows_result_does_not_depend_on_the_others_to_the_last_bit(
    rows: list[SampleRow], seed: int, vocab: int, random: "np.random.Generator"
) -> None:
    logits = logits_for(seed, len(rows), vocab)
    together = sample(logits.clone(), rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    mixed = sample(logits[order], [rows[i] for i in order])
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1].clone(), [rows[i]])
        assert of_row(mixed, place) == of_row(together, i) == of_row(alone, 0)


def test_more_rows_than_a_chunk_and_more_threads_change_no_bit() -> None:
    vocab = FEW * 32
    options: list[dict[str, float]] = [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 900}]
    rows = [
        SampleRow(
            SamplingParams(8, 1.3, seed=i, num_logprobs=2, **options[i % len(options)]),  # type: ignore[arg-type]
            i,
            wants_warped_logprob=True,
        )
        for i in range(45)
    ]
    logits = logits_for(5, len(rows), vocab)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = sample(logits.clone(), rows)
        torch.set_num_threads(1)
        alone = [sample(logits[i : i + 1].clone(), [row]) for i, row in enumerate(rows)]
    finally:
        torch.set_num_threads(num_threads)
    assert [of_row(together, i) for i in range(len(rows))] == [of_row(one, 0) for one in alone]


def by_transformers(row: SampleRow) -> LogitsProcessorList:
    """The same options, in the order in which `generate` applies them."""
    sampling = row.sampling
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_new_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                row.num_prompt_tokens, sampling.min_new_tokens, list(sampling.stop_token_ids)
            )
        )
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"top_k": 12},
        {"top_p": 0.83},
        {"min_p": 0.07},
        {"top_k": 30, "top_p": 0.83},
        {"top_k": 30, "top_p": 0.95, "min_p": 0.07},
        {"top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
        {"min_new_tokens": 9, "stop_token_ids": frozenset({1, 4}), "top_k": 300},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(temperature: float, options: dict[str, float]) -> None:
    vocab = FEW * 4
    sampling = SamplingParams(8, temperature, **options)  # type: ignore[arg-type]
    tokens = [3, 1, 3, 700, 12, 5, 1]
    rows = [SampleRow(sampling, i, tokens, 4, wants_warped_logprob=True) for i in range(200)]
    logits = logits_for(11, 1, vocab)
    ids = torch.tensor([tokens])
    processed = by_transformers(rows[0])(ids, logits.clone())  # type: ignore[arg-type]
    expected = torch.log_softmax(processed[0].double(), dim=-1)
    result = sample(logits.expand(len(rows), vocab).clone(), rows)
    for i, token in enumerate(result.token_ids):
        assert result.warped_logprobs[i] == pytest.approx(float(expected[token]), abs=2e-5)


def chi_square(counts: Counter[int], order: list[int], probabilities: list[float], total: int) -> float:
    assert set(counts) <= set(order)
    expected = dict(zip(order, probabilities, strict=True))
    return sum((counts[token] - total * p) ** 2 / (total * p) for token, p in expected.items())


def test_tokens_come_in_proportion_under_all_options() -> None:
    sampling = SamplingParams(
        8, 0.9, top_k=6, top_p=0.97, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.3, seed=77
    )
    tokens, total = [0, 1, 2, 2], 3000
    logits = torch.tensor([[2.0, 1.5, 1.2, 1.0, 0.5, 0.1, -0.4, -3.0]])
    rows = [SampleRow(sampling, i, tokens, 2) for i in range(total)]
    counts = Counter(sample(logits.expand(total, 8).clone(), rows).token_ids)
    order, probabilities = warped(logits[0], rows[0])
    assert len(order) == 6
    # 99.9 % of samples of a chi-square with 5 degrees of freedom are below.
    assert chi_square(counts, order, probabilities, total) < 20.5


def test_streams_of_one_position_are_independent() -> None:
    total = 3000
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(total, 3)
    streams = [
        sample(logits.clone(), [SampleRow(SamplingParams(8, 1.0), i, stream=k) for i in range(total)])
        for k in (0, 1)
    ]
    pairs = Counter(a * 3 + b for a, b in zip(streams[0].token_ids, streams[1].token_ids, strict=True))
    each = [0.5, 0.3, 0.2]
    # 99.9 % with 8 degrees of freedom.
    assert chi_square(pairs, list(range(9)), [a * b for a in each for b in each], total) < 26.1


def one(logits: list[float], tokens: list[int] | None = None, num_prompt: int = 0, **options: object) -> int:
    sampling = SamplingParams(8, **options)  # type: ignore[arg-type]
    row = SampleRow(sampling, 3, tokens or [], num_prompt)
    return sample(torch.tensor([logits]), [row]).token_ids[0]


def test_repetition_penalty_divides_what_is_above_0_and_multiplies_what_is_below() -> None:
    assert one([2.0, 1.5, 0.0], [0], 1, repetition_penalty=1.5) == 1
    assert one([-1.0, -1.5, -9.0], [0, 0, 0], 1, repetition_penalty=2.0) == 1
    assert one([2.0, 1.5, 0.0], [1], 0, repetition_penalty=0.5) == 1
    assert one([2.0, 1.5, 0.0], [1], 0, repetition_penalty=1e-300) == 1


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    assert one([2.0, 1.0], [0, 0, 0], 3, presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert one([2.0, 1.0], [0, 0], 1, presence_penalty=1.5) == 1
    # Once 0.4 is too little, three times is enough.
    assert one([2.0, 1.0], [1, 0], 1, frequency_penalty=0.4) == 0
    assert one([2.0, 1.0], [1, 0, 0, 0], 1, frequency_penalty=0.4) == 1
    assert one([1.0, 1.5], [0, 0], 0, frequency_penalty=-0.5) == 0


def test_stop_tokens_are_ruled_out_until_enough_is_generated() -> None:
    options = {"min_new_tokens": 2, "stop_token_ids": frozenset({0, 99, -1})}
    assert [one([5.0, 1.0, 0.0], [2] * n, 1, **options) for n in (1, 2, 3)] == [1, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_biases_move_ban_and_force_tokens(temperature: float) -> None:
    logits = [3.0, 0.0, -2.0]
    assert one(logits, temperature=temperature, logit_bias=((2, 100.0),)) == 2
    assert one(logits, temperature=temperature, logit_bias=((0, -100.0), (1, -INF))) == 2
    assert one(logits, temperature=temperature, logit_bias=tuple((i, -INF) for i in range(3))) == NO_TOKEN


def test_a_bias_reaches_what_is_ruled_out_no_more() -> None:
    def rule_out(logits: torch.Tensor) -> None:
        logits[:, 1] = -INF

    row = SampleRow(SamplingParams(8, logit_bias=((1, 100.0),)), 3)
    assert sample(torch.tensor([[0.0, 5.0, 1.0]]), [row], rule_out).token_ids == [2]


def kept(logits: torch.Tensor, num_draws: int = 200, **options: object) -> set[int]:
    """All tokens that come, nearly as likely as each other."""
    rows = [SampleRow(SamplingParams(8, 100.0, **options), i) for i in range(num_draws)]  # type: ignore[arg-type]
    return set(sample(logits.expand(num_draws, -1).clone(), rows).token_ids)


def test_each_limit_keeps_the_likeliest_and_no_fewer_than_one() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0, 2.0]])
    assert kept(logits, top_k=1) == kept(logits, min_p=1.0) == kept(logits, top_p=1e-9) == {1}
    # Of equal ones at the limit the lowest id stays.
    assert kept(logits, top_k=3) == {1, 3, 2}
    assert kept(logits, top_k=5) == kept(logits, top_k=50) == kept(logits) == {0, 1, 2, 3, 4}
    # At this temperature neighbours differ by 1 %.
    assert kept(logits, min_p=0.985) == {1, 3}
    # top_p is of what top_k leaves: 0.6 of two tokens needs both.
    assert kept(logits, top_k=2, top_p=0.6) == {1, 3}
    assert kept(logits, top_k=2, top_p=0.4) == {1}


def test_equal_logits_at_every_border_of_the_candidates() -> None:
    logits = torch.zeros(1, MANY + 32)
    assert kept(logits, 30, top_k=3) == {0, 1, 2}
    assert max(kept(logits, 30, top_k=FEW + 1)) <= FEW
    assert max(kept(logits, 30)) > MANY // 2


def test_one_possible_token_is_certain_whatever_the_options() -> None:
    logits = torch.full((1, FEW * 4), -INF)
    logits[0, 900] = -7.0
    for options in ({}, {"top_k": 5}, {"top_p": 0.1}, {"min_p": 0.5}, {"top_k": 2000, "min_p": 1.0}):
        assert kept(logits, **options) == {900}


@pytest.mark.parametrize("spoil", [lambda row: row.fill_(math.nan), lambda row: row.fill_(-INF)])
def test_an_unusable_row_is_in_no_report(spoil: Callable[[torch.Tensor], None]) -> None:
    logits = logits_for(3, 3, FEW * 4)
    sampling = SamplingParams(8, 1.0, top_k=9, repetition_penalty=1.2, num_logprobs=2)
    rows = [SampleRow(sampling, 3, [1, 2], 1, wants_warped_logprob=True)] * 3
    expected = sample(logits.clone(), rows)
    spoil(logits[1])
    result = sample(logits.clone(), rows)
    assert result.token_ids == [expected.token_ids[0], NO_TOKEN, expected.token_ids[2]]
    assert set(result.logprobs) == set(result.warped_logprobs) == {0, 2}
    assert of_row(result, 2) == of_row(expected, 2)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.2, 1.0, 3.0]),
    st.sampled_from([{}, {"top_p": 0.9071}, {"top_k": 20}, {"top_k": 300, "min_p": 0.0517}]),
)
def test_branches_are_the_draws_of_the_first_streams(
    seed: int, temperature: float, options: dict[str, float]
) -> None:
    decoding = CautiousDecoding(max_branches=6, min_entropy=0.1, max_entropy=3.0)
    sampling = SamplingParams(8, temperature, seed=seed, decoding=decoding, **options)  # type: ignore[arg-type]
    logits = logits_for(seed, 3, FEW * 4)
    branching = SampleRow(sampling, 4, is_branching=True, wants_warped_logprob=True)
    plain = [SampleRow(sampling, 4, stream=k, wants_warped_logprob=True) for k in range(6)]
    result = sample(logits.clone(), [plain[0], branching, replace(branching, position=9)])
    _, probabilities = warped(logits[1], branching)
    entropy = -sum(p * math.log(p) for p in probabilities)
    num = num_branches(entropy, decoding)
    alone = sample(logits[1].expand(6, -1).clone(), plain)
    assert result.branches[1] == tuple((alone.token_ids[k], alone.warped_logprobs[k]) for k in range(num))
    assert result.branches[1][0] == (result.token_ids[1], result.warped_logprobs[1])
    assert set(result.branches) == {1, 2}


def test_a_greedy_row_has_one_certain_branch() -> None:
    row = SampleRow(SamplingParams(8, decoding=CautiousDecoding()), 4, is_branching=True)
    assert sample(torch.tensor([[1.0, 2.0]]), [row]).branches == {0: ((1, 0.0),)}
