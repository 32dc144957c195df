"""The bridge between engine and transfers: blocks that cross it are never lost, whoever gives up when."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch

from kvtransfer.client import fetch
from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.counts import TransferCounts
from kvtransfer.errors import ReservationRefused as Refusal
from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.transports.choice import TransportOpener
from tests.support.kvtransfer_fakes import FakeKvHost, QueueChannel
from tests.support.waiting import until
from workers.api import KvDirection, RequestId, RequestKey
from workers.engine.messages import (
    BlocksReserved,
    CachedFound,
    CancelReservation,
    CommitTransfer,
    FindCached,
    KvReady,
    Message,
    ReleaseTransfer,
    ReservationRefused,
    ReserveBlocks,
    StartTransfer,
    TransferFailed,
)
from workers.kv_host import EngineKvHost

LAYOUT = KvLayout(
    "d", "float32", block_size=4, num_layers=2, num_kv_heads=1, head_dim=2, position_encoding=""
)
NUM_BLOCKS = 6
NOW_S = 50.0


class Bridge:
    """A host whose engine only notes what it is told."""

    def __init__(self) -> None:
        self.posted: list[Message] = []
        self.kv_cache = torch.zeros(2, 2, NUM_BLOCKS, 4, 1, 2)
        self.host = EngineKvHost(
            HostPool(self.kv_cache, LAYOUT), 3, self.posted.append, KvTransferConfig(), clock=lambda: NOW_S
        )

    async def reserving(self, max_tokens: int = 8) -> "asyncio.Task[object]":
        """A reservation of which the engine has been told."""
        task = asyncio.create_task(self.host.reserve("t", num_tokens=5, max_tokens=max_tokens, timeout_s=7.0))
        await asyncio.sleep(0)
        assert self.posted.pop() == ReserveBlocks("t", 5, max_tokens, NOW_S + 7.0)
        return task


def run(scenario: Callable[[Bridge], Awaitable[None]]) -> None:
    async def main() -> None:
        bridge = Bridge()
        await scenario(bridge)
        await bridge.host.close("the test has ended")
        bridge.host.check_invariants()

    asyncio.run(main())


def test_blocks_of_the_engine_are_the_answer() -> None:
    async def scenario(bridge: Bridge) -> None:
        task = await bridge.reserving()
        bridge.host.handle(BlocksReserved("t", (4, 1)))
        assert await task == (4, 1)
        bridge.host.commit("t", [4, 1], [9], b"digest")
        assert bridge.posted == [CommitTransfer("t", (4, 1), (9,), b"digest")]

    run(scenario)


def test_refusal_of_the_engine_is_raised() -> None:
    async def scenario(bridge: Bridge) -> None:
        task = await bridge.reserving()
        bridge.host.handle(ReservationRefused("t", "full", is_retryable=True))
        with pytest.raises(Refusal, match="full") as caught:
            await task
        assert caught.value.retryable

    run(scenario)


def test_cancelled_before_the_answer_returns_the_blocks_that_come_anyway() -> None:
    async def scenario(bridge: Bridge) -> None:
        task = await bridge.reserving()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        bridge.host.handle(BlocksReserved("t", (4, 1)))
        cancelled, released = bridge.posted
        assert cancelled == CancelReservation("t")
        assert isinstance(released, ReleaseTransfer)
        assert released.block_ids == (4, 1)
        bridge.host.handle(ReservationRefused("t", "late", is_retryable=True))

    run(scenario)


@pytest.mark.parametrize("is_cancelled_first", [True, False])
def test_cancelled_in_the_same_turn_as_the_answer_returns_the_blocks_once(is_cancelled_first: bool) -> None:
    async def scenario(bridge: Bridge) -> None:
        task = await bridge.reserving()
        if is_cancelled_first:
            task.cancel()
        bridge.host.handle(BlocksReserved("t", (4, 1)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        released = [message for message in bridge.posted if isinstance(message, ReleaseTransfer)]
        assert [message.block_ids for message in released] == [(4, 1)]

    run(scenario)


def test_second_request_of_a_transfer_is_refused_and_the_first_goes_on() -> None:
    async def scenario(bridge: Bridge) -> None:
        task = await bridge.reserving()
        with pytest.raises(Refusal, match="asked already"):
            await bridge.host.reserve("t", num_tokens=5, max_tokens=8, timeout_s=1.0)
        bridge.host.handle(BlocksReserved("t", (4, 1)))
        assert await task == (4, 1)

    run(scenario)


def test_too_few_blocks_of_an_earlier_request_are_returned() -> None:
    async def scenario(bridge: Bridge) -> None:
        task = await bridge.reserving(max_tokens=9)
        bridge.host.handle(BlocksReserved("t", (4, 1)))
        with pytest.raises(Refusal, match="again too soon"):
            await task
        (released,) = bridge.posted
        assert isinstance(released, ReleaseTransfer)

    run(scenario)


def test_transfer_that_starts_after_the_end_fails_and_returns_its_blocks() -> None:
    async def scenario(bridge: Bridge) -> None:
        await bridge.host.close("stopping")
        key = RequestKey(RequestId("r"), 1)
        bridge.host.handle(StartTransfer(key, "s", "127.0.0.1:1", 1, (2, 3), 8, 12, 5.0, b""))
        bridge.host.handle(KvReady("s", 0, 1, 0, 4))
        await bridge.host.close("stopping")
        released, failed = bridge.posted
        assert isinstance(released, ReleaseTransfer)
        assert released.block_ids == (2, 3)
        assert isinstance(failed, TransferFailed)
        assert "stopping" in failed.reason

    run(scenario)


def test_what_others_fetch_tells_how_fast_the_way_to_them_is() -> None:
    async def scenario(bridge: Bridge) -> None:
        channel = QueueChannel(bridge.host.receiving.serve)
        asker = FakeKvHost(LAYOUT, num_blocks=NUM_BLOCKS, incarnation=6)
        counts = TransferCounts()
        running = asyncio.create_task(
            fetch(
                asker,
                channel,
                TransportOpener(TransportChoice.GRPC),
                transfer_id="f",
                block_hashes=(b"a" * 16, b"b" * 16),
                min_tokens=4,
                timeout_s=20.0,
                config=KvTransferConfig(),
                counts=counts,
                address="asker:1",
            )
        )
        await until(
            lambda: FindCached("f", (b"a" * 16, b"b" * 16), 4) in bridge.posted, "the engine is asked"
        )
        assert bridge.host.link_bytes_per_s("asker:1") is None
        bridge.host.handle(CachedFound("f", (2, 5), 8, b"b" * 16))
        assert (await running)[0] == 8
        await until(lambda: bridge.host.counts().num_sent == 1, "the commit is heard of")
        assert bridge.host.link_bytes_per_s("asker:1") is not None
        assert bridge.host.counts().num_bytes_sent == counts.num_bytes_received > 0
        [peer] = bridge.host.peers()
        assert (peer.address, peer.direction, peer.num_transfers) == ("asker:1", KvDirection.SENDING, 1)
        asker.end_sequence("f")
        asker.close()
        await channel.close()

    run(scenario)
