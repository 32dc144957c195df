"""How the attention kernels are best cut up on this GPU: tokens of a tile, warps, stages, programs of a multiprocessor.

    python benchmarks/kernels/attention_tunings.py --kv {bf16,fp8,int4} [--quick] [--json FILE] [--commit NAME]

Decode over 8 KV heads, with more outputs than multiprocessors and with fewer, and chunks of prompts; the pool and the timing are those of
paged_attention_gpu.py. Prints each row with its best cuts, then the cuts that are best over all rows of a kind, by the geometric mean of their
time over the best of each row, which is what `lean_tuning` and `chunk_tuning` in cuda.py are set by. Nothing is reported when the kernels'
tests are red. Cuts that do not fit a multiprocessor are left out.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.kernels.attention_pool import Part, Pool, copy_bytes_per_s, time_s  # noqa: E402
from benchmarks.kernels.attention_shapes import ragged_lengths  # noqa: E402
from phasewise_kernels.kv_int4.op import PACKED_DTYPE  # noqa: E402
from phasewise_kernels.paged_attention.cuda import Tuning, chunk_attention, lean_attention  # noqa: E402

TESTS = "tests/gpu/test_paged_attention_gpu.py"
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int4": PACKED_DTYPE}
KV_HEADS = 8
#: (new tokens, all tokens) of each sequence.
ROWS: dict[str, tuple[list[tuple[int, int]], ...]] = {
    "many outputs": (
        [(1, 2048)] * 64,
        [(1, 16384)] * 16,
        [(1, 131_072)],
        [(1, length) for length in ragged_lengths(64, 4096)],
    ),
    "few outputs": ([(1, 2048)], [(1, 1024)] * 4, [(1, 4096)] * 8, [(1, 16384)]),
    "several new tokens": ([(4, 2048)] * 64,),
    "chunks": ([(512, 2560)], [(512, 8192)], [(2048, 2048)]),
}
#: (tokens of a tile, warps, stages) and programs of a multiprocessor.
LEAN = tuple(product((16, 32, 64, 128), (1, 2, 4, 8), (2, 3, 4), (1, 2, 4, 6, 8)))
QUICK_LEAN = (
    (16, 1, 4, 8),
    (32, 1, 2, 4),
    (32, 1, 2, 6),
    (32, 1, 2, 8),
    (32, 1, 3, 4),
    (32, 1, 3, 6),
    (32, 1, 3, 8),
    (32, 1, 4, 6),
    (32, 2, 4, 4),
    (64, 2, 2, 4),
    (64, 4, 3, 1),
    (64, 4, 3, 2),
    (128, 4, 2, 2),
)
CHUNK = tuple(product((32, 64, 128), (4, 8), (2, 3, 4)))
QUICK_CHUNK = ((64, 8, 3), (64, 8, 4), (128, 8, 2))
#: No more warps than a multiprocessor has, and 255 registers for each of their threads at worst.
MAX_WARPS = 16
Call = Callable[[Part], object]


def calls(kind: str, *, is_quick: bool) -> Iterator[tuple[str, Call]]:
    """Each cut, by name, as a call."""
    if kind == "chunks":
        for tile_tokens, num_warps, num_stages in QUICK_CHUNK if is_quick else CHUNK:
            tuning = Tuning(tile_tokens, num_warps, num_stages)
            yield f"{tile_tokens}, {num_warps}, {num_stages}", partial(chunk, tuning)
        return
    max_query_len = max(new for new, _ in ROWS[kind][0])
    for tile_tokens, num_warps, num_stages, programs in QUICK_LEAN if is_quick else LEAN:
        if num_warps * programs <= MAX_WARPS and tile_tokens <= 64 * num_warps:
            tuning = Tuning(tile_tokens, num_warps, num_stages, programs)
            yield (
                f"{tile_tokens}, {num_warps}, {num_stages}, {programs}",
                partial(lean, tuning, max_query_len),
            )


def lean(tuning: Tuning, max_query_len: int, part: Part) -> None:
    """The kernel of decode."""
    lean_attention(*part.arguments, window=0, max_query_len=max_query_len, tuning=tuning)


def chunk(tuning: Tuning, part: Part) -> None:
    """The kernel of chunks."""
    chunk_attention(*part.arguments, window=0, min_query_len=5, tuning=tuning)


def compiled(found: Sequence[tuple[str, Call]], parts: Sequence[Part]) -> list[tuple[str, Call]]:
    """Those that fit, compiled side by side."""

    def fits(call: Call) -> bool:
        torch.cuda.set_device(0)
        try:
            for part in parts:
                call(part)
        except OutOfResources:
            return False
        return True

    with ThreadPoolExecutor(16) as executor:
        are_fit = list(executor.map(fits, (call for _, call in found)))
    torch.cuda.synchronize()
    return [one for one, is_fit in zip(found, are_fit, strict=True) if is_fit]


def measured(pool: Pool, dtype: torch.dtype, *, is_quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each batch: microseconds by cut."""
    for kind, rows in ROWS.items():
        # Of each number of sequences that a kernel is compiled for.
        small = [pool.parts([(lengths[0][0], 64)] * len(lengths), KV_HEADS, dtype)[0] for lengths in rows]
        ways = compiled(list(calls(kind, is_quick=is_quick)), small)
        for lengths in rows:
            parts = pool.parts(lengths, KV_HEADS, dtype)[:8]
            times = {name: 1e6 * time_s(call, parts, 3) for name, call in ways}
            num_bytes = sum(total for _, total in lengths) * 2 * parts[0].caches[0][0, 0].nbytes
            yield {
                "kind": kind,
                "sequences": len(lengths),
                "new_tokens": lengths[0][0],
                "mean_context": sum(total for _, total in lengths) // len(lengths),
                "kv_bytes": num_bytes,
                "us": dict(sorted(times.items(), key=lambda item: item[1])),
            }


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each kind, the cuts by their time over the best of each row, on average; the best five."""
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row["us"] for row in rows if row["kind"] == kind]
        means = {
            name: math.exp(
                sum(math.log(times[name] / min(times.values())) for times in of_kind) / len(of_kind)
            )
            for name in of_kind[0]
        }
        found[kind] = dict(sorted(means.items(), key=lambda item: item[1])[:5])
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kv", choices=DTYPES, required=True, help="what the cache holds")
    parser.add_argument("--quick", action="store_true", help="a few cuts alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--commit", help="of the code, where git cannot say")
    args = parser.parse_args()
    if (problem := tests_problem(TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    pool, copy = Pool(), copy_bytes_per_s()
    machine = describe_gpu(args.commit)
    print(machine, f"copy {copy / 1e12:.2f} TB/s; cuts: tokens of a tile, warps, stages, programs")
    rows = []
    for row in measured(pool, DTYPES[args.kv], is_quick=args.quick):
        rows.append(row)
        best = "; ".join(f"({name}) {us:.1f}" for name, us in list(row["us"].items())[:5])
        print(
            f"{row['kind']:18} {row['sequences']:>3} x {row['mean_context']:>7} {row['new_tokens']:>4} new  us: {best}",
            flush=True,
        )
    best_cuts = best_of(rows)
    for kind, cuts in best_cuts.items():
        print(f"{kind:18}", "; ".join(f"({name}) x {ratio:.3f}" for name, ratio in cuts.items()))
    if args.json:
        result = {
            "machine": machine,
            "kv": args.kv,
            "copy_tb_per_s": copy / 1e12,
            "rows": rows,
            "best": best_cuts,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
