"""Attention of many new tokens per sequence over the cache: a program per (tile of new tokens, KV head).

The new tokens of a sequence are cut into tiles of block_m // group; with all query heads of a KV head they are the rows
of one product. Tiles of all sequences are one line, found by a prefix sum over the lengths, which are read on the device.
A program walks over the positions that its rows see: first those that all of them see, without any mask, then the rest.
With a window there are rows that do not see the first of them, too.

Source: FlashAttention-2 (Dao 2023); heads packed into rows as in FlashInfer.
"""

import triton.language as tl

from phasewise_kernels.paged_attention.tiles_triton import (
    attend_tiles,
    finished,
    jit,
    load_rows,
    num_ancestors,
    store_rows,
)


@jit
def chunk_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    query,
    k_cache,
    v_cache,
    out,
    block_tables,
    query_starts,
    context_lens,
    tree_masks,
    num_sequences,
    window,
    scale,
    q_token,
    q_head,
    out_token,
    out_head,
    k_block,
    k_slot,
    k_head,
    v_block,
    v_slot,
    v_head,
    table_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    tile_tokens: tl.constexpr,
    block_sequences: tl.constexpr,
    min_query_len: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """Grid: (num_kv_heads, at least the tiles of new tokens). Sequences with fewer new tokens are left alone."""
    block_q: tl.constexpr = block_m // group
    ids = tl.arange(0, block_sequences)
    is_there = ids < num_sequences
    lens = tl.load(context_lens + ids, mask=is_there, other=0)
    query_lens = tl.load(query_starts + ids + 1, mask=is_there, other=0)
    query_lens -= tl.load(query_starts + ids, mask=is_there, other=0)
    is_ours = (lens > 0) & (query_lens >= min_query_len)
    ends = tl.cumsum(tl.where(is_ours, tl.cdiv(query_lens, block_q), 0), 0)
    total = tl.max(ends, 0)
    # The last tiles of a sequence have the most to read: they begin first.
    place = total - 1 - tl.program_id(1)
    head = tl.program_id(0)
    if place >= 0:
        sequence = tl.sum((ends <= place).to(tl.int32), 0)
        first_row = (place - tl.max(tl.where(ends <= place, ends, 0), 0)) * block_q
        context_len = tl.load(context_lens + sequence)
        sequence_start = tl.load(query_starts + sequence)
        query_len = tl.load(query_starts + sequence + 1) - sequence_start
        prefix_len = context_len - query_len
        first_token = sequence_start + first_row
        num_rows = tl.minimum(query_len - first_row, block_q)

        tokens = tl.arange(0, block_m) // group
        row_positions = prefix_len + first_row + tokens
        row_masks = tl.zeros([block_m], tl.int64)
        first_position = prefix_len + first_row
        seen_stop = first_position + num_rows
        if has_tree:
            row_masks = tl.load(tree_masks + first_token + tokens, mask=tokens < num_rows, other=0)
            depths = prefix_len + num_ancestors(row_masks) - 1
            row_positions = tl.where(row_masks == 0, row_positions, depths)
            first_position = tl.minimum(first_position, prefix_len)
            seen_stop = context_len
        # Tiles: some rows see [first, start); all see [start, full); some see [full, stop).
        full = (first_position + (0 if has_tree else 1)) // tile_tokens
        stop = tl.cdiv(seen_stop, tile_tokens)
        first = 0
        start = 0
        if has_window:
            first = tl.maximum(first_position + 1 - window, 0) // tile_tokens
            start = tl.cdiv(tl.maximum(seen_stop - window, 0), tile_tokens)
            start = tl.minimum(tl.maximum(start, first), stop)
            full = tl.maximum(full, start)
        q = load_rows(query, first_token, num_rows, head, q_token, q_head, group, head_dim, block_m, block_d)
        if k_cache.dtype.element_ty.primitive_bitwidth == 8:
            # fp8 becomes fp16 in one instruction, exactly.
            q = q.to(tl.float16)
        keys = k_cache + head.to(tl.int64) * k_head
        values = v_cache + head.to(tl.int64) * v_head
        table = block_tables + sequence.to(tl.int64) * table_stride
        largest = tl.full([block_m], float("-inf"), tl.float32)
        weight_sum = tl.zeros([block_m], tl.float32)
        weighted = tl.zeros([block_m, block_d], tl.float32)
        masks = tree_masks + sequence_start
        if has_window:
            largest, weight_sum, weighted = attend_tiles(
                q, largest, weight_sum, weighted, keys, values, table, masks, row_masks, row_positions,
                first, start, context_len, prefix_len, window, scale, k_block, k_slot, v_block, v_slot,
                block_size, head_dim, tile_tokens, True, True, has_window, has_tree,
            )  # fmt: skip
        largest, weight_sum, weighted = attend_tiles(
            q, largest, weight_sum, weighted, keys, values, table, masks, row_masks, row_positions,
            start, full, context_len, prefix_len, window, scale, k_block, k_slot, v_block, v_slot,
            block_size, head_dim, tile_tokens, False, False, has_window, has_tree,
        )  # fmt: skip
        largest, weight_sum, weighted = attend_tiles(
            q, largest, weight_sum, weighted, keys, values, table, masks, row_masks, row_positions,
            full, stop, context_len, prefix_len, window, scale, k_block, k_slot, v_block, v_slot,
            block_size, head_dim, tile_tokens, True, True, has_window, has_tree,
        )  # fmt: skip
        store_rows(
            out, finished(weighted, weight_sum), first_token, num_rows, head, out_token, out_head,
            group, head_dim, block_m, block_d,
        )  # fmt: skip
