"""The way between processes: it takes time, and can be cut. Pure.

Messages are whole and in order, as on the streams of gRPC. What is sent between two hosts waits for what was
sent by the one and to the other before; a cut pair of hosts holds back what is sent until it is mended, as TCP does.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.sim.timers import SimTimers

Host = str


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """latency_s: of a message of no size, one way. jitter: its part that is random, 0 to 1.

    bytes_per_s: what a host sends, and what it receives, to and from all others together.
    """

    bytes_per_s: float
    latency_s: float = 200e-6
    jitter: float = 0.2


class SimNetwork:
    """Carries messages. rng: for the jitter alone."""

    def __init__(self, timers: SimTimers, shape: NetworkShape, rng: random.Random) -> None:
        self._timers = timers
        self._shape = shape
        self._rng = rng
        #: When a host can send again, and receive again, and when the last message from one to another arrives.
        self._sends_at_s: dict[Host, float] = {}
        self._receives_at_s: dict[Host, float] = {}
        self._last_at_s: dict[tuple[Host, Host], float] = {}
        #: How often a pair was cut and not yet mended; those that are not cut are not in it.
        self._cut: Counter[frozenset[Host]] = Counter()
        self._held: dict[
            frozenset[Host], list[tuple[Host, Host, int, Callable[..., Any], tuple[Any, ...]]]
        ] = {}

    def send(
        self, source: Host, target: Host, num_bytes: int, deliver: Callable[..., Any], *args: Any
    ) -> None:
        """Call deliver(*args) when the message has arrived."""
        if self.is_cut(source, target):
            held = self._held.setdefault(frozenset((source, target)), [])
            held.append((source, target, num_bytes, deliver, args))
        else:
            self._timers.call_at(self.carry(source, target, num_bytes), deliver, *args)

    def carry(self, source: Host, target: Host, num_bytes: int) -> float:
        """A message leaves now, between two that are not cut from each other; returns when it arrives."""
        way, now_s = (source, target), self._timers.time()
        begin_s = max(now_s, self._sends_at_s.get(source, 0.0), self._receives_at_s.get(target, 0.0))
        end_s = begin_s + num_bytes / self._shape.bytes_per_s
        self._sends_at_s[source] = self._receives_at_s[target] = end_s
        arrive_s = end_s + self._shape.latency_s * (1 + self._shape.jitter * self._rng.random())
        # In order, whatever the jitter.
        arrive_s = max(arrive_s, self._last_at_s.get(way, 0.0))
        self._last_at_s[way] = arrive_s
        return arrive_s

    def is_cut(self, one: Host, other: Host) -> bool:
        """Nothing passes between them now."""
        return bool(self._cut) and frozenset((one, other)) in self._cut

    def cut(self, one: Host, other: Host) -> None:
        """Hold back what they send each other from now on."""
        self._cut[frozenset((one, other))] += 1

    def mend(self, one: Host, other: Host) -> None:
        """One cut less; after the last one it passes, what was held back first."""
        pair = frozenset((one, other))
        self._cut[pair] -= 1
        if self._cut[pair]:
            return
        del self._cut[pair]
        for source, target, num_bytes, deliver, args in self._held.pop(pair, []):
            self.send(source, target, num_bytes, deliver, *args)
