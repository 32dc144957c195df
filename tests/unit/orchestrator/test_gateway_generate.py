"""Generate through a real gateway and fake workers: tokens, text, chat, queues."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc

from orchestrator.gateway.inference_service import InferenceService, Unread
from orchestrator.gateway.served_model import ServedModel
from protos import inference_pb2 as pb
from tests.support.fake_worker import BOTH, DECODE, PREFILL, FakeWorker, byte_ids, says_first, token_at
from tests.support.gateway import (
    CONFIG,
    collect,
    error_of,
    gateway,
    generate_request,
    run,
    text_of,
    tokens_of,
)
from tests.support.waiting import until
from workers.api import TokensGenerated

PROMPT = (10, 11, 12)
EXPECTED = [token_at(3 + i) for i in range(6)]


def says(text: str, worker: FakeWorker, num_prompt_tokens: int) -> None:
    """Let a worker generate this text."""
    ids = byte_ids(text)
    worker.token_at = lambda position: ids[position - num_prompt_tokens]


def test_token_ids_on_one_worker_with_usage_and_timings() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            request = generate_request(*PROMPT, max_tokens=6, temperature=0.5, top_p=0.9, seed=77)
            request.request_id = "mine"
            messages = await collect(it.client.Generate(request))
            assert {message.request_id for message in messages} == {"mine"}
            assert tokens_of(messages) == EXPECTED
            last = messages[-1]
            assert last.finish_reason == pb.FINISH_REASON_LENGTH
            assert last.usage == pb.Usage(prompt_tokens=3, completion_tokens=6)
            timings = last.timings
            assert (timings.prefill_worker_id, timings.decode_worker_id) == ("both-0", "both-0")
            assert (timings.prefill_s, timings.attempts) == (0.25, 1)
            assert timings.queue_s >= 0.125
            assert timings.total_s >= timings.ttft_s > 0
            assert timings.HasField("tpot_s")
            assert not timings.HasField("kv_transfer")
            (submit,) = both.submits
            assert submit.token_ids == PROMPT
            assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.seed) == (
                0.5,
                0.9,
                77,
            )
            assert it.dispatcher.num_finished == 1
            assert both.held == {}

    run(scenario)


def test_many_that_are_written_to_in_turns_get_all_their_tokens() -> None:
    """The worker says a token of each in one message, faster than all can be written to."""
    num, num_tokens = 40, 50

    async def scenario() -> None:
        config = replace(CONFIG, max_running_requests=num, max_waiting_requests=num)
        async with gateway(both := FakeWorker("both-0", BOTH), config=config) as it:
            says_first(0, both)
            calls = [
                asyncio.create_task(
                    collect(it.client.Generate(generate_request(*PROMPT, max_tokens=num_tokens)))
                )
                for _ in range(num)
            ]
            await until(lambda: len(both.submits) == num, "all requests to be at the worker")
            scripts = [both.script(submit) for submit in both.submits]
            # One gives up while it waits for its turn.
            calls[3].cancel()
            for events in zip(*scripts, strict=True):
                both.say(*events)
            answers = await asyncio.gather(*(call for call in calls if call is not calls[3]))
            expected = [token_at(3 + i) for i in range(num_tokens)]
            assert all(tokens_of(messages) == expected for messages in answers)
            # Who waited for a turn has more in a message.
            assert max(len(message.token_ids) for messages in answers for message in messages) > 1
            assert sum(map(len, answers)) < num * num_tokens

    run(scenario)


def test_apart_the_tokens_of_both_workers_come_in_order() -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        async with gateway(prefill, decode) as it:
            messages = await collect(it.client.Generate(generate_request(*PROMPT, max_tokens=6)))
            assert tokens_of(messages) == EXPECTED
            assert prefill.submits[0].handoff is not None
            assert prefill.submits[0].handoff.decode_address == decode.address
            assert prefill.submits[0].key == decode.submits[0].key

    run(scenario)


def test_tokens_of_decode_wait_for_the_first_one_of_prefill() -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        says_first(1, prefill)
        async with gateway(prefill, decode) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            await until(lambda: bool(prefill.submits and decode.submits), "both to be asked")
            (request,) = it.dispatcher._requests.values()
            await until(lambda: len(request.samples[0].machine._early) == 5, "the tokens of decode")
            assert request.samples[0].machine.delivered == []
            prefill.say(*prefill.script(prefill.submits[0])[1:])
            messages = await collect(call)
            assert tokens_of(messages) == EXPECTED
            assert prefill.aborts + decode.aborts in ([], [prefill.submits[0].key])

    run(scenario)


def test_the_transfer_is_in_the_timings() -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        says_first(1, decode)
        async with gateway(prefill, decode) as it:
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=6))
            await until(lambda: len(it.dispatcher._requests) == 1, "the request")
            (request,) = it.dispatcher._requests.values()
            await until(lambda: request.samples[0].machine.times.kv_transfer is not None, "the transfer")
            decode.say(*decode.script(decode.submits[0])[1:])
            last = (await collect(call))[-1]
            assert last.timings.kv_transfer == pb.KvTransferTimings(
                num_bytes=1000, num_chunks=2, transfer_s=0.5, exposed_s=0.0625
            )
            assert (last.timings.prefill_worker_id, last.timings.decode_worker_id) == ("p-0", "d-0")

    run(scenario)


def test_text_is_tokenised_as_it_is_and_streams_back_as_whole_characters() -> None:
    text, answer = "Grüß Gott", "Schöne Grüße 世界 👋"

    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            says(answer, both, len(byte_ids(text)))
            request = pb.GenerateRequest(
                text=text, sampling=pb.SamplingParams(max_tokens=len(byte_ids(answer)))
            )
            messages = await collect(it.client.Generate(request))
            assert both.submits[0].token_ids == tuple(byte_ids(text))
            assert text_of(messages) == answer
            assert "\ufffd" not in text_of(messages)

    run(scenario)


def test_an_answer_cut_within_a_character_ends_with_a_replacement() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            says("a世", both, 3)
            messages = await collect(it.client.Generate(generate_request(*PROMPT, max_tokens=3)))
            assert text_of(messages) == "a\ufffd"

    run(scenario)


def test_tokens_that_are_no_utf_8_are_a_prompt_like_any_other_and_break_no_stream() -> None:
    bad = [token_id for token_id in range(3, 259) if token_id not in byte_ids("ascii")][-20:]

    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            both.token_at = lambda position: bad[position % len(bad)]
            messages = await collect(it.client.Generate(generate_request(*bad, max_tokens=8)))
            assert len(tokens_of(messages)) == 8
            assert both.submits[0].token_ids == tuple(bad)

    run(scenario)


def test_chat_is_rendered_with_the_template() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            request = pb.GenerateRequest(
                chat=pb.ChatMessages(
                    messages=[
                        pb.ChatMessage(role="system", content="Be brief."),
                        pb.ChatMessage(role="user", content="Hi"),
                    ]
                ),
                sampling=pb.SamplingParams(max_tokens=1),
            )
            await collect(it.client.Generate(request))
            rendered = (1, *byte_ids("system\nBe brief."), 2, *byte_ids("\n"))
            rendered += (1, *byte_ids("user\nHi"), 2, *byte_ids("\n"), 1, *byte_ids("assistant\n"))
            assert both.submits[0].token_ids == rendered

    run(scenario)


def test_the_model_s_end_token_ends_it_and_is_no_text() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            stop = byte_ids("!")[0]
            ids = [*byte_ids("ok"), 2, *byte_ids("on!")]
            both.token_at = lambda position: ids[position - 3]
            request = generate_request(*PROMPT, max_tokens=20)
            request.sampling.ignore_eos = False
            messages = await collect(it.client.Generate(request))
            assert (text_of(messages), tokens_of(messages)) == ("ok", ids[:3])
            assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
            request.sampling.ignore_eos = True
            request.sampling.stop_token_ids.append(stop)
            messages = await collect(it.client.Generate(request))
            assert (text_of(messages), tokens_of(messages)) == ("okon", ids)

    run(scenario)


def test_a_long_prompt_is_read_too() -> None:
    async def scenario() -> None:
        async with gateway(FakeWorker("both-0", BOTH)) as it:
            status, message = await error_of(it.client.Generate(pb.GenerateRequest(text="a" * 100_000)))
            assert status == "INVALID_ARGUMENT"
            assert "text is 100000 tokens; allowed: at most 511" in message

    run(scenario)


def test_an_id_may_be_used_again_and_late_events_of_its_first_use_do_no_harm() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(2, both)
        async with gateway(both) as it:
            request = generate_request(*PROMPT, max_tokens=6)
            request.request_id = "again"
            call = it.client.Generate(request)
            await until(lambda: bool(both.submits), "the request")
            call.cancel()
            await until(lambda: bool(both.aborts), "the abort")
            again = it.client.Generate(request)
            await until(lambda: len(both.submits) == 2, "the request again")
            old, new = both.submits
            both.say(TokensGenerated(old.key, (99,), 4), *both.script(new)[2:])
            assert tokens_of(await collect(again)) == EXPECTED

    run(scenario)


def test_above_its_limits_the_gateway_queues_in_order_and_then_refuses() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(0, both)
        config = replace(CONFIG, max_running_requests=1, max_waiting_requests=2)
        async with gateway(both, config=config) as it:
            calls = []
            for i in range(3):
                request = generate_request(*PROMPT, max_tokens=6)
                request.request_id = f"r{i}"
                calls.append(it.client.Generate(request))
                await until(lambda i=i: len(it.dispatcher._requests) == i + 1, "the request")  # type: ignore[misc]
            assert (it.dispatcher.num_running, it.dispatcher.num_waiting) == (1, 2)
            assert await error_of(it.client.Generate(generate_request())) == (
                "RESOURCE_EXHAUSTED",
                "2 requests are waiting already (gateway.maxWaitingRequests); try again later",
            )
            duplicate = generate_request()
            duplicate.request_id = "r1"
            calls[2].cancel()
            await until(lambda: it.dispatcher.num_waiting == 1, "the cancelled one to go")
            status, message = await error_of(it.client.Generate(duplicate))
            assert (status, "'r1'" in message) == ("ALREADY_EXISTS", True)
            both.answer = both.script
            both.say(*both.script(both.submits[0]))
            assert tokens_of(await collect(calls[0])) == EXPECTED
            assert tokens_of(await collect(calls[1])) == EXPECTED
            assert [submit.key.request_id for submit in both.submits] == ["r0", "r1"]

    run(scenario)


def test_many_requests_at_once_are_spread_and_all_end() -> None:
    async def scenario() -> None:
        workers = [FakeWorker(f"both-{i}", BOTH) for i in range(2)]
        config = replace(CONFIG, max_running_requests=64, max_waiting_requests=64)
        async with gateway(*workers, config=config) as it:
            calls = [it.client.Generate(generate_request(*PROMPT, max_tokens=6)) for _ in range(40)]
            answers = await asyncio.gather(*(collect(call) for call in calls))
            assert [tokens_of(answer) for answer in answers] == [EXPECTED] * 40
            assert len(workers[0].submits) + len(workers[1].submits) == 40

    run(scenario)


def test_a_client_that_does_not_read_is_ended_by_the_deadline() -> None:
    class NeverRead:
        """The side of gRPC that a handler sees."""

        def __init__(self) -> None:
            self.status: tuple[grpc.StatusCode, str] | None = None

        def time_remaining(self) -> float:
            return 0.5

        async def write(self, message: pb.GenerateResponse) -> None:
            await asyncio.Event().wait()

        async def abort(self, status: grpc.StatusCode, message: str) -> None:
            self.status = status, message

    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both) as it:
            served = ServedModel()
            assert both.model is not None
            await served.learn(both.view(), both.model)
            service = InferenceService(CONFIG, it.dispatcher, served, lambda: 1)
            context: Any = NeverRead()
            await service.Generate(Unread(generate_request()), context)
            assert it.dispatcher.num_finished == 1
            status, message = context.status
            assert (status, message) == (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the deadline passed: 0.5 s after the request came",
            )

    run(scenario)
