"""The gateway follows the prefix caches of its workers."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from orchestrator.control.prefix_index import PromptChain
from orchestrator.gateway import dispatcher
from protos import inference_pb2 as pb
from tests.support.fake_worker import BOTH, DECODE, PREFILL, FakeWorker, byte_ids, byte_model
from tests.support.gateway import Gateway, collect, gateway, run
from tests.support.waiting import until
from workers.api import KvBlocksStored, KvEventsLost, PrefillStarted
from workers.block_hash import root_hash

TEXT = "a text that is long enough for several blocks"
BLOCK_SIZE = 4


def stored(salt: str = "") -> KvBlocksStored:
    """All of the text's blocks."""
    model, ids = byte_model(), byte_ids(TEXT)
    root = root_hash(model.model_digest, hashlib.sha256(model.tokenizer_json).hexdigest(), salt)
    return KvBlocksStored(root, tuple(PromptChain(root, ids, len(ids)).hashes(BLOCK_SIZE)))


def request(salt: str = "", **sampling: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text=TEXT, cache_salt=salt, sampling=pb.SamplingParams(max_tokens=2, **sampling)
    )


async def worker_of(it: Gateway, asked: pb.GenerateRequest) -> str:
    timings = (await collect(it.client.Generate(asked)))[-1].timings
    return str(timings.prefill_worker_id)


def with_two(
    scenario: Callable[[Gateway, FakeWorker, FakeWorker], Awaitable[None]], block_size: int = BLOCK_SIZE
) -> None:
    async def main() -> None:
        workers = [FakeWorker(f"b-{i}", BOTH, byte_model(block_size=block_size)) for i in range(2)]
        async with gateway(*workers) as it:
            await it.use(*workers)
            await scenario(it, *workers)

    run(main)


async def tell(it: Gateway, worker: FakeWorker) -> None:
    """The worker has the text, and the gateway has heard of it."""
    index = it.dispatcher._prefixes
    await until(lambda: worker.num_subscriptions > 0, "it is asked")
    worker.say_of_cache(stored())
    await until(lambda: index.num_blocks_by_worker()[worker.worker_id, 1] > 0, "the gateway has heard")


def test_each_worker_is_asked_once_and_a_prompt_goes_to_the_one_that_has_it() -> None:
    async def scenario(it: Gateway, first: FakeWorker, second: FakeWorker) -> None:
        await until(lambda: first.num_subscriptions == second.num_subscriptions == 1, "both are asked")
        assert await worker_of(it, request()) == "b-0"
        await tell(it, second)
        assert await worker_of(it, request()) == "b-1"
        # Of another tenant's nothing is known; the one with less in its cache gets it.
        assert await worker_of(it, request(salt="other")) == "b-0"

    with_two(scenario)


def test_a_prompt_that_is_scored_is_computed_whole_wherever_it_goes() -> None:
    async def scenario(it: Gateway, first: FakeWorker, second: FakeWorker) -> None:
        await tell(it, second)
        assert await worker_of(it, request(prompt_logprobs=1)) == "b-0"

    with_two(scenario)


def test_a_worker_that_lost_events_is_asked_again_and_nothing_is_known_of_it_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatcher, "ASK_AGAIN_S", 0.01)

    async def scenario(it: Gateway, first: FakeWorker, second: FakeWorker) -> None:
        await tell(it, second)
        second.say_of_cache(KvEventsLost())
        await until(lambda: second.num_subscriptions == 2, "it is asked again")
        assert it.dispatcher._prefixes.num_blocks == 0
        assert await worker_of(it, request()) == "b-0"
        await tell(it, second)
        assert await worker_of(it, request()) == "b-1"

    with_two(scenario)


def test_what_was_told_on_a_stream_that_broke_is_forgotten() -> None:
    async def scenario(it: Gateway, first: FakeWorker, second: FakeWorker) -> None:
        await tell(it, second)
        second.break_session()
        await until(lambda: second.num_subscriptions == 2, "it is asked again on the new stream")
        assert it.dispatcher._prefixes.num_blocks == 0
        it.dispatcher.check_invariants()

    with_two(scenario)


def test_a_worker_that_caches_nothing_is_not_asked() -> None:
    async def scenario(it: Gateway, first: FakeWorker, second: FakeWorker) -> None:
        await worker_of(it, request())
        assert first.num_subscriptions == second.num_subscriptions == 0

    with_two(scenario, block_size=0)


