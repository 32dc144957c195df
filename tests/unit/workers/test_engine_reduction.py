"""The engine with pictures that get fewer: what is computed, what is said of it, and what a hand-off carries."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.support.engine_fakes import (
    BOTH,
    CONFIG,
    DECODE,
    PREFILL,
    assert_empty,
    key,
    learnt,
    make_engine,
    outputs_of,
    submit,
)
from workers.api import (
    ImageReduction,
    ImagesReduced,
    ImageTile,
    PhaseSet,
    RequestFailed,
    StepBudget,
    Submit,
    TokensGenerated,
)
from workers.embeddings.kept import KeptEmbeddings
from workers.engine.engine import Engine
from workers.engine.messages import (
    BlocksReserved,
    CommitTransfer,
    FinishTransfer,
    ImageReady,
    ImagesGranted,
    ImagesNeeded,
    KvReady,
    ReleaseTransfer,
    ReserveBlocks,
    StartTransfer,
)
from workers.engine.step_budget import MAX_WAITS
from workers.engine.step_plan import StepPlan
from workers.engine.step_result import FilteredChunk, StepResult

PICTURE, NUM_LAYERS = 9, 2
FILTER = ImageReduction(global_threshold=0.1, individual_threshold=0.1)
MERGE = ImageReduction(merge_threshold=0.5)
TEN = range(4, 14)


def _submit(
    name: str = "r1",
    reduction: ImageReduction | None = FILTER,
    phases: PhaseSet = BOTH,
    *,
    num_prompt: int = 20,
    max_new: int = 3,
    delivered: Sequence[int] = (),
) -> Submit:
    """A picture of ten embeddings at 4."""
    plain = submit(name, phases, num_prompt=num_prompt, max_new=max_new)
    token_ids = list(plain.token_ids)
    token_ids[TEN.start : TEN.stop] = [PICTURE] * len(TEN)
    return replace(
        plain,
        token_ids=(*token_ids, *delivered),
        num_delivered=len(delivered),
        images=(ImageTile(TEN.start, len(TEN), b"a"),),
        reduction=reduction,
    )


def _ready(engine: Engine, name: str = "r1", kept: Sequence[int] | None = None) -> None:
    """Its picture has come, with these of its embeddings."""
    needed = [one for one in outputs_of(engine, ImagesNeeded) if isinstance(one, ImagesNeeded)]
    asking = needed[-1].asking if needed else 0
    some = KeptEmbeddings(tuple(kept), (False,) * len(kept)) if kept is not None else None
    engine.handle(ImageReady(key(name), 0, (0,), asking, some), 0.0)


def _step(engine: Engine, places: Sequence[int] = (), token_id: int = 50) -> StepPlan | None:
    """A step in which these leave each prompt that is filtered."""
    plan = engine.schedule(1.0)
    if plan is None:
        return None
    engine.kv_ready(plan, 0, NUM_LAYERS)
    filtered = {
        i: FilteredChunk(tuple(places), (part.end, part.end - len(places)))
        for i, part in enumerate(plan.chunks)
        if part.is_filtered
    }
    num_tokens = sum(part.yields_token for part in plan.slices)
    engine.complete(plan, StepResult([token_id] * num_tokens, filtered=filtered), 1.0)
    engine.check_invariants()
    return plan


def _tokens(engine: Engine) -> list[TokensGenerated]:
    return [one for one in outputs_of(engine, TokensGenerated) if isinstance(one, TokensGenerated)]


def test_it_waits_for_all_pictures_and_is_computed_in_one_step() -> None:
    engine = make_engine()
    engine.handle(_submit(num_prompt=30), 0.0)
    # Text before the picture, too: what leaves depends on all of it.
    assert engine.schedule(1.0) is None
    _ready(engine)
    plan = _step(engine, places=range(5, 11))
    assert plan is not None
    (part,) = plan.chunks
    # More than the budget of 16.
    assert (part.start, part.end, part.is_filtered) == (0, 30, True)
    # 24 tokens and the one that came.
    assert engine.block_counts().in_use == 6
    (first,) = _tokens(engine)
    assert (first.first_position, first.token_ids) == (30, (50,))
    while _step(engine):
        pass
    assert [one.first_position for one in _tokens(engine)] == [31, 32]
    assert_empty(engine)


def test_what_was_left_is_said_before_the_first_token() -> None:
    engine = make_engine()
    engine.handle(_submit(), 0.0)
    _ready(engine, kept=(0, 1, 4, 5, 8, 9))
    _step(engine, places=(6, 8))
    reduced, first = outputs_of(engine, ImagesReduced, TokensGenerated)
    # Of 20 tokens the first layer computed 16 and the second 14.
    assert reduced == ImagesReduced(key("r1"), 10, 6, 4, pytest.approx(15 / 20))
    assert isinstance(first, TokensGenerated)


def test_merged_embeddings_alone_are_computed_in_chunks_as_ever() -> None:
    engine = make_engine()
    engine.handle(_submit(reduction=MERGE, num_prompt=30), 0.0)
    _ready(engine, kept=(0, 2, 9))
    chunks = []
    while (plan := _step(engine)) is not None:
        chunks += [(part.start, part.end, part.is_filtered) for part in plan.chunks]
    assert chunks == [(0, 16, False), (16, 23, False)]
    reduced = outputs_of(engine, ImagesReduced)
    assert reduced == [ImagesReduced(key("r1"), 10, 3, 3, pytest.approx(23 / 30))]


def test_positions_are_those_of_the_whole_prompt() -> None:
    engine = make_engine()
    engine.handle(_submit(), 0.0)
    _ready(engine, kept=(0, 2, 9))
    images = engine._sequences[key("r1")].images
    assert images is not None
    assert images.positions(0, 8)[0].tolist() == [0, 1, 2, 3, 4, 6, 13, 14]
    # The second of what is left.
    _step(engine, places=(5,))
    assert images.positions(3, 9)[1].tolist() == [3, 4, 13, 14, 15, 16]
    assert images.position_delta == 8
    assert images.positions(20, 22)[2].tolist() == [28, 29]


def test_a_prompt_too_long_for_one_step_is_computed_without_the_filter() -> None:
    engine = make_engine(num_blocks=40, max_context_tokens=128)
    # Four budgets of 16, and one more.
    engine.handle(_submit(num_prompt=65), 0.0)
    _ready(engine)
    chunks = []
    while (plan := _step(engine)) is not None:
        chunks += [part for part in plan.chunks if part.is_filtered]
    assert chunks == []
    assert outputs_of(engine, ImagesReduced) == [ImagesReduced(key("r1"), 10, 10, 10, 1.0, is_too_long=True)]
    assert_empty(engine)


def test_what_was_generated_before_takes_no_part_in_the_filter() -> None:
    engine = make_engine()
    engine.handle(_submit(delivered=(50, 51)), 0.0)
    _ready(engine)
    plan = _step(engine, places=(5, 6))
    assert plan is not None
    assert [(part.start, part.end, part.is_filtered) for part in plan.chunks] == [(0, 20, True)]
    assert _tokens(engine) == []
    plan = _step(engine)
    assert plan is not None
    assert [(part.start, part.end, part.is_filtered) for part in plan.chunks] == [(18, 20, False)]
    assert [one.first_position for one in _tokens(engine)] == [22]


def test_nothing_of_it_is_cached_and_nothing_that_is_cached_is_taken() -> None:
    engine = make_engine(config=replace(CONFIG, is_prefix_cache_on=True))
    for name, reduction in (("r1", None), ("r2", FILTER), ("r3", FILTER)):
        engine.handle(_submit(name, reduction), 0.0)
        _ready(engine, name)
        firsts = []
        while (plan := _step(engine)) is not None:
            firsts += [part.start for part in plan.chunks]
        assert firsts[0] == 0
    # Of the first one alone, all but the last token.
    assert engine.block_counts().cached == 5


def test_preempted_it_begins_anew_with_its_whole_prompt() -> None:
    engine = make_engine(config=replace(CONFIG, growth_reserve=0.0), num_blocks=11, max_context_tokens=44)
    for name in ("r1", "r2"):
        engine.handle(_submit(name, max_new=16), 0.0)
        _ready(engine, name)
    starts: dict[str, list[int]] = {"r1": [], "r2": []}
    positions: dict[str, list[int]] = {"r1": [], "r2": []}
    for _ in range(60):
        plan = engine.schedule(1.0)
        if plan is None:
            break
        for part in plan.chunks:
            starts[part.sequence.key.request_id].append(part.end - part.start)
        filtered = {
            i: FilteredChunk((5, 6), (20, 18)) for i, part in enumerate(plan.chunks) if part.is_filtered
        }
        num_tokens = sum(part.yields_token for part in plan.slices)
        engine.complete(plan, StepResult([50] * num_tokens, filtered=filtered), 1.0)
        engine.check_invariants()
        for output in outputs_of(engine, TokensGenerated, ImagesNeeded):
            if isinstance(output, TokensGenerated):
                positions[output.key.request_id].append(output.first_position)
            elif isinstance(output, ImagesNeeded):
                engine.handle(ImageReady(output.key, 0, (0,), output.asking), 1.0)
    assert engine.num_preemptions > 0
    assert starts["r2"].count(20) == 1 + engine.num_preemptions
    assert positions == {name: list(range(20, 36)) for name in ("r1", "r2")}
    assert_empty(engine)


def test_a_filtered_prompt_waits_for_a_step_of_its_own() -> None:
    engine = make_engine(num_blocks=32)
    engine.handle(submit("r0", num_prompt=6), 0.0)
    engine.handle(_submit(), 0.1)
    _ready(engine)
    plan = _step(engine)
    assert plan is not None
    assert [part.sequence.key for part in plan.chunks] == [key("r0")]
    plan = _step(engine)
    assert plan is not None
    assert [part.sequence.key for part in plan.chunks] == [key("r1")]
    # Decodes go on beside it.
    assert [one.key for one in plan.decodes] == [key("r0")]


def test_beside_decodes_that_leave_it_no_time_it_is_computed_in_one_step_all_the_same() -> None:
    config = replace(CONFIG, step_budget=StepBudget.PREDICTED)
    engine = make_engine(config=config, num_blocks=64, latency=learnt())
    engine.handle(replace(submit("r0", num_prompt=6, max_new=40), tpot_target_s=0.012), 0.0)
    _step(engine)
    engine.handle(_submit(), 0.1)
    _ready(engine)
    chunks = []
    for _ in range(2 * MAX_WAITS + 2):
        plan = _step(engine)
        assert plan is not None
        chunks += [(part.sequence.key, part.start, part.end, part.is_filtered) for part in plan.chunks]
    assert chunks == [(key("r1"), 0, 20, True)]


def _handed_off(
    reduction: ImageReduction, places: Sequence[int]
) -> tuple[Engine, StartTransfer, list[object]]:
    """A prefill engine that has just handed it off, and what it told the transfer."""
    engine = make_engine(PREFILL)
    engine.handle(_submit(reduction=reduction, phases=PREFILL), 0.0)
    _ready(engine)
    plan = engine.schedule(1.0)
    assert plan is not None
    # Nothing leaves before it is known how much there is.
    assert engine.kv_ready(plan, 0, NUM_LAYERS) == []
    assert outputs_of(engine, StartTransfer) == []
    filtered = {0: FilteredChunk(tuple(places), (20, 20 - len(places)))}
    engine.complete(plan, StepResult([50], filtered=filtered), 1.0)
    engine.check_invariants()
    told: list[object] = [*outputs_of(engine, StartTransfer, KvReady, FinishTransfer)]
    start = told[0]
    assert isinstance(start, StartTransfer)
    return engine, start, told


def test_a_hand_off_begins_when_all_is_computed_and_carries_what_is_left() -> None:
    engine, start, told = _handed_off(FILTER, (5, 6, 7, 8, 9, 10))
    assert (start.num_tokens, start.max_tokens) == (14, 17)
    # Of the five blocks of the whole prompt four are left.
    assert len(start.block_ids) == 4
    assert told[1:] == [KvReady("t-r1", 0, NUM_LAYERS, 0, 14), FinishTransfer("t-r1", (50,))]
    engine.handle(ReleaseTransfer("t-r1", start.block_ids, "done"), 2.0)
    assert engine.block_counts().free == engine.block_counts().total


def _receive(start: StartTransfer, reduction: ImageReduction | None) -> Engine:
    """A decode engine with that request, to which this KV has come."""
    engine = make_engine(DECODE)
    engine.handle(_submit(reduction=reduction, phases=DECODE), 0.0)
    engine.handle(ReserveBlocks("t-r1", start.num_tokens, start.max_tokens, 9.0), 0.0)
    (granted,) = outputs_of(engine, BlocksReserved)
    assert isinstance(granted, BlocksReserved)
    commit = CommitTransfer("t-r1", granted.block_ids, (50,), start.token_digest)
    engine.handle(commit, 0.0)
    engine.check_invariants()
    return engine


def test_decode_takes_fewer_tokens_and_goes_on_where_the_whole_prompt_would() -> None:
    _, start, _ = _handed_off(FILTER, (5, 6, 7, 8, 9, 10))
    engine = _receive(start, FILTER)
    sequence = engine._sequences[key("r1")]
    assert (sequence.num_computed_tokens, sequence.num_dropped_tokens) == (14, 6)
    assert sequence.images is not None
    assert sequence.images.position_delta == 6
    while _step(engine):
        pass
    assert [one.first_position for one in _tokens(engine)] == [21, 22]
    assert_empty(engine)


@pytest.mark.parametrize("reduction", [None, replace(FILTER, global_threshold=0.2)], ids=["none", "other"])
def test_decode_refuses_kv_of_another_reduction(reduction: ImageReduction | None) -> None:
    _, start, _ = _handed_off(FILTER, (5, 6))
    assert len(outputs_of(_receive(start, reduction), RequestFailed)) == 1


def test_thresholds_of_zero_take_the_plain_way() -> None:
    engine = make_engine()
    engine.handle(_submit(reduction=ImageReduction()), 0.0)
    engine.handle(ImagesGranted(key("r1"), 0), 0.0)
    # The text before the picture is computed before it has come.
    plan = _step(engine)
    assert plan is not None
    assert [(part.start, part.end, part.is_filtered) for part in plan.chunks] == [(0, 4, False)]
