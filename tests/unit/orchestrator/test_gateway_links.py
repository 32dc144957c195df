"""What the gateway learns of workers: views, models, links that open and break."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from orchestrator.control.view import WorkerView
from orchestrator.gateway import worker_link
from protos import control_pb2
from protos import inference_pb2 as pb
from tests.support.fake_worker import (
    BOTH,
    DECODE,
    ENCODE,
    PREFILL,
    FakeWorker,
    byte_model,
    running,
    without_byte_level,
)
from tests.support.gateway import (
    collect,
    error_of,
    gateway,
    generate_request,
    run,
    tokens_of,
)
from tests.support.waiting import BOUND_S, until
from workers.api import Abort, Command, Encode, Event, KvEvent, ModelInfo, RequestId, RequestKey, WorkerId


class Listener:
    """Implements LinkListener; keeps why links broke."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    async def model_found(self, worker: WorkerView, model: ModelInfo) -> None:
        pass

    def link_opened(self, link: worker_link.WorkerLink) -> None:
        pass

    def link_broke(self, link: worker_link.WorkerLink, reason: str) -> None:
        self.reasons.append(reason)

    def events_came(
        self, link: worker_link.WorkerLink, events: Sequence[Event], came_at_s: float | None = None
    ) -> None:
        pass

    def cache_changed(self, link: worker_link.WorkerLink, events: Sequence[KvEvent]) -> None:
        pass


def test_model_info_comes_from_the_workers() -> None:
    async def scenario() -> None:
        loading = FakeWorker("both-0", BOTH)
        async with running(loading), gateway() as it:
            with pytest.raises(grpc.aio.AioRpcError, match="no worker has loaded the model yet") as caught:
                await it.client.GetModelInfo(pb.GetModelInfoRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            status, message = await error_of(it.client.Generate(generate_request()))
            assert (status, "no controller has published" in message) == ("UNAVAILABLE", True)
            await it.use(loading)
            assert await it.client.GetModelInfo(pb.GetModelInfoRequest()) == pb.GetModelInfoResponse(
                model="tiny",
                architecture="llama",
                max_context_tokens=512,
                vocab_size=259,
                eos_token_ids=[2],
                has_chat_template=True,
                model_digest="abc",
            )

    run(scenario)


def test_a_model_that_changes_is_learnt_again() -> None:
    async def scenario() -> None:
        async with gateway(FakeWorker("both-0", BOTH)) as it:
            model = byte_model(model_digest="def", max_context_tokens=100)
            new = FakeWorker("both-0", BOTH, model, incarnation=2)
            async with running(new):
                await it.use(new)
                info = await it.client.GetModelInfo(pb.GetModelInfoRequest())
                assert (info.model_digest, info.max_context_tokens) == ("def", 100)

    run(scenario)


def test_the_smallest_kv_cache_bounds_what_is_taken() -> None:
    async def scenario() -> None:
        small = FakeWorker("p-0", PREFILL, byte_model(max_sequence_tokens=32))
        async with gateway(small, FakeWorker("d-0", DECODE)) as it:
            status, message = await error_of(it.client.Generate(generate_request(max_tokens=30)))
            assert status == "RESOURCE_EXHAUSTED"
            assert "needs KV for 33 with the output, and a worker's KV cache holds 32" in message

    run(scenario)


def test_a_worker_whose_model_is_not_loaded_or_not_usable_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_link, "MAX_BACKOFF_S", 0.02)

    async def scenario() -> None:
        loading = FakeWorker("both-0", BOTH)
        loading.model = None
        broken = FakeWorker("both-1", BOTH, byte_model(tokenizer_json=without_byte_level()))
        async with running(loading, broken), gateway() as it:
            await it.publish(loading.view(), broken.view())
            assert not await it.is_serving()
            loading.model = byte_model()
            await until(lambda: it.linked() == {("both-0", 1)}, "the worker that has loaded")
            await collect(it.client.Generate(generate_request()))
            assert broken.num_sessions == 0

    run(scenario)


def test_another_incarnation_behind_an_address_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "MAX_BACKOFF_S", 0.02)

    async def scenario() -> None:
        new = FakeWorker("both-0", BOTH, incarnation=2)
        async with running(new), gateway() as it:
            await it.publish(replace(new.view(), incarnation=1))
            await until(lambda: new.num_status_calls >= 2, "two attempts to open the link")
            assert (it.linked(), new.num_sessions) == (set(), 0)
            assert not await it.is_serving()
            await it.use(new)
            await collect(it.client.Generate(generate_request()))

    run(scenario)


def test_another_worker_behind_an_address_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "MAX_BACKOFF_S", 0.02)

    async def scenario() -> None:
        # The port of p-0, whose process has gone, and both are at their first incarnation.
        decode = FakeWorker("d-0", DECODE)
        async with running(decode), gateway() as it:
            await it.publish(replace(decode.view(), worker_id=WorkerId("p-0"), phases=PREFILL))
            await until(lambda: decode.num_status_calls >= 2, "two attempts to open the link")
            assert (it.linked(), decode.num_sessions) == (set(), 0)

    run(scenario)


def test_a_proxy_for_the_web_is_not_asked_for_the_way_to_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")

    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        await both.start()
        link = worker_link.WorkerLink(both.view(), listener := Listener())
        task = asyncio.create_task(link.run())
        try:
            await until(lambda: link.is_open, "the link")
            assert listener.reasons == []
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await both.die()

    run(scenario)


