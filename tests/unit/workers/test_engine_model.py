"""The engine with a real model: however a request is scheduled, its tokens are those it gets alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_model import PLAIN, EngineWithModel
from tests.support.generate import Session
from tests.support.tiny_model import EOS_TOKEN_ID, write_tiny_gguf
from workers.api import (
    Batching,
    CautiousDecoding,
    DecodingMethod,
    EngineConfig,
    FinishReason,
    Grammar,
    GrammarKind,
    NgramDrafts,
    PrefillOrder,
    SamplingParams,
    StepBudget,
    SuperposedDecoding,
    TokensGenerated,
)
from workers.engine.decoding.superposed import mix_settings
from workers.engine.grammar import GrammarCompiler
from workers.engine.grammar_masks import GrammarMasks
from workers.engine.grammar_states import GrammarStates
from workers.engine.runner import GrammarTools
from workers.engine.step_batch import StepBatch
from workers.model.llama import Llama
from workers.model.prepare import PreparedModel, load_weights, prepare

STOPS = frozenset({EOS_TOKEN_ID})
#: A few tokens that often come in the tiny model's output.
PUNCTUATION = frozenset(range(0, 384, 5))
SCARCE = replace(PLAIN, growth_reserve=0.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    folder = tmp_path_factory.mktemp("engine")
    path = write_tiny_gguf(folder / "tiny.gguf", num_layers=3)
    return prepare(str(path), lambda *_progress: None, folder / "cache")


@pytest.fixture(scope="module")
def model(prepared: PreparedModel) -> Llama:
    return Llama(prepared.config, load_weights(prepared))


@pytest.fixture
def grammars(prepared: PreparedModel) -> Iterator[GrammarTools]:
    config = prepared.config
    compiler = GrammarCompiler(prepared.tokenizer_json, config.vocab_size, config.eos_token_ids)
    tools = GrammarTools(GrammarStates(compiler), GrammarMasks(config.vocab_size))
    yield tools
    tools.masks.close()
    compiler.close()


@pytest.fixture(scope="module")
def alone(model: Llama) -> Callable[[tuple[int, ...], int, SamplingParams], list[int]]:
    """What a request gets that runs alone, in one piece, without a cache."""
    known: dict[tuple[tuple[int, ...], int, SamplingParams], list[int]] = {}

    def tokens(prompt: tuple[int, ...], max_new: int, sampling: SamplingParams) -> list[int]:
        request = prompt, max_new, sampling
        if request not in known:
            config = replace(PLAIN, token_budget=256, is_prefix_cache_on=False)
            engine = EngineWithModel(model, config, punctuation=PUNCTUATION, num_blocks=128)
            engine.submit("alone", prompt, max_new, sampling=sampling)
            engine.run()
            known[request] = engine.tokens["alone"]
        return known[request]

    return tokens


def prompts() -> st.SearchStrategy[tuple[int, ...]]:
    """Many begin alike."""
    beginning = st.sampled_from([(), tuple(range(10, 22)), tuple(range(10, 31)), tuple(range(40, 57))])
    ending = st.lists(st.integers(3, 383), min_size=1, max_size=12).map(tuple)
    few = st.sampled_from([(5,), (6, 7), (5, 6, 7, 8)])
    return st.builds(lambda one, other: one + other, beginning, st.one_of(few, ending))


REQUESTS = st.lists(
    st.tuples(
        prompts(), st.integers(1, 14), st.integers(0, 6), st.integers(0, 2), st.sampled_from(["", "x"])
    ),
    min_size=1,
    max_size=7,
)
CONFIGS = st.builds(
    EngineConfig,
    block_size=st.sampled_from([1, 4, 16]),
    token_budget=st.sampled_from([16, 24, 64]),
    max_running_sequences=st.integers(1, 6),
    max_waiting_requests=st.just(64),
    batching=st.sampled_from(Batching),
    prefill_order=st.sampled_from(PrefillOrder),
    step_budget=st.sampled_from(StepBudget),
    tile_tokens=st.sampled_from([1, 8]),
    growth_reserve=st.sampled_from([0.0, 0.3, 1.0]),
    is_prefix_cache_on=st.booleans(),
)


@settings(max_examples=40)
@given(
    config=CONFIGS,
    requests=REQUESTS,
    spare=st.sampled_from([0, 8, 64]),
    decoding=st.sampled_from([None, None, NgramDrafts(4)]),
    aborted=st.sets(st.integers(0, 6), max_size=2),
    abort_step=st.integers(1, 12),
)
def test_however_it_is_scheduled_a_request_gets_the_tokens_it_gets_alone(
    model: Llama,
    alone: Callable[[tuple[int, ...], int, SamplingParams], list[int]],
    config: EngineConfig,
    requests: list[tuple[tuple[int, ...], int, int, int, str]],
    spare: int,
    decoding: DecodingMethod | None,
    aborted: set[int],
    abort_step: int,
) -> None:
    """Greedy and sampled, chunked, mixed, preempted, from the prefix cache, with drafts, among aborts."""
    longest = max(len(prompt) + max_new for prompt, max_new, *_ in requests)
    num_blocks = -(-longest // config.block_size) + -(-spare // config.block_size)
    engine = EngineWithModel(model, config, num_blocks=num_blocks)
    samplings = [
        SamplingParams(
            1,
            temperature=0.0 if i % 2 == 0 else 1.0,
            seed=i,
            stop_token_ids=STOPS,
            decoding=decoding,
        )
        for i in range(len(requests))
    ]
    for step in range(max(arrival for _, _, arrival, _, _ in requests) + 1):
        for i, (prompt, max_new, arrival, priority, salt) in enumerate(requests):
            if arrival == step:
                engine.submit(
                    str(i), prompt, max_new, priority=priority, cache_salt=salt, sampling=samplings[i]
                )
        if step == abort_step:
            for i in aborted:
                engine.abort(str(i))
        engine.step()
    engine.run()
    assert not engine.failed
    for i, (prompt, max_new, *_) in enumerate(requests):
        expected = alone(prompt, max_new, replace(samplings[i], decoding=None))
        if i in aborted and str(i) not in engine.finished:
            assert engine.tokens[str(i)] == expected[: len(engine.tokens[str(i)])]
        else:
            assert engine.tokens[str(i)] == expected


@settings(max_examples=15)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=3, unique=True),
    num_blocks=st.sampled_from([40, 200]),
    is_cache_on=st.booleans(),
)
def test_branches_of_cautious_decoding_disturb_nobody(
    model: Llama,
    alone: Callable[[tuple[int, ...], int, SamplingParams], list[int]],
    seeds: list[int],
    num_blocks: int,
    is_cache_on: bool,
) -> None:
    """Its own tokens depend on blocks being there for the branches; those of others never do."""
    config = replace(SCARCE, max_running_sequences=32, is_prefix_cache_on=is_cache_on)
    engine = EngineWithModel(model, config, num_blocks=num_blocks, punctuation=PUNCTUATION)
    prompt = tuple(range(10, 31))
    decoding = CautiousDecoding(max_branches=5, max_branch_tokens=6)
    cautious = [
        SamplingParams(1, temperature=0.9, seed=seed, stop_token_ids=STOPS, decoding=decoding)
        for seed in seeds
    ]
    for i, sampling in enumerate(cautious):
        engine.submit(f"c{i}", prompt, 16, sampling=sampling)
        engine.submit(f"g{i}", (*prompt, i + 3), 16)
    engine.run()
    for i, sampling in enumerate(cautious):
        assert engine.tokens[f"g{i}"] == alone((*prompt, i + 3), 16, SamplingParams(1))
        assert len(engine.tokens[f"c{i}"]) == 16 or engine.finished[f"c{i}"] is FinishReason.STOP
        if num_blocks == 200:
            assert engine.tokens[f"c{i}"] == alone(prompt, 16, sampling)
            report = engine.reports[f"c{i}"]
            assert report.num_rows >= report.num_tokens == len(engine.tokens[f"c{i}"]) - 1


def test_cautious_decoding_keeps_the_likeliest_of_its_branches(model: Llama) -> None:
    """At least once it takes another branch than the first, which is what plain sampling would have taken."""
    sampling = SamplingParams(1, temperature=1.0, seed=1)
    cautious = replace(sampling, decoding=CautiousDecoding(max_branches=6, max_branch_tokens=4))
    engine = EngineWithModel(
        model, replace(PLAIN, max_running_sequences=16), num_blocks=128, punctuation=PUNCTUATION
    )
    engine.submit("plain", range(10, 31), 24, sampling=sampling)
    engine.submit("cautious", range(10, 31), 24, sampling=cautious)
    engine.run()
    assert engine.tokens["plain"][0] == engine.tokens["cautious"][0]
    assert engine.tokens["plain"] != engine.tokens["cautious"]
    assert engine.reports["cautious"].num_rows > engine.reports["cautious"].num_tokens
    assert "plain" not in engine.reports


def test_cautious_decoding_goes_on_from_delivered_tokens_as_if_unbroken(model: Llama) -> None:
    decoding = CautiousDecoding(max_branches=4, max_branch_tokens=4)
    sampling = SamplingParams(1, temperature=1.0, seed=1, decoding=decoding)
    prompt = list(range(10, 31))
    engine = EngineWithModel(
        model, replace(PLAIN, max_running_sequences=16), num_blocks=128, punctuation=PUNCTUATION
    )
    engine.submit("whole", prompt, 24, sampling=sampling)
    engine.run()
    whole = engine.tokens["whole"]
    # What is chosen together is delivered together.
    ends = [
        output.first_position + len(output.token_ids) - len(prompt)
        for output in engine.outputs
        if isinstance(output, TokensGenerated)
    ]
    assert len(ends) < len(whole)
    for num in ends[:-1]:
        engine.submit(f"from {num}", prompt + whole[:num], 24 - num, num_delivered=num, sampling=sampling)
    engine.run()
    for num in ends[:-1]:
        assert engine.tokens[f"from {num}"] == whole[num:], num


def test_drafts_take_fewer_steps_on_text_that_was_seen_before(model: Llama) -> None:
    engine = EngineWithModel(model)
    sampling = SamplingParams(1, decoding=NgramDrafts(6))
    for name, salt in (("first", "a"), ("again", "a"), ("stranger", "b")):
        num_before = engine.num_steps
        engine.submit(name, range(20, 36), 60, sampling=sampling, cache_salt=salt)
        engine.run()
        report = engine.reports[name]
        assert engine.tokens[name] == engine.tokens["first"]
        assert report.num_tokens == 59
        assert engine.num_steps - num_before == report.num_steps + 1
        assert report.num_rows >= report.num_steps
    assert engine.reports["again"].num_steps < 25
    # Whatever one tenant was told helps no other.
    assert engine.reports["stranger"].num_steps == engine.reports["first"].num_steps


def test_superposed_drafts_with_one_draft_are_greedy(model: Llama) -> None:
    engine = EngineWithModel(model)
    prompt = range(10, 31)
    engine.submit("plain", prompt, 8)
    engine.submit("mixed", prompt, 8, sampling=SamplingParams(1, decoding=SuperposedDecoding(1)))
    engine.run()
    assert engine.drafts["mixed"].drafts == (tuple(engine.tokens["plain"]),)
    assert engine.tokens["mixed"] == []


def test_superposed_drafts_begin_with_the_likeliest_tokens_and_leave_no_kv_behind(model: Llama) -> None:
    engine = EngineWithModel(model)
    prompt = list(range(10, 31))
    sampling = SamplingParams(1, decoding=SuperposedDecoding(3))
    engine.submit("mixed", prompt, 9, sampling=sampling)
    engine.run()
    drafts = engine.drafts["mixed"].drafts
    assert len(set(drafts)) == 3
    assert all(len(draft) <= 9 for draft in drafts)
    assert list(engine.drafts["mixed"].logprobs) == sorted(engine.drafts["mixed"].logprobs, reverse=True)
    assert engine.reports["mixed"].num_rows == engine.reports["mixed"].num_steps == 8
    # Whole blocks of the prompt alone.
    assert engine.engine.block_counts().cached == len(prompt) // PLAIN.block_size
    engine.submit("after", [*prompt, *drafts[0], 5], 4)
    engine.run()
    assert engine.num_cached["after"] <= len(prompt)
    assert mix_settings(3).num_candidates == 9


def test_logprobs_are_those_of_the_model_whatever_is_sampled(model: Llama) -> None:
    engine = EngineWithModel(model)
    prompt = list(range(10, 31))
    sampling = SamplingParams(1, temperature=2.0, seed=4, num_logprobs=3, num_prompt_logprobs=2)
    engine.submit("r", prompt, 6, sampling=sampling)
    engine.run()
    known = [*prompt, *engine.tokens["r"]]
    expected = torch.log_softmax(Session(model, len(known)).feed(known).double(), dim=-1)
    reported = [*engine.prompt_logprobs["r"], *engine.logprobs["r"]]
    assert len(reported) == len(known) - 1
    for position, one in enumerate(reported, start=1):
        row = expected[position - 1]
        assert one.token_id == known[position]
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        num_top = 2 if position < len(prompt) else 3
        assert [token for token, _ in one.top] == row.topk(num_top).indices.tolist()
        assert one.rank == 1 + int((row > row[one.token_id]).sum())


def test_a_prompt_with_logprobs_is_computed_whole_and_once(model: Llama) -> None:
    """Also when it is preempted between its chunks."""
    engine = EngineWithModel(model, replace(SCARCE, token_budget=8), num_blocks=12)
    prompt = list(range(10, 41))
    engine.submit("before", prompt, 2)
    engine.run()
    engine.submit("old", [3, 4, 5, 6, 7, 8], 30)
    engine.step()
    engine.submit("r", prompt, 3, sampling=SamplingParams(1, num_prompt_logprobs=0))
    engine.run()
    assert [one.token_id for one in engine.prompt_logprobs["r"]] == prompt[1:]
    assert engine.num_cached["r"] == 0 or engine.engine.num_preemptions > 0


def test_a_failed_over_request_goes_on_as_if_nothing_had_happened(model: Llama) -> None:
    sampling = SamplingParams(
        1,
        temperature=1.0,
        seed=9,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        # Half of all tokens: without min_new_tokens one of them would come early.
        stop_token_ids=frozenset(range(0, 384, 2)),
        min_new_tokens=10,
    )
    prompt = list(range(10, 31))
    engine = EngineWithModel(model)
    engine.submit("whole", prompt, 12, sampling=sampling)
    engine.run()
    delivered = engine.tokens["whole"][:5]
    assert len(engine.tokens["whole"]) > 10
    left = replace(sampling, min_new_tokens=5)
    engine.submit("rest", [*prompt, *delivered], 7, sampling=left, num_delivered=5)
    engine.run()
    assert engine.tokens["rest"] == engine.tokens["whole"][5:]


def test_a_failover_changes_nobodys_angles(model: Llama) -> None:
    """With dynamic scaling they depend on the prompt's length, and what was delivered is no prompt."""
    engine = EngineWithModel(model)
    engine.submit("rest", range(10, 31), 7, num_delivered=5)
    plan = engine.engine.schedule(0.0)
    assert plan is not None
    forward = StepBatch(plan, PLAIN.block_size).forward
    assert forward is not None
    rope_lens = forward.rope_lens
    assert rope_lens is not None
    assert rope_lens.tolist() == [16] * 16 + [17, 18, 19, 20, 21]


