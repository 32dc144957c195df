"""Rotation and write on the GPU: a program turns some heads of a token and puts each where it belongs.

heads of a token     0 .. num_heads - 1      queries   rotated, to the query
                     .. + num_kv_heads       keys      rotated, to the cache
                     .. + num_kv_heads       values    as they are, to the cache
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from phasewise_kernels.kv_int4.op import PACKED_DTYPE
from phasewise_kernels.rope_write.int4_kernel import rope_write_int4_kernel

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: Heads of a program.
HEADS_BLOCK = 8
#: Largest finite float8_e4m3fn.
_FP8_MAX = tl.constexpr(448.0)


@_jit
def _put(x, place, is_wanted):  # type: ignore[no-untyped-def]
    """Convert and store; beyond what float8_e4m3fn holds it saturates, and NaN stays NaN."""
    if place.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place, x.to(place.dtype.element_ty), mask=is_wanted)


@_jit
def rope_write_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    heads,
    cos,
    sin,
    slots,
    query,
    keys,
    values,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    heads_block: tl.constexpr,
    half_block: tl.constexpr,
    is_rotated: tl.constexpr,
):
    """As in the op; keys, values: [num_slots, num_kv_heads, head_dim]. half_block: a power of two >= head_dim / 2."""
    half: tl.constexpr = head_dim // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_block + tl.arange(0, heads_block)[:, None]
    column = tl.arange(0, half_block)[None, :]
    is_inside = (head < num_heads + 2 * num_kv_heads) & (column < half)
    # [heads_block, half_block]
    place = (token * (num_heads + 2 * num_kv_heads) + head) * head_dim + column
    first = tl.load(heads + place, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(heads + place + half, mask=is_inside, other=0.0).to(tl.float32)
    if is_rotated:
        angle = token * head_dim + column
        c = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)
        is_turned = head < num_heads + num_kv_heads
        turned = tl.where(is_turned, first * c - second * s, first)
        second = tl.where(is_turned, second * c + first * s, second)
        first = turned
    to_query = is_inside & (head < num_heads)
    place = (token * num_heads + head) * head_dim + column
    _put(first, query + place, to_query)
    _put(second, query + place + half, to_query)
    slot = tl.load(slots + token).to(tl.int64)
    # The rows that fill up a CUDA graph have no slot.
    is_kept = is_inside & (slot >= 0)
    slot_start = slot * num_kv_heads * head_dim
    to_keys = is_kept & (head >= num_heads) & (head < num_heads + num_kv_heads)
    place = slot_start + (head - num_heads) * head_dim + column
    _put(first, keys + place, to_keys)
    _put(second, keys + place + half, to_keys)
    to_values = is_kept & (head >= num_heads + num_kv_heads)
    place = slot_start + (head - num_heads - num_kv_heads) * head_dim + column
    _put(first, values + place, to_values)
    _put(second, values + place + half, to_values)


def rope_write(
    heads: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    is_rotated: bool,
) -> torch.Tensor:
    """As the op, on the current stream."""
    num_tokens, num_all, head_dim = heads.shape
    num_kv_heads = k_cache.shape[2]
    num_heads = num_all - 2 * num_kv_heads
    query = heads.new_empty(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return query
    heads_block = min(HEADS_BLOCK, triton.next_power_of_2(num_all))
    grid = num_tokens, triton.cdiv(num_all, heads_block)
    tensors = heads, *rotation, slots, query, k_cache, v_cache
    if k_cache.dtype == PACKED_DTYPE:
        rope_write_int4_kernel[grid](
            *tensors,
            head_dim**-0.5,
            num_heads,
            num_kv_heads,
            head_dim,
            head_dim.bit_length() - 1,
            k_cache.shape[3],
            heads_block,
            is_rotated,
            num_warps=2,
        )
    else:
        rope_write_kernel[grid](
            *tensors,
            num_heads,
            num_kv_heads,
            head_dim,
            heads_block,
            triton.next_power_of_2(head_dim // 2),
            is_rotated,
            num_warps=2,
        )
    return query
