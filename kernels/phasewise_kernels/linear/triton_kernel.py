"""A product of one row: it is bound by reading the weight, which each program does for some outputs, whole rows of it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: Outputs of a program, and weights that it has in its registers at a time. By the shapes of Llama-3-8B on an H100.
OUTPUTS, TILE_VALUES, NUM_WARPS = 2, 4096, 8


def linear_of_row(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """row: [1, in_size]; weight: [out_size, in_size], contiguous; bias: [out_size] or None, all of one dtype.

    Summed in fp32; returns [1, out_size] of that dtype, without waiting for it.
    """
    out_size, in_size = weight.shape
    out = torch.empty(1, out_size, dtype=row.dtype, device=row.device)
    _row_kernel[(triton.cdiv(out_size, OUTPUTS),)](
        row,
        weight,
        weight if bias is None else bias,
        out,
        out_size,
        in_size=in_size,
        block_n=OUTPUTS,
        block_k=TILE_VALUES // OUTPUTS,
        has_bias=bias is not None,
        num_warps=NUM_WARPS,
    )
    return out


@_jit
def _row_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    row,
    weight,
    bias,
    out,
    out_size,
    in_size: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    has_bias: tl.constexpr,
):
    outputs = tl.program_id(0) * block_n + tl.arange(0, block_n)
    is_output = outputs < out_size
    starts = outputs.to(tl.int64)[:, None] * in_size
    sums = tl.zeros([block_n, block_k], tl.float32)
    for first in tl.range(0, in_size, block_k, loop_unroll_factor=2):
        places = first + tl.arange(0, block_k)
        is_place = places < in_size
        values = tl.load(row + places, mask=is_place, other=0.0).to(tl.float32)
        weights = tl.load(
            weight + starts + places[None],
            mask=is_output[:, None] & is_place[None],
            other=0.0,
            eviction_policy="evict_first",
        )
        sums += weights.to(tl.float32) * values[None]
    result = tl.sum(sums, axis=1)
    if has_bias:
        result += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=is_output)
