"""Simulated time: what is to happen, in order. Pure."""

from collections.abc import Callable
from heapq import heappop, heappush, heapreplace
from math import inf
from typing import Any


class SimTimer(list[Any]):
    """One thing that is to happen: when, its number, what is called and with what. Implements gateway.links.Timer.

    A list, since those are ordered without a call: millions of them pass the heap.
    """

    __slots__ = ()

    def cancel(self) -> None:
        """It does not happen, and keeps nothing alive that it would have been about."""
        self[2] = self[3] = None


class SimTimers:
    """The only clock of a simulation, from 0 s. Implements gateway.links.Timers.

    What is due at the same time happens in the order in which it was asked for.
    """

    def __init__(self) -> None:
        self.num_events = 0
        #: What `time` says.
        self.now_s = 0.0
        self._number = 0
        self._heap: list[SimTimer] = []
        #: What happens again and again; see `repeat_at`.
        self._repeated: list[SimTimer] = []

    def time(self) -> float:
        """Now, in seconds."""
        return self.now_s

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        """Call this then; at once, after all else that is due now, when that is over."""
        self._number += 1
        now_s = self.now_s
        timer = SimTimer((when if when > now_s else now_s, self._number, callback, args))
        heappush(self._heap, timer)
        return timer

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        """Call this after so many seconds."""
        return self.call_at(self.now_s + delay, callback, *args)

    def repeat_at(self, when: float, callback: Callable[[float], float]) -> None:
        """Call this then, with the time, and again at each time that it returns, until it returns infinity.

        For what happens more often than all else: it costs no timer of its own.
        """
        self._number += 1
        heappush(self._repeated, SimTimer((when, self._number, callback)))

    def run_next(self, until_s: float) -> bool:
        """Let the next thing happen, after all before it that is repeated; False when it is due after `until_s` or there is none."""
        heap = self._heap
        while heap and heap[0][2] is None:
            heappop(heap)
        if self._repeated:
            self._repeat(until_s)
        if not heap or heap[0][0] > until_s:
            return False
        when, _, callback, args = heappop(heap)
        if callback is not None:
            self.now_s = when
            self.num_events += 1
            callback(*args)
        return True

    def _repeat(self, until_s: float) -> None:
        """What is repeated, until something else is the next."""
        heap, repeated = self._heap, self._repeated
        while repeated:
            timer = repeated[0]
            when = timer[0]
            if (heap and heap[0] < timer) or when > until_s:
                return
            self.now_s = when
            self.num_events += 1
            again_s = timer[2](when)
            if again_s == inf:
                heappop(repeated)
            else:
                self._number = timer[1] = self._number + 1
                timer[0] = again_s
                heapreplace(repeated, timer)


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
