"""Workers with a real, tiny model over real gRPC, alone and in pairs: tokens, refusals, aborts, leaks."""

import asyncio
import contextlib
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Self

import grpc
import grpc.aio
import pytest
import torch
from transformers import LlamaForCausalLM

from kvtransfer.layout import blocks_needed
from protos import worker_pb2 as pb
from tests.support.hf_reference import hf_greedy, hf_llama
from tests.support.tiny_model import EOS_TOKEN_ID, write_tiny_gguf
from tests.support.worker_client import (
    BOTH,
    DECODE,
    PREFILL,
    RunningWorker,
    StepGate,
    WorkerClient,
    eventually,
    handed_off,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers import kv_sending, loading, sessions
from workers import worker as worker_module
from workers.api import (
    FailureCode,
    FinishReason,
    Handoff,
    KvTransferred,
    PrefillStarted,
    RequestFailed,
    SamplingParams,
    Submit,
    TokensGenerated,
    WorkerState,
)
from workers.engine.runner import ModelRunner
from workers.engine.scheduler import StepPlan
from workers.engine.step_loop import MAX_BROKEN_STEPS
from workers.errors import AddressUnavailable
from workers.model.prepare import load_weights, prepare
from workers.wire import command_to_pb, model_from_pb
from workers.worker import Worker

ROOT = Path(__file__).parents[2]
#: One token, a block, a block and one, several blocks, several chunks of the small budget.
PROMPT_LENGTHS = (1, 16, 17, 50, 131)
SMALL_BUDGET = 32
#: Three layers, K and V, 16 tokens, 2 KV heads of 16 dimensions, fp32.
BLOCK_BYTES = 3 * 2 * 16 * 2 * 16 * 4


@pytest.fixture(scope="module", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models are converted once for this file, and not into the user's cache."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def nothing_escapes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a callback or a gRPC handler lets escape is only logged, and must fail the test all the same."""
    yield
    records = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    escaped = [record.getMessage() for record in records if record.name.startswith(("asyncio", "grpc"))]
    # gRPC's own word for a client that went away just as its call's status was to be sent.
    assert not [message for message in escaped if not message.startswith("ExecuteBatchError raised in core")]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", num_layers=3)


@pytest.fixture(scope="module")
def reference(model_path: Path, cache_home: Path) -> LlamaForCausalLM:
    prepared = prepare(str(model_path), lambda *_progress: None)
    return hf_llama(prepared.config, load_weights(prepared))


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 384, (num_tokens,), generator=generator).tolist()
    return token_ids


def greedy_submit(length: int, max_new_tokens: int = 12) -> Submit:
    return submit(
        prompt(length),
        request_id=f"r{length}",
        max_new_tokens=max_new_tokens,
        stop_token_ids={EOS_TOKEN_ID},
    )


# The tokens are right.


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
                assert sent.num_bytes == BLOCK_BYTES * blocks_needed(length, 16)
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
            received: list[int] = []
            write = decode.worker._kv_host.write  # type: ignore[union-attr]

            def counted(block_ids: object, lo: int, hi: int, payload: memoryview) -> None:
                received.append(len(payload))
                write(block_ids, lo, hi, payload)  # type: ignore[arg-type]

            decode.worker._kv_host.write = counted  # type: ignore[method-assign, union-attr]
            await prefill.send(to_prefill)
            await gate.reached()

            async def has_two_chunks_of_each_layer() -> bool:
                return len(received) >= 6

            await eventually(has_two_chunks_of_each_layer, "the KV of two prompt chunks")
            assert not [event for event in prefill.events if isinstance(event, TokensGenerated)]
            gate.open()
            await decode.generate(to_decode)

    asyncio.run(scenario())


# Aborts. Each leaves all blocks free and no lease on either worker; the helpers check that.


def at_start(start: int) -> Callable[[StepPlan], bool]:
    return lambda plan: plan.slices[0].start == start


@pytest.mark.parametrize("ends_by", ["abort", "session"])
@pytest.mark.parametrize("start", [0, 32, 100 + 2], ids=["first step", "mid prefill", "mid decode"])
def test_end_on_one_worker_frees_all(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, ends_by: str
) -> None:
    gate = StepGate(monkeypatch, at_start(start))

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, token_budget=SMALL_BUDGET)) as worker:
            await worker.send(submit(prompt(100), max_new_tokens=50))
            await gate.reached()
            await end(worker, ends_by)
            gate.open()
            await worker.assert_nothing_leaks()
            assert len(worker.tokens_of("r1")) <= 3

    asyncio.run(scenario())


