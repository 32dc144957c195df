"""Every option of sampling through the gateway, with real workers: it has an effect, and the same on both shapes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from orchestrator.gateway.validation import SEED_STEP
from protos import inference_pb2 as pb
from tests.support.both_shapes import (
    Answered,
    Served,
    both_shapes,
    random_prompt,
    request_of,
)
from tests.support.gateway import text_of, tokens_of
from tests.support.tiny_model import EOS_TOKEN_ID
from workers.engine.runner import ModelRunner
from workers.engine.step_plan import StepPlan

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

PROMPT = random_prompt(40)
#: Of a prompt of 100 tokens, the second time. Where it was decoded too, its last block was filled, and all of it is
#: known but the token that is always computed; a worker that only reads prompts knows whole blocks.
CACHED = {"together": 99, "apart": 96}
HOT = {"temperature": 1.5, "seed": 7}
#: Two requests that differ in one option.
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({}, HOT),
    "seed": (HOT, HOT | {"seed": 8}),
    "top_k": (HOT, HOT | {"top_k": 2}),
    "top_p": (HOT, HOT | {"top_p": 0.3}),
    "min_p": (HOT, HOT | {"min_p": 0.5}),
    "repetition_penalty": ({}, {"repetition_penalty": 3.0}),
    "presence_penalty": (HOT, HOT | {"presence_penalty": 2.0}),
    "frequency_penalty": (HOT, HOT | {"frequency_penalty": 2.0}),
    "logit_bias": ({}, {"logit_bias": {77: 100.0}}),
}


def test_every_option_changes_the_output_and_both_shapes_agree(model_path: Path) -> None:
    requests = [request_of(PROMPT, **options) for pair in EFFECTS.values() for options in pair]

    async def scenario() -> None:
        async with both_shapes(model_path) as (one, two):
            # All at once on one shape, one after the other on the other.
            found = [tokens_of(answer) for answer in await one.ask_all(requests)]
            for (name, _), (before, after) in zip(EFFECTS.items(), _pairs(found), strict=True):
                assert before != after, name
            assert [await two.tokens(request) for request in requests] == found

    asyncio.run(scenario())


def _pairs(values: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    return list(zip(values[::2], values[1::2], strict=True))


def test_bias_stop_tokens_and_min_tokens_do_what_they_say(model_path: Path) -> None:
    async def check(it: Served) -> None:
        plain = await it.tokens(request_of(PROMPT, 12))
        assert await it.tokens(request_of(PROMPT, 12, logit_bias={77: 100.0})) == [77] * 12
        end = next(i for i in range(3, 12) if plain[i] not in plain[:i])
        answer = await it.ask(request_of(PROMPT, 12, stop_token_ids=[plain[end]]))
        assert tokens_of(answer) == plain[: end + 1]
        assert answer[-1].finish_reason == pb.FINISH_REASON_STOP
        longer = await it.tokens(request_of(PROMPT, 12, stop_token_ids=[plain[end]], min_tokens=end + 3))
        assert len(longer) >= end + 3
        assert plain[end] not in longer[: end + 2]
        ended = await it.ask(request_of(PROMPT, 12, ignore_eos=False, logit_bias={EOS_TOKEN_ID: 100.0}))
        assert tokens_of(ended) == [EOS_TOKEN_ID]
        assert text_of(ended) == ""
        late = request_of(PROMPT, 12, ignore_eos=False, min_tokens=5, logit_bias={EOS_TOKEN_ID: 100.0})
        assert (await it.tokens(late)).index(EOS_TOKEN_ID) == 5

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                await check(it)

    asyncio.run(scenario())


def test_a_stop_string_ends_the_text_before_it_and_frees_the_workers(model_path: Path) -> None:
    async def check(it: Served) -> None:
        text = await it.text(request_of(PROMPT, 200, **HOT))
        stop = text[20:26]
        answer = await it.ask(request_of(PROMPT, 200, stop=["never said", stop], **HOT))
        assert text_of(answer) == text[: text.index(stop)]
        assert answer[-1].stop_text == stop
        assert answer[-1].finish_reason == pb.FINISH_REASON_STOP
        assert answer[-1].usage.completion_tokens == len(tokens_of(answer)) < 100
        # That nothing is held any more is checked when the workers end.

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                await check(it)

    asyncio.run(scenario())


def test_samples_differ_have_their_documented_seeds_and_share_one_prompt(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, num_chunk_tokens = random_prompt(100), 0
    run = ModelRunner.run

    def counted(runner: ModelRunner, plan: StepPlan, on_layers: Any) -> Any:
        nonlocal num_chunk_tokens
        num_chunk_tokens += sum(part.end - part.start for part in plan.chunks)
        return run(runner, plan, on_layers)

    monkeypatch.setattr(ModelRunner, "run", counted)

    async def scenario() -> list[list[list[int]]]:
        nonlocal num_chunk_tokens
        found = []
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                num_chunk_tokens = 0
                answer = await it.ask(request_of(prompt, temperature=1.0, seed=3, n=3))
                # What does not fill a block is computed for each.
                assert num_chunk_tokens <= 100 + 2 * (100 % 16)
                samples = [tokens_of(answer, i) for i in range(3)]
                assert len({tuple(tokens) for tokens in samples}) == 3
                assert answer[-1].usage.prompt_tokens == 100
                assert answer[-1].usage.completion_tokens == 72
                for i, tokens in enumerate(samples):
                    seed = (3 + i * SEED_STEP) % 2**64
                    again = await it.ask(request_of(prompt, temperature=1.0, seed=seed))
                    assert tokens_of(again) == tokens
                    assert again[-1].usage.cached_tokens >= 96
                found.append(samples)
        return found

    first, second = asyncio.run(scenario())
    assert first == second


def test_logprobs_of_output_and_prompt_are_the_same_on_both_shapes_and_agree_with_each_other(
    model_path: Path,
) -> None:
    request = request_of(PROMPT, logprobs=3, prompt_logprobs=2, temperature=1.2, seed=4)

    async def scenario() -> None:
        async with both_shapes(model_path) as (one, two):
            answers = [await it.ask(request) for it in (one, two)]
            outputs, prompts = [_output_logprobs(a) for a in answers], [_prompt_logprobs(a) for a in answers]
            for found in (*outputs, *prompts):
                assert all(len(each.top) in (2, 3) for each in found)
            _assert_alike(*outputs)
            _assert_alike(*prompts)
            assert [each.token_id for each in prompts[0]] == PROMPT[1:]
            tokens = tokens_of(answers[0])
            assert [each.token_id for each in outputs[0]] == tokens
            # Read as a prompt, the output has the same logprobs.
            read = await two.ask(request_of(PROMPT + tokens, 1, prompt_logprobs=3))
            _assert_alike(_prompt_logprobs(read)[len(PROMPT) - 1 :], outputs[0])

    asyncio.run(scenario())


def _output_logprobs(answer: Answered) -> list[pb.TokenLogprobs]:
    return [each for message in answer for each in message.logprobs]


def _prompt_logprobs(answer: Answered) -> list[pb.TokenLogprobs]:
    return [each for message in answer for each in message.prompt_logprobs]


def _assert_alike(some: list[pb.TokenLogprobs], others: list[pb.TokenLogprobs]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert (one.token_id, one.rank, one.text) == (other.token_id, other.rank, other.text)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [top.token_id for top in one.top] == [top.token_id for top in other.top]
        assert [top.logprob for top in one.top] == pytest.approx([t.logprob for t in other.top], abs=1e-4)


def test_a_prompt_that_was_read_before_is_cached_where_it_was_read(model_path: Path) -> None:
    prompt = random_prompt(100)

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                first, second = [await it.ask(request_of(prompt)) for _ in range(2)]
                assert [answer[-1].usage.cached_tokens for answer in (first, second)] == [0, CACHED[it.shape]]
                assert tokens_of(first) == tokens_of(second)

    asyncio.run(scenario())


def test_a_cache_salt_keeps_prompts_apart(model_path: Path) -> None:
    async def cached(it: Served, salt: str) -> int:
        request = request_of(random_prompt(100))
        request.cache_salt = salt
        return (await it.ask(request))[-1].usage.cached_tokens

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                found = [await cached(it, salt) for salt in ("a", "b", "", "a")]
                assert found == [0, 0, 0, CACHED[it.shape]]

    asyncio.run(scenario())
