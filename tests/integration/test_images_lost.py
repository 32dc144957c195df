"""Requests with pictures when something breaks: bad files, workers that go, clients that leave."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kvtransfer.client import KvSender
from kvtransfer.errors import TransferEnded
from kvtransfer.session import TransferReport
from protos import inference_pb2 as pb
from tests.support.both_shapes import view
from tests.support.gateway import error_of
from tests.support.hf_folder import write_hf_folder
from tests.support.image_shapes import SHAPES, ServedImages, image_request, served
from tests.support.pictures import picture
from tests.support.tiny_vision_models import write_vision_folder
from tests.support.waiting import until
from tests.support.worker_client import running_worker, worker_spec
from workers.api import Phase, WorkerState
from workers.embeddings import encoding
from workers.embeddings.encode_work import EncodeWork


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_vision_folder(folder)
    return folder


def run(model: Path, shape: str, scenario: Callable[[ServedImages], Awaitable[None]], **engine: int) -> None:
    async def main() -> None:
        async with served(model, SHAPES[shape], **engine) as it:
            await scenario(it)
            await it.check_invariants()

    asyncio.run(main())


GOOD = picture(1)
BAD = {
    "truncated": (GOOD[: len(GOOD) // 2], "INVALID_ARGUMENT"),
    "text": (b"a text, and no picture\n" * 9, "INVALID_ARGUMENT"),
    "empty": (b"", "INVALID_ARGUMENT"),
}


def test_a_bad_picture_fails_its_request_alone(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        good = image_request("<image> what is it?", GOOD)
        expected = await it.tokens(good)
        for name, (data, status) in BAD.items():
            bad = image_request("<image> and <image>", GOOD, data)
            (failed, tokens) = await asyncio.gather(
                error_of(it.gateway.client.Generate(bad)), it.tokens(good)
            )
            assert failed[0] == status, (name, failed)
            assert "image 2" in failed[1], failed
            assert tokens == expected

    run(model, "E+P+D", scenario)


def test_a_file_damaged_behind_its_header_is_told_from_the_encoder(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        good = picture(3, 64, 64)
        # The header is whole; the compressed pixels are not.
        damaged = good[:60] + bytes(40) + good[100:]
        status, message = await error_of(
            it.gateway.client.Generate(image_request("<image> what is it?", damaged))
        )
        assert status == "INVALID_ARGUMENT"
        assert "could not encode" in message

    run(model, "E+P+D", scenario)


def test_ten_thousand_pictures_are_refused(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        request = image_request("<image>" * 10_000, *[b"x"] * 10_000)
        status, message = await error_of(it.gateway.client.Generate(request))
        assert status == "INVALID_ARGUMENT"
        assert "10000 pictures" in message

    run(model, "E+P+D", scenario)


def test_an_encode_worker_that_is_lost_costs_its_shard_and_not_the_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(it: ServedImages) -> None:
        request = image_request("<image>" * 8, *[picture(seed) for seed in range(40, 48)])
        first, second = it.with_phase(Phase.ENCODE)
        assert first.worker.images is not None
        assert first.worker.images._encoding is not None
        # Never done with a batch.
        hang = asyncio.Event()

        async def encode(*_: object) -> None:
            hang.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(first.worker.images._encoding.loop, "encode", encode)
        asked = asyncio.create_task(it.tokens(request))
        await hang.wait()
        # The view no longer has it, as when its process is gone.
        await it.gateway.publish(*(view(one) for one in it.workers if one is not first))
        assert len(await asked) == 12
        counts = second.worker.status().embeddings
        # The other one's pictures beside its own.
        assert counts.num_tiles_encoded > 0

    run(model, "2E+2P+D", scenario)


@dataclass(slots=True)
class Loss:
    """What became of a picture in two shards when the first encode worker is lost while it sends its own."""

    first_tiles: set[int] = field(default_factory=set)
    #: How the second worker sent what the first had; None: it was not needed.
    reports: list[TransferReport | None] = field(default_factory=list)
    #: What the first worker was sending, which nobody ends when a process is gone.
    sending: list[asyncio.Task[TransferReport | None]] = field(default_factory=list)


async def lose_while_sending(it: ServedImages, monkeypatch: pytest.MonkeyPatch, how_far: str) -> Loss:
    """how_far: "committed" or "granted", what the first worker comes to. What else the second has waits for the rest."""
    first, second = (one.worker.images._encoding for one in it.with_phase(Phase.ENCODE) if one.worker.images)
    assert first is not None
    assert second is not None
    loss, has_sent, is_made_good = Loss(), asyncio.Event(), asyncio.Event()
    sends = {encoding: encoding._send for encoding in (first, second)}
    hosts = [one.worker.images.host for one in it.with_phase(Phase.PREFILL) if one.worker.images]

    async def send_of_first(work: EncodeWork) -> TransferReport | None:
        loss.first_tiles.add(work.encode.first_tile)
        loss.sending.append(asyncio.create_task(sends[first](work)))
        if how_far == "committed":
            await loss.sending[0]
        else:
            await until(lambda: any(host and host.receiving.num_leases for host in hosts), "a lease")
        has_sent.set()
        hangs: asyncio.Future[TransferReport | None] = asyncio.Future()
        return await hangs

    async def send_of_second(work: EncodeWork) -> TransferReport | None:
        if work.encode.first_tile not in loss.first_tiles:
            await is_made_good.wait()
            return await sends[second](work)
        loss.reports.append(await sends[second](work))
        is_made_good.set()
        return loss.reports[-1]

    monkeypatch.setattr(first, "_send", send_of_first)
    monkeypatch.setattr(second, "_send", send_of_second)
    asked = asyncio.create_task(it.tokens(image_request("<image>", picture(60))))
    await has_sent.wait()
    # The view no longer has it, as when its process is gone.
    await it.gateway.publish(*(view(one) for one in it.workers if one is not it.workers[0]))
    assert len(await asked) == 12
    return loss


def test_an_encode_worker_that_is_lost_before_it_tells_that_it_has_sent_costs_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(it: ServedImages) -> None:
        loss = await lose_while_sending(it, monkeypatch, "committed")
        assert loss.reports == [None]

    run(model, "2E+2P+D", scenario)


def test_an_encode_worker_that_is_lost_in_a_transfer_does_not_stop_the_next_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_first: list[object] = []

    class Endless(KvSender):
        """Of the first worker: nothing says that all was sent."""

        def prefill_finished(self, token_ids: Sequence[int]) -> None:
            if self._session._host not in of_first:
                super().prefill_finished(token_ids)

    monkeypatch.setattr(encoding, "KvSender", Endless)

    async def scenario(it: ServedImages) -> None:
        images = it.workers[0].worker.images
        assert images is not None
        of_first.append(images._encode_host)
        loss = await lose_while_sending(it, monkeypatch, "granted")
        assert len(loss.reports) == 1
        assert loss.reports != [None]
        with pytest.raises(TransferEnded, match="a later attempt brings them"):
            await loss.sending[0]

    run(model, "2E+2P+D", scenario)


def test_a_client_that_leaves_frees_all(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        for _ in range(5):
            request = image_request("<image>" * 4, *[picture(seed) for seed in range(4)], max_tokens=200)
            call = it.gateway.client.Generate(request)
            reading = asyncio.create_task(call.read())
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        (encoder,) = it.with_phase(Phase.ENCODE)
        await until(lambda: encoder.worker.status().embeddings.num_encodes_running == 0, "no encode")

    run(model, "E+P+D", scenario)


def test_a_deadline_ends_a_request_that_waits_for_its_pictures(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(it: ServedImages) -> None:
        (encoder,) = it.with_phase(Phase.ENCODE)
        assert encoder.worker.images is not None
        assert encoder.worker.images._encoding is not None

        async def encode(*_: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(encoder.worker.images._encoding.loop, "encode", encode)
        call = it.gateway.client.Generate(image_request("<image> what?", GOOD), timeout=1.0)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(model, "E+P+D", scenario)


def test_pictures_that_never_fit_are_refused_at_once(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        request = image_request("<image>" * 4, *[picture(seed) for seed in range(4)])
        status, message = await error_of(it.gateway.client.Generate(request))
        assert status == "INVALID_ARGUMENT"
        assert "imageCacheMiB" in message

    run(model, "E+P+D", scenario, image_cache_bytes=3 * 16 * 64 * 4)


def test_a_text_model_takes_no_pictures(tmp_path: Path) -> None:
    write_hf_folder(tmp_path, "llama")

    async def main() -> None:
        async with served(tmp_path, SHAPES["E+PD"][1:]) as it:
            status, message = await error_of(it.gateway.client.Generate(image_request("what?", GOOD)))
            assert status == "INVALID_ARGUMENT"
            assert "takes no pictures" in message

    asyncio.run(main())


def test_an_encode_worker_for_a_text_model_says_so(tmp_path: Path) -> None:
    write_hf_folder(tmp_path, "llama")

    async def main() -> None:
        spec = replace(worker_spec(tmp_path), phases=frozenset({Phase.ENCODE}))
        async with running_worker(spec, is_ready=False) as worker:
            await worker.wait_for_state(WorkerState.FAILED)
            assert "no pictures" in worker.worker.status().message

    asyncio.run(main())


def test_an_unknown_part_of_a_message_is_refused(model: Path) -> None:
    async def scenario(it: ServedImages) -> None:
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", parts=[pb.ContentPart()])])
        status, message = await error_of(it.gateway.client.Generate(pb.GenerateRequest(chat=chat)))
        assert status == "INVALID_ARGUMENT"
        assert "parts[0]" in message

    run(model, "EPD", scenario)
