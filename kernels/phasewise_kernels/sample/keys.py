"""Random numbers, and logits as whole numbers and as masses: what the kernels of the draw share."""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.sample import reference

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

NO_TOKEN = tl.constexpr(reference.NO_TOKEN)
#: What `choose` says where `level` and `token` are to look.
UNKNOWN = tl.constexpr(-2)
_MULTIPLIER_0 = tl.constexpr(reference.MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(reference.MULTIPLIERS[1])
_STEP_0 = tl.constexpr(reference.KEY_STEPS[0])
_STEP_1 = tl.constexpr(reference.KEY_STEPS[1])


@_jit
def uniform(seed, position, stream):  # type: ignore[no-untyped-def] # Triton looks at annotations
    """Philox 4x64-10; see the reference."""
    c0 = (position + 1).to(tl.uint64)
    c1 = stream.to(tl.uint64)
    c2 = c0 ^ c0
    c3 = c2
    k0 = seed.to(tl.uint64)
    k1 = c2
    m0 = tl.full([], _MULTIPLIER_0, tl.uint64)
    m1 = tl.full([], _MULTIPLIER_1, tl.uint64)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(m0, c0)
        low0 = m0 * c0
        high1 = tl.umulhi(m1, c2)
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += tl.full([], _STEP_0, tl.uint64)
        k1 += tl.full([], _STEP_1, tl.uint64)
    return (c0 >> 11).to(tl.float64) * 1.1102230246251565e-16


@_jit
def keys_of(x, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """x: fp32 without NaN. int64 of the same order; shift: lower bits that x never has."""
    # -0 and 0 are equal, and must be one key.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> shift).to(tl.int64)


@_jit
def values_of(keys, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """The reverse of keys_of."""
    bits = (keys << shift).to(tl.int32)
    lower: tl.constexpr = (1 << shift) - 1
    bits = tl.where(keys < 0, (bits | lower) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@_jit
def weights_of(x, highest, temperature):  # type: ignore[no-untyped-def]
    """Of the logits x; 0 for -inf."""
    return tl.where(
        x == -float("inf"), 0.0, tl.exp((x.to(tl.float64) - highest.to(tl.float64)) / temperature)
    )
