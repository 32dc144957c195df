"""Few rows over tiles of a cache in fp8, with K and V in the registers of the threads that multiply them.

Tokens are the rows of the product with the queries, and channels those of the product with the weights. A word of four channels becomes two
pairs of fp16 numbers, one instruction each, of which a thread multiplies what it has loaded itself: nothing that is converted goes through
shared memory, as it would where rows of queries come first.

Channels are in the order in which a thread has them, in the queries and in the output.
"""

import triton.language as tl

from phasewise_kernels.paged_attention.int4_triton import IS_INTERPRETED
from phasewise_kernels.paged_attention.packed_tiles_triton import blocks_of, rows_at
from phasewise_kernels.paged_attention.tiles_triton import jit, rows_seen

#: Of half a row of K, which four threads have, four words each, and their channels. Rows have 128.
_WORDS = tl.constexpr(16)
_CHANNELS = tl.constexpr(64)


@jit
def attend_byte_tiles(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    query,
    places,
    is_there,
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
    tile_tokens: tl.constexpr,
    is_causal: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """The part of tiles first_tile..last_tile - 1 of a sequence, as of `attend_tiles`. places: [rows] of queries, those that is_there."""
    at_query = query + places[None, :] + _query_channels()[:, None]
    # [64, rows]
    q_low = tl.load(at_query, mask=is_there[None, :], other=0.0).to(tl.float16)
    q_high = tl.load(at_query + _CHANNELS, mask=is_there[None, :], other=0.0).to(tl.float16)
    rows: tl.constexpr = places.shape[0]
    largest = tl.full([rows], float("-inf"), tl.float32)
    # Sums over tokens, but for those of a tile: what is left is summed up at the end.
    sums = tl.zeros([tile_tokens, rows], tl.float32)
    out = tl.zeros([2 * _CHANNELS, rows], tl.float32)

    is_aligned: tl.constexpr = tile_tokens % block_size == 0
    steps = tl.arange(0, tile_tokens)
    first_steps = 2 * tl.arange(0, tile_tokens // 2)
    half_words = tl.arange(0, _WORDS)[None, :]
    words = tl.arange(0, 2 * _WORDS)[None, :]
    # Block ids are a tile ahead, since the loads of K and V wait for them.
    start = first_tile * tile_tokens
    blocks = blocks_of(block_table, start, steps, context_len, block_size, tile_tokens)
    first_blocks = blocks_of(block_table, start, first_steps, context_len, block_size, tile_tokens)
    second_blocks = first_blocks
    if block_size % 2 != 0:
        second_blocks = blocks_of(block_table, start, first_steps + 1, context_len, block_size, tile_tokens)
    for tile in range(first_tile, last_tile):
        start = tile * tile_tokens
        positions = start + steps
        is_seen = positions < context_len
        is_first_seen = start + first_steps < context_len
        is_second_seen = start + first_steps + 1 < context_len
        # Where tiles are whole blocks, slots lie in each where they do in any other.
        base = 0 if is_aligned else start
        at_keys = rows_at(keys, blocks, base + steps, k_block, k_slot, block_size)
        at_first = rows_at(values, first_blocks, base + first_steps, v_block, v_slot, block_size)
        at_second = rows_at(values, second_blocks, base + first_steps + 1, v_block, v_slot, block_size)
        start += tile_tokens
        blocks = blocks_of(block_table, start, steps, context_len, block_size, tile_tokens)
        first_blocks = blocks_of(block_table, start, first_steps, context_len, block_size, tile_tokens)
        second_blocks = first_blocks
        if block_size % 2 != 0:
            second_blocks = blocks_of(
                block_table, start, first_steps + 1, context_len, block_size, tile_tokens
            )

        at = at_keys[:, None] + half_words
        low = tl.load(at, mask=is_seen[:, None], other=0)
        high = tl.load(at + _WORDS, mask=is_seen[:, None], other=0)
        first = tl.load(at_first[:, None] + words, mask=is_first_seen[:, None], other=0)
        second = tl.load(at_second[:, None] + words, mask=is_second_seen[:, None], other=0)

        # [tile_tokens, rows]
        scores = tl.dot(_k_operand(low), q_low)
        scores = tl.dot(_k_operand(high), q_high, scores)
        is_row_seen = is_seen[:, None]
        if is_causal:
            is_row_seen = is_row_seen & tl.trans(
                rows_seen(
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
            )
        elif has_window:
            is_row_seen = is_row_seen & (positions >= context_len - window)[:, None]
        scores = tl.where(is_row_seen, scores * scale, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        # A row may have seen nothing yet.
        least = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - least[None, :])
        kept = tl.exp2(largest - least)[None, :]
        largest = new_largest
        sums = sums * kept + weights
        out = tl.dot(_v_operand(first, second), weights.to(tl.float16), out * kept)
    return largest, tl.sum(sums, 0), _in_order(out)


@jit
def _query_channels():  # type: ignore[no-untyped-def]
    """[64]: the lower channels in the order of `_k_operand`."""
    at = tl.arange(0, _CHANNELS)
    word = at // 4 % 4 * 4 + at // 16
    return 4 * word + at % 4


@jit
def _four(words):  # type: ignore[no-untyped-def]
    """[..., 2, 2] fp16, of each word: which byte of a half, which half."""
    if IS_INTERPRETED:
        a, b = _fp16(words), _fp16(words >> 8)
        c, d = _fp16(words >> 16), _fp16(words >> 24)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """{
                .reg .b16 low, high;
                .reg .b32 x, y;
                mov.b32 {low, high}, $4;
                cvt.rn.f16x2.e4m3x2 x, low;
                cvt.rn.f16x2.e4m3x2 y, high;
                mov.b32 {$0, $1}, x;
                mov.b32 {$2, $3}, y;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    return tl.join(tl.join(a, b), tl.join(c, d))


@jit
def _fp16(words):  # type: ignore[no-untyped-def]
    """Of each lowest byte, fp8 e4m3: its bits lie in fp16 where they are 2**-8 of it, but for those of NaN."""
    bits = ((words & 0x80) << 8) | ((words & 0x7F) << 7)
    values = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return tl.where((words & 0x7F) == 0x7F, float("nan"), values)


@jit
def _in_pairs(first, second):  # type: ignore[no-untyped-def]
    """Bytes 0 and 1 of both, those of `first` before those of `second`, in one word, and bytes 2 and 3 in another."""
    if IS_INTERPRETED:
        low = (first & 0xFF) | ((second & 0xFF) << 8) | ((first & 0xFF00) << 8) | ((second & 0xFF00) << 16)
        first, second = first >> 16, second >> 16
        high = (first & 0xFF) | ((second & 0xFF) << 8) | ((first & 0xFF00) << 8) | ((second & 0xFF00) << 16)
    else:
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;",
            "=&r,=&r,r,r",
            [first, second],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return low, high


@jit
def _k_operand(words):  # type: ignore[no-untyped-def]
    """words: [tokens, 16]; [tokens, 64] fp16."""
    x = tl.reshape(_four(words), [words.shape[0], 4, 4, 2, 2])
    return tl.reshape(tl.permute(x, [0, 2, 1, 4, 3]), [words.shape[0], _CHANNELS])


@jit
def _v_operand(first, second):  # type: ignore[no-untyped-def]
    """Words of both tokens of pairs, [pairs, 32]; [128, tokens] fp16."""
    low, high = _in_pairs(first, second)
    x = tl.reshape(tl.join(_four(low), _four(high)), [first.shape[0], 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(x, [2, 5, 4, 1, 0, 3]), [2 * _CHANNELS, 2 * first.shape[0]])


@jit
def _in_order(out):  # type: ignore[no-untyped-def]
    """out: [128, rows] of `_v_operand`. [rows, 128] as channels follow each other."""
    x = tl.reshape(out, [4, 2, 2, 8, out.shape[1]])
    return tl.reshape(tl.permute(x, [4, 3, 0, 1, 2]), [out.shape[1], 2 * _CHANNELS])
