"""Steps that do nothing but lengthen their sequences: they may be told to the engine late, and it ends in the same state."""

import copy
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engine_fakes import BOTH, DECODE, key, make_engine, outputs_of, run_step
from workers.api import (
    Abort,
    EngineConfig,
    Grammar,
    GrammarKind,
    Handoff,
    KvBlocksRemoved,
    KvBlocksStored,
    NgramDrafts,
    PrefixPeer,
    SamplingParams,
    Submit,
    SubscribeKvEvents,
)
from workers.engine.engine import Engine
from workers.engine.messages import Message, ReserveBlocks, TokensDecoded
from workers.engine.step_result import StepResult

SIZE = 4
CONFIG = EngineConfig(
    block_size=SIZE, token_budget=64, max_running_sequences=8, max_waiting_requests=8, kv_cache_bytes=0
)


def begun(requests: list[tuple[int, int]], num_blocks: int, seed: int = 0) -> Engine:
    """Requests of so many tokens of the prompt and of the output, all of which decode unless blocks are missing."""
    rng = random.Random(seed)
    engine = make_engine(BOTH, config=CONFIG, num_blocks=num_blocks, max_context_tokens=128)
    engine.handle(SubscribeKvEvents(), 0.0)
    for i, (num_prompt, max_new) in enumerate(requests):
        prompt = tuple(rng.randrange(100) for _ in range(num_prompt))
        engine.handle(Submit(key(f"r{i}"), BOTH, prompt, SamplingParams(max_new), 60.0), 0.0)
    for _ in range(4):
        run_step(engine, 1.0, lambda i: rng.randrange(100, 200))
    return engine


def state(engine: Engine) -> list[object]:
    sequences = [
        (one.token_ids, one.num_computed_tokens, one.block_table, one.capacity, one.block_hashes)
        for one in engine._batch.running()
    ]
    return [sequences, engine.block_counts(), engine.pool.free_block_ids(), engine.pool.cached_block_ids()]


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(5, 40)), min_size=1, max_size=5),
    st.integers(20, 120),
    st.integers(0, 1000),
)
def test_what_is_told_late_ends_in_the_same_state(
    requests: list[tuple[int, int]], num_blocks: int, seed: int
) -> None:
    engine = begun(requests, num_blocks, seed)
    plan = engine.schedule(2.0)
    num_steps = engine.num_plain_steps(plan) if plan is not None else 0
    outputs_of(engine)
    late, late_plan = copy.deepcopy((engine, plan))
    rng, rows, told, told_late = random.Random(seed), [], [], []
    starts = [len(one.token_ids) for one in late_plan.decodes] if late_plan is not None else []

    def catch_up(some: Engine, indices: Iterable[int]) -> None:
        for i in indices:
            sequence = some._batch.decodes[i]
            num_known = len(sequence.token_ids) - starts[i]
            some.extend(sequence, [row[i] for row in rows[num_known:]])

    for step in range(num_steps):
        full = [i for i, start in enumerate(starts) if (start + step) % SIZE == 0]
        if late.pool.num_available < len(full):
            break
        rows.append([rng.randrange(100, 200) for _ in starts])
        assert plan is not None
        engine.complete(plan, StepResult(rows[-1]), 2.0)
        plan = engine.schedule(2.0)
        told += outputs_of(engine, KvBlocksStored, KvBlocksRemoved)
        if full:
            catch_up(late, full)
            late.make_room([late._batch.decodes[i] for i in full])
            told_late += outputs_of(late)
        caught_up = copy.deepcopy(late)
        catch_up(caught_up, range(len(starts)))
        assert state(caught_up) == state(engine)
        caught_up.check_invariants()
    assert told == told_late


