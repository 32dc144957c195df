"""What tests and benchmarks of kernels share: tolerances, poison, names of shapes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest accepted |actual - expected|: `absolute` + `relative` * |expected|, and why that much."""

    absolute: float
    relative: float
    reason: str


#: Paged attention against the fp64 reference, by dtype of query and cache, for standard normal inputs.
ATTENTION_TOLERANCES = {
    torch.float32: Tolerance(
        absolute=1e-5,
        relative=1e-5,
        reason=(
            "The partial sums of a score have a size of sqrt(head_dim); each addition rounds by 2**-24 of that, the "
            "errors of head_dim additions grow like sqrt(head_dim), and the score is divided by sqrt(head_dim): "
            "5e-7 for a head_dim of 64. Softmax makes of it a relative error of 1e-6 in its weights, and the output "
            "is a mean, under these weights, of values up to 4: 4e-6. 1e-5 leaves a factor of two."
        ),
    ),
    torch.float16: Tolerance(
        absolute=2e-3,
        relative=2e-3,
        reason=(
            "Products are exact in float32. Weights are rounded to float16, by 2**-12 on average, before they meet "
            "values up to 4: 1e-3; the output is rounded by 2**-11 of itself at most. Twice that."
        ),
    ),
    torch.bfloat16: Tolerance(
        absolute=1.6e-2,
        relative=1.6e-2,
        reason="As float16, with 2**-9 and 2**-8.",
    ),
}


#: Projections against the fp64 reference with the weight as it is kept, by that dtype, for standard normal rows and
#: weights of 1 / sqrt(in_size).
LINEAR_TOLERANCES = {
    "float32": Tolerance(
        absolute=1e-5,
        relative=1e-5,
        reason=(
            "An output has a size of 1; each of up to 200 additions rounds by 2**-24 of the partial sum, up to 4: "
            "errors add up to 4 * sqrt(200) * 6e-8 = 3.4e-6 at random. 1e-5 leaves a factor of three."
        ),
    ),
    "bfloat16": Tolerance(
        absolute=5e-2,
        relative=1e-2,
        reason=(
            "With many rows, the rows and the output are rounded to bfloat16, by 2**-9 each. An output is a sum of "
            "products whose errors add up at random to 2**-9 of its size of 1, and of up to 4; then it is rounded "
            "by 2**-9 of itself. Five times that covers the largest of some thousand."
        ),
    ),
    "int8": Tolerance(
        absolute=1e-5, relative=1e-5, reason="As float32: int8 is exact in it, and scaled once per output."
    ),
}


#: Norm, gate and rotation against the fp64 reference.
SMALL_OP_TOLERANCE = Tolerance(
    absolute=1e-6,
    relative=1e-6,
    reason=(
        "A handful of roundings by 2**-24 each, and an exponential that is off by 2e-7 relatively: up to 5e-7. A rotation "
        "takes the difference of two products of up to 4, whose roundings stay when the difference is small: 5e-7."
    ),
)

#: The same on a GPU, by dtype of what comes out.
SMALL_OP_TOLERANCES = {
    torch.float32: Tolerance(
        absolute=2e-6,
        relative=2e-6,
        reason="As on the CPU; the exponential is off by up to 2**-22 of its result and of its argument: twice as much.",
    ),
    torch.bfloat16: Tolerance(
        absolute=1e-5,
        relative=2**-7,
        reason="One rounding to 8 bits, by 2**-9; where float32 errors move a number across a border, by 2**-8.",
    ),
    torch.float16: Tolerance(
        absolute=1e-5, relative=2**-10, reason="One rounding to 11 bits, by 2**-12; as above, by 2**-11."
    ),
    torch.float8_e4m3fn: Tolerance(
        absolute=2**-9,
        relative=2**-3,
        reason="One rounding to 4 bits, by 2**-5; as above, by 2**-4. Below 2**-6 steps are 2**-9.",
    ),
}


#: Of queries that are turned by a Hadamard matrix, by dtype of what comes out.
TURNED_TOLERANCES = SMALL_OP_TOLERANCES | {
    torch.float32: Tolerance(
        absolute=2e-5,
        relative=2e-6,
        reason=(
            "Of up to 256 numbers eight sums and differences follow each other, each rounded by 2**-24 of up to 16 times a number "
            "of up to 4 before the factor of 1/16: 8 * 2**-24 * 4, four times that."
        ),
    ),
    torch.bfloat16: Tolerance(
        absolute=2e-5, relative=2**-7, reason="One rounding to 8 bits; the sums as in float32."
    ),
    torch.float16: Tolerance(
        absolute=2e-5, relative=2**-10, reason="One rounding to 11 bits; the sums as in float32."
    ),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    """Fail, with the largest difference, unless shapes and dtypes are equal and all values within tolerance.

    NaN is never close, not even to NaN.
    """
    torch.testing.assert_close(
        actual, expected, atol=tolerance.absolute, rtol=tolerance.relative, equal_nan=False
    )


#: Attention over packed pages against the fp64 reference over the same pages unpacked, for KV near 1 in size.
QUANTISED_ATTENTION_TOLERANCE = Tolerance(
    absolute=6e-3,
    relative=8e-3,
    reason=(
        "Query and weights are rounded to fp16, by 2**-12: a score of up to 8 is off by 2e-3, and so is its weight. The "
        "output is a mean of values up to 4 under these weights, and their errors have either sign: 2e-3. A bf16 output is "
        "rounded by 2**-9, where it lies at a border by 2**-8. Three times the one, twice the other."
    ),
)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What torch allocates inside is NaN, or the largest whole number, on every device: unwritten outputs show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def poison_empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory as a careless reader would find it: every value NaN, on the CPU.

    NaN survives a multiplication by zero, so a masked score of an unused slot still shows.
    """
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def shape_id(value: object) -> str:
    """A short name of a test parameter: `3x17` for a sequence of numbers, else its text."""
    if isinstance(value, list | tuple):
        return "x".join(map(str, value)) or "none"
    return str(value)
