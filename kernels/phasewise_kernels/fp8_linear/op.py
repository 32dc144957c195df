"""A projection whose weight is kept in fp8: half of the bytes of bfloat16, and twice its products on GPUs that multiply fp8.

Few rows are bound by reading the weight: a kernel of ours reads it once and makes float32 of it in registers, and rows stay as
they are. Many rows are bound by arithmetic: they are quantised too, each with a scale of its own, and the GPU multiplies fp8.
"""

import torch

from phasewise_kernels.fp8_linear.reference import quantise_reference
from phasewise_kernels.swiglu.op import swiglu

#: Sizes of weights that can be multiplied are multiples of this.
SIZE_STEP = 16
#: Up to this many rows they are not quantised. Its sums of so many rows fit in registers.
MAX_FEW_ROWS = 2


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.quantise_reference`, which a CPU computes; on a GPU rows are contiguous, and nothing is waited for."""
    if not rows.is_cuda:
        return quantise_reference(rows)
    # Triton is there where torch has CUDA; nobody else pays for its import.
    from phasewise_kernels.fp8_linear import triton_kernel

    return triton_kernel.quantise_rows(rows)


class Fp8Linear:
    """rows @ (weight * scales).T + bias."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: [out_size, in_size] float8_e4m3fn, contiguous, sizes multiples of SIZE_STEP; scales: [out_size] float32; bias:
        [out_size] as rows, or None. All on one device, a GPU of compute capability 8.9 or newer or, for tests, the CPU.
        Raises ValueError for other sizes.
        """
        if any(size % SIZE_STEP for size in weight.shape):
            raise ValueError(f"a weight of {tuple(weight.shape)}; both must be multiples of {SIZE_STEP}")
        self._weight, self._scales, self._bias = weight, scales, bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [num_rows, in_size], on a GPU bfloat16 and contiguous; returns [num_rows, out_size] as rows."""
        if not rows.is_cuda:
            return self._on_cpu(rows)
        from phasewise_kernels.fp8_linear import triton_kernel

        if 0 < rows.shape[0] <= MAX_FEW_ROWS:
            return triton_kernel.linear_of_rows(rows, self._weight, self._scales, self._bias)
        return self._product(*triton_kernel.quantise_rows(rows))

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same of silu(gate) * up. gate_up: [num_rows, 2 * in_size], gate first, as rows; many are gated and quantised in one pass."""
        if not gate_up.is_cuda or gate_up.shape[0] <= MAX_FEW_ROWS:
            return self(swiglu(gate_up))
        from phasewise_kernels.fp8_linear import triton_kernel

        return self._product(*triton_kernel.quantise_gated(gate_up))

    def _product(self, numbers: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
        """By the GPU. See quantise_rows."""
        return torch._scaled_mm(
            numbers,
            self._weight.t(),
            scale_a=row_scales,
            scale_b=self._scales[None],
            bias=self._bias,
            out_dtype=torch.bfloat16,
            # Sums in some 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.5.2) lose a part of what rounding to fp8 does.
            use_fast_accum=True,
        )

    def _on_cpu(self, rows: torch.Tensor) -> torch.Tensor:
        """The same arithmetic in float32."""
        if rows.shape[0] > MAX_FEW_ROWS:
            numbers, row_scales = quantise_reference(rows)
            out = (numbers.float() @ self._weight.float().t()).mul_(row_scales).mul_(self._scales)
        else:
            out = (rows.float() @ self._weight.float().t()).mul_(self._scales)
        return (out if self._bias is None else out.add_(self._bias)).to(rows.dtype)
