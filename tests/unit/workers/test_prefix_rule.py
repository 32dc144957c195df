"""When a cached prefix of another worker is worth its way."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.prefix_rule import CachedAt, best_source, gain_s, min_fetch_tokens


def test_a_fast_way_is_worth_few_tokens() -> None:
    # 500 tokens/s computed, 46 KB a token over 1 GB/s: 2 ms against 0.046 ms a token; 10 ms are 6 tokens.
    assert (
        min_fetch_tokens(prefill_tokens_per_s=500, token_bytes=46_080, link_bytes_per_s=1e9, overhead_s=0.01)
        == 6
    )


def test_a_slow_way_is_never_worth_it() -> None:
    assert (
        min_fetch_tokens(prefill_tokens_per_s=500, token_bytes=46_080, link_bytes_per_s=2e7, overhead_s=0.0)
        is None
    )


@pytest.mark.parametrize("bytes_per_s", [5.5e9, 6.5e9])
def test_the_border_of_mooncake_s_example(bytes_per_s: float) -> None:
    # LLaMA3-70B on 8 A800 at a prefix of 8,192 tokens: transfer pays from about 6 GB/s on (Mooncake, FAST'25).
    layers, d, gqa, s, p, flops = 80, 8192, 8, 2, 8192, 8 * 312e12
    token_flops = layers * (4 * p * d + 22 * d * d)
    token_bytes = layers * 2 * d * s // gqa
    least = min_fetch_tokens(
        prefill_tokens_per_s=flops / token_flops,
        token_bytes=token_bytes,
        link_bytes_per_s=bytes_per_s,
        overhead_s=0.0,
    )
    assert (least is not None) == (bytes_per_s > 6e9)


@given(
    rate=st.floats(1, 1e6),
    token_bytes=st.integers(1, 10**7),
    link=st.floats(1e3, 1e12),
    overhead_s=st.floats(0, 10),
)
def test_fetching_so_many_is_not_slower(
    rate: float, token_bytes: int, link: float, overhead_s: float
) -> None:
    least = min_fetch_tokens(
        prefill_tokens_per_s=rate, token_bytes=token_bytes, link_bytes_per_s=link, overhead_s=overhead_s
    )
    if least is None:
        assert token_bytes / link >= 1 / rate
        return
    assert overhead_s + least * token_bytes / link <= least / rate * (1 + 1e-6)
    if least > 1:
        fewer = least - 1
        assert overhead_s + fewer * token_bytes / link >= fewer / rate * (1 - 1e-6)


RULE: dict[str, Any] = {"prefill_tokens_per_s": 500.0, "token_bytes": 46_080}


def test_the_one_with_most_is_not_the_best_by_a_slow_way() -> None:
    found = {
        # 2 s of computing for 1 s of 46 MB.
        "slow": CachedAt(1000, link_bytes_per_s=46_080_000, overhead_s=0.0),
        "fast": CachedAt(800, link_bytes_per_s=1e9, overhead_s=0.01),
    }
    assert best_source(found, **RULE) == "fast"
    assert best_source({"slow": found["slow"]}, **RULE) == "slow"


def test_what_has_to_be_put_back_first_costs_that() -> None:
    cached = CachedAt(100, link_bytes_per_s=1e9, overhead_s=0.0)
    kept = CachedAt(100, link_bytes_per_s=1e9, overhead_s=0.0, host_tokens=50, host_bytes_per_s=46_080_000)
    assert gain_s(cached, **RULE) - gain_s(kept, **RULE) == pytest.approx(0.05)


def test_a_busy_one_is_not_asked_for_little() -> None:
    assert best_source({"busy": CachedAt(100, link_bytes_per_s=1e9, overhead_s=0.3)}, **RULE) is None
    assert best_source({}, **RULE) is None


@given(
    tokens=st.integers(1, 10**5),
    link=st.floats(1e3, 1e12),
    overhead_s=st.floats(0, 10),
    rate=st.floats(1, 1e5),
    token_bytes=st.integers(1, 10**6),
)
def test_a_gain_is_where_the_least_number_of_tokens_is_reached(
    tokens: int, link: float, overhead_s: float, rate: float, token_bytes: int
) -> None:
    rule: dict[str, Any] = {"prefill_tokens_per_s": rate, "token_bytes": token_bytes}
    gained_s = gain_s(CachedAt(tokens, link, overhead_s), **rule)
    least = min_fetch_tokens(link_bytes_per_s=link, overhead_s=overhead_s, **rule)
    scale_s = overhead_s + tokens / rate + tokens * token_bytes / link
    if least is None or tokens < least:
        assert gained_s <= 1e-6 * scale_s
    else:
        assert gained_s >= -1e-6 * scale_s
