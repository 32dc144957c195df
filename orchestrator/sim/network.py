"""The way between processes: it takes time, and can be cut. Pure.

Messages are whole and in order, as on the streams of gRPC. What is sent between two hosts waits for what was
sent by the one and to the other before; a cut pair of hosts holds back what is sent until it is mended, as TCP does.
Between lossy hosts a message may be lost. What comes of that is the sender's to say, since gRPC loses no message of a stream alone: the
stream breaks, and a call that has one answer fails.
"""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.sim.timers import SimTimers

Host = str
GATEWAY: Host = "gateway"
#: Of its calls to the gateway alone; to workers it speaks from the gateway's host.
CONTROLLER: Host = "controller"
#: Until one end of a broken stream hears of it, in seconds: at the least and at the most.
BREAK_HEARD_S = (0.01, 0.5)
#: Of what a message to the gateway says of one request or block, in bytes.
EVENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """latency_s: of a message of no size, one way. jitter: its part that is random, 0 to 1.

    bytes_per_s: what a host sends, and what it receives, to and from all others together.
    """

    bytes_per_s: float
    latency_s: float = 200e-6
    jitter: float = 0.2


@dataclass(eq=False, slots=True)
class Stream:
    """Of gRPC. Once it is broken nothing passes it, either way, and each end hears of that by itself."""

    is_broken: bool = False
    #: Its server has heard, and takes nothing of it that was under way.
    is_closed: bool = False


@dataclass(slots=True)
class _Host:
    """When it can send again, and receive again."""

    sends_at_s: float = 0.0
    receives_at_s: float = 0.0


@dataclass(slots=True)
class Way:
    """From one host to another. last_at_s: when the last message arrives."""

    source: _Host
    target: _Host
    last_at_s: float = 0.0


class SimNetwork:
    """Carries messages. rng: for the jitter alone. loss_rng: for what is lost, and when that is heard of."""

    def __init__(
        self, timers: SimTimers, shape: NetworkShape, rng: random.Random, loss_rng: random.Random
    ) -> None:
        self._timers = timers
        self._bytes_per_s, self._latency_s, self._jitter = shape.bytes_per_s, shape.latency_s, shape.jitter
        self._random = rng.random
        self._loss_rng = loss_rng
        self.num_lost = 0
        self._hosts: dict[Host, _Host] = {}
        self._ways: dict[tuple[Host, Host], Way] = {}
        #: How often a pair was cut and not yet mended; those that are not cut are not in it.
        self._cut: Counter[frozenset[Host]] = Counter()
        #: Shares of messages that are lost, one for each reason; pairs that lose none are not in it.
        self._losses: dict[frozenset[Host], list[float]] = {}
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
            arrive_s = self.carry(self.way(source, target), self._timers.now_s, num_bytes)
            self._timers.call_at(arrive_s, deliver, *args)

    def way(self, source: Host, target: Host) -> "Way":
        """From the one to the other."""
        way = self._ways.get((source, target))
        if way is None:
            hosts = self._hosts
            way = Way(hosts.setdefault(source, _Host()), hosts.setdefault(target, _Host()))
            self._ways[source, target] = way
        return way

    def carry(self, way: "Way", now_s: float, num_bytes: int) -> float:
        """A message leaves now, between two that are not cut from each other; returns when it arrives."""
        source, target = way.source, way.target
        begin_s = now_s
        if source.sends_at_s > begin_s:
            begin_s = source.sends_at_s
        if target.receives_at_s > begin_s:
            begin_s = target.receives_at_s
        source.sends_at_s = target.receives_at_s = end_s = begin_s + num_bytes / self._bytes_per_s
        arrive_s = end_s + self._latency_s * (1 + self._jitter * self._random())
        # In order, whatever the jitter.
        if way.last_at_s > arrive_s:
            arrive_s = way.last_at_s
        way.last_at_s = arrive_s
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

    # Loss.

    def make_lossy(self, one: Host, other: Host, rate: float) -> None:
        """This share of what they send each other is lost from now on, 0 to 1, beside what is lost already."""
        self._losses.setdefault(frozenset((one, other)), []).append(rate)

    def make_sound(self, one: Host, other: Host, rate: float) -> None:
        """Undo one `make_lossy`."""
        pair = frozenset((one, other))
        self._losses[pair].remove(rate)
        if not self._losses[pair]:
            del self._losses[pair]

    def is_sound(self, one: Host, other: Host) -> bool:
        """All that they send each other now arrives, and is held back by nothing but what was sent before."""
        if not self._cut and not self._losses:
            return True
        pair = frozenset((one, other))
        return pair not in self._cut and pair not in self._losses

    def loses(self, one: Host, other: Host) -> bool:
        """Whether what passes between them now is lost; drawn for each message, and only where one may be."""
        rates = self._losses.get(frozenset((one, other))) if self._losses else None
        if rates is None:
            return False
        kept = math.prod(1 - rate for rate in rates)
        is_lost = self._loss_rng.random() >= kept
        self.num_lost += is_lost
        return is_lost

    def break_heard_s(self) -> float:
        """How long one end of a stream that breaks now does not know it, in seconds."""
        return self._loss_rng.uniform(*BREAK_HEARD_S)
