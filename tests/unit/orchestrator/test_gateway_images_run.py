"""Requests with pictures through a real gateway and fake workers: encoders are told what the prefill worker wants."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from orchestrator.control.encode_shards import MAX_TRIES
from orchestrator.control.request_machine import RequestMachine
from orchestrator.control.view import LifecycleState
from orchestrator.gateway import encoders as gateway_encoders
from orchestrator.gateway import inference_service
from orchestrator.gateway.config import GatewayConfig
from orchestrator.gateway.inference_service import Unread
from orchestrator.gateway.validation import check_request
from protos import inference_pb2 as pb
from tests.support.fake_worker import (
    BOTH,
    DECODE,
    ENCODE,
    PREFILL,
    FakeWorker,
    token_at,
)
from tests.support.gateway import CONFIG, Gateway, collect, error_of, gateway, generate_request, tokens_of
from tests.support.picture_models import IDEFICS3, picture_model
from tests.support.pictures import picture
from tests.support.waiting import in_loop, until
from workers.api import Encode, Event, FailureCode, ImagesWanted, PhaseSet, RequestFailed

MODEL = picture_model()
ONE, TWO = picture(1), picture(2)
#: Of each picture: four and a global view.
NUM_TILES = 5


def worker(name: str, phases: PhaseSet) -> FakeWorker:
    return FakeWorker(name, phases, MODEL)


def silent(encode: Encode) -> list[Event]:
    return []


def fails(code: FailureCode, reason: str) -> Any:
    return lambda encode: [RequestFailed(encode.key, code, reason)]


def in_message(picture: bytes) -> int:
    """Bytes of a picture in a request."""
    return pb.Image(data=picture).ByteSize()


def request(*pictures: bytes, max_tokens: int = 3, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="what is " + IDEFICS3.placeholder * len(pictures) + "?",
        images=[pb.Image(data=file) for file in pictures],
        sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


@asynccontextmanager
async def serving(*workers: FakeWorker, config: GatewayConfig = CONFIG) -> AsyncIterator[Gateway]:
    """At the end nothing may be left: with workers, or in the gateway's books."""
    async with gateway(*workers, config=config) as it:
        yield it
        await until(lambda: not any(one.held for one in workers), "workers to hold nothing")
        assert it.dispatcher._encoders.is_idle


def machine(it: Gateway) -> RequestMachine:
    """Of the only request that runs."""
    (live,) = it.dispatcher._requests.values()
    it.dispatcher.check_invariants()
    return live.samples[0].machine


async def until_encoded(it: Gateway) -> None:
    """All pictures of the only request are with the prefill worker."""

    def is_done() -> bool:
        # It may be on its way here still.
        records = machine(it).encodes.records if it.dispatcher._requests else []
        return bool(records) and all(record.ended_at_s is not None for record in records)

    await until(is_done, "the pictures to be encoded")
    assert not machine(it).encodes.running
    assert not machine(it).encodes.wanted


async def answered(it: Gateway, prefill: FakeWorker, call: Any) -> list[pb.GenerateResponse]:
    """The rest of an answer whose pictures get encoded."""
    await until_encoded(it)
    prefill.go_on()
    messages = await collect(call)
    length = len(prefill.submits[-1].token_ids)
    assert tokens_of(messages) == [token_at(length + i) for i in range(3)]
    return messages


def tiles_of(*encoders: FakeWorker) -> list[int]:
    """Tiles of the prompt that these were told to encode, in order."""
    return sorted(
        tile
        for one in encoders
        for encode in one.encodes
        for tile in range(encode.first_tile, encode.first_tile + encode.tile_hi - encode.tile_lo)
    )


