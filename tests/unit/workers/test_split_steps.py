"""Prompts and decodes as steps at the same time: the same tokens as one after the other, and no block with two writers."""

from collections import deque
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engine_fakes import CONFIG, key, make_engine, outputs_of, submit
from tests.support.kv_memory import FactPacker
from tests.support.two_streams import SPLIT, BreakingStreams, SplitWorld, TwoStreams, expected_tokens
from workers.api import (
    Abort,
    CautiousDecoding,
    Grammar,
    GrammarKind,
    NgramDrafts,
    Phase,
    PrefillOrder,
    RequestFailed,
)
from workers.engine.engine import Engine
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import StepResult
from workers.step_choice import Exclusive, Mixed

ROOMY = replace(CONFIG, max_running_sequences=6, max_waiting_requests=20, token_budget=24)
STEPS = (*(SPLIT,) * 12, Mixed(2048), Exclusive(Phase.DECODE, 0), Exclusive(Phase.PREFILL, 2048))
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 20), st.integers(1, 12), st.integers(0, 6), st.booleans(), st.sampled_from("pppnd")
    ),
    min_size=1,
    max_size=9,
)


def sampling(kind: str) -> dict[str, object]:
    """p: plain; n: needs its tokens on the host; d: has drafts."""
    return {
        "p": {},
        "n": {"repetition_penalty": 1.5},
        "d": {"decoding": NgramDrafts(2)},
    }[kind]


@given(
    random=st.randoms(use_true_random=False),
    requests=REQUESTS,
    aborted=st.dictionaries(st.integers(0, 40), st.integers(0, 8), max_size=8),
    num_blocks=st.integers(11, 40),
    is_cache_on=st.booleans(),
    growth_reserve=st.sampled_from([0.0, 1.0]),
    order=st.sampled_from(PrefillOrder),
    token_budget=st.sampled_from([5, 9, 24]),
    host_blocks=st.sampled_from([0, 0, 8]),
    is_overlapping=st.booleans(),
)
def test_tokens_are_those_of_steps_one_after_the_other(
    random: Random,
    requests: list[tuple[int, int, int, bool, str]],
    aborted: dict[int, int],
    num_blocks: int,
    is_cache_on: bool,
    growth_reserve: float,
    order: PrefillOrder,
    token_budget: int,
    host_blocks: int,
    is_overlapping: bool,
) -> None:
    config = replace(
        ROOMY,
        is_prefix_cache_on=is_cache_on,
        growth_reserve=growth_reserve,
        prefill_order=order,
        token_budget=token_budget,
        host_cache_bytes=host_blocks * FactPacker.block_bytes,
    )
    world = SplitWorld(
        config, num_blocks, choose=random.randrange, steps=STEPS, is_overlapping=is_overlapping
    )
    gone: set[str] = set()
    waiting = deque(enumerate(requests))
    num_steps, is_working, pause = 0, True, 0
    while waiting or is_working:
        while waiting and pause == 0:
            i, (num_prompt, max_new, pause, is_like, kind) = waiting.popleft()
            world.submit(f"r{i}", num_prompt, max_new, is_like_others=is_like, **sampling(kind))
        pause = max(0, pause - 1)
        name = f"r{aborted.get(num_steps)}"
        if name in world.tokens:
            gone.add(name)
            world.abort(name)
        is_working = world.step()
        num_steps += 1
        assert num_steps < 2000
    for i, (num_prompt, max_new, *_) in enumerate(requests):
        wanted = expected_tokens(f"r{i}", num_prompt, max_new)
        found = world.tokens[f"r{i}"]
        assert found == (wanted[: len(found)] if f"r{i}" in gone else wanted)
    world.assert_idle()


