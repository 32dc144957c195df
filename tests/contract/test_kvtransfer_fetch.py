"""Cached KV that one worker gets from another: the longest beginning that is known there, whole or not at all."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import pytest
import torch

from kvtransfer import sender as sender_module
from kvtransfer.client import fetch
from kvtransfer.codecs.codec import CodecId
from kvtransfer.counts import TransferCounts
from kvtransfer.errors import (
    DeadlineExceeded,
    LeaseExpired,
    PhasewiseTransferError,
    ProtocolViolation,
    ReservationRefused,
    StreamLost,
    TransferEnded,
)
from kvtransfer.frames import Ack, Chunk, Reserve
from kvtransfer.host import CachedKv
from kvtransfer.layout import KvLayout
from kvtransfer.transports.choice import TransportOpener
from kvtransfer.wire import decode, encode
from tests.support.kvtransfer_ends import CONFIG, kv_of
from tests.support.kvtransfer_fakes import LAYOUT, FakeKvHost, unchanged
from tests.support.kvtransfer_ways import WAYS, Way, transport_of, way_to
from tests.support.nixl_double import nixl_agents
from tests.support.waiting import until

HASHES = tuple(bytes([i]) * 16 for i in range(5))
#: Where the first three blocks of that chain are kept.
KEPT = {HASHES[0]: 9, HASHES[1]: 2, HASHES[2]: 5}
SIZE = LAYOUT.block_size
NUM_BLOCKS = 16


@dataclass
class Fetching:
    """The one that has blocks, and the one that wants them."""

    source: FakeKvHost
    target: FakeKvHost
    way: Way
    counts: TransferCounts = field(default_factory=TransferCounts)

    async def fetch(
        self,
        *,
        min_tokens: int = SIZE,
        timeout_s: float = 20.0,
        transfer_id: str = "f",
        block_hashes: tuple[bytes, ...] = HASHES,
    ) -> tuple[int, str, str]:
        return await fetch(
            self.target,
            self.way.channel,
            TransportOpener(CONFIG.transport),
            transfer_id=transfer_id,
            block_hashes=block_hashes,
            min_tokens=min_tokens,
            timeout_s=timeout_s,
            config=CONFIG,
            counts=self.counts,
            address="asker:1",
        )

    async def begun(self, *, timeout_s: float = 20.0) -> asyncio.Task[tuple[int, str, str]]:
        """A fetch of which some chunks have come, and that gets no further: its acknowledgements are lost."""
        self.way.channel.to_receiver = lambda message: [] if isinstance(decode(message), Ack) else [message]
        running = asyncio.create_task(self.fetch(timeout_s=timeout_s))
        await until(lambda: self.way.channel.num_of(Ack) == CONFIG.credits, "all credits are used")
        assert not running.done()
        return running

    async def both_back(self) -> None:
        """Every block of both is free."""
        await until(
            lambda: self.source.num_free == self.target.num_free == NUM_BLOCKS, "the blocks of both are back"
        )

    async def ended_with(self, *errors: type[PhasewiseTransferError], **more: float) -> str:
        """Its message; the target's blocks are back by then."""
        with pytest.raises(errors) as caught:
            await self.fetch(**more)  # type: ignore[arg-type]
        await until(lambda: self.target.num_free == NUM_BLOCKS, "the target's blocks are back")
        assert not self.target.committed
        return str(caught.value)


@asynccontextmanager
async def hosts(kind: str, layout: KvLayout) -> AsyncIterator[Fetching]:
    transport = transport_of(kind)
    # Chunks that are copied in place are as small as others here: many of little KV.
    small = dict.fromkeys(sender_module.IN_PLACE_BYTES, CONFIG.max_chunk_bytes)
    with nixl_agents() as become_reader, patch.dict(sender_module.IN_PLACE_BYTES, small):
        source = FakeKvHost(
            num_blocks=NUM_BLOCKS, is_shared=transport == "shm", is_in_nixl=transport == "nixl"
        )
        become_reader()
        source.fill(range(NUM_BLOCKS), seed=1)
        source.cached = dict(KEPT)
        target = FakeKvHost(layout, num_blocks=NUM_BLOCKS, incarnation=6)
        async with way_to(kind, [source], source, CONFIG) as way:
            yield Fetching(source, target, way)
            await until(lambda: way.receiver.num_transfers == 0, "nothing is sent any more")
        for transfer_id in list(target.committed):
            target.end_sequence(transfer_id)
        for host in (source, target):
            host.check_all_returned()
            assert host.num_free == NUM_BLOCKS
    source.close()


