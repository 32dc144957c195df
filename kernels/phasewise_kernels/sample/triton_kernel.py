"""The draw on a GPU, in a few launches; no sort but of a few candidates, and nothing that the host waits for.

    group_maxima   the largest logit of each group of neighbours, and the mass of each chunk: the one pass over all
    choose         per row: a logit that so many groups reach; the logits that reach it, sorted: the draw, if it ends
                   among them whatever the others are
    level          three times, per row of which that cannot be told: bins of all logits as whole numbers, and in which of them
                   the borders of top_k and top_p and the draw are; these alone are cut into bins the next time
    token          its id, after levels that a row still needs

The last two end at once for all other rows. A key is a logit's bits as a whole number of the same order: of bf16 and fp16 without the bits that are always 0. Equal logits are one key,
and among them the lowest id comes first. Masses are exp((logit - highest) / temperature) in fp64.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from phasewise_kernels.sample.keys import NO_TOKEN, UNKNOWN, keys_of, uniform, values_of, weights_of
from phasewise_kernels.sample.levels import STATE, SUMS, begin, scale_of
from phasewise_kernels.sample.search_kernel import level_kernel, token_kernel

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: Lower bits of fp32 that logits of a dtype never have.
SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
#: Neighbours whose largest logit stands for them.
GROUP = 32
#: Groups of a program of `group_maxima`.
CHUNK_GROUPS = 128
#: Groups that have a candidate at least, and room for candidates.
CANDIDATES, ROOM = 512, 1024
#: Logits that a program of the search looks at at a time, and how many programs all rows have.
TILE = 2048
PROGRAMS = 512
#: Of a thread of the search: two of its programs then fit on a multiprocessor of an H100.
REGISTERS = 128
#: Levels that are shared by the programs of a row, and bits that each tells.
LEVELS = 3
BITS = 12

_LOWEST = tl.constexpr(-(2**63))
_LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)


@_jit
def group_maxima_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperatures,
    maxima,
    chunk_maxima,
    chunk_masses,
    vocab_size: tl.constexpr,
    num_chunks,
    group: tl.constexpr,
    chunk_groups: tl.constexpr,
):
    """maxima: [rows, num_chunks * chunk_groups]; chunk_maxima, chunk_masses: [rows, num_chunks]. Programs: [rows, num_chunks].

    A NaN counts as +inf. The mass of a chunk is relative to its own largest logit.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = chunk * chunk_groups + tl.arange(0, chunk_groups)
    ids = groups[:, None] * group + tl.arange(0, group)[None, :]
    x = tl.load(logits + row * vocab_size + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x, axis=1)
    tl.store(maxima + row * num_chunks * chunk_groups + groups, largest)
    highest = tl.max(largest, axis=0)
    tl.store(chunk_maxima + row * num_chunks + chunk, highest)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        weights = weights_of(x, tl.where(highest == -float("inf"), 0.0, highest), temperature)
        tl.store(chunk_masses + row * num_chunks + chunk, tl.sum(tl.sum(weights, axis=1), axis=0))


