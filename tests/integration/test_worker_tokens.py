"""Workers with a real, tiny model over real gRPC, alone and in pairs: their tokens are those of transformers."""

import asyncio
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from kvtransfer.receiver import ReceiverMachine
from tests.support.hf_reference import hf_greedy
from tests.support.worker_client import (
    BLOCK_BYTES,
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    StepGate,
    eventually,
    greedy_submit,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    worker_spec,
)
from workers.api import (
    FinishReason,
    KvTransferred,
    PrefillStarted,
    TokensGenerated,
)

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


#: One token, a block, a block and one, several blocks, several chunks of the small budget.
PROMPT_LENGTHS = (1, 16, 17, 50, 131)


def test_one_worker_generates_what_transformers_does(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, token_budget=SMALL_BUDGET)) as worker:
            # All at once, so that chunks and decodes share steps.
            results = await asyncio.gather(
                *(worker.generate(greedy_submit(length)) for length in PROMPT_LENGTHS)
            )
            assert results == [hf_greedy(reference, prompt(length), 12) for length in PROMPT_LENGTHS]
            for length in PROMPT_LENGTHS:
                started, first, *_rest = worker.events_of(f"r{length}")
                assert isinstance(started, PrefillStarted)
                assert isinstance(first, TokensGenerated)
                assert first.first_position == length
                assert first.prefill_s is not None
            # What came out together was told together.
            assert max(worker.batch_sizes) > 1

    asyncio.run(scenario())


def test_prefill_and_decode_workers_generate_what_transformers_does(
    model_path: Path, reference: LlamaForCausalLM
) -> None:
    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET), worker_spec(model_path, DECODE)
        ) as (prefill, decode):
            for length in PROMPT_LENGTHS:
                to_prefill, to_decode = handed_off(greedy_submit(length), decode, f"t{length}")
                await prefill.send(to_prefill)
                expected = hf_greedy(reference, prompt(length), 12)
                assert len(expected) > 1
                # The first token comes from prefill, the others from decode.
                assert await decode.generate(to_decode) == expected[1:]
                assert await prefill.wait_for_tokens(f"r{length}", 1) == expected[:1]
                await prefill.wait_for(
                    lambda name=f"r{length}": isinstance(prefill.events_of(name)[-1], KvTransferred),
                    "the hand-off",
                )
                sent = prefill.events_of(f"r{length}")[-1]
                assert isinstance(sent, KvTransferred)
                # Three layers, each sent when it was computed.
                assert sent.num_chunks >= 3
                assert sent.num_bytes == BLOCK_BYTES // 16 * length
                assert 0 <= sent.exposed_s <= sent.transfer_s

    asyncio.run(scenario())


def test_decode_submit_may_come_after_the_kv(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario() -> None:
        async with running_pair(worker_spec(model_path, PREFILL), worker_spec(model_path, DECODE)) as (
            prefill,
            decode,
        ):
            to_prefill, to_decode = handed_off(greedy_submit(50), decode)
            await prefill.send(to_prefill)
            await prefill.wait_for(
                lambda: any(isinstance(event, KvTransferred) for event in prefill.events), "the hand-off"
            )
            assert await decode.generate(to_decode) == hf_greedy(reference, prompt(50), 12)[1:]

    asyncio.run(scenario())


def test_request_that_ends_with_its_first_token_sends_nothing_more(
    model_path: Path, reference: LlamaForCausalLM
) -> None:
    async def scenario() -> None:
        async with running_pair(worker_spec(model_path, PREFILL), worker_spec(model_path, DECODE)) as (
            prefill,
            decode,
        ):
            to_prefill, to_decode = handed_off(greedy_submit(20, max_new_tokens=1), decode)
            await decode.send(to_decode)
            assert await prefill.generate(to_prefill) == hf_greedy(reference, prompt(20), 1)
            last = prefill.events[-1]
            assert isinstance(last, TokensGenerated)
            assert last.finish_reason is FinishReason.LENGTH
            await decode.abort("r20")

    asyncio.run(scenario())


def test_kv_leaves_before_prefill_has_ended(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = StepGate(monkeypatch, lambda plan: plan.slices[0].start == 64)

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET), worker_spec(model_path, DECODE)
        ) as (prefill, decode):
            to_prefill, to_decode = handed_off(greedy_submit(80), decode)
            await prefill.send(to_prefill)
            await gate.reached()

            async def has_two_chunks() -> bool:
                assert decode.worker is not None
                host = decode.worker.text.kv_host
                assert host is not None
                machines = [session.machine for session in host.receiving._sessions.values()]
                return [
                    machine.num_bytes_written for machine in machines if isinstance(machine, ReceiverMachine)
                ] == [64 * BLOCK_BYTES // 16]

            await eventually(has_two_chunks, "the KV of two prompt chunks")
            assert not [event for event in prefill.events if isinstance(event, TokensGenerated)]
            gate.open()
            await decode.generate(to_decode)

    asyncio.run(scenario())
