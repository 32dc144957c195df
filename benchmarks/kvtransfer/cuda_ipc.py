"""A hand-off of KV between two processes of one GPU, or of two, by CUDA IPC, beside a plain copy within the device.

    PYTHONPATH=.:kernels python benchmarks/kvtransfer/cuda_ipc.py [--gpus {1,2}] [--quick] [--json FILE] [--sweep]

One process owns a pool of Llama-3-8B's shape, filled with random values; the other maps it and pulls 2,048 tokens of
it, 268 MB in shuffled blocks, into its own pool, on the same GPU or on another one of the host. Needs an NVIDIA GPU, and measures nothing where
tests/gpu/test_cuda_ipc.py fails; the last part needs gRPC, protobuf and google-crc32c.

Rates are of the device: CUDA events, the variants in turn, each after a write of 1 GiB, so that nothing is left in the
cache and the next kernel is queued before the one that is timed begins. Bytes read and bytes written are both counted.
Hand-offs are on the owner's clock, from its checksum to the other's acknowledgement: over gRPC until it hears that the other
has committed, and its blocks are free. Where the time goes is told by both: their clock is that of the machine.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import describe_gpu, tests_problem
from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvPool, KvSpan, PoolOffer, span_bytes, span_of
from kvtransfer.transports.cuda_ipc import CudaPool, MappedCudaPool, open_pool
from phasewise_kernels.block_copy import op
from phasewise_kernels.block_copy.reference import TokenRows

TESTS = "tests/gpu/test_cuda_ipc.py"
VISIBLE = "CUDA_VISIBLE_DEVICES"
LAYOUT = KvLayout("benchmark", "bfloat16", 16, 32, 8, 128, "rope:theta=500000")
NUM_TOKENS = 2048
NUM_BLOCKS = 512
#: Sequences that the blocks of a pool are divided among; rounds take them in turn.
NUM_SEQUENCES = NUM_BLOCKS * LAYOUT.block_size // NUM_TOKENS
COLD_BYTES = 1 << 30
NUM_WARM_UP = 3
#: Whether blocks are reserved before the clock starts, as they are while prefill runs, or after.
IS_AHEAD = (True, False)
#: Of a hand-off by the protocol: (name, begin, end) by the marks of both processes. What is reserved before is not counted.
PHASES = (
    ("reserve: asked for until granted", "made", "granted"),
    ("checksum: KV ready until computed", "ready", "checked"),
    ("descriptor: until it is there", "checked", "pull"),
    ("copy, with the checksum", "pull", "pulled"),
    ("verify: until blocks are handed over", "pulled", "committed"),
    ("commit: until the owner hears of it", "committed", "released"),
    ("close of the stream, not counted", "released", "closed"),
)
SWEEP_TILES = (256, 512, 1024, 2048)
SWEEP_WARPS = (4, 8)
SWEEP_PROGRAMS = (2, 4, 8, 16)


def random_pool(seed: int) -> CudaPool:
    """Filled on the GPU."""
    shape = (
        LAYOUT.num_layers,
        2,
        NUM_BLOCKS,
        LAYOUT.block_size,
        LAYOUT.num_heads,
        LAYOUT.head_dim,
    )
    generator = torch.Generator("cuda").manual_seed(seed)
    pool = CudaPool(torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator), LAYOUT)
    assert pool.ipc_problem is None, pool.ipc_problem
    pool.warm_up()
    return pool


@cache
def sequences(seed: int) -> list[list[int]]:
    """The blocks of each, shuffled over the whole pool."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    per_sequence = NUM_BLOCKS // NUM_SEQUENCES
    return [order[first : first + per_sequence] for first in range(0, NUM_BLOCKS, per_sequence)]


def blocks_of(round_number: int, seed: int) -> list[int]:
    """Of the sequence whose turn it is."""
    return sequences(seed)[round_number % NUM_SEQUENCES]


