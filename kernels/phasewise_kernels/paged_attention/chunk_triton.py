"""Attention of many new tokens per sequence over the cache: programs per (tile of new tokens, piece of context, KV head).

The new tokens of a sequence are cut into tiles of block_m // group; with all query heads of a KV head they are the rows
of one product. Tiles of all sequences are one line, found by a prefix sum over the lengths, which are read on the device.
A program walks over the positions that its rows see: first those that all of them see, without any mask, then the rest.
With a window there are rows that do not see the first of them, too.

Where tiles are too few to fill the device and contexts are long, these are cut into pieces, a program for each:

    sequence      s0                                  s1
    piece         0           1           2           0
    tile          0  1  2  3  0  1  2  3  0  1  2  3  0  1  2
    place         0  1  2  3  4  5  6  7  8  9 10 11 12 13 14    each num_kv_heads programs, the last ones first

so programs side by side read the same piece of the cache, at about the same time: they would take more than memory gives if
each read its own. How many pieces is decided on the device from the lengths: a CUDA graph serves all. Each piece leaves a part
of its tile's output, and the last one merges them.

Source: FlashAttention-2 (Dao 2023); heads packed into rows as in FlashInfer; pieces as in FlashDecoding.
"""

import triton.language as tl

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
def chunk_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
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
    num_groups,
    part_tokens,
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
    block_d: tl.constexpr,
    tile_tokens: tl.constexpr,
    block_sequences: tl.constexpr,
    min_query_len: tl.constexpr,
    max_waves: tl.constexpr,
    merged_rows: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """Grid: (num_kv_heads, at least the tiles of new tokens and max_waves * num_groups).

    num_groups: times num_kv_heads are as many programs as run at the same time. partial_lse: [max_waves * num_groups *
    num_kv_heads, block_m] fp32; partial_outputs: the same, by block_d; semaphores: one of each, int32, all 0. part_tokens:
    read by a program in the time that it costs to leave and merge parts. Sequences with fewer new tokens than min_query_len are
    left alone.
    """
    block_q: tl.constexpr = block_m // group
    ids = tl.arange(0, block_sequences)
    is_there = ids < num_sequences
    lens = tl.load(context_lens + ids, mask=is_there, other=0)
    query_lens = tl.load(query_starts + ids + 1, mask=is_there, other=0)
    query_lens -= tl.load(query_starts + ids, mask=is_there, other=0)
    is_ours = (lens > 0) & (query_lens >= min_query_len)
    # [block_sequences]: tiles of new tokens, and pieces of the context of each.
    num_tiles = tl.where(is_ours, tl.cdiv(query_lens, block_q), 0)
    reaches = reach_of(lens, query_lens, window, block_q, tile_tokens, has_window, has_tree)
    reaches = tl.where(is_ours, reaches, 0)
    num_pieces = pieces_of(num_tiles, reaches, num_groups, part_tokens // tile_tokens, max_waves)
    ends = tl.cumsum(num_tiles * num_pieces, 0)
    total = tl.max(ends, 0)
    # The last tiles of a sequence have the most to read: they begin first.
    place = total - 1 - tl.program_id(1)
    head = tl.program_id(0)
    if place >= 0:
        sequence = tl.sum((ends <= place).to(tl.int32), 0)
        first_place = tl.max(tl.where(ends <= place, ends, 0), 0)
        context_len = tl.load(context_lens + sequence)
        sequence_start = tl.load(query_starts + sequence)
        query_len = tl.load(query_starts + sequence + 1) - sequence_start
        prefix_len = context_len - query_len
        tiles = tl.cdiv(query_len, block_q)
        pieces = tl.sum(tl.where(ids == sequence, num_pieces, 0), 0)
        tile = (place - first_place) % tiles
        piece = (place - first_place) // tiles
        first_row = tile * block_q
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
        # Those of this piece; a tile that ends early has fewer pieces.
        piece_tiles = tl.cdiv(
            reach_of(context_len, query_len, window, block_q, tile_tokens, has_window, has_tree), pieces
        )
        num_parts = tl.cdiv(stop - first, piece_tiles)
        begin = first + piece * piece_tiles
        end = tl.minimum(begin + piece_tiles, stop)
        if piece < num_parts:
            q = load_rows(
                query, first_token, num_rows, head, q_token, q_head, group, head_dim, block_m, block_d
            )
            if k_cache.dtype.element_ty.primitive_bitwidth == 8:
                # fp8 becomes fp16 in one instruction, exactly; what is in four bits becomes fp16, too.
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
                    begin, tl.minimum(start, end), context_len, prefix_len, window, scale,
                    k_block, k_slot, v_block, v_slot,
                    block_size, head_dim, tile_tokens, True, True, has_window, has_tree,
                )  # fmt: skip
            largest, weight_sum, weighted = attend_tiles(
                q, largest, weight_sum, weighted, keys, values, table, masks, row_masks, row_positions,
                tl.maximum(start, begin), tl.minimum(full, end), context_len, prefix_len, window, scale,
                k_block, k_slot, v_block, v_slot,
                block_size, head_dim, tile_tokens, False, False, has_window, has_tree,
            )  # fmt: skip
            largest, weight_sum, weighted = attend_tiles(
                q, largest, weight_sum, weighted, keys, values, table, masks, row_masks, row_positions,
                tl.maximum(full, begin), end, context_len, prefix_len, window, scale,
                k_block, k_slot, v_block, v_slot,
                block_size, head_dim, tile_tokens, True, True, has_window, has_tree,
            )  # fmt: skip
            output = finished(weighted, weight_sum)
            if num_parts == 1:
                store_rows(
                    out, output, first_token, num_rows, head, out_token, out_head,
                    group, head_dim, block_m, block_d,
                )  # fmt: skip
            else:
                first_slot = (first_place + tile) * num_kv_heads + head
                slot_step = tiles * num_kv_heads
                store_part(
                    partial_lse, partial_outputs, first_slot + piece * slot_step, output,
                    log_sum(largest, weight_sum), num_rows * group, head_dim, block_m, block_m, block_d,
                )  # fmt: skip
                if is_last(semaphores + first_slot, num_parts):
                    for row in range(0, num_rows * group, merged_rows):
                        merged, _ = merge_parts(
                            partial_lse, partial_outputs, first_slot, first_slot + slot_step, slot_step,
                            num_parts, row, num_rows * group, head_dim, merged_rows, block_m, block_d,
                        )  # fmt: skip
                        store_rows(
                            out, merged, first_token, num_rows, head, out_token, out_head,
                            group, head_dim, merged_rows, block_d, row,
                        )  # fmt: skip


