"""The embedded model through the gateway, on both shapes: what users see of the options."""

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from protos import inference_pb2 as pb
from tests.support.both_shapes import Served, both_shapes, request_of
from tests.support.embedded_model import EMBEDDED_SOURCE
from tests.support.gateway import text_of, tokens_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("nothing_escapes")]

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer"},
    },
    "required": ["city", "country", "inhabitants"],
    "additionalProperties": False,
}
COUNTING = "one two three four five six seven eight nine ten one two three four five six seven"


def chat(content: str, max_tokens: int = 40, **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=content)]),
        sampling=pb.SamplingParams(max_tokens=max_tokens, **sampling),
    )


async def check_stop_string(it: Served) -> list[str]:
    question = chat("What is the capital of France?", stop=["Paris"])
    answer = await it.ask(question)
    assert answer[-1].stop_text == "Paris"
    assert text_of(answer).endswith("is ")
    again = await it.ask(question)
    assert again[-1].usage.cached_tokens >= answer[-1].usage.prompt_tokens - 16
    return [text_of(answer), text_of(again)]


async def check_schema(it: Served) -> list[str]:
    request = chat("Tell me about Rome.", 80, json_schema=json.dumps(SCHEMA), temperature=0.7, seed=1)
    text = await it.text(request)
    jsonschema.validate(json.loads(text), SCHEMA)
    return [text]


async def check_drafts(it: Served) -> list[str]:
    plain = await it.ask(request_of(COUNTING, 32))
    drafted = await it.ask(request_of(COUNTING, 32, ngram_drafts=pb.NgramDrafts()))
    assert tokens_of(drafted) == tokens_of(plain)
    cost = drafted[-1].usage.decoding
    assert cost.num_steps < cost.num_tokens == 31
    return [text_of(plain)]


async def check_samples(it: Served) -> list[str]:
    answer = await it.ask(request_of("Once upon a time", 16, n=3, temperature=0.9, seed=2))
    texts = [text_of(answer, i) for i in range(3)]
    assert len(set(texts)) == 3
    return texts


def test_options_do_with_the_embedded_model_what_they_say_and_the_same_on_both_shapes() -> None:
    async def answers(it: Served) -> list[list[str]]:
        return [await check(it) for check in (check_stop_string, check_schema, check_drafts, check_samples)]

    async def scenario() -> None:
        async with both_shapes(EMBEDDED_SOURCE, kv_cache_bytes=64 * 2**20, layer_group_size=10) as shapes:
            one, two = [await answers(it) for it in shapes]
            assert one == two

    asyncio.run(scenario())
