"""Attention of one new token per sequence by a fixed split: the baseline that `lean_triton.py` is measured against.

Every output (sequence, KV head) is cut into the same number of pieces, whatever its length, each a program; a second
kernel merges them. Source: FlashDecoding (Dao et al. 2023).
"""

import triton.language as tl

from phasewise_kernels.paged_attention.tiles_triton import attend_tiles, finished, jit, load_rows, store_rows


@jit
def split_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    query,
    k_cache,
    v_cache,
    block_tables,
    context_lens,
    partial_stats,
    partial_outputs,
    window,
    scale,
    q_token,
    q_head,
    k_block: tl.constexpr,
    k_slot: tl.constexpr,
    k_head: tl.constexpr,
    v_block: tl.constexpr,
    v_slot: tl.constexpr,
    v_head: tl.constexpr,
    table_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    tile_tokens: tl.constexpr,
    has_window: tl.constexpr,
):
    """Grid: (splits, num_sequences * num_kv_heads). partial_*: as in lean_triton, [outputs, splits, ...]."""
    output, num_splits = tl.program_id(1), tl.num_programs(0)
    sequence, head = output // num_kv_heads, output % num_kv_heads
    context_len = tl.load(context_lens + sequence)
    low = 0
    if has_window:
        low = tl.maximum(context_len - window, 0) // tile_tokens
    num_tiles = tl.cdiv(context_len, tile_tokens) - low
    share = tl.cdiv(num_tiles, num_splits)
    first = low + tl.program_id(0) * share
    last = tl.minimum(first + share, low + num_tiles)
    rows = tl.arange(0, block_m)
    dims = tl.arange(0, block_d)
    row_masks = tl.zeros([block_m], tl.int64)
    q = load_rows(query, sequence, 1, head, q_token, q_head, group, head_dim, block_m, block_d)
    if k_cache.dtype.element_ty.primitive_bitwidth == 8:
        q = q.to(tl.float16)
    largest, weight_sum, weighted = attend_tiles(
        q,
        tl.full([block_m], float("-inf"), tl.float32),
        tl.zeros([block_m], tl.float32),
        tl.zeros([block_m, block_d], tl.float32),
        k_cache + head.to(tl.int64) * k_head,
        v_cache + head.to(tl.int64) * v_head,
        block_tables + sequence.to(tl.int64) * table_stride,
        context_lens,
        row_masks,
        rows,
        first,
        last,
        context_len,
        context_len - 1,
        window,
        scale,
        k_block,
        k_slot,
        v_block,
        v_slot,
        block_size,
        head_dim,
        tile_tokens,
        True,
        False,
        has_window,
        False,
    )
    is_row = rows < group
    slot = (output * num_splits + tl.program_id(0)).to(tl.int64)
    tl.store(partial_stats + slot * 2 * block_m + rows, largest, mask=is_row)
    tl.store(partial_stats + (slot * 2 + 1) * block_m + rows, weight_sum, mask=is_row)
    at = slot * block_m * block_d + rows[:, None] * block_d + dims[None, :]
    tl.store(partial_outputs + at, weighted, mask=is_row[:, None] & (dims < head_dim)[None, :])


@jit
def merge_kernel(  # type: ignore[no-untyped-def]
    partial_stats,
    partial_outputs,
    out,
    context_lens,
    out_token,
    out_head,
    num_splits,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
):
    """Grid: (num_sequences * num_kv_heads,)."""
    output = tl.program_id(0)
    sequence, head = output // num_kv_heads, output % num_kv_heads
    if tl.load(context_lens + sequence) > 0:
        rows = tl.arange(0, block_m)
        dims = tl.arange(0, block_d)
        is_row = rows < group
        is_kept = is_row[:, None] & (dims < head_dim)[None, :]
        largest = tl.full([block_m], float("-inf"), tl.float32)
        weight_sum = tl.zeros([block_m], tl.float32)
        weighted = tl.zeros([block_m, block_d], tl.float32)
        for split in range(num_splits):
            slot = (output * num_splits + split).to(tl.int64)
            stats = partial_stats + slot * 2 * block_m + rows
            part_largest = tl.load(stats, mask=is_row, other=0.0)
            part_sum = tl.load(stats + block_m, mask=is_row, other=1.0)
            at = slot * block_m * block_d + rows[:, None] * block_d + dims[None, :]
            part_weighted = tl.load(partial_outputs + at, mask=is_kept, other=0.0)
            new_largest = tl.maximum(largest, part_largest)
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            factor, part_factor = tl.exp2(largest - base), tl.exp2(part_largest - base)
            weight_sum = weight_sum * factor + part_sum * part_factor
            weighted = weighted * factor[:, None] + part_weighted * part_factor[:, None]
            largest = new_largest
        store_rows(
            out,
            finished(weighted, weight_sum),
            sequence,
            1,
            head,
            out_token,
            out_head,
            group,
            head_dim,
            block_m,
            block_d,
        )
