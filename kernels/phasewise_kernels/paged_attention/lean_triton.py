"""Attention of few new tokens per sequence over the cache, by stream-K: every program reads as many tiles as any other.

All query heads that share a KV head are rows of one product; the KV heads of a token are read by as many programs at the
same time, since they lie side by side in memory. The tiles of all sequences are one line, which is cut into equal pieces:

    sequence      s0              s1                    s2
    line          |---------------|---------------------|-------|
    group         |  g0  |  g1  |  g2  |  g3  |  g4  |  g5  | g6 |         pieces differ by one tile at most
    program       group * num_kv_heads + head

So at most two outputs (sequence, head) of a program are shared with others: its first, begun by an earlier one, and its
last. Of each of these it leaves a part (slot 0, slot 1) and counts itself in; the one that comes last merges the parts in
the order of the line, and sets the count back to 0, as the next launch expects. Many parts are merged in bunches first,
those then by the last that has merged a bunch. Nobody waits, so any number of programs will do. The lengths are read on
the device, and the cuts are computed from them by each program: a CUDA graph serves all lengths.

Source: LeanAttention (arXiv 2405.10480); stream-K (Osama et al. 2023). The published kernel has one line over heads too,
and a host program per output that waits for the others.
"""

import triton.language as tl

from phasewise_kernels.paged_attention.byte_tiles_triton import attend_byte_tiles
from phasewise_kernels.paged_attention.packed_tiles_triton import attend_packed_tiles
from phasewise_kernels.paged_attention.parts_triton import is_last, log_sum, merge_parts, store_part
from phasewise_kernels.paged_attention.tiles_triton import (
    attend_tiles,
    finished,
    jit,
    load_rows,
    num_ancestors,
    store_rows,
)