def span_in(round_number: int, seed: int) -> KvSpan:
    """All of that sequence."""
    return span_of(
        blocks_of(round_number, seed),
        LAYOUT.block_size,
        tokens=(0, NUM_TOKENS),
        layers=(0, LAYOUT.num_layers),
        heads=LAYOUT.heads,
    )


NUM_BYTES = span_bytes(span_in(0, 0), LAYOUT)


# The owner's process.


def own(pipe: Connection, visible: str) -> None:
    """Make a pool on the first of the visible GPUs and do what the pipe says, until it is killed."""
    os.environ[VISIBLE] = visible
    pool = random_pool(seed=1)
    pipe.send((pool.offers[0].descriptor, used_bytes()))
    while command := pipe.recv():
        if command[0] == "used":
            pipe.send(used_bytes())
        elif command[0] == "bare":
            pipe.send(offer_bare(pipe, pool, command[1]))
        else:
            pipe.send(asyncio.run(send_by_protocol(pool, *command[1:])))


def used_bytes() -> int:
    """Of the memory of this process's GPU, by all processes."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


def offer_bare(pipe: Connection, pool: KvPool, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each hand-off, and of its first part, the checksum."""
    times: dict[str, list[float]] = {"handoff": [], "checksum": []}
    for number in range(num_rounds):
        span = span_in(number, seed=1)
        began_s = time.perf_counter()
        checksum = pool.checksum(span, "cuda_ipc")
        computed_s = time.perf_counter()
        pipe.send((span, checksum))
        answer = pipe.recv()
        times["handoff"].append(time.perf_counter() - began_s)
        times["checksum"].append(computed_s - began_s)
        assert answer == "verified", answer
    return times


async def send_by_protocol(pool: KvPool, port: int, num_rounds: int, is_ahead: bool) -> dict[str, Any]:
    """Marks of each transfer on the owner's side, and how the last one went."""
    import grpc.aio

    from kvtransfer.client import KvSender
    from kvtransfer.config import KvTransferConfig
    from kvtransfer.digest import token_digest
    from kvtransfer.grpc_stream import GRPC_OPTIONS, GrpcChannel

    config = KvTransferConfig()
    host = BenchmarkHost(pool, seed=1)
    num_tokens = NUM_TOKENS
    digest = token_digest(range(num_tokens))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS) as channel:
        way = GrpcChannel(channel)
        for number in range(-NUM_WARM_UP, num_rounds):
            host.begin("made")
            sender = KvSender(
                host,
                way,
                transfer_id=f"{is_ahead}-{number}",
                block_ids=blocks_of(number, seed=1),
                num_tokens=num_tokens,
                max_tokens=num_tokens,
                token_digest=digest,
                peer_incarnation=1,
                timeout_s=60,
                config=config,
            )
            running = asyncio.create_task(sender.run())
            await sender.wait_granted()
            host.mark("granted")
            host.mark("ready")
            sender.kv_ready(0, pool.layout.num_layers, 0, num_tokens)
            sender.prefill_finished([7])
            report = await running
            host.mark("closed")
    return {
        "marks": host.marks[NUM_WARM_UP:],
        "transport": report.transport,
        "reason": report.transport_reason,
        "num_chunks": report.num_chunks,
    }


class BenchmarkHost:
    """A worker that has a pool and nothing else to do, and notes when what happens. Implements host.KvHost."""

    def __init__(self, pool: KvPool, seed: int) -> None:
        self.pool: KvPool = _MarkedPool(pool, self) if seed == 1 else pool
        self.incarnation = 1
        self._seed = seed
        self._num_reserved = 0
        #: Of each transfer: what happened, and when, by `time.perf_counter`.
        self.marks: list[dict[str, float]] = []

    def begin(self, name: str) -> None:
        """A transfer begins."""
        self.marks.append({name: time.perf_counter()})

    def mark(self, name: str) -> None:
        """It has got so far."""
        self.marks[-1][name] = time.perf_counter()

    async def reserve(self, *_: object, **_sizes: object) -> Sequence[int]:
        self.begin("reserving")
        self._num_reserved += 1
        return blocks_of(self._num_reserved, self._seed)

    async def find_cached(self, *_: object, **_sizes: object) -> Any:
        raise NotImplementedError

    def commit(self, *_: object) -> None:
        self.mark("committed")

    def release(self, *_: object) -> None:
        self.mark("released")