MESSAGES: dict[str, Message] = {
    "a prompt": Submit(key("new"), BOTH, (1, 2, 3), SamplingParams(4), 60.0),
    "a prompt that others may know": Submit(
        key("new"), BOTH, tuple(range(40)), SamplingParams(4), 60.0, prefix_peers=(PrefixPeer("w1:1", 1),)
    ),
    "a request that waits for its KV": Submit(
        key("new"), DECODE, (1, 2, 3), SamplingParams(4), 60.0, Handoff("new")
    ),
    "KV that asks for blocks": ReserveBlocks("other", 8, 10, 60.0, "w1:1"),
    "the end of one": Abort(key("r0")),
    "the end of none": Abort(key("other")),
}


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(5, 40)), min_size=1, max_size=5),
    st.integers(20, 120),
    st.integers(0, 1000),
    st.lists(st.sampled_from(sorted(MESSAGES)), max_size=2, unique=True),
)
def test_after_messages_it_goes_on_as_it_would_be_planned(
    requests: list[tuple[int, int]], num_blocks: int, seed: int, names: list[str]
) -> None:
    engine = begun(requests, num_blocks, seed)
    plan = engine.schedule(2.0)
    if plan is None or engine.num_plain_steps(plan) < 1:
        return
    outputs_of(engine)
    other, other_plan = copy.deepcopy((engine, plan))
    rng = random.Random(seed)
    tokens = [rng.randrange(100, 200) for _ in plan.decodes]
    engine.complete(plan, StepResult(tokens), 2.0)
    for sequence, token in zip(other_plan.decodes, tokens, strict=True):
        other.extend(sequence, [token])
    for name in names:
        engine.handle(MESSAGES[name], 2.0)
        other.handle(MESSAGES[name], 2.0)
    before = state(other)
    num_steps = other.go_on(other_plan)
    next_plan = engine.schedule(2.0)
    if num_steps == 0:
        assert state(other) == before
        other.schedule(2.0)
    else:
        assert next_plan is not None
        assert not next_plan.chunks
        assert [one.key for one in next_plan.decodes] == [one.key for one in other_plan.decodes]
        assert engine.num_plain_steps(next_plan) == num_steps
    assert state(other) == state(engine)
    other.check_invariants()
    told = [one for one in engine.take_outputs() if not isinstance(one, TokensDecoded)]
    assert other.take_outputs() == told


def test_none_of_them_is_the_last_one_of_a_sequence() -> None:
    engine = begun([(5, 20), (5, 12)], num_blocks=40)
    plan = engine.schedule(2.0)
    assert plan is not None
    # Four steps have given four tokens each.
    assert engine.num_plain_steps(plan) == 12 - 4 - 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(20, stop_token_ids=frozenset({7})),
        SamplingParams(20, num_logprobs=0),
        SamplingParams(20, grammar=Grammar(GrammarKind.REGEX, "a*")),
        SamplingParams(20, decoding=NgramDrafts(4)),
    ],
)
def test_steps_that_hang_on_their_tokens_are_none(sampling: SamplingParams) -> None:
    engine = begun([(5, 20)], num_blocks=40)
    engine.handle(Submit(key("other"), BOTH, (1, 2, 3), sampling, 60.0), 2.0)
    run_step(engine, 2.0)
    plan = engine.schedule(2.0)
    assert plan is not None
    assert engine.num_plain_steps(plan) == 0


def test_a_prompt_that_waits_or_begins_makes_a_step_another_one() -> None:
    engine = begun([(5, 20)], num_blocks=8)
    engine.handle(Submit(key("begins"), BOTH, (1, 2, 3), SamplingParams(4), 60.0), 2.0)
    plan = engine.schedule(2.0)
    assert plan is not None
    assert engine.num_plain_steps(plan) == 0
    engine.complete(plan, StepResult([50, 50]), 2.0)
    engine.handle(Submit(key("waits"), BOTH, tuple(range(20)), SamplingParams(4), 60.0), 2.0)
    plan = engine.schedule(2.0)
    assert plan is not None
    assert not plan.chunks
    assert engine.num_plain_steps(plan) == 0
