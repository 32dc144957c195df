"""Few rows over tiles of a cache in four bits (`kv_int4/op.py`), without unpacking it: codes are multiplied as they lie in their words.

A code cut out by one `and` is a subnormal number of fp16 as it is, 2**-24 of the code, or 2**-20 of it for the bits above (`quantised_attention/packed_triton.py`).
Tokens are the rows of the product with the queries, and channels those of the product with the weights, so that a thread multiplies what it has
cut out itself. Scales and minima come in afterwards, one of each for a token's even channels and one for the odd ones:

    score    = scale_even * (codes_even . q_even) + minimum_even * sum(q_even), and the same of the odd channels
    even out = sum over tokens of codes_even * (weight * scale_even), plus that of weight * minimum_even

What stands in brackets is fp16 where it is multiplied with codes, in units of the largest scale of V so far: 2**15 of them are the whole of
fp16, so that many small weights beside a large one, which has the first token of many models, are not lost.

Channels are in the order in which a thread has them, in the queries and in the output.
"""

import triton.language as tl

from phasewise_kernels.paged_attention.int4_triton import IS_INTERPRETED, high_half, low_half
from phasewise_kernels.paged_attention.tiles_triton import jit, rows_seen
from phasewise_kernels.quantised_attention.packed_triton import cut

_INT32 = tl.constexpr(tl.pointer_type(tl.int32))
#: What codes stand for, times this, are the codes: of the lower four bits of what `cut` takes, and of those above.
_LOW = tl.constexpr(2.0**24)
_HIGH = tl.constexpr(2.0**20)
#: A scale with an exponent e is below 2**(e - 14), and a weight at most 1: times 2**(29 - e) both together are at most 2**15.
_WHOLE = tl.constexpr(29)


