"""Whole hand-offs between two processes by each way, beside a plain TCP socket and a plain memcpy.

    python benchmarks/kvtransfer/transports.py [--quick] [--json FILE]

One process sends, the other receives, over gRPC on loopback, with checksums, leases and digests as in service. A
hand-off is 2,048 tokens of SmolLM2-135M's KV in fp16, 47 MB, and then 16,384 tokens, 377 MB, reserved before the
clock starts; the clock stops when the receiver has committed. Blocks lie in order, as in a pool that is new, and shuffled, as
in one that has been used for long. Plain gRPC is what gRPC itself costs: a stream of ready messages as large and as many as the chunks,
with as many unanswered, which the receiver answers with a byte each and drops. Bare gRPC gathers, checks and scatters them as a hand-off
does, and has nothing else of it: no leases, credits, digests or commits. The TCP socket sends as many bytes with
`sendall` and takes them with `recv_into`, both in place; memcpy is `numpy.copyto` out of shared memory of the other
process. All take turns, so that the ratios are of one run. Processor time is that of all threads of a process, for each
GB of KV: on two cores both together are what bounds the rate.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
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
from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel, add_handler
from kvtransfer.host import CachedKv
from kvtransfer.host_pool import HostPool
from kvtransfer.kv_range import KvRange, split
from kvtransfer.layout import KvLayout, blocks_needed
from kvtransfer.pool import KvSpan, span_bytes, span_of
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.raw_bytes import filled
from kvtransfer.server import add_kvtransfer_service
from kvtransfer.shared_memory import MappedMemory, SharedMemory
from kvtransfer.stream import MessageChannel, MessageStream
from orchestrator.bench.machine import describe_machine
from workers.launch_environment import missing_variables

LAYOUT = KvLayout("smollm2-135m", "float16", 16, 30, 3, 64, "rope:theta=100000")
#: Tokens of a hand-off.
LENGTHS = (2048, 16384)
ORDERS = ("in order", "shuffled")
NUM_BLOCKS = blocks_needed(max(LENGTHS), LAYOUT.block_size)
TCP_CHUNK_BYTES = 2**21
#: Methods beside Transfer.
PLAIN_METHOD, BARE_METHOD = "Plain", "Bare"
#: What stands before the payload of a bare message, as a chunk has a header.
HEADER_BYTES = 64
#: Rounds before those that count.
NUM_WARM = 2
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
    add_handler(server, _answer_each, PLAIN_METHOD)
    add_handler(server, partial(_scatter_each, host), BARE_METHOD)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with socket.create_server(("127.0.0.1", 0)) as plain:
        pipe.send((port, plain.getsockname()[1], host.memory.descriptor()))
        await asyncio.to_thread(_receive_plainly, plain)
        await asyncio.to_thread(pipe.recv)
    await receiver.close("the benchmark is over")
    await server.stop(None)


async def _answer_each(stream: MessageStream) -> None:
    """A byte for each message, until the sender closes."""
    while await stream.read() is not None:
        await stream.write(b"!")


async def _scatter_each(host: Host, stream: MessageStream) -> None:
    """The first message says what comes; a byte for each after that, once it is in the pool."""
    first = await stream.read()
    assert first is not None
    order, _, num_tokens = first.decode().partition(":")
    for span in spans_of(host, order, int(num_tokens)):
        message = await stream.read()
        assert message is not None
        host.pool.write(span, memoryview(message)[HEADER_BYTES:], LAYOUT.dtype)
        await stream.write(b"!")
    await stream.read()


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


def parts_of(num_tokens: int) -> list[KvRange]:
    """The chunks of a hand-off whose KV is all there."""
    config = KvTransferConfig()
    return list(
        split(
            KvRange(0, LAYOUT.num_layers, 0, num_tokens),
            token_bytes=LAYOUT.token_bytes,
            token_step=LAYOUT.block_size,
            max_bytes=config.max_chunk_bytes,
        )
    )


def spans_of(host: Host, order: str, num_tokens: int) -> list[KvSpan]:
    """Where they lie in a pool."""
    blocks = host.blocks(order, num_tokens)
    return [
        span_of(
            blocks,
            LAYOUT.block_size,
            tokens=(part.token_lo, part.token_hi),
            layers=(part.layer_lo, part.layer_hi),
            heads=LAYOUT.heads,
        )
        for part in parts_of(num_tokens)
    ]


async def send_messages(stream: MessageStream, messages: Iterable[bytes]) -> float:
    """Seconds until the last of these was answered, with as many unanswered as a hand-off has credits."""
    max_unanswered, num_sent, num_answered = KvTransferConfig().credits, 0, 0
    began_s = time.perf_counter()
    for message in messages:
        if num_sent - num_answered >= max_unanswered:
            await stream.read()
            num_answered += 1
        await stream.write(message)
        num_sent += 1
    for _ in range(num_sent - num_answered):
        await stream.read()
    duration_s = time.perf_counter() - began_s
    await stream.close()
    assert await stream.read() is None
    return duration_s


async def send_plain_messages(channel: MessageChannel, num_tokens: int) -> float:
    """Seconds for as many messages, as large, as a hand-off has chunks; all of one size are the same bytes."""
    sizes = [part.num_layers * part.num_tokens * LAYOUT.token_bytes for part in parts_of(num_tokens)]
    messages = {size: bytes(size) for size in set(sizes)}
    return await send_messages(channel.open(), (messages[size] for size in sizes))


async def send_bare_messages(channel: MessageChannel, host: Host, order: str, num_tokens: int) -> float:
    """Seconds for the same bytes as a hand-off, out of one pool and into the other."""
    stream = channel.open()
    await stream.write(f"{order}:{num_tokens}".encode())

    def gathered(span: KvSpan) -> bytes:
        def fill(message: memoryview) -> None:
            host.pool.read(span, message[HEADER_BYTES:])

        return filled(HEADER_BYTES + span_bytes(span, LAYOUT), fill)

    return await send_messages(stream, map(gathered, spans_of(host, order, num_tokens)))


class ProcessorTime:
    """How much of it each way takes in this process and in the other. Linux."""

    def __init__(self, other_pid: int) -> None:
        # As the kernel numbers the clock of another process: clock_getcpuclockid(3).
        self._clocks = {"sender": time.CLOCK_PROCESS_CPUTIME_ID, "receiver": ~other_pid << 3 | 2}
        self._last_s = self._now_s()

    def _now_s(self) -> dict[str, float]:
        return {side: time.clock_gettime(clock) for side, clock in self._clocks.items()}

    def since_last(self) -> dict[str, float]:
        """Seconds of each side since this was called last."""
        before_s, self._last_s = self._last_s, self._now_s()
        return {side: now_s - before_s[side] for side, now_s in self._last_s.items()}


@dataclass(frozen=True, slots=True)
class Other:
    """The other process: its id, a socket to it, and its memory."""

    pid: int
    plain: socket.socket
    mapped: MappedMemory


@dataclass(frozen=True, slots=True)
class Round:
    """One hand-off or its like: how long it took, and processor time by side, in seconds."""

    duration_s: float
    processor_s: dict[str, float]


async def measure(
    host: Host, port: int, other: Other, order: str, num_tokens: int, num_rounds: int
) -> dict[str, list[Round]]:
    """Each round, by way."""
    found: dict[str, list[Round]] = {}
    processor = ProcessorTime(other.pid)
    num_bytes = bytes_of(num_tokens)
    source = other.mapped.bytes()[:num_bytes]
    target = np.zeros(num_bytes, np.uint8)
    grpc_channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) for _ in range(2)
    ]

    def note(name: str, duration_s: float) -> None:
        found.setdefault(name, []).append(Round(duration_s, processor.since_last()))

    for number in range(-NUM_WARM, num_rounds):
        processor.since_last()
        for name, (transport, num_streams) in WAYS.items():
            channels = [GrpcChannel(channel) for channel in grpc_channels[:num_streams]]
            duration_s, taken = await hand_off(host, channels, transport, order, num_tokens, number)
            assert taken == transport, taken
            note(name, duration_s)
        note("plain gRPC", await send_plain_messages(GrpcChannel(grpc_channels[0], PLAIN_METHOD), num_tokens))
        bare = GrpcChannel(grpc_channels[0], BARE_METHOD)
        note("bare gRPC", await send_bare_messages(bare, host, order, num_tokens))
        note("TCP socket", send_by_socket(other.plain, memoryview(target)))
        began_s = time.perf_counter()
        np.copyto(target, source)
        note("memcpy", time.perf_counter() - began_s)
        print(f"round {number + 1} of {num_rounds}", file=sys.stderr, end="\r", flush=True)
    for channel in grpc_channels:
        await channel.close()
    print(file=sys.stderr)
    return {name: rounds[NUM_WARM:] for name, rounds in found.items()}


def send_by_socket(plain: socket.socket, payload: memoryview) -> float:
    """Seconds until the receiver has all of it."""
    began_s = time.perf_counter()
    plain.sendall(len(payload).to_bytes(8, "little"))
    for start in range(0, len(payload), TCP_CHUNK_BYTES):
        plain.sendall(payload[start : start + TCP_CHUNK_BYTES])
    assert plain.recv(1) == b"!"
    return time.perf_counter() - began_s


def table_of(found: dict[str, list[Round]], num_bytes: int) -> dict[str, dict[str, float]]:
    """Medians and rates, by way; means of the processor time, whose clock may be coarse."""
    rows: dict[str, dict[str, float]] = {}
    for name, rounds in found.items():
        times_s = [one.duration_s for one in rounds]
        median_s = statistics.median(times_s)
        p20, p80 = (statistics.quantiles(times_s, n=5)[i] for i in (0, 3))
        rows[name] = {"seconds": median_s, "p20_s": p20, "p80_s": p80, "bytes_per_s": num_bytes / median_s}
        for side in ("sender", "receiver"):
            mean_s = statistics.fmean(one.processor_s[side] for one in rounds)
            rows[name][f"{side}_s_per_gb"] = mean_s / num_bytes * 1e9
    for row in rows.values():
        for peer, key in (("plain gRPC", "of_plain_grpc"), ("TCP socket", "of_tcp"), ("memcpy", "of_memcpy")):
            row[key] = row["bytes_per_s"] / rows[peer]["bytes_per_s"]
    return rows


def show(rows: dict[str, dict[str, float]], order: str, num_tokens: int, num_rounds: int) -> None:
    """Print one table."""
    print(
        f"{num_tokens} tokens, {bytes_of(num_tokens) / 1e6:.0f} MB, blocks {order}; medians of {num_rounds} rounds"
    )
    heads = f"{'of gRPC':>9}{'of TCP':>8}{'of memcpy':>11}{'CPU s/GB sender':>17}{'receiver':>10}"
    print(f"{'way':<18}{'ms':>8}{'p20':>8}{'p80':>8}{'GB/s':>8}{heads}")
    for name, row in rows.items():
        times = f"{row['seconds'] * 1e3:>8.1f}{row['p20_s'] * 1e3:>8.1f}{row['p80_s'] * 1e3:>8.1f}"
        ratios = f"{row['of_plain_grpc']:>9.2f}{row['of_tcp']:>8.2f}{row['of_memcpy']:>11.2f}"
        work = f"{row['sender_s_per_gb']:>17.2f}{row['receiver_s_per_gb']:>10.2f}"
        print(f"{name:<18}{times}{row['bytes_per_s'] / 1e9:>8.2f}{ratios}{work}")


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
    process = mp.get_context("spawn").Process(target=receive, args=(theirs,))
    process.start()
    assert process.pid is not None
    port, plain_port, descriptor = pipe.recv()
    host = Host(seed=1)
    tables: list[dict[str, Any]] = []
    with socket.create_connection(("127.0.0.1", plain_port)) as plain:
        other = Other(process.pid, plain, MappedMemory.open(descriptor))
        for num_tokens, order in product(LENGTHS, ORDERS):
            num_rounds = (8 if args.quick else 60) * LENGTHS[0] // num_tokens + 3
            found = asyncio.run(measure(host, port, other, order, num_tokens, num_rounds))
            rows = table_of(found, bytes_of(num_tokens))
            tables.append({"num_tokens": num_tokens, "blocks": order, "ways": rows})
            show(rows, order, num_tokens, num_rounds)
        plain.sendall((0).to_bytes(8, "little"))
    pipe.send("over")
    process.join()
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "tables": tables}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
