"""Budgets by prediction in the engine's scheduler."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import blocks_needed
from tests.support.engine_fakes import CONFIG, PREFILL, learnt
from tests.support.scheduler_steps import Steps
from workers.api import Batching, PrefillOrder, StepBudget
from workers.engine.step_budget import MAX_WAITS
from workers.engine.step_plan import StepPlan
from workers.engine.step_records import shape_of
from workers.step_shape import ENOUGH_STEPS, FactorSource

PREDICTED = replace(CONFIG, step_budget=StepBudget.PREDICTED, token_budget=64, max_running_sequences=8)


def predicted(**options: object) -> Steps:
    """Four sequences decode, at their targets; a prompt of 200 waits."""
    latency = options.pop("latency", learnt())
    target_s = options.pop("target_s", 0.035)
    steps = Steps(replace(PREDICTED, **options), num_blocks=1000, latency=latency)  # type: ignore[arg-type]
    for _ in range(4):
        steps.decoding(max_new=100, tpot_target_s=target_s)
    steps.wait(200)
    return steps


def prompt_tokens(plan: StepPlan) -> int:
    return sum(part.num_rows for part in plan.chunks)


def sizes(steps: Steps, num: int, step_s: float | None = None) -> list[int]:
    """Tokens of prompts in so many steps, which take what is predicted, or so long."""
    found, now_s = [], 0.0
    for _ in range(num):
        plan = steps.plan(now_s=now_s)
        found.append(prompt_tokens(plan))
        now_s += learnt().step_s(shape_of(plan)) if step_s is None else step_s
        steps.compute(plan, 0.0)
    return found


def test_prompts_get_what_the_target_leaves_beside_the_decodes() -> None:
    # 35 ms less 5 % are 33.3: 10 for the step, 4 for the decodes, 19 for prompts, of which 16 fill blocks.
    assert sizes(predicted(), 1) == [16]
    # A model that is further off keeps more free.
    assert sizes(predicted(latency=learnt(mean_error=0.4)), 1) == [8]


def test_what_a_step_did_not_use_is_the_next_ones() -> None:
    found = sizes(predicted(), 8)
    assert sum(found) >= 7 * 19
    assert max(found) <= 16 + 24


def test_the_least_target_counts() -> None:
    steps = predicted(target_s=10.0)
    steps.decoding(max_new=100, tpot_target_s=0.03)
    # 28.6 ms leave 13, of which 12 fill blocks.
    assert sizes(steps, 1) == [12]


def test_the_token_budget_is_never_passed() -> None:
    assert sizes(predicted(target_s=10.0), 3) == [60, 60, 60]


def test_a_profile_counts_before_the_first_step() -> None:
    begun = learnt(0, source=FactorSource.PROFILE)
    assert sizes(predicted(latency=begun), 1) == sizes(predicted(latency=learnt()), 1) != [60]


def test_before_the_model_has_learnt_and_without_targets_the_token_budget_holds() -> None:
    new = learnt(ENOUGH_STEPS - 1, source=FactorSource.ROOFLINE)
    assert sizes(predicted(latency=new), 1) == [60]
    assert sizes(predicted(latency=None), 1) == [60]
    assert sizes(predicted(target_s=math.inf), 1) == [60]
    assert sizes(predicted(step_budget=StepBudget.FIXED), 1) == [60]


def test_where_nothing_decodes_a_prompt_has_the_whole_budget() -> None:
    steps = Steps(PREDICTED, num_blocks=1000, latency=learnt())
    steps.wait(200, tpot_target_s=0.001)
    assert sizes(steps, 3) == [64, 64, 64]


def test_a_target_that_so_many_decodes_miss_alone_does_not_stop_prompts() -> None:
    # A step takes 10 ms and each of them one: 14 and nothing else.
    found = sizes(predicted(target_s=0.014), 2 * (MAX_WAITS + 1))
    assert found == ([0] * MAX_WAITS + [4]) * 2


def test_a_target_that_one_sequence_would_miss_alone_is_none() -> None:
    assert sizes(predicted(target_s=0.011), 2) == [60, 60]


def test_a_hand_off_late_in_its_prompt_gets_a_block_at_a_time_at_least() -> None:
    # Its attention is the work of all else times eight there.
    steps = Steps(PREDICTED, num_blocks=1000, attention_tokens=20.0, latency=learnt())
    for _ in range(4):
        steps.decoding(max_new=100, tpot_target_s=0.014)
    steps.prefilling(200, 160, phases=PREFILL)
    assert set(sizes(steps, MAX_WAITS + 1)) == {0, 4}


def test_drafts_are_counted_with_the_decodes() -> None:
    steps = predicted()
    assert steps.scheduler._predicted is not None
    steps.scheduler._predicted.observe(8)
    assert sizes(steps, 1) == [8]


@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6),
    targets_s=st.lists(st.sampled_from([0.001, 0.012, 0.02, 0.05, math.inf]), min_size=6, max_size=6),
    num_blocks=st.integers(15, 30),
    token_budget=st.integers(4, 30),
    order=st.sampled_from(PrefillOrder),
    batching=st.sampled_from(Batching),
    priorities=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    attention_tokens=st.sampled_from([1.0, 8.0, math.inf]),
    step_s=st.sampled_from([0.001, 0.02, 1.0]),
)
def test_everybody_ends_and_a_prompt_is_left_out_of_few_steps(
    prompts: list[tuple[int, int]],
    targets_s: list[float],
    num_blocks: int,
    token_budget: int,
    order: PrefillOrder,
    batching: Batching,
    priorities: list[int],
    attention_tokens: float,
    step_s: float,
) -> None:
    config = replace(
        PREDICTED, token_budget=token_budget, prefill_order=order, batching=batching, growth_reserve=0.0
    )
    steps = Steps(config, num_blocks=num_blocks, attention_tokens=attention_tokens, latency=learnt())
    left = {
        steps.wait(num_prompt, max_new, priority=priority, tpot_target_s=target_s)
        for (num_prompt, max_new), priority, target_s in zip(prompts, priorities, targets_s, strict=False)
        if blocks_needed(num_prompt + max_new, 4) <= num_blocks
    }
    num_steps = 0
    while left:
        num_steps += 1
        assert num_steps < 4000, "no progress"
        plan = steps.plan(now_s=num_steps * step_s)
        assert plan.slices
        assert plan.num_tokens <= max(token_budget, len(plan.decodes))
        steps.compute(plan, step_s)
        for one in [one for one in left if len(one.token_ids) >= one.max_tokens]:
            left.remove(one)
            steps.batch.leave(one)
    assert steps.batch.pool.num_available == num_blocks


def test_a_prompt_that_the_running_step_ends_leaves_the_budget_to_the_next() -> None:
    steps = Steps(PREDICTED, num_blocks=1000, latency=learnt())
    for _ in range(4):
        steps.decoding(max_new=100, tpot_target_s=0.035)
    # As a step that is planned while that one runs has it.
    steps.prefilling(20, 20)
    steps.wait(200)
    assert sizes(steps, 1) == [16]
