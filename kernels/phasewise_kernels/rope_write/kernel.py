"""One pass over the heads of a token: queries are rotated into a tensor, keys into the cache, values copied there."""

from collections.abc import Callable
from typing import Any

import numpy as np

from phasewise_kernels.jit import EXACT, kernel


@kernel(EXACT, is_inlined=True)
def _turn(
    heads: Any, token: int, head: int, cos: Any, sin: Any, out: Any, out_row: int, out_head: int
) -> None:
    half = heads.shape[2] // 2
    for i in range(half):
        a, b = heads[token, head, i], heads[token, head, half + i]
        c, s = cos[token, i], sin[token, i]
        out[out_row, out_head, i] = a * c - b * s
        out[out_row, out_head, half + i] = b * c + a * s


@kernel(EXACT)
def rope_write(
    heads: Any,
    cos: Any,
    sin: Any,
    slots: Any,
    query: Any,
    keys: Any,
    values: Any,
    is_rotated: bool,
    first: int,
    last: int,
) -> None:
    """Tokens first..last-1.

    heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]; cos, sin: [num_tokens, head_dim], both halves
    alike; slots: [num_tokens] int64, below 0 for a token whose K and V are not written; query: [num_tokens, num_heads, head_dim]; keys, values: [num_slots,
    num_kv_heads, head_dim].
    """
    num_heads, num_kv_heads, head_dim = query.shape[1], keys.shape[1], heads.shape[2]
    for token in range(first, last):
        slot = slots[token]
        num_written = num_kv_heads if slot >= 0 else 0
        if is_rotated:
            for head in range(num_heads):
                _turn(heads, token, head, cos, sin, query, token, head)
            for head in range(num_written):
                _turn(heads, token, num_heads + head, cos, sin, keys, slot, head)
        else:
            for head in range(num_heads):
                for i in range(head_dim):
                    query[token, head, i] = heads[token, head, i]
            for head in range(num_written):
                for i in range(head_dim):
                    keys[slot, head, i] = heads[token, num_heads + head, i]
        for head in range(num_written):
            for i in range(head_dim):
                values[slot, head, i] = heads[token, num_heads + num_kv_heads + head, i]


def compile_all(step: Callable[[], None]) -> None:
    """Compile for float32."""
    angles, one = np.zeros((1, 4), np.float32), np.zeros((1, 1, 4), np.float32)
    rope_write(
        np.zeros((1, 3, 4), np.float32), angles, angles, np.zeros(1, np.int64), one, one, one, True, 0, 1
    )
    step()
