"""Greedy output of the embedded model is the same in transformers, on one worker, and on two over gRPC.

20 prompts, 40 tokens each. The prompts of a group have one length, so that transformers can take them as one batch
without padding. A different batch size or chunk rounds differently, in the last digits of a logit, so a test of equality
needs prompts that never come to a near tie; the reference run checks that these do not.
"""

import asyncio
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.support.embedded_model import (
    EMBEDDED_SOURCE,
    embedded_llama,
    embedded_prepared,
    embedded_tokenizer,
)
from tests.support.hf_reference import hf_llama
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    RunningWorker,
    handed_off,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers.api import KvTransferred, WorkerSpec
from workers.model.prepare import load_weights

pytestmark = pytest.mark.integration

#: Of each prompt, over the ends of two or three blocks.
NUM_TOKENS = 40
#: All prompts together, on a busy machine.
PATIENCE_S = 240.0
BLOCK_SIZE = 16
#: Smaller than the prompts of the last group, which therefore take several chunks.
TOKEN_BUDGET = 96
#: Logits differ by up to 1.1e-4 between batch sizes, either way: a lead of less than four times that would prove little.
MIN_LEAD = 5e-4
TEXT = (Path(__file__).resolve().parent.parent / "fixtures" / "texts.txt").read_text(encoding="utf-8")


@cache
def prompts() -> dict[str, list[list[int]]]:
    """Groups of four or eight, by what they are to show."""
    tokenizer = embedded_tokenizer()
    paragraphs = [tokenizer.encode(part).ids for part in TEXT.strip().split("\n\n")]
    foreign, english = paragraphs[:8], paragraphs[8:12]
    return {
        "one token": [[ids[0]] for ids in english],
        "exactly a block": [ids[:BLOCK_SIZE] for ids in english],
        "non-ASCII, more than a block": [ids[:34] for ids in foreign],
        "several chunks": [(ids * 20)[:250] for ids in english],
    }


@cache
def reference() -> dict[str, list[list[int]]]:
    """What transformers generates from the same weights, without an end token."""
    prepared = embedded_prepared()
    model = hf_llama(prepared.config, load_weights(prepared))
    return {name: _hf_batch(model, group) for name, group in prompts().items()}


@torch.inference_mode()
def _hf_batch(model: torch.nn.Module, group: list[list[int]]) -> list[list[int]]:
    inputs, cache_, rows = torch.tensor(group), None, []
    for _ in range(NUM_TOKENS):
        result = model(inputs, past_key_values=cache_, use_cache=True, logits_to_keep=1)
        cache_ = result.past_key_values
        best = result.logits[:, -1].topk(2)
        lead = (best.values[:, 0] - best.values[:, 1]).min().item()
        assert lead > MIN_LEAD, f"a near tie: {lead}; choose other prompts"
        inputs = best.indices[:, :1]
        rows.append(inputs)
    tokens: list[list[int]] = torch.cat(rows, dim=1).tolist()
    return tokens


def _spec(phases: frozenset[object]) -> WorkerSpec:
    return worker_spec(
        EMBEDDED_SOURCE,
        phases,  # type: ignore[arg-type]
        kv_cache_bytes=600 * 2**20,
        layer_group_size=10,
        token_budget=TOKEN_BUDGET,
        block_size=BLOCK_SIZE,
        num_threads=1,
    )


def test_the_prompts_are_what_they_claim_to_be() -> None:
    groups = prompts()
    assert sum(map(len, groups.values())) == 20
    assert {len(ids) for ids in groups["exactly a block"]} == {BLOCK_SIZE}
    assert all(len(ids) > 2 * TOKEN_BUDGET for ids in groups["several chunks"])
    text = embedded_tokenizer().decode(groups["non-ASCII, more than a block"][0])
    assert not text.isascii()


def test_one_worker_gives_the_tokens_of_transformers() -> None:
    async def scenario() -> dict[str, list[list[int]]]:
        async with running_worker(_spec(PREFILL | DECODE)) as worker:
            return await _generate_all(worker, None)

    assert asyncio.run(scenario()) == reference()


def test_two_workers_give_the_tokens_of_transformers() -> None:
    async def scenario() -> dict[str, list[list[int]]]:
        async with running_pair(_spec(PREFILL), _spec(DECODE)) as (prefill, decode):
            return await _generate_all(prefill, decode)

    assert asyncio.run(scenario()) == reference()
    assert embedded_llama().config.num_layers == 30


async def _generate_all(prefill: RunningWorker, decode: RunningWorker | None) -> dict[str, list[list[int]]]:
    """All prompts at once, so that steps mix them."""
    tasks = {}
    async with asyncio.TaskGroup() as group:
        for name, ids_of in prompts().items():
            for number, token_ids in enumerate(ids_of):
                request_id = f"{name}-{number}"
                tasks[name, number] = group.create_task(_generate(prefill, decode, request_id, token_ids))
    return {name: [tasks[name, i].result() for i in range(len(ids_of))] for name, ids_of in prompts().items()}


async def _generate(
    prefill: RunningWorker, decode: RunningWorker | None, request_id: str, token_ids: list[int]
) -> list[int]:
    request = submit(token_ids, request_id=request_id, max_new_tokens=NUM_TOKENS, timeout_s=PATIENCE_S)
    if decode is None:
        return await prefill.generate(request, patience_s=PATIENCE_S)
    to_prefill, to_decode = handed_off(request, decode, transfer_id=request_id)
    await prefill.send(to_prefill)
    later = await decode.generate(to_decode, patience_s=PATIENCE_S)
    first = await prefill.wait_for_tokens(request_id, 1)
    # What the prefill worker says of it may come after all that the other one says.
    await prefill.wait_for(
        lambda: any(isinstance(event, KvTransferred) for event in prefill.events_of(request_id)),
        "the hand-off",
    )
    return first + later