@pytest.mark.parametrize("ends_by", ["abort", "session"])
def test_end_while_queued_frees_all(model_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str) -> None:
    gate = StepGate(monkeypatch, at_start(0))

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, max_running_sequences=1)) as worker:
            await worker.send(submit(prompt(20), request_id="first"))
            await gate.reached()
            await worker.send(submit(prompt(20), request_id="r1"))
            await end(worker, ends_by)
            gate.open()
            await worker.assert_nothing_leaks()
            assert not worker.events_of("r1")
            if ends_by == "abort":
                assert len(worker.tokens_of("first")) == 8

    asyncio.run(scenario())


async def end(worker: WorkerClient, ends_by: str) -> None:
    """End r1, and return once the worker must have heard of it."""
    if ends_by == "abort":
        await worker.abort()
        # Commands are taken in order: the answer to this one says that the abort was taken.
        await worker.send(submit([], request_id="probe"))
        await worker.failure_of("probe")
    else:
        await worker.drop_session()


@pytest.mark.parametrize("ends_at", ["prefill", "decode", "both"])
@pytest.mark.parametrize("ends_by", ["abort", "session"])
def test_end_in_mid_transfer_frees_all_on_both(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, ends_at: str, ends_by: str
) -> None:
    gate = StepGate(monkeypatch, at_start(64))

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET), worker_spec(model_path, DECODE)
        ) as (prefill, decode):
            to_prefill, to_decode = handed_off(submit(prompt(100)), decode)
            await decode.send(to_decode)
            await prefill.send(to_prefill)
            await gate.reached()
            await decode.wait_for_status(lambda status: status.blocks.leased > 0, "a lease at decode")
            if ends_at != "decode":
                await end(prefill, ends_by)
            if ends_at != "prefill":
                await end(decode, ends_by)
            gate.open()
            if ends_at == "decode":
                code, reason = await prefill.failure_of()
                assert code is FailureCode.TRANSFER
                assert "aborted" in reason
            if ends_at == "prefill":
                # The gateway would abort here too; without it the deadline does.
                await decode.abort()
            await prefill.assert_nothing_leaks()
            await decode.assert_nothing_leaks()

    asyncio.run(scenario())


def test_abort_while_the_transfer_waits_for_blocks_frees_all(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StepGate(monkeypatch, lambda plan: plan.slices[0].start == 24)

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL), worker_spec(model_path, BOTH, max_running_sequences=1)
        ) as (prefill, decode):
            # It fills decode's only place, and decode's steps stand still.
            await decode.send(submit(prompt(22), request_id="first"))
            await gate.reached()
            to_prefill, to_decode = handed_off(submit(prompt(40)), decode)
            await prefill.send(to_prefill)
            await prefill.wait_for_tokens("r1", 1)
            await decode.send(to_decode)
            await end(decode, "abort")
            gate.open()
            code, _reason = await prefill.failure_of()
            assert code is FailureCode.TRANSFER
            await prefill.assert_nothing_leaks()

    asyncio.run(scenario())


