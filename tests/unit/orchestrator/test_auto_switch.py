"""What the controller's own switches are made from, and that no cluster stops its ticks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.auto_switch import ALLOWED, AutoSwitch, allowed_sets, tile_seconds
from orchestrator.control.known_shapes import DEVICES, MODELS
from orchestrator.control.policies.policy import Totals
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.slo import Slo
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from workers.api import (
    BlockCounts,
    EmbeddingCounts,
    Phase,
    PhaseSet,
    PhaseWork,
    WorkerId,
    WorkerState,
    WorkerStatus,
)
from workers.latency_model import LatencyModel
from workers.step_cost import StepCost
from workers.step_shape import EncodeCosts, FactorSource

LEARNT = replace(
    LatencyModel(MODELS["llama-3-8b"], DEVICES["h100"], is_learning=False).costs(), source=FactorSource.FITTED
)
SLO = Slo(1.0, 0.05)
ALL = frozenset(Phase)
E, P, D = (frozenset({phase}) for phase in Phase)
SETS: tuple[PhaseSet, ...] = (*ALLOWED, frozenset({Phase.ENCODE}), ALL, frozenset())

counts = st.integers(0, 1000)
works = st.builds(
    lambda num, more, tokens, context: PhaseWork(
        num_prefills=num,
        prefill_tokens=tokens,
        num_decodes=num + more,
        num_decoding=num,
        decode_context=context,
    ),
    counts,
    counts,
    st.integers(0, 10**6),
    st.integers(0, 10**7),
)


def worker(
    number: int,
    phases: PhaseSet,
    state: LifecycleState = LifecycleState.READY,
    work: PhaseWork | None = None,
    num_blocks: int = 1000,
) -> WorkerView:
    name = WorkerId(f"w{number}")
    status = WorkerStatus(
        name,
        1,
        phases,
        WorkerState.READY,
        blocks=BlockCounts(total=num_blocks, free=num_blocks, cached=0, in_use=0, leased=0),
        step_costs=LEARNT,
        work=work or PhaseWork(),
    )
    return WorkerView(name, 1, phases, state, f"{name}:1", status=status)


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView("d", 1, 1, "m", workers)


def auto(seen: ClusterView) -> AutoSwitch:
    return AutoSwitch(SLO, {one.worker_id: 16 for one in seen.workers}, (one.phases for one in seen.workers))


ENCODE_COSTS = EncodeCosts(0.01, 1e-3, 100, 0.1, 1.2)
#: A batch of two tiles of 50 patches each: 55 ms for each tile.
ENCODED = EmbeddingCounts(num_tiles_encoded=200, num_batches=100, num_patches=10_000)


def encoder(number: int, phases: PhaseSet, num_tiles: int = 0, *, has_learnt: bool = True) -> WorkerView:
    found = worker(number, phases, work=PhaseWork(num_encodes=num_tiles, encode_tiles=num_tiles))
    assert found.status is not None
    costs = replace(ENCODE_COSTS, num_batches=100 if has_learnt else 3)
    status = replace(found.status, encode_costs=costs, embeddings=ENCODED, loaded=phases)
    return replace(found, status=status)


def test_a_tile_costs_its_part_of_a_batch() -> None:
    assert tile_seconds(view(worker(0, ALL))) is None
    assert tile_seconds(view(encoder(0, ALL, has_learnt=False))) is None
    assert tile_seconds(view(worker(0, ALL), encoder(1, ALL))) == pytest.approx(0.055)


def test_encoders_are_left_as_they_are_until_pictures_have_told_what_they_cost() -> None:
    def wanted(**more: bool) -> list[SwitchRequest]:
        text = (replace_loaded(worker(i, P | D)) for i in range(1, 4))
        seen = view(encoder(0, E, num_tiles=1000, **more), *text)
        policy = auto(seen)
        return [
            one
            for second in range(3)
            for one in policy.tick(float(second), seen, Totals(second, tiles=second))
        ]

    assert not wanted(has_learnt=False)
    [request] = wanted()
    assert (request.worker_id, request.phases) == ("w1", E)
    assert "by a new process, in about 9.0 s" in request.reason


def replace_loaded(one: WorkerView) -> WorkerView:
    assert one.status is not None
    return replace(one, status=replace(one.status, loaded=one.phases))


def test_what_was_learnt_of_pictures_outlives_the_process_that_learnt_it() -> None:
    seen = view(encoder(0, E), worker(1, P | D), worker(2, P | D))
    policy = auto(seen)
    policy.tick(0.0, seen, Totals(1, tiles=1))
    seen = view(worker(0, E), worker(1, P | D), worker(2, P | D))
    policy.tick(1.0, seen, Totals(2, tiles=2))
    assert policy.last is not None
    assert policy.last.tile_s == pytest.approx(0.055)
    assert len(policy.last.load.workers) == 3


def test_encode_is_served_beside_others_only_where_that_was_declared() -> None:
    assert allowed_sets([E, P | D]) == ALLOWED
    assert allowed_sets([E | P, ALL, E | P]) == (*ALLOWED, ALL, E | P)


def test_prompts_get_an_encoder_that_has_nothing_to_do() -> None:
    waiting = PhaseWork(num_prefills=50, prefill_tokens=500_000)
    seen = view(encoder(0, E), encoder(1, E), worker(2, P | D, work=waiting))
    policy = auto(seen)
    assert not policy.tick(0.0, seen, Totals())
    [request] = policy.tick(1.0, seen, Totals(10, 40_000))
    assert (request.worker_id, request.phases) == ("w0", P | D)


def test_a_cluster_without_a_ready_worker_is_waited_for() -> None:
    seen = view(worker(0, ALLOWED[1], LifecycleState.LOST), worker(1, ALLOWED[2], LifecycleState.LOST))
    policy = auto(seen)
    assert not policy.tick(0.0, seen, Totals())
    assert not policy.tick(1.0, seen, Totals(10, 40_000))


@given(
    st.lists(
        st.tuples(st.sampled_from(SETS), st.sampled_from(LifecycleState), works, st.sampled_from((0, 1000))),
        max_size=6,
    ),
    st.lists(counts, min_size=2, max_size=12),
)
def test_any_cluster_can_be_looked_at(
    declared: list[tuple[PhaseSet, LifecycleState, PhaseWork, int]], arrivals: list[int]
) -> None:
    seen = view(*(worker(i, *one) for i, one in enumerate(declared)))
    policy, num = auto(seen), 0
    ready = {one.worker_id: one for one in seen.workers if one.state is LifecycleState.READY}
    for second, more in enumerate(arrivals):
        num += more
        for request in policy.tick(float(second), seen, Totals(num, 1000 * num, 0, num, 10 * num, num // 2)):
            assert request.phases in allowed_sets(one[0] for one in declared)
            # Nobody else has told of it: the last worker that is ready for a phase keeps it.
            others = {
                phase for one in ready.values() if one.worker_id != request.worker_id for phase in one.phases
            }
            assert ready[request.worker_id].phases - request.phases <= others
            assert request.phases != ready[request.worker_id].phases


def test_a_demand_names_what_the_tick_saw_also_when_that_was_not_to_be_told() -> None:
    seen = view(worker(0, P | D), worker(1, P | D))
    policy = auto(seen)
    for tick in range(6):
        policy.tick(tick * 0.3, seen, Totals(tick, 100 * tick))
        demand = policy.demand(seen, has_moved=False)
        if tick == 0:
            # There is no rate before the second look.
            assert demand is None
            continue
        assert demand is not None
        assert demand.look.at_s == pytest.approx(tick * 0.3)
        if policy.last is None:
            policy.tell()
        assert policy.last is demand.look
    # Workers that have just been replaced have learnt nothing: what was seen before is nothing to go by.
    policy.tick(2.0, view(), Totals(6, 600))
    assert policy.demand(view(), has_moved=False) is None


@pytest.mark.parametrize("factor", [0.0, 30.0])
def test_what_steps_of_decodes_say_of_a_prompts_tokens_moves_nobody(factor: float) -> None:
    """They fit any factor; prompts are weighed by who has computed some."""
    decoded = replace(LEARNT, factors=(1.0, factor, 1.0, 1.0), num_steps=900)
    prompted = replace(LEARNT, num_steps=100, num_prompt_steps=100)

    def seen(num_tokens: int) -> ClusterView:
        workers = [
            worker(0, P, work=PhaseWork(num_prefills=9, prefill_tokens=num_tokens)),
            *(worker(n, D) for n in (1, 2)),
        ]
        costs = (prompted, decoded, decoded)
        statuses = [
            replace(one.status, step_costs=cost)
            for one, cost in zip(workers, costs, strict=True)
            if one.status
        ]
        return view(*(replace(one, status=status) for one, status in zip(workers, statuses, strict=True)))

    def moved(num_tokens: int) -> set[PhaseSet]:
        it, now = auto(seen(num_tokens)), seen(num_tokens)
        return {one.phases for at_s in (0.0, 1.0) for one in it.tick(at_s, now, Totals())}

    # A second of prompts is worked off in four; twenty seconds are too much for one worker.
    second = round(1 / StepCost.learnt(LEARNT).token_s)
    assert moved(second) == set()
    assert moved(20 * second) == {P | D}


def test_sequences_that_wait_for_room_are_seen_by_the_kv_that_is_held_for_them() -> None:
    """Nothing waits to be computed, and those that decode are few: the workers that have computed the prompts are full of their KV."""

    def seen(held: int) -> ClusterView:
        full = PhaseWork(num_decodes=60, num_decoding=4, decode_context=4 * 3000)
        workers = [*(worker(i, P) for i in range(2)), worker(2, D, work=full), worker(3, D)]
        blocks = BlockCounts(total=1000, free=1000 - held, cached=0, in_use=0, leased=held)
        first, status = workers[0], workers[0].status
        assert status is not None
        return view(replace(first, status=replace(status, blocks=blocks)), *workers[1:])

    def wanted(held: int) -> list[SwitchRequest]:
        it, now = auto(seen(held)), seen(held)
        found = [one for at_s in range(8) for one in it.tick(float(at_s), now, Totals(at_s, at_s))]
        assert it.last is not None
        assert [one.promised_context for one in it.last.load.workers] == [0, 0, 16 * held, 0]
        return found

    assert not wanted(0)
    assert {one.phases for one in wanted(1000)} == {P | D}