@jit
def lean_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    query,
    k_cache,
    v_cache,
    out,
    block_tables,
    query_starts,
    context_lens,
    tree_masks,
    partial_lse,
    partial_outputs,
    semaphores,
    num_sequences,
    window,
    scale,
    q_token,
    q_head,
    out_token,
    out_head,
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
    block_r: tl.constexpr,
    block_d: tl.constexpr,
    tile_tokens: tl.constexpr,
    block_sequences: tl.constexpr,
    max_query_len: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
    has_byte_tiles: tl.constexpr,
):
    """partial_lse: [programs, 2, block_r] fp32; partial_outputs: [programs, 2, block_r, block_d] fp32.

    semaphores: [3 * programs] int32, all 0. The number of programs is a multiple of num_kv_heads. block_r: rows that
    there can be. Sequences with no new token, more than max_query_len, or no context are left alone.
    """
    ids = tl.arange(0, block_sequences)
    is_there = ids < num_sequences
    lens = tl.load(context_lens + ids, mask=is_there, other=0)
    query_lens = tl.load(query_starts + ids + 1, mask=is_there, other=0)
    query_lens -= tl.load(query_starts + ids, mask=is_there, other=0)
    num_tiles = tl.cdiv(lens, tile_tokens)
    if has_window:
        num_tiles -= tl.maximum(lens - query_lens + 1 - window, 0) // tile_tokens
    is_ours = (lens > 0) & (query_lens > 0) & (query_lens <= max_query_len)
    # [block_sequences]: where on the line each sequence ends.
    ends = tl.cumsum(tl.where(is_ours, num_tiles, 0), 0)
    total = tl.max(ends, 0)
    # No more groups than it takes: where sequences are of one length, pieces then often end where these do.
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0) // num_kv_heads), 1)
    num_used = tl.cdiv(total, share)
    line_group = tl.program_id(0) // num_kv_heads
    head = tl.program_id(0) % num_kv_heads
    if line_group < num_used:
        # The first `num_full` groups read `share` tiles, the others one less.
        num_full = total - (share - 1) * num_used
        place = line_group * share - tl.maximum(line_group - num_full, 0)
        stop = place + share - (line_group >= num_full).to(tl.int32)
        while place < stop:
            sequence = tl.sum((ends <= place).to(tl.int32), 0)
            output_first = tl.max(tl.where(ends <= place, ends, 0), 0)
            context_len = tl.load(context_lens + sequence)
            first_token = tl.load(query_starts + sequence)
            query_len = tl.load(query_starts + sequence + 1) - first_token
            prefix_len = context_len - query_len
            first_tile = 0
            if has_window:
                first_tile = tl.maximum(prefix_len + 1 - window, 0) // tile_tokens
            tiles = tl.cdiv(context_len, tile_tokens) - first_tile
            output_stop = output_first + tiles
            piece_stop = tl.minimum(stop, output_stop)

            rows = tl.arange(0, block_m)
            tokens = rows // group
            row_positions = prefix_len + tokens
            row_masks = tl.zeros([block_m], tl.int64)
            if has_tree:
                row_masks = tl.load(tree_masks + first_token + tokens, mask=tokens < query_len, other=0)
                depths = prefix_len + num_ancestors(row_masks) - 1
                row_positions = tl.where(row_masks == 0, row_positions, depths)
            places = (first_token + tokens).to(tl.int64) * q_token + (head * group + rows % group) * q_head
            if k_cache.dtype.element_ty == tl.uint8:
                largest, weight_sum, weighted = attend_packed_tiles(
                    query,
                    places,
                    tokens < query_len,
                    k_cache + head.to(tl.int64) * k_head,
                    v_cache + head.to(tl.int64) * v_head,
                    block_tables + sequence.to(tl.int64) * table_stride,
                    tree_masks + first_token,
                    row_masks,
                    row_positions,
                    first_tile + place - output_first,
                    first_tile + piece_stop - output_first,
                    context_len,
                    prefix_len,
                    window,
                    scale,
                    k_block,
                    k_slot,
                    v_block,
                    v_slot,
                    block_size,
                    head_dim,
                    tile_tokens,
                    max_query_len > 1,
                    has_window,
                    has_tree,
                )
            elif has_byte_tiles:
                largest, weight_sum, weighted = attend_byte_tiles(
                    query,
                    places,
                    tokens < query_len,
                    k_cache + head.to(tl.int64) * k_head,
                    v_cache + head.to(tl.int64) * v_head,
                    block_tables + sequence.to(tl.int64) * table_stride,
                    tree_masks + first_token,
                    row_masks,
                    row_positions,
                    first_tile + place - output_first,
                    first_tile + piece_stop - output_first,
                    context_len,
                    prefix_len,
                    window,
                    scale,
                    k_block,
                    k_slot,
                    v_block,
                    v_slot,
                    block_size,
                    tile_tokens,
                    max_query_len > 1,
                    has_window,
                    has_tree,
                )
            else:
                q = load_rows(
                    query, first_token, query_len, head, q_token, q_head, group, head_dim, block_m, block_d
                )
                if k_cache.dtype.element_ty.primitive_bitwidth == 8:
                    # It becomes fp16 in one instruction, exactly.
                    q = q.to(tl.float16)
                largest, weight_sum, weighted = attend_tiles(
                    q,
                    tl.full([block_m], float("-inf"), tl.float32),
                    tl.zeros([block_m], tl.float32),
                    tl.zeros([block_m, block_d], tl.float32),
                    k_cache + head.to(tl.int64) * k_head,
                    v_cache + head.to(tl.int64) * v_head,
                    block_tables + sequence.to(tl.int64) * table_stride,
                    tree_masks + first_token,
                    row_masks,
                    row_positions,
                    first_tile + place - output_first,
                    first_tile + piece_stop - output_first,
                    context_len,
                    prefix_len,
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
                    max_query_len > 1,
                    has_window,
                    has_tree,
                )
            if piece_stop - place == tiles:
                store_rows(
                    out,
                    finished(weighted, weight_sum),
                    first_token,
                    query_len,
                    head,
                    out_token,
                    out_head,
                    group,
                    head_dim,
                    block_m,
                    block_d,
                )
            else:
                program = tl.program_id(0)
                store_part(
                    partial_lse,
                    partial_outputs,
                    program * 2 + (place == output_first).to(tl.int32),
                    finished(weighted, weight_sum),
                    log_sum(largest, weight_sum),
                    query_len * group,
                    head_dim,
                    block_m,
                    block_r,
                    block_d,
                )
                first_group = group_of(output_first, share, num_full)
                num_parts = group_of(output_stop - 1, share, num_full) - first_group + 1
                fan = tl.where(num_parts <= 16, num_parts, tl.where(num_parts <= 64, 8, 16))
                # Parts of one bunch, the first of which is our neighbour to the left or we ourselves.
                bunch = (line_group - first_group) // fan
                bunch_program = (first_group + bunch * fan) * num_kv_heads + head
                bunch_slot = bunch_program * 2 + (bunch == 0).to(tl.int32)
                bunch_size = tl.minimum(fan, num_parts - bunch * fan)
                if is_last(semaphores + bunch_slot, bunch_size):
                    merged, lse = merge_parts(
                        partial_lse,
                        partial_outputs,
                        bunch_slot,
                        (bunch_program + num_kv_heads) * 2,
                        num_kv_heads * 2,
                        bunch_size,
                        0,
                        query_len * group,
                        head_dim,
                        block_r,
                        block_r,
                        block_d,
                    )
                    num_bunches = tl.cdiv(num_parts, fan)
                    is_whole = num_bunches == 1
                    if num_bunches > 1:
                        # In the place of its first part.
                        store_part(
                            partial_lse,
                            partial_outputs,
                            bunch_slot,
                            merged,
                            lse,
                            query_len * group,
                            head_dim,
                            block_r,
                            block_r,
                            block_d,
                        )
                        first_program = first_group * num_kv_heads + head
                        if is_last(semaphores + 2 * tl.num_programs(0) + first_program, num_bunches):
                            merged, lse = merge_parts(
                                partial_lse,
                                partial_outputs,
                                first_program * 2 + 1,
                                (first_program + fan * num_kv_heads) * 2,
                                fan * num_kv_heads * 2,
                                num_bunches,
                                0,
                                query_len * group,
                                head_dim,
                                block_r,
                                block_r,
                                block_d,
                            )
                            is_whole = num_bunches > 1
                    if is_whole:
                        store_rows(
                            out,
                            merged,
                            first_token,
                            query_len,
                            head,
                            out_token,
                            out_head,
                            group,
                            head_dim,
                            block_r,
                            block_d,
                        )
            place = piece_stop


@jit
def group_of(place, share, num_full):  # type: ignore[no-untyped-def]
    """Which group reads this tile of the line."""
    later = place - num_full * share
    return tl.where(later < 0, place // share, num_full + later // tl.maximum(share - 1, 1))
