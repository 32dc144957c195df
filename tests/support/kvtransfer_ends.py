"""Two hosts, or more, and the way between them: what every test of whole transfers begins with."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch

from kvtransfer import sender as sender_module
from kvtransfer.client import KvSender
from kvtransfer.codecs.codec import CodecId
from kvtransfer.config import KvTransferConfig
from kvtransfer.digest import token_digest
from kvtransfer.errors import PhasewiseTransferError
from kvtransfer.layout import KvLayout, blocks_needed
from tests.support.kvtransfer_fakes import LAYOUT, FakeKvHost
from tests.support.kvtransfer_ways import Way, transport_of, way_to
from tests.support.nixl_double import nixl_agents
from tests.support.waiting import until

#: One block of one layer in each chunk: many chunks of little KV.
CONFIG = KvTransferConfig(
    lease_s=20.0, resume_s=0.5, max_chunk_bytes=LAYOUT.token_bytes * LAYOUT.block_size, credits=3
)
NUM_TOKENS = 11
NUM_BLOCKS = blocks_needed(NUM_TOKENS, LAYOUT.block_size)
TOKEN_IDS = (42,)
DIGEST = token_digest(range(NUM_TOKENS))
NUM_SOURCE_BLOCKS = 200


@dataclass
class Ends:
    """Both hosts and the way between them. more_sources: other ranks of the sending worker."""

    source: FakeKvHost
    target: FakeKvHost
    way: Way
    transport: str
    config: KvTransferConfig
    more_sources: Sequence[FakeKvHost] = ()

    def sender(
        self,
        transfer_id: str = "t1",
        *,
        num_tokens: int = NUM_TOKENS,
        num_more: int = 5,
        incarnation: int | None = None,
        timeout_s: float = 30.0,
        source: FakeKvHost | None = None,
        codec: CodecId = CodecId.NONE,
        part: int = 0,
        num_parts: int = 1,
    ) -> KvSender:
        """Of a sequence with random KV, about which the transfer is told nothing yet."""
        host = self.source if source is None else source
        block_ids = host.take(transfer_id, num_tokens)
        host.fill(block_ids, seed=num_tokens + part)
        return KvSender(
            host,
            self.way.channel,
            transfer_id=transfer_id,
            block_ids=block_ids,
            num_tokens=num_tokens,
            max_tokens=num_tokens + num_more,
            token_digest=DIGEST,
            peer_incarnation=self.target.incarnation if incarnation is None else incarnation,
            timeout_s=timeout_s,
            config=self.config,
            codec=codec,
            part=part,
            num_parts=num_parts,
            data_channels=self.way.data_channels,
        )

    def ready_sender(
        self, transfer_id: str = "t1", *, num_tokens: int = NUM_TOKENS, **more: object
    ) -> KvSender:
        """Of a sequence that is prefilled already."""
        sender = self.sender(transfer_id, num_tokens=num_tokens, **more)  # type: ignore[arg-type]
        tell_all(sender, num_tokens)
        return sender

    def parts(
        self, transfer_id: str = "t1", *, num_tokens: int = NUM_TOKENS, **more: float
    ) -> list[KvSender]:
        """Ready senders of one transfer, one for each rank of the sending worker."""
        hosts = (self.source, *self.more_sources)
        return [
            self.ready_sender(
                transfer_id, num_tokens=num_tokens, source=host, part=part, num_parts=len(hosts), **more
            )
            for part, host in enumerate(hosts)
        ]

    async def both_idle(self) -> None:
        """The receiver has no transfer left."""
        await until(lambda: self.way.receiver.num_transfers == 0, "the receiver has ended its transfers")

    def check_all_back(self) -> None:
        """Of the sources: every block is free."""
        for host in (self.source, *self.more_sources):
            assert host.num_free == len(host.owners), host.owners


def tell_all(sender: KvSender, num_tokens: int = NUM_TOKENS) -> None:
    """All KV is ready, and prefill is over."""
    sender.kv_ready(0, LAYOUT.num_layers, 0, num_tokens)
    sender.prefill_finished(TOKEN_IDS)


def owned(host: FakeKvHost, owner: str) -> list[int]:
    """In the order of the sequence, which FakeKvHost makes the reverse of the pool's."""
    return [i for i, held_by in reversed(list(enumerate(host.owners))) if held_by == owner]


