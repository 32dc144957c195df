"""Ctrl-C ends a coroutine wherever it is."""

import asyncio
import os
import signal

import pytest

from orchestrator import interruptible


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_result_is_returned_and_the_handler_put_back() -> None:
    async def scenario() -> int:
        return 7

    before = signal.getsignal(signal.SIGINT)
    assert interruptible.run(scenario()) == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_cancels_what_waits_and_lets_it_clean_up() -> None:
    events: list[str] = []

    async def scenario() -> None:
        try:
            interrupt()
            await asyncio.Event().wait()
        finally:
            events.append("cleaned up")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interruptible.run(scenario())
    assert events == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_loop_is_woken_by_the_signal_itself() -> None:
    async def wakeup_fd() -> int:
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
        return fd

    # Without one, a signal that comes just before the loop waits is noticed at its next event only.
    assert interruptible.run(wakeup_fd()) != -1


def test_ctrl_c_is_not_lost_when_the_coroutine_ends_all_the_same() -> None:
    async def scenario() -> int:
        interrupt()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return 7

    with pytest.raises(KeyboardInterrupt):
        interruptible.run(scenario())


def test_errors_and_cancellations_of_the_coroutine_go_through() -> None:
    async def failing() -> None:
        raise LookupError

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(LookupError):
        interruptible.run(failing())
    with pytest.raises(asyncio.CancelledError):
        interruptible.run(cancelled())
