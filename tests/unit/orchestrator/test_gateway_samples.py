"""Several samples of one request, stop strings, logprobs and drafts, through a real gateway and fake workers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.gateway import live_request
from orchestrator.gateway.validation import SEED_STEP
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
from workers.api import (
    DecodingReport,
    DraftsGenerated,
    Event,
    FailureCode,
    FinishReason,
    PromptScored,
    RequestFailed,
    Submit,
    TokenLogprobs,
    TokensGenerated,
)

PROMPT = (10, 11, 12)
EXPECTED = [token_at(3 + i) for i in range(6)]


def several(n: int, **given: Any) -> pb.GenerateRequest:
    request = generate_request(*PROMPT, max_tokens=6, seed=5, n=n, **given)
    request.request_id = "r"
    return request


def says(text: str, worker: FakeWorker) -> None:
    """Let a worker generate this text after PROMPT, and then question marks."""
    ids = byte_ids(text)
    worker.token_at = lambda position: (ids + byte_ids("?") * 500)[position - len(PROMPT)]


def scored(*token_ids: int) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(token_id, -token_id / 8, 2, ((3, -0.25), (token_id, -token_id / 8)))
        for token_id in token_ids
    )


def test_samples_come_in_one_stream_each_with_a_seed_and_timings_of_its_own() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            messages = await collect(it.client.Generate(several(3)))
            assert [tokens_of(messages, i) for i in range(3)] == [EXPECTED] * 3
            assert {message.request_id for message in messages} == {"r"}
            assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=18)
            assert [m.timings.attempts for m in messages if m.finish_reason] == [1, 1, 1]
            seeds = [submit.sampling.seed for submit in both.submits]
            assert seeds == [5, 5 + SEED_STEP, (5 + 2 * SEED_STEP) % 2**64]
            assert len({submit.key for submit in both.submits}) == 3
            assert it.dispatcher.num_finished == 1

    run(scenario)


def test_samples_after_the_first_wait_for_its_first_token_and_go_to_the_same_workers() -> None:
    async def scenario() -> None:
        prefills = [FakeWorker(f"p-{i}", PREFILL) for i in range(2)]
        decodes = [FakeWorker(f"d-{i}", DECODE) for i in range(2)]
        says_first(1, prefills[0])
        async with gateway(*prefills, *decodes) as it:
            call = it.client.Generate(several(4))
            await until(lambda: bool(prefills[0].submits), "the first sample")
            (request,) = it.dispatcher._requests.values()
            await until(lambda: request.samples[0].machine.times.worker_queue_s > 0, "prefill to start")
            assert (it.dispatcher.num_running, it.dispatcher.num_waiting) == (1, 0)
            it.dispatcher.check_invariants()
            prefills[0].answer = prefills[0].script
            prefills[0].say(*prefills[0].script(prefills[0].submits[0])[1:])
            messages = await collect(call)
            assert [tokens_of(messages, i) for i in range(4)] == [EXPECTED] * 4
            assert [len(worker.submits) for worker in (*prefills, *decodes)] == [4, 0, 4, 0]

    run(scenario)


def test_samples_go_elsewhere_when_the_first_one_s_worker_is_gone() -> None:
    async def scenario() -> None:
        workers = [FakeWorker(f"both-{i}", BOTH) for i in range(2)]
        says_first(2, workers[0])
        async with gateway(*workers) as it:
            call = it.client.Generate(several(2))
            await until(lambda: len(workers[0].submits) == 2, "both samples")
            await workers[0].die()
            messages = await collect(call)
            assert [tokens_of(messages, i) for i in range(2)] == [EXPECTED] * 2
            assert len(workers[1].submits) == 2
            assert [m.timings.attempts for m in messages if m.finish_reason] == [2, 2]

    run(scenario)


def test_one_sample_that_cannot_be_had_fails_the_request_and_frees_the_others() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)

        def answer(submit: Submit) -> Sequence[Event]:
            if submit.sampling.seed == 5:
                return both.script(submit)[:2]
            return [RequestFailed(submit.key, FailureCode.INVALID, "not this one")]

        both.answer = answer
        async with gateway(both) as it:
            assert await error_of(it.client.Generate(several(3))) == (
                "INVALID_ARGUMENT",
                "both-0: not this one",
            )
            await until(lambda: both.submits[0].key in both.aborts, "the first sample to be aborted")
            assert (it.dispatcher.num_finished, it.dispatcher.num_failed) == (0, 1)

    run(scenario)


@pytest.mark.parametrize("how", ["cancel", "Abort", "deadline"])
def test_an_end_from_outside_reaches_every_sample(how: str) -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(2, both)
        config = replace(CONFIG, request_timeout_s=0.5 if how == "deadline" else 60.0)
        async with gateway(both, config=config) as it:
            call = it.client.Generate(several(3))
            if how == "deadline":
                status, message = await error_of(call)
                assert status == "DEADLINE_EXCEEDED"
                assert message.startswith("the deadline passed")
            else:
                await until(lambda: len(both.submits) == 3, "all samples")
                if how == "cancel":
                    call.cancel()
                else:
                    assert (await it.client.Abort(pb.AbortRequest(request_id="r"))).found
                    assert await error_of(call) == ("CANCELLED", "aborted by the client")
            await until(lambda: len(both.aborts) == len(both.submits) == 3, "all to be aborted")
            assert it.dispatcher.num_failed == 1

    run(scenario)


def test_samples_count_one_by_one_against_what_may_run() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(2, both)
        async with gateway(both, config=replace(CONFIG, max_running_requests=2)) as it:
            call = it.client.Generate(several(4))
            await until(lambda: len(both.submits) == 2, "two samples")
            await until(lambda: it.dispatcher.num_waiting == 2, "the others to wait")
            both.answer = both.script
            for submit in both.submits[:2]:
                both.say(*both.script(submit)[2:])
            messages = await collect(call)
            assert [tokens_of(messages, i) for i in range(4)] == [EXPECTED] * 4

    run(scenario)


def test_higher_priorities_leave_the_queue_first_and_equal_ones_in_their_order() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        says_first(0, both)
        async with gateway(both, config=replace(CONFIG, max_running_requests=1)) as it:
            calls = []
            for i, priority in enumerate((0, 0, -1, 5, 0, 5)):
                request = generate_request()
                request.request_id, request.priority, request.cache_salt = f"r{i}", priority, f"s{i}"
                calls.append(it.client.Generate(request))
                await until(lambda i=i: len(it.dispatcher._requests) == i + 1, "the request")  # type: ignore[misc]
            both.answer = both.script
            both.say(*both.script(both.submits[0]))
            for call in calls:
                await collect(call)
            order = [submit.key.request_id for submit in both.submits]
            assert order == ["r0", "r3", "r5", "r1", "r4", "r2"]
            assert [submit.priority for submit in both.submits] == [0, 5, 5, 0, 0, -1]
            assert both.submits[1].cache_salt == "s3"

    run(scenario)


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_stop_string_ends_a_sample_and_frees_its_workers(is_apart: bool) -> None:
    async def scenario() -> None:
        workers = [FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)] if is_apart else []
        workers = workers or [FakeWorker("both-0", BOTH)]
        for worker in workers:
            says("one.\n\ntwo", worker)
        last = workers[-1]
        last.answer = lambda submit: last.script(submit)[:-1]
        async with gateway(*workers) as it:
            request = generate_request(*PROMPT, max_tokens=100, stop=["three", "\n\n"])
            messages = await collect(it.client.Generate(request))
            assert text_of(messages) == "one."
            assert messages[-1].stop_text == "\n\n"
            assert tokens_of(messages) == byte_ids("one.\n\n")
            assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
            assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=6)
            await until(lambda: last.aborts == [last.submits[0].key], "the abort")
            await until(lambda: not any(worker.held for worker in workers[1:]), "nothing to be held")
            assert it.dispatcher.num_finished == 1

    run(scenario)


def test_a_last_token_that_is_no_stop_token_is_text_when_a_grammar_ended_there() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)

        def answer(submit: Submit) -> Sequence[Event]:
            started, *tokens = both.script(submit)
            last = tokens[1]
            assert isinstance(last, TokensGenerated)
            return [started, tokens[0], replace(last, finish_reason=FinishReason.STOP)]

        both.answer = answer
        says("ab", both)
        async with gateway(both) as it:
            messages = await collect(it.client.Generate(generate_request(*PROMPT, max_tokens=9, regex="ab")))
            assert text_of(messages) == "ab"
            assert messages[-1].finish_reason == pb.FINISH_REASON_STOP

    run(scenario)


def test_a_stop_string_across_tokens_shows_nothing_of_itself_and_what_is_none_is_shown() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            both.answer = lambda submit: []
            call = it.client.Generate(generate_request(*PROMPT, max_tokens=100, stop=["END"]))
            await until(lambda: bool(both.submits), "the request")
            key = both.submits[0].key
            for position, text in ((3, "a"), (4, "E"), (5, "N")):
                both.say(TokensGenerated(key, tuple(byte_ids(text)), position))
            assert (await call.read()).text_delta == "a"
            both.say(TokensGenerated(key, tuple(byte_ids("bEND?")), 6))
            messages = []
            while not messages or not messages[-1].finish_reason:
                messages.append(await call.read())
            assert text_of(messages) == "ENb"
            assert tokens_of(messages)[-4:] == byte_ids("bEND")

    run(scenario)


def test_a_stop_string_found_when_all_has_come_still_ends_it_there() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            ids = byte_ids("ab!cd")
            both.answer = lambda submit: [TokensGenerated(submit.key, tuple(ids), 3, FinishReason.LENGTH)]
            request = generate_request(*PROMPT, max_tokens=5, stop=["!"], logprobs=0)
            messages = await collect(it.client.Generate(request))
            assert (text_of(messages), tokens_of(messages)) == ("ab", ids[:3])
            assert messages[-1].finish_reason == pb.FINISH_REASON_STOP
            assert messages[-1].usage.completion_tokens == 3
            assert both.aborts == []

    run(scenario)


def test_before_min_tokens_a_stop_string_is_text() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            says("a!b!c!", both)
            request = generate_request(*PROMPT, max_tokens=6, stop=["!"], min_tokens=3)
            messages = await collect(it.client.Generate(request))
            assert text_of(messages) == "a!b"
            assert both.submits[0].sampling.min_new_tokens == 3

    run(scenario)


def test_each_sample_has_its_own_stop() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:

            def answer(submit: Submit) -> Sequence[Event]:
                says("ab!c" if submit.sampling.seed == 5 else "abcdefgh", both)
                return both.script(submit)

            both.answer = answer
            messages = await collect(it.client.Generate(several(2, stop=["!"])))
            assert [text_of(messages, i) for i in range(2)] == ["ab", "abcdef"]
            ends = {m.sample_index: m.finish_reason for m in messages if m.finish_reason}
            assert ends == {0: pb.FINISH_REASON_STOP, 1: pb.FINISH_REASON_LENGTH}
            assert messages[-1].usage.completion_tokens == 3 + 6

    run(scenario)


def test_logprobs_come_with_their_tokens_and_those_of_the_prompt_once() -> None:
    async def scenario() -> None:
        workers = [FakeWorker(f"both-{i}", BOTH) for i in range(2)]
        a, b, c = byte_ids("abc")

        def first(submit: Submit) -> Sequence[Event]:
            return [
                PromptScored(submit.key, 1, scored(11)),
                PromptScored(submit.key, 2, scored(12)),
                TokensGenerated(submit.key, (a,), 3, None, 0.25, scored(a), num_cached_tokens=2),
            ]

        def second(submit: Submit) -> Sequence[Event]:
            return [
                PromptScored(submit.key, 1, scored(11, 12)),
                TokensGenerated(submit.key, (b, c), 4, FinishReason.LENGTH, 0.5, scored(b, c)),
            ]

        workers[0].answer, workers[1].answer = first, second
        async with gateway(*workers) as it:
            request = generate_request(*PROMPT, max_tokens=3, logprobs=2, prompt_logprobs=2, min_tokens=2)
            call = it.client.Generate(request)
            await until(lambda: bool(workers[0].submits), "the request")
            (live,) = it.dispatcher._requests.values()
            await until(lambda: len(live.samples[0].machine.delivered) == 1, "the first token")
            await workers[0].die()
            messages = await collect(call)
            found = [logprobs for message in messages for logprobs in message.logprobs]
            assert [logprobs.token_id for logprobs in found] == [a, b, c]
            assert found[0] == pb.TokenLogprobs(
                token_id=a,
                logprob=-a / 8,
                rank=2,
                text="a",
                top=[
                    pb.TokenLogprob(token_id=3, logprob=-0.25, text="!"),
                    pb.TokenLogprob(token_id=a, logprob=-a / 8, text="a"),
                ],
            )
            prompt = [logprobs.token_id for message in messages for logprobs in message.prompt_logprobs]
            assert prompt == [11, 12]
            assert messages[-1].usage.cached_tokens == 2
            again = workers[1].submits[0]
            assert (again.num_delivered, again.token_ids) == (1, (*PROMPT, a))
            assert (again.sampling.max_new_tokens, again.sampling.min_new_tokens) == (2, 1)
            assert (again.sampling.num_prompt_logprobs, again.sampling.num_logprobs) == (None, 2)

    run(scenario)


@pytest.mark.parametrize("stop", ["", "z"])
def test_logprobs_that_pile_up_are_cut_into_messages_that_a_client_takes(
    stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_request, "MAX_SCORED_TOKENS", 2)
    generated = byte_ids("abzde")

    def all_at_once(submit: Submit) -> Sequence[Event]:
        scores = scored(*generated)
        return [
            PromptScored(submit.key, 1, scored(*prompt[1:])),
            TokensGenerated(submit.key, tuple(generated), len(prompt), FinishReason.LENGTH, 0.25, scores),
        ]

    prompt = (10, 11, 12, 13, 14, 15)

    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = all_at_once
        async with gateway(both) as it:
            given = {"logprobs": 2, "prompt_logprobs": 2, "stop": [stop] if stop else []}
            messages = await collect(it.client.Generate(generate_request(*prompt, max_tokens=5, **given)))
            assert [[one.token_id for one in m.prompt_logprobs] for m in messages if m.prompt_logprobs] == [
                [11, 12],
                [13, 14],
                [15],
            ]
            assert not any(m.token_ids for m in messages[:2])
            kept = generated[:3] if stop else generated
            assert [one.token_id for m in messages for one in m.logprobs] == tokens_of(messages) == kept
            assert all(len(m.logprobs) <= 2 for m in messages)
            assert [bool(m.finish_reason) for m in messages] == [False] * (len(messages) - 1) + [True]
            assert text_of(messages) == ("ab" if stop else "abzde")
            assert messages[-1].usage.completion_tokens == len(kept)

    run(scenario)


def test_drafts_come_together_with_their_texts_and_the_cost() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            drafts = (tuple(byte_ids("yes")), (*byte_ids("n"), 2, *byte_ids("o")))
            both.answer = lambda submit: [
                DecodingReport(submit.key, 4, 4, 8),
                DraftsGenerated(submit.key, drafts, (-0.5, -1.5)),
            ]
            request = generate_request(*PROMPT, max_tokens=4, superposed=pb.SuperposedDecoding(num_drafts=2))
            request.sampling.ignore_eos = False
            (message,) = await collect(it.client.Generate(request))
            assert list(message.drafts) == [
                pb.Draft(token_ids=drafts[0], text="yes", logprob=-0.5),
                pb.Draft(token_ids=drafts[1], text="n", logprob=-1.5),
            ]
            assert message.finish_reason == pb.FINISH_REASON_LENGTH
            assert message.usage == pb.Usage(
                prompt_tokens=3,
                completion_tokens=6,
                decoding=pb.DecodingCost(num_steps=4, num_rows=4, num_tokens=8),
            )
            assert it.dispatcher.num_finished == 1
            assert not both.aborts

    run(scenario)


def test_the_cost_of_a_decoding_method_is_summed_over_the_samples() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            both.answer = lambda submit: [
                *both.script(submit)[:-1],
                DecodingReport(submit.key, 2, 9, 5),
                both.script(submit)[-1],
            ]
            messages = await collect(it.client.Generate(several(2, ngram_drafts=pb.NgramDrafts())))
            assert messages[-1].usage.decoding == pb.DecodingCost(num_steps=4, num_rows=18, num_tokens=10)

    run(scenario)


def test_logprobs_of_minus_infinity_are_carried() -> None:
    async def scenario() -> None:
        async with gateway(both := FakeWorker("both-0", BOTH)) as it:
            impossible = (TokenLogprobs(5, -math.inf, 259),)
            both.answer = lambda submit: [
                TokensGenerated(submit.key, (5,), 3, FinishReason.LENGTH, None, impossible)
            ]
            (message,) = await collect(
                it.client.Generate(generate_request(*PROMPT, max_tokens=1, logprobs=0))
            )
            assert message.logprobs[0].logprob == -math.inf

    run(scenario)
