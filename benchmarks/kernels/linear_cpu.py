"""Projections of few and many rows by dtype of weight, beside torch's own.

    python benchmarks/kernels/linear_cpu.py [--quick] [--threads N] [--json FILE]

The baseline is the faster of `torch.nn.functional.linear` and the product with the weight on the left, for the same
shape. All take turns in one process, each time with another copy of the weight, so that weights come from memory.
Shapes are those of SmolLM2-135M.
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
from phasewise_kernels import jit
from phasewise_kernels.linear.op import DTYPES, Linear

#: (what, out_size, in_size).
SHAPES = (("qkv", 960, 576), ("gate_up", 3072, 576), ("down", 576, 1536), ("lm_head", 49152, 576))
NUM_ROWS = (1, 2, 4, 8, 12, 16, 32, 128, 512)
#: Copies of a weight together are larger than any cache.
COPIES_BYTES = 256 << 20
#: The LM head is for one row of a sequence: more are not measured.
MAX_LM_HEAD_ROWS = 16


def measure(
    weights: list[torch.Tensor], layers: dict[str, list[Linear]], num_rows: int, num_rounds: int
) -> dict[str, float]:
    """Medians in ms by way, and `baseline`, the better of torch's two."""
    rows = torch.randn(num_rows, weights[0].shape[1])
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "F.linear": lambda i: F.linear(rows, weights[i]),
        "left": lambda i: torch.mm(weights[i], rows.t()).t().contiguous(),
    }
    for dtype, copies in layers.items():
        ways[dtype] = lambda i, copies=copies: copies[i](rows)  # type: ignore[misc]
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    turn = 0
    for number in range(num_rounds + 2):
        for name, way in ways.items():
            # A copy that was not used for a while.
            turn = (turn + 1) % len(weights)
            began_s = time.perf_counter()
            way(turn)
            if number >= 2:
                times_s[name].append(time.perf_counter() - began_s)
    found = {name: statistics.median(values) * 1000 for name, values in times_s.items()}
    return {"baseline": min(found["F.linear"], found["left"]), **found}


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
    print(f"\n{'shape':>8} {'rows':>5} {'torch ms':>9}" + "".join(f"{d + ' x':>12}" for d in DTYPES))
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name, out_size, in_size in SHAPES:
        # An odd number: turns then meet every copy in every way.
        num_copies = COPIES_BYTES // (out_size * in_size * 4) | 1
        weights = [torch.randn(out_size, in_size) / in_size**0.5 for _ in range(num_copies)]
        layers = {dtype: [Linear(weight, None, dtype) for weight in weights] for dtype in DTYPES}
        for linear in layers["float32"]:
            linear(torch.zeros(64, in_size))  # packs
        for num_rows in NUM_ROWS:
            if name == "lm_head" and num_rows > MAX_LM_HEAD_ROWS:
                break
            num_rounds = (7 if args.quick else 60) if num_rows < 100 and name != "lm_head" else 7
            row = measure(weights, layers, num_rows, num_rounds)
            results.setdefault(name, {})[num_rows] = row
            ratios = "".join(f"{row['baseline'] / row[dtype]:>12.2f}" for dtype in DTYPES)
            print(f"{name:>8} {num_rows:>5} {row['baseline']:>9.3f}{ratios}", flush=True)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        data = {"date": date, "machine": describe_machine(), "threads": args.threads, "ms": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
