"""Packing and unpacking of `fp8` and `int4_hadamard` pages on a GPU: all layers in one launch, the pool read or written once.

A program has one head of a page, K or V: its numbers [page, head_dim] stay in registers from the pool to the packed bytes,
or the other way. Its two axes are the pages of all layers, and 2 * num_heads. Fused products and sums are off, and
divisions are exact: the bytes are those of the CPU.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.kv_codec import reference

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

PAGE = tl.constexpr(reference.PAGE_TOKENS)
_E4M3_MAX = tl.constexpr(reference.E4M3_MAX)
_MIN_SCALE = tl.constexpr(reference.MIN_SCALE)
_FP16 = tl.constexpr(tl.pointer_type(tl.float16))
_FP32_MAX = tl.constexpr(3.4028234663852886e38)


@_jit
def place_of(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    pool,
    slots,
    num_tokens,
    num_pages,
    first_layer,
    first_head,
    plane_numbers,
    slot_numbers,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
):
    """Where the numbers of this program lie in the pool, [PAGE, head_dim], and which of its tokens there are."""
    page = tl.program_id(0) % num_pages
    layer = tl.program_id(0) // num_pages
    kv = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    tokens = tl.arange(0, PAGE)
    is_token = page * PAGE + tokens < num_tokens
    slot = tl.load(slots + page * PAGE + tokens, mask=is_token, other=0)
    plane = ((first_layer + layer) * 2 + kv).to(tl.int64) * plane_numbers
    start = plane + slot * slot_numbers + (first_head + head) * head_dim
    return pool + start[:, None] + tl.arange(0, head_dim)[None, :], is_token[:, None]


@_jit
def page_of(packed, num_tokens, num_pages, layer_bytes, page_bytes):  # type: ignore[no-untyped-def]
    """Where the page of this program begins, and its number of tokens."""
    page = tl.program_id(0) % num_pages
    layer = (tl.program_id(0) // num_pages).to(tl.int64)
    return packed + layer * layer_bytes + page.to(tl.int64) * page_bytes, tl.minimum(
        PAGE, num_tokens - page * PAGE
    )


@_jit
def power_of_two(exponent):  # type: ignore[no-untyped-def]
    """int32 from -126 to 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@_jit
def round_even(x):  # type: ignore[no-untyped-def]
    """To the nearest whole number, x from 0 to 2**22."""
    return (x + 8388608.0) - 8388608.0


@_jit
def shifted(x, page, num_unusable):  # type: ignore[no-untyped-def]
    """x over the power of two that its page is told; counts what is not finite."""
    largest = tl.max(tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1), axis=0)
    if largest == float("inf"):
        tl.atomic_add(num_unusable, 1)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    # Of smaller numbers the exponent is cut off anyway.
    exponent = tl.where(largest == 0.0, 0, exponent)
    shift = tl.maximum(-120, tl.minimum(120, exponent - 8))
    tl.store(page + tl.program_id(1), shift.to(tl.int8).to(tl.uint8, bitcast=True))
    return x * power_of_two(-shift)


@_jit
def shift_of(page):  # type: ignore[no-untyped-def]
    """What `shifted` stored, as a factor."""
    shift = tl.load(page + tl.program_id(1)).to(tl.int8, bitcast=True).to(tl.int32)
    return power_of_two(tl.maximum(-120, tl.minimum(120, shift)))


@_jit
def put(x, place, mask):  # type: ignore[no-untyped-def]
    """Store in the dtype of the pool; what fp32 or float8_e4m3fn cannot hold saturates."""
    if place.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -_E4M3_MAX, _E4M3_MAX)
    else:
        x = tl.clamp(x, -_FP32_MAX, _FP32_MAX)
    tl.store(place, x.to(place.dtype.element_ty), mask=mask)


