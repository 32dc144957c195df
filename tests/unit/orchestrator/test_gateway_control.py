"""What a gateway's control address tells of its workers' KV blocks, and of requests."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from orchestrator.control.request_record import MAX_RECORDS
from orchestrator.control.view import LifecycleState
from orchestrator.gateway import worker_ledgers
from protos import control_pb2 as pb
from tests.support.fake_worker import BOTH, DECODE, PREFILL, FakeWorker, running, says_first
from tests.support.gateway import Gateway, collect, error_of, gateway, generate_request, run, text_of
from tests.support.waiting import until
from workers.api import (
    BlockCounts,
    FailureCode,
    KvLedger,
    KvTransferred,
    LedgerEntry,
    LedgerKind,
    RequestFailed,
    RequestId,
    Submit,
    TokensGenerated,
)
from workers.kv_wire import ledger_from_pb

LEDGER = KvLedger(
    (
        LedgerEntry("r1", LedgerKind.SEQUENCE, 2, generation=7, age_s=1.5),
        LedgerEntry("nobody", LedgerKind.FREE, 6),
    ),
    BlockCounts(6, 0, 2, 0, 8),
)


async def explained(it: Any, request_id: str) -> pb.RequestRecord:
    answer = await it.control.Explain(pb.ExplainRequest(request_id=request_id))
    assert isinstance(answer, pb.ExplainResponse)
    return answer.record


async def refusal_of(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


def transfer_of(it: Gateway, request_id: str) -> KvTransferred | None:
    record = it.dispatcher.records.get(RequestId(request_id))
    assert record is not None
    return record.samples[0].attempts[0].transfer


# Ledgers.


def test_every_worker_is_asked_and_one_that_does_not_answer_is_a_line() -> None:
    async def scenario() -> None:
        known, loading, gone = (
            FakeWorker("p-0", PREFILL),
            FakeWorker("d-0", DECODE),
            FakeWorker("d-1", DECODE),
        )
        known.ledger = LEDGER
        async with running(known, loading, gone), gateway() as it:
            await gone.die()
            pending = FakeWorker("d-2", DECODE).view(LifecycleState.PENDING, "no CPU")
            await it.publish(known.view(), loading.view(), gone.view(), pending)
            answer = await it.control.GetKvLedger(pb.GetKvLedgerRequest())
            assert [one.worker_id for one in answer.workers] == ["p-0", "d-0", "d-1", "d-2"]
            assert ledger_from_pb(answer.workers[0].ledger) == LEDGER
            assert [one.HasField("ledger") for one in answer.workers] == [True, False, False, False]
            problems = [one.problem for one in answer.workers]
            assert problems[:2] == ["", "FAILED_PRECONDITION: loading"]
            assert problems[2].startswith("UNAVAILABLE: ")
            assert problems[3] == "it is pending: no CPU"

    run(scenario)


def test_one_worker_can_be_asked_and_one_that_is_not_declared_is_named() -> None:
    async def scenario() -> None:
        workers = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        workers[1].ledger = LEDGER
        async with gateway(*workers) as it:
            (one,) = (await it.control.GetKvLedger(pb.GetKvLedgerRequest(worker_id="d-0"))).workers
            assert (one.worker_id, one.HasField("ledger")) == ("d-0", True)
            refused = await refusal_of(it.control.GetKvLedger(pb.GetKvLedgerRequest(worker_id="d-9")))
            assert refused == ("NOT_FOUND", "no worker 'd-9' is declared; declared: p-0, d-0")

    run(scenario)


def test_another_process_behind_a_workers_address_does_not_speak_for_it() -> None:
    async def scenario() -> None:
        new = FakeWorker("d-0", DECODE, incarnation=2)
        new.ledger = LEDGER
        async with running(new), gateway() as it:
            old = new.view()
            await it.publish(type(old)(old.worker_id, 1, old.phases, old.state, old.address))
            (one,) = (await it.control.GetKvLedger(pb.GetKvLedgerRequest())).workers
            assert one.problem == "incarnation 2 of 'd-0' answers at its address"
            assert not one.HasField("ledger")

    run(scenario)


def test_a_worker_that_is_silent_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_ledgers, "ANSWER_TIMEOUT_S", 0.2)

    class Silent(FakeWorker):
        async def GetKvLedger(self, request: Any, context: Any) -> Any:  # noqa: N802
            await asyncio.Event().wait()

    async def scenario() -> None:
        silent, known = Silent("d-0", DECODE), FakeWorker("d-1", DECODE)
        known.ledger = LEDGER
        async with running(silent, known), gateway() as it:
            await it.publish(silent.view(), known.view())
            first, second = (await it.control.GetKvLedger(pb.GetKvLedgerRequest())).workers
            assert first.problem.startswith("DEADLINE_EXCEEDED")
            assert second.HasField("ledger")

    run(scenario)


# Records.


def test_a_request_on_two_workers_is_explained_with_its_transfer() -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        says_first(0, decode)
        async with gateway(prefill, decode) as it:
            call = it.client.Generate(generate_request(max_tokens=4))
            await until(lambda: bool(decode.submits), "the decode worker to be asked")
            (live,) = it.dispatcher._requests.values()
            await until(lambda: bool(live.samples[0].machine.delivered), "the first token")
            decode.say(*decode.script(decode.submits[0]))
            messages = await collect(call)
            request_id = messages[0].request_id
            assert messages[-1].timings.HasField("second_token_s")
            # The report may come after the last token; it is remembered all the same.
            await until(lambda: transfer_of(it, request_id) is not None, "the report of the transfer")
            record = await explained(it, request_id)
            (sample,) = record.samples
            states = [pb.RequestState.Name(one.state) for one in sample.states]
            assert states == [f"REQUEST_STATE_{name}" for name in ("QUEUED", "PREFILL", "DECODE", "FINISHED")]
            assert [one.at_s for one in sample.states] == sorted(one.at_s for one in sample.states)
            (attempt,) = sample.attempts
            assert (attempt.prefill_worker_id, attempt.decode_worker_id) == ("p-0", "d-0")
            assert attempt.reason.startswith("least loaded: p-0 with 0 prompt tokens")
            assert (attempt.transfer.num_bytes, attempt.transfer.exposed_s) == (1000, 0.0625)
            assert (record.num_prompt_tokens, sample.num_tokens) == (3, 4)
            assert record.age_s >= sample.states[-1].at_s

    run(scenario)


def test_a_retry_is_explained_with_its_reason() -> None:
    def refuse(submit: Submit) -> list[RequestFailed]:
        return [RequestFailed(submit.key, FailureCode.OVERLOADED, "its queue is full")]

    async def scenario() -> None:
        workers = FakeWorker("both-0", BOTH), FakeWorker("both-1", BOTH)
        workers[0].answer = refuse
        async with gateway(*workers) as it:
            messages = await collect(it.client.Generate(generate_request()))
            (sample,) = (await explained(it, messages[0].request_id)).samples
            first, second = sample.attempts
            assert first.problem == "both-0: its queue is full"
            assert (second.prefill_worker_id, second.problem) == ("both-1", "")
            assert sample.states[2].reason == "both-0: its queue is full"

    run(scenario)


def test_a_failed_request_and_a_running_one_are_explained_too() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both) as it:
            both.answer = lambda submit: [RequestFailed(submit.key, FailureCode.INVALID, "no such thing")]
            request = generate_request()
            request.request_id = "failed"
            assert (await error_of(it.client.Generate(request)))[0] == "INVALID_ARGUMENT"
            (sample,) = (await explained(it, "failed")).samples
            assert sample.states[-1].state == pb.REQUEST_STATE_FAILED
            assert sample.attempts[0].problem == "both-0: no such thing"
            says_first(3, both)
            request = generate_request()
            request.request_id = "running"
            call = it.client.Generate(request)
            await call.read()
            await until(lambda: bool(it.dispatcher._running), "the request to run")
            (live,) = it.dispatcher._requests.values()
            await until(lambda: len(live.samples[0].machine.delivered) == 2, "two tokens")
            (sample,) = (await explained(it, "running")).samples
            assert sample.num_tokens == 2
            assert sample.states[-1].state == pb.REQUEST_STATE_DECODE
            call.cancel()

    run(scenario)


def test_samples_have_records_of_their_own() -> None:
    async def scenario() -> None:
        async with gateway(FakeWorker("both-0", BOTH)) as it:
            request = generate_request(n=3)
            messages = await collect(it.client.Generate(request))
            record = await explained(it, messages[0].request_id)
            assert [sample.num_tokens for sample in record.samples] == [4, 4, 4]

    run(scenario)


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both) as it:
            both.token_at = lambda _position: 3 + ord("a")
            request = generate_request(max_tokens=6)
            text = text_of(await collect(it.client.Generate(request)))
            request.sampling.stop.append(text[:2])
            messages = await collect(it.client.Generate(request))
            num_tokens = messages[-1].usage.completion_tokens
            record = await explained(it, messages[0].request_id)
            assert record.samples[0].num_tokens == num_tokens < 6

    run(scenario)


def test_an_unknown_id_is_told_how_long_records_are_kept() -> None:
    async def scenario() -> None:
        async with gateway() as it:
            status, reason = await refusal_of(it.control.Explain(pb.ExplainRequest(request_id="nope")))
            assert status == "NOT_FOUND"
            assert "no request 'nope' is remembered" in reason
            assert f"the last {MAX_RECORDS} that ended" in reason

    run(scenario)


def test_the_way_of_a_transfer_reaches_the_client() -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)

        def answer(submit: Submit) -> list[Any]:
            started, token, _ = prefill.script(submit)
            assert isinstance(token, TokensGenerated)
            way = ("shm", "both are on this host", "int4")
            return [started, token, KvTransferred(submit.key, 1000, 2, 0.5, 0.0625, *way, 250, 3, 1)]

        prefill.answer = answer
        says_first(0, decode)
        async with gateway(prefill, decode) as it:
            call = it.client.Generate(generate_request())
            await until(lambda: bool(decode.submits), "the decode worker to be asked")
            (live,) = it.dispatcher._requests.values()
            machine = live.samples[0].machine
            await until(lambda: machine.times.kv_transfer is not None, "the report of the transfer")
            decode.say(*decode.script(decode.submits[0]))
            timings = (await collect(call))[-1].timings
            transfer = timings.kv_transfer
            found = (transfer.transport, transfer.transport_reason, transfer.codec)
            assert found == ("shm", "both are on this host", "int4")
            assert (transfer.num_wire_bytes, transfer.num_resent_chunks, transfer.num_resumes) == (250, 3, 1)

    run(scenario)
