"""One level of the search for the borders of top_k and top_p and for the token of a row.

Keys from the highest down are cut into bins. A level adds up what is in each bin and says in which ones each search ends;
these are its window, which the next level cuts anew. What top_p wants depends on what top_k keeps, and what the draw
wants on both. All go on at once nevertheless: what is kept is known within bounds, and a window has all bins from the
one for the least that may be wanted to the one for the most. So keys of 32 bits with 12 bits of bins take three levels, but where bounds
stay apart because many tokens are equal; nine always suffice.

Masses are whole numbers here: a row's is from 2**61 to 2**62. Their sums have no rounding, and are the same in any order.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.sample.keys import keys_of, values_of, weights_of

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: A row's state in whole numbers. Of each search: the keys between which it ends, none where it has ended, and what is above them:
#: tokens for top_k, else mass.
_LOW, _HIGH, _ABOVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_TOP_K, _TOP_P, _DRAW = tl.constexpr(0), tl.constexpr(3), tl.constexpr(6)
#: The mass above the window of top_k.
_MASS_ABOVE = tl.constexpr(9)
#: Bounds of the mass that top_k keeps, and of what top_p keeps of it.
_LEAST_K, _MOST_K, _LEAST_P, _MOST_P = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12), tl.constexpr(13)
#: The mass that min_p keeps.
_MIN_P = tl.constexpr(14)
#: Which of the tokens that have the key is drawn, in the order of their ids; below 0 until that is known.
_TIE = tl.constexpr(15)
STATE = tl.constexpr(16)
#: For each bin: tokens and mass for top_k, mass for top_p, mass for the draw. The first level has the first two, for all.
SUMS = tl.constexpr(4)


@_jit
def begin(state, sums, num_bins: tl.constexpr):  # type: ignore[no-untyped-def] # Triton looks at annotations
    """Of a row that is to be searched. state: [STATE], sums: [SUMS, num_bins], int64, for other programs as well."""
    places = tl.arange(0, STATE)
    tl.store(state + places, tl.where(places == _TIE, -1, 0).to(tl.int64))
    tl.store(sums + tl.arange(0, SUMS * num_bins), tl.zeros([SUMS * num_bins], tl.int64))


@_jit
def _exponent(x):  # type: ignore[no-untyped-def]
    """x: fp64. Of the largest power of 2 that is not above it; below 0 of a 0."""
    return (x.to(tl.int64, bitcast=True) >> 52) - 1023


@_jit
def scale_of(total):  # type: ignore[no-untyped-def]
    """The power of 2 that makes a mass from 2**61 to 2**62 of fp64 `total`, which is at least 1."""
    return ((1023 + 61 - _exponent(total)) << 52).to(tl.float64, bitcast=True)


@_jit
def read(state, place: tl.constexpr):  # type: ignore[no-untyped-def]
    """What may have been written since this multiprocessor had it in its cache."""
    return tl.load(state + place, cache_modifier=".cg")


@_jit
def found(state):  # type: ignore[no-untyped-def]
    """The token's key, and which one of those of this key it is; below 0 while the search goes on."""
    return read(state, _DRAW + _HIGH), read(state, _TIE)


