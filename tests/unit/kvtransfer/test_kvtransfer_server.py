"""What the receiving end does with streams before there is a transfer, while a sender's pool is opened, and between chunks."""

import asyncio
import sys
from collections.abc import Sequence

import pytest

from kvtransfer import driver, server
from kvtransfer.client import KvSender
from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.digest import token_digest
from kvtransfer.errors import TransferAborted, TransferEnded, TransferRefused
from kvtransfer.frames import Chunk, Ended, Granted, Refused, Reserve
from kvtransfer.kv_range import KvRange
from kvtransfer.pool import MappedPool, PoolOffer
from kvtransfer.server import KvTransferServer
from kvtransfer.wire import KIND_CHUNK, decode, encode
from tests.support.kvtransfer_fakes import LAYOUT, FakeKvHost, QueueChannel
from tests.support.waiting import in_loop, until

CONFIG = KvTransferConfig(lease_s=20.0, resume_s=0.5)
REQUEST = Reserve("t1", LAYOUT, 4, 4, incarnation=1, timeout_s=20.0, codec=CodecId.FP8)


class HeldPools:
    """Opens no pool before it is let."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        self.may_open = asyncio.Event()

    async def open(self, _offers: Sequence[PoolOffer]) -> tuple[str, MappedPool | None, str]:
        self.is_asked.set()
        await self.may_open.wait()
        return "grpc", None, "none is offered"

    def close(self, _pool: MappedPool) -> None:
        raise AssertionError("none was opened")


def sender_to(channel: QueueChannel, host: FakeKvHost) -> KvSender:
    return KvSender(
        host,
        channel,
        transfer_id="t1",
        block_ids=host.take("t1", 4),
        num_tokens=4,
        max_tokens=4,
        token_digest=token_digest(range(4)),
        peer_incarnation=1,
        timeout_s=20.0,
        config=CONFIG,
    )


async def ended(channel: QueueChannel, receiver: KvTransferServer) -> None:
    await receiver.close("the test is over")
    await channel.close()


@in_loop
async def test_streams_that_say_nothing_are_few_and_soon_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_NEW_STREAMS", 3)
    monkeypatch.setattr(server, "FIRST_FRAME_S", 0.2)
    receiver = KvTransferServer(FakeKvHost(), CONFIG)
    channel = QueueChannel(receiver.serve)
    silent = [channel.open() for _ in range(3)]
    await until(lambda: receiver.num_transfers == 3, "they are served")
    one_more = await channel.open().read()
    assert one_more is not None
    refusal = Refused("3 streams have not said what they are for; open another later", retryable=True)
    assert decode(one_more) == refusal
    for stream in silent:
        message = await stream.read()
        assert message is not None
        assert decode(message) == Ended("nothing was said")
    # They are forgotten: others are listened to.
    sender = sender_to(channel, FakeKvHost(incarnation=2))
    running = asyncio.create_task(sender.run())
    await asyncio.wait_for(sender.wait_granted(), 10)
    sender.abort("the test is over")
    with pytest.raises(TransferAborted):
        await running
    await ended(channel, receiver)


@in_loop
async def test_a_sender_that_is_not_listened_to_is_told_that_it_may_be_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MAX_NEW_STREAMS", 0)
    receiver = KvTransferServer(FakeKvHost(), CONFIG)
    channel = QueueChannel(receiver.serve)
    with pytest.raises(TransferRefused, match="have not said what they are for") as caught:
        await sender_to(channel, FakeKvHost(incarnation=2)).run()
    assert caught.value.retryable
    await ended(channel, receiver)


@in_loop
async def test_a_transfer_that_ends_while_a_pool_is_opened_gives_its_blocks_back() -> None:
    host, pools = FakeKvHost(), HeldPools()
    receiver = KvTransferServer(host, CONFIG, pools)
    channel = QueueChannel(receiver.serve)
    running = asyncio.create_task(sender_to(channel, FakeKvHost(incarnation=2)).run())
    await pools.is_asked.wait()
    assert host.num_free < len(host.owners)
    receiver.abort("t1", "not wanted any more")
    with pytest.raises(TransferEnded):
        await running
    await until(lambda: host.num_free == len(host.owners), "its blocks are back")
    assert len(host.releases) == 1
    await ended(channel, receiver)


@in_loop
async def test_what_lies_outside_the_transfer_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[Chunk] = []
    monkeypatch.setattr(driver, "unpack_chunk", lambda chunk, _head_dim: unpacked.append(chunk) or chunk)
    receiver = KvTransferServer(FakeKvHost(), CONFIG)
    channel = QueueChannel(receiver.serve)
    stream = channel.open()
    await stream.write(encode(REQUEST))
    granted = decode(await stream.read() or b"")
    assert isinstance(granted, Granted)
    huge = KvRange(0, 60_000, 0, 2**31)
    chunk = Chunk(granted.lease_id, 1, 0, huge, (0, 2), CodecId.FP8, 0, memoryview(b"little"))
    await stream.write(encode(chunk))
    answer = decode(await stream.read() or b"")
    assert isinstance(answer, Ended)
    assert "chunk 0 holds layers [0, 60000)" in answer.reason
    assert not unpacked
    await stream.close()
    await ended(channel, receiver)


@in_loop
async def test_a_chunk_that_has_arrived_is_held_by_neither_side_while_more_is_waited_for() -> None:
    host = FakeKvHost()
    receiver = KvTransferServer(host, CONFIG)
    channel = QueueChannel(receiver.serve)
    chunks: list[bytes] = []

    def note(message: bytes) -> list[bytes]:
        if message[4] == KIND_CHUNK:
            chunks.append(message)
        return [message]

    def num_holders() -> list[int]:
        return [sys.getrefcount(chunk) for chunk in chunks]

    channel.to_receiver = note
    sender_host = FakeKvHost(incarnation=2)
    sender_host.watched.hides_from = ("in_process",)
    sender = sender_to(channel, sender_host)
    running = asyncio.create_task(sender.run())
    sender.kv_ready(0, 1, 0, 4)
    await until(lambda: len(chunks) == 1, "the chunk is on its way")
    # The list here, the loop over it, and the argument of the count.
    await until(lambda: num_holders() == [3], "nobody else holds the chunk")
    sender.abort("the test is over")
    with pytest.raises(TransferAborted):
        await running
    await ended(channel, receiver)


@in_loop
async def test_a_server_closes_the_pools_that_are_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(server.TransportOpener, "close_all", lambda opener: closed.append(opener))
    host = FakeKvHost()
    await KvTransferServer(host, CONFIG, HeldPools()).close("the test is over")
    assert not closed
    await KvTransferServer(host, CONFIG).close("the test is over")
    assert len(closed) == 1