def test_a_worker_that_is_gone_bounds_nothing_any_more() -> None:
    async def scenario() -> None:
        both, small = (
            FakeWorker("both-0", BOTH),
            FakeWorker("both-1", BOTH, byte_model(max_sequence_tokens=32)),
        )
        async with gateway(both, small) as it:
            asked = generate_request(max_tokens=30)
            assert (await error_of(it.client.Generate(asked)))[0] == "RESOURCE_EXHAUSTED"
            await it.use(both)
            assert len(tokens_of(await collect(it.client.Generate(asked)))) == 30

    run(scenario)


def encode(attempt: int, image: bytes = b"a picture") -> Encode:
    key = RequestKey(RequestId("r"), attempt)
    return Encode(key, image, "image/png", 1, 1, 0, 1, (b"k",), key, 0, WorkerId("p"), "p:1", 1, 60.0)


@asynccontextmanager
async def linked(worker: FakeWorker) -> AsyncIterator[tuple[worker_link.WorkerLink, Listener]]:
    """A link to this worker."""
    link = worker_link.WorkerLink(worker.view(), listener := Listener())
    task = asyncio.create_task(link.run())
    try:
        await until(lambda: link.is_open, "the link")
        yield link, listener
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_an_encode_that_is_aborted_before_it_left_never_leaves() -> None:
    async def scenario() -> None:
        encoder = FakeWorker("e-0", ENCODE)
        async with running(encoder), linked(encoder) as (link, _):
            for attempt in (1, 2, 3):
                link.send(encode(attempt))
            assert link.num_unsent_bytes == 3 * len(b"a picture")
            link.send(Abort(RequestKey(RequestId("r"), 2)))
            assert link.num_unsent_bytes == 2 * len(b"a picture")
            await until(lambda: len(encoder.encodes) == 2, "the other two")
            link.send(Abort(RequestKey(RequestId("r"), 3)))
            await until(lambda: bool(encoder.aborts), "an abort of one that has left")
            assert [one.key.attempt for one in encoder.encodes] == [1, 3]
            assert [key.attempt for key in encoder.aborts] == [3]
            assert link.num_unsent_bytes == 0

    run(scenario)


def test_commands_pass_pictures_that_are_being_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()
    serialised = worker_link._serialised

    def slow(commands: Sequence[Command], incarnation: int) -> bytes:
        if isinstance(commands[0], Encode):
            assert threading.current_thread() is not threading.main_thread()
            assert may_go_on.wait(BOUND_S)
        return serialised(commands, incarnation)

    monkeypatch.setattr(worker_link, "_serialised", slow)

    async def scenario() -> None:
        encoder = FakeWorker("e-0", ENCODE)
        async with running(encoder), linked(encoder) as (link, _):
            try:
                link.send(encode(1))
                link.send(encode(2))
                others = [RequestKey(RequestId("other"), i) for i in range(100)]
                for key in others:
                    link.send(Abort(key))
                await until(lambda: len(encoder.aborts) == 100, "the aborts")
                assert encoder.aborts == others
                assert not encoder.encodes
                # The first is being made ready: it does not leave for all that.
                link.send(Abort(encode(1).key))
            finally:
                may_go_on.set()
            await until(lambda: bool(encoder.encodes), "the second")
            assert [one.key.attempt for one in encoder.encodes] == [2]
            assert len(encoder.aborts) == 100

    run(scenario)


def test_a_worker_that_leaves_its_pictures_unread_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "MAX_QUEUED_BYTES", 25)

    async def scenario() -> None:
        encoder = FakeWorker("e-0", ENCODE)
        async with running(encoder), linked(encoder) as (link, listener):
            for attempt in (1, 2, 3):
                link.send(encode(attempt, b"ten bytes."))
            await until(lambda: bool(listener.reasons), "the link to end")
            assert listener.reasons == ["20 bytes of pictures are unread"]
            assert link.num_unsent_bytes == 0

    run(scenario)


def test_a_view_that_is_older_than_the_present_one_is_ignored() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both) as it:
            await it.publish(both.view(), epoch=3, version=5)
            await it.publish(epoch=3, version=4)
            await it.publish(epoch=2, version=99)
            answer = await it.control.GetView(control_pb2.GetViewRequest())
            assert (answer.view.controller_epoch, answer.view.version) == (3, 5)
            await collect(it.client.Generate(generate_request()))
            await it.publish(epoch=4, version=1)
            answer = await it.control.GetView(control_pb2.GetViewRequest())
            assert len(answer.view.workers) == 0
            assert it.linked() == set()

    run(scenario)


def test_without_a_controller_serving_goes_on_with_the_last_view() -> None:
    async def scenario() -> None:
        async with gateway(FakeWorker("both-0", BOTH)) as it:
            # Nobody publishes any more.
            for _ in range(3):
                await collect(it.client.Generate(generate_request()))
            assert await it.is_serving()

    run(scenario)


def test_a_stream_that_breaks_is_opened_again() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both) as it:
            await until(lambda: both.num_sessions == 1, "the first session")
            both.break_session()
            await until(lambda: both.num_sessions == 2, "a second session")
            assert len(tokens_of(await collect(it.client.Generate(generate_request())))) == 4

    run(scenario)


def test_a_worker_that_leaves_its_commands_unread_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "MAX_QUEUED_COMMANDS", 3)

    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with gateway(both) as it:
            # Sent within one turn of the loop, so that the writer has no turn in between.
            (link,) = it.dispatcher._links.open_links()
            for _ in range(4):
                link.send(Abort(RequestKey(RequestId("nobody"), 1)))
            await until(lambda: both.num_sessions == 2, "the stream to be opened anew")
            await until(lambda: link.is_open, "the link")
            await collect(it.client.Generate(generate_request()))

    run(scenario)
