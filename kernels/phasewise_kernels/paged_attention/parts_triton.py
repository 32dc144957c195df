"""Outputs that several programs compute parts of: each leaves its part in memory, and the last to come merges them.

Nobody waits: a part is stored, then counted, by a semaphore that is 0 before and after. Parts are merged in an order that
does not depend on who came last, so the bits do not either.

Source: stream-K (Osama et al. 2023); the merge is that of FlashDecoding.
"""

import triton.language as tl

from phasewise_kernels.paged_attention.tiles_triton import finished, jit


@jit
def log_sum(largest, weight_sum):  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    """log2 of the sum of all weights; -inf of a part that has seen nothing."""
    is_empty = weight_sum == 0
    return tl.where(is_empty, float("-inf"), largest + tl.log2(tl.where(is_empty, 1.0, weight_sum)))


@jit
def is_last(semaphore, count):  # type: ignore[no-untyped-def]
    """Count this program in; whether it is the last of `count`, which sets the semaphore back."""
    # All threads of the program have stored before one of them counts.
    tl.debug_barrier()
    is_it = tl.atomic_add(semaphore, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_it:
        tl.store(semaphore, 0)
    return is_it


@jit
def store_part(  # type: ignore[no-untyped-def]
    partial_lse,
    partial_outputs,
    slot,
    output,
    lse,
    num_rows,
    head_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
):
    """output: [block_rows, block_d], the output of a part alone; lse: [block_rows], how much it weighs."""
    rows = tl.arange(0, block_rows)
    dims = tl.arange(0, block_d)
    is_row = rows < num_rows
    at = slot.to(tl.int64) * block_r + rows
    tl.store(partial_lse + at, lse, mask=is_row)
    is_kept = is_row[:, None] & (dims < head_dim)[None, :]
    tl.store(partial_outputs + at[:, None] * block_d + dims[None, :], output, mask=is_kept)


@jit
def merge_parts(  # type: ignore[no-untyped-def]
    partial_lse,
    partial_outputs,
    first_slot,
    next_slot,
    slot_step,
    num_parts,
    first_row,
    num_rows,
    head_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
):
    """([block_rows, block_d], [block_rows]): output and weight of parts together, in order, from row first_row on.

    The first part is in first_slot, the others in every slot_step-th slot from next_slot on.
    """
    rows = first_row + tl.arange(0, block_rows)
    dims = tl.arange(0, block_d)
    is_row = rows < num_rows
    is_kept = is_row[:, None] & (dims < head_dim)[None, :]
    largest = tl.full([block_rows], float("-inf"), tl.float32)
    weight_sum = tl.zeros([block_rows], tl.float32)
    weighted = tl.zeros([block_rows, block_d], tl.float32)
    # The next parts are on their way while one is added.
    for part in tl.range(0, num_parts, num_stages=4):
        slot = tl.where(part == 0, first_slot, next_slot + (part - 1) * slot_step)
        at = slot.to(tl.int64) * block_r + rows
        lse = tl.load(partial_lse + at, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        outputs = partial_outputs + at[:, None] * block_d + dims[None, :]
        output = tl.load(outputs, mask=is_kept, other=0.0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, lse)
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight, factor = tl.exp2(lse - base), tl.exp2(largest - base)
        weight_sum = weight_sum * factor + weight
        weighted = weighted * factor[:, None] + output * weight[:, None]
        largest = new_largest
    return finished(weighted, weight_sum), log_sum(largest, weight_sum)
