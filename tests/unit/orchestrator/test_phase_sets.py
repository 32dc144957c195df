"""Which phases workers serve, encode among them: what a move costs, and what holds while it is made, whatever comes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.policies.phase_sets import PhaseSets, PhaseSetsConfig, load_of
from orchestrator.control.policies.policy import ClusterLoad, SwitchCost, Totals, WorkerLoad
from orchestrator.control.slo import Slo
from tests.support.coarse import COSTS, SLO, D, E, P
from workers.api import Phase, PhaseSet, WorkerId

ALLOWED = (P | D, P, D, E, E | P | D)
COST = SwitchCost(0.1, 9.0)
TICK_S = 0.5


def policy(taken_over_at_s: float | None = None, **more: object) -> PhaseSets:
    floors = dict.fromkeys(Phase, 1)
    slo = more.pop("slo", SLO)
    config = PhaseSetsConfig(slo, COSTS.step, COSTS.tile_s, ALLOWED, floors, COST, **more)  # type: ignore[arg-type]
    return PhaseSets(config, taken_over_at_s)


def worker(name: str, phases: PhaseSet, loaded: PhaseSet, **load: int) -> WorkerLoad:
    kv_capacity = 400_000 if loaded - E else 0
    return WorkerLoad(WorkerId(name), phases, kv_capacity, loaded=loaded, **load)  # type: ignore[arg-type]


@dataclass
class World:
    """Makes the moves, as the controller would: those that need a new process serve nothing meanwhile."""

    workers: list[WorkerLoad]
    sets: PhaseSets = field(default_factory=policy)
    totals: Totals = field(default_factory=Totals)
    now_s: float = 0.0
    #: Of each worker that is between two sets: what it takes, from when on, and whether by a new process.
    moving: dict[WorkerId, tuple[PhaseSet, float, bool]] = field(default_factory=dict)
    moves: list[tuple[float, bool]] = field(default_factory=list)
    shapes: list[Counter[PhaseSet]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def serving(self) -> Counter[Phase]:
        """How many workers can be used for each phase now."""
        found: Counter[Phase] = Counter()
        for one in self.workers:
            target, _, is_new = self.moving.get(one.worker_id, (one.phases, 0.0, False))
            found.update(() if is_new else one.phases & target)
        return found

    def tick(self) -> None:
        self.now_s += TICK_S
        for one in self.workers:
            target, done_s, is_new = self.moving.get(one.worker_id, (one.phases, 0.0, False))
            if one.is_switching and done_s <= self.now_s:
                del self.moving[one.worker_id]
                one.phases, one.is_switching = target, False
                if is_new:
                    one.loaded, one.kv_capacity = target, 400_000 if target - E else 0
        for switch in self.sets.tick(self.now_s, ClusterLoad(tuple(self.workers), self.totals)):
            one = next(one for one in self.workers if one.worker_id == switch.worker_id)
            is_new = not switch.phases <= one.loaded
            assert not one.is_switching
            assert switch.phases in ALLOWED
            one.is_switching = True
            self.moving[one.worker_id] = (
                switch.phases,
                self.now_s + COST.of(needs_new_process=is_new),
                is_new,
            )
            self.moves.append((self.now_s, is_new))
            self.reasons.append(switch.reason)
            self.shapes.append(Counter(w.phases for w in self.workers))
            assert ("new process" in switch.reason) == is_new


processes = st.sampled_from(ALLOWED).flatmap(
    lambda loaded: st.sampled_from([one for one in ALLOWED if one <= loaded]).map(lambda has: (has, loaded))
)
clusters = st.lists(processes, min_size=2, max_size=6).filter(
    lambda found: {phase for phases, _ in found for phase in phases} >= P | D
)
loads = st.tuples(st.integers(0, 200), st.integers(0, 300_000), st.integers(0, 200))


def put(one: WorkerLoad, load: tuple[int, int, int]) -> None:
    """As far as it serves that."""
    one.encode_tiles = load[0] if Phase.ENCODE in one.phases else 0
    one.prefill_tokens = load[1] if Phase.PREFILL in one.phases else 0
    one.num_decoding = load[2] if Phase.DECODE in one.phases else 0
    one.decode_context = 1000 * one.num_decoding


@settings(max_examples=150, deadline=None)
@given(clusters, st.lists(st.tuples(loads, st.integers(1, 40)), min_size=1, max_size=8))
def test_each_phase_keeps_a_worker_and_moves_are_bounded_whatever_comes(
    cluster: list[tuple[PhaseSet, PhaseSet]], load: list[tuple[tuple[int, int, int], int]]
) -> None:
    world = World([worker(f"w{i}", *one) for i, one in enumerate(cluster)])
    needed = set(world.serving())
    for (tiles, tokens, sequences), num_ticks in load:
        for _ in range(num_ticks):
            for one in world.workers:
                put(one, (tiles, tokens, sequences))
            world.totals.tiles += tiles // 4
            world.totals.prompt_tokens += tokens // 20
            world.totals.num_requests += 1
            world.totals.num_finished += 2
            world.totals.num_met += tiles % 3
            world.tick()
            assert set(world.serving()) == needed
    for begin_s, _ in world.moves:
        within = [is_new for at_s, is_new in world.moves if begin_s <= at_s < begin_s + 60.0]
        assert len(within) <= 60.0 / 2.0 + 1
        # Moving takes half of the time at most.
        assert sum(within) <= 60.0 / (2 * COST.replace_s) + 1


@settings(max_examples=150, deadline=None)
@given(clusters, loads)
def test_a_steady_load_comes_to_rest_and_no_shape_comes_twice(
    cluster: list[tuple[PhaseSet, PhaseSet]], load: tuple[int, int, int]
) -> None:
    world = World([worker(f"w{i}", *one) for i, one in enumerate(cluster)])
    tiles, tokens, sequences = load
    # All that there is to do, wherever it is done.
    work = worker("all", E | P | D, E | P | D)
    put(work, (tiles * len(cluster), tokens * len(cluster), sequences * len(cluster)))
    first = world.workers[0]
    for _ in range(400):
        for one in world.workers:
            put(one, (0, 0, 0))
        first.encode_tiles, first.prefill_tokens = work.encode_tiles, work.prefill_tokens
        first.num_decoding, first.decode_context = work.num_decoding, work.decode_context
        world.tick()
    shapes = [frozenset(shape.items()) for shape in world.shapes]
    assert len(set(shapes)) == len(shapes)
    assert all(at_s < 150.0 for at_s, _ in world.moves)


@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(2, 40),
    cooldown_s=st.floats(0.0, 6.0),
    settle_s=st.floats(0.0, 10.0),
    batch=st.sampled_from((1 / 16, 1 / 4)),
)
def test_every_move_that_did_harm_is_taken_back_however_many_followed_it(
    num: int, cooldown_s: float, settle_s: float, batch: float
) -> None:
    """Each makes what there is to prefill so much more that no move makes up for it, and from the first on no request meets its targets."""
    config = PhaseSetsConfig(
        SLO,
        COSTS.step,
        COSTS.tile_s,
        (P, D),
        switch_cost=COST,
        cooldown_s=cooldown_s,
        settle_s=settle_s,
        batch=batch,
        blocked_s=1e9,
    )
    world = World(
        [worker("p", P, P | D), *(worker(f"d{i}", D, P | D) for i in range(num))], PhaseSets(config)
    )
    for _ in range(round((3 * settle_s + 20) / TICK_S)):
        num_moves = len({at_s for at_s, _ in world.moves})
        world.workers[0].prefill_tokens = 10**6 * 50**num_moves
        world.totals.num_finished += 1
        world.totals.num_met += not world.moves
        world.tick()
    assert world.moves
    assert Counter(one.phases for one in world.workers) == {P: 1, D: num}
    num_back = sum(reason.startswith("reversed") for reason in world.reasons)
    assert num_back == len(world.moves) / 2


def pictures(*cluster: WorkerLoad) -> World:
    """Encode has three times as much to do as one worker can."""
    world = World(list(cluster))
    encoder = next(one for one in world.workers if Phase.ENCODE in one.phases)
    encoder.encode_tiles = round(3 * 4.0 / COSTS.tile_s)
    return world


def test_pictures_get_the_worker_whose_process_can_encode() -> None:
    world = pictures(
        worker("e", E, E), worker("a", P | D, P | D), worker("b", P | D, E | P | D, num_decoding=9)
    )
    for _ in range(3):
        world.tick()
    assert next(one for one in world.workers if one.worker_id == "b").phases >= E
    assert world.moves == [(1.0, False)]


def test_a_worker_is_replaced_where_no_process_can_encode() -> None:
    world = pictures(worker("e", E, E), worker("a", P | D, P | D), worker("b", P | D, P | D))
    for _ in range(3):
        world.tick()
    assert world.moves == [(1.0, True)]
    assert world.serving() == Counter(E | P | D)


def test_the_last_worker_of_a_phase_is_not_replaced_although_it_would_serve_it_again() -> None:
    """It would serve more than before, and nothing for as long as that takes."""
    world = pictures(worker("e", E, E), worker("a", P | D, P | D))
    for _ in range(60):
        world.tick()
    assert world.moves == []


@pytest.mark.parametrize("busy", [0.5, 1.0])
def test_a_small_gain_is_not_worth_a_new_process(busy: float) -> None:
    """Five workers serve text, and one of six encodes: another one of them helps by less than its absence costs."""

    def world(loaded: PhaseSet) -> World:
        cluster = [worker("e", E, E), *(worker(f"w{i}", P | D, loaded) for i in range(5))]
        found = World(cluster, policy(busy=busy, horizon_s=9.5))
        cluster[0].encode_tiles = round(1.1 * 4.0 / COSTS.tile_s)
        cluster[1].prefill_tokens = round(4.8 * 4.0 / COSTS.step.token_s)
        for _ in range(3):
            found.tick()
        return found

    assert not world(P | D).moves
    assert world(E | P | D).moves


def test_a_tpot_target_that_no_worker_meets_does_not_hide_the_prompts() -> None:
    """More workers than sequences help nobody, so that is what decode asks for at most."""
    never = Slo(SLO.ttft_s, COSTS.step.overhead_s / 2)
    tokens = round(20 / COSTS.step.token_s)
    workers = [
        worker("a", P, P | D, prefill_tokens=tokens, num_prefills=9),
        worker("b", D, P | D, num_decoding=2, decode_context=200),
        worker("c", D, P | D, num_decoding=1, decode_context=100),
    ]
    world = World(workers, policy(slo=never))
    for _ in range(8):
        world.tick()
    assert world.sets.load is not None
    assert world.sets.load < 10
    assert [one.phases for one in workers[1:]].count(P | D) >= 1


@pytest.mark.parametrize(("served_after", "is_kept"), [(8, True), (2, False)])
def test_a_move_after_which_more_is_served_stays_although_work_piles_up(
    served_after: int, is_kept: bool
) -> None:
    """More requests are late, and more wait, than before the load shifted: that is not what the move has done."""
    workers = [worker("a", P, P | D, num_prefills=9), worker("b", D, P | D), worker("c", D, P | D)]
    world = World(workers)
    tokens_of_a_second = round(1 / COSTS.step.token_s)
    for tick in range(60):
        has_moved = bool(world.moves)
        num = served_after if has_moved else 4
        world.totals.num_finished += num
        world.totals.num_met += 0 if has_moved else num
        # Nothing waits until the load shifts.
        workers[0].prefill_tokens = max(0, tick - 20) * tokens_of_a_second // 2
        world.tick()
        if any(one.phases == P | D for one in workers) and world.now_s > world.moves[0][0] + 12:
            break
    assert (Counter(one.phases for one in workers)[P | D] >= 1) == is_kept
    assert (len(world.sets._blocked) == 0) == is_kept


def steady(cluster: list[WorkerLoad], tiles: int, tokens: int, sequences: int) -> Iterator[World]:
    """What comes in each tick is served at once, and so many sequences decode."""
    world = World(cluster)
    for one in cluster:
        if Phase.DECODE in one.phases:
            one.num_decoding, one.decode_context = sequences, sequences * 1000
            break
    while True:
        world.totals.num_requests += 1
        world.totals.num_finished += 1
        world.totals.num_met += 1
        world.totals.tiles += tiles
        world.totals.prompt_tokens += tokens
        world.tick()
        yield world


@settings(max_examples=50, deadline=None)
@given(clusters, st.tuples(st.integers(0, 50), st.integers(0, 20_000), st.integers(0, 200)))
def test_a_new_controller_sees_the_load_that_the_one_before_saw(
    cluster: list[tuple[PhaseSet, PhaseSet]], load: tuple[int, int, int]
) -> None:
    ticks = steady([worker(f"w{i}", *one) for i, one in enumerate(cluster)], *load)
    *_, world = islice(ticks, 120)
    began_s = world.now_s
    new = policy(began_s)
    new.tick(began_s, ClusterLoad(tuple(world.workers), world.totals))
    for world in islice(ticks, 20):
        shape = Counter(one.phases for one in world.workers)
        wanted = new.tick(world.now_s, ClusterLoad(tuple(world.workers), world.totals))
        assert new.load == pytest.approx(load_of(shape, world.sets._asked(world.workers)), rel=1e-3)
        assert not wanted or world.now_s >= began_s + 2.0


def test_a_new_controller_knows_of_no_pictures_and_takes_no_encoder_away() -> None:
    """Both encoders have all that they can do, and no picture waits."""
    workers = [*(worker(f"e{i}", E, E | P | D) for i in range(2)), worker("t", P | D, P | D)]
    ticks = steady(workers, round(1.9 * TICK_S / COSTS.tile_s), 0, 0)
    for world in islice(ticks, 60):
        assert not world.moves
    world.sets = policy(world.now_s)
    workers[2].prefill_tokens = round(0.9 * 4.0 / COSTS.step.token_s)
    for world in islice(ticks, 20):
        assert not world.moves, world.reasons