@in_loop
async def test_pictures_are_spread_over_encoders_and_each_shard_has_its_own() -> None:
    both, encoders = worker("both-0", BOTH), [worker(f"e-{i}", ENCODE) for i in range(2)]
    async with serving(both, *encoders) as it:
        call = it.client.Generate(request(ONE, TWO, cache_salt="salt"))
        messages = await answered(it, both, call)
        (submit,) = both.submits
        assert len(submit.images) == 2 * NUM_TILES
        assert tiles_of(*encoders) == list(range(2 * NUM_TILES))
        for one in encoders:
            assert one.encodes
            for encode in one.encodes:
                file = encode.first_tile // NUM_TILES
                assert encode.image == (ONE, TWO)[file]
                assert (encode.media_type, encode.width, encode.height) == ("image/png", 50, 30)
                assert encode.tile_lo == encode.first_tile % NUM_TILES
                tiles = submit.images[encode.first_tile :][: encode.tile_hi - encode.tile_lo]
                assert encode.keys == tuple(tile.key for tile in tiles)
                assert encode.prefill == submit.key
                assert (encode.prefill_worker, encode.prefill_address) == ("both-0", both.address)
                assert encode.cache_salt == "salt"
                assert 0 < encode.timeout_s <= CONFIG.request_timeout_s
        keys = [encode.key for one in encoders for encode in one.encodes]
        assert len({submit.key, *keys}) == 1 + len(keys)
        last = messages[-1]
        assert last.usage.image_tokens == 2 * NUM_TILES * 4
        assert last.timings.encode_s > 0
        assert last.timings.encode_start_s > 0
        shards = [(shard.worker_id, shard.num_tiles, shard.transport) for shard in last.timings.encodes]
        assert sorted(shards) == sorted(
            (one.worker_id, encode.tile_hi - encode.tile_lo, "grpc")
            for one in encoders
            for encode in one.encodes
        )
        assert all(shard.HasField("duration_s") and not shard.problem for shard in last.timings.encodes)


@in_loop
async def test_each_phase_may_have_workers_of_its_own() -> None:
    encoder, prefill, decode = worker("e-0", ENCODE), worker("p-0", PREFILL), worker("d-0", DECODE)
    async with serving(encoder, prefill, decode) as it:
        await answered(it, prefill, it.client.Generate(request(ONE)))
        assert [encode.prefill_address for encode in encoder.encodes] == [prefill.address]
        # KV is named by the pictures that it was computed from.
        assert decode.submits[0].images == prefill.submits[0].images
        assert tiles_of(prefill, decode) == []


@in_loop
async def test_one_worker_may_serve_all_phases() -> None:
    alone = worker("all-0", ENCODE | BOTH)
    async with serving(alone) as it:
        await answered(it, alone, it.client.Generate(request(ONE)))
        assert [encode.prefill_worker for encode in alone.encodes] == ["all-0"]


@in_loop
async def test_tiles_that_the_prefill_worker_has_are_not_encoded() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    both.answer = both.script
    async with serving(both, encoder) as it:
        last = (await collect(it.client.Generate(request(ONE))))[-1]
        assert not encoder.encodes
        assert not last.timings.HasField("encode_s")
        assert last.usage.image_tokens == NUM_TILES * 4


@in_loop
async def test_all_samples_of_a_request_have_its_pictures() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    async with serving(both, encoder) as it:
        asked = request(ONE)
        asked.sampling.n = 2
        call = it.client.Generate(asked)
        await until_encoded(it)
        both.answer = both.script
        both.go_on()
        messages = await collect(call)
        assert len(tokens_of(messages, 1)) == 3
        assert both.submits[0].images == both.submits[1].images


@in_loop
async def test_only_the_shard_of_a_lost_encoder_goes_to_another() -> None:
    both, encoders = worker("both-0", BOTH), [worker(f"e-{i}", ENCODE) for i in range(2)]
    encoders[0].answer_encode = silent
    async with serving(both, *encoders) as it:
        call = it.client.Generate(request(ONE, TWO))
        await until(lambda: len(tiles_of(*encoders)) == 2 * NUM_TILES, "both to be told")
        lost, own = tiles_of(encoders[0]), tiles_of(encoders[1])
        await encoders[0].die()
        last = (await answered(it, both, call))[-1]
        assert tiles_of(encoders[1]) == sorted(own + lost)
        assert len(both.submits) == 1
        assert last.timings.attempts == 1
        problems = {shard.worker_id for shard in last.timings.encodes if shard.problem}
        assert problems == {"e-0"}


@in_loop
async def test_a_picture_that_cannot_be_decoded_fails_its_request_with_the_worker_s_words() -> None:
    both, encoders = worker("both-0", BOTH), [worker(f"e-{i}", ENCODE) for i in range(2)]
    encoders[1].answer_encode = silent
    async with serving(both, *encoders) as it:
        encoders[0].answer_encode = fails(FailureCode.INVALID, "image: its pixels end too early")
        other = it.client.Generate(generate_request(max_tokens=3))
        status, message = await error_of(it.client.Generate(request(ONE)))
        assert (status, message) == (
            "INVALID_ARGUMENT",
            "e-0 could not encode image 1: its pixels end too early",
        )
        assert len(tokens_of(await collect(other))) == 3
        await until(
            lambda: [encode.key for encode in encoders[1].encodes] == encoders[1].aborts, "the other's abort"
        )
        await until(lambda: len(both.aborts) == 1, "the prefill worker's abort")


