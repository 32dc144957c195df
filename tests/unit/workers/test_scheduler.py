"""What goes into a step."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.layout import blocks_needed
from tests.support.engine_fakes import BOTH, CONFIG, PREFILL, submit
from workers.api import EngineConfig, PhaseSet
from workers.engine.block_pool import BlockPool
from workers.engine.scheduler import StepPlan, schedule
from workers.engine.sequence import Sequence, SequenceState


def waiting(num_prompt: int, max_new: int = 3, phases: PhaseSet = BOTH) -> Sequence:
    return Sequence.from_submit(submit(phases=phases, num_prompt=num_prompt, max_new=max_new), 0.0)


def prefilling(num_prompt: int, num_computed: int) -> Sequence:
    sequence = waiting(num_prompt)
    sequence.move_to(SequenceState.PREFILL)
    sequence.num_computed_tokens = num_computed
    return sequence


def decoding(num_prompt: int = 5) -> Sequence:
    sequence = prefilling(num_prompt, num_prompt)
    sequence.append(50)
    sequence.move_to(SequenceState.DECODE)
    return sequence


def plan(
    running: list[Sequence],
    queue: list[Sequence],
    *,
    num_blocks: int = 100,
    config: EngineConfig = CONFIG,
    num_places: int | None = None,
) -> StepPlan:
    places = config.max_running_sequences if num_places is None else num_places
    return schedule(running, queue, BlockPool(num_blocks, config.block_size), config, num_places=places)


def parts(step: StepPlan) -> list[tuple[int, int, bool]]:
    return [(part.start, part.end, part.yields_token) for part in step.slices]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan([], []) == StepPlan((), ())


def test_a_decode_computes_its_last_token() -> None:
    step = plan([decoding(5)], [])
    assert parts(step) == [(5, 6, True)]
    assert step.num_tokens == 1


def test_decodes_come_before_prefills_whatever_their_order() -> None:
    first, second = prefilling(30, 8), decoding()
    step = plan([first, second], [])
    assert [part.sequence for part in step.slices] == [second, first]


def test_a_prompt_longer_than_the_budget_is_cut_at_block_borders() -> None:
    prompt = waiting(40)
    step = plan([], [prompt])
    assert parts(step) == [(0, 16, False)]
    assert step.admitted == (prompt,)
    # A decode takes one of 16 tokens; of the 15 left the chunk takes 3 blocks of 4.
    assert parts(plan([decoding(), prefilling(40, 16)], [])) == [(5, 6, True), (16, 28, False)]


def test_the_last_chunk_need_not_end_at_a_border() -> None:
    assert parts(plan([prefilling(18, 16)], [])) == [(16, 18, True)]


def test_a_budget_smaller_than_a_block_starts_no_chunk_but_ends_a_prompt() -> None:
    config = replace(CONFIG, token_budget=4)
    assert parts(plan([decoding(), prefilling(20, 8)], [], config=config)) == [(5, 6, True)]
    assert parts(plan([decoding(), prefilling(20, 18)], [], config=config)) == [(5, 6, True), (18, 20, True)]


def test_prompts_share_a_step_in_order_of_arrival() -> None:
    queue = [waiting(5), waiting(6), waiting(30)]
    step = plan([], queue)
    assert parts(step) == [(0, 5, True), (0, 6, True), (0, 4, False)]
    assert step.admitted == tuple(queue)


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    # The head needs 13 blocks, what follows it 2.
    assert plan([], [waiting(50), waiting(5)], num_blocks=12).slices == ()


def test_admission_counts_blocks_for_all_that_may_be_generated() -> None:
    # 5 + 3 tokens: 2 blocks; handed off: 5 tokens, 2 blocks; 5 + 4: 3 blocks.
    assert len(plan([], [waiting(5), waiting(5)], num_blocks=4).admitted) == 2
    assert len(plan([], [waiting(5), waiting(5, max_new=4)], num_blocks=4).admitted) == 1
    assert len(plan([], [waiting(5, max_new=9, phases=PREFILL)], num_blocks=2).admitted) == 1


def test_no_more_run_than_there_are_places() -> None:
    queue = [waiting(1) for _ in range(6)]
    assert len(plan([], queue).admitted) == CONFIG.max_running_sequences
    assert len(plan([decoding(), prefilling(30, 8)], queue).admitted) == 2
    # Two places are kept for KV that is on its way.
    assert len(plan([decoding()], queue, num_places=2).admitted) == 1
    assert plan([decoding()], queue, num_places=0).admitted == ()


@given(
    prompts=st.lists(st.integers(1, 40), max_size=8),
    num_decoding=st.integers(0, 4),
    computed_blocks=st.lists(st.integers(0, 4), max_size=3),
    num_blocks=st.integers(0, 40),
    token_budget=st.integers(8, 30),
)
def test_a_plan_keeps_every_limit(
    prompts: list[int], num_decoding: int, computed_blocks: list[int], num_blocks: int, token_budget: int
) -> None:
    config = replace(CONFIG, token_budget=token_budget, max_running_sequences=8)
    running = [decoding() for _ in range(num_decoding)] + [prefilling(20, 4 * n) for n in computed_blocks]
    queue = [waiting(n) for n in prompts]
    step = plan(running, queue, num_blocks=num_blocks, config=config)
    assert step.num_tokens <= token_budget
    assert len({id(part.sequence) for part in step.slices}) == len(step.slices)
    assert len(running) + len(step.admitted) <= config.max_running_sequences
    assert list(step.admitted) == queue[: len(step.admitted)]
    assert sum(blocks_needed(s.max_tokens_here, config.block_size) for s in step.admitted) <= num_blocks
    decodes = [part for part in step.slices if part.sequence.state is SequenceState.DECODE]
    assert len(decodes) == num_decoding
    for part in step.slices:
        assert part.start == part.sequence.num_computed_tokens < part.end <= len(part.sequence.token_ids)
        assert part.yields_token or part.end % config.block_size == 0
