"""A worker on several ranks: one worker to all others, until one of its processes ends."""

import asyncio
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_model import EOS_TOKEN_ID
from tests.support.worker_client import (
    BOTH,
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    greedy_submit,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from tests.support.worker_process import start_process, worker_processes
from workers import loading
from workers.api import FailureCode, WorkerState

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")

PATIENCE_S = 30.0
LENGTHS = (20, 70, 33)


def ranks() -> list[psutil.Process]:
    """Processes of this one that are ranks; other tests may keep processes of their own."""
    return [
        one for one in psutil.Process().children() if "workers.tensor_parallel" in " ".join(one.cmdline())
    ]


async def tokens_of(model_path: Path, degree: int) -> list[list[int]]:
    async with running_worker(worker_spec(model_path, tensor_parallel=degree)) as worker:
        return await asyncio.gather(*(worker.generate(greedy_submit(length)) for length in LENGTHS))


def test_tokens_are_those_of_one_rank(model_path: Path) -> None:
    assert asyncio.run(tokens_of(model_path, 2)) == asyncio.run(tokens_of(model_path, 1))


@pytest.mark.parametrize("degrees", [(1, 2), (2, 1)])
def test_kv_goes_between_workers_of_different_degrees(model_path: Path, degrees: tuple[int, int]) -> None:
    async def scenario() -> list[list[int]]:
        prefill, decode = (
            worker_spec(model_path, phases, tensor_parallel=degree, token_budget=SMALL_BUDGET + 64)
            for phases, degree in zip((PREFILL, DECODE), degrees, strict=True)
        )
        async with running_pair(prefill, decode) as (prefill_worker, decode_worker):
            found = []
            for length in LENGTHS:
                request = submit(
                    prompt(length),
                    request_id=f"r{length}",
                    max_new_tokens=12,
                    stop_token_ids={EOS_TOKEN_ID},
                )
                there, here = handed_off(request, decode_worker, f"t{length}")
                await decode_worker.send(here)
                await prefill_worker.send(there)
                await prefill_worker.wait_for_tokens(request.key.request_id, 1)
                rest = await decode_worker.wait_for_tokens(request.key.request_id, 11)
                found.append(prefill_worker.tokens_of(request.key.request_id) + rest)
            counts = (await decode_worker.status()).transfers
            assert counts.num_digest_mismatches == 0
            return found

    assert asyncio.run(scenario()) == asyncio.run(tokens_of(model_path, 1))


def test_worker_fails_with_the_reason_when_a_rank_is_killed(model_path: Path) -> None:
    async def scenario() -> None:
        spec = worker_spec(model_path, BOTH, tensor_parallel=2)
        async with running_worker(spec, is_ready=False) as worker:
            await worker.wait_for_state(WorkerState.READY)
            await worker.send(submit(prompt(20), max_new_tokens=400))
            await worker.wait_for_tokens("r1", 2)
            (rank,) = ranks()
            rank.kill()
            code, _ = await worker.failure_of("r1")
            assert code is FailureCode.INTERNAL
            await worker.wait_for_status(lambda status: status.state is WorkerState.FAILED, "failure")
            status = await worker.status()
            assert "rank 1 of 2 was ended by SIGKILL" in status.message
            await worker.send(submit(prompt(20), request_id="late"))
            assert "rank 1 of 2" in (await worker.failure_of("late"))[1]
        assert not ranks()

    asyncio.run(scenario())


def test_no_rank_stays_when_the_worker_cannot_load(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("cosmic ray")

    async def scenario() -> None:
        monkeypatch.setattr(loading, "GrammarCompiler", broken)
        async with running_worker(worker_spec(model_path, tensor_parallel=2), is_ready=False) as worker:
            status = await worker.wait_for_state(WorkerState.FAILED)
            assert "cosmic ray" in status.message
            assert not ranks()

    asyncio.run(scenario())


def test_loading_can_be_stopped(model_path: Path) -> None:
    async def scenario() -> None:
        stop = asyncio.Event()
        spec = worker_spec(model_path, tensor_parallel=2)
        async with running_worker(spec, is_ready=False, stop=stop) as worker:
            await worker.wait_for_status(lambda status: "rank 1" in status.message, "a rank to load")
            stop.set()
        assert not ranks()

    asyncio.run(scenario())


def test_ranks_end_with_a_worker_that_is_killed(model_path: Path) -> None:
    more = [("--tensor-parallel", "2")]
    with worker_processes(("w", BOTH), model=model_path, arguments=more) as (worker,):
        ranks = psutil.Process(worker.process.pid).children()
        assert len(ranks) == 1
        worker.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_S)
        assert not alive


def test_what_several_ranks_do_not_do_is_said(model_path: Path) -> None:
    process = start_process(
        *("--worker-id", "w", "--phases", "prefill,decode", "--model", str(model_path)),
        *("--tensor-parallel", "2", "--transport", "shm"),
    )
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "argument --tensor-parallel: is 2; with --transport shm it is 1" in said
