"""KV pulled out of another process's shared memory with its checksum, beside a plain memcpy of as many bytes.

    python benchmarks/kvtransfer/host_copy.py [--quick] [--json FILE]

One process owns the pools, this one maps and reads them, with one thread. A pool has 256 MiB, far more than any cache,
and all of it is pulled: blocks in order, in random order, and in random order in chunks as a transfer
asks for them: one layer or a part of it, of at most 2 and 8 MiB. The yardstick is `numpy.copyto` out of the same mapped memory, in turn with each; bytes are counted once.
"""

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import MappedMemory, SharedMemory, SharedMemoryDescriptor
from kvtransfer.transports import shm
from orchestrator.bench.machine import describe_machine
from phasewise_kernels.kv_copy.op import crc32c, has_kernel

POOL_BYTES = 256 << 20
CHUNKS_MIB = (2, 8)
SMOLLM2 = KvLayout("smollm2-135m", "float32", 16, 30, 3, 64, "rope")
LLAMA_8B = KvLayout("llama-3-8b", "bfloat16", 16, 32, 8, 128, "rope")
#: (name, layout).
POOLS = (
    ("SmolLM2 fp32", SMOLLM2),
    ("SmolLM2 fp16", replace(SMOLLM2, dtype="float16")),
    ("Llama-3-8B bf16", LLAMA_8B),
)


def own(pipe: Connection) -> None:
    """The other process: fills a pool of each layout and says where they are."""
    pools = []
    for _, layout in POOLS:
        num_blocks = POOL_BYTES // layout.block_bytes
        memory = SharedMemory.create(num_blocks * layout.block_bytes)
        memory.tensor((memory.num_bytes // 8,), torch.int64).random_()
        pools.append(HostPool(memory.tensor(pool_shape(layout, num_blocks), _dtype(layout)), layout, memory))
    pipe.send([pool.offers[1].descriptor for pool in pools])
    pipe.recv()


def _dtype(layout: KvLayout) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype


def chunks_of(span: KvSpan, layout: KvLayout, max_bytes: int) -> list[KvSpan]:
    """One layer and as many blocks as `max_bytes` hold each."""
    step = max(1, max_bytes // (layout.block_bytes // layout.num_layers))
    found = []
    for layer in range(span.layer_lo, span.layer_hi):
        for first in range(0, len(span.block_ids), step):
            ids = span.block_ids[first : first + step]
            num_tokens = len(ids) * layout.block_size
            found.append(
                replace(span, block_ids=ids, num_tokens=num_tokens, layer_lo=layer, layer_hi=layer + 1)
            )
    return found


def measure(descriptor: bytes, layout: KvLayout, num_rounds: int) -> dict[str, float]:
    """Medians in GB/s by way."""
    began_s = time.perf_counter()
    mapped = shm.open_pool(descriptor)
    open_s = time.perf_counter() - began_s
    plain = MappedMemory.open(SharedMemoryDescriptor(**json.loads(descriptor)["memory"]))
    source = plain.bytes()
    num_blocks = source.size // layout.block_bytes
    cache = torch.ones(pool_shape(layout, num_blocks), dtype=_dtype(layout))
    target, flat = HostPool(cache, layout), cache.view(-1).view(torch.uint8).numpy()
    mixed = tuple(np.random.default_rng(0).permutation(num_blocks).tolist())
    in_order = KvSpan(
        tuple(range(num_blocks)),
        0,
        num_blocks * layout.block_size,
        0,
        layout.num_layers,
        0,
        layout.num_kv_heads,
    )
    shuffled = replace(in_order, block_ids=mixed)
    # The receiver's blocks are in another order than the sender's.
    into = replace(in_order, block_ids=mixed[::-1])

    chunks = {
        mib: list(
            zip(chunks_of(shuffled, layout, mib << 20), chunks_of(into, layout, mib << 20), strict=True)
        )
        for mib in CHUNKS_MIB
    }

    def pull_chunks(mib: int) -> None:
        for part, place in chunks[mib]:
            mapped.pull(part, target, place)

    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(flat, source),
        "pull in order": lambda: mapped.pull(in_order, target, in_order),
        "pull shuffled": lambda: mapped.pull(shuffled, target, into),
        **{f"in chunks of {mib} MiB": lambda mib=mib: pull_chunks(mib) for mib in CHUNKS_MIB},  # type: ignore[misc]
        "checksum only": lambda: crc32c(source),
        "google_crc32c": lambda: google_crc32c.value(source),
    }
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        for name, way in ways.items():
            began_s = time.perf_counter()
            way()
            # The first round touches all of it for the first time.
            if number:
                times_s[name].append(time.perf_counter() - began_s)
    assert mapped.pull(in_order, target, in_order) == google_crc32c.value(source)
    assert np.array_equal(flat, source)
    mapped.close()
    rates = {name: flat.size / statistics.median(values) / 1e9 for name, values in times_s.items()}
    return {**rates, "open_ms": open_s * 1000}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    print(f"kernel: {'numba' if has_kernel() else 'none, numpy and google_crc32c instead'}", flush=True)
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs,))
    owner.start()
    results = {}
    try:
        for (name, layout), descriptor in zip(POOLS, pipe.recv(), strict=True):
            row = measure(descriptor, layout, 5 if args.quick else 31)
            results[name] = row
            print(f"\n{name}, blocks of {layout.block_size}; mapped in {row['open_ms']:.0f} ms")
            for way, rate in row.items():
                if way != "open_ms":
                    print(f"{way:>20} {rate:>7.2f} GB/s {rate / row['memcpy']:>6.2f} of memcpy", flush=True)
    finally:
        pipe.send(None)
        owner.join()
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "gb_per_s": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
