"""Attention of few new tokens per sequence over the cache, by stream-K: every program reads as many tiles as any other.

An output is a (sequence, KV head); all query heads that share the KV head are rows of one product. The tiles of all
outputs, by sequence, then head, then position, are one line, which is cut into equal pieces:

    sequence      s0              s1                    s2
    head          h0      h1      h0         h1         h0  h1
    line          |-------|-------|----------|----------|---|---|
    programs      |  p0  |  p1  |  p2  |  p3  |  p4  |  p5  | p6 |       differ by one tile at most

So at most two outputs of a program are shared with others: its first, begun by an earlier one, and its last. Of each of
these it leaves a part (slot 0, slot 1) and counts itself in at the output; the one that comes last merges the parts in
the order of the line, writes the output and sets the count back to 0, as the next launch expects. Nobody waits, so any
number of programs will do. The lengths are read on the device, and the cuts are computed from them by each program: a
CUDA graph serves all lengths.

Source: LeanAttention (arXiv 2405.10480); stream-K (Osama et al. 2023). The published kernel has a host program per
output that waits for the others; that the last to come merges is our choice.
"""

import triton.language as tl

from phasewise_kernels.paged_attention.tiles_triton import (
    attend_tiles,
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
    partial_stats,
    partial_outputs,
    semaphores,
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
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    tile_tokens: tl.constexpr,
    block_sequences: tl.constexpr,
    max_query_len: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """partial_stats: [programs, 2, 2, block_m] fp32; partial_outputs: [programs, 2, block_m, block_d] fp32.

    semaphores: [at least num_sequences * num_kv_heads] int32, all 0. Sequences with no new token, more than
    max_query_len, or no context are left alone.
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
    ends = tl.cumsum(tl.where(is_ours, num_tiles, 0) * num_kv_heads, 0)
    total = tl.max(ends, 0)
    num_used = tl.minimum(total, tl.num_programs(0))
    program = tl.program_id(0)
    if program < num_used:
        share = tl.cdiv(total, num_used)
        # The first `num_full` programs read `share` tiles, the others one less.
        num_full = total - (share - 1) * num_used
        place = program * share - tl.maximum(program - num_full, 0)
        stop = place + share - (program >= num_full).to(tl.int32)
        while place < stop:
            sequence = tl.sum((ends <= place).to(tl.int32), 0)
            sequence_first = tl.max(tl.where(ends <= place, ends, 0), 0)
            context_len = tl.load(context_lens + sequence)
            first_token = tl.load(query_starts + sequence)
            query_len = tl.load(query_starts + sequence + 1) - first_token
            prefix_len = context_len - query_len
            first_tile = 0
            if has_window:
                first_tile = tl.maximum(prefix_len + 1 - window, 0) // tile_tokens
            tiles = tl.cdiv(context_len, tile_tokens) - first_tile
            head = (place - sequence_first) // tiles
            output_first = sequence_first + head * tiles
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
            q = load_rows(
                query, first_token, query_len, head, q_token, q_head, group, head_dim, block_m, block_d
            )
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
                    weighted / weight_sum[:, None],
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
                dims = tl.arange(0, block_d)
                is_row = tokens < query_len
                is_kept = is_row[:, None] & (dims < head_dim)[None, :]
                at = rows[:, None] * block_d + dims[None, :]
                slot = (program * 2 + (place == output_first).to(tl.int32)).to(tl.int64)
                tl.store(partial_stats + slot * 2 * block_m + rows, largest, mask=is_row)
                tl.store(partial_stats + (slot * 2 + 1) * block_m + rows, weight_sum, mask=is_row)
                tl.store(partial_outputs + slot * block_m * block_d + at, weighted, mask=is_kept)
                # All of the program's threads have stored before one of them counts.
                tl.debug_barrier()
                first_program = program_of(output_first, share, num_full)
                num_parts = program_of(output_stop - 1, share, num_full) - first_program + 1
                semaphore = semaphores + sequence * num_kv_heads + head
                num_before = tl.atomic_add(semaphore, 1, sem="acq_rel", scope="gpu")
                if num_before == num_parts - 1:
                    largest = tl.full([block_m], float("-inf"), tl.float32)
                    weight_sum = tl.zeros([block_m], tl.float32)
                    weighted = tl.zeros([block_m, block_d], tl.float32)
                    for part in range(num_parts):
                        slot = ((first_program + part) * 2 + 1 - tl.minimum(part, 1)).to(tl.int64)
                        stats = partial_stats + slot * 2 * block_m + rows
                        part_largest = tl.load(stats, mask=is_row, other=0.0, cache_modifier=".cg")
                        part_sum = tl.load(stats + block_m, mask=is_row, other=1.0, cache_modifier=".cg")
                        part_weighted = tl.load(
                            partial_outputs + slot * block_m * block_d + at,
                            mask=is_kept,
                            other=0.0,
                            cache_modifier=".cg",
                        )
                        new_largest = tl.maximum(largest, part_largest)
                        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
                        factor, part_factor = tl.exp2(largest - base), tl.exp2(part_largest - base)
                        weight_sum = weight_sum * factor + part_sum * part_factor
                        weighted = weighted * factor[:, None] + part_weighted * part_factor[:, None]
                        largest = new_largest
                    store_rows(
                        out,
                        weighted / weight_sum[:, None],
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
                    tl.store(semaphore, 0)
            place = piece_stop


@jit
def program_of(place, share, num_full):  # type: ignore[no-untyped-def]
    """Which program reads this tile of the line."""
    later = place - num_full * share
    return tl.where(later < 0, place // share, num_full + later // tl.maximum(share - 1, 1))
