"""A projection whose weight is kept as float32, bfloat16 or int8, computed the fastest way for the rows at hand.

Few rows are bound by reading the weight: a kernel of ours reads it once, and half or a quarter of the bytes for
bfloat16 and int8. Many rows are bound by arithmetic:

- float32: oneDNN, with a copy of the weight in an order of its own, made at the first call with many rows.
- bfloat16: oneDNN in bfloat16 where the processor multiplies that (rows are rounded to it too), else as below.
- int8: the weight is made float32 again for the call.

Same rows, same number of them and same number of threads give the same bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from phasewise_kernels import jit
from phasewise_kernels.threads import run_ranges

DTYPES = ("float32", "bfloat16", "int8")

#: Up to this many rows our kernel is used. By benchmarks/kernels/linear_cpu.py; with several threads oneDNN's have to
#: be woken, and are then in the way of ours, so that a whole step is what counts: benchmarks/engine/decode_step.py.
MAX_FEW_ROWS = {"float32": 8, "bfloat16": 8, "int8": 16}
#: Without our kernels: 2 to this many rows are faster with the weight on the left, if it is not wider than high.
MAX_LEFT_ROWS = 5

_NONE = np.zeros(0, np.float32)


def projection(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """rows @ weight.T + bias: a `Linear` of this dtype for a weight on the CPU; on a GPU in the dtype that the weight has."""
    if weight.is_cuda:
        return partial(_on_gpu, weight=weight, bias=bias)
    return Linear(weight, bias, dtype)


def _on_gpu(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One row by a kernel of ours, more by cuBLAS."""
    if rows.shape[0] == 1 and rows.dtype is not torch.float32:
        # Triton is there where torch has CUDA; nobody else pays for its import.
        from phasewise_kernels.linear.triton_kernel import linear_of_row

        return linear_of_row(rows, weight, bias)
    return F.linear(rows, weight, bias)


class Linear:
    """rows @ weight.T + bias, float32 in and out."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: str = "float32",
        *,
        is_packed: bool = True,
    ) -> None:
        """weight: [out_size, in_size] float32, contiguous, never written, so it may be mapped from a file; bias:
        [out_size] float32 or None; dtype: how the weight is kept. int8 has one scale per output.

        is_packed: with float32, whether many rows may cost a second copy of the weight.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
        self.out_size, self.in_size = weight.shape
        self._dtype, self._bias = dtype, bias
        self._is_packed = is_packed and dtype == "float32" and _has_packed_linear()
        self._packed: Any = None
        self._scales: torch.Tensor | None = None
        if dtype == "int8":
            self._weight, self._scales = quantise(weight)
        else:
            self._weight = weight if dtype == "float32" else weight.to(torch.bfloat16)
        self._weight_view = (self._weight.view(torch.uint16) if dtype == "bfloat16" else self._weight).numpy()
        self._scales_view = _NONE if self._scales is None else self._scales.numpy()
        self._bias_view = _NONE if bias is None else bias.numpy()
        self._has_bfloat16 = dtype == "bfloat16" and has_bfloat16_products()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [num_rows, in_size] float32; returns [num_rows, out_size] float32, contiguous."""
        num_rows = rows.shape[0]
        if 0 < num_rows <= MAX_FEW_ROWS[self._dtype]:
            module = jit.load(jit.KERNEL_MODULES[0])
            if module is not None:
                return self._few_rows(module.linear, rows)
        return self._many_rows(rows)

    @property
    def memory_bytes(self) -> int:
        """Memory taken beyond the weight and bias that were given, as of now."""
        own = 0 if self._dtype == "float32" else self._weight.nbytes
        scales = 0 if self._scales is None else self._scales.nbytes
        packed = 0 if self._packed is None else self.out_size * self.in_size * 4
        return own + scales + packed

    def _few_rows(self, kernel: Any, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(rows.shape[0], self.out_size)
        fixed = (
            rows.contiguous().numpy(),
            self._weight_view,
            self._scales_view,
            self._bias_view,
            out.numpy(),
        )
        run_ranges(kernel, fixed, self.out_size, self._weight_view.nbytes)
        return out

    def _many_rows(self, rows: torch.Tensor) -> torch.Tensor:
        if self._has_bfloat16:
            out = F.linear(_padded(rows).to(torch.bfloat16), self._weight)[: rows.shape[0]].float()
            return out if self._bias is None else out.add_(self._bias)
        if self._dtype != "float32":
            weight = self._weight.float()
            out = F.linear(rows, weight if self._scales is None else weight.mul_(self._scales[:, None]))
            return out if self._bias is None else out.add_(self._bias)
        num_rows = rows.shape[0]
        if self._is_packed and num_rows > MAX_FEW_ROWS["float32"]:
            if self._packed is None:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                _padded(rows), self._packed, self._bias, "none", [], ""
            )
            return packed[:num_rows]
        if 2 <= num_rows <= MAX_LEFT_ROWS and self.out_size >= self.in_size:
            out = torch.mm(self._weight, rows.t()).t().contiguous()
            return out if self._bias is None else out.add_(self._bias)
        return F.linear(rows, self._weight, self._bias)


def padded_rows(num_rows: int) -> int:
    """Rows that a product by oneDNN is made of: at most 16 numbers of them between one power of two and the next.

    oneDNN keeps code and buffers for each of up to 1024 shapes that it has seen; steps have any number of rows.
    """
    step = max(16, 1 << max(0, num_rows.bit_length() - 5))
    return -(-num_rows // step) * step


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, padded_rows(rows.shape[0]) - rows.shape[0]))


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and a scale per row, such that int8 * scale is within half a scale of the weight.

    weight: [out_size, in_size] float32; returns the same shape int8, and [out_size] float32.
    """
    scales = weight.abs().amax(dim=1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    return weight.div(scales[:, None]).round_().to(torch.int8), scales


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, through oneDNN."""
    return _has_onednn() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _has_packed_linear() -> bool:
    return _has_onednn() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
