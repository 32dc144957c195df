"""Clients that ask one question after the other, and what they saw."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from benchmarks.serving.load_records import Record

#: (prompt, number of new tokens) -> the new tokens as they come, message by message, greedily, past any end token.
Stream = Callable[[Sequence[int], int], AsyncIterator[Sequence[int]]]


async def ask(stream: Stream, prompt: Sequence[int], num_tokens: int) -> Record:
    """One request. Raises RuntimeError when it brings another number of tokens."""
    began_s = time.perf_counter()
    token_ids: list[int] = []
    times_s: list[float] = []
    async for new in stream(prompt, num_tokens):
        token_ids += new
        times_s += [time.perf_counter()] * len(new)
    if len(token_ids) != num_tokens:
        raise RuntimeError(f"asked for {num_tokens} tokens, got {len(token_ids)}")
    return Record(len(prompt), began_s, tuple(token_ids), tuple(times_s))


async def closed_loop(
    stream: Stream, prompts: Sequence[Sequence[int]], *, concurrency: int, num_tokens: int
) -> list[Record]:
    """Each prompt once, in order, by so many clients: one starts its next request when its last one has ended."""
    waiting = iter(prompts)
    records: list[Record] = []

    async def client() -> None:
        # Shared by the clients: each takes the next one when its last has ended.
        records.extend([await ask(stream, prompt, num_tokens) for prompt in waiting])

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return records
