"""Reuse of spans in the engine: what is reused, what stays exact, and who waits for what."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_fakes import BOTH, CONFIG, DECODE, PREFILL, key, make_engine, outputs_of, run_step
from tests.support.engine_model import PLAIN, EngineWithModel
from tests.support.tiny_model import write_tiny_gguf
from workers.api import (
    Abort,
    Batching,
    EngineConfig,
    Handoff,
    RequestFailed,
    SamplingParams,
    SpanReuseConfig,
    StepBudget,
    Submit,
    TokensGenerated,
    WorkerId,
    WorkerSpec,
)
from workers.engine.engine import Engine
from workers.engine.messages import (
    BlocksReserved,
    CommitTransfer,
    FinishTransfer,
    ReserveBlocks,
    StartTransfer,
)
from workers.engine.step_plan import StepPlan
from workers.errors import UnsupportedModel
from workers.loading import load
from workers.model.llama import Llama
from workers.model.prepare import load_weights, prepare
from workers.model.rope import Rope
from workers.wire import event_from_pb, event_to_pb

ALL_AGAIN = SpanReuseConfig(1.0, 32)
SOME_AGAIN = SpanReuseConfig(0.25, 32)
#: Room for a whole prompt in one step.
WIDE = replace(PLAIN, token_budget=128)
DOCUMENT = list(range(100, 180))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = tmp_path_factory.mktemp("spans")
    path = write_tiny_gguf(folder / "tiny.gguf", num_layers=3)
    prepared = prepare(str(path), lambda *_progress: None, folder / "cache")
    return Llama(prepared.config, load_weights(prepared))


def tokens(num: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 384, (num,), generator=generator).tolist()
    return token_ids


def reused(engine: EngineWithModel, name: str) -> int:
    (first,) = [
        output.num_reused_tokens
        for output in engine.outputs
        if isinstance(output, TokensGenerated)
        and output.key.request_id == name
        and output.prefill_s is not None
    ]
    return first


def alone(model: Llama, prompt: Sequence[int], max_new: int = 8) -> list[int]:
    engine = EngineWithModel(model, replace(PLAIN, token_budget=256, is_prefix_cache_on=False))
    engine.submit("alone", prompt, max_new)
    engine.run()
    return engine.tokens["alone"]


def test_with_all_computed_again_tokens_are_those_of_a_plain_prefill(model: Llama) -> None:
    engine = EngineWithModel(model, replace(WIDE, span_reuse=ALL_AGAIN), num_blocks=128)
    first, second = tokens(60, 1), tokens(50, 2)
    engine.submit("first", first)
    engine.submit("second", [9, *second])
    engine.run()
    prompt = [*tokens(7, 3), *second, 5, 6, *first, *tokens(4, 4)]
    engine.submit("both", prompt)
    engine.run()
    assert reused(engine, "both") == 50 + 60
    assert engine.tokens["both"] == alone(model, prompt)


def test_fewer_rows_are_computed_when_little_is_computed_again(model: Llama) -> None:
    engine = EngineWithModel(model, replace(WIDE, span_reuse=SOME_AGAIN), num_blocks=128)
    engine.submit("document", DOCUMENT)
    engine.run()
    engine.submit("question", [*tokens(6, 5), *DOCUMENT, *tokens(3, 6)])
    plan = engine.step()
    assert plan is not None
    (part,) = plan.chunks
    assert (part.start, part.end, part.num_rows) == (0, 89, 9 + 20)
    assert plan.num_tokens == 29
    engine.run()
    assert len(engine.tokens["question"]) == 8
    assert reused(engine, "question") == 80


def test_what_was_assembled_is_not_stored_for_others(model: Llama) -> None:
    engine = EngineWithModel(model, replace(WIDE, span_reuse=SOME_AGAIN), num_blocks=128)
    engine.submit("document", DOCUMENT)
    engine.run()
    prompt = [*tokens(6, 5), *DOCUMENT, *tokens(30, 6)]
    engine.submit("assembled", prompt, 20)
    engine.run()
    engine.submit("again", [*prompt, *engine.tokens["assembled"], 3])
    engine.run()
    # It is assembled again, from the document itself alone.
    assert engine.num_cached["again"] == 0
    assert reused(engine, "again") == 80


def test_the_cached_prefix_before_a_span_stays_exact_and_stored(model: Llama) -> None:
    engine = EngineWithModel(model, replace(WIDE, span_reuse=SOME_AGAIN), num_blocks=128)
    prefix = tokens(23, 7)
    engine.submit("prefix", prefix, 1)
    engine.submit("document", DOCUMENT)
    engine.run()
    engine.submit("question", [*prefix, *DOCUMENT, 3])
    engine.run()
    assert engine.num_cached["question"] == 20
    assert reused(engine, "question") == 80
    engine.submit("plain", [*prefix, *tokens(30, 8)])
    engine.run()
    assert engine.num_cached["plain"] == 20
    assert engine.tokens["plain"] == alone(model, [*prefix, *tokens(30, 8)])


def test_another_tenant_reuses_nothing(model: Llama) -> None:
    engine = EngineWithModel(model, replace(WIDE, span_reuse=SOME_AGAIN), num_blocks=128)
    engine.submit("document", DOCUMENT, cache_salt="one")
    engine.run()
    prompt = [5, *DOCUMENT, 3]
    engine.submit("other", prompt, cache_salt="two")
    engine.submit("same", prompt, cache_salt="one")
    engine.run()
    assert (reused(engine, "other"), reused(engine, "same")) == (0, 80)
    assert engine.tokens["other"] == alone(model, prompt)


@pytest.mark.parametrize(
    "change",
    [
        {"span_reuse": None},
        {"span_reuse": replace(SOME_AGAIN, min_tokens=81)},
        {"is_prefix_cache_on": False},
        {"num_prompt_logprobs": 0},
    ],
)
def test_prompts_are_computed_as_ever_where_they_have_to_be(model: Llama, change: dict[str, object]) -> None:
    sampling = SamplingParams(8)
    if "num_prompt_logprobs" in change:
        sampling, change = replace(sampling, **change), {}  # type: ignore[arg-type]
    config = replace(WIDE, **{"span_reuse": SOME_AGAIN, **change})  # type: ignore[arg-type]
    engine = EngineWithModel(model, config, num_blocks=128)
    engine.submit("document", DOCUMENT)
    engine.run()
    prompt = [5, *DOCUMENT, 3]
    engine.submit("question", prompt, sampling=sampling)
    engine.run()
    assert reused(engine, "question") == 0
    assert engine.tokens["question"] == alone(model, prompt)


@pytest.mark.parametrize("batching", list(Batching))
@pytest.mark.parametrize("budget", [40, 64, 128])
@pytest.mark.parametrize("step_budget", list(StepBudget))
def test_in_any_company_tokens_are_those_of_a_plain_prefill(
    model: Llama, budget: int, batching: Batching, step_budget: StepBudget
) -> None:
    """Decodes, plain chunks and chunks that reuse spans in the same steps; some prompts begin alike."""
    config = replace(
        PLAIN, token_budget=budget, span_reuse=ALL_AGAIN, batching=batching, step_budget=step_budget
    )
    engine = EngineWithModel(model, config, num_blocks=200)
    documents = [tokens(40 + 9 * i, 20 + i) for i in range(3)]
    for i, document in enumerate(documents):
        engine.submit(f"document {i}", document, 30)
        engine.step()
    head = tokens(11, 30)
    prompts = {
        "a": [*head, *documents[0], *documents[1], 7],
        "b": tokens(33, 31),
        "c": [*head, *documents[2], 4, *documents[0]],
        "d": [*documents[1], *documents[0], *documents[2], 9],
        "e": [*head, *documents[2], 4, *documents[1], *documents[1]],
    }
    for name, prompt in prompts.items():
        engine.submit(name, prompt)
        engine.step()
    engine.run()
    for name, prompt in prompts.items():
        assert engine.tokens[name] == alone(model, prompt), name
    assert sum(reused(engine, name) for name in prompts) > 0


SPANS = replace(
    CONFIG, token_budget=32, is_prefix_cache_on=True, span_reuse=SpanReuseConfig(0.0, 32), growth_reserve=0.0
)


def world(num_blocks: int = 64, config: EngineConfig = SPANS) -> Engine:
    """An engine that knows DOCUMENT."""
    engine = make_engine(config=config, num_blocks=num_blocks, max_context_tokens=400)
    submit(engine, "document", DOCUMENT, 1)
    while run_step(engine, 0.0) is not None:
        pass
    outputs_of(engine)
    return engine


def submit(engine: Engine, name: str, prompt: Sequence[int], max_new: int = 2) -> None:
    engine.handle(Submit(key(name), BOTH, tuple(prompt), SamplingParams(max_new), 1e6), 0.0)


def parts(plan: StepPlan | None) -> list[tuple[str, int, bool]]:
    assert plan is not None
    return [(part.sequence.key.request_id, part.num_rows, part.reuse is not None) for part in plan.chunks]


def test_a_prompt_of_up_to_two_budgets_is_taken_in_one_step() -> None:
    engine = world()
    submit(engine, "fits", [*range(63), *DOCUMENT])
    assert parts(run_step(engine, 0.0)) == [("fits", 64, True)]


def test_a_longer_one_begins_as_ever_and_reuses_spans_when_the_rest_fits() -> None:
    engine = world()
    submit(engine, "long", [*range(90), *DOCUMENT, 5])
    assert parts(run_step(engine, 0.0)) == [("long", 32, False)]
    assert parts(run_step(engine, 0.0)) == [("long", 59, True)]


def test_one_that_does_not_fit_beside_another_chunk_waits_for_the_next_step() -> None:
    engine = world()
    submit(engine, "plain", list(range(20)))
    submit(engine, "question", [*range(200, 220), *DOCUMENT, 5])
    assert parts(run_step(engine, 0.0)) == [("plain", 20, False)]
    assert parts(run_step(engine, 0.0)) == [("question", 21, True)]


def test_one_that_fits_beside_another_chunk_is_computed_with_it() -> None:
    engine = world()
    submit(engine, "question", [*range(200, 208), *DOCUMENT, 5])
    submit(engine, "plain", list(range(20)))
    assert parts(run_step(engine, 0.0)) == [("plain", 20, False), ("question", 9, True)]


def test_one_that_begins_with_what_this_step_computes_waits_for_it() -> None:
    engine = world()
    head = list(range(300, 312))
    submit(engine, "first", [*head, 4])
    submit(engine, "second", [*head, *DOCUMENT, 5])
    assert parts(run_step(engine, 0.0)) == [("first", 13, False)]
    assert parts(run_step(engine, 0.0)) == [("second", 1, True)]


def test_with_too_few_blocks_beside_those_that_are_read_it_is_computed_as_ever() -> None:
    # 20 blocks are cached and 2 more are free; the prompt needs 21.
    engine = world(num_blocks=22)
    submit(engine, "question", [*range(2), *DOCUMENT, 5], 1)
    while (plan := run_step(engine, 0.0)) is not None:
        assert all(part.reuse is None for part in plan.chunks)
    (generated,) = outputs_of(engine, TokensGenerated)
    assert isinstance(generated, TokensGenerated)
    assert generated.num_reused_tokens == 0


def test_a_step_that_breaks_gives_back_what_it_read() -> None:
    engine = world()
    submit(engine, "question", [*range(8), *DOCUMENT, 5])
    plan = engine.schedule(0.0)
    assert parts(plan) == [("question", 9, True)]
    engine.check_invariants()
    assert plan is not None
    engine.fail_step(plan, "broken", 0.0)
    engine.check_invariants()
    assert [type(one) for one in outputs_of(engine, RequestFailed)] == [RequestFailed]
    counts = engine.block_counts()
    assert (counts.in_use, counts.leased) == (0, 0)
    # The document is still known.
    submit(engine, "again", [*range(8), *DOCUMENT, 5])
    assert parts(run_step(engine, 0.0)) == [("again", 9, True)]


def test_evicted_blocks_are_not_reused() -> None:
    engine = world(num_blocks=40)
    # Takes all blocks, and with them the document's.
    submit(engine, "other", range(400, 558), 1)
    while run_step(engine, 0.0) is not None:
        pass
    submit(engine, "question", [*range(8), *DOCUMENT, 5])
    plan = run_step(engine, 0.0)
    assert plan is not None
    assert all(part.reuse is None for part in plan.chunks)


@pytest.mark.parametrize(
    ("prompt", "is_assembled"), [(list(range(500, 530)), False), ([3, *DOCUMENT, 5], True)]
)
def test_handed_off_kv_is_told_from_exact_kv_and_not_stored_where_it_goes(
    prompt: list[int], is_assembled: bool
) -> None:
    sender = world()
    receiver = make_engine(DECODE, config=SPANS, num_blocks=64, max_context_tokens=400)
    sides = ((sender, PREFILL, Handoff("t", "d:1", 3)), (receiver, DECODE, Handoff("t", "", 0)))
    for engine, phases, handoff in sides:
        engine.handle(Submit(key("r"), phases, tuple(prompt), SamplingParams(4), 1e6, handoff), 0.0)
    plan = run_step(sender, 0.0)
    assert plan is not None
    assert [part.reuse is not None for part in plan.chunks] == [is_assembled]
    start, finish = outputs_of(sender, StartTransfer, FinishTransfer)
    assert isinstance(start, StartTransfer)
    assert isinstance(finish, FinishTransfer)
    receiver.handle(ReserveBlocks("t", len(prompt), len(prompt) + 4, 10.0), 0.0)
    (granted,) = outputs_of(receiver, BlocksReserved)
    assert isinstance(granted, BlocksReserved)
    receiver.handle(CommitTransfer("t", granted.block_ids, finish.token_ids, start.token_digest), 0.0)
    while run_step(receiver, 0.0) is not None:
        pass
    tokens = [one for one in outputs_of(receiver, TokensGenerated) if isinstance(one, TokensGenerated)]
    assert sum(len(one.token_ids) for one in tokens) == 3
    assert (receiver.block_counts().cached == 0) == is_assembled


def test_what_is_handed_off_does_not_wait_for_a_step_of_its_own() -> None:
    engine = world()
    submit(engine, "plain", list(range(20)))
    prompt = (*range(200, 220), *DOCUMENT, 5)
    engine.handle(Submit(key("leaves"), PREFILL, prompt, SamplingParams(4), 1e6, Handoff("t", "d:1", 3)), 0.0)
    assert parts(run_step(engine, 0.0)) == [("plain", 20, False), ("leaves", 12, False)]
    while (plan := run_step(engine, 0.0)) is not None:
        assert all(part.reuse is None for part in plan.chunks)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 2), st.integers(1, 30)), max_size=25
    ),
    st.integers(45, 120),
    st.sampled_from(list(Batching)),
)
def test_every_request_ends_and_every_block_comes_back(
    acts: list[tuple[int, int, int, int]], num_blocks: int, batching: Batching
) -> None:
    """Scarce blocks, preemption and aborts among prompts of common documents."""
    engine = make_engine(
        config=replace(SPANS, batching=batching, max_waiting_requests=64),
        num_blocks=num_blocks,
        max_context_tokens=180,
    )
    documents = [list(range(1000 * i, 1000 * i + 70)) for i in range(3)]
    ended: set[str] = set()

    def step() -> bool:
        plan = run_step(engine, 0.0)
        for output in outputs_of(engine, TokensGenerated, RequestFailed):
            assert isinstance(output, TokensGenerated | RequestFailed)
            if isinstance(output, RequestFailed) or output.finish_reason is not None:
                ended.add(output.key.request_id)
        return plan is not None

    for i, (act, first, document, max_new) in enumerate(acts):
        if act == 3 and i > 0:
            engine.handle(Abort(key(f"r{i - 1}")), 0.0)
            ended.add(f"r{i - 1}")
            ended.add(f"r{i}")
            continue
        head = list(range(9000, 9000 + first)) if act else [7777 + i] * first
        submit(engine, f"r{i}", [*head, *documents[document], *documents[0][:act], 5], max_new)
        step()
    for _ in range(5000):
        if not step() and engine.num_running + engine.num_waiting == 0:
            break
    assert ended == {f"r{i}" for i in range(len(acts))}
    counts = engine.block_counts()
    assert counts.free + counts.cached == counts.total


def test_a_model_whose_keys_cannot_be_moved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Rope, "can_move", False)
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    config = EngineConfig(kv_cache_bytes=2**20, span_reuse=SpanReuseConfig())
    spec = WorkerSpec(WorkerId("w"), 1, BOTH, str(path), engine=config)
    with pytest.raises(UnsupportedModel, match="dynamic RoPE scaling"):
        load(spec, lambda *_progress: None)


def test_the_event_says_how_much_was_reused() -> None:
    event = TokensGenerated(key("r"), (1,), 9, None, 0.5, num_cached_tokens=3, num_reused_tokens=4)
    assert event_from_pb(event_to_pb(event)) == event
