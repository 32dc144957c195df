"""Running a coroutine so that Ctrl-C always ends it."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Like `asyncio.run`, in the main thread: Ctrl-C cancels `coroutine`, then KeyboardInterrupt is raised.

    `asyncio.run` alone can miss it: its handler does not wake a loop that is about to wait, and where a
    gateway has stalled nothing else does. A handler of the loop writes to a pipe that the loop waits for.
    """
    was_interrupted = False

    async def supervised() -> Result:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal was_interrupted
            was_interrupted = True
            task.cancel()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            return await coroutine
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    try:
        result = asyncio.run(supervised())
    except asyncio.CancelledError:
        if was_interrupted:
            raise KeyboardInterrupt from None
        raise
    if was_interrupted:
        raise KeyboardInterrupt
    return result