@_jit
def encode_fp8_kernel(  # type: ignore[no-untyped-def]
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
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
):
    """pool: as in TokenRows; slots: [num_tokens] int64; packed: uint8; num_unusable: [1] int32."""
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
    scales = tl.div_rn(tl.max(tl.abs(x), axis=1), _E4M3_MAX)
    scales = tl.maximum(scales, _MIN_SCALE).to(tl.float16)
    numbers = x * tl.div_rn(tl.full([PAGE], 1.0, tl.float32), scales.to(tl.float32))[:, None]
    tokens = tl.program_id(1) * n + tl.arange(0, PAGE)
    where = body + tokens[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
    # A scale that was rounded down puts the largest number a little above.
    numbers = tl.clamp(numbers, -_E4M3_MAX, _E4M3_MAX).to(tl.float8e4nv)
    tl.store(where, numbers.to(tl.uint8, bitcast=True), mask=is_token)
    where = (body + 2 * num_heads * n * head_dim).to(_FP16) + tokens
    tl.store(where, scales, mask=tl.arange(0, PAGE) < n)


@_jit
def decode_fp8_kernel(  # type: ignore[no-untyped-def]
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
    tokens = tl.program_id(1) * n + tl.arange(0, PAGE)
    where = body + tokens[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
    numbers = tl.load(where, mask=is_token, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    where = (body + 2 * num_heads * n * head_dim).to(_FP16) + tokens
    scales = tl.load(where, mask=tl.arange(0, PAGE) < n, other=0.0).to(tl.float32)
    put(numbers * scales[:, None] * shift_of(page), place, is_token)


@_jit
def _stage(x, half: tl.constexpr, head_dim: tl.constexpr):  # type: ignore[no-untyped-def]
    pairs = tl.permute(tl.reshape(x, [x.shape[0] * head_dim // (2 * half), 2, half]), [0, 2, 1])
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, [0, 2, 1]), [x.shape[0], head_dim])


@_jit
def rotate(x, head_dim: tl.constexpr, block: tl.constexpr, log_block: tl.constexpr):  # type: ignore[no-untyped-def]
    """x: [rows, head_dim]. Blocks of channels times their Hadamard matrix, by sums and differences."""
    for stage in tl.static_range(log_block):
        x = _stage(x, block >> (stage + 1), head_dim)
    return x


@_jit
def encode_int4_kernel(  # type: ignore[no-untyped-def]
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
    factor,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    log_block: tl.constexpr,
):
    """As for fp8. factor: block**-0.5."""
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
    x = rotate(x, head_dim, block, log_block) * factor
    num_blocks: tl.constexpr = head_dim // block
    x = tl.reshape(x, [PAGE, num_blocks, block])
    low = tl.min(x, axis=2)
    scales = tl.div_rn(tl.max(x, axis=2) - low, 15.0).to(tl.float16)
    minima = low.to(tl.float16)
    wide = scales.to(tl.float32)
    per_scale = tl.where(wide > 0.0, tl.div_rn(tl.full([PAGE, num_blocks], 1.0, tl.float32), wide), 0.0)
    codes = (x - minima.to(tl.float32)[:, :, None]) * per_scale[:, :, None]
    codes = round_even(tl.clamp(codes, 0.0, 15.0)).to(tl.uint8)
    low_codes, high_codes = tl.split(tl.permute(tl.reshape(codes, [PAGE, 2, head_dim // 2]), [0, 2, 1]))
    tokens = tl.program_id(1) * n + tl.arange(0, PAGE)
    row = 2 * num_heads * n
    body = page + 2 * num_heads
    where = body + tokens[:, None] + tl.arange(0, head_dim // 2)[None, :] * row
    tl.store(where, low_codes | (high_codes << 4), mask=is_token)
    where = (body + head_dim // 2 * row).to(_FP16) + tokens[:, None] + tl.arange(0, num_blocks)[None, :] * row
    tl.store(where, scales, mask=is_token)
    tl.store(where + num_blocks * row, minima, mask=is_token)


@_jit
def decode_int4_kernel(  # type: ignore[no-untyped-def]
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
    factor,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    log_block: tl.constexpr,
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
    num_blocks: tl.constexpr = head_dim // block
    tokens = tl.program_id(1) * n + tl.arange(0, PAGE)
    row = 2 * num_heads * n
    body = page + 2 * num_heads
    where = body + tokens[:, None] + tl.arange(0, head_dim // 2)[None, :] * row
    codes = tl.load(where, mask=is_token, other=0)
    codes = tl.permute(tl.join(codes & 15, codes >> 4), [0, 2, 1])
    where = (body + head_dim // 2 * row).to(_FP16) + tokens[:, None] + tl.arange(0, num_blocks)[None, :] * row
    scales = tl.load(where, mask=is_token, other=0.0).to(tl.float32)
    minima = tl.load(where + num_blocks * row, mask=is_token, other=0.0).to(tl.float32)
    x = tl.reshape(codes, [PAGE, num_blocks, block]).to(tl.float32) * scales[:, :, None] + minima[:, :, None]
    x = rotate(tl.reshape(x, [PAGE, head_dim]), head_dim, block, log_block) * factor
    put(x * shift_of(page), place, is_token)
