"""Prompts in the engine's scheduler so that few are late."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import blocks_needed
from tests.support.engine_fakes import CONFIG, learnt, make_engine, outputs_of, run_step, submit
from tests.support.scheduler_steps import Steps
from workers.api import PrefillOrder, PrefillStarted, StepBudget
from workers.engine.scheduler import FIRST_PREFILL_RATE
from workers.engine.sequence import Sequence
from workers.engine.step_plan import StepPlan
from workers.prompt_order import LATE_SHARE, Standing

SLACK = replace(CONFIG, prefill_order=PrefillOrder.LEAST_SLACK)
ONE = replace(SLACK, token_budget=8, max_running_sequences=1)


def order_of(plan: StepPlan) -> list[Sequence]:
    return [part.sequence for part in plan.chunks]


def test_who_is_due_first_goes_first() -> None:
    steps = Steps(SLACK)
    relaxed = steps.wait(4, ttft_left_s=30.0)
    urgent = steps.wait(4, ttft_left_s=5.0)
    assert order_of(steps.plan()) == [urgent, relaxed]


def test_where_not_all_can_make_it_the_one_that_takes_longest_is_passed_over() -> None:
    steps = Steps(replace(SLACK, token_budget=8000), num_blocks=4000)
    long = steps.wait(int(3 * FIRST_PREFILL_RATE), ttft_left_s=5.0)
    some = [steps.wait(int(FIRST_PREFILL_RATE), ttft_left_s=4.5 - i) for i in range(3)]
    # It is due at six and the others half a second later; all four take until seven.
    assert order_of(steps.plan(now_s=1.0)) == [*some, long]
    assert long.standing is Standing.PASSED_OVER


def test_who_has_begun_is_passed_over_too() -> None:
    steps = Steps(replace(SLACK, token_budget=4000), num_blocks=4000)
    long = steps.prefilling(int(4 * FIRST_PREFILL_RATE), 16, ttft_left_s=5.0)
    some = [steps.wait(int(FIRST_PREFILL_RATE), ttft_left_s=4.0) for _ in range(2)]
    assert order_of(steps.plan(now_s=2.0))[:2] == some
    assert long.standing is Standing.PASSED_OVER


def test_without_targets_the_deadline_counts() -> None:
    steps = Steps(SLACK)
    late = steps.wait(4, timeout_s=90.0)
    soon = steps.wait(4, timeout_s=20.0)
    assert order_of(steps.plan()) == [soon, late]


def test_who_is_too_late_lets_others_past_but_not_for_ever() -> None:
    steps = Steps(ONE)
    late = steps.wait(4, ttft_left_s=1.0, timeout_s=1000.0)
    steps.num_arrived = 5
    other = steps.wait(4, ttft_left_s=10.0)
    plan = steps.plan(now_s=6.5)
    assert order_of(plan) == [other]
    assert late.standing is Standing.LATE
    # As soon as its share of what the others got is as much as it needs.
    for _ in range(int(4 / LATE_SHARE / 4)):
        steps.compute(plan, step_s=0.0)
        steps.batch.leave(other)
        other = steps.wait(4, ttft_left_s=10.0)
        plan = steps.plan(now_s=6.5)
    assert order_of(plan) == [late]


def test_what_is_cached_takes_no_time() -> None:
    config = replace(ONE, is_prefix_cache_on=True, token_budget=4000)
    num_prompt = int(4 * FIRST_PREFILL_RATE)
    steps = Steps(config, num_blocks=3000)
    steps.wait(num_prompt, ttft_left_s=100.0)
    plan = steps.plan()
    steps.compute(plan)
    [first] = order_of(plan)
    steps.batch.leave(first)
    # Four seconds for a target of one, if all of it were to be computed.
    again = steps.wait(num_prompt, ttft_left_s=1.0)
    other = steps.wait(4, ttft_left_s=20.0)
    assert order_of(steps.plan(now_s=2.5)) == [again]
    assert again.standing is Standing.ON_TIME
    assert again.num_known_tokens == num_prompt - config.block_size
    assert other.num_known_tokens == 0


def test_what_others_compute_meanwhile_may_save_one_from_being_late() -> None:
    config = replace(ONE, is_prefix_cache_on=True, token_budget=4000)
    num_prompt = int(4 * FIRST_PREFILL_RATE)
    steps = Steps(config, num_blocks=3000)
    first = steps.wait(num_prompt, ttft_left_s=6.0)
    twin = steps.wait(num_prompt, ttft_left_s=7.0)
    plan = steps.plan(now_s=2.5)
    assert order_of(plan) == [first]
    assert twin.num_known_tokens == 0
    steps.compute(plan)
    steps.batch.leave(first)
    assert order_of(steps.plan(now_s=6.0)) == [twin]
    assert twin.standing is Standing.ON_TIME


def test_who_has_its_first_token_is_never_late() -> None:
    steps = Steps(SLACK)
    again = steps.wait(6, ttft_left_s=1.0)
    again.append(50)
    fresh = steps.wait(4, ttft_left_s=10.0)
    assert order_of(steps.plan(now_s=20.0)) == [again, fresh]


def test_priority_comes_before_slack() -> None:
    steps = Steps(SLACK)
    urgent = steps.wait(4, ttft_left_s=1.0)
    important = steps.wait(4, ttft_left_s=50.0, priority=1)
    assert order_of(steps.plan()) == [important, urgent]


def test_a_tenant_that_got_more_lets_the_other_go_first() -> None:
    for weight, is_flood_first in ((1.0, False), (1000.0, True)):
        steps = Steps(replace(SLACK, token_budget=4000), num_blocks=5000)
        for _ in range(3):
            steps.wait(1000, ttft_left_s=30.0, cache_salt="flood", tenant_weight=weight)
        steps.wait(4, ttft_left_s=20.0, cache_salt="modest")
        steps.compute(steps.plan(), step_s=0.0)
        more = steps.wait(4, ttft_left_s=30.0, cache_salt="flood")
        modest = steps.wait(4, ttft_left_s=30.5, cache_salt="modest")
        steps.batch.decodes.clear()
        steps.batch.num_places = steps.batch.num_running = 0
        order = steps.scheduler._slack
        assert order is not None
        assert (order.sorted([modest, more], 5.0, FIRST_PREFILL_RATE)[0] is more) == is_flood_first


def test_a_tenant_that_waits_for_a_place_keeps_its_claim() -> None:
    steps = Steps(ONE, num_blocks=200)
    flood = steps.wait(80, ttft_left_s=30.0, cache_salt="flood")
    steps.compute(steps.plan())
    modest = steps.wait(4, ttft_left_s=30.0, cache_salt="modest")
    for _ in range(9):
        plan = steps.plan()
        assert order_of(plan) == [flood]
        steps.compute(plan)
    # Its target is a tenth of a second earlier, and the flood got 72 tokens meanwhile, 0.14 s.
    more = steps.wait(4, ttft_left_s=28.9, cache_salt="flood")
    steps.batch.leave(flood)
    assert order_of(steps.plan()) == [modest]
    assert more in steps.batch.waiting


def test_the_engine_says_who_did_not_begin_in_its_turn_and_why() -> None:
    config = replace(SLACK, token_budget=4, max_running_sequences=1)
    engine = make_engine(config=config, num_blocks=64)
    engine.handle(replace(submit("early", num_prompt=4, max_new=1), ttft_left_s=30.0), 0.0)
    engine.handle(replace(submit("urgent", num_prompt=4, max_new=1), ttft_left_s=2.0), 1.0)
    for now_s in (1.5, 2.0):
        run_step(engine, now_s)
    first, second = outputs_of(engine, PrefillStarted)
    assert isinstance(first, PrefillStarted)
    assert isinstance(second, PrefillStarted)
    assert first.key.request_id == "urgent"
    assert first.order_reason == "before 1 that came earlier, after 0 that came later: slack 1.492 s"
    assert second.order_reason.startswith("before 0 that came earlier, after 1 that came later: slack 27.99")
    engine.handle(submit("alone"), 3.0)
    run_step(engine, 3.0)
    [third] = outputs_of(engine, PrefillStarted)
    assert isinstance(third, PrefillStarted)
    assert third.order_reason == ""


@given(
    prompts=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 10),
            st.sampled_from([-5.0, 0.05, 1.0, 20.0, math.inf]),
            st.integers(0, 1),
            st.sampled_from("abc"),
            st.sampled_from([0.1, 1.0, 5.0]),
        ),
        min_size=1,
        max_size=8,
    ),
    num_blocks=st.integers(15, 30),
    step_s=st.sampled_from([0.01, 1.0, 40.0]),
    reserve=st.sampled_from([0.0, 1.0]),
)
def test_everybody_ends_whatever_the_targets_and_tenants_are(
    prompts: list[tuple[int, int, float, int, str, float]], num_blocks: int, step_s: float, reserve: float
) -> None:
    steps = Steps(replace(SLACK, growth_reserve=reserve), num_blocks=num_blocks)
    left = {
        steps.wait(
            num_prompt,
            max_new,
            priority=priority,
            ttft_left_s=ttft_s,
            timeout_s=1000.0,
            cache_salt=tenant,
            tenant_weight=weight,
        )
        for num_prompt, max_new, ttft_s, priority, tenant, weight in prompts
        if blocks_needed(num_prompt + max_new, 4) <= num_blocks
    }
    num_steps = 0
    while left:
        num_steps += 1
        assert num_steps < 2000, "no progress"
        plan = steps.plan(now_s=num_steps * step_s)
        assert plan.slices
        steps.compute(plan, step_s)
        for one in [one for one in left if len(one.token_ids) >= one.max_tokens]:
            left.remove(one)
            steps.batch.leave(one)
    assert steps.batch.pool.num_available == num_blocks


@pytest.mark.parametrize("tenant", ["same", "other"])
def test_a_stream_of_urgent_prompts_does_not_keep_out_one_that_is_late(tenant: str) -> None:
    """It gets a part of all that is computed."""
    steps = Steps(ONE)
    late = steps.wait(4, ttft_left_s=-1.0, timeout_s=1000.0, cache_salt="same")
    steps.wait(4, ttft_left_s=3.0, cache_salt=tenant)
    now_s, num_others = 2.0, 0
    while late not in order_of(plan := steps.plan(now_s=now_s)):
        assert num_others < 2 / LATE_SHARE, "it waits for ever"
        num_others += 1
        [first] = order_of(plan)
        steps.compute(plan, step_s=0.0)
        steps.batch.leave(first)
        now_s += 0.5
        steps.num_arrived = int(now_s) - 1
        steps.wait(4, ttft_left_s=3.0, cache_salt=tenant)
    assert num_others > 0.5 / LATE_SHARE


def test_who_is_late_gets_its_share_beside_prompts_of_a_lower_priority() -> None:
    steps = Steps(ONE)
    late = steps.wait(4, ttft_left_s=-1.0, timeout_s=1000.0, priority=1)
    steps.wait(4, timeout_s=1000.0)
    for _ in range(int(2 / LATE_SHARE)):
        steps.num_arrived = 1
        other = steps.wait(4, ttft_left_s=9.0, priority=1)
        [first] = order_of(plan := steps.plan(now_s=2.0))
        steps.compute(plan, step_s=0.0)
        steps.batch.leave(first)
        if first is late:
            return
        assert first is other
    pytest.fail("it waits for ever")


def test_who_is_late_gets_its_share_though_prompts_take_several_steps_and_all_places() -> None:
    steps = Steps(ONE)
    late = steps.wait(4, ttft_left_s=-1.0, timeout_s=1000.0)
    for _ in range(int(1 / LATE_SHARE)):
        steps.num_arrived = 1
        other = steps.wait(16, ttft_left_s=9.0)
        while not other.has_first_token:
            [first] = order_of(plan := steps.plan(now_s=2.0))
            if first is late:
                return
            steps.compute(plan, step_s=0.0)
        steps.batch.leave(other)
    pytest.fail("it waits for ever")


def test_who_begins_again_takes_nothing_from_those_that_are_late() -> None:
    steps = Steps(SLACK)
    again = steps.wait(6, ttft_left_s=-1.0)
    steps.wait(40, ttft_left_s=-1.0)
    found = []
    for _ in range(2):
        steps.plan(now_s=3.0)
        found.append(again.standing)
        again.append(50)
    assert found == [Standing.LATE, Standing.ON_TIME]


def test_those_that_begin_again_do_so_by_rank() -> None:
    steps = Steps(SLACK)
    both = [steps.wait(6) for _ in range(2)]
    for one in both:
        one.append(50)
    assert order_of(steps.plan(now_s=5.0)) == both


def test_the_cache_is_not_asked_at_each_step_about_those_that_are_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = Steps(replace(SLACK, is_prefix_cache_on=True))
    for _ in range(3):
        steps.wait(40, ttft_left_s=-1.0)
    steps.plan(now_s=9.0, num_places=2)
    asked: list[Sequence] = []
    monkeypatch.setattr(steps.batch, "num_known_tokens", asked.append)
    for _ in range(3):
        steps.plan(now_s=9.0, num_places=2)
    assert asked == []


def test_a_target_that_decodes_miss_alone_leaves_prompts_all_the_time_that_they_get() -> None:
    config = replace(SLACK, step_budget=StepBudget.PREDICTED, token_budget=64)
    steps = Steps(config, num_blocks=1000, latency=learnt())
    # A step takes 10 ms without any token.
    steps.decoding(max_new=100, tpot_target_s=0.005)
    prompt = steps.wait(200, ttft_left_s=2.0)
    steps.plan(now_s=2.0)
    assert prompt.standing is Standing.ON_TIME


def test_steps_are_not_taken_for_longer_than_what_waits_for_them() -> None:
    steps = Steps(replace(ONE, token_budget=2048), num_blocks=1000, latency=learnt())
    # A step of 2,048 tokens takes two seconds, both of these together 0.13.
    soon = steps.wait(20, ttft_left_s=1.0)
    steps.num_arrived = 0
    steps.wait(100, ttft_left_s=30.0)
    assert order_of(steps.plan(now_s=1.0)) == [soon]
    assert soon.standing is Standing.ON_TIME
