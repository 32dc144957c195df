"""KV that is packed on its way, and KV that is fetched: on queues and in place."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from kvtransfer.client import KvSender, fetch
from kvtransfer.codecs.codec import CodecId, PageShape
from kvtransfer.codecs.codecs import codec as codec_of
from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.digest import token_digest
from kvtransfer.errors import TransferEnded
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.server import KvTransferServer
from kvtransfer.transports.choice import TransportOpener
from tests.support.kvtransfer_fakes import FakeKvHost, QueueChannel
from tests.support.waiting import until

LAYOUT = KvLayout("m", "float32", 4, 2, 4, 8, "rope")
NUM_TOKENS = 13
CONFIG = KvTransferConfig(lease_s=5.0, resume_s=0.5, max_chunk_bytes=2048, credits=2)
WAYS = ("payload", "in place")

Scenario = Callable[["Link"], Awaitable[None]]


class Link:
    """Sending hosts, and one that receives."""

    def __init__(self, target: FakeKvHost, receiver: KvTransferServer, config: KvTransferConfig) -> None:
        self.target = target
        self.receiver = receiver
        self.config = config
        self.channel = QueueChannel(receiver.serve)
        self.sources: list[FakeKvHost] = []

    def source(self, layout: KvLayout) -> FakeKvHost:
        """A host with random KV in all its blocks."""
        host = FakeKvHost(layout, num_blocks=16)
        host.fill(range(16), seed=len(self.sources) + 1)
        self.sources.append(host)
        return host

    def sender(
        self,
        source: FakeKvHost,
        *,
        transfer_id: str = "t",
        part: int = 0,
        num_parts: int = 1,
        is_ready: bool = True,
    ) -> KvSender:
        """Of a sequence that is prefilled already."""
        codec = self.config.codec
        assert codec is not None
        sender = KvSender(
            source,
            self.channel,
            transfer_id=transfer_id,
            block_ids=source.take(transfer_id, NUM_TOKENS),
            num_tokens=NUM_TOKENS,
            max_tokens=NUM_TOKENS + 3,
            token_digest=token_digest(range(NUM_TOKENS)),
            peer_incarnation=self.target.incarnation,
            timeout_s=5.0,
            config=self.config,
            codec=codec,
            part=part,
            num_parts=num_parts,
        )
        if is_ready:
            sender.kv_ready(0, source.layout.num_layers, 0, NUM_TOKENS)
            sender.prefill_finished((7,))
        return sender

    def arrived(self, transfer_id: str = "t") -> torch.Tensor:
        """[layer, K/V, token, head, head_dim] in the target's cache."""
        return tokens_in(self.target, self.target.committed[transfer_id][0])