class _MarkedPool:
    """Notes when the last checksum was there."""

    def __init__(self, pool: KvPool, host: BenchmarkHost) -> None:
        self._pool = pool
        self._host = host

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def offers(self) -> tuple[PoolOffer, ...]:
        return self._pool.offers

    def checksum(self, span: KvSpan, transport: str) -> int:
        checksum = self._pool.checksum(span, transport)
        self._host.mark("checked")
        return checksum

    def read(self, span: KvSpan, out: memoryview) -> int:
        return self._pool.read(span, out)

    def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
        return self._pool.write(span, payload, dtype)


# The reader's process.


def take_bare(pipe: Connection, mapped: MappedCudaPool, pool: KvPool, num_rounds: int) -> dict[str, Any]:
    """Median seconds of hand-offs over a pipe, and of their parts on either side."""
    pipe.send(("bare", num_rounds))
    pulls: list[float] = []
    for number in range(num_rounds):
        span, announced = pipe.recv()
        began_s = time.perf_counter()
        checksum = mapped.pull(span, pool, span_in(number, seed=2))
        pulls.append(time.perf_counter() - began_s)
        pipe.send("verified" if checksum == announced else "damaged")
    times = pipe.recv()
    return {name: statistics.median(values) for name, values in {**times, "pull": pulls}.items()} | {
        "handoff_p90": statistics.quantiles(times["handoff"], n=10)[-1]
    }


def protocol_handoff(pipe: Connection, pool: KvPool, num_rounds: int) -> dict[str, Any]:
    """The same by the whole protocol over gRPC on loopback, with blocks reserved before, and with that."""
    return asyncio.run(_serve_protocol(pipe, pool, num_rounds))


async def _serve_protocol(pipe: Connection, pool: KvPool, num_rounds: int) -> dict[str, Any]:
    import grpc.aio

    from kvtransfer.config import KvTransferConfig
    from kvtransfer.grpc_stream import GRPC_OPTIONS
    from kvtransfer.server import add_kvtransfer_service

    server = grpc.aio.server(options=GRPC_OPTIONS)
    host = BenchmarkHost(pool, seed=2)
    receiver = add_kvtransfer_service(server, host, KvTransferConfig())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    results = {}
    try:
        for is_ahead in IS_AHEAD:
            host.marks.clear()
            with _marked_pulls(host):
                pipe.send(("protocol", port, num_rounds, is_ahead))
                result = await asyncio.to_thread(pipe.recv)
            theirs = result.pop("marks")
            rows = [{**ours, **row} for ours, row in zip(host.marks[NUM_WARM_UP:], theirs, strict=True)]
            times = [row["released"] - row["ready" if is_ahead else "made"] for row in rows]
            results["reserved before" if is_ahead else "whole"] = {
                **_spread("handoff", times),
                "phases": {
                    name: _spread("seconds", [row[end] - row[begin] for row in rows])
                    for name, begin, end in PHASES
                },
                **result,
            }
    finally:
        await receiver.close("the benchmark is over")
        await server.stop(None)
    return results


def _spread(name: str, times: list[float]) -> dict[str, float]:
    """Median and tails."""
    p90, p95 = (statistics.quantiles(times, n=20)[at] for at in (17, 18))
    return {name: statistics.median(times), f"{name}_p90": p90, f"{name}_p95": p95}


