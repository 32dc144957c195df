"""What goes into a step."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import blocks_needed
from tests.support.engine_fakes import BOTH, CONFIG, PREFILL
from tests.support.scheduler_steps import Steps
from workers.api import Batching, EngineConfig, PrefillOrder
from workers.engine.scheduler import FIRST_PREFILL_RATE
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.step_plan import StepPlan


def parts(step: StepPlan) -> list[tuple[int, int, bool]]:
    return [(part.start, part.end, part.yields_token) for part in step.slices]


def chunks(step: StepPlan) -> list[tuple[Sequence, int]]:
    return [(part.sequence, part.end - part.start) for part in step.chunks]


def big(token_budget: int, **options: object) -> EngineConfig:
    """Limits of which only the budget matters."""
    config = EngineConfig(
        token_budget=token_budget,
        max_running_sequences=512,
        max_waiting_requests=512,
        growth_reserve=0.0,
        is_prefix_cache_on=False,
    )
    return replace(config, **options)  # type: ignore[arg-type]


# Stall-free batches.


def test_nothing_to_do_is_an_empty_plan() -> None:
    step = Steps().plan()
    assert (step.decodes, step.chunks, step.admitted, step.num_tokens) == ([], (), (), 0)


def test_a_decode_computes_its_last_token() -> None:
    steps = Steps()
    steps.decoding(5)
    step = steps.plan()
    assert parts(step) == [(5, 6, True)]
    assert step.num_tokens == 1


def test_decodes_come_before_prefills_whatever_their_order() -> None:
    steps = Steps()
    first, second = steps.prefilling(30, 8), steps.decoding()
    assert [part.sequence for part in steps.plan().slices] == [second, first]


def test_a_prompt_longer_than_the_budget_is_cut_at_block_borders() -> None:
    steps = Steps()
    prompt = steps.wait(40)
    step = steps.plan()
    assert parts(step) == [(0, 16, False)]
    assert step.admitted == (prompt,)
    # A decode takes one of 16 tokens; of the 15 left the chunk takes 3 blocks of 4.
    steps = Steps()
    steps.decoding()
    steps.prefilling(40, 16)
    assert parts(steps.plan()) == [(5, 6, True), (16, 28, False)]


def test_the_last_chunk_need_not_end_at_a_border() -> None:
    steps = Steps()
    steps.prefilling(18, 16)
    assert parts(steps.plan()) == [(16, 18, True)]


def test_a_hand_off_begins_no_chunk_that_fills_no_block_but_ends_a_prompt() -> None:
    for num_computed, expected in ((8, [(5, 6, True)]), (18, [(5, 6, True), (18, 20, True)])):
        steps = Steps(replace(CONFIG, token_budget=4))
        steps.decoding()
        steps.prefilling(20, num_computed, phases=PREFILL)
        assert parts(steps.plan()) == expected


def test_a_hand_off_gets_a_block_in_a_step_of_its_own_however_late_it_is() -> None:
    # After 16 tokens one costs five: the budget is not enough for a block.
    steps = Steps(replace(CONFIG, token_budget=8), attention_tokens=4)
    steps.prefilling(40, 16, phases=PREFILL)
    assert parts(steps.plan()) == [(16, 20, False)]


def test_a_budget_smaller_than_a_block_still_makes_progress() -> None:
    steps = Steps(replace(CONFIG, token_budget=4))
    steps.decoding()
    steps.prefilling(20, 8)
    assert parts(steps.plan()) == [(5, 6, True), (8, 11, False)]


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    steps = Steps()
    queue = [steps.wait(5), steps.wait(6), steps.wait(30)]
    step = steps.plan()
    assert parts(step) == [(0, 5, True), (0, 6, True), (0, 4, False)]
    assert step.admitted == tuple(queue)


# Golden vectors: serving_papers, section 4.


def test_golden_a_running_prefill_comes_before_a_new_one_and_both_behind_the_decodes() -> None:
    steps = Steps(big(512), num_blocks=1000)
    for _ in range(100):
        steps.decoding()
    running = steps.prefilling(800, 500)
    new = steps.wait(1000)
    step = steps.plan()
    assert len(step.decodes) == 100
    assert chunks(step) == [(running, 300), (new, 112)]
    assert step.num_tokens == 512


def test_golden_decodes_are_never_cut_and_may_exceed_the_budget() -> None:
    steps = Steps(big(128), num_blocks=1000)
    for _ in range(200):
        steps.decoding()
    steps.prefilling(800, 16)
    steps.wait(1000)
    step = steps.plan()
    # The published code schedules a negative chunk here.
    assert (len(step.decodes), step.chunks, step.admitted, step.num_tokens) == (200, (), (), 200)


def test_golden_a_decode_maximal_batch_is_cut_to_a_tile() -> None:
    config = big(256, batching=Batching.DECODE_MAXIMAL, tile_tokens=128)
    steps = Steps(config, num_blocks=1000)
    for _ in range(17):
        steps.decoding()
    steps.wait(1000)
    steps.wait(1000)
    step = steps.plan()
    # Batch 18: chunk 256 - 17 = 239, and one prompt alone.
    assert [num for _, num in chunks(step)] == [239]
    assert step.num_tokens == 256


def test_golden_each_chunk_reads_the_kv_of_all_before_it() -> None:
    steps = Steps(big(256), num_blocks=1000)
    steps.wait(16 * 256)
    num_loads = 0
    for _ in range(16):
        [part] = (step := steps.plan()).chunks
        num_loads += part.end // 256
        steps.compute(step)
    # N chunks load N (N + 1) / 2.
    assert num_loads == 136


def test_golden_the_ratio_of_prompt_to_output_that_fills_every_step() -> None:
    # C / (B - 1) = 256 / 17: with so many prompt tokens for each output token no step is without a chunk.
    steps = Steps(big(256 + 17, batching=Batching.DECODE_MAXIMAL), num_blocks=1000)
    for _ in range(17):
        steps.decoding(max_new=100)
    steps.wait(2048)
    num_prompt = num_output = 0
    for _ in range(8):
        step = steps.plan()
        num_prompt += sum(num for _, num in chunks(step))
        num_output += len(step.decodes)
        steps.compute(step)
    assert num_prompt / num_output == pytest.approx(15.06, abs=0.005)


@pytest.mark.parametrize(("num_prompt", "chunk"), [(127, 127), (128, 128), (129, 128), (300, 256)])
def test_a_step_ends_at_a_tile_unless_the_prompt_ends_before(num_prompt: int, chunk: int) -> None:
    steps = Steps(big(256 + 40, tile_tokens=128), num_blocks=1000)
    steps.wait(num_prompt)
    # 129 tokens fit the budget whole; only what is cut is cut to a tile.
    assert [num for _, num in chunks(steps.plan())] == [129 if num_prompt == 129 else chunk]


def test_a_tile_larger_than_the_budget_does_not_stop_a_prompt() -> None:
    steps = Steps(big(64, tile_tokens=128))
    steps.wait(300)
    assert [num for _, num in chunks(steps.plan())] == [64]


def test_a_late_chunk_is_smaller_because_its_attention_is_more_work() -> None:
    sizes = []
    for num_computed in (0, 1024, 3072):
        steps = Steps(big(256), num_blocks=1000, attention_tokens=1024)
        steps.prefilling(8000, num_computed)
        sizes += [num for _, num in chunks(steps.plan())]
    assert sizes == [256, 128, 64]


# Order.


def test_the_shortest_remaining_prompt_goes_first_and_the_head_is_cut() -> None:
    config = replace(CONFIG, prefill_order=PrefillOrder.SHORTEST_REMAINING, token_budget=16)
    steps = Steps(config, num_blocks=2000)
    long = steps.prefilling(4000, 16)
    short = steps.wait(5)
    assert chunks(steps.plan()) == [(short, 5), (long, 8)]


def test_waiting_makes_up_for_length() -> None:
    config = replace(CONFIG, prefill_order=PrefillOrder.SHORTEST_REMAINING)
    # Ten seconds of prefill more are made up for by eleven seconds of waiting.
    for num_seconds, is_long_first in ((9, False), (11, True)):
        steps = Steps(config, num_blocks=5000)
        long = steps.wait(int(10 * FIRST_PREFILL_RATE) + 5, timeout_s=1000.0)
        steps.num_arrived += num_seconds - 1
        steps.wait(5, timeout_s=1000.0)
        [first, *_] = steps.plan().chunks
        assert (first.sequence is long) == is_long_first


def test_the_speed_of_prefill_is_learned_from_steps() -> None:
    config = replace(CONFIG, prefill_order=PrefillOrder.SHORTEST_REMAINING, token_budget=1000)
    steps = Steps(config, num_blocks=5000)
    steps.wait(4000)
    before = steps.scheduler._prefill_rate
    steps.compute(steps.plan(), step_s=1000 / (2 * before))
    assert before < steps.scheduler._prefill_rate < 2 * before


def test_a_higher_priority_goes_first_whatever_the_order() -> None:
    for order in PrefillOrder:
        steps = Steps(replace(CONFIG, prefill_order=order))
        steps.prefilling(40, 16)
        steps.wait(2)
        urgent = steps.wait(10, priority=5)
        assert chunks(steps.plan())[0] == (urgent, 10)


# Admission.


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    steps = Steps(num_blocks=12)
    steps.wait(50)
    steps.wait(5)
    # The head needs 13 blocks, what follows it 2.
    assert steps.plan().slices == ()


def test_admission_counts_blocks_for_what_may_be_generated() -> None:
    # 5 + 3 tokens: 2 blocks; handed off: 5 tokens, 2 blocks; 5 + 4: 3 blocks.
    for max_new, phases, num_blocks, num_admitted in (
        (3, BOTH, 4, 2),
        (4, BOTH, 4, 1),
        (9, PREFILL, 4, 2),
    ):
        steps = Steps(num_blocks=num_blocks)
        steps.wait(5, max_new, phases)
        steps.wait(5, max_new, phases)
        assert len(steps.plan().admitted) == num_admitted


def test_a_part_of_what_may_be_generated_is_kept_free() -> None:
    # Prompts of one block that may grow by 4 more.
    for reserve, num_admitted in ((1.0, 2), (0.5, 3), (0.25, 4), (0.0, 4)):
        steps = Steps(replace(CONFIG, growth_reserve=reserve), num_blocks=10)
        for _ in range(4):
            steps.wait(4, 16)
        assert len(steps.plan().admitted) == num_admitted


def test_room_to_grow_is_kept_beside_what_transfers_hold_too() -> None:
    steps = Steps(num_blocks=3)
    lone = steps.wait(5, 7)
    leased = steps.batch.pool.lease(1)
    assert steps.plan().admitted == ()
    steps.batch.pool.release(leased)
    assert steps.plan().admitted == (lone,)


def test_no_more_run_than_there_are_places() -> None:
    steps = Steps()
    for _ in range(6):
        steps.wait(1)
    assert len(steps.plan(num_places=2).admitted) == 2
    assert len(steps.plan(num_places=2).admitted) == 0
    assert len(steps.plan().admitted) == 2


def test_who_arrived_after_kv_that_waits_for_blocks_waits_too() -> None:
    steps = Steps()
    first = steps.wait(5)
    steps.wait(5)
    assert steps.plan(arrived_until_s=1.5).admitted == (first,)


# Preemption.

OPTIMISTIC = replace(CONFIG, growth_reserve=0.0)


def test_a_decode_without_a_block_takes_those_of_the_last_in_rank() -> None:
    steps = Steps(OPTIMISTIC, num_blocks=4)
    first, last = steps.decoding(7, max_new=9), steps.decoding(7, max_new=9)
    first.append(51)
    last.append(51)
    step = steps.plan()
    assert (step.decodes, step.preempted, step.admitted) == ([first], (last,), ())
    assert (last.state, last.num_computed_tokens, last.block_table) == (SequenceState.WAITING, 0, [])
    assert last.token_ids[-2:] == [50, 51]
    # It comes back when there is room for all of it, and computes its own tokens again.
    steps.batch.leave(first)
    step = steps.plan()
    assert step.admitted == (last,)
    assert parts(step) == [(0, 9, True)]


def test_a_decode_of_a_higher_priority_is_preempted_last() -> None:
    steps = Steps(OPTIMISTIC, num_blocks=4)
    low, high = steps.decoding(7, max_new=9), steps.decoding(7, max_new=9, priority=1)
    low.append(51)
    high.append(51)
    step = steps.plan()
    assert (step.decodes, step.preempted) == ([high], (low,))


def test_who_needs_a_block_and_is_last_gives_up_its_own() -> None:
    steps = Steps(OPTIMISTIC, num_blocks=4)
    first, last = steps.decoding(5, max_new=9), steps.decoding(7, max_new=9)
    last.append(51)
    step = steps.plan()
    assert (step.decodes, step.preempted) == ([first], (last,))


def test_a_chunk_takes_the_blocks_of_those_behind_it() -> None:
    steps = Steps(OPTIMISTIC, num_blocks=5)
    first = steps.prefilling(20, 4)
    behind = steps.decoding(13, max_new=2)
    step = steps.plan()
    assert step.preempted == (behind,)
    assert (step.decodes, chunks(step)) == ([], [(first, 12)])


def test_a_chunk_is_cut_to_the_blocks_that_there_are() -> None:
    steps = Steps(OPTIMISTIC, num_blocks=5)
    first = steps.decoding(10, max_new=2)
    behind = steps.prefilling(20, 4)
    step = steps.plan()
    assert (step.decodes, chunks(step), step.preempted) == ([first], [(behind, 4)], ())


def test_an_urgent_request_takes_the_blocks_of_less_urgent_ones_if_that_lets_it_in() -> None:
    for num_prompt, is_enough in ((20, True), (33, False)):
        steps = Steps(OPTIMISTIC, num_blocks=8)
        running = steps.decoding(25, max_new=2)
        urgent = steps.wait(num_prompt, priority=1)
        step = steps.plan()
        assert step.admitted == ((urgent,) if is_enough else ())
        assert step.preempted == ((running,) if is_enough else ())


def test_a_hand_off_is_never_preempted() -> None:
    steps = Steps(OPTIMISTIC, num_blocks=4)
    urgent = steps.decoding(7, max_new=9, priority=1)
    steps.prefilling(8, 4, phases=PREFILL)
    urgent.append(51)
    step = steps.plan()
    assert step.preempted == (urgent,)
    assert [part.sequence.is_handed_off for part in step.chunks] == [True]


# Prefixes.


def test_a_prompt_computes_only_what_is_not_known() -> None:
    steps = Steps(replace(CONFIG, is_prefix_cache_on=True))
    first = steps.wait(10)
    steps.compute(steps.plan())
    second = steps.wait(12)
    step = steps.plan()
    # Two whole blocks; of the third only what is computed before a step can be copied, and that was partial.
    assert parts(step) == [(10, 11, True), (8, 12, True)]
    assert second.block_table[:2] == first.block_table[:2]


def test_a_prompt_that_is_known_to_its_end_computes_one_token_in_a_copy() -> None:
    steps = Steps(replace(CONFIG, is_prefix_cache_on=True))
    first = steps.wait(8)
    steps.compute(steps.plan())
    second = steps.wait(8)
    step = steps.plan()
    assert parts(step)[1] == (7, 8, True)
    assert second.block_table[0] == first.block_table[0]
    assert step.copies == {second.block_table[1]: first.block_table[1]}


def test_prompts_of_one_step_share_what_it_computes() -> None:
    steps = Steps(replace(CONFIG, is_prefix_cache_on=True, token_budget=32))
    first, second = steps.wait(10), steps.wait(10)
    step = steps.plan()
    assert parts(step) == [(0, 10, True), (8, 10, True)]
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    steps = Steps(replace(OPTIMISTIC, is_prefix_cache_on=True))
    sequence = steps.wait(10)
    steps.compute(steps.plan())
    steps.batch.preempt(sequence)
    assert parts(steps.plan()) == [(8, 11, True)]


@given(
    prompts=st.lists(st.integers(1, 40), max_size=8),
    num_decoding=st.integers(0, 4),
    computed_blocks=st.lists(st.integers(0, 4), max_size=3),
    num_blocks=st.integers(45, 80),
    token_budget=st.integers(8, 30),
    batching=st.sampled_from(Batching),
    order=st.sampled_from(PrefillOrder),
    tile_tokens=st.sampled_from([1, 4, 16]),
    is_cache_on=st.booleans(),
    reserve=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_plan_keeps_every_limit(
    prompts: list[int],
    num_decoding: int,
    computed_blocks: list[int],
    num_blocks: int,
    token_budget: int,
    batching: Batching,
    order: PrefillOrder,
    tile_tokens: int,
    is_cache_on: bool,
    reserve: float,
) -> None:
    config = replace(
        CONFIG,
        token_budget=token_budget,
        max_running_sequences=8,
        batching=batching,
        prefill_order=order,
        tile_tokens=tile_tokens,
        is_prefix_cache_on=is_cache_on,
        growth_reserve=reserve,
    )
    steps = Steps(config, num_blocks=num_blocks)
    for _ in range(num_decoding):
        steps.decoding()
    for num in computed_blocks:
        steps.prefilling(20, 4 * num)
    for num in prompts:
        steps.wait(num)
    num_running = len(list(steps.batch.running()))
    step = steps.plan()
    assert step.num_tokens <= max(token_budget, num_decoding)
    assert len({id(part.sequence) for part in step.slices}) == len(step.slices)
    assert num_running + len(step.admitted) <= config.max_running_sequences
    assert len(step.decodes) == num_decoding
    if order is PrefillOrder.FCFS:
        arrivals = [sequence.arrived_s for sequence in step.admitted]
        assert arrivals == sorted(arrivals)
    if batching is Batching.DECODE_MAXIMAL:
        assert len(step.chunks) <= 1
    for part in step.slices:
        assert part.start == part.sequence.num_computed_tokens < part.end <= len(part.sequence.token_ids)
        assert part.end <= part.sequence.capacity
    if prompts or computed_blocks or num_decoding:
        assert step.slices, "never an empty batch while there is work and room"


@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6),
    num_blocks=st.integers(15, 30),
    token_budget=st.integers(4, 30),
    order=st.sampled_from(PrefillOrder),
    batching=st.sampled_from(Batching),
    priorities=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    attention_tokens=st.sampled_from([1.0, 8.0, math.inf]),
)
def test_everybody_ends_however_scarce_the_blocks_are(
    prompts: list[tuple[int, int]],
    num_blocks: int,
    token_budget: int,
    order: PrefillOrder,
    batching: Batching,
    priorities: list[int],
    attention_tokens: float,
) -> None:
    config = replace(OPTIMISTIC, token_budget=token_budget, prefill_order=order, batching=batching)
    steps = Steps(config, num_blocks=num_blocks, attention_tokens=attention_tokens)
    left = {
        steps.wait(num_prompt, max_new, priority=priority)
        for (num_prompt, max_new), priority in zip(prompts, priorities, strict=False)
        if blocks_needed(num_prompt + max_new, 4) <= num_blocks
    }
    num_steps = 0
    while left:
        num_steps += 1
        assert num_steps < 2000, "no progress"
        step = steps.plan()
        assert step.slices
        steps.compute(step)
        for sequence in [one for one in left if len(one.token_ids) >= one.max_tokens]:
            left.remove(sequence)
            steps.batch.leave(sequence)
    assert steps.batch.pool.num_available == num_blocks
