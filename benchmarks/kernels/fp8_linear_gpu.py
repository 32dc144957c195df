"""Products with weights in fp8 on a GPU, by number of rows, against cuBLAS and our kernel in bfloat16.

    python benchmarks/kernels/fp8_linear_gpu.py [--quick] [--tune] [--json FILE]

Needs an NVIDIA GPU of compute capability 8.9. It measures as benchmarks/kernels/fused_gpu.py does, and nothing where
the kernels' tests fail. Shapes are those of Llama-3-8B. Ways: the weight in bfloat16 by cuBLAS, and one row by
linear/triton_kernel.py; in fp8 few rows as they are; rows quantised and multiplied, with fast sums and without; either part alone.
Bytes are those of the weight as it is kept, of rows and outputs. --tune tries other cuts of the kernel for few rows.
"""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812 - torch's own name for it

from benchmarks.gpu import describe_gpu, tests_problem  # noqa: E402
from benchmarks.kernels.fused_gpu import BF16, Table, Way, copies_of, random  # noqa: E402
from phasewise_kernels.fp8_linear.op import quantise_rows  # noqa: E402

#: Of the ways: in fp8, by sums of less precision, one row in bfloat16.
TESTS = (
    "tests/gpu/test_fp8.py::test_the_kernels_equal_their_references",
    "tests/gpu/test_fp8.py::test_fast_sums_lose_less_than_half_of_what_fp8_does",
    "tests/gpu/test_cuda_engine.py::test_the_product_of_a_row",
)
#: (out_size, in_size) of the four matrices of a layer.
SHAPES = {
    "qkv": (6144, 4096),
    "attention_out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = (1, 2, 4, 8, 16, 64, 256, 2048)
#: Up to this many rows the kernel for few is tried.
MOST_FEW_ROWS = 8


def product_ways(table: Table, name: str, num_rows: int, is_tuning: bool) -> None:
    """One matrix with so many rows."""
    from phasewise_kernels.fp8_linear.triton_kernel import Tuning, linear_of_rows
    from phasewise_kernels.linear.triton_kernel import linear_of_row

    out_size, in_size = SHAPES[name]
    n = copies_of(out_size * in_size)
    rows = random(num_rows, in_size)
    weights = random(n, out_size, in_size)
    quantised = [quantise_rows(one) for one in weights]
    numbers, scales = [one for one, _ in quantised], [one[:, 0].contiguous() for _, one in quantised]
    row_numbers, row_scales = quantise_rows(rows)

    def multiply(i: int, given: tuple[torch.Tensor, torch.Tensor], *, is_fast: bool) -> torch.Tensor:
        return torch._scaled_mm(
            given[0],
            numbers[i].t(),
            scale_a=given[1],
            scale_b=scales[i][None],
            out_dtype=BF16,
            use_fast_accum=is_fast,
        )

    ends = 2 * num_rows * (in_size + out_size)
    what = f"{name}, {num_rows} x {in_size} x {out_size}"
    wide: dict[str, Way] = {"bf16 cuBLAS": lambda i: F.linear(rows, weights[i])}
    if num_rows == 1:
        wide["bf16 ours"] = lambda i: linear_of_row(rows, weights[i], None)
    narrow: dict[str, Way] = {
        "fp8": lambda i: multiply(i, quantise_rows(rows), is_fast=True),
        "fp8 product": lambda i: multiply(i, (row_numbers, row_scales), is_fast=True),
        "fp8 slow sums": lambda i: multiply(i, (row_numbers, row_scales), is_fast=False),
    }
    if num_rows <= MOST_FEW_ROWS:
        narrow["fp8 few rows"] = lambda i: linear_of_rows(rows, numbers[i], scales[i], None)
        if is_tuning:
            for outputs, tile_sums, num_warps in product((1, 2, 4), (4096, 8192, 16384), (4, 8)):
                cut = Tuning(outputs, tile_sums, num_warps)
                narrow[f"few {outputs} {tile_sums} {num_warps}"] = partial(
                    few_rows_way, cut, rows, numbers, scales
                )
    table.measure(what, 2 * out_size * in_size + ends, n, wide)
    table.measure(what, out_size * in_size + ends, n, narrow)
    table.measure(what, 3 * num_rows * in_size, n, {"rows to fp8": lambda _: quantise_rows(rows)})


def few_rows_way(
    cut: Any, rows: torch.Tensor, numbers: list[torch.Tensor], scales: list[torch.Tensor], i: int
) -> torch.Tensor:
    from phasewise_kernels.fp8_linear.triton_kernel import linear_of_rows

    return linear_of_rows(rows, numbers[i], scales[i], None, cut)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--tune", action="store_true", help="other cuts of the kernel for few rows too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("there is no NVIDIA GPU of compute capability 8.9 here", file=sys.stderr)
        return 1
    if (problem := tests_problem(*TESTS)) is not None:
        print(problem, file=sys.stderr)
        return 1
    machine = describe_gpu()
    table = Table(5 if args.quick else 20)
    for num_rows in ROWS:
        for name in SHAPES:
            product_ways(table, name, num_rows, args.tune)
            torch.cuda.empty_cache()
    if args.json:
        results = {"machine": machine, "copy_bytes_per_s": table.copy_bytes_per_s, "rows": table.rows}
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
