"""Products of few rows with a weight, read once from memory: float32, bfloat16 or int8.

Each output is a sum over one row of the weight, and that row is shared by four rows of the input. How a
sum is split depends on the number of input rows alone, so any split of the outputs over threads gives the same
bits. `_widen` makes a float32 of a weight in a register; the compiler makes one kernel per dtype of weight.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from phasewise_kernels.jit import FASTMATH, kernel

#: From this many input rows on, outputs are made in blocks, so that input and block stay in the fastest cache.
BLOCKED_ROWS = 9
#: Outputs of a block.
BLOCK_OUTPUTS = 8


def _widen(value: Any) -> Any:
    """float32 of a weight: bfloat16 comes as its 16 bits, int8 without its scale."""
    raise NotImplementedError


@overload(_widen, inline="always")
def _overload_widen(value: Any) -> Any:
    def bfloat16(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    def number(value: Any) -> Any:
        return np.float32(value)

    return bfloat16 if value == types.uint16 else number


@kernel(FASTMATH, is_inlined=True)
def _rows_4(rows: Any, weight: Any, out: Any, row: int, output: int, scale: Any) -> None:
    a = b = c = d = np.float32(0)
    for i in range(weight.shape[1]):
        w = _widen(weight[output, i])
        a += rows[row, i] * w
        b += rows[row + 1, i] * w
        c += rows[row + 2, i] * w
        d += rows[row + 3, i] * w
    out[row, output] = a * scale
    out[row + 1, output] = b * scale
    out[row + 2, output] = c * scale
    out[row + 3, output] = d * scale


@kernel(FASTMATH, is_inlined=True)
def _rows_1(rows: Any, weight: Any, out: Any, row: int, output: int, scale: Any) -> None:
    a = np.float32(0)
    for i in range(weight.shape[1]):
        a += rows[row, i] * _widen(weight[output, i])
    out[row, output] = a * scale


@kernel(FASTMATH)
def linear(rows: Any, weight: Any, scales: Any, bias: Any, out: Any, first: int, last: int) -> None:
    """Outputs first..last-1 of rows @ weight.T * scales + bias.

    rows: [num_rows, in_size] float32; weight: [out_size, in_size] float32, uint16 (bfloat16 bits) or int8;
    scales, bias: [out_size] float32, or empty for none; out: [num_rows, out_size] float32.
    """
    num_rows = rows.shape[0]
    in_fours = num_rows - num_rows % 4
    block = BLOCK_OUTPUTS if num_rows >= BLOCKED_ROWS else 1
    for block_first in range(first, last, block):
        block_last = min(block_first + block, last)
        for row in range(0, in_fours, 4):
            for output in range(block_first, block_last):
                _rows_4(rows, weight, out, row, output, scales[output] if scales.size else np.float32(1))
        for output in range(block_first, block_last):
            scale = scales[output] if scales.size else np.float32(1)
            # Two or three at once were slower: the second reads the weight from the fastest cache.
            for row in range(in_fours, num_rows):
                _rows_1(rows, weight, out, row, output, scale)
        if bias.size:
            for row in range(num_rows):
                for output in range(block_first, block_last):
                    out[row, output] += bias[output]


def compile_all(step: Callable[[], None]) -> None:
    """Compile for each dtype of weight."""
    rows, out, none = np.zeros((1, 8), np.float32), np.zeros((1, 2), np.float32), np.zeros(0, np.float32)
    for dtype in (np.float32, np.uint16, np.int8):
        linear(rows, np.zeros((2, 8), dtype), none, none, out, 0, 2)
        step()
