"""What a worker says of itself, from loading to failing."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import grpc
import grpc.aio
import pytest

from protos import worker_pb2 as pb
from tests.support.worker_client import (
    BLOCK_BYTES,
    BOTH,
    DECODE,
    PREFILL,
    prompt,
    running_worker,
    submit,
    worker_spec,
)
from workers import text_side
from workers.api import FailureCode, Handoff, WorkerState
from workers.device import cpu_placing
from workers.engine.runner import ModelRunner
from workers.engine.step_loop import MAX_BROKEN_STEPS
from workers.errors import AddressUnavailable
from workers.status_wire import model_from_pb

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


def test_status_and_model_say_what_is_loaded(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, incarnation=9)) as worker:
            status = await worker.status()
            assert (status.worker_id, status.incarnation, status.phases) == ("decode-prefill-0", 9, BOTH)
            assert (status.pid, status.blocks.total) == (os.getpid(), 2 * 2**20 // BLOCK_BYTES)
            assert status.memory_bytes > 2**20
            model = model_from_pb(await worker.stub.GetModel(pb.GetModelRequest()))
            assert (model.vocab_size, model.max_context_tokens) == (384, 512)
            assert model.max_sequence_tokens == status.blocks.total * 16
            assert len(model.model_digest) == 64
            await worker.generate(submit(prompt(20), max_new_tokens=5))
            assert (await worker.status()).num_steps == 5

    asyncio.run(scenario())


def test_loading_is_reported_and_refuses_requests(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stop = asyncio.Event()

        def load_until_stopped(_spec: object, progress: Callable[[str, float], None]) -> None:
            while True:
                progress("converting the weights (1 MiB, once per machine)", 0.42)

        monkeypatch.setattr("workers.worker.load", load_until_stopped)
        async with running_worker(worker_spec(model_path), is_ready=False, stop=stop) as worker:
            message = "converting the weights (1 MiB, once per machine) 42%"
            await worker.wait_for_status(lambda status: status.message == message, "progress")
            assert (await worker.status()).state is WorkerState.LOADING
            await worker.send(submit([3, 4, 5]))
            code, reason = await worker.failure_of()
            assert (code, "loading" in reason) == (FailureCode.INTERNAL, True)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await worker.stub.GetModel(pb.GetModelRequest())
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert message in str(caught.value.details())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("model", "kv_cache_bytes", "expected"),
    [
        ("/nowhere/no.gguf", 2**20, "there is no such file"),
        (None, 100, "engine.kvCacheMiB to at least 1"),
        (None, 2**60, "lower engine.kvCacheMiB"),
    ],
    ids=["no model", "no room for a block", "more than the machine has"],
)
def test_worker_that_cannot_load_says_why_until_it_is_stopped(
    model_path: Path, model: str | None, kv_cache_bytes: int, expected: str
) -> None:
    async def scenario() -> None:
        spec = worker_spec(model or model_path, kv_cache_bytes=kv_cache_bytes)
        async with running_worker(spec, is_ready=False) as worker:
            status = await worker.wait_for_state(WorkerState.FAILED)
            assert expected in status.message
            await worker.send(submit([3, 4, 5]))
            code, reason = await worker.failure_of()
            assert code is FailureCode.INTERNAL
            assert expected in reason
            await worker.stub.Shutdown(pb.ShutdownRequest())

    asyncio.run(scenario())


@pytest.mark.parametrize(("module", "function"), [(cpu_placing, "load_weights"), (text_side, "Engine")])
def test_bug_while_loading_makes_the_worker_fail(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str
) -> None:
    def broken(*_arguments: object, **_settings: object) -> None:
        raise KeyError("layers.7")

    monkeypatch.setattr(module, function, broken)

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path), is_ready=False) as worker:
            assert "layers.7" in (await worker.wait_for_state(WorkerState.FAILED)).message

    asyncio.run(scenario())


@pytest.mark.parametrize("breaks", ["steps", "engine"])
def test_broken_engine_fails_all_that_is_in_flight(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    async def scenario() -> None:
        async with (
            running_worker(worker_spec(model_path, PREFILL)) as prefill,
            running_worker(worker_spec(model_path, BOTH), is_ready=False) as worker,
        ):
            await worker.wait_for_state(WorkerState.READY)
            # One that waits for its KV, and whose transfer has a lease.
            await worker.send(submit(prompt(20), request_id="awaits", phases=DECODE, handoff=Handoff("t")))
            engine = worker.worker.text.step_loop.engine  # type: ignore[union-attr]

            def broken(*_arguments: object) -> None:
                raise RuntimeError("cosmic ray")

            if breaks == "engine":
                monkeypatch.setattr(engine, "schedule", broken)
                await worker.send(submit(prompt(20), request_id="r0"))
            else:
                monkeypatch.setattr(ModelRunner, "run", broken)
                for i in range(MAX_BROKEN_STEPS):
                    await worker.send(submit(prompt(20), request_id=f"r{i}"))
                    code, reason = await worker.failure_of(f"r{i}")
                    assert code is FailureCode.INTERNAL
                    assert "cosmic ray" in reason
            for request_id in ("awaits", "r0"):
                assert (await worker.failure_of(request_id))[0] is FailureCode.INTERNAL
            status = await worker.wait_for_state(WorkerState.FAILED)
            assert status.message
            await worker.send(submit(prompt(20), request_id="late"))
            assert "failed" in (await worker.failure_of("late"))[1]
            await prefill.status()

    asyncio.run(scenario())


def test_port_in_use_is_said_by_its_address(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            port = int(worker.address.rpartition(":")[2])
            with pytest.raises(AddressUnavailable, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
                async with running_worker(replace(worker_spec(model_path), port=port)):
                    pass

    asyncio.run(scenario())