def test_many_requests_with_aborts_at_any_time_leave_nothing_behind(model_path: Path) -> None:
    """Decode has places for four at a time, so that transfers wait for blocks, too."""
    rng = random.Random(11)

    async def one(prefill: RunningWorker, decode: RunningWorker, i: int) -> None:
        request = submit(prompt(rng.randint(1, 120), seed=i), request_id=f"r{i}", max_new_tokens=10)
        to_prefill, to_decode = handed_off(request, decode, f"t{i}")
        orders = [(prefill, to_prefill), (decode, to_decode)]
        rng.shuffle(orders)
        for worker, order in orders:
            await worker.send(order)
        stage = rng.choice(["at once", "prefilled", "decoding", "never", "never"])
        if stage == "prefilled":
            await prefill.wait_for_tokens(f"r{i}", 1)
        elif stage == "decoding":
            await decode.wait_for_tokens(f"r{i}", 3)
        elif stage == "never":
            await decode.wait_for_tokens(f"r{i}", 9)
            return
        for worker in rng.sample([prefill, decode], 2):
            await worker.abort(f"r{i}")

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET),
            worker_spec(model_path, DECODE, max_running_sequences=4),
        ) as (prefill, decode):
            await asyncio.gather(*(one(prefill, decode, i) for i in range(60)))
            failed = [event for event in prefill.events + decode.events if isinstance(event, RequestFailed)]
            # Only what was aborted on one side first may fail on the other.
            assert {event.code for event in failed} <= {FailureCode.TRANSFER}

    asyncio.run(scenario())


def test_deadline_ends_a_decode_whose_kv_never_comes(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, DECODE)) as decode:
            request = submit(prompt(20), phases=DECODE, handoff=Handoff("t1"), timeout_s=0.2)
            await decode.send(request)
            assert (await decode.failure_of())[0] is FailureCode.DEADLINE

    asyncio.run(scenario())


