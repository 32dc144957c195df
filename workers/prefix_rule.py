"""When a cached prefix of another worker is worth its way. Pure."""

import math


def min_fetch_tokens(
    *, prefill_tokens_per_s: float, token_bytes: int, link_bytes_per_s: float, overhead_s: float
) -> int | None:
    """Tokens from which on fetching their KV is faster than computing it; None when it never is.

    token_bytes: KV of one token over all layers. overhead_s: of a fetch, whatever its size.
    Source: Mooncake (FAST'25), the conductor's choice between transfer and prefill, with both times linear in tokens.
    """
    gain_s = 1 / prefill_tokens_per_s - token_bytes / link_bytes_per_s
    if gain_s <= 0:
        return None
    return max(1, math.ceil(overhead_s / gain_s))
