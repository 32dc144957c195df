"""The norm of a row in two passes: sum and mean square, then scale. A row is one thread's."""

from collections.abc import Callable
from typing import Any

import numpy as np

from phasewise_kernels.jit import FASTMATH, kernel


@kernel(FASTMATH)
def rms_norm(rows: Any, added: Any, weight: Any, eps: Any, out: Any, first: int, last: int) -> None:
    """Rows first..last-1. rows, out: [num_rows, size]; added: the same, or [0, 0] for none; weight: [size]."""
    size = rows.shape[1]
    for row in range(first, last):
        if added.size:
            for i in range(size):
                rows[row, i] += added[row, i]
        squares = np.float32(0)
        for i in range(size):
            squares += rows[row, i] * rows[row, i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[row, i] = rows[row, i] * factor * weight[i]


def compile_all(step: Callable[[], None]) -> None:
    """Compile for float32."""
    rows, none, weight = np.zeros((1, 4), np.float32), np.zeros((0, 0), np.float32), np.zeros(4, np.float32)
    rms_norm(rows, none, weight, np.float32(1), rows.copy(), 0, 1)
    step()
