"""Rows of a cache in four bits (`kv_int4/op.py`) as what attention of many rows multiplies; that of few needs none of this (`packed_tiles_triton.py`).

A word of eight codes is cut in pairs, an even channel in the lower half of a word and an odd one in the upper, which stay pairs: by `and` and
`or` in one operation the two are fp16 numbers, 1024 plus the code, or 16 times the code for the bits above. Less 1024, times the scales, plus
the minima: three operations for two channels, and one shift for eight.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

_INT32 = tl.constexpr(tl.pointer_type(tl.int32))
#: The interpreter knows no assembly.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@_jit
def unpacked(rows, is_loaded, is_edge: tl.constexpr, head_dim: tl.constexpr):  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    """[tile_tokens, head_dim] fp16. rows: [tile_tokens] pointers to bytes; is_loaded: which of them, where is_edge says that some may not be."""
    num_words: tl.constexpr = head_dim // 8
    at = rows.to(_INT32)
    at_words = at[:, None] + tl.arange(0, num_words)[None, :]
    if is_edge:
        words = tl.load(at_words, mask=is_loaded[:, None], other=0)
        scales = tl.load(at + num_words, mask=is_loaded, other=0)
        minima = tl.load(at + num_words + 1, mask=is_loaded, other=0)
    else:
        words = tl.load(at_words)
        scales = tl.load(at + num_words)
        minima = tl.load(at + num_words + 1)
    scales, minima = scales[:, None], minima[:, None]
    small = _sixteenth(scales)
    # [tile_tokens, num_words, even or odd, bits above or not]
    first = tl.join(_pair(words, 0x000F000F, scales, minima), _pair(words, 0x00F000F0, small, minima))
    words = words >> 8
    second = tl.join(_pair(words, 0x000F000F, scales, minima), _pair(words, 0x00F000F0, small, minima))
    x = tl.permute(tl.join(first, second), [0, 1, 4, 3, 2])
    return tl.reshape(x, [rows.shape[0], head_dim])


@_jit
def _pair(words, mask: tl.constexpr, scales, minima):  # type: ignore[no-untyped-def]
    """[tile_tokens, num_words, 2] fp16: what `mask` leaves of both halves of each word, times the halves of scales, plus those of minima."""
    if IS_INTERPRETED:
        codes = words & mask
        even = (codes & 0xFFFF).to(tl.float16) * low_half(scales) + low_half(minima)
        odd = (codes >> 16).to(tl.float16) * high_half(scales) + high_half(minima)
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
                .reg .b32 x, base;
                mov.b32 base, 0x64006400;
                lop3.b32 x, $2, $3, base, 0xEA;
                sub.f16x2 x, x, base;
                fma.rn.f16x2 x, x, $4, $5;
                mov.b32 {$0, $1}, x;
            }""",
            "=h,=h,r,r,r,r",
            [words, mask, scales, minima],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    return tl.join(even, odd)


@_jit
def _sixteenth(scales):  # type: ignore[no-untyped-def]
    """Of both halves of each word, exactly but for the smallest numbers."""
    if IS_INTERPRETED:
        low = (low_half(scales) * 0.0625).to(tl.int16, bitcast=True).to(tl.int32)
        high = (high_half(scales) * 0.0625).to(tl.int16, bitcast=True).to(tl.int32)
        small = (low & 0xFFFF) | (high << 16)
    else:
        small = tl.inline_asm_elementwise(
            "{ .reg .b32 f; mov.b32 f, 0x2C002C00; mul.f16x2 $0, $1, f; }",
            "=r,r",
            [scales],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return small


@_jit
def low_half(words):  # type: ignore[no-untyped-def]
    """Of each word, fp16."""
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@_jit
def high_half(words):  # type: ignore[no-untyped-def]
    """Of each word, fp16."""
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