@_jit
def choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    streams,
    maxima,
    chunk_maxima,
    chunk_masses,
    chosen_groups,
    candidates,
    numbers,
    highests,
    scales,
    states,
    all_sums,
    semaphores,
    token_ids,
    vocab_size: tl.constexpr,
    num_chunks,
    chunks_block: tl.constexpr,
    groups_block: tl.constexpr,
    group: tl.constexpr,
    chunk_groups: tl.constexpr,
    wanted: tl.constexpr,
    room: tl.constexpr,
    num_bins: tl.constexpr,
    shift: tl.constexpr,
):
    """chosen_groups: [rows, room] int32, candidates: [rows, room] int64, for this program alone. Programs: [rows].

    numbers: [rows] fp64, the random numbers; highests: [rows] fp32; token_ids: [rows] int64, UNKNOWN where it is: there
    scales, fp64, states, all_sums and semaphores, int32, are what the search begins with.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, chunks_block)
    is_chunk = chunks < num_chunks
    start = row * num_chunks
    of_chunks = tl.load(chunk_maxima + start + chunks, mask=is_chunk, other=-float("inf"))
    highest = tl.max(of_chunks, axis=0)
    temperature = tl.load(temperatures + row)
    number = uniform(tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
    tl.store(numbers + row, number)
    tl.store(highests + row, highest)
    token = tl.full([], UNKNOWN, tl.int64)
    if (highest == float("inf")) | (highest == -float("inf")):
        token = tl.full([], NO_TOKEN, tl.int64)
    else:
        groups = tl.arange(0, groups_block)
        num_groups = num_chunks * chunk_groups
        of_groups = tl.load(maxima + row * num_groups + groups, mask=groups < num_groups, other=-float("inf"))
        if temperature == 0.0:
            # The lowest id of the first group that has it.
            best = tl.min(tl.where(of_groups == highest, groups, groups_block), axis=0)
            own_ids = best * group + tl.arange(0, group)
            own = tl.load(logits + row * vocab_size + own_ids, mask=own_ids < vocab_size, other=-float("inf"))
            token = tl.min(tl.where(own.to(tl.float32) == highest, own_ids, vocab_size), axis=0).to(tl.int64)
        else:
            of_masses = tl.load(chunk_masses + start + chunks, mask=is_chunk, other=0.0)
            total = tl.sum(of_masses * weights_of(of_chunks, highest, temperature), axis=0)
            keys = keys_of(of_groups, shift)
            lowest = tl.min(keys_of(tl.full([1], -_LARGEST_FP32, tl.float32), shift), axis=0)
            low = lowest
            high = tl.max(keys, axis=0)
            if vocab_size > room:
                while low < high:
                    middle = low + (high - low + 1) // 2
                    if tl.sum((keys >= middle).to(tl.int32), axis=0) >= wanted:
                        low = middle
                    else:
                        high = middle - 1
            is_chosen = keys >= low
            places = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
            tl.store(chosen_groups + row * room + places, groups, mask=is_chosen & (places < room))
            num_chosen = tl.sum(is_chosen.to(tl.int32), axis=0)
            tl.debug_barrier()
            num_candidates = tl.full([], 0, tl.int32)
            step: tl.constexpr = 128
            first = tl.full([], 0, tl.int32)
            num_stored = tl.minimum(num_chosen, room)
            while first < num_stored:
                which = first + tl.arange(0, step)
                in_group = tl.load(chosen_groups + row * room + which, mask=which < num_stored, other=0)
                ids = in_group[:, None] * group + tl.arange(0, group)[None, :]
                is_inside = (which < num_stored)[:, None] & (ids < vocab_size)
                x = tl.load(logits + row * vocab_size + ids, mask=is_inside, other=-float("inf"))
                x_keys = keys_of(x.to(tl.float32), shift)
                is_found = tl.reshape(is_inside & (x_keys >= low), [step * group])
                # From most to least likely, then by id, as one number.
                packed = tl.reshape((x_keys << 32) | (0x7FFFFFFF - ids).to(tl.int64), [step * group])
                ranks_found = num_candidates + tl.cumsum(is_found.to(tl.int32), axis=0) - 1
                where = candidates + row * room + ranks_found
                tl.store(where, packed, mask=is_found & (ranks_found < room))
                num_candidates += tl.sum(is_found.to(tl.int32), axis=0)
                first += step
            tl.debug_barrier()
            if (num_chosen <= room) & (num_candidates <= room):
                ranks = tl.arange(0, room)
                found = tl.load(candidates + row * room + ranks, mask=ranks < num_candidates, other=_LOWEST)
                found = tl.sort(found, descending=True)
                is_real = ranks < num_candidates
                x = values_of(tl.where(is_real, found >> 32, 0), shift)
                weights = tl.where(is_real, weights_of(x, highest, temperature), 0.0)
                top_k = tl.load(top_ks + row)
                has_top_k = (top_k > 0) & (top_k < vocab_size)
                top_p = tl.load(top_ps + row)
                min_p = tl.load(min_ps + row)
                # All others are -inf.
                is_complete = low == lowest
                cumulative = tl.cumsum(weights, axis=0)
                mass = tl.where(has_top_k, tl.sum(tl.where(ranks < top_k, weights, 0.0), axis=0), total)
                kept = tl.where(has_top_k, top_k, tl.full([], 2147483647, tl.int64))
                is_mass_known = (has_top_k == 0) | (top_k <= num_candidates)
                num_in_min_p = tl.sum((is_real & (weights >= min_p)).to(tl.int64), axis=0)
                num_possible = tl.sum((weights > 0.0).to(tl.int64), axis=0)
                if top_p < 1.0:
                    in_p = tl.sum((is_real & (cumulative < top_p * mass)).to(tl.int64), axis=0) + 1
                    kept = tl.minimum(kept, in_p)
                if num_in_min_p < num_candidates:
                    kept = tl.minimum(kept, num_in_min_p)
                is_free = (has_top_k == 0) & (top_p >= 1.0) & (min_p <= 0.0)
                is_known = is_free | ((kept <= num_candidates) & ((top_p >= 1.0) | is_mass_known))
                last = tl.minimum(kept, num_possible) - 1
                kept_mass = tl.sum(tl.where(ranks <= last, weights, 0.0), axis=0)
                target = number * tl.where(is_free, total, kept_mass)
                picked = tl.sum((is_real & (cumulative <= target)).to(tl.int64), axis=0)
                of_all = tl.sum(weights, axis=0)
                if is_complete | (is_known & (target < of_all)):
                    picked = tl.minimum(picked, last)
                    drawn = tl.sum(tl.where(ranks == picked, found, 0), axis=0)
                    token = 0x7FFFFFFF - (drawn & 0xFFFFFFFF)
            if token == UNKNOWN:
                tl.store(scales + row, scale_of(total))
                tl.store(semaphores + row, 0)
                begin(states + row * STATE, all_sums + row * SUMS * num_bins, num_bins)
    tl.store(token_ids + row, token)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    streams: torch.Tensor,
) -> torch.Tensor:
    """As the op, on the current stream."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return token_ids
    num_chunks = triton.cdiv(vocab_size, GROUP * CHUNK_GROUPS)
    num_groups = num_chunks * CHUNK_GROUPS
    shift = SHIFTS[logits.dtype]

    def scratch(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=logits.device)

    maxima = scratch(num_groups, torch.float32)
    chunk_maxima, chunk_masses = scratch(num_chunks, torch.float32), scratch(num_chunks, torch.float64)
    numbers, highests = scratch(1, torch.float64), scratch(1, torch.float32)
    num_bins = 1 << BITS
    scales, states = scratch(1, torch.float64), scratch(STATE.value, torch.int64)
    sums, semaphores = scratch(SUMS.value * num_bins, torch.int64), scratch(1, torch.int32)
    group_maxima_kernel[(num_rows, num_chunks)](
        logits,
        temperature,
        maxima,
        chunk_maxima,
        chunk_masses,
        vocab_size,
        num_chunks,
        GROUP,
        CHUNK_GROUPS,
        num_warps=8,
    )
    choose_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        streams,
        maxima,
        chunk_maxima,
        chunk_masses,
        scratch(ROOM, torch.int32),
        scratch(ROOM, torch.int64),
        numbers,
        highests,
        scales,
        states,
        sums,
        semaphores,
        token_ids,
        vocab_size,
        num_chunks,
        triton.next_power_of_2(num_chunks),
        triton.next_power_of_2(num_groups),
        GROUP,
        CHUNK_GROUPS,
        # Where nearly all groups were wanted, their threshold would let far more logits pass.
        max(1, min(CANDIDATES, vocab_size // GROUP // 2)),
        ROOM,
        num_bins,
        shift,
        num_warps=8,
    )
    num_tiles = triton.cdiv(vocab_size, TILE)
    grid = num_rows, max(1, min(num_tiles, PROGRAMS // num_rows))
    for level in range(LEVELS):
        level_kernel[grid](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            numbers,
            highests,
            scales,
            states,
            sums,
            semaphores,
            token_ids,
            vocab_size,
            TILE,
            num_bins,
            shift,
            level == 0,
            num_warps=8,
            maxnreg=REGISTERS,
        )
    token_kernel[grid](
        logits,
        temperature,
        top_k,
        top_p,
        numbers,
        highests,
        scales,
        states,
        sums,
        semaphores,
        scratch(grid[1], torch.int32),
        token_ids,
        vocab_size,
        TILE,
        num_bins,
        # Each of the three searches ends when the one before has.
        3 * triton.cdiv(32 - shift, BITS),
        triton.next_power_of_2(num_tiles),
        shift,
        num_warps=8,
        maxnreg=REGISTERS,
    )
    return token_ids
