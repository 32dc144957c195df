"""Turns to write to clients."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway.turns import Turns


def in_loop(scenario: object) -> None:
    asyncio.run(scenario)  # type: ignore[arg-type]


def test_who_comes_alone_waits_for_nobody() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        for _ in range(3):
            # Without giving the loop back.
            with pytest.raises(StopIteration):
                turns.take().send(None)
            await asyncio.sleep(0)

    in_loop(scenario())


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40))
def test_few_in_a_pass_and_all_soon(num: int, asking: list[tuple[int, bool]]) -> None:
    """asking: in which pass each asks, and whether it gives up in the next one."""

    async def scenario() -> None:
        turns = Turns(num)
        took: list[tuple[int, int]] = []
        number_of_pass = 0

        async def ask(number: int) -> None:
            await turns.take()
            took.append((number_of_pass, number))

        order: list[int] = []
        tasks: dict[int, asyncio.Task[None]] = {}
        given_up: set[int] = set()
        for number_of_pass in range(60):
            for number, (at, gives_up) in enumerate(asking):
                if at == number_of_pass:
                    order.append(number)
                    tasks[number] = asyncio.create_task(ask(number))
                if at + 1 == number_of_pass and gives_up and not tasks[number].done():
                    tasks[number].cancel()
                    given_up.add(number)
            await asyncio.sleep(0)
        assert all(task.done() for task in tasks.values())
        # One that gave up may have had its turn in the same pass.
        assert {number for _, number in took} | given_up == set(order)
        for at, number in took:
            # As many as asked before it, in passes of `num`; whose turn it is goes on in the next pass.
            assert at <= asking[number][0] + order.index(number) // num + 2
        # What is taken at once and what waited for the same turns falls into two passes as they are counted here.
        for one in range(60):
            assert sum(at in (one, one + 1) for at, _ in took) <= 3 * num

    in_loop(scenario())


def test_who_comes_alone_after_others_waits_for_nobody() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        await asyncio.gather(turns.take(), turns.take())
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(StopIteration):
            turns.take().send(None)

    in_loop(scenario())


def test_who_gave_up_takes_no_turn_from_others() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        await turns.take()
        waiting = [asyncio.create_task(turns.take()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        for _ in range(4):
            await asyncio.sleep(0)
        assert waiting[2].done()
        assert not waiting[2].cancelled()

    in_loop(scenario())