LETTERS = Grammar(GrammarKind.REGEX, "[a-z]{2,9}-[0-9]{4,12}")


@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, prefill_order=PrefillOrder.LEAST_SLACK, step_budget=StepBudget.PREDICTED),
        replace(SCARCE, prefill_order=PrefillOrder.LEAST_SLACK, step_budget=StepBudget.PREDICTED),
    ],
    ids=["plain", "scarce"],
)
def test_by_slack_and_prediction_all_ways_of_decoding_give_what_they_give_else(
    model: Llama, grammars: GrammarTools, config: EngineConfig
) -> None:
    """Drafts, superposed decoding, a grammar and plain sampling, all at once."""

    def tokens(of: EngineConfig, num_blocks: int) -> dict[str, list[int]]:
        engine = EngineWithModel(model, of, grammars=grammars, punctuation=PUNCTUATION, num_blocks=num_blocks)
        ways: dict[str, SamplingParams] = {
            "plain": SamplingParams(1),
            "sampled": SamplingParams(1, temperature=1.0, seed=3),
            "drafts": SamplingParams(1, decoding=NgramDrafts(4)),
            "superposed": SamplingParams(1, decoding=SuperposedDecoding(2)),
            "grammar": SamplingParams(1, grammar=LETTERS),
        }
        for number, (name, sampling) in enumerate(ways.items()):
            prompt = tuple(10 + (7 * number + i) % 60 for i in range(9 + 8 * number))
            engine.submit(name, prompt, 10, sampling=sampling)
        engine.run()
        assert not engine.failed
        found = {name: engine.tokens[name] for name in ways if name != "superposed"}
        return {**found, "superposed": [one for draft in engine.drafts["superposed"].drafts for one in draft]}

    assert tokens(config, 40) == tokens(PLAIN, 128)


