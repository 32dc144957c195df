"""Peers of a worker that are gone, silent, or of another kind."""

import asyncio
import contextlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from protos import worker_pb2 as pb
from tests.support.tiny_model import write_tiny_gguf
from tests.support.worker_client import (
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    StepGate,
    WorkerClient,
    at_start,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers import kv_channels
from workers import worker as worker_module
from workers.api import (
    FailureCode,
    Handoff,
    WorkerState,
)

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


async def failed_hand_off(model_path: Path, address: str, incarnation: int = 1) -> str:
    """Why prefill's transfer to this address fails."""
    async with running_worker(worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET)) as prefill:
        for i in range(2):
            handoff = Handoff(f"t{i}", address, incarnation)
            request = submit(prompt(100), request_id=f"r{i}", phases=PREFILL, handoff=handoff)
            await prefill.send(request)
            code, reason = await prefill.failure_of(f"r{i}")
            assert code is FailureCode.TRANSFER
            await prefill.assert_nothing_leaks()
    return reason


def test_dead_peer_fails_the_transfer_with_the_reason(model_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert "UNAVAILABLE" in asyncio.run(failed_hand_off(model_path, address))


class MutableWay:
    """Passes bytes on between a client and `target`, until `mute`: then none, and nothing is closed."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._is_muted = False
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""

    def mute(self) -> None:
        """As if one side's power had failed."""
        self._is_muted = True

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_target, to_target = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [to_client, to_target]
        for reader, writer in ((from_client, to_target), (from_target, to_client)):
            self._tasks.append(asyncio.create_task(self._pass_on(reader, writer)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while received := await reader.read(2**16):
                if not self._is_muted:
                    writer.write(received)
                    await writer.drain()
            if not self._is_muted:
                writer.close()


@pytest.fixture
def quick_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of silence instead of ten, which is the least that gRPC does."""
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}
    quick["grpc.http2.min_ping_interval_without_data_ms"] = 100
    for module, name in ((worker_module, "GRPC_OPTIONS"), (kv_channels, "CHANNEL_OPTIONS")):
        options = [(key, quick.get(key, value)) for key, value in getattr(module, name)]
        assert quick.keys() <= {key for key, _ in options}
        monkeypatch.setattr(module, name, tuple(options))


#: Neither the leases nor the deadlines of a test's requests end within it.
LONG_S = 3600.0


@pytest.mark.usefixtures("quick_keepalive")
def test_requests_of_a_gateway_that_vanished_without_a_word_are_aborted(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker, MutableWay(worker.address) as way:
            gateway = WorkerClient(way.address)
            # Its KV never comes.
            await gateway.send(submit(prompt(20), phases=DECODE, timeout_s=LONG_S, handoff=Handoff("t")))
            await worker.wait_for_status(lambda status: status.num_waiting == 1, "the request")
            way.mute()
            await worker.assert_nothing_leaks()
            await gateway.drop_session()
            await gateway.close()

    asyncio.run(scenario())


@pytest.mark.usefixtures("quick_keepalive")
def test_peer_that_vanishes_without_a_word_fails_the_transfer(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StepGate(monkeypatch, at_start(64))

    async def scenario() -> None:
        async with (
            running_pair(
                worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET, lease_s=LONG_S),
                worker_spec(model_path, DECODE, lease_s=LONG_S),
            ) as (prefill, decode),
            MutableWay(decode.address) as way,
        ):
            request = submit(prompt(100), phases=PREFILL, timeout_s=LONG_S)
            await prefill.send(replace(request, handoff=Handoff("t", way.address, 1)))
            await gate.reached()
            await decode.wait_for_status(lambda status: status.blocks.leased > 0, "a lease at decode")
            way.mute()
            gate.open()
            code, reason = await prefill.failure_of()
            assert (code, "UNAVAILABLE" in reason) == (FailureCode.TRANSFER, True), reason

    asyncio.run(scenario())


def test_peer_with_another_model_or_incarnation_refuses_with_the_reason(
    model_path: Path, tmp_path: Path
) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", num_layers=4)

    async def scenario() -> None:
        async with running_worker(worker_spec(other, DECODE)) as decode:
            reason = await failed_hand_off(model_path, decode.address)
            assert "model_digest is" in reason
            assert "num_layers is 3 at the sender and 4 at the receiver" in reason
        async with running_worker(worker_spec(model_path, DECODE)) as decode:
            reason = await failed_hand_off(model_path, decode.address, incarnation=7)
            assert "this is incarnation 1, not 7" in reason
        async with running_worker(worker_spec(model_path, PREFILL)) as prefill:
            assert "not decode" in await failed_hand_off(model_path, prefill.address)

    asyncio.run(scenario())


def test_peer_that_failed_to_load_refuses_with_the_reason(model_path: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(tmp_path / "no.gguf", DECODE), is_ready=False) as decode:
            await decode.wait_for_state(WorkerState.FAILED)
            assert "there is no such file" in await failed_hand_off(model_path, decode.address)

    asyncio.run(scenario())


def test_decode_worker_that_stops_in_mid_transfer_fails_the_request(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StepGate(monkeypatch, at_start(64))

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET)) as prefill:
            async with running_worker(worker_spec(model_path, DECODE), is_ready=False) as decode:
                await decode.wait_for_state(WorkerState.READY)
                to_prefill, to_decode = handed_off(submit(prompt(100)), decode)
                await decode.send(to_decode)
                await prefill.send(to_prefill)
                await gate.reached()
                await decode.wait_for_status(lambda status: status.blocks.leased > 0, "a lease at decode")
                await decode.stub.Shutdown(pb.ShutdownRequest())
                assert await decode.failure_of() == (FailureCode.INTERNAL, "the worker is stopping")
            gate.open()
            code, reason = await prefill.failure_of()
            assert code is FailureCode.TRANSFER
            assert "the worker is stopping" in reason

    asyncio.run(scenario())
