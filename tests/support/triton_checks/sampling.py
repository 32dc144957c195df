"""The draw of the next token, on a GPU or interpreted, against its specification and the engine's sampler."""

from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.sample import op
from phasewise_kernels.sample.reference import NO_TOKEN, sample_reference, uniform
from phasewise_kernels.testing import poisoned_memory
from workers.api import SamplingParams
from workers.engine.sampler import SampleRow
from workers.engine.sampler import sample as sample_by_engine
from workers.engine.sampling.philox import uniform as engines_uniform

#: temperature, top_k, top_p, min_p. Where logits are equal, a round top_p would be the share of a whole number of tokens,
#: and rounding would say whether one more is kept.
Options = tuple[float, int, float, float]
OPTIONS: tuple[Options, ...] = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.5, 0, 0.9013, 0.0),
    (1.0, 50, 0.8009, 0.0507),
    (2.0, 0, 1.0, 0.1003),
    (1e-300, 0, 0.5003, 0.0),
    (50.0, 2900, 0.97003, 0.0),
    (50.0, 0, 0.3071, 0.0),
    (8.0, 1, 0.2017, 0.9009),
)


def arguments(options: list[Options], device: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The op's, with seeds and positions that are new."""
    columns = list(zip(*options, strict=True)) if options else [(), (), (), ()]
    num = len(options)
    floats = {
        name: torch.tensor(column, dtype=torch.float64, device=device)
        for name, column in zip(
            ("temperature", "top_p", "min_p"), (columns[0], columns[2], columns[3]), strict=True
        )
    }
    seeds = rng.integers(-(2**63), 2**63, num, dtype=np.int64)
    return {
        **floats,
        "top_k": torch.tensor(columns[1], dtype=torch.int64, device=device),
        "seeds": torch.from_numpy(seeds).to(device),
        "positions": torch.from_numpy(rng.integers(0, 2**20, num)).to(device),
        "streams": torch.from_numpy(rng.integers(0, 3, num)).to(device),
    }


#: TILE, PROGRAMS, LEVELS and BITS of the search where it is interpreted: rows have one program or several, and their levels are shared, left to the last
#: program, or both.
Cuts = tuple[int, int, int, int]
CUTS: tuple[Cuts, ...] = ((1024, 512, 4, 8), (256, 4, 3, 12), (512, 1, 1, 5))


def drawn(
    logits: torch.Tensor, given_arguments: dict[str, torch.Tensor], cuts: Cuts = CUTS[0]
) -> torch.Tensor:
    """By the op on a GPU, else by what it launches there."""
    module: Any = op
    if logits.device.type == "cpu":
        module = import_module("phasewise_kernels.sample.triton_kernel")
        # The interpreter takes seconds to sort a thousand candidates.
        module.CANDIDATES, module.ROOM = 16, 32
        module.TILE, module.PROGRAMS, module.LEVELS, module.BITS = cuts
    before = logits.clone()
    with poisoned_memory():
        found: torch.Tensor = module.sample(logits, **given_arguments)
    assert torch.equal(before.view(torch.uint8), logits.view(torch.uint8))
    return found


def by_engine(logits: torch.Tensor, given_arguments: dict[str, torch.Tensor]) -> list[int]:
    """What the engine's sampler on the CPU draws."""
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "streams")
    rows = [
        SampleRow(
            SamplingParams(max_new_tokens=1, temperature=heat, top_k=k, top_p=p, min_p=m, seed=seed % 2**64),
            position=position,
            stream=stream,
        )
        for heat, k, p, m, seed, position, stream in zip(
            *(given_arguments[name].tolist() for name in names), strict=True
        )
    ]
    return sample_by_engine(logits.float().cpu().contiguous().clone(), rows).token_ids


def assert_same(
    logits: torch.Tensor, options: list[Options], rng: np.random.Generator, cuts: Cuts = CUTS[0]
) -> None:
    """Kernel, reference and engine agree."""
    given_arguments = arguments(options, str(logits.device), rng)
    found = drawn(logits, given_arguments, cuts).tolist()
    # Torch's own sums on a GPU have no order that is always the same.
    expected = sample_reference(logits.cpu(), **{name: x.cpu() for name, x in given_arguments.items()})
    assert found == expected.tolist(), (options, logits.shape, logits.dtype)
    assert found == by_engine(logits, given_arguments), (options, logits.shape, logits.dtype)


def logits_of(
    kind: str, num_rows: int, vocab_size: int, dtype: torch.dtype, rng: np.random.Generator
) -> torch.Tensor:
    """peaked: as a model's; flat: normal; equal: all the same; ties: few different ones; few: nearly all ruled out; wild: of any
    size, down to the smallest.
    """
    x = rng.standard_normal((num_rows, vocab_size))
    if kind == "peaked":
        x = np.exp(x * 0.9) * 1.5
    elif kind == "equal":
        x = np.zeros_like(x) - 3.25
    elif kind == "ties":
        x = np.round(x * 2) * 0.5 * np.where(rng.random(x.shape) < 0.5, 1, -1)
    elif kind == "few":
        x = np.where(rng.random(x.shape) < 3 / vocab_size, x, -np.inf)
        x[:, rng.integers(vocab_size)] = 1.0
    elif kind == "wild":
        x = np.sign(x) * 2.0 ** rng.integers(-149, 15, x.shape)
    return torch.from_numpy(x).to(dtype)


