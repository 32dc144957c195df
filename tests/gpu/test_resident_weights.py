"""Workers that have the weights of one GPU in common, by the process that keeps them.

    python -m pytest tests/gpu/test_resident_weights.py -q

Each test has a model of its own, so that no other keeper has its weights.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.hf_reference import hf_greedy, hf_llama
from tests.support.mps_members import is_running
from tests.support.tiny_model import write_tiny_gguf
from tests.support.waiting import until_in_thread
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    WorkerClient,
    greedy_submit,
    handed_off,
    prompt,
    running_worker,
    worker_spec,
)
from tests.support.worker_process import WorkerProcess, worker_processes
from workers.api import Device, PhaseSet, RequestId, RequestKey, WeightDtype, WorkerSpec
from workers.device import resident_weights
from workers.device.capability import capability_of
from workers.device.device_facts import device_facts
from workers.model.prepare import load_weights, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MPS_REFUSAL = capability_of(device_facts()).mps
needs_mps = pytest.mark.skipif(MPS_REFUSAL is not None, reason=f"MPS: {MPS_REFUSAL}")
BOTH = PREFILL | DECODE
LENGTH = 17
MORE = ("--device", "cuda", "--weight-dtype", "float32", "--gpu-memory-fraction", "0.4")
RESIDENT = (*MORE, "--resident-weights")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are not converted into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """126 MB of weights in float32, of random numbers of this test's own."""
    seed = sum(request.node.name.encode())
    path = tmp_path / "model.gguf"
    return write_tiny_gguf(path, num_layers=8, hidden=512, heads=8, kv_heads=4, intermediate=2048, seed=seed)


def keepers() -> set[int]:
    """Processes of all keepers of weights that there are."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "workers.device.keeper" in (line := " ".join(process.info["cmdline"] or []))
        and "phasewise-weights-" in line
        and is_running(process.pid)
    }


@contextmanager
def all_given_back() -> Iterator[None]:
    """Afterwards the keepers that came within this end, and the memory is free."""
    before, free_bytes = keepers(), torch.cuda.mem_get_info()[0]
    yield
    until_in_thread(lambda: keepers() <= before, "the end of the keepers")
    until_in_thread(
        lambda: free_bytes - torch.cuda.mem_get_info()[0] < 16 << 20, "the memory that nobody has any more"
    )


def only_new(before: set[int]) -> int:
    """The keeper that came since."""
    (pid,) = keepers() - before
    return pid


def expected_tokens(model: Path) -> list[int]:
    """What transformers generates."""
    prepared = prepare(str(model), lambda *_progress: None)
    return hf_greedy(hf_llama(prepared.config, load_weights(prepared)), prompt(LENGTH), 12)


def generated(worker: WorkerProcess, name: str) -> tuple[list[int], int | None]:
    """Its tokens, and the bytes of weights that it has in common."""

    async def scenario() -> tuple[list[int], int | None]:
        client = WorkerClient(worker.address)
        request = replace(greedy_submit(LENGTH), key=RequestKey(RequestId(name), 1))
        tokens, gpu = await client.generate(request), (await client.status()).gpu
        await client.close()
        assert gpu is not None
        return tokens, gpu.resident_bytes

    return asyncio.run(scenario())


def test_two_workers_have_them_once_and_a_replacement_finds_them(model: Path) -> None:
    expected = expected_tokens(model)
    torch.zeros(1, device="cuda")
    before = keepers()
    with all_given_back():
        free = [torch.cuda.mem_get_info()[0]]
        with worker_processes(("a", BOTH), model=model, arguments=[RESIDENT]) as (first,):
            free.append(torch.cuda.mem_get_info()[0])
            keeper = only_new(before)
            for number in range(2):
                # Killed at the end of each block.
                with worker_processes(("b", BOTH), model=model, arguments=[RESIDENT]) as (second,):
                    free.append(torch.cuda.mem_get_info()[0])
                    assert only_new(before) == keeper
                    tokens, num_bytes = generated(second, f"b{number}")
                    assert tokens == expected
                    assert num_bytes is not None
                    # The first one came with the weights, and with their keeper's context.
                    assert (free[0] - free[1]) - (free[1] - free[2]) >= num_bytes > 100e6
                assert generated(first, f"a{number}") == (expected, num_bytes)
        # Within its grace.
        with worker_processes(("c", BOTH), model=model, arguments=[RESIDENT]) as (third,):
            assert only_new(before) == keeper
            assert generated(third, "c")[0] == expected


def test_after_the_keeper_was_killed_workers_go_on_and_the_next_one_has_another(model: Path) -> None:
    expected = expected_tokens(model)
    before = keepers()
    with all_given_back(), worker_processes(("a", BOTH), model=model, arguments=[RESIDENT]) as (first,):
        keeper = only_new(before)
        os.kill(keeper, signal.SIGKILL)
        until_in_thread(lambda: not is_running(keeper), "the end of the keeper")
        assert generated(first, "a")[0] == expected
        with worker_processes(("b", BOTH), model=model, arguments=[RESIDENT]) as (second,):
            assert only_new(before) != keeper
            assert generated(second, "b")[0] == expected
        assert generated(first, "again")[0] == expected


@needs_mps
def test_workers_with_shares_of_the_sms_have_them_in_common_and_hand_off(model: Path) -> None:
    expected = expected_tokens(model)
    before = keepers()

    def started(name: str, phases: PhaseSet, share: str) -> tuple[tuple[str, PhaseSet], tuple[str, ...]]:
        return (name, phases), (*RESIDENT, "--sm-percentage", share)

    pair = (started("p-0", PREFILL, "60"), started("d-0", DECODE, "50"))

    async def scenario(workers: list[WorkerProcess]) -> None:
        prefill, decode = (WorkerClient(worker.address) for worker in workers)
        to_prefill, to_decode = handed_off(greedy_submit(LENGTH), decode, "t")
        await prefill.send(to_prefill)
        assert await decode.generate(to_decode) == expected[1:]
        for client in (prefill, decode):
            await client.close()

    # Both start at once.
    with (
        all_given_back(),
        worker_processes(
            *(one for one, _ in pair), model=model, arguments=[more for _, more in pair]
        ) as both,
    ):
        only_new(before)
        asyncio.run(scenario(both))


@pytest.mark.parametrize(
    "dtype",
    [
        WeightDtype.BFLOAT16,
        pytest.param(
            WeightDtype.FP8,
            marks=pytest.mark.skipif(
                torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
                reason="needs a GPU of compute capability 8.9",
            ),
        ),
    ],
)
def test_a_worker_generates_the_same_with_them_as_with_its_own_and_unmaps_them_at_its_end(
    model: Path, dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the test's own process, which lives on."""
    monkeypatch.setattr(resident_weights, "GRACE_S", 0.0)

    async def tokens(spec: WorkerSpec) -> list[int]:
        async with running_worker(spec) as worker:
            return await worker.generate(greedy_submit(LENGTH))

    spec = replace(worker_spec(model), device=Device.CUDA)
    own = replace(spec, engine=replace(spec.engine, weight_dtype=dtype))
    resident = replace(own, engine=replace(own.engine, are_weights_resident=True))
    expected = asyncio.run(tokens(own))
    before = keepers()
    for _ in range(2):
        assert asyncio.run(tokens(resident)) == expected
        until_in_thread(lambda: keepers() <= before, "the end of the keeper")