def test_both_phases_are_in_flight_at_the_same_time() -> None:
    world = SplitWorld(ROOMY, 40)
    for name in ("r0", "r2", "r4", "r6"):
        world.submit(name, 20, 12)
    world.finish()
    assert world.device.most_in_flight == 4
    assert world.device.num_ahead > 8
    assert {"prefill", "decode"} <= set(world.device.ended)
    assert set(world.log.seconds) == {"split"}


# One engine, step by step.


def decoding(engine: Engine, *names: str, num_prompt: int = 4) -> None:
    """These have their first token."""
    for name in names:
        engine.handle(submit(name, num_prompt=num_prompt, max_new=9), 0.0)
    plan = engine.schedule(0.0)
    assert plan is not None
    engine.complete(plan, StepResult([50] * len(names)), 0.0)


def scheduled(engine: Engine, phase: Phase) -> StepPlan:
    plan = engine.schedule(0.0, phase)
    assert plan is not None
    engine.check_invariants()
    return plan


def test_each_side_has_its_own_sequences() -> None:
    engine = make_engine(config=ROOMY)
    decoding(engine, "r1", "r2")
    engine.handle(submit("r3", num_prompt=6), 0.0)
    prompts, decodes = scheduled(engine, Phase.PREFILL), scheduled(engine, Phase.DECODE)
    assert [part.sequence.key.request_id for part in prompts.chunks] == ["r3"]
    assert not prompts.decodes
    assert not decodes.chunks
    assert [one.key.request_id for one in decodes.decodes] == ["r1", "r2"]
    # What is planned runs already: there is nothing more of either side.
    engine.complete(decodes, StepResult([51, 51]), 0.0)
    assert scheduled(engine, Phase.DECODE).num_tokens == 2
    engine.complete(prompts, StepResult([52]), 0.0)
    assert engine.schedule(0.0, Phase.PREFILL) is None


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_blocks_of_who_leaves_are_held_until_its_step_has_ended(phase: Phase) -> None:
    engine = make_engine(config=ROOMY)
    decoding(engine, "r1")
    engine.handle(submit("r2", num_prompt=7), 0.0)
    prompts, decodes = scheduled(engine, Phase.PREFILL), scheduled(engine, Phase.DECODE)
    own, other = (prompts, decodes) if phase is Phase.PREFILL else (decodes, prompts)
    gone = "r2" if phase is Phase.PREFILL else "r1"
    engine.handle(Abort(key(gone)), 0.1)
    assert engine.block_counts().in_use == 4
    assert engine.ledger(0.1).leaked_block_ids == ()
    (holder,) = engine._batch.flights.holders()
    assert holder.owner == gone
    engine.complete(other, StepResult([51]), 0.2)
    assert engine.block_counts().in_use == 4
    engine.check_invariants()
    engine.fail_step(own, "it broke", 0.3)
    assert engine.block_counts().in_use == 2
    engine.check_invariants()


def test_blocks_of_a_sequence_that_is_in_two_steps_are_held_for_the_later_one() -> None:
    engine = make_engine(config=ROOMY)
    decoding(engine, "r1")
    first = scheduled(engine, Phase.DECODE)
    assert engine.assume(first)
    second = engine.schedule(0.0, Phase.DECODE)
    engine.take_back()
    assert second is not None
    engine.complete(first, StepResult([7]), 0.1)
    assert not outputs_of(engine, RequestFailed)
    assert engine.block_counts().in_use == 2
    engine.complete(replace(second, decodes=[]), StepResult([]), 0.2)
    assert engine.block_counts().in_use == 0
    engine.check_invariants()


def test_what_is_copied_from_is_held_until_the_copy_is_made() -> None:
    engine = make_engine(config=replace(ROOMY, is_prefix_cache_on=True), num_blocks=6)
    decoding(engine, "r1", num_prompt=8)
    engine.handle(Abort(key("r1")), 0.0)
    engine.handle(submit("r2", num_prompt=7), 0.0)
    prompts = scheduled(engine, Phase.PREFILL)
    (source,) = prompts.copies.values()
    (holder,) = engine._batch.flights.holders()
    assert list(holder.block_ids) == [source]
    engine.complete(prompts, StepResult([50]), 0.0)
    assert not engine._batch.flights
    engine.check_invariants()