@jit
def attend_packed_tiles(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
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
    head_dim: tl.constexpr,
    tile_tokens: tl.constexpr,
    is_causal: tl.constexpr,
    has_window: tl.constexpr,
    has_tree: tl.constexpr,
):
    """The part of tiles first_tile..last_tile - 1 of a sequence, as of `attend_tiles`. places: [rows] of queries, those that is_there."""
    half: tl.constexpr = head_dim // 2
    # Of a row of the cache, and those of either half of it that a thread has side by side.
    num_words: tl.constexpr = head_dim // 8
    lanes: tl.constexpr = 4 if head_dim >= 64 else head_dim // 16
    at_query = query + places[None, :] + _query_channels(half, lanes)[:, None]
    # [half, rows]
    q_even, even_sums = _queries(at_query, is_there, half, tile_tokens)
    q_odd, odd_sums = _queries(at_query + 1, is_there, half, tile_tokens)
    rows: tl.constexpr = places.shape[0]
    largest = tl.full([rows], float("-inf"), tl.float32)
    # Sums over tokens, but for those of a tile: what is left is summed up at the end.
    sums = tl.zeros([tile_tokens, rows], tl.float32)
    even_minima = tl.zeros([tile_tokens, rows], tl.float32)
    odd_minima = tl.zeros([tile_tokens, rows], tl.float32)
    # Of the largest scale of V, as fp16 has it.
    exponent = tl.full([], 0, tl.int32)
    even_out = tl.zeros([half, rows], tl.float32)
    odd_out = tl.zeros([half, rows], tl.float32)

    is_aligned: tl.constexpr = tile_tokens % block_size == 0
    steps = tl.arange(0, tile_tokens)
    first_steps = 2 * tl.arange(0, tile_tokens // 2)
    half_words = tl.arange(0, num_words // 2)[None, :]
    words = tl.arange(0, num_words)[None, :]
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
        # Where tiles are whole blocks, slots lie in each where they do in any other.
        base = 0 if is_aligned else start
        at_keys = rows_at(keys, blocks, base + steps, k_block, k_slot, block_size)
        at_values = rows_at(values, blocks, base + steps, v_block, v_slot, block_size)
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

        # Codes are numbers whatever lies there: scales and minima say what counts.
        at = at_keys[:, None] + half_words
        a = tl.load(at)
        b = tl.load(at + num_words // 2)
        k_scales, k_minima = _scales_and_minima(at_keys + num_words, is_seen)
        first = tl.load(at_first[:, None] + words)
        second = tl.load(at_second[:, None] + words)
        v_scales, v_minima = _scales_and_minima(at_values + num_words, is_seen)

        # [tile_tokens, rows]
        evens, odds = _halves(a, b)
        scores = tl.dot(_k_operand(evens, lanes), q_even) * (_even(k_scales) * _LOW)
        scores += tl.dot(_k_operand(odds, lanes), q_odd) * (_odd(k_scales) * _LOW)
        scores += even_sums * _even(k_minima)
        scores += odd_sums * _odd(k_minima)
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
        even_minima = even_minima * kept + weights * _even(v_minima)
        odd_minima = odd_minima * kept + weights * _odd(v_minima)
        of_tile = tl.maximum((v_scales >> 10) & 0x1F, (v_scales >> 26) & 0x1F)
        new_exponent = tl.maximum(exponent, tl.max(tl.max(of_tile, 0), 0))
        kept *= tl.exp2((exponent - new_exponent).to(tl.float32))
        exponent = new_exponent
        weights *= tl.exp2(-(exponent - _WHOLE).to(tl.float32))
        evens, odds = _halves(first, second)
        even_weights = (weights * _even(v_scales)).to(tl.float16)
        odd_weights = (weights * _odd(v_scales)).to(tl.float16)
        even_out = tl.dot(_v_operand(evens), even_weights, even_out * kept)
        odd_out = tl.dot(_v_operand(odds), odd_weights, odd_out * kept)
    unit = tl.exp2((exponent - _WHOLE).to(tl.float32))
    even = _in_order(even_out * unit, tl.sum(even_minima, 0), num_words)
    odd = _in_order(odd_out * unit, tl.sum(odd_minima, 0), num_words)
    return largest, tl.sum(sums, 0), tl.reshape(tl.join(even, odd), [rows, head_dim])


@jit
def blocks_of(block_table, start, steps, context_len, block_size: tl.constexpr, tile_tokens: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the positions `steps` after start, a multiple of tile_tokens; of blocks, too, where tile_tokens is one."""
    if tile_tokens % block_size == 0:
        place = start // tile_tokens * (tile_tokens // block_size) + steps // block_size
    else:
        place = (start + steps) // block_size
    return tl.load(block_table + place, mask=start + steps < context_len, other=0)


@jit
def rows_at(cache, blocks, positions, block: tl.constexpr, slot: tl.constexpr, block_size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to words."""
    return (cache + blocks.to(tl.int64) * block + positions % block_size * slot).to(_INT32)


@jit
def _scales_and_minima(at, is_seen):  # type: ignore[no-untyped-def]
    """[tokens, 1] each: words of scales and of minima."""
    scales, minima = tl.split(tl.load(at[:, None] + tl.arange(0, 2)[None, :], mask=is_seen[:, None], other=0))
    return scales[:, None], minima[:, None]


@jit
def _even(words):  # type: ignore[no-untyped-def]
    return low_half(words).to(tl.float32)


@jit
def _odd(words):  # type: ignore[no-untyped-def]
    return high_half(words).to(tl.float32)


@jit
def _query_channels(half: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """[half]: the even channels in the order of `_k_operand`."""
    at = tl.arange(0, half)
    word = at // (8 * lanes) * lanes + at // 4 % lanes
    pair = at // (4 * lanes) % 2 * 2 + at // 2 % 2
    return 8 * word + 2 * pair + at % 2 * half


@jit
def _queries(at, is_there, half: tl.constexpr, tile_tokens: tl.constexpr):  # type: ignore[no-untyped-def]
    """[half, rows] fp16 as codes are multiplied with, and [tile_tokens, rows] fp32: their sums in each row, by a product, so that they lie where scores do."""
    is_above = tl.arange(0, half) // 2 % 2 == 1
    q = tl.load(at, mask=is_there[None, :], other=0.0).to(tl.float32)
    q = tl.where(is_above[:, None], q * (_HIGH / _LOW), q).to(tl.float16)
    units = tl.where(is_above, _LOW / _HIGH, 1.0).to(tl.float16)
    return q, tl.dot(tl.broadcast_to(units[None, :], [tile_tokens, half]), q)


@jit
def _halves(a, b):  # type: ignore[no-untyped-def]
    """Of a and b, the lower halves of each word side by side in one, and the upper ones."""
    if IS_INTERPRETED:
        low, high = (a & 0xFFFF) | (b << 16), ((a >> 16) & 0xFFFF) | (b & -65536)
    else:
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=&r,r,r",
            [a, b],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return low, high


@jit
def _pairs(words):  # type: ignore[no-untyped-def]
    """[..., 2, 2, 2] fp16, of each word: which half, whether the upper four bits of a byte, which byte of a half."""
    first = tl.join(cut(words, 0x000F000F, IS_INTERPRETED), cut(words, 0x00F000F0, IS_INTERPRETED))
    words = words >> 8
    second = tl.join(cut(words, 0x000F000F, IS_INTERPRETED), cut(words, 0x00F000F0, IS_INTERPRETED))
    return tl.join(first, second)


@jit
def _k_operand(words, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """words: [tokens, words]; [tokens, 8 * words] fp16."""
    x = tl.reshape(_pairs(words), [words.shape[0], words.shape[1] // lanes, lanes, 2, 2, 2])
    return tl.reshape(tl.permute(x, [0, 1, 5, 2, 4, 3]), [words.shape[0], 8 * words.shape[1]])


@jit
def _v_operand(words):  # type: ignore[no-untyped-def]
    """words: [pairs of tokens, words]; [4 * words, tokens] fp16."""
    lanes: tl.constexpr = 8 if words.shape[1] >= 8 else words.shape[1]
    x = tl.reshape(_pairs(words), [words.shape[0], lanes, words.shape[1] // lanes, 2, 2, 2])
    return tl.reshape(tl.permute(x, [2, 5, 4, 1, 0, 3]), [4 * words.shape[1], 2 * words.shape[0]])


@jit
def _in_order(out, minima, num_words: tl.constexpr):  # type: ignore[no-untyped-def]
    """out: [half, rows] of `_v_operand`. [rows, half] as channels follow each other."""
    lanes: tl.constexpr = 8 if num_words >= 8 else num_words
    is_above = tl.arange(0, out.shape[0]) // lanes % 2 == 1
    out = out * tl.where(is_above, _HIGH, _LOW)[:, None] + minima[None, :]
    x = tl.reshape(out, [num_words // lanes, 2, 2, lanes, out.shape[1]])
    return tl.reshape(tl.permute(x, [4, 3, 0, 1, 2]), [out.shape[1], out.shape[0]])
