"""Rows to fp8 in one pass, and products of few rows with a weight in fp8, which is made float32 in registers."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from phasewise_kernels.fp8_linear import reference

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit
#: Not compiled anew for one row.
_rows_jit: Callable[[_F], Any] = triton.jit(do_not_specialize=["num_rows"])

_E4M3_MAX = tl.constexpr(reference.E4M3_MAX)
_MIN_LARGEST = tl.constexpr(reference.MIN_LARGEST)


class Tuning(NamedTuple):
    """How linear_of_rows is cut up. outputs: of a program. tile_sums: that it has in its registers, for all rows together."""

    outputs: int
    tile_sums: int
    num_warps: int


#: The best for one and two rows together on an H100, of those that `benchmarks/kernels/fp8_linear_gpu.py --tune` tries.
TUNING = Tuning(outputs=4, tile_sums=16384, num_warps=4)


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op, on the current stream. rows: [num_rows, size] fp32, bf16 or fp16, contiguous."""
    return _quantised(quantise_kernel, rows, rows.shape[1])


def quantise_gated(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of silu(gate) * up, which is not rounded before. gate_up: [num_rows, 2 * size], gate first, as rows."""
    return _quantised(gate_kernel, gate_up, gate_up.shape[1] // 2)


def _quantised(kernel: Any, rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([num_rows, size] e4m3, [num_rows, 1] fp32) by one program a row."""
    num_rows = rows.shape[0]
    numbers = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=rows.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        kernel[(num_rows,)](rows, numbers, scales, size, block, num_warps=min(16, max(1, block // 512)))
    return numbers, scales


def linear_of_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    tuning: Tuning = TUNING,
) -> torch.Tensor:
    """rows: [1 or a few, in_size]; weight: [out_size, in_size] float8_e4m3fn; scales: [out_size] float32; bias: [out_size] or None, as
    rows. All contiguous.

    Summed in fp32; returns [num_rows, out_size] as rows, without waiting for it.
    """
    num_rows, (out_size, in_size) = rows.shape[0], weight.shape
    out = torch.empty(num_rows, out_size, dtype=rows.dtype, device=rows.device)
    block_m = triton.next_power_of_2(num_rows)
    few_rows_kernel[(triton.cdiv(out_size, tuning.outputs),)](
        rows,
        weight,
        scales,
        rows if bias is None else bias,
        out,
        num_rows,
        out_size,
        in_size=in_size,
        block_m=block_m,
        block_n=tuning.outputs,
        block_k=tuning.tile_sums // tuning.outputs // block_m,
        has_bias=bias is not None,
        num_warps=tuning.num_warps,
    )
    return out


@_jit
def quantise_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    rows, numbers, scales, size: tl.constexpr, block: tl.constexpr
):
    """rows, numbers: [num_rows, size]; scales: [num_rows]. block: the power of two that holds a row. Programs: rows."""
    columns = tl.arange(0, block)
    is_inside = columns < size
    start = tl.program_id(0).to(tl.int64) * size
    x = tl.load(rows + start + columns, mask=is_inside, other=0.0).to(tl.float32)
    put_row(x, numbers + start + columns, is_inside, scales + tl.program_id(0))


@_jit
def gate_kernel(  # type: ignore[no-untyped-def]
    gate_up, numbers, scales, size: tl.constexpr, block: tl.constexpr
):
    """gate_up: [num_rows, 2, size], gate first; the rest as above."""
    columns = tl.arange(0, block)
    is_inside = columns < size
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * size + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=is_inside, other=0.0).to(tl.float32)
    # As in swiglu/triton_kernel.py: e is at most 1.
    e = tl.exp(-tl.abs(gate))
    gated = gate * up * (tl.where(gate >= 0.0, 1.0, e) / (1.0 + e))
    put_row(gated, numbers + row * size + columns, is_inside, scales + row)


@_jit
def put_row(x, numbers, is_inside, scale):  # type: ignore[no-untyped-def]
    """Quantise a row, [block] fp32 with 0 outside, and store numbers and scale."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), _MIN_LARGEST)
    # Divisions are exact, so that the numbers are those of the specification.
    q = x * tl.div_rn(_E4M3_MAX, largest)
    q = tl.clamp(q, -_E4M3_MAX, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(numbers, q.to(tl.float8e4nv), mask=is_inside)
    tl.store(scale, tl.div_rn(largest, _E4M3_MAX))


@_rows_jit
def few_rows_kernel(  # type: ignore[no-untyped-def]
    rows,
    weight,
    scales,
    bias,
    out,
    num_rows,
    out_size,
    in_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    has_bias: tl.constexpr,
):
    """Programs: block_n outputs each, for all rows. block_m: a power of two >= num_rows."""
    row = tl.arange(0, block_m)[:, None]
    outputs = tl.program_id(0) * block_n + tl.arange(0, block_n)
    is_output = outputs < out_size
    # Three dimensions from the start: what is loaded is where it is needed, and is not moved between threads.
    row_starts = (row * in_size)[:, :, None]
    is_row = (row < num_rows)[:, :, None]
    weight_starts = (outputs.to(tl.int64) * in_size)[None, :, None]
    is_weight = is_output[None, :, None]
    # [block_m, block_n, block_k]
    sums = tl.zeros([block_m, block_n, block_k], tl.float32)
    for first in tl.range(0, in_size, block_k, loop_unroll_factor=2):
        places = first + tl.arange(0, block_k)[None, None]
        is_place = places < in_size
        values = tl.load(rows + row_starts + places, mask=is_row & is_place, other=0.0)
        weights = tl.load(
            weight + weight_starts + places,
            mask=is_weight & is_place,
            other=0.0,
            eviction_policy="evict_first",
        )
        sums += weights.to(tl.float32) * values.to(tl.float32)
    # [block_m, block_n]
    result = tl.sum(sums, axis=2) * tl.load(scales + outputs, mask=is_output, other=0.0)[None]
    if has_bias:
        result += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None]
    is_wanted = (row < num_rows) & is_output[None]
    tl.store(out + row * out_size + outputs[None], result.to(out.dtype.element_ty), mask=is_wanted)
