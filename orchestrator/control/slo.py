"""What TTFT, TPOT and ITL are, and which requests met their targets. Pure.

Token times are seconds since the request arrived, one for each output token in order. Tokens that
came in one message have one time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request, in seconds."""

    ttft_s: float
    tpot_s: float

    def is_met(self, ttft_s: float, tpot_s: float | None) -> bool:
        """Both are met; a TPOT that is undefined (below 2 tokens) cannot be missed."""
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


#: No target, which everything meets.
NO_SLO = Slo(math.inf, math.inf)


def tpot_s(token_times_s: Sequence[float]) -> float | None:
    """(last token - first token) / (tokens - 1); None below 2 tokens."""
    if len(token_times_s) < 2:
        return None
    return (token_times_s[-1] - token_times_s[0]) / (len(token_times_s) - 1)


def itl_s(token_times_s: Sequence[float]) -> list[float]:
    """The gaps between consecutive tokens, one fewer than tokens; 0 within one message."""
    return [later - earlier for earlier, later in pairwise(token_times_s)]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `num_values` values, in their unit."""

    num_values: int
    p50: float
    p90: float
    p95: float
    p99: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` % of the ascending, non-empty `ordered` lie; 0 <= percent <= 100.

    Between two values it is interpolated linearly: position percent / 100 * (n - 1), from 0.
    """
    position = percent / 100 * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The four that are reported; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(len(ordered), *(percentile(ordered, percent) for percent in (50, 90, 95, 99)))
