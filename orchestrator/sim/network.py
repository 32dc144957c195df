"""The way between processes: it takes time, loses connections, and can be cut. Pure.

A message is whole and in order or does not arrive, as on the streams of gRPC. What is sent between two hosts waits for what was
sent there before; a cut pair of hosts holds back what is sent until it is mended, as TCP does.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.sim.timers import SimTimers

Host = str


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """latency_s: of a message of no size, one way. jitter: its part that is random, 0 to 1. bytes_per_s: of one pair of hosts, each way."""

    latency_s: float = 200e-6
    jitter: float = 0.2
    bytes_per_s: float = 10e9


class SimNetwork:
    """Carries messages. rng: for the jitter alone."""

    def __init__(self, timers: SimTimers, shape: NetworkShape, rng: random.Random) -> None:
        self._timers = timers
        self._shape = shape
        self._rng = rng
        #: When the way from one host to another is free again, and when the last message arrives.
        self._free_at_s: dict[tuple[Host, Host], float] = {}
        self._last_at_s: dict[tuple[Host, Host], float] = {}
        self._cut: set[frozenset[Host]] = set()
        self._held: dict[
            frozenset[Host], list[tuple[Host, Host, int, Callable[..., Any], tuple[Any, ...]]]
        ] = {}

    def send(
        self, source: Host, target: Host, num_bytes: int, deliver: Callable[..., Any], *args: Any
    ) -> None:
        """Call deliver(*args) when the message has arrived."""
        pair = frozenset((source, target))
        if pair in self._cut:
            self._held.setdefault(pair, []).append((source, target, num_bytes, deliver, args))
            return
        way, now_s = (source, target), self._timers.time()
        begin_s = max(now_s, self._free_at_s.get(way, 0.0))
        self._free_at_s[way] = end_s = begin_s + num_bytes / self._shape.bytes_per_s
        arrive_s = end_s + self._shape.latency_s * (1 + self._shape.jitter * self._rng.random())
        # In order, whatever the jitter.
        arrive_s = max(arrive_s, self._last_at_s.get(way, 0.0))
        self._last_at_s[way] = arrive_s
        self._timers.call_at(arrive_s, deliver, *args)

    def is_cut(self, one: Host, other: Host) -> bool:
        """Nothing passes between them now."""
        return frozenset((one, other)) in self._cut

    def cut(self, one: Host, other: Host) -> None:
        """Hold back what they send each other from now on."""
        self._cut.add(frozenset((one, other)))

    def mend(self, one: Host, other: Host) -> None:
        """Let it pass, and what was held back first."""
        pair = frozenset((one, other))
        self._cut.discard(pair)
        for source, target, num_bytes, deliver, args in self._held.pop(pair, []):
            self.send(source, target, num_bytes, deliver, *args)
