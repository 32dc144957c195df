"""Which phases workers serve, by how busy each phase would be. Pure.

A phase asks for so many workers: its work of a second over what one worker does in one. Workers that serve several phases go
where they are needed, so of any phases S together no more can be done than the workers do that serve one of them, and that is the only
limit (Hall's theorem, as a flow). The load of a shape is the largest of asked(S) / workers(S); goodput is what makes it 1. Workers are moved
while that falls by enough to pay for the move: while they move they serve nothing, which is short where their process goes on, and long
where another one has to load other weights.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations

from orchestrator.control.policies.policy import (
    FIRST_SWITCH_COST,
    ClusterLoad,
    Switch,
    SwitchCost,
    Totals,
    WorkerLoad,
)
from orchestrator.control.slo import Slo
from workers.api import Phase, PhaseSet
from workers.step_cost import StepCost

#: Every set of phases, none left out.
SUBSETS: tuple[PhaseSet, ...] = tuple(
    frozenset(one) for one in chain.from_iterable(combinations(Phase, size) for size in (1, 2, 3))
)


@dataclass(frozen=True, slots=True)
class PhaseSetsConfig:
    """allowed: sets that a worker may serve. floors: workers that a phase keeps whatever happens, also while others move.

    busy: load from which on a move is thought of. gain: part by which it must fall, on average over horizon_s, in whose first part those
    that move serve nothing. memory_s: after which a rate that was seen counts for
    a third. drain_s: in which a queue is to be worked off. cooldown_s: between moves, or as long as the last one took. settle_s: after a
    move has been made its effect is looked at, whether others followed or not; one that did harm is taken back and not tried again for blocked_s. batch: part of all
    workers that one tick may move.
    """

    slo: Slo
    cost: StepCost
    tile_s: float
    allowed: tuple[PhaseSet, ...]
    floors: Mapping[Phase, int] = field(default_factory=lambda: {Phase.PREFILL: 1, Phase.DECODE: 1})
    switch_cost: SwitchCost = FIRST_SWITCH_COST
    busy: float = 0.7
    gain: float = 0.05
    horizon_s: float = 30.0
    memory_s: float = 5.0
    drain_s: float = 4.0
    cooldown_s: float = 2.0
    settle_s: float = 8.0
    blocked_s: float = 60.0
    batch: float = 1 / 16


@dataclass(frozen=True, slots=True)
class Asked:
    """Workers that each phase would keep busy."""

    encode: float
    prefill: float
    decode: float

    def of(self, phases: PhaseSet) -> float:
        """Of these together."""
        return (
            (self.encode if Phase.ENCODE in phases else 0.0)
            + (self.prefill if Phase.PREFILL in phases else 0.0)
            + (self.decode if Phase.DECODE in phases else 0.0)
        )


Shape = Mapping[PhaseSet, int]


def load_of(shape: Shape, asked: Asked) -> float:
    """The load of the phases that are busiest; infinity when some are asked for and served by nobody."""
    worst = 0.0
    for phases in SUBSETS:
        wanted = asked.of(phases)
        if wanted > 1e-9:
            num = sum(count for one, count in shape.items() if one & phases)
            worst = max(worst, wanted / num if num else float("inf"))
    return worst


@dataclass(frozen=True, slots=True)
class _Move:
    source: PhaseSet
    target: PhaseSet

    @property
    def back(self) -> "_Move":
        return _Move(self.target, self.source)


@dataclass(frozen=True, slots=True)
class _Done:
    """A move of num workers, and what was before it. at_s, totals: when it was asked for, then as of the last look at which it was not done yet."""

    move: _Move
    num: int
    begun_at_s: float
    at_s: float
    load: float
    met_before: float
    #: Requests that finished in a second.
    rate_before: float
    totals: Totals


class PhaseSets:
    """One cluster's. `tick` is what the protocol asks for.

    taken_over_at_s: when it comes to a cluster that serves, as a new controller does: it knows none of the rates, takes the mean of what it sees until
    that is enough, and moves nobody for a cooldown. None at the beginning of a cluster, before which all rates were 0.
    """

    def __init__(self, config: PhaseSetsConfig, taken_over_at_s: float | None = None) -> None:
        self._config = config
        self._seen: tuple[float, Totals] | None = None
        #: For how long rates have been followed, as far as that counts.
        self._followed_s = config.memory_s if taken_over_at_s is None else 0.0
        #: Of pictures and of prompts, that come. What they take may be learnt later.
        self._tiles_per_s = self._tokens_per_s = 0.0
        self._met = 1.0
        #: Requests that finish in a second; None before any look at two moments.
        self._rate: float | None = None
        #: Moves whose effect has not been looked at, by time.
        self._made: list[_Done] = []
        #: What was done last, a move or a reversal, until it has settled.
        self._latest: _Done | None = None
        self._next_at_s = 0.0 if taken_over_at_s is None else taken_over_at_s + config.cooldown_s
        self._blocked: dict[_Move, float] = {}
        #: As of the last look; None before there are two.
        self.load: float | None = None
        self._asked_for: tuple[Shape, Asked] | None = None

    def one_more(self) -> PhaseSet | None:
        """What a worker would serve that came now: after which the load were least. None before there are two looks."""
        if self._asked_for is None:
            return None
        shape, asked = self._asked_for
        present = frozenset[Phase]().union(*shape)
        allowed = [one for one in self._config.allowed if one <= present]
        return min(allowed, key=lambda one: load_of(Counter(shape) + Counter((one,)), asked), default=None)

    def learn(self, cost: StepCost, tile_s: float, switch_cost: SwitchCost) -> None:
        """Steps, pictures and switches take so long, as is known now."""
        self._config = replace(self._config, cost=cost, tile_s=tile_s, switch_cost=switch_cost)

    def not_made(self, now_s: float) -> None:
        """The moves of the last tick were not made: they have no effect to look at, and are not wanted again soon."""
        if self._made and self._made[-1] is self._latest:
            self._blocked[self._made.pop().move] = now_s + self._config.blocked_s
        self._latest = None

    def tick(self, now_s: float, cluster: ClusterLoad) -> Sequence[Switch]:
        """The moves to make now."""
        asked = self._look(now_s, cluster)
        is_moving = any(one.is_switching for one in cluster.workers)
        shape = Counter(worker.phases for worker in cluster.workers)
        self._asked_for = None if asked is None else (shape, asked)
        self.load = None if asked is None else load_of(shape, asked)
        if is_moving and self._latest is not None:
            self._still_moving(now_s, self._latest, cluster)
        load = self.load
        if asked is None or load is None or now_s < self._next_at_s or is_moving:
            return ()
        undone = self._undo(now_s, cluster, load)
        if undone:
            return undone
        if load < self._config.busy:
            return ()
        return self._best(now_s, cluster, shape, asked, load)

    def _still_moving(self, now_s: float, latest: _Done, cluster: ClusterLoad) -> None:
        """Its effect begins when it is done, and rest takes as long as it took."""
        self._latest = replace(latest, at_s=now_s, totals=replace(cluster.totals))
        if self._made and self._made[-1] is latest:
            self._made[-1] = self._latest
        rest_s = max(self._config.cooldown_s, now_s - latest.begun_at_s)
        self._next_at_s = max(self._next_at_s, now_s + rest_s)

    def _look(self, now_s: float, cluster: ClusterLoad) -> Asked | None:
        """Follow the rates; None at the first look, and while there are no workers."""
        config, totals = self._config, cluster.totals
        before, self._seen = self._seen, (now_s, replace(totals))
        if before is None or now_s <= before[0] or not cluster.workers:
            return None
        elapsed_s, last = now_s - before[0], before[1]
        if totals.num_requests < last.num_requests or totals.num_finished < last.num_finished:
            # Who counts has begun anew.
            return self._asked(cluster.workers)
        self._followed_s = min(config.memory_s, self._followed_s + elapsed_s)
        gain = min(1.0, elapsed_s / self._followed_s)
        tiles, tokens = totals.tiles - last.tiles, totals.prompt_tokens - last.prompt_tokens
        self._tiles_per_s += gain * (tiles / elapsed_s - self._tiles_per_s)
        self._tokens_per_s += gain * (tokens / elapsed_s - self._tokens_per_s)
        num_finished = totals.num_finished - last.num_finished
        rate, known = num_finished / elapsed_s, self._rate
        self._rate = rate if known is None else known + gain * (rate - known)
        if num_finished:
            self._met += gain * ((totals.num_met - last.num_met) / num_finished - self._met)
        return self._asked(cluster.workers)

    def _asked(self, workers: Iterable[WorkerLoad]) -> Asked:
        tiles = tokens = sequences = context = capacity = num = 0
        for worker in workers:
            num += worker.kv_capacity > 0
            capacity += worker.kv_capacity
            tiles += worker.encode_tiles
            tokens += worker.prefill_tokens
            sequences += worker.num_decoding + worker.num_promised
            context += worker.decode_context + worker.promised_context
        cost, config = self._config.cost, self._config
        # Decodes are there as long as they take: those of one moment, at the target, are what is asked for.
        step_s = max(config.slo.tpot_s - cost.overhead_s, 1e-6)
        decode = (cost.decode_s * sequences + cost.context_s * context) / step_s
        # Where a step takes longer than the target whatever is in it, no worker meets it: one to a sequence is all that could help.
        decode = min(decode, float(sequences))
        # Their KV has to have its place as well.
        if capacity:
            decode = max(decode, context * num / capacity)
        return Asked(
            config.tile_s * (self._tiles_per_s + tiles / config.drain_s),
            cost.token_s * (self._tokens_per_s + tokens / config.drain_s),
            decode,
        )

    def _best(
        self, now_s: float, cluster: ClusterLoad, shape: Shape, asked: Asked, load: float
    ) -> Sequence[Switch]:
        """The move after which the load is least, of as many workers as make it so, within the batch."""
        most = max(1, int(self._config.batch * len(cluster.workers)))
        processes = Counter((worker.phases, worker.loaded) for worker in cluster.workers)
        best, best_load = None, load * (1 - self._config.gain)
        for move in self._moves(now_s, shape):
            for num in {1, most}:
                after = _after(shape, move, num)
                if after is None:
                    continue
                then = load_of(after, asked)
                if then >= best_load - 1e-9:
                    continue
                is_new = _is_new(processes, move, num)
                cost_s = self._config.switch_cost.of(needs_new_process=is_new)
                meanwhile = _meanwhile(shape, move, num, is_new=is_new)
                if not self._keeps_floors(meanwhile, shape):
                    continue
                part = min(1.0, cost_s / self._config.horizon_s)
                mean = then + part * (load_of(meanwhile, asked) - then) if part else then
                if mean < best_load - 1e-9:
                    best, best_load = (move, num, then, is_new), mean
        if best is None:
            return ()
        move, num, then, is_new = best
        self._made.append(self._begin(now_s, cluster, move, num, load))
        reason = f"load {load:.2f} would be {then:.2f}: encode {asked.encode:.1f}, prefill {asked.prefill:.1f}, decode {asked.decode:.1f} workers"
        return _switches(cluster, move, num, reason + self._how(is_new), load / best_load)

    def _how(self, is_new: bool) -> str:
        return f"; by a new process, in about {self._config.switch_cost.replace_s:.1f} s" if is_new else ""

    def _moves(self, now_s: float, shape: Shape) -> Iterable[_Move]:
        """To phases that somebody serves: nobody asks for the others."""
        present = frozenset[Phase]().union(*shape)
        for source in sorted(shape, key=sorted):
            for target in self._config.allowed:
                move = _Move(source, target)
                if target != source and target <= present and self._blocked.get(move, 0.0) <= now_s:
                    yield move

    def _keeps_floors(self, shape: Shape, before: Shape) -> bool:
        """What is below its floor already does not become less."""
        return all(
            _serving(shape, phase) >= min(floor, _serving(before, phase))
            for phase, floor in self._config.floors.items()
        )

    def _begin(self, now_s: float, cluster: ClusterLoad, move: _Move, num: int, load: float) -> _Done:
        """So many go, and nothing else for a while."""
        self._next_at_s = now_s + self._config.cooldown_s
        self._latest = _Done(
            move, num, now_s, now_s, load, self._met, self._rate or 0.0, replace(cluster.totals)
        )
        return self._latest

    def _undo(self, now_s: float, cluster: ClusterLoad, load: float) -> Sequence[Switch]:
        """Take back a move after which neither the load fell, nor as many requests met their targets, nor more were served.

        Each is looked at once, when it has settled, whatever was moved since; what later ones did is in what is seen then.
        """
        settled_s = now_s - self._config.settle_s
        if self._latest is not None and self._latest.at_s <= settled_s:
            self._latest = None
        while self._made and self._made[0].at_s <= settled_s:
            one = self._made.pop(0)
            num = cluster.totals.num_finished - one.totals.num_finished
            met = (cluster.totals.num_met - one.totals.num_met) / num if num else 1.0
            if load < one.load or met >= one.met_before - 0.05:
                continue
            # While work piles up the load grows and requests are late whatever is done: more of them are served all the same.
            if num > one.rate_before * (1 + self._config.gain) * (now_s - one.at_s) > 0:
                continue
            num_left = _left(one, self._made)
            if not num_left:
                continue
            self._blocked[one.move] = now_s + self._config.blocked_s
            reason = f"reversed: load {one.load:.2f} became {load:.2f}, and {met:.0%} met their targets after {one.met_before:.0%}"
            found = self._back(now_s, cluster, one.move.back, num_left, load, reason)
            if found:
                return found
        return ()

    def _back(
        self, now_s: float, cluster: ClusterLoad, back: _Move, most: int, load: float, reason: str
    ) -> Sequence[Switch]:
        """As many as were moved, or as floors let."""
        shape = Counter(worker.phases for worker in cluster.workers)
        processes = Counter((worker.phases, worker.loaded) for worker in cluster.workers)
        for num in range(min(most, shape[back.source]), 0, -1):
            is_new = _is_new(processes, back, num)
            if self._keeps_floors(_meanwhile(shape, back, num, is_new=is_new), shape):
                self._begin(now_s, cluster, back, num, load)
                return _switches(cluster, back, num, reason + self._how(is_new), 1.0)
        return ()


def _left(first: _Done, later: Iterable[_Done]) -> int:
    """How many workers of a move later ones have not brought back; those that went last come back first."""
    left, more = first.num, 0
    for one in later:
        if one.move == first.move:
            more += one.num
        elif one.move == first.move.back:
            num = min(more, one.num)
            more -= num
            left = max(0, left - (one.num - num))
    return left


def _serving(shape: Shape, phase: Phase) -> int:
    return sum(num for phases, num in shape.items() if phase in phases)


def _after(shape: Shape, move: _Move, num: int) -> Shape | None:
    """None when there are not so many to move."""
    if shape.get(move.source, 0) < num:
        return None
    after = Counter(shape)
    after[move.source] -= num
    after[move.target] += num
    return +after


def _meanwhile(shape: Shape, move: _Move, num: int, *, is_new: bool) -> Shape:
    """While they move they serve what they keep, and nothing where a new process comes."""
    found = Counter(shape)
    found[move.source] -= num
    found[frozenset() if is_new else move.source & move.target] += num
    return +found


def _is_new(processes: Mapping[tuple[PhaseSet, PhaseSet], int], move: _Move, num: int) -> bool:
    """Some of so many need a new process. processes: how many workers serve the one and have loaded the other."""
    can = sum(
        count
        for (phases, loaded), count in processes.items()
        if phases == move.source and move.target <= loaded
    )
    return can < num


def _switches(cluster: ClusterLoad, move: _Move, num: int, reason: str, predicted: float) -> Sequence[Switch]:
    """Of those that serve it, the ones whose processes can do it, then those with least to move or to wait for."""
    found = [worker for worker in cluster.workers if worker.phases == move.source]
    found.sort(
        key=lambda w: (
            not move.target <= w.loaded,
            w.num_decoding + w.num_prefills + w.encode_tiles,
            w.worker_id,
        )
    )
    return [Switch(worker.worker_id, move.target, reason, predicted) for worker in found[:num]]
