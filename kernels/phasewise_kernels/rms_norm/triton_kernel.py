"""The norm of a row by one program of the GPU, which keeps the row in registers: each number is read once."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit


@_jit
def rms_norm_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    rows, added, weight, out, eps, size: tl.constexpr, block: tl.constexpr, has_added: tl.constexpr
):
    """rows, added, out: [num_rows, size]; weight: [size]. block: the power of two that holds a row."""
    columns = tl.arange(0, block)
    is_inside = columns < size
    start = tl.program_id(0).to(tl.int64) * size
    x = tl.load(rows + start + columns, mask=is_inside, other=0.0).to(tl.float32)
    if has_added:
        x += tl.load(added + start + columns, mask=is_inside, other=0.0).to(tl.float32)
        # The norm is of the sum as it is kept: what reads it later sees the same numbers.
        total = x.to(rows.dtype.element_ty)
        tl.store(rows + start + columns, total, mask=is_inside)
        x = total.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    scale = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (x * factor * scale).to(out.dtype.element_ty), mask=is_inside)


def rms_norm(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None
) -> torch.Tensor:
    """As the op, on the current stream."""
    num_rows, size = rows.shape
    out = torch.empty_like(rows)
    if num_rows:
        block = triton.next_power_of_2(size)
        rms_norm_kernel[(num_rows,)](
            rows,
            rows if added is None else added,
            weight,
            out,
            eps,
            size,
            block,
            added is not None,
            num_warps=min(16, max(1, block // 512)),
        )
    return out
