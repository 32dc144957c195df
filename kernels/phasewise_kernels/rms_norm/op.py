"""The norm that Llama-like models have before attention, before the MLP and at the end."""

import numpy as np
import torch

from phasewise_kernels import jit
from phasewise_kernels.threads import run_ranges

_KERNEL = "phasewise_kernels.rms_norm.kernel"
_NONE = np.zeros((0, 0), np.float32)


def rms_norm(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, *, added: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row scaled to a root mean square of 1, then by weight. Source: Zhang and Sennrich 2019.

    rows: [num_rows, size] float32, on a GPU also bf16 or fp16, contiguous; weight: [size]. added: [num_rows, size] as
    rows, contiguous, is added to rows first, in place: what is read anyway for the norm is then summed at no cost, and
    the norm is of the sum as rows keep it. Returns [num_rows, size] as rows; on a GPU without waiting for it.
    """
    if rows.device.type != "cpu":
        assert rows.is_contiguous()
        assert added is None or (added.is_contiguous() and added.shape == rows.shape)
        # Triton is there where torch has CUDA; nobody else pays for its import.
        from phasewise_kernels.rms_norm import triton_kernel

        return triton_kernel.rms_norm(rows, weight, eps, added)
    module = jit.load(_KERNEL)
    if module is None:
        if added is not None:
            rows.add_(added)
        return weight * (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps))
    assert rows.is_contiguous()
    assert added is None or (added.is_contiguous() and added.shape == rows.shape)
    out = torch.empty(rows.shape)
    fixed = (
        rows.numpy(),
        _NONE if added is None else added.numpy(),
        weight.numpy(),
        np.float32(eps),
        out.numpy(),
    )
    run_ranges(module.rms_norm, fixed, rows.shape[0], rows.nbytes)
    return out
