"""ByteBudget: never more than its bytes, first come first served, and nothing is lost when somebody gives up."""

import asyncio

import pytest

from tests.support.waiting import in_loop
from workers.embeddings.byte_budget import ByteBudget


class Holders:
    """Each takes its bytes and keeps them until it is let go."""

    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.order: list[str] = []
        self._doors: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, num_bytes: int) -> None:
        self._doors[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, num_bytes))
        await settle()

    async def leave(self, name: str) -> None:
        self._doors[name].set()
        await self.tasks[name]
        await settle()

    async def _hold(self, name: str, num_bytes: int) -> None:
        async with self.budget.take(num_bytes):
            self.order.append(name)
            await self._doors[name].wait()


async def settle() -> None:
    """Whoever can go on does."""
    for _ in range(5):
        await asyncio.sleep(0)


@in_loop
async def test_a_small_one_does_not_pass_a_large_one_that_waits() -> None:
    holders = Holders(ByteBudget(10))
    for name, num_bytes in (("a", 6), ("b", 8), ("c", 1)):
        await holders.come(name, num_bytes)
    assert (holders.order, holders.budget.used_bytes) == (["a"], 6)
    await holders.leave("a")
    assert (holders.order, holders.budget.used_bytes) == (["a", "b", "c"], 9)
    for name in "bc":
        await holders.leave(name)
    assert holders.budget.used_bytes == 0


@in_loop
async def test_one_larger_than_all_of_it_is_alone() -> None:
    holders = Holders(ByteBudget(10))
    for name, num_bytes in (("a", 1), ("b", 1000), ("c", 1)):
        await holders.come(name, num_bytes)
    assert holders.order == ["a"]
    await holders.leave("a")
    assert holders.order == ["a", "b"]
    await holders.leave("b")
    assert holders.order == ["a", "b", "c"]
    await holders.leave("c")


@in_loop
async def test_who_gives_up_leaves_no_bytes_behind() -> None:
    holders = Holders(ByteBudget(10))
    for name in "abc":
        await holders.come(name, 10)
    for name in "ba":
        holders.tasks[name].cancel()
        # c is let in, and cancelled before it runs.
        if name == "a":
            await asyncio.sleep(0)
            holders.tasks["c"].cancel()
    for task in holders.tasks.values():
        with pytest.raises(asyncio.CancelledError):
            await task
    assert holders.budget.used_bytes == 0
    await holders.come("d", 10)
    assert holders.order[-1] == "d"
    await holders.leave("d")