@contextmanager
def _marked_pulls(host: BenchmarkHost) -> Iterator[None]:
    """Note when the first pull of each transfer begins, and when the last one has ended."""
    pull = MappedCudaPool.pull

    def marked(mapped: MappedCudaPool, source: KvSpan, target: KvPool, into: KvSpan) -> int:
        if "pull" not in host.marks[-1]:
            host.mark("pull")
        checksum = pull(mapped, source, target, into)
        host.mark("pulled")
        return checksum

    with patch.object(MappedCudaPool, "pull", marked):
        yield


def device_rates(mapped: MappedCudaPool, pool: CudaPool, num_rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and GB/s by variant."""
    local = random_pool(seed=3)
    plain = torch.empty((2, NUM_SEQUENCES, NUM_BYTES), dtype=torch.uint8, device="cuda")
    plain.random_()

    def copy(number: int) -> None:
        plain[1, number % NUM_SEQUENCES].copy_(plain[0, number % NUM_SEQUENCES])

    def start(
        source: Callable[[int], TokenRows], *, is_copied: bool, is_checked: bool
    ) -> Callable[[int], None]:
        def run(number: int) -> None:
            target = pool.rows(span_in(number, seed=2)) if is_copied else None
            op.start_block_copy(source(number), target, is_checked=is_checked)

        return run

    def theirs(number: int) -> TokenRows:
        return mapped.rows(span_in(number, seed=1))

    def ours(number: int) -> TokenRows:
        return local.rows(span_in(number, seed=1))

    variants: dict[str, tuple[Callable[[int], None], int]] = {
        "plain copy_ in the device": (copy, 2),
        "pull, with checksum": (start(theirs, is_copied=True, is_checked=True), 2),
        "pull, without": (start(theirs, is_copied=True, is_checked=False), 2),
        "the same in one process, with": (start(ours, is_copied=True, is_checked=True), 2),
        "the same in one process, without": (start(ours, is_copied=True, is_checked=False), 2),
        "checksum alone": (start(ours, is_copied=False, is_checked=True), 1),
    }
    medians = time_in_turn({name: run for name, (run, _) in variants.items()}, num_rounds)
    return {
        name: {"seconds": medians[name], "gb_per_s": passes * NUM_BYTES / medians[name] / 1e9}
        for name, (_, passes) in variants.items()
    }


def sweep(mapped: MappedCudaPool, pool: CudaPool, num_rounds: int) -> dict[str, float]:
    """Median seconds of a pull by how the kernel is cut up, the fastest first."""
    variants = {}
    for tile, warps, programs, is_checked in product(SWEEP_TILES, SWEEP_WARPS, SWEEP_PROGRAMS, (True, False)):
        tuning = op.Tuning(tile_vectors=tile, num_warps=warps, programs_per_sm=programs)

        def run(number: int, tuning: op.Tuning = tuning, is_checked: bool = is_checked) -> None:
            source, target = mapped.rows(span_in(number, seed=1)), pool.rows(span_in(number, seed=2))
            op.start_block_copy(source, target, is_checked=is_checked, tuning=tuning)

        variants[
            f"tile {tile:4} warps {warps} per SM {programs:2} {'checked' if is_checked else 'plain'}"
        ] = run
    medians = time_in_turn(variants, num_rounds)
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def time_in_turn(variants: dict[str, Callable[[int], None]], num_rounds: int) -> dict[str, float]:
    """Median seconds of the device."""
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-NUM_WARM_UP, num_rounds):
        for name, run in variants.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cold.fill_(number & 0xFF)
            begin.record()
            run(number)
            end.record()
            end.synchronize()
            if number >= 0:
                times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def print_results(results: dict[str, Any]) -> None:
    """As tables."""
    copied_s = results["rates"]["plain copy_ in the device"]["gb_per_s"]
    print(f"\n{NUM_TOKENS} tokens, {NUM_BYTES / 1e6:.0f} MB; {results['machine']['gpu']}")
    print(f"{'':>34}{'us':>9}{'GB/s':>9}{'of copy_':>9}")
    for name, row in results["rates"].items():
        print(
            f"{name:>34}{row['seconds'] * 1e6:>9.0f}{row['gb_per_s']:>9.0f}{row['gb_per_s'] / copied_s:>9.2f}"
        )
    if results["mapping_bytes"] is not None:
        print(
            f"\nmemory of the owner's GPU that the mapping took: {results['mapping_bytes'] / 2**20:.0f} MiB"
        )
    bare = results["bare"]
    print("\nhand-off between two processes, ms" + f"{'median':>10}{'p90':>8}")
    print(f"{'over a pipe':>34}{bare['handoff'] * 1e3:>10.2f}{bare['handoff_p90'] * 1e3:>8.2f}")
    print(f"{'of it the checksum of the owner':>34}{bare['checksum'] * 1e3:>10.2f}")
    print(f"{'of it the pull':>34}{bare['pull'] * 1e3:>10.2f}")
    for what, row in results["protocol"].items():
        if "not_run" in row:
            print(f"by the protocol: not run, {row['not_run']}")
            continue
        name = f"protocol, {what}, {row['num_chunks']} chunk"
        print(
            f"{name:>34}{row['handoff'] * 1e3:>10.2f}{row['handoff_p90'] * 1e3:>8.2f}  by {row['transport']}"
        )
    for what, row in results["protocol"].items():
        if "phases" in row:
            print(f"\nwhere it goes, {what}, ms" + f"{'median':>20}{'p95':>8}")
            for name, phase in row["phases"].items():
                print(f"{name:>38}{phase['seconds'] * 1e3:>10.3f}{phase['seconds_p95'] * 1e3:>8.3f}")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="2: the owner is on another one")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--sweep", action="store_true", help="time the kernel cut up in other ways, too")
    args = parser.parse_args()
    if torch.cuda.device_count() < args.gpus:
        print(f"this process sees {torch.cuda.device_count()} GPUs, not {args.gpus}", file=sys.stderr)
        return 1
    # Each process sees one, as Ray has it: CUDA looks at this when it is first asked for anything.
    names = os.environ.get(VISIBLE, "0,1").split(",")
    os.environ[VISIBLE] = names[0]
    if (problem := tests_problem(TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    machine = describe_gpu()
    num_rounds = 30 if args.quick else 100
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs, names[args.gpus - 1]), daemon=True)
    owner.start()
    theirs.close()
    pool = random_pool(seed=2)
    descriptor, before_bytes = pipe.recv()
    mapped = open_pool(descriptor)
    take_bare(pipe, mapped, pool, NUM_WARM_UP)
    pipe.send(("used",))
    mapping_bytes = pipe.recv() - before_bytes
    results: dict[str, Any] = {
        "machine": machine,
        "num_rounds": num_rounds,
        "num_bytes": NUM_BYTES,
        "num_gpus": args.gpus,
        # That the owner's GPU has less since the other process, of another GPU, maps its pool; the owner has computed meanwhile.
        "mapping_bytes": mapping_bytes if args.gpus > 1 else None,
        "rates": device_rates(mapped, pool, num_rounds),
        "bare": take_bare(pipe, mapped, pool, num_rounds),
    }
    if args.sweep:
        results["sweep"] = sweep(mapped, pool, 10)
        for name, seconds in results["sweep"].items():
            print(f"{name:>44}{seconds * 1e6:>8.0f} us{2 * NUM_BYTES / seconds / 1e9:>8.0f} GB/s")
    try:
        results["protocol"] = protocol_handoff(pipe, pool, num_rounds)
    except Exception as error:  # noqa: BLE001 - what it needs may be missing, and the other numbers stand
        results["protocol"] = {"": {"not_run": repr(error)}}
    print_results(results)
    mapped.close()
    owner.kill()
    owner.join()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