def test_a_prompts_blocks_are_told_of_when_its_own_step_has_ended() -> None:
    engine = make_engine(config=replace(ROOMY, is_prefix_cache_on=True))
    decoding(engine, "r1")
    engine.handle(replace(submit("r2", num_prompt=8), token_ids=tuple(range(8))), 0.0)
    prompts, decodes = scheduled(engine, Phase.PREFILL), scheduled(engine, Phase.DECODE)
    engine.complete(decodes, StepResult([50]), 0.0)
    assert prompts.pending
    assert not any(engine.pool.index.is_computed(block_id) for block_id in prompts.pending)
    engine.complete(prompts, StepResult([50]), 0.0)
    assert all(engine.pool.index.is_computed(block_id) for block_id in prompts.pending)


def test_nobody_is_preempted_while_a_step_runs() -> None:
    engine = make_engine(config=replace(ROOMY, growth_reserve=0.0), num_blocks=4)
    decoding(engine, "r1", num_prompt=4)
    engine.handle(submit("r2", num_prompt=8), 0.0)
    prompts = scheduled(engine, Phase.PREFILL)
    decodes = scheduled(engine, Phase.DECODE)
    engine.complete(decodes, StepResult([50]), 0.0)
    for _ in range(3):
        decodes = scheduled(engine, Phase.DECODE)
        engine.complete(decodes, StepResult([50]), 0.0)
    assert engine.is_short_of_blocks
    engine.complete(prompts, StepResult([50]), 0.0)
    plan = scheduled(engine, Phase.DECODE)
    assert [one.key.request_id for one in plan.preempted] == ["r2"]
    assert [one.key.request_id for one in plan.decodes] == ["r1"]


def test_a_prompt_of_higher_priority_preempts_nobody_whose_step_runs() -> None:
    engine = make_engine(config=replace(ROOMY, growth_reserve=0.0), num_blocks=4)
    decoding(engine, "r1", num_prompt=4)
    decodes = scheduled(engine, Phase.DECODE)
    engine.handle(replace(submit("r3", num_prompt=12), priority=1), 0.0)
    assert engine.schedule(0.0, Phase.PREFILL) is None
    engine.complete(decodes, StepResult([50]), 0.0)
    plan = scheduled(engine, Phase.PREFILL)
    assert [one.key.request_id for one in plan.preempted] == ["r1"]


@pytest.mark.parametrize("num_blocks", range(7, 12))
def test_decodes_that_are_short_of_blocks_get_them_before_more_prompts(num_blocks: int) -> None:
    config = replace(ROOMY, growth_reserve=0.0, token_budget=12)
    # Of two steps that run that of the decodes always ends first.
    world = SplitWorld(config, num_blocks, choose=lambda _: 0)
    preempted: list[str] = []
    schedule = world.engine.schedule

    def noted(*arguments: object) -> StepPlan | None:
        plan = schedule(*arguments)
        preempted.extend(one.key.request_id for one in (plan.preempted if plan is not None else ()))
        return plan

    world.engine.schedule = noted  # type: ignore[method-assign]
    names = [name for name in map("r{}".format, range(40)) if len(expected_tokens(name, 12, 12)) == 12]
    for name in names[:5]:
        world.submit(name, 12, 12)
    world.finish()
    # Who came first is never the one that has to make room.
    assert names[0] not in preempted
    for name, tokens in world.tokens.items():
        assert tokens == expected_tokens(name, 12, 12)


