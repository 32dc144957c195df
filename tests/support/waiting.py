"""Waiting for what another task or thread does, with a bound."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import ParamSpec

#: Far above what any wait of a test takes on a busy machine.
BOUND_S = 30.0
#: The same where a process may start meanwhile, which loads all that a worker needs.
PROCESS_BOUND_S = 120.0
POLL_S = 0.005
Args = ParamSpec("Args")


def in_loop(test: Callable[Args, Coroutine[None, None, None]]) -> Callable[Args, None]:
    """A test that is a coroutine, run to its end."""

    @wraps(test)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], bool], what: str, bound_s: float = BOUND_S) -> None:
    """Return once `condition` holds; fail and name `what` when it does not come true in time."""
    give_up_s = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < give_up_s, f"waited {bound_s:g} s in vain for: {what}"
        await asyncio.sleep(POLL_S)


def until_in_thread(condition: Callable[[], bool], what: str) -> None:
    """The same where there is no loop: what is waited for is the doing of other threads, or of processes."""
    give_up_s = time.monotonic() + PROCESS_BOUND_S
    while not condition():
        assert time.monotonic() < give_up_s, f"waited {PROCESS_BOUND_S:g} s in vain for: {what}"
        time.sleep(POLL_S)
