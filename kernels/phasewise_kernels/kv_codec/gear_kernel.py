"""Packing and unpacking of `gear` and `gear_l` pages on a GPU, as `triton_kernel.py` has it for the other codecs.

K is taken as [channel, token] and V as [token, channel]: vectors along the last axis, [N, L], padded to powers of two. A page
of few tokens is fp16.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.kv_codec import reference
from phasewise_kernels.kv_codec.triton_kernel import (
    _FP16,
    PAGE,
    page_of,
    place_of,
    put,
    round_even,
    shift_of,
    shifted,
)

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

_MIN_TOKENS = tl.constexpr(reference.MIN_TOKENS)
_NUM_ITERATIONS = tl.constexpr(reference.NUM_ITERATIONS)
_MIN_INDEPENDENT = tl.constexpr(reference.MIN_INDEPENDENT)


@_jit
def _side_bytes(n, num_vectors, length, groups, count):  # type: ignore[no-untyped-def]
    """Of K or V of a head in a page of n tokens."""
    rank = 2 * n // PAGE
    return (
        num_vectors * length // 4 + num_vectors * (4 * groups + 6 * count) + rank * (num_vectors + length) * 2
    )


@_jit
def _k_count(n, is_gear: tl.constexpr):  # type: ignore[no-untyped-def]
    """Outliers at each end of a channel: 1 % of up to 64 tokens, rounded."""
    return tl.where(n >= 50, 1, 0) if is_gear else n * 0


@_jit
def _orthonormal(row, other):  # type: ignore[no-untyped-def]
    """row without its part along `other`, which has the length 1 or 0, twice; then of length 1, or 0."""
    across = row
    for _ in tl.static_range(2):
        across = across - tl.sum(across * other, axis=0) * other
    length = tl.sqrt_rn(tl.sum(across * across, axis=0))
    is_independent = length > tl.sqrt_rn(tl.sum(row * row, axis=0)) * _MIN_INDEPENDENT
    return tl.where(is_independent, tl.div_rn(across, tl.where(length > 0.0, length, 1.0)), 0.0)


@_jit
def _encode_side(  # type: ignore[no-untyped-def]
    x,
    start,
    body,
    n,
    num_vectors,
    length,
    head,
    num_heads,
    count,
    max_count: tl.constexpr,
    vectors_block: tl.constexpr,
    length_block: tl.constexpr,
    groups: tl.constexpr,
    is_key: tl.constexpr,
):
    """x: [vectors_block, length_block]. start: [2, length_block], of the power iteration. body: the sections of K or of V."""
    rows = tl.arange(0, vectors_block)
    columns = tl.arange(0, length_block)
    is_row = rows < num_vectors
    is_inside = is_row[:, None] & (columns < length)[None, :]
    rank = 2 * n // PAGE
    codes_at = body
    scales_at = (codes_at + num_heads * num_vectors * length // 4).to(_FP16)
    left_at = scales_at + 2 * num_heads * num_vectors * groups
    right_at = left_at + num_heads * rank * num_vectors
    outliers_at = right_at + num_heads * rank * length
    places_at = (outliers_at + num_heads * num_vectors * 2 * count).to(tl.pointer_type(tl.uint8))
    is_outlier = rows[:, None] < 0
    high = tl.where(is_inside, x, -float("inf"))
    low = tl.where(is_inside, x, float("inf"))
    for i in tl.static_range(max_count):
        is_used = i < count
        top = tl.argmax(high, axis=1)
        bottom = tl.argmin(low, axis=1)
        own = (head * num_vectors + rows) * 2 * count + i
        is_wanted = is_row & is_used
        tl.store(outliers_at + own, tl.max(high, axis=1).to(tl.float16), mask=is_wanted)
        tl.store(outliers_at + own + count, tl.min(low, axis=1).to(tl.float16), mask=is_wanted)
        tl.store(places_at + own, top.to(tl.uint8), mask=is_wanted)
        tl.store(places_at + own + count, bottom.to(tl.uint8), mask=is_wanted)
        is_top = is_used & (columns[None, :] == top[:, None])
        is_bottom = is_used & (columns[None, :] == bottom[:, None])
        high = tl.where(is_top, -float("inf"), high)
        low = tl.where(is_bottom, float("inf"), low)
        is_outlier = is_outlier | is_top | is_bottom
    if max_count > 0:
        x = tl.where(
            count > 0,
            tl.minimum(tl.maximum(x, tl.min(low, axis=1)[:, None]), tl.max(high, axis=1)[:, None]),
            x,
        )
    of_group: tl.constexpr = length_block // groups
    in_groups = tl.reshape(x, [vectors_block, groups, of_group])
    is_real = tl.reshape(
        tl.broadcast_to(is_inside, [vectors_block, length_block]), [vectors_block, groups, of_group]
    )
    minimum = tl.min(tl.where(is_real, in_groups, float("inf")), axis=2)
    maximum = tl.max(tl.where(is_real, in_groups, -float("inf")), axis=2)
    minimum = tl.where(is_row[:, None], minimum, 0.0)
    maximum = tl.where(is_row[:, None], maximum, 0.0)
    scales = tl.div_rn(maximum - minimum, 3.0).to(tl.float16)
    minima = minimum.to(tl.float16)
    wide = scales.to(tl.float32)
    per_scale = tl.where(wide > 0.0, tl.div_rn(tl.full([vectors_block, groups], 1.0, tl.float32), wide), 0.0)
    codes = (in_groups - minima.to(tl.float32)[:, :, None]) * per_scale[:, :, None]
    codes = round_even(tl.clamp(codes, 0.0, 3.0))
    error = in_groups - (codes * wide[:, :, None] + minima.to(tl.float32)[:, :, None])
    error = tl.reshape(error, [vectors_block, length_block])
    error = tl.where(is_inside & (is_outlier == 0), error, 0.0)
    own = (head * num_vectors + rows[:, None]) * groups + tl.arange(0, groups)[None, :]
    tl.store(scales_at + own, scales, mask=is_row[:, None])
    tl.store(scales_at + num_heads * num_vectors * groups + own, minima, mask=is_row[:, None])
    whole = tl.reshape(codes, [vectors_block, length_block]).to(tl.uint8)
    # Four equal parts of the channels, the first in the lowest bits.
    part: tl.constexpr = (vectors_block if is_key else length_block) // 4
    if is_key:
        evens, odds = tl.split(tl.permute(tl.reshape(whole, [2, 2, part, length_block]), [2, 3, 0, 1]))
        first, third = tl.split(evens)
        second, fourth = tl.split(odds)
        bits = first | (second << 2) | (third << 4) | (fourth << 6)
        own = (head * part + tl.arange(0, part))[:, None] * length + columns[None, :]
        tl.store(codes_at + own, bits, mask=(columns < length)[None, :])
    else:
        evens, odds = tl.split(tl.permute(tl.reshape(whole, [vectors_block, 2, 2, part]), [0, 3, 1, 2]))
        first, third = tl.split(evens)
        second, fourth = tl.split(odds)
        bits = first | (second << 2) | (third << 4) | (fourth << 6)
        own = (head * num_vectors + rows)[:, None] * part + tl.arange(0, part)[None, :]
        tl.store(codes_at + own, bits, mask=is_row[:, None])
    if rank > 0:
        right_0 = tl.load(start + columns, mask=columns < length, other=0.0)
        right_1 = tl.load(start + length + columns, mask=(columns < length) & (rank > 1), other=0.0)
        left_0 = tl.zeros([vectors_block], tl.float32)
        left_1 = tl.zeros([vectors_block], tl.float32)
        for _ in range(_NUM_ITERATIONS):
            left_0 = _orthonormal(
                tl.sum(error * right_0[None, :], axis=1), tl.zeros([vectors_block], tl.float32)
            )
            left_1 = _orthonormal(tl.sum(error * right_1[None, :], axis=1), left_0)
            right_0 = tl.sum(error * left_0[:, None], axis=0)
            right_1 = tl.sum(error * left_1[:, None], axis=0)
        left_own = left_at + head * rank * num_vectors + rows
        right_own = right_at + head * rank * length + columns
        tl.store(left_own, left_0.to(tl.float16), mask=is_row)
        tl.store(right_own, right_0.to(tl.float16), mask=columns < length)
        tl.store(left_own + num_vectors, left_1.to(tl.float16), mask=is_row & (rank > 1))
        tl.store(right_own + length, right_1.to(tl.float16), mask=(columns < length) & (rank > 1))


@_jit
def encode_gear_kernel(  # type: ignore[no-untyped-def]
    pool,
    slots,
    packed,
    num_unusable,
    num_tokens,
    num_pages,
    first_layer,
    first_head,
    plane_numbers,
    slot_numbers,
    layer_bytes,
    page_bytes,
    start,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    is_gear: tl.constexpr,
    v_count: tl.constexpr,
    v_groups: tl.constexpr,
):
    """As for fp8. start: fp32, the starts for V [2, head_dim] and K of a full page [2, PAGE], then of the last page."""
    place, is_token = place_of(
        pool,
        slots,
        num_tokens,
        num_pages,
        first_layer,
        first_head,
        plane_numbers,
        slot_numbers,
        num_heads,
        head_dim,
    )
    page, n = page_of(packed, num_tokens, num_pages, layer_bytes, page_bytes)
    x = shifted(tl.load(place, mask=is_token, other=0.0).to(tl.float32), page, num_unusable)
    body = page + 2 * num_heads
    if n < _MIN_TOKENS:
        tokens = tl.program_id(1) * n + tl.arange(0, PAGE)
        where = body.to(_FP16) + tokens[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
        tl.store(where, x.to(tl.float16), mask=is_token)
    else:
        count = _k_count(n, is_gear)
        head = tl.program_id(1) % num_heads
        if tl.program_id(1) < num_heads:
            k_start = start + 4 * head_dim + tl.where(n < PAGE, 2 * PAGE, 0)
            _encode_side(
                tl.trans(x), k_start, body, n, head_dim, n, head, num_heads, count, 1 if is_gear else 0,
                head_dim, PAGE, 1, True,
            )  # fmt: skip
        else:
            v_body = body + num_heads * _side_bytes(n, head_dim, n, 1, count)
            v_start = start + tl.where(n < PAGE, 2 * head_dim, 0)
            _encode_side(
                x, v_start, v_body, n, n, head_dim, head, num_heads, n * 0 + v_count, v_count,
                PAGE, head_dim, v_groups, False,
            )  # fmt: skip


@_jit
def decoded_side(  # type: ignore[no-untyped-def]
    body,
    n,
    num_vectors,
    length,
    head,
    num_heads,
    count,
    max_count: tl.constexpr,
    vectors_block: tl.constexpr,
    length_block: tl.constexpr,
    groups: tl.constexpr,
    is_key: tl.constexpr,
):
    """The reverse of _encode_side: [vectors_block, length_block] fp32."""
    rows = tl.arange(0, vectors_block)
    columns = tl.arange(0, length_block)
    is_row = rows < num_vectors
    rank = 2 * n // PAGE
    scales_at = (body + num_heads * num_vectors * length // 4).to(_FP16)
    left_at = scales_at + 2 * num_heads * num_vectors * groups
    right_at = left_at + num_heads * rank * num_vectors
    outliers_at = right_at + num_heads * rank * length
    places_at = (outliers_at + num_heads * num_vectors * 2 * count).to(tl.pointer_type(tl.uint8))
    part: tl.constexpr = (vectors_block if is_key else length_block) // 4
    if is_key:
        own = (head * part + rows % part)[:, None] * length + columns[None, :]
        bits = tl.load(body + own, mask=(columns < length)[None, :], other=0)
        codes = (bits >> (rows // part * 2)[:, None].to(tl.uint8)) & 3
    else:
        own = (head * num_vectors + rows)[:, None] * part + (columns % part)[None, :]
        bits = tl.load(body + own, mask=is_row[:, None], other=0)
        codes = (bits >> (columns // part * 2)[None, :].to(tl.uint8)) & 3
    own = (head * num_vectors + rows[:, None]) * groups + tl.arange(0, groups)[None, :]
    scales = tl.load(scales_at + own, mask=is_row[:, None], other=0.0).to(tl.float32)
    minima = tl.load(scales_at + num_heads * num_vectors * groups + own, mask=is_row[:, None], other=0.0).to(
        tl.float32
    )
    of_group: tl.constexpr = length_block // groups
    x = tl.reshape(codes.to(tl.float32), [vectors_block, groups, of_group])
    x = tl.reshape(x * scales[:, :, None] + minima[:, :, None], [vectors_block, length_block])
    for i in tl.static_range(2):
        left_own = left_at + (head * rank + i) * num_vectors + rows
        right_own = right_at + (head * rank + i) * length + columns
        left = tl.load(left_own, mask=is_row & (i < rank), other=0.0).to(tl.float32)
        right = tl.load(right_own, mask=(columns < length) & (i < rank), other=0.0).to(tl.float32)
        x += left[:, None] * right[None, :]
    for i in tl.static_range(2 * max_count):
        own = (head * num_vectors + rows) * 2 * count + i
        is_used = is_row & (i < 2 * count)
        value = tl.load(outliers_at + own, mask=is_used, other=0.0).to(tl.float32)
        place = tl.minimum(tl.load(places_at + own, mask=is_used, other=0).to(tl.int32), length - 1)
        x = tl.where(is_used[:, None] & (columns[None, :] == place[:, None]), value[:, None], x)
    return x


@_jit
def decode_gear_kernel(  # type: ignore[no-untyped-def]
    pool,
    slots,
    packed,
    num_tokens,
    num_pages,
    first_layer,
    first_head,
    plane_numbers,
    slot_numbers,
    layer_bytes,
    page_bytes,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    is_gear: tl.constexpr,
    v_count: tl.constexpr,
    v_groups: tl.constexpr,
):
    """The reverse."""
    place, is_token = place_of(
        pool,
        slots,
        num_tokens,
        num_pages,
        first_layer,
        first_head,
        plane_numbers,
        slot_numbers,
        num_heads,
        head_dim,
    )
    page, n = page_of(packed, num_tokens, num_pages, layer_bytes, page_bytes)
    body = page + 2 * num_heads
    factor = shift_of(page)
    if n < _MIN_TOKENS:
        tokens = tl.program_id(1) * n + tl.arange(0, PAGE)
        where = body.to(_FP16) + tokens[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
        put(tl.load(where, mask=is_token, other=0.0).to(tl.float32) * factor, place, is_token)
    else:
        count = _k_count(n, is_gear)
        head = tl.program_id(1) % num_heads
        if tl.program_id(1) < num_heads:
            k = decoded_side(
                body, n, head_dim, n, head, num_heads, count, 1 if is_gear else 0, head_dim, PAGE, 1, True
            )
            put(tl.trans(k) * factor, place, is_token)
        else:
            v_body = body + num_heads * _side_bytes(n, head_dim, n, 1, count)
            v = decoded_side(
                v_body,
                n,
                n,
                head_dim,
                head,
                num_heads,
                n * 0 + v_count,
                v_count,
                PAGE,
                head_dim,
                v_groups,
                False,
            )
            put(v * factor, place, is_token)