def test_new_session_does_not_hear_of_an_old_ones_requests(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            await worker.send(submit(prompt(20), max_new_tokens=400))
            await worker.wait_for_tokens("r1", 2)
            other = WorkerClient(worker.address)
            # Of another session's request neither an abort nor a double may do anything.
            await other.abort()
            await other.send(submit(prompt(20)))
            assert (await other.failure_of())[0] is FailureCode.INVALID
            await worker.wait_for_tokens("r1", 10)
            await worker.drop_session()
            await worker.assert_nothing_leaks()
            assert len(other.events) == 1
            await other.close()

    asyncio.run(scenario())


def test_session_that_reads_nothing_is_ended_and_its_requests_aborted(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_PENDING_EVENTS", 1000)

    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            silent = worker.stub.Session()
            running = submit(prompt(20), request_id="silent", max_new_tokens=480)
            refused = command_to_pb(submit([], request_id="x" * 250), 1)
            await silent.write(pb.CommandBatch(commands=[command_to_pb(running, 1)]))
            # More than the connection holds unread, then more than may wait.
            await silent.write(pb.CommandBatch(commands=[refused] * 900))
            await silent.write(pb.CommandBatch(commands=[refused] * 1001))
            await worker.wait_for_status(lambda status: status.num_running == 0, "the end of the request")
            await worker.assert_nothing_leaks()
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await silent.read() is not grpc.aio.EOF:
                    pass
            assert await silent.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(await worker.generate(submit(prompt(20)))) == 8

    asyncio.run(scenario())


def test_cancelled_worker_leaves_no_thread(model_path: Path) -> None:
    async def scenario() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        worker = Worker(worker_spec(model_path))
        serving = asyncio.create_task(worker.serve(on_bound=address.set_result, stop=asyncio.Event()))
        client = WorkerClient(await address)
        await client.wait_for_state(WorkerState.READY)
        await client.send(submit(prompt(20), max_new_tokens=400))
        await client.wait_for_tokens("r1", 1)
        serving.cancel()
        await asyncio.wait([serving])
        assert (await client.failure_of()) == (FailureCode.INTERNAL, "the worker is stopping")
        await client.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]

    asyncio.run(scenario())


# Bad commands.

NAN = float("nan")
GOOD = submit([3, 4, 5])
BAD_SUBMITS: dict[str, tuple[Submit, str]] = {
    "no request id": (submit([3], request_id=""), "request_id"),
    "no phases": (replace(GOOD, phases=frozenset()), "phases"),
    "no tokens": (submit([]), "token_ids"),
    "negative token": (submit([3, -1]), "token_ids: -1"),
    "token out of the vocabulary": (submit([384]), "token_ids: 384"),
    "nothing to generate": (submit([3], max_new_tokens=0), "sampling.max_tokens"),
    "temperature NaN": (replace(GOOD, sampling=SamplingParams(1, temperature=NAN)), "sampling.temperature"),
    "temperature below 0": (
        replace(GOOD, sampling=SamplingParams(1, temperature=-1)),
        "sampling.temperature",
    ),
    "top_p 0": (replace(GOOD, sampling=SamplingParams(1, top_p=0.0)), "sampling.top_p"),
    "top_p NaN": (replace(GOOD, sampling=SamplingParams(1, top_p=NAN)), "sampling.top_p"),
    "too many stop tokens": (submit([3], stop_token_ids=range(65)), "sampling.stop_token_ids"),
    "no time": (submit([3], timeout_s=0.0), "timeout_s"),
    "endless time": (submit([3], timeout_s=float("inf")), "timeout_s"),
    "time NaN": (submit([3], timeout_s=NAN), "timeout_s"),
    "prefill alone": (submit([3], phases=PREFILL), "handoff"),
    "decode alone": (submit([3], phases=DECODE), "handoff"),
    "hand-off to itself": (submit([3], handoff=Handoff("t", "h:1")), "handoff"),
    "no transfer id": (submit([3], phases=DECODE, handoff=Handoff("")), "handoff.transfer_id"),
    "no decode address": (submit([3], phases=PREFILL, handoff=Handoff("t")), "handoff.decode_address"),
    "over the context": (submit([3], max_new_tokens=600), "context"),
}


def test_bad_submits_fail_by_the_fields_name_and_harm_nobody(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path)) as worker:
            await worker.send(submit(prompt(20), request_id="good", max_new_tokens=40))
            for i, (bad, field) in enumerate(BAD_SUBMITS.values()):
                request_id = bad.key.request_id and f"bad{i}"
                await worker.send(replace(bad, key=replace(bad.key, request_id=request_id)))
                code, reason = await worker.failure_of(request_id)
                assert code is FailureCode.INVALID, reason
                assert field in reason
            assert len(await worker.wait_for_tokens("good", 40)) == 40

    asyncio.run(scenario())


def test_unknown_commands_are_ignored_and_strangers_refused(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, PREFILL, incarnation=4)) as worker:
            unknown_phase = command_to_pb(submit([3], request_id="new", phases=PREFILL), 4)
            unknown_phase.submit.phases.append(77)  # type: ignore[arg-type]
            await worker.send_raw(
                pb.Command(),
                pb.Command(abort=pb.Abort(request_id="nobody", attempt=9)),
                command_to_pb(submit([3], request_id="old"), 3),
                unknown_phase,
            )
            assert await worker.failure_of("old") == (FailureCode.INTERNAL, "this is incarnation 4, not 3")
            assert (await worker.failure_of("new"))[0] is FailureCode.INVALID
            await worker.send(submit([3], request_id="decode", phases=BOTH))
            code, reason = await worker.failure_of("decode")
            assert code is FailureCode.INTERNAL
            assert "serves {prefill}" in reason

    asyncio.run(scenario())


def test_transfer_id_in_use_is_refused(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = StepGate(monkeypatch, at_start(32))

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, PREFILL, token_budget=SMALL_BUDGET), worker_spec(model_path, DECODE)
        ) as (prefill, decode):
            first, to_decode = handed_off(submit(prompt(60)), decode)
            second, to_decode_again = handed_off(submit(prompt(20), request_id="r2"), decode)
            await prefill.send(first, second)
            await decode.send(to_decode, to_decode_again)
            for worker in (prefill, decode):
                code, reason = await worker.failure_of("r2")
                assert code is FailureCode.INVALID
                assert "transfer" in reason
            await gate.reached()
            gate.open()
            await decode.wait_for_tokens("r1", 7)

    asyncio.run(scenario())


