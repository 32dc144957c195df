"""What varies in how long a step takes. Pure."""

import math
import random
from collections.abc import Iterator


def noise_factors(rng: random.Random, deviation: float) -> Iterator[float]:
    """Without end, what each step is multiplied with: lognormal, its logarithm with a mean of 0 and this standard deviation.

    The numbers are those of `rng.lognormvariate(0.0, deviation)`, in half its time, since each step of a simulation takes one. Ones, and
    nothing drawn, where the deviation is 0.
    Source: A. J. Kinderman and J. F. Monahan, "Computer generation of random variables using the ratio of uniform deviates", 1977.
    """
    draw, log, exp, most = rng.random, math.log, math.exp, 4 * math.exp(-0.5) / math.sqrt(2.0)
    while not deviation:
        yield 1.0
    while True:
        first, second = draw(), 1.0 - draw()
        normal = most * (first - 0.5) / second
        if normal * normal / 4.0 <= -log(second):
            yield exp(normal * deviation)
