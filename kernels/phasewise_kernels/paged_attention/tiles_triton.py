"""What the attention kernels of a GPU share: online softmax over tiles of the cache, and the merge of two parts.

A part of a softmax over rows is (largest, weight_sum, weighted): the largest score, in units of log2, the sum of
weights 2**(score - largest), and the sum of weighted values. The empty part is (-inf, 0, 0).

    rows          [block_m]: token * group + query head among those of one KV head; the rest is padding
    tile          tile_tokens positions of one sequence, counted from 0
    seen          a row at position p sees up to p; in a tree, all before the new tokens and those that its mask names

Values beyond the context are not loaded: whatever lies there cannot reach the output.
Source: online softmax as in FlashAttention-2 (Dao 2023); the merge is that of FlashDecoding.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import triton
import triton.language as tl

from phasewise_kernels.paged_attention.int4_triton import IS_INTERPRETED, unpacked

_F = TypeVar("_F", bound=Callable[..., Any])
#: Not compiled anew for numbers that are 1 or divisible by 16: they differ from step to step.
_VARYING = ["num_sequences", "window", "table_stride", "num_splits", "num_groups", "part_tokens"]
jit: Callable[[_F], Any] = triton.jit(do_not_specialize=_VARYING)


@jit
def num_ancestors(masks):  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    """Bits that are set in each int64."""
    x = masks.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return (x & 0x7F).to(tl.int32)


@jit
def load_rows(  # type: ignore[no-untyped-def]
    query,
    first_token,
    query_len,
    head,
    token_stride,
    head_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
):
    """[block_m, block_d] of the query heads of one KV head; 0 where there is no row."""
    rows = tl.arange(0, block_m)
    dims = tl.arange(0, block_d)
    tokens = rows // group
    places = (first_token + tokens).to(tl.int64) * token_stride + (head * group + rows % group) * head_stride
    is_there = (tokens < query_len)[:, None] & (dims < head_dim)[None, :]
    return tl.load(query + places[:, None] + dims[None, :], mask=is_there, other=0.0)


@jit
def store_rows(  # type: ignore[no-untyped-def]
    out,
    values,
    first_token,
    query_len,
    head,
    token_stride,
    head_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    first_row=0,
):
    """The reverse of load_rows, of block_m rows from first_row on."""
    rows = first_row + tl.arange(0, block_m)
    dims = tl.arange(0, block_d)
    tokens = rows // group
    places = (first_token + tokens).to(tl.int64) * token_stride + (head * group + rows % group) * head_stride
    is_there = (tokens < query_len)[:, None] & (dims < head_dim)[None, :]
    tl.store(out + places[:, None] + dims[None, :], values.to(out.dtype.element_ty), mask=is_there)


@jit
def finished(weighted, weight_sum):  # type: ignore[no-untyped-def]
    """The output of a softmax; 0 for a row of padding, which may have seen nothing."""
    return weighted / tl.where(weight_sum == 0, 1.0, weight_sum)[:, None]


@jit
def rows_seen(  # type: ignore[no-untyped-def]
    positions,
    is_seen,
    tree_masks,
    row_masks,
    row_positions,
    prefix_len,
    window,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """[rows, positions]: which row sees which position, of those that is_seen says are there."""
    if has_tree:
        # A token of a tree is one further than its parent.
        new = positions - prefix_len
        is_new = (new >= 0) & is_seen
        bits = (row_masks[:, None] >> tl.minimum(tl.maximum(new, 0), 63)[None, :].to(tl.int64)) & 1
        is_row_seen = tl.where(
            (row_masks == 0)[:, None],
            positions[None, :] <= row_positions[:, None],
            (new < 0)[None, :] | ((bits != 0) & (new < 64)[None, :]),
        )
        if has_window:
            masks = tl.load(tree_masks + new, mask=is_new, other=0)
            depths = tl.where(masks == 0, positions, prefix_len + num_ancestors(masks) - 1)
            is_row_seen = is_row_seen & (depths[None, :] > row_positions[:, None] - window)
    else:
        is_row_seen = positions[None, :] <= row_positions[:, None]
        if has_window:
            is_row_seen = is_row_seen & (positions[None, :] > row_positions[:, None] - window)
    return is_row_seen


@jit
def _widened(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """x as `dtype`, of which the compiler does not know that it was bytes, and then loads it side by side with others, as it does what is not converted.

    For products that take K and V from shared memory: on an H100 chunks take 6 % less. Those of few rows, which have them in registers, take more.
    """
    x = x.to(dtype)
    if not IS_INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@jit
def attend_tiles(  # type: ignore[no-untyped-def]
    q,
    largest,
    weight_sum,
    weighted,
    keys,
    values,
    block_table,
    tree_masks,
    row_masks,
    row_positions,
    first_tile,
    last_tile,
    context_len,
    prefix_len,
    window,
    scale,
    k_block: tl.constexpr,
    k_slot: tl.constexpr,
    v_block: tl.constexpr,
    v_slot: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    tile_tokens: tl.constexpr,
    is_edge: tl.constexpr,
    is_causal: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """Add tiles first_tile..last_tile - 1 of a sequence to a part.

    keys, values: at the KV head. tree_masks: at the first new token of the sequence. scale: of scores, times log2(e).
    is_edge: positions may lie beyond the context; is_causal: rows differ in what they see. Strides of the caches are compiled
    in: they are the same in all steps, and addresses the better part of what a tile takes besides scores and weights. Where
    tiles are whole blocks, slots lie in each where they do in any other, and addresses within blocks are computed but once.
    """
    is_aligned: tl.constexpr = tile_tokens % block_size == 0
    is_packed: tl.constexpr = keys.dtype.element_ty == tl.uint8
    dims = tl.arange(0, q.shape[1])
    steps = tl.arange(0, tile_tokens)
    tile_blocks: tl.constexpr = tile_tokens // block_size
    if is_aligned:
        block_table += steps // block_size
        k_steps, v_steps = steps % block_size * k_slot, steps % block_size * v_slot
        if is_packed:
            keys += k_steps
            values += v_steps
        else:
            keys += k_steps[:, None] + dims[None, :]
            values += v_steps[:, None] + dims[None, :]
    # Block ids are a tile ahead, since the loads of K and V wait for them.
    positions = first_tile * tile_tokens + steps
    first = first_tile * tile_blocks if is_aligned else positions // block_size
    blocks = tl.load(block_table + first, mask=positions < context_len, other=0)
    for tile in range(first_tile, last_tile):
        positions = tile * tile_tokens + steps
        is_seen = positions < context_len
        places = blocks.to(tl.int64)
        ahead = positions + tile_tokens
        following = (tile + 1) * tile_blocks if is_aligned else ahead // block_size
        blocks = tl.load(block_table + following, mask=ahead < context_len, other=0)
        k_places, v_places = places * k_block, places * v_block
        if not is_aligned:
            slots = positions % block_size
            k_places += slots * k_slot
            v_places += slots * v_slot
        if not is_packed:
            k_places, v_places = k_places[:, None], v_places[:, None]
            if not is_aligned:
                k_places += dims[None, :]
                v_places += dims[None, :]
        if is_packed:
            k = unpacked(keys + k_places, is_seen, is_edge, head_dim)
            v = unpacked(values + v_places, is_seen, is_edge, head_dim)
        elif is_edge:
            is_loaded = is_seen[:, None] & (dims < head_dim)[None, :]
            k = tl.load(keys + k_places, mask=is_loaded, other=0.0)
            v = tl.load(values + v_places, mask=is_loaded, other=0.0)
        elif head_dim != q.shape[1]:
            k = tl.load(keys + k_places, mask=(dims < head_dim)[None, :], other=0.0)
            v = tl.load(values + v_places, mask=(dims < head_dim)[None, :], other=0.0)
        else:
            k = tl.load(keys + k_places)
            v = tl.load(values + v_places)
        if keys.dtype.element_ty.primitive_bitwidth == 8 and q.shape[0] >= 64:
            k, v = _widened(k, q.dtype), _widened(v, q.dtype)
        # [block_m, tile_tokens]
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if is_causal:
            is_row_seen = rows_seen(
                positions,
                is_seen,
                tree_masks,
                row_masks,
                row_positions,
                prefix_len,
                window,
                has_window,
                has_tree,
            )
            scores = tl.where(is_row_seen & is_seen[None, :], scores, float("-inf"))
        elif is_edge:
            if has_window:
                is_seen = is_seen & (positions >= context_len - window)
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        if is_causal or has_window:
            # A row may have seen nothing yet.
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        else:
            base = new_largest
        weights = tl.exp2(scores * scale - base[:, None])
        factor = tl.exp2(largest - base)
        weight_sum = weight_sum * factor + tl.sum(weights, 1)
        weighted = weighted * factor[:, None]
        weighted = tl.dot(weights.to(q.dtype), v.to(q.dtype), weighted, input_precision="ieee")
        largest = new_largest
    return largest, weight_sum, weighted
