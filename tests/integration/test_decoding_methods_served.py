"""Decoding methods through the gateway, with real workers, on both shapes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from protos import inference_pb2 as pb
from tests.support.both_shapes import Served, both_shapes, random_prompt, request_of
from tests.support.gateway import tokens_of

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

#: The same words over and over: n-grams of it come again.
REPEATING = random_prompt(12) * 8
DRAFTS = {"ngram_drafts": pb.NgramDrafts(max_draft_tokens=6)}


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 0.4, "seed": 9}, id="sampled"),
        pytest.param({"temperature": 0.7, "seed": 9, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, id="cut"),
        pytest.param({"stop_token_ids": list(range(40, 60)), "min_tokens": 9}, id="stops"),
    ],
)
def test_ngram_drafts_change_no_token(model_path: Path, sampling: dict[str, Any]) -> None:
    prompts = [REPEATING, random_prompt(50), REPEATING[:30]]

    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                # With what a first answer has taught the tables, too.
                for prompt in prompts + prompts:
                    plain = await it.ask(request_of(prompt, 60, **sampling))
                    drafted = await it.ask(request_of(prompt, 60, **sampling, **DRAFTS))
                    assert tokens_of(drafted) == tokens_of(plain)
                    assert drafted[-1].finish_reason == plain[-1].finish_reason
                    cost = drafted[-1].usage.decoding
                    assert cost.num_tokens == len(tokens_of(drafted)) - 1
                    assert cost.num_steps <= cost.num_tokens <= cost.num_rows

    asyncio.run(scenario())


def test_ngram_drafts_save_steps_where_the_text_was_seen_before(model_path: Path) -> None:
    async def scenario() -> None:
        async with both_shapes(model_path) as shapes:
            for it in shapes:
                plain = await it.tokens(request_of(random_prompt(20), 60))
                # The whole answer stands in the prompt.
                prompt = random_prompt(20) + plain + random_prompt(20)
                request = request_of(prompt, 40, **DRAFTS)
                await it.ask(request)
                cost = (await it.ask(request))[-1].usage.decoding
                assert cost.num_steps < cost.num_tokens

    asyncio.run(scenario())


def test_cautious_decoding_depends_on_the_seed_alone(model_path: Path) -> None:
    def request(seed: int) -> pb.GenerateRequest:
        cautious = pb.CautiousDecoding(max_branches=4, max_branch_tokens=6)
        return request_of(random_prompt(40), 40, temperature=0.8, seed=seed, cautious=cautious)

    async def scenario() -> None:
        async with both_shapes(model_path) as (one, two):
            answers = await one.ask_all([request(seed) for seed in (1, 2, 1)])
            found = [tokens_of(answer) for answer in answers]
            assert found[0] == found[2] != found[1]
            assert [len(tokens) for tokens in found] == [40] * 3
            cost = answers[0][-1].usage.decoding
            assert cost.num_rows > cost.num_tokens
            assert [await two.tokens(request(seed)) for seed in (1, 2)] == found[:2]
            assert [await one.tokens(request(seed)) for seed in (2, 1)] == [found[1], found[0]]

    asyncio.run(scenario())


def test_superposed_drafts_come_from_the_decode_worker_alone_and_are_the_same(model_path: Path) -> None:
    async def drafts(it: Served, num_drafts: int) -> list[pb.Draft]:
        superposed = pb.SuperposedDecoding(num_drafts=num_drafts)
        (message,) = await _messages(it, request_of(REPEATING, 10, superposed=superposed))
        assert message.finish_reason == pb.FINISH_REASON_LENGTH
        assert message.usage.completion_tokens == sum(len(draft.token_ids) for draft in message.drafts)
        return list(message.drafts)

    async def scenario() -> None:
        async with both_shapes(model_path) as (one, two):
            for num_drafts in (1, 3, 5):
                some, others = await drafts(one, num_drafts), await drafts(two, num_drafts)
                assert [list(draft.token_ids) for draft in some] == [list(d.token_ids) for d in others]
                assert [d.logprob for d in some] == pytest.approx([d.logprob for d in others], abs=1e-3)
                assert len({tuple(draft.token_ids) for draft in some}) == num_drafts
                assert [draft.text for draft in some] == [draft.text for draft in others]
            greedy = await one.tokens(request_of(REPEATING, 10))
            assert [list(draft.token_ids) for draft in await drafts(one, 1)] == [greedy]

    asyncio.run(scenario())


async def _messages(it: Served, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [message async for message in it.gateway.client.Generate(request)]