@in_loop
async def test_an_encoder_that_is_full_is_avoided() -> None:
    both, encoders = worker("both-0", BOTH), [worker(f"e-{i}", ENCODE) for i in range(2)]
    encoders[0].answer_encode = fails(FailureCode.OVERLOADED, "too many pictures wait")
    async with serving(both, *encoders) as it:
        await answered(it, both, it.client.Generate(request(ONE, TWO)))
        assert len(encoders[0].encodes) <= 2
        assert tiles_of(encoders[1]) == list(range(2 * NUM_TILES))


@in_loop
async def test_pictures_wait_for_a_full_encoder_until_it_has_room() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)

    def answer(encode: Encode) -> list[Event]:
        if len(encoder.encodes) <= MAX_TRIES:
            return [RequestFailed(encode.key, FailureCode.OVERLOADED, "too many pictures wait")]
        return [encoder.encoded(encode)]

    encoder.answer_encode = answer
    async with serving(both, encoder) as it:
        call = it.client.Generate(request(ONE))
        await until(lambda: len(encoder.encodes) > MAX_TRIES, "the encoder to be asked again and again")
        messages = await answered(it, both, call)
        assert messages[-1].timings.attempts == 1
        assert [shard.problem for shard in messages[-1].timings.encodes] == ["too many pictures wait", ""]


@in_loop
async def test_a_full_encoder_is_asked_again_once_a_shard_of_it_has_ended() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    encoder.answer_encode = silent
    async with serving(both, encoder) as it:
        first = it.client.Generate(request(ONE, request_id="first"))
        await until(lambda: bool(encoder.encodes), "the encoder to be told")
        encoder.answer_encode = fails(FailureCode.OVERLOADED, "full")
        encoders = it.dispatcher._encoders
        with patch.object(gateway_encoders, "FULL_S", 1000.0):
            second = it.client.Generate(request(TWO, request_id="second"))
            await until(lambda: bool(encoders._full), "the second to be refused")
            assert len(encoder.encodes) == 2
            encoder.answer_encode = lambda encode: [encoder.encoded(encode)]
            encoder.say(encoder.encoded(encoder.encodes[0]))
            await until(lambda: len(encoder.encodes) == 3, "the second to be given to it")
        assert not encoders._full
        first.cancel()
        second.cancel()
        await until(lambda: len(both.aborts) == 2, "both to be gone")


@in_loop
async def test_an_encoder_that_stays_full_makes_the_deadline_pass_and_is_named() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    encoder.answer_encode = fails(FailureCode.OVERLOADED, "too many pictures wait")
    async with serving(both, encoder, config=replace(CONFIG, request_timeout_s=2.0)) as it:
        status, message = await error_of(it.client.Generate(request(ONE)))
        assert status == "DEADLINE_EXCEEDED"
        assert message.endswith("with 0 tokens delivered: e-0 could not encode: too many pictures wait")


@in_loop
async def test_an_encoder_with_much_yet_to_be_sent_gets_no_more() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    async with serving(both, encoder, config=replace(CONFIG, request_timeout_s=2.0)) as it:
        with patch.object(it.dispatcher._encoders, "_unsent_bytes", lambda one: 2**40):
            status, message = await error_of(it.client.Generate(request(ONE)))
        assert status == "DEADLINE_EXCEEDED"
        assert message.endswith("e-0 has yet to be sent 1099511627776 bytes of pictures")
        assert not encoder.encodes


@in_loop
async def test_a_prefill_worker_that_two_encoders_cannot_reach_is_left_for_another() -> None:
    workers = [worker(f"both-{i}", BOTH) for i in range(2)]
    encoders = [worker(f"e-{i}", ENCODE) for i in range(2)]

    def answers(encoder: FakeWorker) -> Any:
        def answer(encode: Encode) -> list[Event]:
            if encode.prefill_worker == "both-0":
                return [RequestFailed(encode.key, FailureCode.TRANSFER, "no answer from both-0")]
            return [encoder.encoded(encode)]

        return answer

    for one in encoders:
        one.answer_encode = answers(one)
    async with serving(*workers, *encoders) as it:
        call = it.client.Generate(request(ONE))
        await until(lambda: bool(workers[1].submits), "the other prefill worker to be asked")
        messages = await answered_after(it, workers[1], call)
        assert tokens_of(messages) == [token_at(len(workers[1].submits[0].token_ids) + i) for i in range(3)]
        assert messages[-1].timings.attempts == 2
        assert workers[0].aborts == [workers[0].submits[0].key]


