"""Workers whose steps overlap, as on a GPU, over real gRPC: hand-offs, cached prompts, requests that need the host."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.hf_reference import hf_greedy
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    greedy_submit,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    worker_spec,
)
from workers import loading
from workers.api import WorkerSpec
from workers.device.forward import DeviceForward
from workers.device.placed import PlacedText
from workers.device.sampler import DeviceSampler
from workers.model.prepare import PreparedModel

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes", "as_on_a_gpu")

PROMPT_LENGTHS = (1, 16, 17, 50, 131)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models stay on the CPU, and their steps are padded, sampled where the logits are, and overlap."""
    place_on_cpu = loading.place_on_cpu

    def place(
        spec: WorkerSpec, prepared: PreparedModel, progress: Callable[[str, float], None]
    ) -> PlacedText:
        placed = place_on_cpu(spec, prepared, progress)
        forward = DeviceForward(placed.model, placed.kv_cache, max_context_tokens=512, buckets=(1, 2, 4, 8))
        forward.capture(progress)
        return replace(placed, forward=forward, sampler=DeviceSampler(torch.device("cpu")))

    monkeypatch.setattr(loading, "place_on_cpu", place)


def test_one_worker_generates_what_transformers_does(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, token_budget=SMALL_BUDGET)) as worker:
            for _ in range(2):
                # The second time their beginnings are cached.
                found = await asyncio.gather(
                    *(worker.generate(greedy_submit(length)) for length in PROMPT_LENGTHS)
                )
                assert found == [hf_greedy(reference, prompt(length), 12) for length in PROMPT_LENGTHS]

    asyncio.run(scenario())


def test_requests_that_need_the_host_go_beside_others(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            asked = [greedy_submit(length) for length in PROMPT_LENGTHS]
            asked[2] = replace(asked[2], sampling=replace(asked[2].sampling, num_logprobs=2))
            found = await asyncio.gather(*(worker.generate(one) for one in asked))
            assert found == [hf_greedy(reference, prompt(length), 12) for length in PROMPT_LENGTHS]

    asyncio.run(scenario())


def test_prefill_and_decode_workers_generate_what_transformers_does(
    model_path: Path, reference: LlamaForCausalLM
) -> None:
    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET), worker_spec(model_path, DECODE)
        ) as (prefill, decode):
            pairs = [handed_off(greedy_submit(length), decode, f"t{length}") for length in PROMPT_LENGTHS]
            await prefill.send(*(to_prefill for to_prefill, _ in pairs))
            found = await asyncio.gather(*(decode.generate(to_decode) for _, to_decode in pairs))
            assert found == [hf_greedy(reference, prompt(length), 12)[1:] for length in PROMPT_LENGTHS]

    asyncio.run(scenario())
