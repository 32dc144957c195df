"""The gate of an MLP whose two projections are one."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from phasewise_kernels import jit
from phasewise_kernels.threads import run_ranges

_KERNEL = "phasewise_kernels.swiglu.kernel"


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up: [num_rows, 2 * size] float32, contiguous, gate first; returns [num_rows, size].

    On a GPU also bf16 and fp16, and without waiting for it.
    Source: Shazeer 2020, GLU Variants Improve Transformer.
    """
    if gate_up.device.type != "cpu":
        assert gate_up.is_contiguous()
        # Triton is there where torch has CUDA; nobody else pays for its import.
        from phasewise_kernels.swiglu import triton_kernel

        return triton_kernel.swiglu(gate_up)
    module = jit.load(_KERNEL)
    if module is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    assert gate_up.is_contiguous()
    num_rows, width = gate_up.shape
    out = torch.empty(num_rows, width // 2)
    run_ranges(
        module.swiglu, (gate_up.view(num_rows, 2, width // 2).numpy(), out.numpy()), num_rows, gate_up.nbytes
    )
    return out
