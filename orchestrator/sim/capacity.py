"""The highest rate that a cluster bears, by bisection, and what several seeds say of it. Pure."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Where a capacity is expected: the factor around that within which it is looked for first, and the steps of that.
NEAR, NEAR_STEPS = 1.25, 4
#: Student's t of 97.5 %, by degrees of freedom from 1 on.
STUDENT = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
#: Of which an interval can be made.
MAX_SEEDS = len(STUDENT) + 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of the seeds and half of its 95 % interval."""

    mean: float
    half: float


def estimate(values: Sequence[float]) -> Estimate:
    """Of 2 to MAX_SEEDS values, by Student's t."""
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), half)


def capacity_rps(
    reaches: Callable[[float], bool],
    *,
    between: tuple[float, float],
    num_steps: int,
    near: tuple[float, float] | None = None,
    near_steps: int = NEAR_STEPS,
) -> float:
    """The highest rate that `reaches` holds for, by geometric bisection: first in `near_steps` between the rates of `near`,
    if they are there, and where it is not there in `num_steps` between those of `between`. 0 when the lowest of these is too much.
    """
    if near is not None and reaches(near[0]):
        low, high = _bisect(reaches, near, near_steps)
        if high < near[1]:
            return math.sqrt(low * high)
    if not reaches(between[0]):
        return 0.0
    low, high = _bisect(reaches, between, num_steps)
    return math.sqrt(low * high)


def _bisect(
    reaches: Callable[[float], bool], between: tuple[float, float], num_steps: int
) -> tuple[float, float]:
    """The last rate that was reached, and the last that was not; an end of `between` stands for none."""
    low, high = between
    for _ in range(num_steps):
        rate = math.sqrt(low * high)
        if reaches(rate):
            low = rate
        else:
            high = rate
    return low, high
