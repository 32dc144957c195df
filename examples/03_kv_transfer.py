"""KV of a sequence moved from one plain process to another: a lease, pages that are copied in place, a commit.

    python examples/03_kv_transfer.py [--transport grpc]

Needs no worker, no model and no Ray: kvtransfer alone, with a block pool in shared memory on each side.
"""

import argparse
import asyncio
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection

import grpc.aio
import torch

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.digest import token_digest
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel
from kvtransfer.host import CachedKv
from kvtransfer.host_pool import HostPool, pool_shape
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.server import add_kvtransfer_service
from kvtransfer.shared_memory import SharedMemory

LAYOUT = KvLayout("a model's digest", "float16", 16, 30, 3, 64, "rope:theta=100000")
NUM_BLOCKS = 256
NUM_TOKENS = 1000


class Host:
    """The side of a worker that transfers need: a pool, its free blocks, and what happens when they are done."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.memory = SharedMemory.create(NUM_BLOCKS * LAYOUT.block_bytes)
        self.kv_cache = self.memory.tensor(pool_shape(LAYOUT, NUM_BLOCKS), torch.float16)
        self.pool = HostPool(self.kv_cache, LAYOUT, self.memory)
        self.free = list(range(NUM_BLOCKS))
        self.committed = asyncio.Event()
        self.block_ids: Sequence[int] = ()

    def take(self, num_tokens: int) -> list[int]:
        """Blocks for a sequence."""
        return [self.free.pop() for _ in range(blocks_needed(num_tokens, LAYOUT.block_size))]

    async def reserve(
        self, transfer_id: str, *, num_tokens: int, max_tokens: int, timeout_s: float
    ) -> Sequence[int]:
        """See kvtransfer.host.KvHost, like all that follows. A worker waits here until it has blocks."""
        return self.take(max_tokens)

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """Nothing is fetched from here."""
        raise NotImplementedError

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        """Every byte is there, and is what was sent."""
        self.block_ids = block_ids
        self.committed.set()

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """The blocks are the pool's again."""
        self.free.extend(block_ids)


async def receive(pipe: Connection, config: KvTransferConfig) -> None:
    """The decode side: serves, and says what its blocks sum up to when a sequence has come."""
    host = Host(incarnation=1)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    transfers = add_kvtransfer_service(server, host, config)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await host.committed.wait()
    pipe.send(float(tokens_of(host.kv_cache, host.block_ids).double().sum()))
    await transfers.close("the example is over")
    await server.stop(1.0)


async def send(port: int, config: KvTransferConfig) -> float:
    """The prefill side: fills blocks as prefill would, layer by layer, and tells the transfer of each."""
    host = Host(incarnation=7)
    block_ids = host.take(NUM_TOKENS)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) as channel:
        sender = KvSender(
            host,
            GrpcChannel(channel),
            transfer_id="request-1/1",
            block_ids=block_ids,
            num_tokens=NUM_TOKENS,
            max_tokens=NUM_TOKENS + 100,
            token_digest=token_digest(range(NUM_TOKENS)),
            peer_incarnation=1,
            timeout_s=30.0,
            config=config,
        )
        running = asyncio.create_task(sender.run())
        for layer in range(LAYOUT.num_layers):
            host.kv_cache[layer, :, block_ids] = torch.randn(1).half()
            sender.kv_ready(layer, layer + 1, 0, NUM_TOKENS)
            await asyncio.sleep(0)
        sender.prefill_finished([42])
        report = await running
    assert len(host.free) == NUM_BLOCKS
    why = f" ({report.transport_reason})" if report.transport_reason else ""
    print(
        f"{report.num_bytes / 1e6:.1f} MB in {report.num_chunks} chunks by {report.transport}{why}, "
        f"{report.num_wire_bytes / 1e6:.2f} MB of it over the connection"
    )
    return float(tokens_of(host.kv_cache, block_ids).double().sum())


def tokens_of(kv_cache: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
    """[layer, K/V, token, head, head_dim] of the sequence."""
    return kv_cache[:, :, list(block_ids)].flatten(2, 3)[:, :, :NUM_TOKENS]


def run_receiver(pipe: Connection, transport: str) -> None:
    """The other process."""
    asyncio.run(receive(pipe, KvTransferConfig(transport=TransportChoice(transport))))


def main() -> None:
    """Both sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", choices=["auto", "shm", "grpc"], default="auto")
    transport = parser.parse_args().transport
    pipe, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=run_receiver, args=(theirs, transport))
    other.start()
    sent = asyncio.run(send(pipe.recv(), KvTransferConfig(transport=TransportChoice(transport))))
    assert pipe.recv() == sent
    other.join()
    print("what arrived is what was sent")


if __name__ == "__main__":
    main()
