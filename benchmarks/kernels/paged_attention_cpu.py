"""Attention of one new token per sequence over a KV cache in blocks: read in place, beside gathered for torch.

    python benchmarks/kernels/paged_attention_cpu.py [--quick] [--threads N] [--json FILE]

Both take turns in one process, layer by layer of one cache, so that K and V come from memory. Heads are those of
SmolLM2-135M: 9 query heads, 3 KV heads, head_dim 64; blocks of 16 tokens in random order.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from orchestrator.bench.machine import describe_machine
from phasewise_kernels import jit
from phasewise_kernels.paged_attention.op import AttentionBatch, paged_attention

#: (sequences, tokens of context).
BATCHES = ((1, 100), (1, 576), (1, 4096), (4, 576), (16, 100), (16, 576), (16, 2048), (64, 576))
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
#: All layers of a cache together are larger than any processor's cache.
CACHE_BYTES = 256 << 20


def measure(num_sequences: int, context_tokens: int, num_rounds: int) -> dict[str, float]:
    """Medians in ms a layer, and what reading in place streams, in GB/s."""
    num_blocks = -(-context_tokens // BLOCK_SIZE)
    shape = (num_sequences * num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    layer_bytes = int(np.prod(shape)) * 4 * 2
    # An odd number: turns then meet every layer in both ways.
    num_layers = min(CACHE_BYTES // layer_bytes, 200) | 1
    cache = torch.randn(num_layers, 2, *shape)
    query = torch.randn(num_sequences, NUM_HEADS, HEAD_DIM)
    tables = torch.randperm(shape[0]).view(num_sequences, num_blocks).numpy().astype(np.int32)
    name = jit.KERNEL_MODULES[1]
    kernels = {"gathered": None, "in place": jit.load(name)}
    batches: dict[str, AttentionBatch] = {}
    times_s: dict[str, list[float]] = {way: [] for way in kernels}
    turn = 0
    try:
        for number in range(num_rounds + 3):
            for way, kernel in kernels.items():
                jit._loaded[name] = kernel
                batch = batches.setdefault(
                    way,
                    AttentionBatch.build(
                        block_tables=tables,
                        query_lens=np.ones(num_sequences, np.int64),
                        context_lens=np.full(num_sequences, context_tokens, np.int64),
                        block_size=BLOCK_SIZE,
                    ),
                )
                turn = (turn + 1) % num_layers
                began_s = time.perf_counter()
                paged_attention(query, cache[turn, 0], cache[turn, 1], batch)
                if number >= 3:
                    times_s[way].append(time.perf_counter() - began_s)
    finally:
        jit._loaded[name] = kernels["in place"]
    found = {way: statistics.median(values) * 1000 for way, values in times_s.items()}
    return {**found, "GB/s": layer_bytes / found["in place"] / 1e6}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--threads", type=int, default=1, help="threads of the kernels (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True)):
        print("\nthe kernels cannot be compiled here", file=sys.stderr)
        return 1
    print(
        f"\n{'sequences':>9} {'context':>8} {'gathered ms':>12} {'in place ms':>12} {'ratio':>6} {'GB/s':>6}"
    )
    rows = []
    for num_sequences, context_tokens in BATCHES:
        row = measure(num_sequences, context_tokens, 12 if args.quick else 100)
        ratio = row["gathered"] / row["in place"]
        rows.append({"sequences": num_sequences, "context_tokens": context_tokens, **row, "ratio": ratio})
        print(
            f"{num_sequences:>9} {context_tokens:>8} {row['gathered']:>12.3f} {row['in place']:>12.3f} "
            f"{ratio:>6.2f} {row['GB/s']:>6.1f}",
            flush=True,
        )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "threads": args.threads, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
