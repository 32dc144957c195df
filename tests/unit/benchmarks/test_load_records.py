"""What the engine benchmark makes of the times it saw, and the prompts it cuts."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from benchmarks.serving.closed_loop import ask, closed_loop
from benchmarks.serving.load_records import Record, distinct_windows, num_equal, summarise


def record(began_s: float, *token_times_s: float) -> Record:
    return Record(512, began_s, tuple(range(len(token_times_s))), token_times_s)


def test_rates_go_from_the_first_begin_to_the_last_token() -> None:
    summary = summarise([record(10.0, 11.0, 12.0), record(10.5, 13.0, 14.0)])
    assert summary.num_requests == 2
    assert summary.output_tokens_per_s == 4 / 4
    assert summary.total_tokens_per_s == (4 + 1024) / 4


def test_times_are_of_each_request_alone() -> None:
    summary = summarise([record(0.0, 1.0, 1.5, 4.0), record(0.0, 3.0, 3.1, 3.2)])
    assert (summary.ttft_p50_s, summary.ttft_max_s) == (2.0, 3.0)
    assert summary.tpot_p50_s == pytest.approx((1.5 + 0.1) / 2)
    assert summary.tpot_max_s == pytest.approx(1.5)
    assert summary.worst_gap_s == 2.5


def test_tokens_are_counted_up_to_the_first_difference() -> None:
    assert num_equal([1, 2, 3], [1, 2, 3]) == 3
    assert num_equal([1, 9, 3], [1, 2, 3]) == 1
    assert num_equal([1, 2], [1, 2, 3]) == 2


def test_windows_that_begin_alike_are_left_out() -> None:
    text = [1, 2, 3, 1, 2, 9, 4, 5, 6, 7]
    windows = distinct_windows(text, num_tokens=3, num_windows=2, num_distinct=2)
    assert windows == [[1, 2, 3], [4, 5, 6]]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 different pieces of 3 tokens, not 2"):
        distinct_windows([1, 2, 3, 4, 5], num_tokens=3, num_windows=2, num_distinct=1)


def test_so_many_clients_ask_at_once_and_every_prompt_is_asked_once() -> None:
    asked: list[int] = []
    num_open, most_open = 0, 0

    async def stream(prompt: Sequence[int], num_tokens: int) -> AsyncIterator[Sequence[int]]:
        nonlocal num_open, most_open
        asked.append(prompt[0])
        num_open += 1
        most_open = max(most_open, num_open)
        for i in range(num_tokens):
            await asyncio.sleep(0)
            yield [i]
        num_open -= 1

    records = asyncio.run(closed_loop(stream, [[i] for i in range(7)], concurrency=3, num_tokens=2))
    assert asked == list(range(7))
    assert most_open == 3
    assert [r.token_ids for r in records] == [(0, 1)] * 7
    assert all(len(r.token_times_s) == 2 for r in records)


def test_a_stream_that_brings_too_few_tokens_is_an_error() -> None:
    async def stream(prompt: Sequence[int], num_tokens: int) -> AsyncIterator[Sequence[int]]:
        yield [1]

    with pytest.raises(RuntimeError, match="asked for 2 tokens, got 1"):
        asyncio.run(ask(stream, [1], 2))
