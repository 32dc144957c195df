"""Loads for comparing policies: slices of a trace with other beginnings, and loads that change their kind half way. Pure.

One rng gives one load, and at another rate the same requests at other times.
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from orchestrator.bench.trace import Trace
from orchestrator.control.slo import Slo
from orchestrator.sim.coarse_request import CoarseRequest

#: Of a picture of 4032 x 3024 in MiniCPM-V 2.6: slices with the overview, and tokens of each (EPD, section 4).
IMAGE_TILES, TILE_TOKENS = 10, 64
#: Of lognormal lengths: the standard deviation of their logarithm.
SPREAD = 0.5


def of_trace(
    trace: Trace, slo: Slo, rng: random.Random, *, rate_rps: float, duration_s: float
) -> list[CoarseRequest]:
    """Consecutive rows from a random one on, with their gaps scaled to the mean rate. After the last row comes the first again, of
    another lap, whose prompts share nothing with those of this one.
    """
    rows, num = trace.rows, max(2, round(rate_rps * duration_s))
    first = rng.randrange(len(rows))
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    lap_s = span_s * len(rows) / (len(rows) - 1)
    found = []
    for index in range(first, first + num + 1):
        lap, row = divmod(index, len(rows))
        found.append((lap * lap_s + rows[row].arrival_s - rows[0].arrival_s, lap, rows[row]))
    begin_s = found[0][0]
    scale = duration_s / (found[-1][0] - begin_s)
    return [
        CoarseRequest(
            (at_s - begin_s) * scale,
            row.prompt_tokens,
            row.output_tokens,
            slo,
            tuple(block + lap * 10**9 for block in row.hash_ids),
        )
        for at_s, lap, row in found[:-1]
    ]


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind. Means; a share of `image_share` has `num_images` pictures, whose tokens are added to the prompt."""

    prompt_tokens: int
    output_tokens: int
    image_share: float = 0.0
    num_images: int = 0
    #: Of the logarithm of both lengths; 0 makes all alike.
    spread: float = SPREAD


def shifting(
    before: Kind,
    after: Kind,
    slo: Slo,
    rng: random.Random,
    *,
    rate_rps: float,
    duration_s: float,
    first_share: float = 0.5,
) -> list[CoarseRequest]:
    """Poisson arrivals, of which the first `first_share` are of the one kind and the others of the other."""
    num = max(2, round(rate_rps * duration_s))
    times = list(accumulate(rng.expovariate(1.0) for _ in range(num)))
    scale = duration_s / times[-1]
    num_before = round(first_share * num)
    return [_draw(before if i < num_before else after, at * scale, slo, rng) for i, at in enumerate(times)]


def _draw(kind: Kind, at_s: float, slo: Slo, rng: random.Random) -> CoarseRequest:
    num_images = kind.num_images if rng.random() < kind.image_share else 0
    prompt = _length(kind.prompt_tokens, kind.spread, rng) + num_images * IMAGE_TILES * TILE_TOKENS
    output = _length(kind.output_tokens, kind.spread, rng)
    return CoarseRequest(at_s, prompt, output, slo, num_tiles=num_images * IMAGE_TILES)


def _length(mean: int, spread: float, rng: random.Random) -> int:
    # The mean of a lognormal is exp(mu + spread^2 / 2).
    return max(1, round(mean * rng.lognormvariate(-spread * spread / 2, spread)))
