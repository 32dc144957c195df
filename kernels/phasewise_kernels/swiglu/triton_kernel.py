"""silu(gate) * up on the GPU, in one pass over both."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: Columns of a program.
BLOCK = 1024


@_jit
def swiglu_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    gate_up, out, size: tl.constexpr, block: tl.constexpr
):
    """gate_up: [num_rows, 2, size], gate first; out: [num_rows, size]. Programs: [num_rows, blocks of a row]."""
    columns = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = columns < size
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * size + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=is_inside, other=0.0).to(tl.float32)
    # e is at most 1: nothing overflows.
    e = tl.exp(-tl.abs(gate))
    part = tl.where(gate >= 0.0, 1.0, e)
    gated = gate * up * (part / (1.0 + e))
    tl.store(out + row * size + columns, gated.to(out.dtype.element_ty), mask=is_inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As the op, on the current stream."""
    num_rows, width = gate_up.shape
    size = width // 2
    out = gate_up.new_empty(num_rows, size)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(size))
        swiglu_kernel[(num_rows, triton.cdiv(size, block))](gate_up, out, size, block, num_warps=4)
    return out