def check_the_numbers_are_those_of_the_engine(device: str) -> None:
    """The reference's, at the ends of what a seed can be."""
    for seed, position, stream in product((0, 1, 12345, 2**63, 2**64 - 1), (0, 7, 2**31), (0, 1, 5)):
        assert uniform(seed, position, stream) == engines_uniform(seed, position, stream)


def check_all_options_on_all_kinds_of_logits(device: str) -> None:
    """In one batch, so that rows end in different launches; what is equal may lie anywhere."""
    rng = np.random.default_rng(7)
    kinds = ("peaked", "flat", "equal", "ties", "few")
    sizes: tuple[tuple[int, torch.dtype], ...] = (
        (1, torch.float32),
        (50, torch.bfloat16),
        (3000, torch.float32),
        (1500, torch.float16),
        (49152, torch.bfloat16),
        (128256, torch.float32),
    )
    for (i, kind), (j, (vocab_size, dtype)) in product(enumerate(kinds), enumerate(sizes)):
        options = list(OPTIONS)
        if device == "cpu":
            # Interpreted every kind with two of the smaller sizes, and half of the options with each.
            if vocab_size > 3000 or (i + j) % 2:
                continue
            options = options[(i // 2 + j // 2) % 2 :: 2]
        logits = logits_of(kind, len(options), vocab_size, dtype, rng).to(device)
        assert_same(logits, options, rng, CUTS[(i + j) // 2 % len(CUTS)])


def check_unusable_rows(device: str) -> None:
    """Each fails alone."""
    rng = np.random.default_rng(7)
    for bad, heat in product((float("nan"), float("inf")), (0.0, 1.0)):
        logits = logits_of("peaked", 4, 300, torch.float32, rng)
        logits[1, 299] = bad
        logits[2] = -torch.inf
        options: list[Options] = [(heat, 0, 0.9, 0.0)] * 4
        given_arguments = arguments(options, device, rng)
        found = drawn(logits.to(device), given_arguments).tolist()
        assert found[1] == found[2] == NO_TOKEN
        assert found == sample_reference(logits.to(device), **given_arguments).tolist()
        assert min(found[0], found[3]) >= 0


def check_a_temperature_that_is_no_number_ends(device: str) -> None:
    """Whatever it draws; other rows are as ever."""
    rng = np.random.default_rng(7)
    logits = logits_of("flat", 3, 2500, torch.float32, rng)
    given_arguments = arguments([(2.0, 0, 0.9013, 0.0)] * 3, "cpu", rng)
    expected = sample_reference(logits, **given_arguments).tolist()
    given_arguments["temperature"][1] = float("nan")
    on_device = {name: x.to(device) for name, x in given_arguments.items()}
    # The interpreter tells of each NaN that becomes a whole number.
    with np.errstate(invalid="ignore"):
        found = drawn(logits.to(device), on_device).tolist()
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert found[1] < logits.shape[1]


def check_the_largest_with_the_lowest_id(device: str) -> None:
    """Greedy, with equals in different groups, and zeros of both signs."""
    logits = torch.full((2, 400), -1.0)
    logits[0, [399, 77, 78]] = 5.0
    logits[1] = -1.0
    logits[1, 33], logits[1, 200] = -0.0, 0.0
    given_arguments = arguments([(0.0, 0, 1.0, 0.0)] * 2, device, np.random.default_rng(7))
    assert drawn(logits.to(device), given_arguments).tolist() == [77, 33]


def check_no_rows(device: str) -> None:
    """Nothing comes of nothing."""
    found = drawn(torch.empty(0, 50, device=device), arguments([], device, np.random.default_rng(7)))
    assert found.shape == (0,)


def check_rows_with_one_program_each(device: str) -> None:
    """As many that there are none for parts of them, or no programs for more."""
    rng = np.random.default_rng(7)
    options = list(OPTIONS)[1:7] * (1 if device == "cpu" else 100)
    logits = logits_of("flat", len(options), 2500, torch.bfloat16, rng).to(device)
    assert_same(logits, options, rng, (1024, 1, 3, 12))


def check_equal_tokens_in_several_parts_of_a_row(device: str) -> None:
    """The draw is the one of its number, whichever program has it."""
    rng = np.random.default_rng(7)
    logits = logits_of("equal", 6, 2500, torch.bfloat16, rng).to(device)
    assert_same(logits, [(1.0, 0, 1.0, 0.0)] * 6, rng)


def check_whatever_comes(device: str) -> None:
    """Whatever hypothesis thinks of."""

    @settings(max_examples=25 if device == "cpu" else 200, deadline=None, database=None)
    @given(
        st.sampled_from(["peaked", "flat", "equal", "ties", "few", "wild"]),
        st.sampled_from([(2, torch.float32), (2500, torch.bfloat16), (2500, torch.float32)]),
        st.tuples(
            st.one_of(st.floats(0.01, 5), st.sampled_from([1e-300, 1e6])),
            st.integers(0, 2600),
            st.floats(1e-12, 1),
            st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
        ),
        st.sampled_from(CUTS),
        st.integers(0, 2**32),
    )
    def draws(kind: str, size: tuple[int, torch.dtype], options: Options, cuts: Cuts, seed: int) -> None:
        rng = np.random.default_rng(seed)
        assert_same(logits_of(kind, 2, *size, rng).to(device), [options] * 2, rng, cuts)

    draws()
