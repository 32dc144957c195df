"""The draw of rows that `choose` could not tell: bisection over keys, among all logits of the row."""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.sample.keys import UNKNOWN, keys_of, values_of, weights_of

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

_COUNT, _MASS_REACHED, _MASS_EXCEEDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@_jit
def _tile(logits, first, vocab_size: tl.constexpr, tile: tl.constexpr, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits from id `first` on, their ids, keys, and which there are."""
    ids = first + tl.arange(0, tile)
    x = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    return x, ids, keys_of(x, shift), x > -float("inf")


@_jit
def _descend(  # type: ignore[no-untyped-def]
    logits,
    highest,
    temperature,
    low,
    high,
    wanted,
    kind: tl.constexpr,
    vocab_size: tl.constexpr,
    tile: tl.constexpr,
    parts: tl.constexpr,
    shift: tl.constexpr,
):
    """The largest key from low to high at which the tokens from it on are as many, or have the mass, that is wanted.

    wanted: fp64. low where there is none.
    """
    while low < high:
        borders = low + ((high - low) * (tl.arange(0, parts) + 1).to(tl.int64) + parts - 1) // parts
        # Each thread adds for itself until the end.
        of_lanes = tl.zeros([tile, parts], tl.float64)
        narrow = borders.to(tl.int32)[None, :]
        for first in range(0, vocab_size, tile):
            x, _ids, keys, is_real = _tile(logits, first, vocab_size, tile, shift)
            weights = is_real.to(tl.float64) if kind == _COUNT else weights_of(x, highest, temperature)
            of_lanes += tl.where(keys.to(tl.int32)[:, None] >= narrow, weights[:, None], 0.0)
        sums = tl.sum(of_lanes, axis=0)
        is_met = sums > wanted if kind == _MASS_EXCEEDED else sums >= wanted
        new_low = tl.max(tl.where(is_met, borders, low), axis=0)
        high = tl.min(tl.where(is_met, high, borders - 1), axis=0)
        low = new_low
    return low


@_jit
def _around(  # type: ignore[no-untyped-def]
    logits, highest, temperature, key, vocab_size: tl.constexpr, tile: tl.constexpr, shift: tl.constexpr
):
    """Mass and number of the tokens above this key, number and mass of one of those of it."""
    mass = tl.zeros([tile], tl.float64)
    num_above = tl.zeros([tile], tl.int64)
    num_equal = tl.zeros([tile], tl.int64)
    for first in range(0, vocab_size, tile):
        x, _ids, keys, is_real = _tile(logits, first, vocab_size, tile, shift)
        mass += tl.where(keys > key, weights_of(x, highest, temperature), 0.0)
        num_above += (is_real & (keys > key)).to(tl.int64)
        num_equal += (is_real & (keys == key)).to(tl.int64)
    one = tl.sum(weights_of(values_of(tl.full([1], 0, tl.int64) + key, shift), highest, temperature), axis=0)
    return tl.sum(mass, axis=0), tl.sum(num_above, axis=0), tl.sum(num_equal, axis=0), one


@_jit
def search_kernel(  # type: ignore[no-untyped-def]
    all_logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    numbers,
    highests,
    token_ids,
    vocab_size: tl.constexpr,
    tile: tl.constexpr,
    parts: tl.constexpr,
    shift: tl.constexpr,
):
    """What is kept is all tokens above the key `border`, and the first `num_ties` of it. Programs: [rows]."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(token_ids + row) == UNKNOWN:
        logits = all_logits + row * vocab_size
        temperature = tl.load(temperatures + row)
        highest = tl.load(highests + row)
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
        high = tl.max(keys_of(tl.full([1], 0.0, tl.float32) + highest, shift), axis=0)
        lowest = tl.full([tile], 1, tl.int64) * high
        for first in range(0, vocab_size, tile):
            x, _ids, keys, is_real = _tile(logits, first, vocab_size, tile, shift)
            is_possible = is_real & (weights_of(x, highest, temperature) > 0.0)
            lowest = tl.minimum(lowest, tl.where(is_possible, keys, high))
        border = tl.min(lowest, axis=0)
        if (top_k > 0) & (top_k < vocab_size):
            border = _descend(
                logits,
                highest,
                temperature,
                border,
                high,
                top_k.to(tl.float64),
                _COUNT,
                vocab_size,
                tile,
                parts,
                shift,
            )
        above, num_above, num_equal, one = _around(
            logits, highest, temperature, border, vocab_size, tile, shift
        )
        num_ties = num_equal
        if (top_k > 0) & (top_k < vocab_size):
            num_ties = tl.maximum(1, tl.minimum(num_equal, top_k - num_above))
        mass = above + num_ties.to(tl.float64) * one
        if top_p < 1.0:
            wanted = top_p * mass
            key = _descend(
                logits,
                highest,
                temperature,
                border,
                high,
                wanted,
                _MASS_REACHED,
                vocab_size,
                tile,
                parts,
                shift,
            )
            key_above, _num, key_equal, key_one = _around(
                logits, highest, temperature, key, vocab_size, tile, shift
            )
            ties = tl.ceil(((wanted - key_above) / key_one).to(tl.float64)).to(tl.int64)
            ties = tl.maximum(1, tl.minimum(key_equal, ties))
            if key > border:
                num_ties = ties
                mass = key_above + ties.to(tl.float64) * key_one
            else:
                num_ties = tl.minimum(num_ties, ties)
                mass = key_above + num_ties.to(tl.float64) * key_one
            border = key
        if min_p > 0.0:
            # The smallest key of a mass of min_p; the largest has 1.
            low = border
            key = high
            while low < key:
                middle = low + (key - low) // 2
                weight = tl.sum(
                    weights_of(values_of(tl.full([1], 0, tl.int64) + middle, shift), highest, temperature),
                    axis=0,
                )
                if weight >= min_p:
                    key = middle
                else:
                    low = middle + 1
            if key > border:
                lowest = tl.full([tile], 1, tl.int64) * high
                for first in range(0, vocab_size, tile):
                    x, _ids, keys, is_real = _tile(logits, first, vocab_size, tile, shift)
                    lowest = tl.minimum(lowest, tl.where(is_real & (keys >= key), keys, high))
                border = tl.min(lowest, axis=0)
                above, _num, num_ties, one = _around(
                    logits, highest, temperature, border, vocab_size, tile, shift
                )
                mass = above + num_ties.to(tl.float64) * one
        target = tl.load(numbers + row) * mass
        key = _descend(
            logits, highest, temperature, border, high, target, _MASS_EXCEEDED, vocab_size, tile, parts, shift
        )
        above, _num, num_equal, one = _around(logits, highest, temperature, key, vocab_size, tile, shift)
        tie = tl.floor((target - above) / one).to(tl.int64)
        tie = tl.maximum(0, tl.minimum(tie, tl.where(key == border, num_ties, num_equal) - 1))
        num_seen = tl.full([], 0, tl.int64)
        token = tl.full([], 0, tl.int64)
        for first in range(0, vocab_size, tile):
            _x, ids, keys, is_real = _tile(logits, first, vocab_size, tile, shift)
            is_tie = (is_real & (keys == key)).to(tl.int64)
            order = num_seen + tl.cumsum(is_tie, axis=0) - 1
            token += tl.sum(tl.where((is_tie == 1) & (order == tie), ids, 0).to(tl.int64), axis=0)
            num_seen += tl.sum(is_tie, axis=0)
        tl.store(token_ids + row, token)