def test_what_is_cached_is_not_charged() -> None:
    async def scenario(it: Gateway, first: FakeWorker, second: FakeWorker) -> None:
        await tell(it, second)
        second.answer = lambda _submit: ()
        call = it.client.Generate(request(n=3))
        await until(lambda: len(second.submits) == 1, "it is submitted")
        num_cached = BLOCK_SIZE * len(stored().hashes)
        load = it.dispatcher._ledger.of(second.worker_id)
        assert load.prefill_tokens == len(byte_ids(TEXT)) - num_cached
        it.dispatcher.check_invariants()
        call.cancel()

    with_two(scenario)


def test_the_last_prompts_that_wait_go_to_a_worker_that_has_come_to_prefill() -> None:
    async def main() -> None:
        workers = [FakeWorker(f"b-{i}", BOTH) for i in range(2)]
        first, second = workers
        async with gateway(*workers) as it:
            await it.publish(first.view(), replace(second.view(), phases=DECODE))
            await until(lambda: len(it.linked()) == 2, "the links")
            first.answer = lambda _submit: ()
            asked = []
            for number in range(4):
                asked.append(asyncio.ensure_future(collect(it.client.Generate(request()))))
                await until(lambda number=number: len(first.submits) > number, "it is submitted")
            begun, second_one, third, fourth = first.submits
            first.say(PrefillStarted(begun.key, 0.125))
            running = it.dispatcher._running
            await until(lambda: not running[begun.key.attempt].machine.is_prefill_waiting, "it has begun")
            await it.publish(first.view(), second.view())
            await asyncio.gather(*asked[2:])
            # As many as make the queues alike, the last ones, and the first of them first.
            assert first.aborts == [fourth.key, third.key]
            again = [one.key.request_id for one in second.submits]
            assert again == [third.key.request_id, fourth.key.request_id]
            for submit in (begun, second_one):
                first.say(*first.script(submit)[submit is begun :])
            await asyncio.gather(*asked[:2])
            # Also of those that were sent elsewhere: it was nobody's failure.
            assert [task.result()[-1].timings.attempts for task in asked] == [1] * 4
            it.dispatcher.check_invariants()

    run(main)


def test_a_worker_that_is_back_decodes_some_of_what_it_had_but_is_nobodys_last_attempt() -> None:
    """All of it went to the other one, which may have no room for it."""

    async def main() -> None:
        workers = [FakeWorker("p", PREFILL), FakeWorker("d-0", DECODE), FakeWorker("d-1", DECODE)]
        async with gateway(*workers) as it:
            await it.use(*workers)
            for one in workers:
                one.answer = lambda _submit: ()
            asked = [it.client.Generate(request()) for _ in range(8)]
            ledger = it.dispatcher._ledger

            def shares() -> list[int]:
                return [ledger.of(one.worker_id).decode_sequences for one in workers[1:]]

            await until(lambda: shares() == [4, 4], "each has half")
            # Half have lost it twice, then the others have.
            for number, expected in enumerate(([4, 4], [4, 4], [4, 4], [8, 0])):
                workers[2].break_session()
                await until(
                    lambda number=number: workers[2].num_sessions == number + 2, "its link is open again"
                )
                await until(lambda expected=expected: shares() == expected, "it has its share")
                it.dispatcher.check_invariants()
            assert it.dispatcher.num_failed == 0
            for call in asked:
                call.cancel()

    run(main)


def test_prompts_that_are_decoded_where_they_are_prefilled_stay_when_a_worker_is_back() -> None:
    """They would come back to it, for nothing."""

    async def main() -> None:
        both, decode = FakeWorker("pd", PREFILL | DECODE), FakeWorker("d", DECODE)
        async with gateway(both, decode) as it:
            await it.use(both, decode)
            both.answer = lambda _submit: ()
            asked = [it.client.Generate(request()) for _ in range(4)]
            await until(lambda: len(both.submits) == 4, "all are submitted")
            decode.break_session()
            await until(lambda: decode.num_sessions == 2, "its link is open again")
            await until(lambda: len(it.linked()) == 2, "the gateway knows")
            assert both.aborts == []
            assert len(both.submits) == 4
            for call in asked:
                call.cancel()

    run(main)
