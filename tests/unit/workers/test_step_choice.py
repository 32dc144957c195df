"""What a step computes of prompts beside its decodes."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from workers.api import Phase
from workers.step_choice import Exclusive, Head, Layout, Mixed, Split, StepChoice, StepPace
from workers.step_cost import StepCost

#: Of a small model on a core: a token takes 2.5 ms, a step 35 ms beside that.
COST = StepCost(0.035, 0.0025, 0.0025, 0.0, 5e-6, 1e-6)
CHOICE = StepChoice(COST, max_prefill_tokens=256, min_chunk_tokens=16, max_waits=3)


def head(num_left: int, num_done: int = 0) -> Head:
    return Head(0, num_left, num_done, 1.0, float("inf"))


def pace(planned_s: float, *, num_steps: int = 0, now_s: float = 0.0) -> StepPace:
    found = StepPace()
    found.begin(now_s, planned_s, num_decode_steps=num_steps, is_decoding=True)
    return found


def test_prompts_get_what_the_target_leaves() -> None:
    step = CHOICE.step(head(1000), 4, 400, pace(0.1))
    assert isinstance(step, Mixed)
    num_tokens = step.token_budget - 4
    assert 16 <= num_tokens < 26
    assert COST.step_s(4, 400, num_tokens, num_tokens * (num_tokens + 1) / 2) <= 0.1


def test_where_nothing_decodes_prompts_have_the_device() -> None:
    assert CHOICE.step(head(1000), 0, 0, pace(0.1)) == Mixed(256, 0)


def test_a_target_that_cannot_be_met_leaves_prompts_out_of_a_few_steps_at_a_time() -> None:
    late = pace(0.02)
    steps = [CHOICE.step(head(1000), 4, 400, late) for _ in range(8)]
    assert steps == ([Exclusive(Phase.DECODE, 0)] * 3 + [Mixed(4 + 16)]) * 2


def test_steps_without_prompts_save_for_one_with_enough() -> None:
    # Beside these decodes 10 tokens of a prompt would be in time, and a chunk has 16.
    own, now_s, budgets = StepPace(), 0.0, []
    for number in range(6):
        own.begin(now_s, 0.0755, num_decode_steps=number, is_decoding=True)
        step = CHOICE.step(head(1000), 4, 400, own)
        num_tokens = step.token_budget - 4 if isinstance(step, Mixed) else 0
        now_s += COST.step_s(4, 400, num_tokens, num_tokens * (num_tokens + 1) / 2)
        budgets.append(num_tokens)
    assert budgets[0] == 0
    assert max(budgets) >= 16
    assert now_s <= 6 * 0.0755


def test_what_was_saved_ends_with_the_decodes_that_saved_it() -> None:
    own = StepPace()
    own.begin(0.0, 0.1, num_decode_steps=0, is_decoding=True)
    own.begin(0.05, 0.1, num_decode_steps=1, is_decoding=True)
    assert own.limit_s > 0.14
    own.begin(0.1, 0.1, num_decode_steps=2, is_decoding=False)
    own.begin(0.2, 0.1, num_decode_steps=2, is_decoding=True)
    # No step began since: what has passed is counted.
    assert own.limit_s < 1e-9


def test_a_split_is_chosen_only_where_the_device_has_layouts() -> None:
    fast = Layout(0.8, 0.2, 0.99, 0.9)
    assert isinstance(CHOICE.step(head(1000), 8, 800, pace(0.1)), Mixed)
    divided = replace(CHOICE, layouts=(fast,))
    assert isinstance(divided.step(head(1000), 8, 800, pace(0.1)), Split)


@given(
    num=st.integers(1, 64),
    context=st.integers(1, 50_000),
    done=st.integers(0, 8000),
    planned_s=st.floats(0.001, 1.0),
    max_waits=st.integers(0, 10),
)
def test_a_prompt_is_left_out_of_so_many_steps_at_most(
    num: int, context: int, done: int, planned_s: float, max_waits: int
) -> None:
    choice, own, num_waits = replace(CHOICE, max_waits=max_waits), StepPace(), 0
    for number in range(40):
        own.begin(0.1 * number, planned_s, num_decode_steps=number, is_decoding=True)
        step = choice.step(head(500, done), num, context, own)
        if isinstance(step, Exclusive):
            num_waits += 1
        else:
            assert isinstance(step, Mixed)
            assert step.token_budget - num >= choice.min_chunk_tokens
            num_waits = 0
        assert num_waits <= max_waits


def test_tokens_that_cost_nothing_are_bounded_by_the_budget_alone() -> None:
    """A latency model learns that of a device whose steps take as long as their launch."""
    cost = replace(COST, token_s=0.0, pair_s=0.0)
    step = replace(CHOICE, cost=cost).step(head(1000), 4, 400, pace(0.1))
    assert isinstance(step, Mixed)
    assert step.token_budget >= 1000