@in_loop
async def test_pictures_are_read_in_a_thread_and_the_message_is_let_go() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    parsed: list[Unread] = []
    threads: list[threading.Thread] = []

    def note_parse(message: bytes) -> Unread:
        parsed.append(Unread(pb.GenerateRequest.FromString(message)))
        return parsed[-1]

    def note_check(*arguments: Any, **fields: Any) -> Any:
        threads.append(threading.current_thread())
        return check_request(*arguments, **fields)

    with (
        patch.object(Unread, "parse", note_parse),
        patch.object(inference_service, "check_request", note_check),
    ):
        async with serving(both, encoder) as it:
            await answered(it, both, it.client.Generate(request(ONE)))
            await collect(it.client.Generate(generate_request()))
    assert [one._request for one in parsed] == [None, None]
    assert [thread is threading.main_thread() for thread in threads] == [False, True]


@in_loop
async def test_without_an_encode_worker_pictures_are_refused_at_once_and_texts_are_not() -> None:
    both = worker("both-0", BOTH)
    async with serving(both) as it:
        status, message = await error_of(it.client.Generate(request(ONE)))
        assert status == "UNAVAILABLE"
        assert message == (
            "no worker can encode now (none is declared); pictures need a group of workers with the phase encode in "
            "the manifest"
        )
        assert not both.submits
        assert len(tokens_of(await collect(it.client.Generate(generate_request())))) == 4


@in_loop
async def test_pictures_wait_for_an_encode_worker_that_is_coming() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    async with serving(both, encoder) as it:
        await it.publish(both.view(), encoder.view(LifecycleState.STARTING))
        call = it.client.Generate(request(ONE))
        await until(lambda: bool(both.submits), "the prefill worker to be asked")
        await until(lambda: bool(machine(it).encodes.wanted), "pictures to be wanted")
        assert not encoder.encodes
        await it.publish(both.view(), encoder.view())
        await answered(it, both, call)


@in_loop
async def test_pictures_fail_when_the_last_encode_worker_has_failed() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    encoder.answer_encode = silent
    async with serving(both, encoder) as it:
        call = it.client.Generate(request(ONE))
        await until(lambda: bool(encoder.encodes), "the encoder to be told")
        await it.publish(both.view(), encoder.view(LifecycleState.FAILED, "it crashed 5 times"))
        status, message = await error_of(call)
        assert status == "UNAVAILABLE"
        assert "no worker can encode now (e-0 is failed: it crashed 5 times)" in message


@in_loop
async def test_a_lost_prefill_worker_has_its_pictures_encoded_for_the_next_one() -> None:
    workers, encoder = [worker(f"both-{i}", BOTH) for i in range(2)], worker("e-0", ENCODE)
    encoder.answer_encode = silent
    async with serving(*workers, encoder) as it:
        call = it.client.Generate(request(ONE))
        await until(lambda: bool(encoder.encodes), "the encoder to be told")
        first = encoder.encodes[0]
        encoder.answer_encode = lambda encode: [encoder.encoded(encode)]
        assert first.prefill_worker == "both-0"
        await workers[0].die()
        await until(lambda: first.key in encoder.aborts, "the abort of the first shard")
        # What is still said of it is of no use to anybody.
        encoder.say(encoder.encoded(first))
        messages = await answered_after(it, workers[1], call)
        assert encoder.encodes[1].prefill == workers[1].submits[0].key
        assert encoder.encodes[1].prefill_address == workers[1].address
        assert messages[-1].timings.attempts == 2
        assert [shard.problem for shard in messages[-1].timings.encodes] == ["given up", ""]


