"""When a cached prefix of another worker is worth its way, and which worker's. Pure.

Source: Mooncake (FAST'25), the conductor's choice between transfer and prefill, with both times linear in tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CachedAt:
    """What one worker has of a prompt.

    overhead_s: of a fetch from there, whatever its size. host_tokens: of num_tokens, those that are put back into its
    pool first, at `host_bytes_per_s`.
    """

    num_tokens: int
    link_bytes_per_s: float
    overhead_s: float
    host_tokens: int = 0
    host_bytes_per_s: float = 1e9


def min_fetch_tokens(
    *, prefill_tokens_per_s: float, token_bytes: int, link_bytes_per_s: float, overhead_s: float
) -> int | None:
    """Tokens from which on fetching their KV is faster than computing it; None when it never is.

    token_bytes: KV of one token over all layers. overhead_s: of a fetch, whatever its size.
    """
    gain_s = 1 / prefill_tokens_per_s - token_bytes / link_bytes_per_s
    if gain_s <= 0:
        return None
    return max(1, math.ceil(overhead_s / gain_s))


def gain_s(cached: CachedAt, *, prefill_tokens_per_s: float, token_bytes: int) -> float:
    """By how much fetching all of it is predicted to be faster than computing it, in seconds; negative when it is not."""
    put_back_s = cached.host_tokens * token_bytes / cached.host_bytes_per_s
    fetch_s = cached.overhead_s + put_back_s + cached.num_tokens * token_bytes / cached.link_bytes_per_s
    return cached.num_tokens / prefill_tokens_per_s - fetch_s


def best_source(
    found: Mapping[str, CachedAt], *, prefill_tokens_per_s: float, token_bytes: int
) -> str | None:
    """The address from which fetching saves most; None when it saves nothing from any. The first of equals."""
    gains_s = {
        address: gain_s(cached, prefill_tokens_per_s=prefill_tokens_per_s, token_bytes=token_bytes)
        for address, cached in found.items()
        if cached.num_tokens > 0
    }
    best = max(gains_s, key=lambda address: gains_s[address], default=None)
    return best if best is not None and gains_s[best] > 0 else None
