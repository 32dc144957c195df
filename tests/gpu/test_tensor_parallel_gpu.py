"""Workers on several GPUs of one host: NCCL between them, decode steps as CUDA graphs with its collectives inside."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.hf_reference import hf_greedy, hf_llama
from tests.support.tiny_model import write_tiny_gguf
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    RunningWorker,
    greedy_submit,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers.api import Device, FailureCode, KvDtype, PhaseSet, WeightDtype, WorkerSpec, WorkerState
from workers.model.prepare import load_weights, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs in one host"),
]

PROMPT_LENGTHS = (1, 16, 17, 50, 131)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models are not converted into the user's cache; products are exact."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three layers and two KV heads."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", num_layers=3)


@pytest.fixture(scope="module")
def expected(model_path: Path, own_cache: None) -> dict[int, list[int]]:
    """What transformers generates, by length of the prompt."""
    prepared = prepare(str(model_path), lambda *_progress: None)
    reference = hf_llama(prepared.config, load_weights(prepared))
    return {length: hf_greedy(reference, prompt(length), 12) for length in PROMPT_LENGTHS}


def cuda_spec(model: Path, phases: PhaseSet = PREFILL | DECODE, degree: int = 2) -> WorkerSpec:
    """In float32, with 2 MiB of KV."""
    spec = worker_spec(
        model, phases, token_budget=SMALL_BUDGET, max_running_sequences=8, tensor_parallel=degree
    )
    return replace(spec, device=Device.CUDA)


@contextmanager
def no_rank_left() -> Iterator[None]:
    yield
    assert not psutil.Process().children()


def test_greedy_tokens_are_those_of_transformers(model_path: Path, expected: dict[int, list[int]]) -> None:
    async def scenario() -> None:
        async with running_worker(cuda_spec(model_path)) as worker:
            for _ in range(2):
                found = await asyncio.gather(
                    *(worker.generate(greedy_submit(length)) for length in PROMPT_LENGTHS)
                )
                assert dict(zip(PROMPT_LENGTHS, found, strict=True)) == expected
                # The second time with cached prefixes.
                worker.events.clear()

    with no_rank_left():
        asyncio.run(scenario())


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four NVIDIA GPUs in one host")
def test_kv_heads_may_be_fewer_than_gpus(model_path: Path, expected: dict[int, list[int]]) -> None:
    async def scenario() -> None:
        async with running_worker(cuda_spec(model_path, degree=4)) as worker:
            found = await asyncio.gather(
                *(worker.generate(greedy_submit(length)) for length in PROMPT_LENGTHS)
            )
            assert dict(zip(PROMPT_LENGTHS, found, strict=True)) == expected

    asyncio.run(scenario())


async def handed_over(prefill: RunningWorker, decode: RunningWorker, length: int) -> list[int]:
    request = greedy_submit(length)
    there, here = handed_off(request, decode, f"t{length}")
    await decode.send(here)
    await prefill.send(there)
    first = await prefill.wait_for_tokens(request.key.request_id, 1)
    return first + await decode.wait_for_tokens(request.key.request_id, 11)


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_kv_goes_between_workers_of_different_degrees(
    model_path: Path, expected: dict[int, list[int]], degrees: tuple[int, int]
) -> None:
    async def scenario() -> None:
        specs = (cuda_spec(model_path, *one) for one in zip((PREFILL, DECODE), degrees, strict=True))
        async with running_pair(*specs) as (prefill, decode):
            for length in (17, 131):
                assert await handed_over(prefill, decode, length) == expected[length]

    with no_rank_left():
        asyncio.run(scenario())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs GPUs of compute capability 8.9",
)
def test_ranks_serve_with_weights_and_kv_in_fp8(model_path: Path) -> None:
    async def scenario() -> None:
        spec = cuda_spec(model_path)
        engine = replace(spec.engine, weight_dtype=WeightDtype.FP8, kv_dtype=KvDtype.FP8)
        async with running_worker(replace(spec, engine=engine)) as worker:
            found = await asyncio.gather(
                *(worker.generate(greedy_submit(length)) for length in PROMPT_LENGTHS)
            )
            assert all(found)

    with no_rank_left():
        asyncio.run(scenario())


def test_worker_fails_with_the_reason_when_a_rank_is_killed(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(cuda_spec(model_path), is_ready=False) as worker:
            await worker.wait_for_state(WorkerState.READY)
            await worker.send(submit(prompt(20), max_new_tokens=450))
            await worker.wait_for_tokens("r1", 2)
            (rank,) = psutil.Process().children()
            rank.kill()
            code, _ = await worker.failure_of("r1")
            assert code is FailureCode.INTERNAL
            await worker.wait_for_status(lambda status: status.state is WorkerState.FAILED, "failure")
            assert "rank 1 of 2 was ended by SIGKILL" in (await worker.status()).message

    with no_rank_left():
        asyncio.run(scenario())
