"""Prompts and tiles of pictures that wait on one device of a coarse simulation, in the order of a policy. Pure."""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.control.policies.policy import Order, WorkerLoad
from orchestrator.sim.coarse_costs import CoarseCosts
from orchestrator.sim.coarse_request import Live
from workers.step_choice import Head

#: What of requests one step computes: tokens or tiles of each.
Parts = list[tuple[Live, int]]
#: A prompt behind its key and its number, which differs, so that prompts are never compared.
Entry = tuple[float, int, Live]


@dataclass(slots=True)
class Front:
    """A step of prompts and pictures. num_decodes: that are in it; is_beside: decodes go on meanwhile."""

    chunks: Parts
    tiles: Parts
    num_decodes: int
    is_beside: bool

    def seconds(self, costs: CoarseCosts, decode_context: int) -> float:
        """On the whole device."""
        step_s = 0.0
        if self.tiles:
            step_s = costs.encode_overhead_s + costs.tile_s * sum(num for _, num in self.tiles)
            if not self.chunks and not self.num_decodes:
                return step_s
        num_tokens, pairs = 0, 0.0
        for live, size in self.chunks:
            num_tokens += size
            pairs += size * (live.job.num_done + (size + 1) / 2)
        context = decode_context if self.num_decodes else 0
        return step_s + costs.step.step_s(self.num_decodes, context, num_tokens, pairs)


@dataclass(slots=True)
class FrontQueue:
    """load: of the device. may_begin: whether a prompt that has not begun has place and memory now; begin: it takes them."""

    order: Order
    load: WorkerLoad
    attention_tokens: float
    may_begin: Callable[[Live], bool]
    begin: Callable[[Live], None]
    #: By key, the number for equal ones.
    _waiting: list[Entry] = field(default_factory=list)
    _begun: list[Entry] = field(default_factory=list)
    _tiles: list[tuple[float, int, Live, int]] = field(default_factory=list)
    #: What its order was asked with last (when, and the decodes then), and what it said; None since the prompts have changed.
    _ordered: tuple[tuple[float, int, int], list[Entry]] | None = None

    @property
    def has_prompts(self) -> bool:
        """Some wait, or have begun and are not in a step."""
        return bool(self._waiting or self._begun)

    @property
    def has_tiles(self) -> bool:
        """Some wait."""
        return bool(self._tiles)

    def add(self, live: Live) -> None:
        """A prompt, or what is left of it."""
        prompts = self._begun if live.job.is_begun else self._waiting
        self.order.waits(live.job)
        self._ordered = None
        insort(prompts, (self.order.key(live.job), live.number, live))

    def add_tiles(self, live: Live, num_tiles: int) -> None:
        """Of the pictures of a request."""
        heapq.heappush(self._tiles, (self.order.key(live.job), live.number, live, num_tiles))

    def take_waiting(self) -> tuple[list[Live], Parts]:
        """Give away the prompts that have not begun, and all tiles."""
        away = [live for _, _, live in self._waiting]
        for live in away:
            self.order.leaves(live.job)
        tiles = [(live, num) for _, _, live, num in self._tiles]
        self._waiting, self._tiles, self._ordered = [], [], None
        return away, tiles

    def head(self, now_s: float, num_tiles: int) -> Head | None:
        """What may begin; None for nothing. num_tiles: that wait."""
        live = next((entry[2] for entry in self._first_to_last(now_s)), None)
        if live is None and not self._tiles:
            return None
        num_left, num_done, deadline_s = 0, 0, math.inf
        if live is not None:
            job = live.job
            num_left, num_done, deadline_s = job.num_left, job.num_done, job.deadline_s
        if not self._tiles:
            return Head(0, num_left, num_done, deadline_s, math.inf)
        return Head(num_tiles, num_left, num_done, deadline_s, self._tiles[0][2].job.deadline_s)

    def take_tiles(self, budget: int) -> Parts:
        """The first, as many as the budget has."""
        found = []
        while self._tiles and budget > 0:
            key, number, live, num_tiles = heapq.heappop(self._tiles)
            taken = min(num_tiles, budget)
            budget -= taken
            found.append((live, taken))
            if taken < num_tiles:
                heapq.heappush(self._tiles, (key, number, live, num_tiles - taken))
        return found

    def take_chunks(self, now_s: float, num_tokens: int) -> Parts:
        """Of the first prompts, as far as the budget reaches; one late in its prompt costs more, as in the engine's scheduler."""
        found: Parts = []
        budget = float(num_tokens)
        taken: list[Entry] = []
        for entry in self._first_to_last(now_s):
            if budget < 1:
                break
            live = entry[2]
            job = live.job
            taken.append(entry)
            if not job.is_begun:
                self.begin(live)
            rate = 1 + job.num_done / self.attention_tokens
            size = min(job.num_left, max(1, int(budget / rate)))
            budget -= size * rate
            found.append((live, size))
        self._ordered = None
        for entry in taken:
            job = entry[2].job
            prompts = self._begun if job.is_begun else self._waiting
            del prompts[bisect_left(prompts, entry)]
            job.is_begun = True
        return found

    def _first_to_last(self, now_s: float) -> Iterator[Entry]:
        """Who has begun or may begin; where the first that has not may not, none that has not."""
        is_blocked = False
        for entry in self._in_order(now_s):
            live = entry[2]
            if live.job.is_begun:
                yield entry
            elif not is_blocked:
                if self.may_begin(live):
                    yield entry
                else:
                    is_blocked = True

    def _in_order(self, now_s: float) -> list[Entry]:
        """All, as the order has them now. It is asked once for a step."""
        asked = now_s, self.load.num_decoding, self.load.decode_context
        if self._ordered is not None and self._ordered[0] == asked:
            return self._ordered[1]
        # Two runs that are in order each, which sorting sees.
        entries = (
            sorted(self._waiting + self._begun)
            if self._waiting and self._begun
            else [*self._waiting, *self._begun]
        )
        if len(entries) > 1 and (
            ranks := self.order.ranks(now_s, [one[2].job for one in entries], self.load)
        ):
            entries = [entry for _, entry in sorted(zip(ranks, entries, strict=True))]
        self._ordered = asked, entries
        return entries