@jit
def reach_of(  # type: ignore[no-untyped-def]
    context_len,
    query_len,
    window,
    block_q: tl.constexpr,
    tile_tokens: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """Tiles of positions that a tile of block_q new tokens of this sequence sees, at most; of numbers or vectors."""
    reach = tl.cdiv(context_len, tile_tokens)
    if has_window:
        # Where there are trees all tiles see what the whole sequence does.
        seen = window - 1 + (query_len if has_tree else tl.minimum(query_len, block_q))
        reach = tl.minimum(reach, tl.cdiv(tl.maximum(seen - 1, 0), tile_tokens) + 1)
    return reach


@jit
def pieces_of(num_tiles, reaches, num_groups, part_cost, max_waves: tl.constexpr):  # type: ignore[no-untyped-def]
    """[block_sequences] int32: into how many pieces the contexts of a sequence's tiles are cut.

    num_tiles, reaches: [block_sequences] int32, 0 where nothing is to be done: tiles of a sequence, and what one of them reads.
    For each number of waves of num_groups programs there is one cut, into no more pieces of similar lengths than these have
    programs; that which ends first is taken, or none. Few waves leave few parts, with more of them the last one is fuller.
    part_cost: of each wave, in tiles. When pieces end is exact where contexts are as long as each other, else a guess.
    """
    total = tl.sum(num_tiles, 0)
    work = tl.maximum(tl.sum(num_tiles * reaches, 0), 1)
    longest = tl.maximum(tl.max(reaches, 0), 1)
    # Ones, in the layout of reaches.
    num_pieces = tl.where(reaches >= 0, 1, 1)
    least = tl.cdiv(work, num_groups * longest) * longest
    # In most batches there is less to gain than any cut costs.
    if (total < max_waves * num_groups) & (least - work // num_groups > part_cost):
        for waves in tl.static_range(1, max_waves + 1):
            spare = tl.maximum(waves * num_groups - total, 0)
            cut = 1 + spare * reaches // work
            lens = tl.cdiv(reaches, cut)
            longest = tl.maximum(tl.max(lens, 0), 1)
            cost = tl.cdiv(tl.sum(num_tiles * cut * lens, 0), num_groups * longest) * longest
            cost += waves * part_cost
            num_pieces = tl.where(cost < least, cut, num_pieces)
            least = tl.minimum(cost, least)
    return num_pieces
