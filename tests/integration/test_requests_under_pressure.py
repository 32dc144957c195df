"""Requests that compete or are interrupted, with real workers: what comes out is what comes out alone."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from protos import inference_pb2 as pb
from tests.support.both_shapes import ROOMY, Answered, Served, random_prompt, request_of, together, use
from tests.support.gateway import Gateway, collect, gateway, text_of, tokens_of
from tests.support.waiting import until
from tests.support.worker_client import (
    BLOCK_BYTES,
    BOTH,
    DECODE,
    PREFILL,
    StepGate,
    WorkerClient,
    at_start,
    prompt,
    running_worker,
    submit,
    worker_spec,
)
from tests.support.worker_process import WorkerProcess, worker_processes
from workers.api import KvBlocksRemoved, KvBlocksStored, SubscribeKvEvents

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


def test_the_higher_priority_starts_first(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = StepGate(monkeypatch, at_start(0))
    ended: list[str] = []

    async def ask(it: Served, name: str, priority: int) -> None:
        request = request_of(random_prompt(20), 6)
        request.request_id, request.priority = name, priority
        await it.ask(request)
        ended.append(name)

    async def scenario() -> None:
        async with together(model_path, max_running_sequences=1) as it, asyncio.TaskGroup() as group:
            group.create_task(ask(it, "running", 0))
            await gate.reached()
            mailbox = it.decode.worker.text.step_loop._mailbox  # type: ignore[union-attr]
            for i, (name, priority) in enumerate((("low", -1), ("plain", 0), ("high", 5)), start=1):
                group.create_task(ask(it, name, priority))
                await until(lambda i=i: mailbox.qsize() == i, "the submit at the worker")  # type: ignore[misc]
            gate.open()

    asyncio.run(scenario())
    assert ended == ["running", "high", "plain", "low"]


def test_preempted_requests_end_as_they_do_alone(model_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 0.8, "seed": 4, "presence_penalty": 1.0, "min_p": 0.02},
        {"ngram_drafts": pb.NgramDrafts()},
        {"temperature": 0.9, "seed": 5, "cautious": pb.CautiousDecoding(max_branches=3)},
        {"regex": r"[a-z ]{60,90}", "temperature": 1.0, "seed": 6},
        {"logprobs": 2, "prompt_logprobs": 1},
        {},
        {"temperature": 1.2, "seed": 8},
    ]
    requests = [request_of(random_prompt(20 + 3 * i), 90, **given) for i, given in enumerate(options)]

    async def alone() -> list[list[int]]:
        async with together(model_path) as it:
            return [await it.tokens(request) for request in requests]

    async def crowded() -> list[list[int]]:
        # Blocks for about two of them.
        pool = 18 * BLOCK_BYTES
        async with together(model_path, kv_cache_bytes=pool, growth_reserve=0.0) as it:
            answers = await it.ask_all(requests)
            engine = it.decode.worker.text.step_loop.engine  # type: ignore[union-attr]
            assert engine.num_preemptions > 0
            scored = [each for message in answers[7] for each in message.prompt_logprobs]
            assert len(scored) == len(requests[7].token_ids.ids) - 1
            return [tokens_of(answer) for answer in answers]

    found, expected = asyncio.run(crowded()), asyncio.run(alone())
    for given, some, others in zip(options, found, expected, strict=True):
        # Cautious decoding does without its branches where there are no blocks for them.
        assert some == others or "cautious" in given, given


SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 9, "maxItems": 9}},
    "required": ["words"],
    "additionalProperties": False,
}  # fmt: skip


def test_a_request_with_a_grammar_penalties_and_a_seed_outlives_its_worker(model_path: Path) -> None:
    request = request_of(
        random_prompt(40),
        300,
        ignore_eos=False,
        json_schema=json.dumps(SCHEMA),
        temperature=1.0,
        seed=11,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logprobs=1,
        prompt_logprobs=0,
    )
    shapes = [("both-0", BOTH), ("prefill-0", PREFILL), ("decode-0", DECODE), ("spare-0", BOTH)]

    async def lose(it: Gateway, first: list[WorkerProcess], spare: WorkerProcess) -> Answered:
        """The last of the first is killed while it generates."""
        await use(it, *(worker.view() for worker in first))
        call = it.client.Generate(request)
        messages = [await call.read()]
        while sum(len(message.token_ids) for message in messages) < 12:
            messages.append(await call.read())
        first[-1].process.kill()
        # Not before the gateway has noticed, or its requests would simply move.
        await until(lambda: len(it.linked()) < len(first), "the loss to be noticed")
        await it.publish(spare.view())
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
        return messages

    async def scenario() -> None:
        with worker_processes(*shapes, model=model_path) as (both, prefill, decode, spare):
            async with gateway(config=ROOMY) as it:
                await use(it, spare.view())
                whole = await collect(it.client.Generate(request))
                assert len(json.loads(text_of(whole))["words"]) == 9
                for first in ([both], [prefill, decode]):
                    messages = await lose(it, first, spare)
                    assert messages[-1].timings.attempts == 2
                    assert tokens_of(messages) == tokens_of(whole)
                    assert text_of(messages) == text_of(whole)
                    for field in ("logprobs", "prompt_logprobs"):
                        found = [
                            [e.token_id for m in each for e in getattr(m, field)]
                            for each in (messages, whole)
                        ]
                        assert found[0] == found[1], field

    asyncio.run(scenario())


def test_kv_events_tell_what_is_cached_and_what_is_no_more(model_path: Path) -> None:
    def hashes(worker: WorkerClient, kind: type[KvBlocksStored | KvBlocksRemoved]) -> list[bytes]:
        return [name for event in worker.kv_events if isinstance(event, kind) for name in event.hashes]

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, kv_cache_bytes=10 * BLOCK_BYTES)) as worker:

            def stored() -> list[bytes]:
                return hashes(worker, KvBlocksStored)

            def removed() -> list[bytes]:
                return hashes(worker, KvBlocksRemoved)

            await worker.generate(submit(prompt(64), request_id="before", max_new_tokens=1))
            assert worker.kv_events == []
            await worker.send(SubscribeKvEvents())
            await worker.wait_for(lambda: len(stored()) >= 4, "what was cached before")
            known = set(stored())
            assert len(known) == 4
            await worker.generate(submit(prompt(64), request_id="again", max_new_tokens=1))
            assert set(stored()) == known
            # Another prompt needs blocks of the first.
            await worker.generate(submit(prompt(120, seed=1), request_id="other", max_new_tokens=1))
            await worker.wait_for(lambda: bool(removed()), "an eviction")
            num_cached = (await worker.status()).blocks.cached
            await worker.wait_for(
                lambda: len(set(stored()) - set(removed())) == num_cached, "all that is cached is told of"
            )
            assert set(removed()) <= known

    asyncio.run(scenario())
