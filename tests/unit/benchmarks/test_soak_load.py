"""The requests of the soak, and what it calls growth."""

import random

import pytest

from benchmarks.serving.soak_load import (
    MAX_PROMPT_TOKENS,
    MemorySample,
    RandomRequests,
    floors,
    growth_bytes_per_minute,
    left_behind,
)
from workers.api import (
    BlockCounts,
    DecodingMethod,
    Grammar,
    RequestId,
    RequestKey,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.submit_check import submit_problem

VOCAB_SIZE = 1000
TEXT = [i % VOCAB_SIZE for i in range(5000)]


def key(number: int) -> RequestKey:
    return RequestKey(RequestId(f"request-{number}"), 1)


def test_every_request_is_one_that_a_worker_takes() -> None:
    requests = RandomRequests(random.Random(1), TEXT)
    for i in range(500):
        submit = requests.next(key(i)).submit
        assert submit_problem(submit, VOCAB_SIZE) is None
        assert len(submit.token_ids) <= MAX_PROMPT_TOKENS


def test_all_kinds_come_up() -> None:
    requests = RandomRequests(random.Random(1), TEXT)
    many = [requests.next(key(i)) for i in range(300)]
    samplings = [request.submit.sampling for request in many]
    methods = {type(s.decoding) for s in samplings}
    assert methods == {type(None), *DecodingMethod.__args__}
    assert {s.grammar.kind for s in samplings if isinstance(s.grammar, Grammar)} == {
        "regex",
        "choice",
        "json_schema",
    }
    assert any(request.abort_after is not None for request in many)
    assert any(request.submit.timeout_s < 5 for request in many)
    beginnings = [request.submit.token_ids[:32] for request in many if len(request.submit.token_ids) > 64]
    assert len(set(beginnings)) < len(beginnings)


def test_one_seed_gives_one_series() -> None:
    one, other = (RandomRequests(random.Random(7), TEXT) for _ in range(2))
    assert [one.next(key(i)) for i in range(20)] == [other.next(key(i)) for i in range(20)]


@pytest.mark.parametrize("bytes_per_s", [0, 1000])
def test_growth_is_the_slope_and_a_peak_does_not_move_it(bytes_per_s: int) -> None:
    samples = [MemorySample(i, 10**9 + bytes_per_s * i) for i in range(600)]
    samples[300] = MemorySample(300, 2 * 10**9)
    assert growth_bytes_per_minute(samples) == pytest.approx(60 * bytes_per_s)


def test_nothing_grows_without_two_samples() -> None:
    assert growth_bytes_per_minute([]) == 0.0
    assert growth_bytes_per_minute([MemorySample(0.0, 5)]) == 0.0


@pytest.mark.parametrize(
    ("blocks", "num_leases", "expected"),
    [
        (BlockCounts(free=5, cached=4, in_use=0, leased=0, total=9), 0, []),
        (BlockCounts(free=5, cached=3, in_use=1, leased=0, total=9), 0, ["1 blocks in use"]),
        (BlockCounts(free=5, cached=3, in_use=0, leased=0, total=9), 2, ["2 leases", "1 lost blocks"]),
    ],
)
def test_an_idle_worker_has_nothing_but_free_and_cached_blocks(
    blocks: BlockCounts, num_leases: int, expected: list[str]
) -> None:
    status = WorkerStatus(
        WorkerId("w"), 1, frozenset(), WorkerState.READY, blocks=blocks, num_leases=num_leases
    )
    assert left_behind(status) == expected


def test_what_single_steps_take_is_no_growth_but_a_leak_under_it_is() -> None:
    busy = [
        MemorySample(float(t), 1000 + 7 * t + (5000 if t % 10 > 2 else 0) * (t // 60)) for t in range(600)
    ]
    assert len(floors(busy, 30.0)) == 20
    assert growth_bytes_per_minute(floors(busy, 30.0)) == pytest.approx(7 * 60, rel=0.05)
    # The last seconds say nothing of a period.
    assert floors([MemorySample(0.0, 5), MemorySample(29.5, 4), MemorySample(31.0, 9)], 30.0) == [
        MemorySample(29.5, 4)
    ]
    assert floors([MemorySample(0.0, 5)], 30.0) == [MemorySample(0.0, 5)]
