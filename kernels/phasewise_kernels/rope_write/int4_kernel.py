"""Rotation and write into a cache in four bits (`kv_int4/op.py`): a program turns some heads of a token, packs K and V, and puts each where it belongs.

Heads of a token are as in `triton_kernel.py`. Queries and keys are turned twice: to their position, and by the Hadamard matrix.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.kv_codec.triton_kernel import rotate, round_even

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: As in kv_int4/op.py.
_LARGEST = tl.constexpr(65024.0)
_TOP = tl.constexpr(15.0)
_FP16 = tl.constexpr(tl.pointer_type(tl.float16))
_INT32 = tl.constexpr(tl.pointer_type(tl.int32))


@_jit
def _group(x):  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    """x: [heads_block, channels] of a group. Its codes, and its scale and minimum, [heads_block] fp16; NaN where there is one."""
    is_number = tl.min((x == x).to(tl.int32), axis=1) > 0
    x = tl.clamp(x, -_LARGEST, _LARGEST)
    low = tl.min(x, axis=1)
    scales = tl.div_rn(tl.max(x, axis=1) - low, tl.full(low.shape, _TOP, tl.float32)).to(tl.float16)
    minima = low.to(tl.float16)
    wide = scales.to(tl.float32)
    steps = tl.div_rn(
        x - minima.to(tl.float32)[:, None],
        tl.broadcast_to(tl.where(wide == 0.0, 1.0, wide)[:, None], x.shape),
    )
    codes = round_even(tl.where(is_number[:, None], tl.clamp(steps, 0.0, _TOP), 0.0))
    nan = tl.full(low.shape, float("nan"), tl.float16)
    return codes, tl.where(is_number, scales, nan), tl.where(is_number, minima, nan)


@_jit
def _words(codes):  # type: ignore[no-untyped-def]
    """[heads_block, channels] of a group: four to a word, [heads_block, channels / 4] int32."""
    codes = tl.reshape(codes.to(tl.int32), [codes.shape[0], codes.shape[1] // 4, 4])
    return tl.sum(codes << (4 * tl.arange(0, 4))[None, None, :], axis=2)


@_jit
def rope_write_int4_kernel(  # type: ignore[no-untyped-def]
    heads,
    cos,
    sin,
    slots,
    query,
    keys,
    values,
    factor,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    log_dim: tl.constexpr,
    row_bytes: tl.constexpr,
    heads_block: tl.constexpr,
    is_rotated: tl.constexpr,
):
    """As in the op; keys, values: [num_slots, num_kv_heads, row_bytes] uint8. factor: head_dim ** -0.5."""
    half: tl.constexpr = head_dim // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_block + tl.arange(0, heads_block)
    column = tl.arange(0, head_dim)[None, :]
    is_inside = head < num_heads + 2 * num_kv_heads
    is_turned = (head < num_heads + num_kv_heads)[:, None]
    # [heads_block, head_dim]
    start = heads + ((token * (num_heads + 2 * num_kv_heads) + head) * head_dim)[:, None]
    x = tl.load(start + column, mask=is_inside[:, None], other=0.0).to(tl.float32)
    if is_rotated:
        partner = tl.load(start + (column + half) % head_dim, mask=is_inside[:, None], other=0.0)
        partner = tl.where(column < half, -1.0, 1.0) * partner.to(tl.float32)
        c = tl.load(cos + token * head_dim + column).to(tl.float32)
        s = tl.load(sin + token * head_dim + column).to(tl.float32)
        x = tl.where(is_turned, x * c + partner * s, x)
    x = tl.where(is_turned, rotate(x, head_dim, head_dim, log_dim) * factor, x)
    place = query + ((token * num_heads + head) * head_dim)[:, None] + column
    tl.store(place, x.to(query.dtype.element_ty), mask=(head < num_heads)[:, None])

    even, odd = tl.split(tl.reshape(x, [heads_block, half, 2]))
    low_codes, low_scales, low_minima = _group(even)
    high_codes, high_scales, high_minima = _group(odd)
    codes = _words(low_codes) | (_words(high_codes) << 16)
    slot = tl.load(slots + token).to(tl.int64)
    # The rows that fill up a CUDA graph have no slot.
    is_kept = is_inside & (slot >= 0)
    is_key = is_kept & (head >= num_heads) & (head < num_heads + num_kv_heads)
    key = keys + (slot * num_kv_heads + head - num_heads) * row_bytes
    _put_row(key, codes, low_scales, low_minima, high_scales, high_minima, is_key, half)
    is_value = is_kept & (head >= num_heads + num_kv_heads)
    value = values + (slot * num_kv_heads + head - num_heads - num_kv_heads) * row_bytes
    _put_row(value, codes, low_scales, low_minima, high_scales, high_minima, is_value, half)


@_jit
def _put_row(  # type: ignore[no-untyped-def]
    rows, codes, low_scales, low_minima, high_scales, high_minima, is_wanted, half: tl.constexpr
):
    """rows: [heads_block] pointers to bytes; codes: [heads_block, half / 4] words."""
    at_words = rows.to(_INT32)[:, None] + tl.arange(0, half // 4)[None, :]
    tl.store(at_words, codes, mask=is_wanted[:, None])
    told = (rows + half).to(_FP16)
    tl.store(told, low_scales, mask=is_wanted)
    tl.store(told + 1, high_scales, mask=is_wanted)
    tl.store(told + 2, low_minima, mask=is_wanted)
    tl.store(told + 3, high_minima, mask=is_wanted)
