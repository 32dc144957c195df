"""The phasewise policy, the orders and the placing that all policies share."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.policies.orders import AGAIN, LATE_TURN, Fcfs, LeastSlack, ShortestFirst
from orchestrator.control.policies.phase_sets import (
    Asked,
    PhaseSets,
    PhaseSetsConfig,
    _Done,
    _left,
    _Move,
    load_of,
)
from orchestrator.control.policies.phasewise import PhasewiseConfig, PredictedPlacing, PredictedSteps
from orchestrator.control.policies.placing import MAX_CANDIDATES, LeastLoaded, candidates
from orchestrator.control.policies.policy import (
    ClusterLoad,
    Job,
    Placement,
    Prompt,
    Reject,
    Totals,
    WorkerLoad,
)
from orchestrator.control.slo import Slo
from orchestrator.sim.coarse_costs import rates
from orchestrator.sim.coarse_request import CoarseRequest
from tests.support.coarse import COSTS, SLO, D, E, P, policy, random_load, run, slack_order
from workers.api import Phase, PhaseSet, WorkerId
from workers.prompt_order import Standing
from workers.step_choice import Exclusive, Head, Layout, Mixed, Split

FULL = E | P | D
CONFIG = PhasewiseConfig(SLO, COSTS.step, COSTS.tile_s)


def worker(name: str, phases: frozenset[Phase] = FULL, **load: int) -> WorkerLoad:
    found = WorkerLoad(WorkerId(name), phases, 400_000)
    for key, value in load.items():
        setattr(found, key, value)
    return found


def prompt(num_tokens: int, num_tiles: int = 0, cached: int = 0) -> Prompt:
    return Prompt(0, 0.0, num_tokens, num_tiles, SLO, "", lambda _worker: cached)


def job(number: int, arrived_at_s: float, num_left: int, tenant: str = "") -> Job:
    return Job(number, arrived_at_s, arrived_at_s + SLO.ttft_s, tenant, num_left)


# Orders.


def test_orders_say_who_is_first() -> None:
    long, short = job(0, 0.0, 3000), job(1, 0.1, 100)
    assert Fcfs().key(long) < Fcfs().key(short)
    assert ShortestFirst().key(short) < ShortestFirst().key(long)
    assert slack_order().key(long) < slack_order().key(short)


def test_waiting_makes_up_for_length() -> None:
    order = ShortestFirst(tokens_per_s=100.0)
    assert order.key(job(0, 0.0, 1000)) < order.key(job(1, 10.0, 100))


def ranks(order: LeastSlack, now_s: float, jobs: list[Job]) -> list[int]:
    for one in jobs:
        order.waits(one)
    return list(order.ranks(now_s, jobs, worker("w")))


def test_the_longest_is_passed_over_where_not_all_can_be_in_time() -> None:
    """A token takes about 25 us: all three take longer than the 0.5 s that they have."""
    jobs = [job(0, 0.0, 6000), job(1, 0.0, 9000), job(2, 0.0, 6000)]
    assert ranks(slack_order(), 0.0, jobs) == [Standing.ON_TIME, Standing.PASSED_OVER, Standing.ON_TIME]
    assert [one.standing for one in jobs] == [Standing.ON_TIME, Standing.PASSED_OVER, Standing.ON_TIME]
    # Beside decodes it takes longer.
    busy = worker("w", num_decoding=200, decode_context=200_000)
    order = slack_order()
    for one in jobs:
        order.waits(one)
    assert order.ranks(0.0, jobs, busy).count(Standing.ON_TIME) < 2


def test_who_is_too_late_lets_others_past_but_for_a_share() -> None:
    order, late, other = slack_order(), job(0, 0.0, 1000), job(1, 1.0, 1000)
    assert ranks(order, 1.0, [late, other]) == [Standing.LATE, Standing.ON_TIME]
    order.charge(other, 19_000)
    assert ranks(order, 1.0, [late, other]) == [Standing.LATE, Standing.ON_TIME]
    order.charge(other, 1000)
    assert ranks(order, 1.0, [late, other]) == [LATE_TURN, Standing.ON_TIME]
    order.charge(late, 1000)
    assert ranks(order, 1.0, [late, other]) == [Standing.LATE, Standing.ON_TIME]


def test_who_was_preempted_goes_first() -> None:
    jobs = [job(0, 0.0, 1000), job(1, 0.2, 1000), job(2, 0.6, 1000)]
    jobs[1].has_first_token = True
    assert slack_order().key(jobs[1]) == 0.2
    assert ranks(slack_order(), 0.6, jobs) == [Standing.LATE, AGAIN, Standing.ON_TIME]


def test_a_tenant_that_got_more_waits_for_the_other() -> None:
    order = slack_order({"paying": 2.0})
    for number, tenant in enumerate(("greedy", "modest", "paying")):
        order.waits(job(number, 0.0, 100, tenant))
    for tenant, tokens in (("greedy", 5000), ("modest", 1000), ("paying", 5000)):
        order.charge(job(0, 0.0, 1, tenant), tokens)
    order.waits(job(3, 0.0, 100, "new"))
    keys = {tenant: order.key(job(0, 0.0, 100, tenant)) for tenant in ("greedy", "modest", "paying", "new")}
    assert keys["modest"] == keys["new"] < keys["paying"] < keys["greedy"]


def test_a_tenant_without_prompts_leaves_the_others_no_debts() -> None:
    order, once = slack_order(), job(0, 0.0, 100, "once")
    order.waits(once)
    order.leaves(once)
    alone = job(1, 0.0, 100, "busy")
    order.waits(alone)
    order.charge(alone, 100_000)
    assert order.key(alone) == alone.deadline_s


def test_a_flood_of_one_tenant_leaves_the_other_its_targets() -> None:
    flood = [CoarseRequest(0.01 * i, 1500, 5, SLO, tenant="flood") for i in range(400)]
    modest = [CoarseRequest(0.2 * i, 1000, 5, SLO, tenant="modest") for i in range(1, 20)]
    requests = sorted(flood + modest, key=lambda one: one.arrival_s)
    met = {}
    for name, order in (("fcfs", Fcfs), ("fair", slack_order)):
        result, _ = run(policy([FULL], order=order), requests)  # type: ignore[arg-type]
        own = [record.is_met for record in result.records if record.request.tenant == "modest"]
        met[name] = sum(own) / len(own)
    assert met["fcfs"] < 0.3 < 0.9 < met["fair"]


# Placing.


def test_of_many_workers_a_few_in_turn_are_looked_at() -> None:
    workers = [worker(f"w{i}") for i in range(1000)]
    seen: set[str] = set()
    for number in range(63):
        found = candidates(workers, number)
        assert len(found) == MAX_CANDIDATES
        seen |= {one.worker_id for one in found}
    assert len(seen) == 1000


@pytest.mark.parametrize("placing", [LeastLoaded(), PredictedPlacing(CONFIG)])
def test_a_phase_that_nobody_serves_is_a_refusal(placing: LeastLoaded | PredictedPlacing) -> None:
    for phases in (P, D):
        assert isinstance(placing.place(0.0, prompt(10), ClusterLoad((worker("w", phases),))), Reject)
    pair = ClusterLoad((worker("p", P), worker("d", D)))
    assert isinstance(placing.place(0.0, prompt(10, num_tiles=1), pair), Reject)
    placed = placing.place(0.0, prompt(10), pair)
    assert isinstance(placed, Placement)
    assert (placed.prefill.worker_id, placed.decode.worker_id) == ("p", "d")


def test_a_prompt_goes_where_its_first_token_comes_first() -> None:
    idle, busy = worker("idle"), worker("busy", num_decoding=150, decode_context=200_000)
    placed = PredictedPlacing(CONFIG).place(0.0, prompt(1000), ClusterLoad((busy, idle)))
    assert isinstance(placed, Placement)
    assert placed.prefill is placed.decode is idle


def test_a_prompt_that_cannot_make_it_is_refused_with_the_time_when_it_could() -> None:
    full = worker("full", prefill_tokens=40_000, num_prefills=20)
    refused = PredictedPlacing(CONFIG).place(0.0, prompt(1000), ClusterLoad((full,)))
    assert isinstance(refused, Reject)
    assert "predicted TTFT" in refused.reason
    # What waits is worked off meanwhile, so that it is met then.
    full.prefill_tokens -= round(refused.earliest_s / COSTS.step.token_s) + 100
    assert isinstance(PredictedPlacing(CONFIG).place(0.0, prompt(1000), ClusterLoad((full,))), Placement)


def test_a_prefix_is_fetched_where_that_is_sooner_than_waiting_for_who_has_it() -> None:
    holder, idle = worker("holder", prefill_tokens=15_000), worker("idle")
    cluster = ClusterLoad((holder, idle))
    asked = Prompt(0, 0.0, 9000, 0, SLO, "", lambda one: 8000 if one is holder else 0)
    near = PredictedPlacing(replace(CONFIG, kv_token_s=COSTS.kv_token_s)).place(0.0, asked, cluster)
    assert near == Placement(idle, idle, (), holder)
    # Computing is sooner than a slow way, and waiting than both.
    slow = replace(CONFIG, kv_token_s=1e-3, admission=10.0)
    assert PredictedPlacing(slow).place(0.0, asked, cluster) == Placement(idle, idle)
    holder.prefill_tokens = 0
    assert PredictedPlacing(CONFIG).place(0.0, asked, cluster) == Placement(holder, holder)


def test_pictures_are_spread_over_those_that_encode_least() -> None:
    workers = [worker("a", encode_tiles=50), worker("b"), worker("c", encode_tiles=5)]
    config = replace(CONFIG, most_encoders=2, admission=10.0)
    placed = PredictedPlacing(config).place(0.0, prompt(700, num_tiles=10), ClusterLoad(tuple(workers)))
    assert isinstance(placed, Placement)
    assert [one.worker_id for one in placed.encode] == ["b", "c"]


# Steps.


def head(**what: float) -> Head:
    found = {"num_tiles": 0, "num_left": 0, "num_done": 0, "deadline_s": 1.0, "tiles_deadline_s": 1.0}
    return Head(**{**found, **what})  # type: ignore[arg-type]


@given(
    num=st.integers(1, 256),
    context=st.integers(1, 300_000),
    left=st.integers(0, 5000),
    tiles=st.integers(0, 50),
    is_tiles_first=st.booleans(),
)
def test_a_planned_step_stays_within_the_target(
    num: int, context: int, left: int, tiles: int, is_tiles_first: bool
) -> None:
    if not left and not tiles:
        return
    device = worker("w", num_decoding=num, decode_context=context)
    wanted = head(num_tiles=tiles, num_left=left, tiles_deadline_s=0.5 if is_tiles_first else 2.0)
    step = PredictedSteps(CONFIG).step(0.0, device, wanted)
    cost = COSTS.step
    if isinstance(step, Mixed):
        tokens = step.token_budget - num
        seconds = cost.step_s(num, context, tokens, tokens * (tokens + 1) / 2)
        assert seconds + step.num_tiles * COSTS.tile_s <= SLO.tpot_s + COSTS.tile_s / 2
    else:
        assert step == Exclusive(Phase.DECODE, 0)


def test_without_decodes_a_prompt_gets_the_device() -> None:
    assert PredictedSteps(CONFIG).step(0.0, worker("w"), head(num_left=9000)) == Mixed(2048, 8)
    assert PredictedSteps(CONFIG).step(0.0, worker("w"), head(num_tiles=9)) == Exclusive(Phase.ENCODE, 8)


def test_short_steps_save_time_for_a_long_one_and_no_more() -> None:
    steps, device = PredictedSteps(CONFIG), worker("w", num_decoding=50, decode_context=50_000)
    budgets = []
    for now_s, num_steps in ((0.0, 0), (0.05, 2), (0.5, 50), (5.0, 600)):
        device.num_decode_steps = num_steps
        step = steps.step(now_s, device, head(num_left=100_000))
        assert isinstance(step, Mixed)
        budgets.append(step.token_budget)
    assert budgets[0] < budgets[1] < budgets[2] == budgets[3]


def test_a_split_is_taken_where_prompts_get_further_in_it() -> None:
    device = worker("w", num_decoding=60, decode_context=60_000)
    slow, fast = Layout(0.8, 0.2, 0.6, 0.4), Layout(0.8, 0.2, 0.95, 0.6)
    wanted = head(num_left=5000)
    assert isinstance(PredictedSteps(replace(CONFIG, layouts=(slow,))).step(0.0, device, wanted), Mixed)
    assert isinstance(PredictedSteps(replace(CONFIG, layouts=(fast,))).step(0.0, device, wanted), Split)


@given(num=st.integers(1, 256), context=st.integers(1, 400_000), left=st.integers(1, 20_000))
def test_on_an_h100_a_mixed_batch_is_never_worse_than_a_split(num: int, context: int, left: int) -> None:
    shares = [sms / 132 for sms in range(16, 120, 8)]
    layouts = tuple(Layout(1 - share, share, *rates(1 - share, share)) for share in shares)
    device = worker("w", num_decoding=num, decode_context=context)
    step = PredictedSteps(replace(CONFIG, layouts=layouts)).step(0.0, device, head(num_left=left))
    assert not isinstance(step, Split)


# Phase sets.

SETS = (E, P, D, P | D, E | P, FULL)


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    encode=st.integers(0, 6),
    prefill=st.integers(0, 6),
    decode=st.integers(0, 6),
)
def test_the_load_of_a_shape_says_whether_the_work_can_be_done(
    counts: list[int], encode: int, prefill: int, decode: int
) -> None:
    """Beside all ways to give whole workers to phases: half workers are allowed by the load, so work counts double."""
    shape = {phases: 2 * num for phases, num in zip(SETS, counts, strict=True) if num}
    workers = [phases for phases, num in shape.items() for _ in range(num)]
    load = load_of(shape, Asked(encode, prefill, decode))
    done: set[tuple[int, int, int]] = {(0, 0, 0)}
    for phases in workers:
        done |= {
            (e + (Phase.ENCODE is one), p + (Phase.PREFILL is one), d + (Phase.DECODE is one))
            for (e, p, d), one in product(done, phases)
        }
    can = any(e >= encode and p >= prefill and d >= decode for e, p, d in done)
    assert (load <= 1.0) == can


def phase_sets(**more: object) -> PhaseSets:
    allowed = more.pop("allowed", (E, P, D))
    return PhaseSets(PhaseSetsConfig(SLO, COSTS.step, COSTS.tile_s, allowed, **more))  # type: ignore[arg-type]


def busy(prefill_tokens: int) -> ClusterLoad:
    return ClusterLoad(
        (
            *(worker(f"p{i}", P, prefill_tokens=prefill_tokens) for i in range(2)),
            *(worker(f"d{i}", D, num_decoding=5 + i, decode_context=4000) for i in range(4)),
        )
    )


def test_a_worker_goes_where_the_queue_is_and_says_why() -> None:
    sets, cluster = phase_sets(), busy(200_000)
    assert sets.tick(0.0, cluster) == ()
    (switch,) = sets.tick(1.0, cluster)
    assert (switch.worker_id, switch.phases) == ("d0", P)
    assert switch.predicted > 1
    assert "prefill" in switch.reason


def test_an_idle_cluster_stays_as_it_is() -> None:
    sets, cluster = phase_sets(), busy(0)
    assert [sets.tick(float(now), cluster) for now in range(20)] == [()] * 20


def test_nothing_moves_while_something_moves_nor_soon_after() -> None:
    sets, cluster = phase_sets(cooldown_s=5.0), busy(200_000)
    sets.tick(0.0, cluster)
    assert sets.tick(1.0, cluster)
    assert not sets.tick(2.0, cluster)
    cluster.workers[2].is_switching = True
    assert not sets.tick(7.0, cluster)
    cluster.workers[2].is_switching = False
    # It took 6 s, and so long is rested.
    assert not sets.tick(12.0, cluster)
    assert sets.tick(13.0, cluster)


def test_a_move_that_did_harm_is_taken_back_and_not_tried_again() -> None:
    sets, cluster = phase_sets(settle_s=4.0, cooldown_s=1.0), busy(200_000)
    sets.tick(0.0, cluster)
    (switch,) = sets.tick(1.0, cluster)
    moved = next(one for one in cluster.workers if one.worker_id == switch.worker_id)
    moved.phases = switch.phases
    cluster.regroup()
    for one in cluster.prefill:
        one.prefill_tokens = 800_000
    cluster.totals.num_finished, cluster.totals.num_met = 100, 10
    (back,) = sets.tick(6.0, cluster)
    assert back.phases == D
    assert "reversed" in back.reason
    cluster.workers[0].phases, moved.phases = P, D
    cluster.regroup()
    assert all(one.phases != P for now in range(8, 20) for one in sets.tick(float(now), cluster))


@pytest.mark.parametrize(("floor", "num_back"), [(1, 3), (9, 2)])
def test_workers_that_moved_together_are_taken_back_together(floor: int, num_back: int) -> None:
    """As far as floors let them."""
    cluster = ClusterLoad(
        (
            *(worker(f"p{i}", P, prefill_tokens=400_000) for i in range(8)),
            *(worker(f"d{i}", D, num_decoding=1) for i in range(40)),
        )
    )
    sets = phase_sets(settle_s=4.0, cooldown_s=1.0, floors={Phase.PREFILL: floor, Phase.DECODE: 1})
    sets.tick(0.0, cluster)
    moved = sets.tick(1.0, cluster)
    assert len(moved) == 3
    for one in cluster.workers:
        if one.worker_id in {switch.worker_id for switch in moved}:
            one.phases = P
        one.prefill_tokens *= 4
    cluster.regroup()
    cluster.totals.num_finished, cluster.totals.num_met = 100, 10
    back = sets.tick(6.0, cluster)
    assert [one.phases for one in back] == [D] * num_back
    assert "reversed" in back[0].reason


def test_a_move_is_judged_although_others_followed_it() -> None:
    sets, cluster = phase_sets(settle_s=8.0, cooldown_s=2.0), busy(200_000)
    sets.tick(0.0, cluster)
    for now_s in (1.0, 3.0):
        (switch,) = sets.tick(now_s, cluster)
        assert switch.phases == P
        for one in cluster.workers:
            one.phases = P if one.worker_id == switch.worker_id else one.phases
            one.prefill_tokens *= 4
        cluster.regroup()
    cluster.totals.num_finished, cluster.totals.num_met = 100, 10
    for now_s in (9.0, 11.0):
        (back,) = sets.tick(now_s, cluster)
        assert back.phases == D
        assert back.reason.startswith("reversed")
        next(one for one in cluster.workers if one.worker_id == back.worker_id).phases = D
        cluster.regroup()


def move(source: PhaseSet, target: PhaseSet, num: int) -> _Done:
    return _Done(_Move(source, target), num, 0.0, 0.0, 1.0, 1.0, 0.0, Totals())


@given(
    st.lists(st.tuples(st.sampled_from(((D, P), (P, D), (E, P))), st.integers(1, 4)), min_size=1, max_size=9)
)
def test_what_is_left_of_a_move_is_what_a_stack_of_workers_has(
    moves: list[tuple[tuple[PhaseSet, PhaseSet], int]],
) -> None:
    made = [move(*sets, num) for sets, num in moves]
    first = made[0].move
    # Who made the move first lies below who made it later.
    stack = []
    for i, one in enumerate(made):
        if one.move == first:
            stack += [i] * one.num
        elif one.move == first.back:
            del stack[max(0, len(stack) - one.num) :]
    assert _left(made[0], made[1:]) == stack.count(0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.sampled_from((5.0, 30.0, 100.0)))
def test_floors_hold_whatever_comes(seed: int, rate: float) -> None:
    floors = {Phase.ENCODE: 1, Phase.PREFILL: 2, Phase.DECODE: 1}
    sets = phase_sets(floors=floors, cooldown_s=0.0)
    seen: list[Counter[Phase]] = []

    def tick(now_s: float, cluster: ClusterLoad) -> object:
        seen.append(Counter(phase for one in cluster.workers for phase in one.phases))
        return sets.tick(now_s, cluster)

    one = policy([E, E, P, P, P, D, D, D], tick=tick)  # type: ignore[arg-type]
    run(one, random_load(seed, 80, rate, has_images=True))
    assert all(counts[phase] >= floor for counts in seen for phase, floor in floors.items())


def test_many_workers_move_together() -> None:
    cluster = ClusterLoad(
        (
            *(worker(f"p{i}", P, prefill_tokens=300_000) for i in range(100)),
            *(worker(f"d{i}", D) for i in range(900)),
        )
    )
    sets = phase_sets()
    sets.tick(0.0, cluster)
    assert len(sets.tick(1.0, cluster)) == 62


def test_targets_of_a_deployment_bound_what_it_takes() -> None:
    """Beyond what a device can do, those that are taken meet their targets and the others are told at once."""
    requests = [CoarseRequest(0.02 * i, 2000, 100, Slo(0.5, 0.03)) for i in range(500)]
    one = policy(
        [FULL],
        placing=PredictedPlacing(CONFIG),  # type: ignore[arg-type]
        stepping=PredictedSteps(CONFIG),
        order=slack_order,
    )
    result, _ = run(one, requests)
    taken = [record for record in result.records if record.status == "OK"]
    assert 0.2 < len(taken) / len(requests) < 0.9
    assert sum(record.is_met for record in taken) >= 0.97 * len(taken)
