"""Tokens that have come to the gateway, and that it is told of when somebody looks at their request. Pure.

One token more changes nothing at a gateway but its own request, so it is the same whether it is told of each at its time, or of all
of them later with the times at which they came. So it is with some other events.
"""

from bisect import bisect_right
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from orchestrator.control.observation import ProcessKey
from orchestrator.sim.leap import Leap, tokens_of
from workers.api import PrefillStarted, RequestId, RequestKey, TokensGenerated
from workers.engine.messages import TokensDecoded

#: What changes no more than its request either. KV that has come does: room was promised for it.
Calm = PrefillStarted


@dataclass(slots=True)
class _Stretch:
    """Tokens of one attempt at a request, one after the other, that one process has sent, or sends in a leap.

    times_s: when each came, or comes. num_taken: steps of the leap whose tokens are among them.
    """

    key: RequestKey
    process: ProcessKey
    begin: int
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    num_read: int = 0
    leap: Leap | None = None
    index: int = 0
    num_taken: int = 0

    def take(self, num_steps: int) -> None:
        """Of its leap, the tokens of the first so many steps."""
        leap, first = self.leap, self.num_taken
        assert leap is not None
        if num_steps == first:
            return
        start = leap.starts[self.index]
        # Where the engine has them already, they need not be made.
        new = leap.plan.decodes[self.index].token_ids[start + first : start + num_steps]
        if len(new) < num_steps - first:
            new = tokens_of(self.key.request_id, start + first, start + num_steps)
        self.token_ids += new
        self.times_s += leap.arrivals_s[first:num_steps]
        self.num_taken = num_steps


@dataclass(frozen=True, slots=True)
class _Said:
    """Another event of that kind, and when it comes."""

    process: ProcessKey
    event: Calm
    at_s: float


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of now. times_s: when each of its tokens came; of what has none, when it came."""

    process: ProcessKey
    event: TokensGenerated | Calm
    times_s: SequenceOf[float]


class UnreadTokens:
    """Of all requests of a gateway."""

    def __init__(self) -> None:
        #: In the order in which they were sent; more than one where a request has changed its process.
        self._stretches: dict[RequestId, list[_Stretch | _Said]] = {}
        self._leaps: dict[ProcessKey, list[_Stretch]] = {}

    def add(self, process: ProcessKey, decoded: TokensDecoded, arrive_s: float) -> None:
        """One more token for each of these will come then."""
        for key, token_id, position in zip(decoded.keys, decoded.token_ids, decoded.positions, strict=True):
            stretch = self._stretch(process, key, position)
            stretch.token_ids.append(token_id)
            stretch.times_s.append(arrive_s)

    def say(self, process: ProcessKey, event: Calm, arrive_s: float) -> None:
        """This will come then."""
        self._stretches.setdefault(event.key.request_id, []).append(_Said(process, event, arrive_s))

    def begin_leap(self, process: ProcessKey, leap: Leap) -> None:
        """Its tokens will come."""
        found = []
        for index, sequence in enumerate(leap.plan.decodes):
            stretch = self._stretch(process, sequence.key, leap.starts[index])
            stretch.leap, stretch.index, stretch.num_taken = leap, index, 0
            found.append(stretch)
        self._leaps[process] = found

    def end_leap(self, process: ProcessKey) -> None:
        """No more tokens of its present leap will come than those of the steps that are done."""
        for stretch in self._leaps.pop(process, ()):
            assert stretch.leap is not None
            stretch.take(stretch.leap.num_done)
            stretch.leap = None

    def forget(self, process: ProcessKey) -> None:
        """What it has sent and has not come by now never comes."""
        for request_id, stretches in list(self._stretches.items()):
            left = [one for one in stretches if one.process != process]
            if left:
                self._stretches[request_id] = left
            else:
                del self._stretches[request_id]

    def request_ids(self) -> list[RequestId]:
        """Those that may have some."""
        return list(self._stretches)

    def read(self, request_id: RequestId, now_s: float) -> list[Told]:
        """What has come of a request by now since the last time. The first of a stretch comes by itself, since a gateway notes when it came."""
        stretches = self._stretches.get(request_id)
        if stretches is None:
            return []
        found = []
        left: list[_Stretch | _Said] = []
        for stretch in stretches:
            if isinstance(stretch, _Said):
                if stretch.at_s <= now_s:
                    found.append(Told(stretch.process, stretch.event, (stretch.at_s,)))
                else:
                    left.append(stretch)
                continue
            if stretch.leap is not None:
                stretch.take(bisect_right(stretch.leap.arrivals_s, now_s))
            first, end = stretch.num_read, bisect_right(stretch.times_s, now_s)
            stretch.num_read = end
            if first == 0 and end > 1:
                found.append(_told(stretch, 0, 1))
                first = 1
            if first < end:
                found.append(_told(stretch, first, end))
            if stretch.leap is not None or end < len(stretch.times_s):
                left.append(stretch)
        if left:
            self._stretches[request_id] = left
        else:
            del self._stretches[request_id]
        return found

    def coming_s(self, request_id: RequestId, now_s: float) -> set[float]:
        """When tokens of it come that are on their way."""
        found = set[float]()
        for stretch in self._stretches.get(request_id, ()):
            if isinstance(stretch, _Said):
                found.add(stretch.at_s)
                continue
            found.update(stretch.times_s)
            if stretch.leap is not None:
                found.update(stretch.leap.arrivals_s)
        return {at_s for at_s in found if at_s > now_s}

    def _stretch(self, process: ProcessKey, key: RequestKey, position: int) -> _Stretch:
        """That which goes on with this position."""
        stretches = self._stretches.setdefault(key.request_id, [])
        if stretches:
            last = stretches[-1]
            if (
                isinstance(last, _Stretch)
                and last.leap is None
                and last.key == key
                and last.process == process
                and position == last.begin + len(last.token_ids)
            ):
                return last
        stretch = _Stretch(key, process, position)
        stretches.append(stretch)
        return stretch


def _told(stretch: _Stretch, first: int, end: int) -> Told:
    token_ids = tuple(stretch.token_ids[first:end])
    event = TokensGenerated(stretch.key, token_ids, stretch.begin + first)
    return Told(stretch.process, event, stretch.times_s[first:end])
