"""Packed codes as operands of products, by as few operations as can be.

A program looks at `num_abreast` pages at a time, a warp at each: the first axis of what follows. Four packed bytes of
neighbours in memory are one word, int32. Two codes are cut out of it by one `and`, and are fp16 numbers as they are: the code
n of the lowest bits is n * 2**-24, which fp16 has as a subnormal number, and the one of the bits above is 4 or 16 times that.

    words of two rows    a = a0 a1 a2 a3, b = b0 b1 b2 b3
    pairs                a0 b0, a1 b1, a2 b2, a3 b3, each in the lower bytes of the halves of a word
    K                    pairs of two channels, which a product adds up
    V                    of `int4_hadamard` pairs of two tokens lie in the word itself

Tokens are in the order (s, jl, jh) of the token 8 * jh + 4 * jl + s: a thread then has 8 neighbours, and those that it takes
out of one word are its own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.kv_codec.triton_kernel import PAGE, power_of_two

_F = TypeVar("_F", bound=Callable[..., Any])
#: Not compiled anew for numbers that are 1 or divisible by 16.
jit: Callable[[_F], Any] = triton.jit(do_not_specialize=["max_pages", "num_splits"])

_INT32 = tl.constexpr(tl.pointer_type(tl.int32))
_INT16 = tl.constexpr(tl.pointer_type(tl.int16))


@jit
def run_of(context_lens, num_splits, num_kv_heads: tl.constexpr):  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    """What a program is for: a sequence, a KV head, and of the sequence's full pages those from first to last - 1."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    num_full = tl.load(context_lens + sequence) // PAGE
    of_split = tl.cdiv(num_full, num_splits)
    first = tl.program_id(1) * of_split
    return sequence, head, first, tl.minimum(num_full, first + of_split)


@jit
def power_at(place):  # type: ignore[no-untyped-def]
    """2 to the power of an exponent of a page."""
    exponent = tl.load(place).to(tl.int8, bitcast=True).to(tl.int32)
    return power_of_two(tl.maximum(-120, tl.minimum(120, exponent)))


@jit
def words_at(row, num_words: tl.constexpr, is_aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    """row: [abreast, rows] of pointers to bytes, at least at even ones. [abreast, rows, num_words] int32."""
    words = tl.arange(0, num_words)[None, None, :]
    if is_aligned:
        return tl.load(row.to(_INT32)[:, :, None] + words)
    low = tl.load(row.to(_INT16)[:, :, None] + 2 * words).to(tl.int32)
    high = tl.load(row.to(_INT16)[:, :, None] + 2 * words + 1).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@jit
def in_order(x):  # type: ignore[no-untyped-def]
    """[abreast, PAGE] of tokens as they follow each other: in our order."""
    x = tl.permute(tl.reshape(x, [x.shape[0], 8, 2, 4]), [0, 3, 2, 1])
    return tl.reshape(x, [x.shape[0], PAGE])


@jit
def down(x):  # type: ignore[no-untyped-def]
    """[abreast, n] fp16: [abreast, n, 1] fp32."""
    return x.to(tl.float32)[:, :, None]


@jit
def word_pairs(a, b):  # type: ignore[no-untyped-def]
    """Byte s of a and of b, in the lower bytes of the halves of the word number s."""
    low = (a & 0xFFFF) | (b << 16)
    high = ((a >> 16) & 0xFFFF) | (b & -65536)
    return low, low >> 8, high, high >> 8


@jit
def cut(x, mask: tl.constexpr, is_plain: tl.constexpr):  # type: ignore[no-untyped-def]
    """[..., 2] fp16: both halves of x & mask. The compiler would cut x in two first, and then need twice the operations."""
    if is_plain:
        low = (x & mask & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = ((x & mask) >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, $3; mov.b32 {$0, $1}, t; }",
            "=h,=h,r,r",
            [x, mask],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    return tl.join(low, high)


@jit
def k_operand(z0, z1, z2, z3, mask: tl.constexpr, is_plain: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of `word_pairs` of [abreast, rows, 16]: [abreast, PAGE in our order, 2 * rows]."""
    evens = tl.join(cut(z0, mask, is_plain), cut(z2, mask, is_plain))
    odds = tl.join(cut(z1, mask, is_plain), cut(z3, mask, is_plain))
    # [abreast, rows, jh, jl, pair, s >> 1, s & 1]
    x = tl.reshape(tl.join(evens, odds), [z0.shape[0], z0.shape[1], 8, 2, 2, 2, 2])
    return tl.reshape(tl.permute(x, [0, 5, 6, 3, 2, 1, 4]), [z0.shape[0], PAGE, 2 * z0.shape[1]])


@jit
def v_operand(z0, z1, mask: tl.constexpr, is_plain: tl.constexpr):  # type: ignore[no-untyped-def]
    """z0: words of tokens of a channel, [abreast, channels, 16]; z1: z0 >> 8. [abreast, channels, PAGE in our order]."""
    x = tl.join(cut(z0, mask, is_plain), cut(z1, mask, is_plain))
    # [abreast, channels, jh, jl, s >> 1, s & 1]
    x = tl.reshape(x, [z0.shape[0], z0.shape[1], 8, 2, 2, 2])
    return tl.reshape(tl.permute(x, [0, 1, 4, 5, 3, 2]), [z0.shape[0], z0.shape[1], PAGE])


@jit
def finite(highest):  # type: ignore[no-untyped-def]
    """What scores are compared with; 0 where there is none yet."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@jit
def merge_pages(highest, total):  # type: ignore[no-untyped-def]
    """[abreast, rows] each: those of all pages, [rows], and what the sums of the pages count, [abreast, 1, rows]."""
    whole = tl.max(highest, axis=0)
    weights = tl.exp2(highest - finite(whole)[None, :])
    return whole, tl.sum(total * weights, axis=0), weights[:, None, :]


@jit
def equals(a, b, is_plain: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp16, of a shape that a and b are broadcast to: 1 where they are equal, 0 elsewhere; two numbers in one operation."""
    if is_plain:
        return (a == b).to(tl.float16)
    return tl.inline_asm_elementwise(
        "set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
    )