def tokens_in(host: FakeKvHost, block_ids: object, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return host.kv_cache[:, :, list(block_ids)].flatten(2, 3)[:, :, :num_tokens].clone()  # type: ignore[call-overload]


def taken(host: FakeKvHost) -> list[int]:
    """Blocks that the next sequence will get, in its order."""
    return list(range(len(host.owners) - 1, -1, -1))[: blocks_needed(NUM_TOKENS, host.layout.block_size)]


@asynccontextmanager
async def link(target_layout: KvLayout, way: str, config: KvTransferConfig) -> AsyncIterator[Link]:
    choice = TransportChoice.GRPC if way == "payload" else TransportChoice.IN_PROCESS
    config = replace(config, transport=choice)
    target = FakeKvHost(target_layout, num_blocks=24, incarnation=3)
    receiver = KvTransferServer(target, config)
    it = Link(target, receiver, config)
    yield it
    await until(lambda: receiver.num_transfers == 0, "the receiver has ended its transfers")
    receiver.check_invariants()
    assert receiver.num_leases == 0
    for transfer_id in list(target.committed):
        target.end_sequence(transfer_id)
    for host in (target, *it.sources):
        host.check_all_returned()
        assert host.num_free == len(host.owners)
    await receiver.close("the test is over")
    await it.channel.close()


@pytest.fixture(params=WAYS)
def between(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a scenario with a receiver of this layout; at its end all blocks are back and no task is left."""

    def run_it(scenario: Scenario, target: KvLayout = LAYOUT, config: KvTransferConfig = CONFIG) -> None:
        async def whole() -> None:
            async with asyncio.timeout(30):
                async with link(target, request.param, config) as it:
                    await scenario(it)
                assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(whole())

    return run_it


@pytest.mark.parametrize("codec", [CodecId.FP8, CodecId.INT4_HADAMARD, CodecId.GEAR, CodecId.GEAR_L])
def test_what_is_packed_arrives_as_the_codec_leaves_it(codec: CodecId) -> None:
    async def scenario() -> None:
        # One layer a chunk, so that its pages are those of the whole sequence.
        config = replace(CONFIG, codec=codec, max_chunk_bytes=NUM_TOKENS * LAYOUT.token_bytes)
        async with link(LAYOUT, "payload", config) as it:
            source = it.source(LAYOUT)
            sent = tokens_in(source, taken(source))
            report = await it.sender(source).run()
            assert report.codec is codec
            shape = PageShape(1, NUM_TOKENS, LAYOUT.num_kv_heads, LAYOUT.head_dim)
            for layer in range(LAYOUT.num_layers):
                packed = bytearray(codec_of(codec).packed_bytes(shape))
                codec_of(codec).pack(sent[layer : layer + 1], memoryview(packed))
                expected = codec_of(codec).unpack(memoryview(packed), shape)
                assert torch.equal(it.arrived()[layer : layer + 1], expected)

    asyncio.run(scenario())


def test_in_place_nothing_is_packed() -> None:
    async def scenario() -> None:
        async with link(LAYOUT, "in place", replace(CONFIG, codec=CodecId.FP8)) as it:
            source = it.source(LAYOUT)
            sent = tokens_in(source, taken(source))
            report = await it.sender(source).run()
            assert report.codec is CodecId.NONE
            assert torch.equal(it.arrived(), sent)

    asyncio.run(scenario())


HASHES = tuple(bytes([i]) * 16 for i in range(4))


async def fetched(it: Link, source: FakeKvHost, *, min_tokens: int = 4, timeout_s: float = 3.0) -> int:
    """Blocks that `source` has cached, got by the target."""
    serving = KvTransferServer(source, it.config)
    channel = QueueChannel(serving.serve)
    try:
        num_tokens, _transport, _why = await fetch(
            it.target,
            channel,
            TransportOpener(it.config.transport),
            transfer_id="f",
            block_hashes=HASHES,
            min_tokens=min_tokens,
            timeout_s=timeout_s,
            config=it.config,
        )
    finally:
        await serving.close("over")
        await channel.close()
    return num_tokens


def test_the_longest_known_beginning_is_fetched(between: Callable[..., None]) -> None:
    async def scenario(it: Link) -> None:
        source = it.source(LAYOUT)
        source.cached = {HASHES[0]: 9, HASHES[1]: 2, HASHES[2]: 5}
        sent = tokens_in(source, (9, 2, 5), 12)
        assert await fetched(it, source) == 12
        block_ids, token_ids = it.target.committed["f"]
        assert token_ids == ()
        assert it.target.digests["f"] == HASHES[2]
        assert torch.equal(tokens_in(it.target, block_ids, 12), sent)

    between(scenario)


def test_too_little_or_other_blocks_are_not_sent(between: Callable[..., None]) -> None:
    async def scenario(it: Link) -> None:
        source = it.source(LAYOUT)
        source.cached = {HASHES[0]: 9}
        with pytest.raises(TransferEnded, match="4 tokens are cached"):
            await fetched(it, source, min_tokens=8)
        other = it.source(replace(LAYOUT, block_size=8))
        with pytest.raises(TransferEnded, match="blocks are of 8 tokens here, not 4"):
            await fetched(it, other)

    between(scenario)


def test_a_fetch_that_is_given_up_leaves_nothing(between: Callable[..., None]) -> None:
    async def scenario(it: Link) -> None:
        source = it.source(LAYOUT)
        source.cached = {HASHES[0]: 9}
        # Nothing is free: it waits until it is cancelled.
        held = it.target.take("other", 24 * LAYOUT.block_size)
        fetching = asyncio.create_task(fetched(it, source))
        await until(lambda: it.target.num_waiting == 1, "it waits for blocks")
        fetching.cancel()
        await asyncio.wait((fetching,))
        assert it.target.num_waiting == 0
        it.target.release("other", held, "the test is over")

    between(scenario)
