"""The draw of rows that `choose` could not tell: a search among all logits of the row, level by level (`levels.py`).

Several programs share a row. The last of them to come does what needs the sums of all; nobody waits.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.paged_attention.parts_triton import is_last
from phasewise_kernels.sample.keys import UNKNOWN
from phasewise_kernels.sample.levels import STATE, SUMS, add_all, add_windows, found, narrow, tile_of

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit


@_jit
def _part(vocab_size: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def] # Triton looks at annotations
    """How many tokens a program has, whole tiles; the last ones may have fewer, or none."""
    return tl.cdiv(tl.cdiv(vocab_size, tile), tl.num_programs(1)) * tile


@_jit
def level_kernel(  # type: ignore[no-untyped-def]
    all_logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    numbers,
    highests,
    scales,
    states,
    all_sums,
    semaphores,
    token_ids,
    vocab_size: tl.constexpr,
    tile: tl.constexpr,
    num_bins: tl.constexpr,
    shift: tl.constexpr,
    is_first: tl.constexpr,
):
    """One level of all rows that are still searched. Programs: [rows, parts]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state = states + row * STATE
    _key, tie = found(state)
    if (tl.load(token_ids + row) == UNKNOWN) & (tie < 0):
        logits = all_logits + row * vocab_size
        sums = all_sums + row * SUMS * num_bins
        temperature = tl.load(temperatures + row)
        highest = tl.load(highests + row)
        scale = tl.load(scales + row)
        top_k = tl.load(top_ks + row)
        size = _part(vocab_size, tile)
        first = part * size
        end = tl.minimum(first + size, vocab_size)
        if is_first:
            min_p = tl.load(min_ps + row)
            add_all(
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
                vocab_size,
                tile,
                num_bins,
                shift,
            )
        else:
            add_windows(
                logits,
                state,
                sums,
                highest,
                temperature,
                scale,
                first,
                end,
                vocab_size,
                tile,
                num_bins,
                shift,
            )
        if is_last(semaphores + row, tl.num_programs(1)):
            top_p = tl.load(top_ps + row)
            number = tl.load(numbers + row)
            narrow(
                state,
                sums,
                highest,
                temperature,
                scale,
                top_k,
                top_p,
                number,
                num_bins,
                shift,
                is_first,
            )


@_jit
def token_kernel(  # type: ignore[no-untyped-def]
    all_logits,
    temperatures,
    top_ks,
    top_ps,
    numbers,
    highests,
    scales,
    states,
    all_sums,
    semaphores,
    tie_counts,
    token_ids,
    vocab_size: tl.constexpr,
    tile: tl.constexpr,
    num_bins: tl.constexpr,
    max_levels: tl.constexpr,
    parts_block: tl.constexpr,
    shift: tl.constexpr,
):
    """The tokens of rows that were searched; the last program of a row goes through levels that are left. Programs: [rows, parts].

    tie_counts: [rows, parts] int32, for these programs alone. max_levels: that there can be.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(token_ids + row) == UNKNOWN:
        logits = all_logits + row * vocab_size
        state = states + row * STATE
        key, tie = found(state)
        num_parts = tl.num_programs(1)
        size = _part(vocab_size, tile)
        first = part * size
        end = tl.minimum(first + size, vocab_size)
        if tie >= 0:
            of_lanes = tl.zeros([tile], tl.int32)
            for start in range(first, end, tile):
                _x, _ids, keys, is_real = tile_of(logits, start, vocab_size, tile, shift)
                of_lanes += (is_real & (keys == key)).to(tl.int32)
            tl.store(tie_counts + row * num_parts + part, tl.sum(of_lanes, axis=0))
        if is_last(semaphores + row, num_parts):
            if tie >= 0:
                parts = tl.arange(0, parts_block)
                counts = tl.load(
                    tie_counts + row * num_parts + parts,
                    mask=parts < num_parts,
                    other=0,
                    cache_modifier=".cg",
                )
                chosen = tl.sum((tl.cumsum(counts, axis=0) <= tie).to(tl.int32), axis=0)
                tie -= tl.sum(tl.where(parts < chosen, counts, 0), axis=0)
                first = chosen * size
                end = tl.minimum(first + size, vocab_size)
            else:
                sums = all_sums + row * SUMS * num_bins
                temperature = tl.load(temperatures + row)
                highest = tl.load(highests + row)
                scale = tl.load(scales + row)
                top_k = tl.load(top_ks + row)
                top_p = tl.load(top_ps + row)
                number = tl.load(numbers + row)
                first = part * 0
                end = first + vocab_size
                level = part * 0
                # Without a bound a temperature that is no number would keep the GPU for ever.
                while (tie < 0) & (level < max_levels):
                    level += 1
                    add_windows(
                        logits,
                        state,
                        sums,
                        highest,
                        temperature,
                        scale,
                        first,
                        end,
                        vocab_size,
                        tile,
                        num_bins,
                        shift,
                    )
                    tl.debug_barrier()
                    narrow(
                        state,
                        sums,
                        highest,
                        temperature,
                        scale,
                        top_k,
                        top_p,
                        number,
                        num_bins,
                        shift,
                        False,
                    )
                    key, tie = found(state)
            num_seen = tl.full([], 0, tl.int32)
            token = tl.full([], 0, tl.int64)
            for start in range(first, end, tile):
                _x, ids, keys, is_real = tile_of(logits, start, vocab_size, tile, shift)
                is_tie = (is_real & (keys == key)).to(tl.int32)
                num_new = tl.sum(is_tie, axis=0)
                if (num_seen <= tie) & (tie < num_seen + num_new):
                    order = num_seen + tl.cumsum(is_tie, axis=0) - 1
                    token = tl.sum(tl.where((is_tie == 1) & (order == tie), ids, 0).to(tl.int64), axis=0)
                num_seen += num_new
            tl.store(token_ids + row, token)
