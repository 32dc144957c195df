"""Commands that a worker refuses or ignores, and what that does to others: nothing."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from protos import worker_pb2 as pb
from tests.support.worker_client import (
    BLOCK_BYTES,
    BOTH,
    DECODE,
    PREFILL,
    SMALL_BUDGET,
    StepGate,
    at_start,
    handed_off,
    prompt,
    running_pair,
    running_worker,
    submit,
    worker_spec,
)
from workers.api import (
    FailureCode,
    Handoff,
    SamplingParams,
    Submit,
)
from workers.engine.messages import StartTransfer
from workers.kv_sending import KvSending
from workers.wire import command_to_pb

pytestmark = pytest.mark.usefixtures("cache_home", "nothing_escapes")


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


def test_two_workers_that_wait_for_each_others_blocks_end_with_the_deadline(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pool is full of KV that the other has no room for: nothing can go on, and nothing may stay."""
    blocks = 8 * BLOCK_BYTES
    gate = StepGate(monkeypatch, lambda _plan: True)
    start, begun = KvSending.start, list[tuple[KvSending, StartTransfer]]()

    def when_both_are_full(sending: KvSending, transfer: StartTransfer) -> None:
        begun.append((sending, transfer))
        if len(begun) == 2:
            for one, its_transfer in begun:
                start(one, its_transfer)
            gate.open()

    monkeypatch.setattr(KvSending, "start", when_both_are_full)

    async def scenario() -> None:
        async with running_pair(
            worker_spec(model_path, BOTH, kv_cache_bytes=blocks),
            worker_spec(model_path, BOTH, kv_cache_bytes=blocks),
        ) as pair:
            for i, worker in enumerate(pair):
                # Its prompt fills 8 blocks here, and needs as many there.
                request = submit(prompt(120), request_id=f"r{i}", phases=PREFILL, timeout_s=3.0)
                await worker.send(replace(request, handoff=Handoff(f"t{i}", pair[1 - i].address, 1)))
            for i, worker in enumerate(pair):
                code, _reason = await worker.failure_of(f"r{i}")
                assert code in (FailureCode.DEADLINE, FailureCode.TRANSFER)
                await worker.assert_nothing_leaks()

    asyncio.run(scenario())
