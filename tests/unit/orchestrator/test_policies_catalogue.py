"""Every policy by its name on small clusters: what it is made of, and that it serves."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench.trace import Trace, TraceRow
from orchestrator.control.policies.catalogue import FULL, POLICIES, D, E, P, Setting, Workload, orders
from orchestrator.control.policies.disaggregated import Conductor, EpdQueue, EpdSteady, distserve_shape
from orchestrator.control.policies.epd_queue import Settings
from orchestrator.control.policies.partitioned import LEAST, WINDOW_STEPS, NexusSteps, SemiPdSteps
from orchestrator.control.policies.policy import ClusterLoad, Ended, Placement, Prompt, Reject, WorkerLoad
from orchestrator.control.slo import Slo
from orchestrator.sim.coarse_loads import Kind, of_trace, shifting
from tests.support.coarse import COSTS, SLO, check_split, random_load, run
from tests.support.sim import LLAMA_ON_H100
from workers.api import Phase, WorkerId
from workers.step_choice import Exclusive, Head, Layout, Split, Step

SETTING = Setting(
    4,
    LLAMA_ON_H100,
    SLO,
    Workload(1500.0, 60.0, 8.0),
    (E, P, P, D),
    COSTS.kv_token_s,
    COSTS.tile_s,
    (E | P, E | P, D, D),
)


@pytest.mark.parametrize("order", ["fcfs", "spf", "slack"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_with_every_order(name: str, order: str) -> None:
    one = POLICIES[name](SETTING, orders(COSTS.step, SLO)[order])
    assert one.name == name
    assert len(one.shape) == SETTING.num_workers
    result, _ = run(one, random_load(7, 80, 10.0, has_images=True))
    served = [record for record in result.records if record.status == "OK"]
    assert len(served) >= (1 if name in {"mooncake", "phasewise", "phasewise_apart"} else len(result.records))
    for record in result.records:
        assert record.status == "OK" or "earliest in" in record.message


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), rate_rps=st.sampled_from((5.0, 40.0)), tpot_s=st.sampled_from((0.01, 0.03))
)
def test_no_more_of_a_device_is_given_away_than_there_is_at_any_step(
    name: str, seed: int, rate_rps: float, tpot_s: float
) -> None:
    layouts = tuple(Layout(1 - share, share, 0.9, 0.9) for share in (0.25, 0.5, 0.75))
    setting = replace(SETTING, slo=Slo(0.5, tpot_s), layouts=layouts)
    one = POLICIES[name](setting, orders(COSTS.step, SLO)["fcfs"])
    splits: list[Split] = []

    class Watched:
        def step(self, now_s: float, device: WorkerLoad, head: Head) -> Step:
            step = one.stepping.step(now_s, device, head)
            if isinstance(step, Split):
                splits.append(step)
            return step

    run(replace(one, stepping=Watched()), random_load(seed, 40, rate_rps, has_images=True))
    assert not splits or name in {"nexus", "semi_pd", "phasewise", "phasewise_apart"}
    for step in splits:
        check_split(step)
        assert step.is_binding == (name == "semi_pd")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_meets_the_targets_of_a_light_load(name: str) -> None:
    one = POLICIES[name](
        replace(SETTING, load=Workload(1500.0, 60.0, 0.0), split=(P, P, D, D), placed=(P, P, P, D)),
        orders(COSTS.step, SLO)["fcfs"],
    )
    result, _ = run(one, random_load(3, 60, 4.0))
    assert result.attainment >= 0.95


def worker(name: str, phases: frozenset[Phase], **load: int) -> WorkerLoad:
    found = WorkerLoad(WorkerId(name), phases, 400_000)
    for key, value in load.items():
        setattr(found, key, value)
    return found


def shape(prefill_rps: float, decode_rps: float, num_workers: int = 8) -> tuple[int, int]:
    found = distserve_shape(num_workers, prefill_rps=prefill_rps, decode_rps=decode_rps, has_tiles=False)
    return found.count(P), found.count(D)


def test_a_search_gives_the_phase_that_needs_more_the_workers() -> None:
    assert shape(1.0, 30.0) == (7, 1)
    assert shape(30.0, 1.0) == (1, 7)
    assert shape(2.0, 2.0) == (4, 4)
    # 5 * 3 and 3 * 5.
    assert shape(3.0, 5.0) == (5, 3)
    found = distserve_shape(8, prefill_rps=1.0, decode_rps=1.0, has_tiles=True)
    assert found.count(E | P) == found.count(D) == 4


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.integers(2, 40))
def test_no_other_placement_of_as_many_devices_has_more_goodput(
    prefill_rps: float, decode_rps: float, num: int
) -> None:
    def goodput_rps(num_prefill: int, num_decode: int) -> float:
        return min(num_prefill * prefill_rps, num_decode * decode_rps)

    best = max(goodput_rps(one, num - one) for one in range(1, num))
    found = shape(prefill_rps, decode_rps, num)
    assert sum(found) == num
    assert goodput_rps(*found) >= best * (1 - 1e-6)


def test_the_published_trigger_does_not_see_what_decode_lacks_room_for() -> None:
    trigger = EpdQueue()
    cluster = ClusterLoad(
        (worker("e0", E), worker("p0", P), worker("p1", P), worker("d0", D, num_promised=500))
    )
    assert not trigger.tick(5.0, cluster)
    cluster.totals.num_requests, cluster.totals.tiles = 10, 100
    cluster.workers[0].encode_tiles = 300
    (switch,) = trigger.tick(10.0, cluster)
    assert (switch.worker_id, switch.phases) == ("p0", E)
    assert not trigger.tick(12.0, cluster)


def test_the_published_trigger_may_name_a_phase_that_no_worker_serves_alone() -> None:
    cluster = ClusterLoad((worker("a", E | P), worker("b", E | P), worker("d0", D)))
    cluster.totals.num_requests, cluster.totals.tiles = 10, 100
    cluster.workers[0].encode_tiles = 300
    assert not EpdQueue().tick(5.0, cluster)


def steady() -> EpdSteady:
    return EpdSteady(COSTS.step, tile_s=COSTS.tile_s, output_tokens=60.0)


def test_the_steady_trigger_sees_what_decode_lacks_room_for_and_does_not_mind_a_short_queue() -> None:
    cluster = ClusterLoad((worker("e0", E), worker("p0", P), worker("p1", P), worker("d0", D)))
    one = steady()
    assert not any(one.tick(float(now_s), cluster) for now_s in range(30))
    cluster.workers[0].encode_tiles = round(3.0 / COSTS.tile_s)
    assert not any(one.tick(30.0 + now_s, cluster) for now_s in range(60))
    cluster.workers[0].encode_tiles = 0
    cluster.workers[3].num_promised, cluster.workers[3].promised_context = 50_000, 50_000_000
    found = [switch for now_s in range(60) for switch in one.tick(90.0 + now_s, cluster)]
    assert (found[0].worker_id, found[0].phases) == ("p0", D)
    assert "decode needs" in found[0].reason


def test_the_steady_trigger_does_not_count_for_decode_what_waits_for_prefill() -> None:
    busy = worker("p0", P, prefill_tokens=4_000_000, num_prefills=2000)
    cluster = ClusterLoad((worker("e0", E), worker("e1", E), busy, worker("d0", D, num_promised=2000)))
    one = steady()
    found = [switch for now_s in range(30) for switch in one.tick(float(now_s), cluster)]
    assert [switch.phases for switch in found[:1]] == [P]


def overloaded_decode() -> WorkerLoad:
    return worker("d0", D, num_promised=50_000, promised_context=50_000_000)


def test_the_steady_trigger_rests_only_after_a_switch_that_it_made() -> None:
    # Both have two phases, so that none can leave one for decode.
    cluster = ClusterLoad((worker("w0", E | P), worker("w1", E | P), overloaded_decode()))
    one = steady()
    assert not any(one.tick(float(now_s), cluster) for now_s in range(22))
    cluster = ClusterLoad((*cluster.workers, worker("p0", P)))
    (switch,) = one.tick(22.0, cluster)
    assert (switch.worker_id, switch.phases) == ("p0", D)
    again = next(now_s for now_s in range(23, 60) if one.tick(float(now_s), cluster))
    assert again - 22 == Settings().cooldown_s


def test_the_steady_trigger_takes_a_worker_from_a_phase_that_has_one_to_give() -> None:
    # Encode would be missed no more than prefill, and comes first.
    cluster = ClusterLoad((worker("w0", E | P), worker("w1", E | P), worker("p0", P), overloaded_decode()))
    one = steady()
    found = [switch for now_s in range(12) for switch in one.tick(float(now_s), cluster)]
    assert [(switch.worker_id, switch.phases) for switch in found] == [("p0", D)]


def conductor(decode_s: float = 2.0) -> Conductor:
    return Conductor(COSTS.step, SLO, kv_token_s=COSTS.kv_token_s, tile_s=COSTS.tile_s, decode_s=decode_s)


def test_the_conductor_fetches_a_prefix() -> None:
    cached = worker("cached", P, prefill_tokens=15_000)
    idle, decode = worker("idle", P), worker("d", D)
    cluster = ClusterLoad((cached, idle, decode))
    prompt = Prompt(0, 0.0, 9000, 0, SLO, "", lambda one: 8000 if one is cached else 0)
    assert conductor().place(0.0, prompt, cluster) == Placement(idle, decode, (), cached)


def test_the_conductor_refuses_by_the_queue_of_prefill() -> None:
    cluster = ClusterLoad((worker("p", P, prefill_tokens=200_000), worker("d", D)))
    refused = conductor().place(3.0, prompt(1000), cluster)
    assert isinstance(refused, Reject)
    assert "the load of prefill" in refused.reason
    assert refused.earliest_s > 3.0


def prompt(num_tokens: int) -> Prompt:
    return Prompt(0, 0.0, num_tokens, 0, SLO, "", lambda _one: 0)


def test_the_conductor_refuses_what_decode_could_not_take_when_it_gets_there() -> None:
    decode, one = worker("d", D), conductor()
    cluster = ClusterLoad((worker("p", P), decode))
    taken = 0
    # All at once: none decodes yet, so that the load of the moment is nothing.
    while isinstance(found := one.place(0.0, prompt(2000), cluster), Placement):
        taken += 1
        decode.num_promised, decode.promised_context = taken, 2000 * taken
        assert taken < 1000
    assert "the load of decode" in found.reason
    step_s = COSTS.step.step_s(taken + 1, 2000 * (taken + 1))
    assert step_s > SLO.tpot_s >= COSTS.step.step_s(taken, 2000 * taken)
    # Until they have decoded as long as each is taken to.
    assert isinstance(one.place(1.9, prompt(2000), cluster), Reject)
    assert isinstance(one.place(found.earliest_s, prompt(2000), cluster), Placement)


def test_the_conductor_forgets_those_that_have_left_sooner_than_it_thought() -> None:
    decode, one = worker("d", D), conductor(decode_s=1e6)
    cluster = ClusterLoad((worker("p", P), decode))
    while isinstance(one.place(0.0, prompt(2000), cluster), Placement):
        decode.num_promised += 1
        decode.promised_context += 2000
    decode.num_promised = decode.promised_context = 0
    assert isinstance(one.place(1.0, prompt(2000), cluster), Placement)


def head() -> Head:
    return Head(0, 4000, 0, 1.0, float("inf"))


def test_semi_pd_gives_the_phase_that_misses_more_after_a_window() -> None:
    steps = SemiPdSteps(COSTS.step, SLO)
    device = worker("w", FULL, num_decoding=20, decode_context=20_000)
    assert steps.step(0.0, device, head()) == Split(1.0, 1.0, 2048, 8, is_binding=True)
    for _ in range(40):
        steps.told(0.0, Ended(WorkerId("w"), WorkerId("w"), 0.1, 0.05, SLO))
    found = [steps.step(0.6, device, head()) for _ in range(WINDOW_STEPS)][-1]
    assert isinstance(found, Split)
    assert found.prefill_share < 1.0 == found.decode_share


def test_nexus_gives_decode_no_more_than_its_slack_asks() -> None:
    steps, device = NexusSteps(LLAMA_ON_H100), worker("w", FULL)
    assert steps.step(0.0, device, head()) == Exclusive(Phase.PREFILL, 2048)
    device.num_decoding, device.decode_context = 64, 130_000
    found = steps.step(0.0, device, head())
    assert isinstance(found, Split)
    assert found.prefill_share + found.decode_share == pytest.approx(1.0)
    # Reading memory does not need many SMs, as it has it.
    assert 0.6 < found.prefill_share < 0.9


@given(
    st.lists(
        st.tuples(st.integers(1, 256), st.integers(0, 4000), st.integers(0, 400_000), st.integers(0, 20_000)),
        min_size=1,
        max_size=20,
    )
)
def test_nexus_gives_all_of_a_device_and_no_more_whatever_runs_on_it(
    seen: list[tuple[int, int, int, int]],
) -> None:
    steps, device = NexusSteps(LLAMA_ON_H100), worker("w", FULL)
    for num_decoding, context, kv_tokens, num_left in seen:
        device.num_decoding, device.decode_context = num_decoding, num_decoding * context
        device.kv_tokens = kv_tokens
        step = steps.step(0.0, device, Head(0, num_left, 0, 1.0, float("inf")))
        assert isinstance(step, Split)
        check_split(step)
        assert step.prefill_share + step.decode_share == pytest.approx(1.0)
        assert min(step.prefill_share, step.decode_share) >= LEAST / 100


@given(st.lists(st.tuples(st.floats(1e-4, 10.0), st.floats(1e-4, 1.0)), max_size=30))
def test_semi_pd_lets_one_phase_use_the_whole_device(seen: list[tuple[float, float]]) -> None:
    steps, now_s = SemiPdSteps(COSTS.step, SLO), 0.0
    device = worker("w", FULL, num_decoding=20, decode_context=20_000)
    for ttft_s, tpot_s in seen:
        now_s += 10.0
        steps.told(now_s, Ended(WorkerId("w"), WorkerId("w"), ttft_s, tpot_s, SLO))
        for _ in range(WINDOW_STEPS):
            step = steps.step(now_s, device, head())
            assert isinstance(step, Split)
            check_split(step)
            assert max(step.prefill_share, step.decode_share) == 1.0


@pytest.mark.parametrize(
    ("step", "is_right"),
    [
        (Split(0.4, 0.6, 1), True),
        (Split(0.4, 0.5, 1), True),
        (Split(0.5, 0.6, 1), False),
        (Split(1.1, -0.1, 1), False),
        (Split(1.0, 0.0, 1), False),
        (Split(1.0, 0.3, 1, is_binding=True), True),
        (Split(0.4, 0.6, 1, is_binding=True), True),
        # Of a tenth of the SMs neither side may use any.
        (Split(0.4, 0.5, 1, is_binding=True), False),
        (Split(1.2, 0.5, 1, is_binding=True), False),
    ],
)
def test_what_is_checked_of_a_divided_device_can_fail(step: Split, *, is_right: bool) -> None:
    if is_right:
        check_split(step)
    else:
        with pytest.raises(AssertionError):
            check_split(step)


# Loads.


def test_a_trace_goes_on_at_its_beginning_with_other_prefixes() -> None:
    rows = tuple(TraceRow(n, n * 1.0, 1000, 10, (n,)) for n in range(1, 6))
    found = of_trace(Trace("t", "mooncake", rows), SLO, random.Random(1), rate_rps=2.0, duration_s=6.0)
    assert len(found) == 12
    assert len({one.hash_ids for one in found}) == 12
    assert found[0].arrival_s == 0.0
    assert found[-1].arrival_s < 6.0
    gaps = [later.arrival_s - one.arrival_s for one, later in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * 11)


def test_a_load_shifts_where_it_should_and_is_the_same_at_another_rate() -> None:
    kinds = Kind(100, 20), Kind(200, 50, 1.0, 2)
    slow, fast = (
        shifting(*kinds, SLO, random.Random(3), rate_rps=rate, duration_s=200 / rate, first_share=0.25)
        for rate in (10.0, 20.0)
    )
    assert [one.num_tiles for one in slow] == [0] * 50 + [20] * 150
    assert [one.prompt_tokens for one in slow] == [one.prompt_tokens for one in fast]
    assert [one.arrival_s for one in slow] == pytest.approx([2 * one.arrival_s for one in fast])
