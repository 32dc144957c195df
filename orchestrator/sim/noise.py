"""How much longer than predicted steps take. Pure."""

import random
from collections.abc import Iterator
from math import exp, log, sqrt

_RATIO = 4 * exp(-0.5) / sqrt(2.0)


def factors(rng: random.Random, deviation: float) -> Iterator[float]:
    """What `rng.lognormvariate(0.0, deviation)` returns, again and again, to the last bit and in half the time.

    Source: Kinderman and Monahan (ACM TOMS 1977), as the standard library has it.
    """
    draw = rng.random
    while True:
        while True:
            first = draw()
            second = 1.0 - draw()
            z = _RATIO * (first - 0.5) / second
            if z * z / 4.0 <= -log(second):
                break
        yield exp(z * deviation)
