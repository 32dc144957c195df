"""KV pulled out of another process through NIXL with its checksum, beside shared memory and a plain memcpy.

    python benchmarks/kvtransfer/nixl_copy.py [--quick] [--json FILE]

Needs the extra `nixl`. Two processes of one host: one owns a pool of SmolLM2 in fp16, the other reads all of it, blocks in
random order (pieces of 6 KiB) or one after the other, in chunks of one layer or a part of it. By each way that UCX can go here: what it takes between processes of a host
(cross-memory attach, one copy by the kernel), and TCP over loopback. "read only" is NIXL's part of a pull: KV arrives, and is
neither checked nor copied into blocks. All are measured in turn; bytes are counted once. Last, what the agent's thread takes
while nothing is asked of it: the time that it runs or waits for a core, of each second.
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from kvtransfer.host_pool import HostPool
from kvtransfer.layout import KvLayout
from kvtransfer.pieces import PoolGeometry, pieces_in
from kvtransfer.pool import KvSpan
from kvtransfer.pool_tensor import pool_shape
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transports import nixl, shm
from orchestrator.bench.machine import describe_machine

LAYOUT = KvLayout("smollm2-135m", "float16", 16, 30, 3, 64, "rope")
CHUNKS_MIB = (2, 8, 32)
#: Name -> UCX_TLS.
WAYS = {"same host": "tcp,sm,self", "tcp": "tcp"}
#: Once the other end is heard of, its thread is left alone for so long.
IDLE_S = 1.0


def own(pipe: Connection, pool_bytes: int) -> None:
    """One process: fills a pool and says where it is."""
    num_blocks = pool_bytes // LAYOUT.block_bytes
    memory = SharedMemory.create(num_blocks * LAYOUT.block_bytes)
    memory.tensor((memory.num_bytes // 8,), torch.int64).random_()
    cache = memory.tensor(pool_shape(LAYOUT, num_blocks), torch.float16)
    pool = HostPool(cache, LAYOUT, memory, is_in_nixl=True)
    pipe.send({offer.transport: offer.descriptor for offer in pool.offers})
    pipe.recv()
    began = _wanted_s()
    time.sleep(IDLE_S)
    pipe.send({name: (now - began[name]) / IDLE_S for name, now in _wanted_s().items() if name in began})
    pipe.recv()


def _wanted_s() -> dict[str, float]:
    """Thread -> seconds that it has run or waited for a core. But for the one that asks."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            run_ns, wait_ns, _ = (task / "schedstat").read_text().split()
            found[task.name] = (int(run_ns) + int(wait_ns)) / 1e9
    return found