def test_grammars_are_followed_through_preemption_and_failover(model: Llama, grammars: GrammarTools) -> None:
    samplings = [SamplingParams(1, temperature=1.0, seed=i, grammar=LETTERS) for i in range(4)]
    whole = EngineWithModel(model, grammars=grammars)
    scarce = EngineWithModel(model, SCARCE, num_blocks=8, grammars=grammars)
    for engine in (whole, scarce):
        for i, sampling in enumerate(samplings):
            engine.submit(str(i), range(10 + i, 15 + i), 20, sampling=sampling)
        engine.run()
        assert not engine.failed
    assert scarce.engine.num_preemptions > 0
    assert scarce.tokens == whole.tokens
    for i, sampling in enumerate(samplings):
        delivered = whole.tokens[str(i)][:3]
        prompt = [*range(10 + i, 15 + i), *delivered]
        whole.submit(f"rest {i}", prompt, 17, num_delivered=3, sampling=sampling)
    whole.run()
    for i in range(4):
        assert whole.tokens[f"rest {i}"] == whole.tokens[str(i)][3:]


def test_a_step_that_breaks_after_the_model_has_run_leaves_no_mask_behind(
    model: Llama, grammars: GrammarTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineWithModel(model, grammars=grammars)
    engine.submit("r", [3, 4, 5], 20, sampling=SamplingParams(1, grammar=LETTERS))

    def broken(*_arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("workers.engine.runner.sample", broken)
        with pytest.raises(MemoryError):
            engine.step()
    engine.abort("r")
    engine.submit("next", [3, 4, 5], 20, sampling=SamplingParams(1, grammar=LETTERS))
    engine.run()
    assert len(engine.tokens["next"]) > 6


def test_samples_of_one_prompt_share_its_blocks(model: Llama) -> None:
    engine = EngineWithModel(model, replace(PLAIN, token_budget=64))
    prompt = list(range(10, 31))
    for i in range(4):
        engine.submit(str(i), prompt, 6, sampling=SamplingParams(1, temperature=1.0, seed=i))
    engine.step()
    # 5 whole blocks, and for each sample one more for its end.
    assert engine.engine.block_counts().in_use == 5 + 4
    engine.run()
    assert [engine.num_cached[str(i)] for i in range(4)] == [0, 20, 20, 20]


def test_a_preempted_request_keeps_its_stream(model: Llama) -> None:
    engine = EngineWithModel(model, SCARCE, num_blocks=10)
    for i in range(4):
        engine.submit(str(i), range(10 + i, 20 + i), 20)
    engine.run()
    assert engine.engine.num_preemptions > 0
    firsts = [o for o in engine.outputs if isinstance(o, TokensGenerated) and o.prefill_s is not None]
    assert len(firsts) == 4
    assert all(len(engine.tokens[str(i)]) == 20 for i in range(4))


def test_layers_are_reported_in_groups_as_they_are_written(model: Llama) -> None:
    engine = EngineWithModel(model)
    engine.submit("r", [3, 4, 5], 1)
    plan = engine.engine.schedule(0.0)
    assert plan is not None
    plan.layer_group_size = 2
    groups: list[tuple[int, int]] = []
    engine.runner.run(plan, lambda lo, hi: groups.append((lo, hi)))
    assert groups == [(0, 2), (2, 3)]


def test_warm_up_leaves_no_trace_in_what_follows(model: Llama) -> None:
    engine = EngineWithModel(model)
    engine.submit("r", range(10, 31), 6)
    engine.run()
    other = EngineWithModel(model)
    other.runner.warm_up()
    other.submit("r", range(10, 31), 6)
    other.run()
    assert engine.tokens == other.tokens