def kv_of(host: FakeKvHost, block_ids: Sequence[int], num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """A copy of what these blocks hold: [layer, K/V, token, head, head_dim], in the pool's dtype."""
    return host.kv_cache[:, :, list(block_ids)].flatten(2, 3)[:, :, :num_tokens].clone()


def received(ends: Ends, num_tokens: int = NUM_TOKENS, transfer_id: str = "t1") -> torch.Tensor:
    """What the target got of a transfer that was committed."""
    return kv_of(ends.target, ends.target.committed[transfer_id][0], num_tokens)


async def ended_with(ends: Ends, sender: KvSender, error: type[PhasewiseTransferError]) -> str:
    """Its message; the sender's blocks are back by then."""
    with pytest.raises(error) as caught:
        await sender.run()
    assert ends.source.num_free == len(ends.source.owners)
    return str(caught.value)


Scenario = Callable[[Ends], Awaitable[None]]
Run = Callable[..., None]


@asynccontextmanager
async def ends_of(
    kind: str,
    config: KvTransferConfig,
    layout: KvLayout,
    num_target_blocks: int,
    source_layouts: Sequence[KvLayout] = (LAYOUT,),
) -> AsyncIterator[Ends]:
    """New hosts. At the end both pools are whole."""
    transport = transport_of(kind)
    with nixl_agents() as become_reader:
        sources = [
            FakeKvHost(
                one,
                num_blocks=NUM_SOURCE_BLOCKS,
                is_shared=transport == "shm",
                is_in_nixl=transport == "nixl",
            )
            for one in source_layouts
        ]
        become_reader()
        async with ends_between(kind, sources, config, layout, num_target_blocks) as ends:
            yield ends
    for source in sources:
        source.close()


@asynccontextmanager
async def ends_between(
    kind: str,
    sources: Sequence[FakeKvHost],
    config: KvTransferConfig,
    layout: KvLayout,
    num_target_blocks: int,
) -> AsyncIterator[Ends]:
    """The same, to a new host."""
    target = FakeKvHost(layout, num_blocks=num_target_blocks, incarnation=6)
    # Chunks that are copied in place are as small as others here: many of little KV.
    small = dict.fromkeys(sender_module.IN_PLACE_BYTES, config.max_chunk_bytes)
    with patch.dict(sender_module.IN_PLACE_BYTES, small):
        async with way_to(kind, sources, target, config) as way:
            ends = Ends(sources[0], target, way, transport_of(kind), config, sources[1:])
            yield ends
            await ends.both_idle()
            assert way.receiver.num_leases == 0
            way.receiver.check_invariants()
            for transfer_id in list(target.committed):
                target.end_sequence(transfer_id)
            for host in (*sources, target):
                host.check_all_returned()
                assert host.num_free == len(host.owners)


def run_whole(
    kind: str,
    scenario: Scenario,
    *,
    config: KvTransferConfig = CONFIG,
    layout: KvLayout = LAYOUT,
    num_target_blocks: int = 16,
    source_layouts: Sequence[KvLayout] = (LAYOUT,),
) -> None:
    """Run a scenario on one way; at its end both pools are whole and no task is left."""

    async def whole() -> None:
        async with asyncio.timeout(60):
            async with ends_of(kind, config, layout, num_target_blocks, source_layouts) as ends:
                await scenario(ends)
            await until(
                lambda: asyncio.all_tasks() == {asyncio.current_task()},
                "all tasks of the transfers and their way are over",
            )

    asyncio.run(whole())
