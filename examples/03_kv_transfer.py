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
from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.server import add_kvtransfer_service
from kvtransfer.shared_memory import SharedMemory

LAYOUT = KvLayout("a model's digest", "float16", 16, 30, 3, 64, "rope:theta=100000")
NUM_BLOCKS = 256
NUM_TOKENS = 1000
#: One after the other.
NUM_SEQUENCES = 3


class Host:
    """The side of a worker that transfers need: a pool, its free blocks, and what happens when they are done."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.memory = SharedMemory.create(NUM_BLOCKS * LAYOUT.block_bytes)
        self.kv_cache = self.memory.tensor(pool_shape(LAYOUT, NUM_BLOCKS), torch.float16)
        self.pool = HostPool(self.kv_cache, LAYOUT, self.memory)
        self.free = list(range(NUM_BLOCKS))
        #: At most NUM_SEQUENCES.
        self.committed: asyncio.Queue[Sequence[int]] = asyncio.Queue()

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
        self.committed.put_nowait(block_ids)

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """The blocks are the pool's again."""
        self.free.extend(block_ids)


async def receive(pipe: Connection, config: KvTransferConfig) -> None:
    """The decode side: serves, and says what the blocks of each sequence that has come sum up to."""
    host = Host(incarnation=1)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    transfers = add_kvtransfer_service(server, host, config)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    for _ in range(NUM_SEQUENCES):
        block_ids = await host.committed.get()
        pipe.send(sum_of(host.kv_cache, block_ids))
        # Here a worker would generate from them.
        host.free.extend(block_ids)
    await transfers.close("the example is over")
    await server.stop(1.0)


async def send(port: int, config: KvTransferConfig) -> list[float]:
    """The prefill side: one sequence after the other. Returns what the KV of each sums up to."""
    host = Host(incarnation=7)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) as channel:
        sums = [
            await send_one(host, GrpcChannel(channel), f"request-{i}/1", config) for i in range(NUM_SEQUENCES)
        ]
    assert len(host.free) == NUM_BLOCKS
    return sums


async def send_one(host: Host, channel: GrpcChannel, transfer_id: str, config: KvTransferConfig) -> float:
    """Fills blocks as prefill would, layer by layer, and tells the transfer of each."""
    block_ids = host.take(NUM_TOKENS)
    sender = KvSender(
        host,
        channel,
        transfer_id=transfer_id,
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
    why = f" ({report.transport_reason})" if report.transport_reason else ""
    print(
        f"{report.num_bytes / 1e6:.1f} MB in {report.num_chunks} chunks by {report.transport}{why}, "
        f"{report.num_wire_bytes / 1e6:.2f} MB over the connection, {report.num_bytes / 1e6 / report.busy_s:.0f} MB/s"
    )
    return sum_of(host.kv_cache, block_ids)


def sum_of(kv_cache: torch.Tensor, block_ids: Sequence[int]) -> float:
    """Of K and V of all tokens of the sequence, in all layers."""
    tokens = kv_cache[:, :, list(block_ids)].flatten(2, 3)[:, :, :NUM_TOKENS]
    return float(tokens.double().sum())


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
    other = multiprocessing.get_context("spawn").Process(
        # It ends with this one, whatever goes wrong here.
        target=run_receiver,
        args=(theirs, transport),
        daemon=True,
    )
    other.start()
    # Its end alone keeps the pipe open: if it fails, `recv` says so.
    theirs.close()
    sent = asyncio.run(send(pipe.recv(), KvTransferConfig(transport=TransportChoice(transport))))
    assert [pipe.recv() for _ in sent] == sent
    other.join()
    print("what arrived is what was sent")


if __name__ == "__main__":
    main()
