"""Choosing tokens: the distribution, its edges, and that a token depends on its own row alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.api import SamplingParams
from workers.engine.sampler import SampleRow, sample, uniform
from workers.engine.sampling.draw import NUM_CANDIDATES
from workers.engine.sequence import NO_TOKEN

INF = float("inf")
NAN = float("nan")
FEW, MANY = NUM_CANDIDATES
#: Large enough that not all tokens are among the first candidates.
VOCAB = FEW * 4


def row(
    temperature: float = 0.0, top_p: float = 1.0, *, seed: int = 1, position: int = 3, max_new: int = 8
) -> SampleRow:
    return SampleRow(SamplingParams(max_new, temperature, top_p=top_p, seed=seed), position)


def draw(logits: list[float], **settings: float) -> int:
    [token] = tokens(torch.tensor([logits]), [row(**settings)])  # type: ignore[arg-type]
    return token


def tokens(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    return sample(logits.clone(), rows).token_ids


def draw_by_sorting_all(logits: torch.Tensor, one: SampleRow) -> int:
    """Temperature and top_p as the docstring of `sample` has them, in plain words, for one row."""
    values = logits.double().numpy()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    weights = np.exp((values[order] - values[order[0]]) / one.sampling.temperature)
    cumulative = np.cumsum(weights / weights.sum())
    num_kept = min(int((cumulative < one.sampling.top_p).sum()) + 1, len(order))
    mass = cumulative[num_kept - 1] if one.sampling.top_p < 1 else 1.0
    target = uniform(one.sampling.seed, one.position) * mass
    return order[min(int(np.searchsorted(cumulative, target, side="right")), num_kept - 1)]


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [-5.0, -7.0, -6.0]])
    assert tokens(logits, [row(), row()]) == [1, 0]


def test_the_numbers_are_those_of_philox() -> None:
    for seed, position in [(0, 0), (1, 2), (2**63 + 5, 77), (2**64 - 1, 10**6)]:
        expected = np.random.Generator(np.random.Philox(key=seed, counter=position)).random()
        assert uniform(seed, position) == expected
        counter = np.array([position, 5, 0, 0], dtype=np.uint64)
        expected = np.random.Generator(np.random.Philox(key=seed, counter=counter)).random()
        assert uniform(seed, position, 5) == expected
    # Written down, so that a new version of a library cannot change what a seed means.
    assert uniform(42, 7) == pytest.approx(0.4074136540795371, abs=0)
    assert uniform(42, 7, 3) == pytest.approx(0.6596202665651832, abs=0)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.lists(st.integers(0, 2**64 - 1), max_size=3))
def test_a_number_does_not_depend_on_what_was_drawn_before(
    seed: int, position: int, others: list[int]
) -> None:
    first = uniform(seed, position)
    for other in others:
        uniform(other, position)
    assert uniform(seed, position) == first
    assert 0 <= first < 1


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 2.5, 50.0]),
    st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.5, 3.0, 20.0]),
    st.sampled_from([7, FEW, FEW + 1, VOCAB, MANY + 32]),
    st.booleans(),
)
def test_a_draw_is_what_sorting_the_whole_vocabulary_gives(
    seed: int, temperature: float, top_p: float, spread: float, vocab: int, has_ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocab, generator=generator) * spread
    if has_ties:
        logits = logits.round()
    rows = [row(temperature, top_p, seed=seed, position=i) for i in range(4)]
    expected = [draw_by_sorting_all(line, one) for line, one in zip(logits, rows, strict=True)]
    assert tokens(logits, rows) == expected


@given(st.integers(0, 2**32 - 1))
def test_a_rows_token_does_not_depend_on_its_batch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, VOCAB, generator=generator) * 4
    rows = [row(0.0), row(1.0), row(0.7, 0.9), row(30.0), row(1.0, 0.5, seed=9), row(0.0)]
    together = tokens(logits, rows)
    alone = [tokens(logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    assert together == alone


def test_tokens_come_in_proportion_to_their_probability() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(4000, 3)
    counts = Counter(tokens(logits, [row(1.0, position=i) for i in range(4000)]))
    # Three standard deviations of a binomial count are below 100.
    assert [abs(counts[i] - expected) < 100 for i, expected in enumerate([2000, 1200, 800])] == [True] * 3


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3])).expand(500, 3)

    def kept(top_p: float) -> set[int]:
        return set(tokens(logits, [row(1.0, top_p, position=i) for i in range(500)]))

    assert [kept(p) for p in (1e-12, 0.4, 0.6, 0.95)] == [{1}, {1}, {1, 2}, {0, 1, 2}]


@pytest.mark.parametrize("temperature", [1e-8, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draw([1.0, 1.0 + 1e-6, -40.0], temperature=temperature) == 1
    # Equal ones stay equally likely.
    both = {draw([2.0, 2.0, 1.0], temperature=temperature, position=i) for i in range(40)}
    assert both == {0, 1}


def test_a_huge_temperature_is_uniform() -> None:
    drawn = {draw([50.0, 0.0, -50.0], temperature=100.0 * 1e6, position=i) for i in range(60)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_what_is_ruled_out_is_never_drawn(top_p: float) -> None:
    logits = torch.full((200, VOCAB), -INF)
    logits[:, [3, VOCAB - 1]] = 1.0
    drawn = set(tokens(logits, [row(1.0, top_p, position=i) for i in range(200)]))
    assert drawn <= {3, VOCAB - 1}
    assert draw([-INF, 4.0, -INF], temperature=9.0) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad", [[NAN] * 3, [1.0, NAN, 2.0], [-INF] * 3, [1.0, INF, 2.0]], ids=["nan", "one nan", "-inf", "inf"]
)
def test_unusable_logits_fail_their_row_and_no_other(bad: list[float], temperature: float) -> None:
    logits = torch.tensor([[0.0, 0.0, 90.0], bad, [90.0, 0.0, 0.0]])
    assert tokens(logits, [row(temperature)] * 3) == [2, NO_TOKEN, 0]


def test_no_rows_and_one_token_are_fine() -> None:
    assert tokens(torch.empty(0, 5), []) == []
    assert tokens(torch.tensor([[-3.0]]), [row(1.0, 0.1)]) == [0]