def chunks_of(block_ids: list[int], max_bytes: int) -> list[KvSpan]:
    """One layer, or a part of it, each: `max_bytes` at most. Larger than a layer, several."""
    block_bytes = LAYOUT.block_bytes // LAYOUT.num_layers
    step = max(1, min(len(block_ids), max_bytes // block_bytes))
    num_layers = max(1, max_bytes // (block_bytes * len(block_ids)))
    found = []
    for layer in range(0, LAYOUT.num_layers, num_layers):
        layers = (layer, min(layer + num_layers, LAYOUT.num_layers))
        for first in range(0, len(block_ids), step):
            ids = tuple(block_ids[first : first + step])
            found.append(KvSpan(ids, 0, len(ids) * LAYOUT.block_size, *layers, 0, LAYOUT.num_kv_heads))
    return found


def read(pipe: Connection, descriptors: dict[str, bytes], num_rounds: int) -> None:
    """The other process: sends medians in GB/s by what was measured."""
    began_s = time.perf_counter()
    mapped = nixl.open_pool(descriptors["nixl"])
    open_ms = (time.perf_counter() - began_s) * 1000
    beside = shm.open_pool(descriptors["shm"])
    num_blocks = int(json.loads(descriptors["nixl"])["num_blocks"])
    geometry = PoolGeometry(LAYOUT, num_blocks)
    cache = torch.ones(pool_shape(LAYOUT, num_blocks), dtype=torch.float16)
    target, flat = HostPool(cache, LAYOUT), cache.view(-1).view(torch.uint8).numpy()
    copied = np.ones_like(flat)
    mixed = np.random.default_rng(0).permutation(num_blocks).tolist()
    into, in_order = mixed[::-1], list(range(num_blocks))
    address = mapped._description.address
    endpoint = nixl.this_endpoint()

    def pull(pool: nixl.NixlPool | shm.SharedPool, source: list[int], mib: int) -> None:
        for part, place in zip(chunks_of(source, mib << 20), chunks_of(into, mib << 20), strict=True):
            pool.pull(part, target, place)

    def read_only(mib: int) -> None:
        for part in chunks_of(mixed, mib << 20):
            pieces = pieces_in(part, geometry)
            endpoint.read(mapped._description.agent, pieces.source_offsets + address, pieces.lengths)

    measured: dict[str, Callable[[], object]] = {"memcpy": lambda: np.copyto(copied, flat)}
    for mib in CHUNKS_MIB:
        measured[f"shm, chunks of {mib} MiB"] = lambda mib=mib: pull(beside, mixed, mib)  # type: ignore[misc]
        measured[f"nixl, chunks of {mib} MiB"] = lambda mib=mib: pull(mapped, mixed, mib)  # type: ignore[misc]
        measured[f"nixl, chunks of {mib} MiB, in order"] = lambda mib=mib: pull(mapped, in_order, mib)  # type: ignore[misc]
        measured[f"nixl, chunks of {mib} MiB, read only"] = lambda mib=mib: read_only(mib)  # type: ignore[misc]
    times_s: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(num_rounds + 1):
        for name, way in measured.items():
            began_s = time.perf_counter()
            way()
            # The first round touches all of it for the first time.
            if number:
                times_s[name].append(time.perf_counter() - began_s)
    whole = chunks_of(in_order, 1 << 40)[0]
    part = replace(whole, layer_hi=1)
    assert mapped.pull(part, target, part) == beside.pull(part, target, part)
    mapped.close()
    beside.close()
    rates = {name: flat.size / statistics.median(values) / 1e9 for name, values in times_s.items()}
    pipe.send({**rates, "open_ms": open_ms})


def measure(ucx_tls: str, pool_bytes: int, num_rounds: int) -> dict[str, float]:
    """See `read`, and the share of a core that the idle agent's busiest thread asks for."""
    # UCX reads it when an agent is made.
    os.environ["UCX_TLS"] = ucx_tls
    context = mp.get_context("spawn")
    to_owner, owners = context.Pipe()
    to_reader, readers = context.Pipe()
    owner = context.Process(target=own, args=(owners, pool_bytes))
    owner.start()
    try:
        reader = context.Process(target=read, args=(readers, to_owner.recv(), num_rounds))
        reader.start()
        readers.close()
        rates: dict[str, float] = to_reader.recv()
        reader.join()
        to_owner.send(None)
        return {**rates, "idle_cores": max(to_owner.recv().values())}
    finally:
        to_owner.send(None)
        owner.join()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller pool and fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if find_spec("nixl") is None:
        print("the package nixl is not installed: pip install 'phasewise[nixl]'", file=sys.stderr)
        return 1
    print(f"nixl {version('nixl')}", flush=True)
    results = {}
    for name, ucx_tls in WAYS.items():
        row = measure(ucx_tls, (32 if args.quick else 128) << 20, 3 if args.quick else 5)
        results[name] = row
        print(f"\n{name} (UCX_TLS={ucx_tls}); opened in {row['open_ms']:.0f} ms with the agent; ", end="")
        print(f"the owner's idle agent wants {row['idle_cores']:.2f} cores")
        for way, rate in row.items():
            if way not in ("open_ms", "idle_cores"):
                print(f"{way:>36} {rate:>7.2f} GB/s {rate / row['memcpy']:>6.2f} of memcpy", flush=True)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "nixl": version("nixl"), "ways": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
