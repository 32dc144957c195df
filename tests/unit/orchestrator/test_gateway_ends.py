"""Generate through a real gateway and fake workers: failovers, refusals, deadlines, cancellations."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from orchestrator.control.view import LifecycleState
from protos import inference_pb2 as pb
from tests.support.fake_worker import BOTH, DECODE, PREFILL, FakeWorker, says_first, token_at
from tests.support.gateway import (
    CONFIG,
    collect,
    error_of,
    gateway,
    generate_request,
    run,
    tokens_of,
)
from tests.support.waiting import until
from workers.api import FailureCode, RequestFailed

PROMPT = (10, 11, 12)
EXPECTED = [token_at(3 + i) for i in range(6)]


@pytest.mark.parametrize("how", ["break", "die"])
def test_a_worker_that_is_lost_costs_no_token_and_none_comes_twice(how: str) -> None:
    async def scenario() -> None:
        workers = [FakeWorker(f"both-{i}", BOTH) for i in range(2)]
        says_first(4, workers[0])
        async with gateway(*workers) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            await until(lambda: bool(workers[0].submits), "the first worker to be asked")
            (request,) = it.dispatcher._requests.values()
            await until(lambda: len(request.samples[0].machine.delivered) == 3, "three tokens")
            if how == "die":
                await workers[0].die()
            else:
                workers[0].break_session()
            messages = await collect(call)
            assert tokens_of(messages) == EXPECTED
            assert messages[-1].timings.attempts == 2
            assert messages[-1].timings.decode_worker_id == "both-1"
            assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=6)
            assert workers[1].submits[0].token_ids == (*PROMPT, *EXPECTED[:3])

    run(scenario)


def test_a_lost_decode_worker_has_its_prefill_worker_released() -> None:
    async def scenario() -> None:
        prefill = FakeWorker("p-0", PREFILL)
        decodes = [FakeWorker(f"d-{i}", DECODE) for i in range(2)]
        says_first(2, prefill)
        says_first(0, decodes[0])
        async with gateway(prefill, *decodes) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            await until(lambda: bool(decodes[0].submits and prefill.submits), "both to be asked")
            prefill.answer = prefill.script
            await decodes[0].die()
            assert tokens_of(await collect(call)) == EXPECTED
            await until(lambda: prefill.submits[0].key in prefill.aborts, "the abort of the first attempt")
            assert prefill.held == decodes[1].held == {}

    run(scenario)


@pytest.mark.parametrize("code", [FailureCode.INTERNAL, FailureCode.OVERLOADED])
def test_a_worker_that_fails_a_request_is_avoided_while_another_can_do_it(code: FailureCode) -> None:
    async def scenario() -> None:
        workers = [FakeWorker(f"both-{i}", BOTH) for i in range(2)]
        workers[0].answer = lambda submit: [RequestFailed(submit.key, code, "no")]
        async with gateway(*workers) as it:
            messages = await collect(it.client.Generate(generate_request(*PROMPT, max_tokens=6)))
            assert tokens_of(messages) == EXPECTED
            assert len(workers[0].submits) == 1

    run(scenario)


@pytest.mark.parametrize(
    ("code", "status", "num_attempts"),
    [
        (FailureCode.INVALID, "INVALID_ARGUMENT", 1),
        (FailureCode.OVERLOADED, "RESOURCE_EXHAUSTED", 3),
        (FailureCode.INTERNAL, "UNAVAILABLE", 3),
        (FailureCode.TRANSFER, "UNAVAILABLE", 3),
        (FailureCode.DEADLINE, "DEADLINE_EXCEEDED", 1),
    ],
)
def test_what_workers_refuse_has_its_status_and_their_reason(
    code: FailureCode, status: str, num_attempts: int
) -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: [RequestFailed(submit.key, code, "that is why")]
        async with gateway(both) as it:
            assert await error_of(it.client.Generate(generate_request())) == (status, "both-0: that is why")
            assert len(both.submits) == num_attempts
            assert it.dispatcher.num_failed == 1

    run(scenario)


def test_a_reason_of_any_length_keeps_its_status_and_its_beginning() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: [RequestFailed(submit.key, FailureCode.INVALID, "für " * 10_000)]
        async with gateway(both) as it:
            status, message = await error_of(it.client.Generate(generate_request()))
            assert (status, message[:16]) == ("INVALID_ARGUMENT", "both-0: für für ")
            assert message.endswith("...")

    run(scenario)


def test_a_failure_midway_keeps_the_tokens_before_it() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: [
            *both.script(submit)[:3],
            RequestFailed(submit.key, FailureCode.INVALID, "no more"),
        ]
        async with gateway(both) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            tokens: list[int] = []
            while len(tokens) < 2:
                tokens += (await call.read()).token_ids
            assert tokens == EXPECTED[:2]
            with pytest.raises(grpc.aio.AioRpcError, match="both-0: no more"):
                await call.read()

    run(scenario)


def test_without_workers_a_request_waits_until_one_comes() -> None:
    async def scenario() -> None:
        old, new = FakeWorker("both-0", BOTH), FakeWorker("both-0", BOTH, incarnation=2)
        says_first(3, old)
        async with gateway(old) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            await until(lambda: bool(old.submits), "the request")
            await old.die()
            await until(lambda: it.dispatcher.num_waiting == 1, "the request to wait")
            assert it.dispatcher.num_running == 0
            await new.start()
            await it.publish(new.view())
            assert tokens_of(await collect(call)) == EXPECTED
            await new.die()

    run(scenario)


def test_requests_that_lost_their_worker_go_on_in_the_order_in_which_they_came() -> None:
    async def scenario() -> None:
        old, new = FakeWorker("both-0", BOTH), FakeWorker("both-0", BOTH, incarnation=2)
        old.answer = lambda submit: []
        async with gateway(old) as it:
            calls = []
            for i in range(4):
                request = generate_request()
                request.request_id = f"r{i}"
                calls.append(it.client.Generate(request))
                await until(lambda i=i: len(old.submits) == i + 1, "the request")  # type: ignore[misc]
            await old.die()
            await until(lambda: it.dispatcher.num_waiting == 4, "the requests to wait")
            await new.start()
            await it.publish(new.view())
            for call in calls:
                await collect(call)
            assert [submit.key.request_id for submit in new.submits] == ["r0", "r1", "r2", "r3"]
            await new.die()

    run(scenario)


def test_when_no_worker_is_coming_a_request_is_refused() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(2, both)
        async with gateway(both) as it:
            running = it.client.Generate(generate_request())
            await until(lambda: bool(both.submits), "the request")
            await it.publish(both.view(LifecycleState.FAILED, "the model is gone"))
            expected = ("UNAVAILABLE", "no worker can prefill now (both-0 is failed: the model is gone)")
            assert await error_of(running) == expected
            assert await error_of(it.client.Generate(generate_request())) == expected

    run(scenario)


def test_a_worker_that_is_no_longer_ready_loses_its_requests() -> None:
    async def scenario() -> None:
        workers = [FakeWorker(f"both-{i}", BOTH) for i in range(2)]
        says_first(3, workers[0])
        async with gateway(*workers) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            await until(lambda: bool(workers[0].submits), "the request")
            await it.publish(workers[0].view(LifecycleState.LOST, "silent"), workers[1].view())
            assert tokens_of(await collect(call)) == EXPECTED
            assert it.linked() == {("both-1", 1)}
            await until(lambda: workers[0].held == {}, "the session of the lost worker to end")

    run(scenario)


@pytest.mark.parametrize("sets", ["client", "deployment"])
def test_the_deadline_ends_it_and_frees_the_worker(sets: str) -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(2, both)
        config = CONFIG if sets == "client" else replace(CONFIG, request_timeout_s=0.5)
        async with gateway(both, config=config) as it:
            call = it.client.Generate(generate_request(), timeout=0.5 if sets == "client" else 50)
            status, message = await error_of(call)
            assert status == "DEADLINE_EXCEEDED"
            if sets == "deployment":
                assert message.startswith("the deadline passed in state ")
            await until(lambda: bool(both.aborts), "the abort")
            # gRPC carries a client's deadline in steps of its own and rounds up: 0.5 s may arrive as 0.501.
            assert both.submits[0].timeout_s <= (0.51 if sets == "client" else 0.5)

    run(scenario)


def test_a_deadline_that_passes_in_the_queue_says_what_was_missing() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both, config=replace(CONFIG, request_timeout_s=0.1)) as it:
            await it.publish(both.view(LifecycleState.LOST, "silent"))
            status, message = await error_of(it.client.Generate(generate_request()))
            assert status == "DEADLINE_EXCEEDED"
            assert message.startswith("the deadline passed in state queued, with 0 tokens delivered: ")
            assert message.endswith(": no worker can prefill now (both-0 is lost: silent)")

    run(scenario)


@pytest.mark.parametrize("how", ["cancel", "Abort"])
@pytest.mark.parametrize("stage", ["queued", "prefill", "handoff", "decode"])
def test_cancelling_at_any_stage_frees_the_workers(how: str, stage: str) -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        says_first({"queued": 0, "prefill": 1, "handoff": 2, "decode": 3}[stage], prefill)
        says_first(1 if stage == "decode" else 0, decode)
        async with gateway(prefill, decode) as it:
            if stage == "queued":
                await it.publish(prefill.view(), decode.view(LifecycleState.LOST))
            request = generate_request()
            request.request_id = "r"
            call = it.client.Generate(request)
            reading = asyncio.create_task(error_of(call))
            if stage == "queued":
                await until(lambda: it.dispatcher.num_waiting == 1, "the request to wait")
            else:
                num_tokens = {"prefill": 0, "handoff": 1, "decode": 2}[stage]
                await until(lambda: bool(prefill.submits and decode.submits), "both to be asked")
                machine = it.dispatcher._requests[prefill.submits[0].key.request_id].samples[0].machine
                await until(lambda: len(machine.delivered) == num_tokens, f"{num_tokens} tokens")
                if stage == "prefill":
                    await until(lambda: machine.times.worker_queue_s > 0, "prefill to start")
                if stage == "decode":
                    await until(lambda: machine.times.kv_transfer is not None, "the transfer")
            if how == "cancel":
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            else:
                assert (await it.client.Abort(pb.AbortRequest(request_id="r"))).found
                assert await reading == ("CANCELLED", "aborted by the client")
            aborted = {"queued": set(), "prefill": {"p", "d"}, "handoff": {"p", "d"}, "decode": {"d"}}[stage]
            await until(lambda: bool(decode.aborts) == ("d" in aborted), "the abort at decode")
            await until(lambda: bool(prefill.aborts) == ("p" in aborted), "the abort at prefill")
            await until(lambda: not prefill.held and not decode.held, "nothing to be held")
            await until(lambda: it.dispatcher.num_failed == 1, "the request to be counted")
            assert not (await it.client.Abort(pb.AbortRequest(request_id="r"))).found

    run(scenario)