@_jit
def tile_of(logits, first, vocab_size: tl.constexpr, tile: tl.constexpr, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits from id `first` on, their ids, keys, and which there are."""
    ids = first + tl.arange(0, tile)
    x = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    return x, ids, keys_of(x, shift), x > -float("inf")


@_jit
def _whole(weights, scale):  # type: ignore[no-untyped-def]
    """The nearest whole number."""
    return (weights * scale + 0.5).to(tl.int64)


@_jit
def _whole_of_key(key, highest, temperature, scale, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mass of one token."""
    x = values_of(tl.full([1], 0, tl.int64) + key, shift)
    return tl.sum(_whole(weights_of(x, highest, temperature), scale), axis=0)


@_jit
def _all_keys(highest, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """From the highest one down, as many as there can be."""
    high = tl.max(keys_of(tl.full([1], 0.0, tl.float32) + highest, shift), axis=0)
    return high + 1 - (tl.full([], 1, tl.int64) << (32 - shift)), high


@_jit
def _bin_bits(low, high, num_bins: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many lower bits of a key bins do not tell apart, so that they suffice."""
    return tl.maximum(0, _exponent(((high - low) // num_bins).to(tl.float64)) + 1)


@_jit
def _add(sums, amounts, keys, is_real, low, high, bits):  # type: ignore[no-untyped-def]
    """To the bins of the keys that are in the window."""
    is_inside = is_real & (keys >= low) & (keys <= high)
    tl.atomic_add(sums + ((high - keys) >> bits), amounts, mask=is_inside, sem="relaxed")


@_jit
def add_all(  # type: ignore[no-untyped-def]
    logits,
    state,
    sums,
    highest,
    temperature,
    scale,
    top_k,
    min_p,
    first,
    end,
    vocab_size: tl.constexpr,
    tile: tl.constexpr,
    num_bins: tl.constexpr,
    shift: tl.constexpr,
):
    """The first level: tokens `first` to `end`, and what min_p keeps of them."""
    low, high = _all_keys(highest, shift)
    bits = _bin_bits(low, high, num_bins)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    kept = tl.zeros([tile], tl.int64)
    ones = tl.full([tile], 1, tl.int64)
    for start in range(first, end, tile):
        x, _ids, keys, is_real = tile_of(logits, start, vocab_size, tile, shift)
        weights = weights_of(x, highest, temperature)
        masses = _whole(weights, scale)
        kept += tl.where(weights >= min_p, masses, 0)
        if has_top_k:
            _add(sums, ones, keys, is_real, low, high, bits)
        _add(sums + num_bins, masses, keys, is_real, low, high, bits)
    tl.atomic_add(state + _MIN_P, tl.sum(kept, axis=0), sem="relaxed")


@_jit
def add_windows(  # type: ignore[no-untyped-def]
    logits,
    state,
    sums,
    highest,
    temperature,
    scale,
    first,
    end,
    vocab_size: tl.constexpr,
    tile: tl.constexpr,
    num_bins: tl.constexpr,
    shift: tl.constexpr,
):
    """A later level: tokens `first` to `end`."""
    k_low, k_high = read(state, _TOP_K + _LOW), read(state, _TOP_K + _HIGH)
    p_low, p_high = read(state, _TOP_P + _LOW), read(state, _TOP_P + _HIGH)
    low, high = read(state, _DRAW + _LOW), read(state, _DRAW + _HIGH)
    k_bits = _bin_bits(k_low, k_high, num_bins)
    p_bits = _bin_bits(p_low, p_high, num_bins)
    bits = _bin_bits(low, high, num_bins)
    ones = tl.full([tile], 1, tl.int64)
    for start in range(first, end, tile):
        x, _ids, keys, is_real = tile_of(logits, start, vocab_size, tile, shift)
        is_inside = ((keys >= k_low) & (keys <= k_high)) | ((keys >= p_low) & (keys <= p_high))
        is_inside = is_real & (is_inside | ((keys >= low) & (keys <= high)))
        # Most tiles have none when windows are small.
        if tl.max(is_inside.to(tl.int32), axis=0) > 0:
            masses = _whole(weights_of(x, highest, temperature), scale)
            _add(sums, ones, keys, is_real, k_low, k_high, k_bits)
            _add(sums + num_bins, masses, keys, is_real, k_low, k_high, k_bits)
            _add(sums + 2 * num_bins, masses, keys, is_real, p_low, p_high, p_bits)
            _add(sums + 3 * num_bins, masses, keys, is_real, low, high, bits)


@_jit
def _cut(amounts, least, most, above, low, high, num_bins: tl.constexpr):  # type: ignore[no-untyped-def]
    """The part of the window in which the sum from the highest key on comes to `least` to `most`, which are at least 1.

    Returns its first bin, low and high, what is above it, and that with what is in it.
    """
    bins = tl.arange(0, num_bins)
    bits = _bin_bits(low, high, num_bins)
    reached = above + tl.cumsum(amounts, axis=0)
    first = tl.sum((reached < least).to(tl.int64), axis=0)
    last = tl.sum((reached < most).to(tl.int64), axis=0)
    with_it = above + tl.sum(tl.where(bins <= last, amounts, 0), axis=0)
    above += tl.sum(tl.where(bins < first, amounts, 0), axis=0)
    low = tl.maximum(low, high + 1 - ((last + 1) << bits))
    return first, low, high - (first << bits), above, with_it


@_jit
def _wanted_of_top_p(top_p, mass):  # type: ignore[no-untyped-def]
    """What the mass must come to that top_p keeps."""
    wanted = tl.ceil((top_p * mass.to(tl.float64)).to(tl.float64)).to(tl.int64)
    return tl.maximum(1, tl.minimum(wanted, mass))


@_jit
def _wanted_of_draw(number, mass):  # type: ignore[no-untyped-def]
    """What the mass must come to, up to the token: more than the random number's part."""
    return tl.maximum(1, tl.minimum((number * mass.to(tl.float64)).to(tl.int64) + 1, mass))


@_jit
def narrow(  # type: ignore[no-untyped-def]
    state,
    sums,
    highest,
    temperature,
    scale,
    top_k,
    top_p,
    number,
    num_bins: tl.constexpr,
    shift: tl.constexpr,
    is_first: tl.constexpr,
):
    """Cut the windows by the sums of a level, which are 0 then. By one program, when all have added."""
    bins = tl.arange(0, num_bins)
    if is_first:
        low, high = _all_keys(highest, shift)
        above = tl.full([], 0, tl.int64)
        k_low, k_high, k_above, mass_above = low, high, above, above
        p_low, p_high, p_above = low, high, above
        most_k = tl.sum(tl.load(sums + num_bins + bins, cache_modifier=".cg"), axis=0)
        num_tokens = tl.sum(tl.load(sums + bins, cache_modifier=".cg"), axis=0)
        # Without top_k they are not counted.
        least_k = tl.where((top_k > 0) & (top_k < num_tokens), above, most_k)
        least_p, most_p = above, most_k
        p_sums, draw_sums = sums + num_bins, sums + num_bins
    else:
        low, high, above = read(state, _DRAW + _LOW), read(state, _DRAW + _HIGH), read(state, _DRAW + _ABOVE)
        k_low, k_high = read(state, _TOP_K + _LOW), read(state, _TOP_K + _HIGH)
        k_above, mass_above = read(state, _TOP_K + _ABOVE), read(state, _MASS_ABOVE)
        p_low, p_high = read(state, _TOP_P + _LOW), read(state, _TOP_P + _HIGH)
        p_above = read(state, _TOP_P + _ABOVE)
        least_k, most_k = read(state, _LEAST_K), read(state, _MOST_K)
        least_p, most_p = read(state, _LEAST_P), read(state, _MOST_P)
        p_sums, draw_sums = sums + 2 * num_bins, sums + 3 * num_bins
    if least_k < most_k:
        counts = tl.load(sums + bins, cache_modifier=".cg")
        masses = tl.load(sums + num_bins + bins, cache_modifier=".cg")
        chosen, k_low, k_high, k_above, _with_it = _cut(
            counts, top_k, top_k, k_above, k_low, k_high, num_bins
        )
        mass_above += tl.sum(tl.where(bins < chosen, masses, 0), axis=0)
        least_k = mass_above
        most_k = mass_above + tl.sum(tl.where(bins == chosen, masses, 0), axis=0)
        if k_low == k_high:
            one = _whole_of_key(k_low, highest, temperature, scale, shift)
            least_k = mass_above + (top_k - k_above) * one
            most_k = least_k
    if top_p >= 1.0:
        least_p, most_p = least_k, most_k
    elif least_p < most_p:
        least = _wanted_of_top_p(top_p, least_k)
        most = _wanted_of_top_p(top_p, most_k)
        masses = tl.load(p_sums + bins, cache_modifier=".cg")
        _first, p_low, p_high, least_p, most_p = _cut(masses, least, most, p_above, p_low, p_high, num_bins)
        p_above = least_p
        if (least == most) & (p_low == p_high):
            one = _whole_of_key(p_low, highest, temperature, scale, shift)
            least_p += (least - p_above + one - 1) // one * one
            most_p = least_p
    in_min_p = read(state, _MIN_P)
    least = _wanted_of_draw(number, tl.minimum(least_p, in_min_p))
    most = _wanted_of_draw(number, tl.minimum(most_p, in_min_p))
    masses = tl.load(draw_sums + bins, cache_modifier=".cg")
    _first, low, high, above, _with_it = _cut(masses, least, most, above, low, high, num_bins)
    tie = tl.full([], -1, tl.int64)
    if (least == most) & (low == high):
        tie = (least - above - 1) // _whole_of_key(low, highest, temperature, scale, shift)
    # A search that has ended has no window.
    k_low = tl.where(least_k == most_k, k_high + 1, k_low)
    p_low = tl.where(least_p == most_p, p_high + 1, p_low)
    # All threads have read.
    tl.debug_barrier()
    tl.store(state + _TOP_K + _LOW, k_low)
    tl.store(state + _TOP_K + _HIGH, k_high)
    tl.store(state + _TOP_K + _ABOVE, k_above)
    tl.store(state + _MASS_ABOVE, mass_above)
    tl.store(state + _LEAST_K, least_k)
    tl.store(state + _MOST_K, most_k)
    tl.store(state + _TOP_P + _LOW, p_low)
    tl.store(state + _TOP_P + _HIGH, p_high)
    tl.store(state + _TOP_P + _ABOVE, p_above)
    tl.store(state + _LEAST_P, least_p)
    tl.store(state + _MOST_P, most_p)
    tl.store(state + _DRAW + _LOW, low)
    tl.store(state + _DRAW + _HIGH, high)
    tl.store(state + _DRAW + _ABOVE, above)
    tl.store(state + _TIE, tie)
    tl.store(sums + tl.arange(0, SUMS * num_bins), tl.zeros([SUMS * num_bins], tl.int64))
    tl.debug_barrier()