def test_decodes_go_on_where_prompts_are_to_be_alone_and_none_can_begin() -> None:
    config = replace(ROOMY, growth_reserve=1.0)
    world = SplitWorld(config, 8, steps=(Exclusive(Phase.PREFILL, 2048),))
    world.submit("r2", 12, 12)
    world.submit("r4", 12, 12)
    world.finish()
    assert world.tokens["r2"] == expected_tokens("r2", 12, 12)
    assert world.tokens["r4"] == expected_tokens("r4", 12, 12)
    assert {"prefill", "whole"} <= set(world.device.ended)


@pytest.mark.parametrize(
    "options",
    [{"decoding": CautiousDecoding()}, {"grammar": Grammar(GrammarKind.REGEX, "a")}],
)
def test_who_cannot_be_computed_beside_others_keeps_all_in_one_step(options: dict[str, object]) -> None:
    world = SplitWorld(ROOMY, 40)
    world.submit("r2", 6, 12)
    for _ in range(3):
        world.step()
    world.submit("r4", 6, 2, **options)
    assert not world.engine.may_split
    while world.tokens["r4"] == []:
        world.step()
    assert "whole" in world.device.ended
    world.finish()
    assert world.engine.may_split
    assert world.tokens["r2"] == expected_tokens("r2", 6, 12)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("breaks", ["begin", "result"])
def test_a_step_that_breaks_fails_its_own_side(
    monkeypatch: pytest.MonkeyPatch, breaks: str, phase: str
) -> None:
    world = SplitWorld(ROOMY, 40)
    world.submit("r2", 6, 30)
    while not world.tokens["r2"]:
        world.step()
    world.submit("r4", 6, 3)
    name = "_begin" if breaks == "begin" else "end"
    sound = getattr(TwoStreams, name)

    def broken(device: TwoStreams, *arguments: object) -> object:
        side = arguments[0] if breaks == "begin" else device.phase_of(arguments[0])
        if side != phase:
            return sound(device, *arguments)
        monkeypatch.undo()
        if breaks == "result":
            sound(device, *arguments)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(TwoStreams, name, broken)
    failed: set[str] = set()
    for _ in range(500):
        is_working = world.loop.step()
        world.engine.check_invariants()
        failed |= {one.key.request_id for one in world.outputs if isinstance(one, RequestFailed)}
        if not is_working:
            break
        world.outputs.clear()
    assert failed == {"r4" if phase == "prefill" else "r2"}
    world.assert_idle()
    world.outputs.clear()
    world.submit("r8", 5, 6)
    world.finish()
    assert world.tokens["r8"] == expected_tokens("r8", 5, 6)


@given(
    random=st.randoms(use_true_random=False),
    requests=REQUESTS,
    beginnings=st.sets(st.integers(1, 30), max_size=3),
    ends=st.sets(st.integers(1, 30), max_size=2),
    num_blocks=st.integers(11, 40),
    is_cache_on=st.booleans(),
)
def test_steps_that_break_leave_the_tokens_of_others_alone(
    random: Random,
    requests: list[tuple[int, int, int, bool, str]],
    beginnings: set[int],
    ends: set[int],
    num_blocks: int,
    is_cache_on: bool,
) -> None:
    """beginnings, ends: steps that break there, by number."""
    config = replace(ROOMY, is_prefix_cache_on=is_cache_on, growth_reserve=0.0, token_budget=9)
    device = BreakingStreams(num_blocks, config.block_size, random.randrange, beginnings, ends)
    world = SplitWorld(config, num_blocks, choose=random.randrange, steps=STEPS, device=device)
    for i, (num_prompt, max_new, _, is_like, kind) in enumerate(requests):
        world.submit(f"r{i}", num_prompt, max_new, is_like_others=is_like, **sampling(kind))
    failed = world.finish_what_can()
    for i, (num_prompt, max_new, *_) in enumerate(requests):
        wanted = expected_tokens(f"r{i}", num_prompt, max_new)
        found = world.tokens[f"r{i}"]
        assert found == (wanted[: len(found)] if f"r{i}" in failed else wanted)
    world.assert_idle()