Run = Callable[..., None]


@pytest.fixture(params=WAYS)
def fetching(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario on one way; at its end all blocks are back and no task is left."""

    def run_it(scenario: Callable[[Fetching], Awaitable[None]], layout: KvLayout = LAYOUT) -> None:
        async def whole() -> None:
            async with asyncio.timeout(60):
                async with hosts(request.param, layout) as it:
                    await scenario(it)
                await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, "all tasks are over")

        asyncio.run(whole())

    return run_it


@pytest.mark.parametrize("num_known", [1, 3])
def test_the_longest_known_beginning_comes(
    fetching: Run, request: pytest.FixtureRequest, num_known: int
) -> None:
    async def scenario(it: Fetching) -> None:
        # The last one is known too, and follows one that is not.
        it.source.cached = {**dict(list(KEPT.items())[:num_known]), HASHES[4]: 7}
        num_tokens, transport, why = await it.fetch()
        assert num_tokens == num_known * SIZE
        assert transport == transport_of(request.node.callspec.params["fetching"])
        assert bool(why) == (transport == "grpc")
        block_ids, token_ids = it.target.committed["f"]
        assert token_ids == ()
        assert it.target.digests["f"] == HASHES[num_known - 1]
        expected = kv_of(it.source, list(KEPT.values())[:num_known], num_tokens)
        assert torch.equal(kv_of(it.target, block_ids, num_tokens), expected)

    fetching(scenario)


def test_fewer_than_are_worth_it_are_not_sent(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        assert "12 tokens are cached" in await it.ended_with(TransferEnded, min_tokens=4 * SIZE)
        it.source.cached = {}
        assert "0 tokens are cached" in await it.ended_with(TransferEnded)
        assert it.way.channel.num_of(Chunk) == 0

    fetching(scenario)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 8}, "blocks are of 4 tokens here, not 8"),
        ({"model_digest": "another"}, "model_digest is 'd1' at the sender and 'another' at the receiver"),
    ],
)
def test_blocks_that_mean_something_else_are_not_taken(
    fetching: Run, change: dict[str, object], reason: str
) -> None:
    async def scenario(it: Fetching) -> None:
        assert reason in await it.ended_with(PhasewiseTransferError)
        assert it.target.num_writes == 0

    fetching(scenario, layout=replace(LAYOUT, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_digest": HASHES[0]}, "other tokens"),
        ({"codec": CodecId.FP8}, "comes packed by fp8"),
        ({"layout": replace(LAYOUT, dtype="float8_e4m3fn")}, "is in float8_e4m3fn, and KV here in float32"),
        (
            {"layout": replace(LAYOUT, weight_dtype="fp8")},
            "weights in fp8, and KV here with weights in others",
        ),
    ],
)
def test_other_kv_than_was_asked_for_is_not_taken(
    fetching: Run, change: dict[str, object], reason: str
) -> None:
    async def scenario(it: Fetching) -> None:
        def lie(message: bytes) -> list[bytes]:
            frame = decode(message)
            if isinstance(frame, Reserve):
                return [encode(replace(frame, **change))]  # type: ignore[arg-type]
            return [message]

        # The one that answers is the sender; this is its end of the way.
        it.way.channel.to_sender = lie
        assert reason in await it.ended_with(PhasewiseTransferError)
        assert it.target.num_writes == 0

    fetching(scenario)


def test_damage_is_asked_for_again(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        damaged: set[int] = set()

        def damage_each_once(message: bytes) -> list[bytes]:
            frame = decode(message)
            if not isinstance(frame, Chunk) or frame.sequence_number in damaged:
                return [message]
            damaged.add(frame.sequence_number)
            return [encode(replace(frame, checksum=frame.checksum ^ 1))]

        it.way.channel.to_sender = damage_each_once
        await it.fetch()
        assert damaged
        num_bytes = 12 * LAYOUT.num_layers * LAYOUT.token_bytes
        got, sent = it.counts, it.way.receiver.counts
        assert (got.num_received, got.num_bytes_received) == (1, num_bytes)
        assert got.num_corrupt_chunks == len(damaged)
        await until(lambda: it.way.receiver.num_transfers == 0, "its sender has heard of the commit")
        assert (sent.num_sent, sent.num_bytes_sent) == (1, num_bytes)
        assert sent.num_resent_chunks == len(damaged)
        block_ids, _ = it.target.committed["f"]
        assert torch.equal(kv_of(it.target, block_ids, 12), kv_of(it.source, list(KEPT.values()), 12))

    fetching(scenario)


def test_the_worker_that_has_them_may_abort(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        held = it.target.take("other", NUM_BLOCKS * SIZE)
        running = asyncio.create_task(it.fetch())
        await until(lambda: it.target.num_waiting == 1, "it waits for blocks")
        it.way.receiver.abort("f", "its blocks are needed")
        with pytest.raises(TransferEnded, match="its blocks are needed"):
            await running
        await until(lambda: it.target.num_waiting == 0, "the reservation is withdrawn")
        it.target.release("other", held, "the test is over")

    fetching(scenario)


def test_it_may_be_cancelled_while_it_waits_for_blocks(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        held = it.target.take("other", NUM_BLOCKS * SIZE)
        running = asyncio.create_task(it.fetch())
        await until(lambda: it.target.num_waiting == 1, "it waits for blocks")
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        await until(lambda: it.target.num_waiting == 0, "the reservation is withdrawn")
        it.target.release("other", held, "the test is over")

    fetching(scenario)


@pytest.mark.parametrize("num_messages", range(0, 12, 2))
def test_cancelled_at_any_message_it_leaves_nothing(fetching: Run, num_messages: int) -> None:
    async def scenario(it: Fetching) -> None:
        running: asyncio.Task[tuple[int, str, str]]

        def cancel_then(message: bytes) -> list[bytes]:
            if it.way.channel.num_messages >= num_messages:
                running.cancel()
            return [message]

        it.way.channel.to_receiver = it.way.channel.to_sender = cancel_then
        running = asyncio.create_task(it.fetch())
        await asyncio.wait([running])
        # It may have been committed before it heard.
        assert running.cancelled() or "f" in it.target.committed
        if running.cancelled() and "f" not in it.target.committed:
            await until(lambda: it.target.num_free == NUM_BLOCKS, "the blocks are back")

    fetching(scenario)


def test_its_time_is_bounded(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        held = it.target.take("other", NUM_BLOCKS * SIZE)
        # Which side's clock is first is open; both know the time.
        with pytest.raises((DeadlineExceeded, TransferEnded, ReservationRefused)):
            await it.fetch(timeout_s=0.3)
        await until(lambda: it.target.num_waiting == 0, "the reservation is withdrawn")
        it.target.release("other", held, "the test is over")

    fetching(scenario)


def test_a_worker_that_never_answers_is_not_waited_for(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        it.way.channel.to_sender = lambda _: []
        await it.ended_with(DeadlineExceeded, StreamLost, timeout_s=0.3)

    fetching(scenario)


def test_a_worker_that_closes_sends_no_more(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        await it.way.receiver.close("shutting down")
        assert "shutting down" in await it.ended_with(TransferEnded, ProtocolViolation)

    fetching(scenario)


def test_all_that_is_known_may_be_just_enough(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        assert (await it.fetch(min_tokens=3 * SIZE))[0] == 3 * SIZE
        assert it.way.channel.num_of(Chunk) == 3 * LAYOUT.num_layers
        await until(lambda: it.way.receiver.num_transfers == 0, "the sender knows that it is over")
        expected = 3 * SIZE * LAYOUT.num_layers * LAYOUT.token_bytes
        assert it.way.receiver.counts.num_bytes_sent == expected

    fetching(scenario)


def test_heads_and_dtype_may_differ(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        await it.fetch()
        block_ids, _ = it.target.committed["f"]
        expected = kv_of(it.source, list(KEPT.values()), 12)[:, :, :, 1:].bfloat16()
        assert torch.equal(kv_of(it.target, block_ids, 12), expected)

    fetching(scenario, layout=replace(LAYOUT, dtype="bfloat16", head_lo=1, head_hi=2))


def test_several_may_be_fetched_at_once(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        chains = {f"f{number}": (bytes([100 + number]) * 16,) for number in range(8)}
        it.source.cached = {chain[0]: block_id for block_id, chain in enumerate(chains.values())}
        await asyncio.gather(
            *(it.fetch(transfer_id=name, block_hashes=chain) for name, chain in chains.items())
        )
        for block_id, name in enumerate(chains):
            block_ids, _ = it.target.committed[name]
            assert torch.equal(kv_of(it.target, block_ids, SIZE), kv_of(it.source, [block_id], SIZE))

    fetching(scenario)


# It fails when a part of it has come.


def test_on_its_way_the_worker_that_has_them_may_abort(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        running = await it.begun()
        it.way.receiver.abort("f", "its blocks are needed")
        # Before anything else runs.
        assert it.source.num_free == NUM_BLOCKS
        with pytest.raises(TransferEnded, match="its blocks are needed"):
            await running
        await it.both_back()
        assert not it.target.committed

    fetching(scenario)


def test_on_its_way_it_may_be_cancelled(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        running = await it.begun()
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        assert it.target.num_free == NUM_BLOCKS
        await it.both_back()

    fetching(scenario)


def test_when_its_stream_breaks_it_ends_and_may_be_tried_again(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        running = await it.begun()
        it.way.channel.break_streams()
        with pytest.raises(StreamLost):
            await running
        await it.both_back()
        assert not it.target.committed
        it.way.channel.to_receiver = unchanged
        assert (await it.fetch())[0] == 3 * SIZE

    fetching(scenario)


def test_when_the_worker_that_has_them_vanishes_it_ends(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        running = await it.begun()
        await it.way.vanish()
        # Its last words may have come through.
        with pytest.raises((StreamLost, TransferEnded)):
            await running
        await it.both_back()
        with pytest.raises(StreamLost):
            await it.fetch(timeout_s=5.0)

    fetching(scenario)


def test_its_time_is_bounded_when_it_gets_no_further(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        running = await it.begun(timeout_s=1.0)
        # Which side's clock is first is open; both know the time.
        with pytest.raises((DeadlineExceeded, LeaseExpired, TransferEnded)):
            await running
        await it.both_back()
        assert not it.target.committed

    fetching(scenario)


def test_what_is_always_damaged_ends_it(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        def damage(message: bytes) -> list[bytes]:
            frame = decode(message)
            if isinstance(frame, Chunk):
                return [encode(replace(frame, checksum=frame.checksum ^ 1))]
            return [message]

        it.way.channel.to_sender = damage
        assert "was rejected" in await it.ended_with(TransferEnded)
        await it.both_back()

    fetching(scenario)


def test_a_worker_that_is_too_busy_to_look_is_not_waited_for(fetching: Run) -> None:
    async def scenario(it: Fetching) -> None:
        async def never(*_: object, **__: object) -> CachedKv:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        with patch.object(it.source, "find_cached", never):
            # Which side's clock is first is open.
            await it.ended_with(DeadlineExceeded, TransferEnded, timeout_s=0.3)
            await until(lambda: it.way.receiver.num_transfers == 0, "the worker looks no more")

    fetching(scenario)
