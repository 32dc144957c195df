"""Simulated time: what is to happen, in order. Pure."""

import heapq
from collections.abc import Callable
from typing import Any


class SimTimer:
    """One thing that is to happen. Implements gateway.links.Timer."""

    __slots__ = ("args", "callback", "is_cancelled")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.callback = callback
        self.args = args
        self.is_cancelled = False

    def cancel(self) -> None:
        """It does not happen, and keeps nothing alive that it would have been about."""
        self.is_cancelled = True
        self.callback, self.args = _nothing, ()


def _nothing() -> None:
    """What was to happen."""


class SimTimers:
    """The only clock of a simulation, from 0 s. Implements gateway.links.Timers.

    What is due at the same time happens in the order in which it was asked for.
    """

    def __init__(self) -> None:
        self.num_events = 0
        self._now_s = 0.0
        self._number = 0
        self._heap: list[tuple[float, int, SimTimer]] = []

    def time(self) -> float:
        """Now, in seconds."""
        return self._now_s

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        """Call this then; at once, after all else that is due now, when that is over."""
        timer = SimTimer(callback, args)
        self._number += 1
        heapq.heappush(self._heap, (max(when, self._now_s), self._number, timer))
        return timer

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        """Call this after so many seconds."""
        return self.call_at(self._now_s + delay, callback, *args)

    def run_next(self, until_s: float) -> bool:
        """Let the next thing happen; False, and nothing does, when it is due after `until_s` or there is none."""
        while self._heap:
            when, _, timer = self._heap[0]
            if timer.is_cancelled:
                heapq.heappop(self._heap)
                continue
            if when > until_s:
                return False
            heapq.heappop(self._heap)
            self._now_s = when
            self.num_events += 1
            timer.callback(*timer.args)
            return True
        return False


class HeedfulTimers:
    """The same clock for somebody who heeds `before` before whatever it does at a time of its own. Implements gateway.links.Timers."""

    def __init__(self, timers: SimTimers, before: Callable[[], None]) -> None:
        self._timers = timers
        self._before = before
        self.time = timers.time

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        """See SimTimers."""
        return self._timers.call_at(when, self._call, callback, args)

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        """See SimTimers."""
        return self.call_at(self._timers.time() + delay, callback, *args)

    def _call(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._before()
        callback(*args)