def test_two_workers_that_wait_for_each_others_blocks_end_with_the_deadline(model_path: Path) -> None:
    """Each pool is full of KV that the other has no room for: nothing can go on, and nothing may stay."""
    blocks = 8 * BLOCK_BYTES

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, BOTH, kv_cache_bytes=blocks),
            worker_spec(model_path, BOTH, kv_cache_bytes=blocks),
        ) as pair:
            for i, worker in enumerate(pair):
                # Its prompt fills 8 blocks here, and needs as many there.
                handoff = Handoff(f"t{i}", pair[1 - i].address, 1)
                request = submit(prompt(120), request_id=f"r{i}", phases=PREFILL, timeout_s=3.0)
                await worker.send(replace(request, handoff=handoff))
            for i, worker in enumerate(pair):
                code, _reason = await worker.failure_of(f"r{i}")
                assert code in (FailureCode.DEADLINE, FailureCode.TRANSFER)
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())


# A peer that is not there, or is another.


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
    for module, name in ((worker_module, "GRPC_OPTIONS"), (kv_sending, "CHANNEL_OPTIONS")):
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


def test_peer_of_another_layout_or_incarnation_refuses_with_the_reason(model_path: Path) -> None:
    async def scenario() -> None:
        async with running_worker(worker_spec(model_path, DECODE, block_size=32)) as decode:
            reason = await failed_hand_off(model_path, decode.address)
            assert "block_size is 16 at the sender and 32 at the receiver" in reason
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


# States.


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
            await worker.send(GOOD)
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
            await worker.send(GOOD)
            code, reason = await worker.failure_of()
            assert code is FailureCode.INTERNAL
            assert expected in reason
            await worker.stub.Shutdown(pb.ShutdownRequest())

    asyncio.run(scenario())


@pytest.mark.parametrize(("module", "function"), [(loading, "load_weights"), (worker_module, "Engine")])
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
            engine = worker.worker._step_loop.engine  # type: ignore[union-attr]

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


# The same worker as a process.


def start_process(*arguments: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return subprocess.Popen(
        [sys.executable, "-m", "workers.main", *arguments],
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_plain_process_serves_and_ends_on_sigterm(model_path: Path, reference: LlamaForCausalLM) -> None:
    async def scenario(address: str) -> None:
        client = WorkerClient(address)
        assert (await client.status()).pid == process.pid
        assert await client.generate(greedy_submit(17)) == hf_greedy(reference, prompt(17), 12)
        await client.close()

    arguments = ("--worker-id", "a-0", "--phases", "prefill,decode", "--model", str(model_path))
    with start_process(*arguments, "--kv-cache-mib", "2", "--token-budget", "32") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        bound = re.fullmatch(r"listening on (127\.0\.0\.1:\d+)\n", next_line(process.stdout, "listening"))
        assert bound is not None
        assert next_line(process.stdout, "ready") == "ready\n"
        assert b"MALLOC_ARENA_MAX=2" in Path(f"/proc/{process.pid}/environ").read_bytes()
        asyncio.run(scenario(bound[1]))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""


def next_line(lines: Iterator[str], start: str) -> str:
    """The next line that begins so."""
    return next(line for line in lines if line.startswith(start))


def test_plain_process_names_what_is_wrong(model_path: Path) -> None:
    arguments = ("--worker-id", "a-0", "--model", str(model_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start_process(*arguments, "--phases", "decode", "--port", str(port)) as process:
            _output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}" in errors
    with start_process(*arguments, "--phases", "encode") as process:
        _output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "choose from prefill and decode" in errors
    with start_process(*arguments, "--phases", "decode", "--token-budget", "8") as process:
        _output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "argument --token-budget: is 8; it must hold a block" in errors