@in_loop
async def test_a_worker_of_all_phases_that_is_lost_is_replaced_in_all_of_them() -> None:
    workers = [worker(f"all-{i}", ENCODE | BOTH) for i in range(2)]
    for one in workers:
        one.answer_encode = silent
    async with serving(*workers) as it:
        call = it.client.Generate(request(ONE, TWO))
        await until(lambda: len(tiles_of(*workers)) == 2 * NUM_TILES, "both to be told")
        first = workers[1].encodes[0]
        workers[1].answer_encode = lambda encode: [workers[1].encoded(encode)]
        await workers[0].die()
        await until(lambda: first.key in workers[1].aborts, "the abort of what was for the lost one")
        await answered_after(it, workers[1], call)
        assert workers[1].encodes[-1].prefill == workers[1].submits[0].key


@in_loop
async def test_embeddings_that_were_dropped_are_encoded_again() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    async with serving(both, encoder) as it:
        call = it.client.Generate(request(ONE))
        await until_encoded(it)
        both.say(ImagesWanted(both.submits[0].key, (1, 2)))
        await until(lambda: len(machine(it).encodes.records) == 2, "two tiles to be wanted again")
        await answered(it, both, call)
        assert (encoder.encodes[1].tile_lo, encoder.encodes[1].tile_hi) == (1, 3)


async def answered_after(it: Gateway, prefill: FakeWorker, call: Any) -> list[pb.GenerateResponse]:
    """As `answered`, where an earlier attempt left shards that have not ended."""
    await until(lambda: machine(it).times.images_encoded_at_s is not None, "the pictures to be encoded")
    prefill.go_on()
    return await collect(call)


@in_loop
async def test_a_client_that_leaves_ends_the_encoding() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    encoder.answer_encode = silent
    async with serving(both, encoder) as it:
        call = it.client.Generate(request(ONE, TWO))
        await until(lambda: len(encoder.encodes) == 2, "the encoder to be told")
        call.cancel()
        await until(lambda: len(encoder.aborts) == 2, "the encoder's aborts")
        assert encoder.aborts == [encode.key for encode in encoder.encodes]
        await until(lambda: both.aborts == [both.submits[0].key], "the prefill worker's abort")


@in_loop
async def test_a_deadline_ends_the_encoding() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    encoder.answer_encode = silent
    async with serving(both, encoder, config=replace(CONFIG, request_timeout_s=2.0)) as it:
        status, message = await error_of(it.client.Generate(request(ONE)))
        assert (status, message) == (
            "DEADLINE_EXCEEDED",
            "the deadline passed in state prefill, with 0 tokens delivered",
        )
        assert encoder.encodes[0].timeout_s <= 2.0
        await until(lambda: len(encoder.aborts) == 1, "the encoder's abort")


@in_loop
async def test_a_deadline_that_passes_without_an_encoder_says_so() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    async with serving(both, encoder, config=replace(CONFIG, request_timeout_s=2.0)) as it:
        await it.publish(both.view(), encoder.view(LifecycleState.STARTING, "loads its weights"))
        status, message = await error_of(it.client.Generate(request(ONE)))
        assert status == "DEADLINE_EXCEEDED"
        assert message.endswith("no worker can encode now (e-0 is starting: loads its weights)")


@in_loop
async def test_the_gateway_holds_so_many_bytes_of_pictures_and_no_more() -> None:
    both, encoder = worker("both-0", BOTH), worker("e-0", ENCODE)
    encoder.answer_encode = silent
    config = replace(CONFIG, max_image_bytes=2 * in_message(ONE) + 10)
    async with serving(both, encoder, config=config) as it:
        first = it.client.Generate(request(ONE, ONE))
        await until(lambda: len(encoder.encodes) == 2, "the first request")
        status, message = await error_of(it.client.Generate(request(TWO)))
        assert status == "RESOURCE_EXHAUSTED"
        assert message == (
            f"the request brings pictures of {in_message(TWO)} bytes, and requests that are here have "
            f"{2 * in_message(ONE)} of {2 * in_message(ONE) + 10} (gateway.maxImageMiB); try again later"
        )
        assert len(tokens_of(await collect(it.client.Generate(generate_request())))) == 4
        first.cancel()
        await until(lambda: len(encoder.aborts) == 2, "the first request to be gone")
        # A request that is refused for what it says gives its room back as well.
        for _ in range(3):
            assert (await error_of(it.client.Generate(request(b"no picture"))))[0] == "INVALID_ARGUMENT"
        encoder.answer_encode = lambda encode: [encoder.encoded(encode)]
        await answered(it, both, it.client.Generate(request(TWO)))
