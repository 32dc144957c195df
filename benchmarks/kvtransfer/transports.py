"""Whole hand-offs between two processes by each way, beside a plain TCP socket and a plain memcpy.

    python benchmarks/kvtransfer/transports.py [--quick] [--json FILE]

One process sends, the other receives, over gRPC on loopback, with checksums, leases and digests as in service. A
hand-off is 2,048 tokens of SmolLM2-135M's KV in fp16, 47 MB, and then 16,384 tokens, 377 MB, reserved before the
clock starts; the clock stops when the receiver has committed. Blocks lie in order, as in a pool that is new, and shuffled, as
in one that has been used for long. The TCP socket sends as many bytes with `sendall` and takes them with
`recv_into`, both in place; memcpy is `numpy.copyto` out of shared memory of the other process. All take turns, so that the
ratios are of one run.
"""

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import torch

from kvtransfer.client import KvSender
from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.digest import token_digest
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel
from kvtransfer.host import CachedKv
from kvtransfer.host_pool import HostPool, pool_shape
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.server import add_kvtransfer_service
from kvtransfer.shared_memory import MappedMemory, SharedMemory
from orchestrator.bench.machine import describe_machine
from workers.launch_environment import missing_variables

LAYOUT = KvLayout("smollm2-135m", "float16", 16, 30, 3, 64, "rope:theta=100000")
#: Tokens of a hand-off.
LENGTHS = (2048, 16384)
ORDERS = ("in order", "shuffled")
NUM_BLOCKS = blocks_needed(max(LENGTHS), LAYOUT.block_size)
TCP_CHUNK_BYTES = 2**21
CHANNEL_OPTIONS = (*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
#: Way -> transport, streams for chunks.
WAYS = {"gRPC": ("grpc", 1), "gRPC, 2 streams": ("grpc", 2), "shared memory": ("shm", 1)}


class Host:
    """A worker that has a pool for one sequence and nothing else to do. Implements host.KvHost."""

    def __init__(self, seed: int) -> None:
        self.memory = SharedMemory.create(NUM_BLOCKS * LAYOUT.block_bytes)
        cache = self.memory.tensor(pool_shape(LAYOUT, NUM_BLOCKS), torch.float16)
        # Pages are there, and nothing compresses or deduplicates.
        cache.view(torch.int16).random_(0, 2**14)
        self.pool = HostPool(cache, LAYOUT, self.memory)
        self.incarnation = 1
        self.orders: dict[str, tuple[int, ...]] = {
            "in order": tuple(range(NUM_BLOCKS)),
            "shuffled": tuple(np.random.default_rng(seed).permutation(NUM_BLOCKS).tolist()),
        }

    def blocks(self, order: str, num_tokens: int) -> tuple[int, ...]:
        """Of a sequence."""
        return self.orders[order][: blocks_needed(num_tokens, LAYOUT.block_size)]

    async def reserve(self, transfer_id: str, **_limits: float) -> Sequence[int]:
        """See KvHost."""
        return self.blocks(transfer_id.partition(":")[0], int(_limits["num_tokens"]))

    async def find_cached(
        self, transfer_id: str, block_hashes: Sequence[bytes], *, min_tokens: int
    ) -> CachedKv:
        """See KvHost."""
        raise NotImplementedError

    def commit(
        self, transfer_id: str, block_ids: Sequence[int], token_ids: Sequence[int], token_digest: bytes
    ) -> None:
        """See KvHost."""

    def release(self, transfer_id: str, block_ids: Sequence[int], reason: str) -> None:
        """See KvHost."""


def receive(pipe: Connection) -> None:
    """The other process."""
    asyncio.run(_receive(pipe))


async def _receive(pipe: Connection) -> None:
    host = Host(seed=2)
    server = grpc.aio.server(options=GRPC_OPTIONS)
    receiver = add_kvtransfer_service(server, host, KvTransferConfig())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with socket.create_server(("127.0.0.1", 0)) as plain:
        pipe.send((port, plain.getsockname()[1], host.memory.descriptor()))
        await asyncio.to_thread(_receive_plainly, plain)
        await asyncio.to_thread(pipe.recv)
    await receiver.close("the benchmark is over")
    await server.stop(None)


def _receive_plainly(plain: socket.socket) -> None:
    """Each time the number of bytes, then so many, answered by one, until the sender closes."""
    connection, _ = plain.accept()
    into = memoryview(bytearray(bytes_of(max(LENGTHS))))
    with connection:
        while True:
            size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
            taken = 0
            if size == 0:
                return
            while taken < size:
                num_bytes = connection.recv_into(into[taken : min(taken + TCP_CHUNK_BYTES, size)])
                if num_bytes == 0:
                    return
                taken += num_bytes
            connection.sendall(b"!")


def bytes_of(num_tokens: int) -> int:
    """KV of so many tokens."""
    return num_tokens * LAYOUT.num_layers * LAYOUT.token_bytes


async def hand_off(
    host: Host, channels: list[GrpcChannel], transport: str, order: str, num_tokens: int, number: int
) -> tuple[float, str]:
    """Seconds from the last KV to the commit, and how it went."""
    config = replace(KvTransferConfig(), transport=TransportChoice(transport), num_streams=len(channels))
    sender = KvSender(
        host,
        channels[0],
        transfer_id=f"{order}:{transport}-{len(channels)}-{num_tokens}-{number}",
        block_ids=host.blocks(order, num_tokens),
        num_tokens=num_tokens,
        max_tokens=num_tokens,
        token_digest=token_digest(range(num_tokens)),
        peer_incarnation=1,
        timeout_s=60.0,
        config=config,
        data_channels=channels if len(channels) > 1 else (),
    )
    running = asyncio.create_task(sender.run())
    await sender.wait_granted()
    began_s = time.perf_counter()
    sender.kv_ready(0, LAYOUT.num_layers, 0, num_tokens)
    sender.prefill_finished((7,))
    report = await running
    assert report.num_bytes == bytes_of(num_tokens)
    return time.perf_counter() - began_s, report.transport


async def measure(
    host: Host,
    port: int,
    plain: socket.socket,
    mapped: MappedMemory,
    order: str,
    num_tokens: int,
    num_rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each round, by way."""
    times_s: dict[str, list[float]] = {name: [] for name in (*WAYS, "TCP socket", "memcpy")}
    num_bytes = bytes_of(num_tokens)
    source = mapped.bytes()[:num_bytes]
    target = np.zeros(num_bytes, np.uint8)
    payload = memoryview(target)
    grpc_channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) for _ in range(2)
    ]
    for number in range(-2, num_rounds):
        found: dict[str, float] = {}
        for name, (transport, num_streams) in WAYS.items():
            channels = [GrpcChannel(channel) for channel in grpc_channels[:num_streams]]
            found[name], taken = await hand_off(host, channels, transport, order, num_tokens, number)
            assert taken == transport, taken
        began_s = time.perf_counter()
        plain.sendall(num_bytes.to_bytes(8, "little"))
        for start in range(0, num_bytes, TCP_CHUNK_BYTES):
            plain.sendall(payload[start : start + TCP_CHUNK_BYTES])
        assert plain.recv(1) == b"!"
        found["TCP socket"] = time.perf_counter() - began_s
        began_s = time.perf_counter()
        np.copyto(target, source)
        found["memcpy"] = time.perf_counter() - began_s
        if number >= 0:
            for name, duration_s in found.items():
                times_s[name].append(duration_s)
        print(f"round {number + 1} of {num_rounds}", file=sys.stderr, end="\r", flush=True)
    for channel in grpc_channels:
        await channel.close()
    print(file=sys.stderr)
    return times_s


def table_of(times_s: dict[str, list[float]], num_bytes: int) -> dict[str, dict[str, float]]:
    """Medians and rates, by way."""
    rows: dict[str, dict[str, float]] = {}
    for name, found in times_s.items():
        median_s = statistics.median(found)
        p20, p80 = (statistics.quantiles(found, n=5)[i] for i in (0, 3))
        rows[name] = {"seconds": median_s, "p20_s": p20, "p80_s": p80, "bytes_per_s": num_bytes / median_s}
    for row in rows.values():
        row["of_tcp"] = row["bytes_per_s"] / rows["TCP socket"]["bytes_per_s"]
        row["of_memcpy"] = row["bytes_per_s"] / rows["memcpy"]["bytes_per_s"]
    return rows


def show(rows: dict[str, dict[str, float]], order: str, num_tokens: int, num_rounds: int) -> None:
    """Print one table."""
    print(
        f"{num_tokens} tokens, {bytes_of(num_tokens) / 1e6:.0f} MB, blocks {order}; medians of {num_rounds} rounds"
    )
    print(f"{'way':<18}{'ms':>8}{'p20':>8}{'p80':>8}{'GB/s':>8}{'of TCP':>8}{'of memcpy':>11}")
    for name, row in rows.items():
        times = f"{row['seconds'] * 1e3:>8.1f}{row['p20_s'] * 1e3:>8.1f}{row['p80_s'] * 1e3:>8.1f}"
        rate = row["bytes_per_s"] / 1e9
        print(f"{name:<18}{times}{rate:>8.2f}{row['of_tcp']:>8.2f}{row['of_memcpy']:>11.2f}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    missing = missing_variables(os.environ)
    if missing:
        # A worker is started with these; they are read at the start of a process only.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    pipe, theirs = mp.Pipe()
    other = mp.get_context("spawn").Process(target=receive, args=(theirs,))
    other.start()
    port, plain_port, descriptor = pipe.recv()
    mapped = MappedMemory.open(descriptor)
    host = Host(seed=1)
    tables: list[dict[str, Any]] = []
    with socket.create_connection(("127.0.0.1", plain_port)) as plain:
        for num_tokens, order in product(LENGTHS, ORDERS):
            num_rounds = (8 if args.quick else 60) * LENGTHS[0] // num_tokens + 3
            times_s = asyncio.run(measure(host, port, plain, mapped, order, num_tokens, num_rounds))
            rows = table_of(times_s, bytes_of(num_tokens))
            tables.append({"num_tokens": num_tokens, "blocks": order, "ways": rows})
            show(rows, order, num_tokens, num_rounds)
        plain.sendall((0).to_bytes(8, "little"))
    pipe.send("over")
    other.join()
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "tables": tables}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
