"""Attention to pages of `gear` and `gear_l`, none of whose numbers is decoded.

With K = s * code + m + L R^T of a channel c and a token t, and q the query, a score is

    sum over c of (q * s)[c] * code[c, t]  +  q . m  +  (q . L) R[t]

so that the query is multiplied by the scales of a page, and its codes enter the product as they are. Of V, whose scales
belong to tokens, the weights are multiplied by them, and L belongs to tokens as well. An outlier stands in place of what
would be decoded: the difference is computed for each, and added by a product with a matrix of 1 where outliers are.
"""

import triton.language as tl

from phasewise_kernels.kv_codec.triton_kernel import _FP16, PAGE
from phasewise_kernels.quantised_attention.packed_triton import (
    cut,
    down,
    equals,
    finite,
    in_order,
    jit,
    k_operand,
    merge_pages,
    power_at,
    run_of,
    word_pairs,
    words_at,
)

#: Codes stand for themselves times 2**-24, those of the next parts of the channels for 4, 16 and 64 times that.
_UNIT = tl.constexpr(2.0**24)
_UINT8 = tl.constexpr(tl.pointer_type(tl.uint8))


@jit
def _row_of(x, number: tl.constexpr):  # type: ignore[no-untyped-def]
    """x: [abreast, 4, rows]. [abreast, 1, rows]."""
    return tl.sum(tl.where(tl.arange(0, 4)[None, :, None] == number, x, 0.0), axis=1)[:, None, :]


@jit
def _v_operand(z0, z1, z2, z3, mask: tl.constexpr, is_plain: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of `word_pairs` of tokens 8 apart, [abreast, 32, words]. [abreast, channels (byte, word), PAGE in our order]."""
    evens = tl.join(cut(z0, mask, is_plain), cut(z2, mask, is_plain))
    odds = tl.join(cut(z1, mask, is_plain), cut(z3, mask, is_plain))
    # [abreast, jh >> 1, jl, s, word, jh & 1, byte >> 1, byte & 1]
    x = tl.reshape(tl.join(evens, odds), [z0.shape[0], 4, 2, 4, z0.shape[2], 2, 2, 2])
    x = tl.permute(x, [0, 6, 7, 4, 3, 2, 1, 5])
    return tl.reshape(x, [z0.shape[0], 4 * z0.shape[2], PAGE])


@jit
def _of_k(x, head_dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """x: [abreast, head_dim] of channels as they follow each other: as the product has them, (part, row, pair)."""
    x = tl.reshape(x, [x.shape[0], 4, 2, head_dim // 8])
    return tl.reshape(tl.permute(x, [0, 1, 3, 2]), [x.shape[0], head_dim])


@jit
def _of_linear(x, head_dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of [abreast, 4, head_dim]."""
    x = tl.reshape(x, [x.shape[0], 4, 4, 2, head_dim // 8])
    return tl.reshape(tl.permute(x, [0, 1, 2, 4, 3]), [x.shape[0], 4, head_dim])


@jit
def _of_v(x):  # type: ignore[no-untyped-def]
    """x: [abreast, channels], of two parts, as they follow each other: (part, byte, word), down, fp32."""
    y = tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 8, 4]), [0, 1, 3, 2])
    return down(tl.reshape(y, [x.shape[0], x.shape[1]]))


@jit
def _two(x):  # type: ignore[no-untyped-def]
    """x: [abreast, 2 * n]: the even ones and the odd ones."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@jit
def _of_groups(at, num_groups: tl.constexpr):  # type: ignore[no-untyped-def]
    """at: [abreast, 1]. Scales or minima of the lower and the upper half of the channels, [abreast, PAGE] each."""
    if num_groups == 2:
        low, high = _two(tl.load(at + tl.arange(0, 2 * PAGE)[None, :]))
    else:
        low = tl.load(at + tl.arange(0, PAGE)[None, :])
        high = low
    return low, high


@jit
def _linear_at(right, length: tl.constexpr, place):  # type: ignore[no-untyped-def]
    return tl.load(right + place), tl.load(right + length + place)


@jit
def _code_at(row, width: tl.constexpr, place):  # type: ignore[no-untyped-def]
    """Of a row of V's codes."""
    return (tl.load(row + place % width).to(tl.int32) >> (place // width * 2)) & 3


@jit
def attend_gear_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    query,
    numbers,
    pages,
    page_table,
    context_lens,
    sums,
    maxima,
    totals,
    scale,
    page_bytes,
    max_pages,
    num_splits,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    num_groups: tl.constexpr,
    has_outliers: tl.constexpr,
    rows_block: tl.constexpr,
    num_abreast: tl.constexpr,
    num_stages: tl.constexpr,
    is_plain: tl.constexpr,
):
    """As for int4, not rotated. numbers: fp16, from 0 to head_dim - 1. num_groups: of V's channels, 1 or 2. Outliers are one at each end of a vector."""
    sequence, head, first, last = run_of(context_lens, num_splits, num_kv_heads)
    quarter: tl.constexpr = head_dim // 4
    half: tl.constexpr = head_dim // 2
    count: tl.constexpr = 2 if has_outliers else 0
    # In fp16, of a head: codes of K or V are as large.
    side: tl.constexpr = num_kv_heads * PAGE * head_dim // 8
    is_aligned: tl.constexpr = num_kv_heads % 2 == 0
    rows, tokens = tl.arange(0, rows_block), tl.arange(0, PAGE)
    is_row = rows < group
    start = (sequence * num_kv_heads + head) * group + rows
    # Two channels of K that are multiplied together come from two rows of codes: their order is (part, row, pair).
    ks = tl.arange(0, head_dim)
    k_channels = ks // quarter * quarter + ks % 2 * (quarter // 2) + ks % quarter // 2
    q = tl.load(query + start[None, :] * head_dim + k_channels[:, None], mask=is_row[None, :], other=0.0)
    q = tl.broadcast_to(q.to(tl.float16)[None], [num_abreast, head_dim, rows_block])
    # Of a part's codes; and an eighth, so that the product stays in fp16.
    part = ks // quarter
    k_units = tl.where(part < 2, tl.where(part == 0, 1.0, 1 / 4), tl.where(part == 2, 1 / 16, 1 / 64)) / 8
    k_units = k_units.to(tl.float16)[None, :]
    of_half = tl.arange(0, half)
    # Of half of the channels of V: (part, byte, word).
    v_channels = of_half // quarter * quarter
    v_channels += of_half % (quarter // 4) * 4 + of_half % quarter // (quarter // 4)
    v_units = tl.where(of_half < quarter, _UNIT, _UNIT / 4)[None, :, None]
    no_eights = tl.arange(0, PAGE // 2)
    even_tokens = no_eights // 8 * 16 + no_eights % 8
    highest = tl.full([num_abreast, rows_block], -float("inf"), tl.float32)
    total = tl.zeros([num_abreast, rows_block], tl.float32)
    out_low = tl.zeros([num_abreast, half, rows_block], tl.float32)
    out_high = tl.zeros([num_abreast, half, rows_block], tl.float32)
    our_tokens = in_order(tokens[None, :])
    pairs = tl.arange(0, quarter // 2)
    kinds = tl.arange(0, 4)
    page_at = page_table + sequence * max_pages
    for place in tl.range(first, last, num_abreast, num_stages=num_stages):
        own = place + tl.arange(0, num_abreast)
        # [num_abreast]
        page = pages + tl.load(page_at + tl.minimum(own, last - 1)).to(tl.int64) * page_bytes
        k_power = power_at(page + head)[:, None, None] * scale
        v_power = power_at(page + num_kv_heads + head)[:, None, None]
        # Sections of K: codes, scales, minima, left, right, outliers, places.
        body = page[:, None] + 2 * num_kv_heads
        codes = body + head * (PAGE * quarter)
        scales_at = body.to(_FP16) + side
        left_at = scales_at + 2 * num_kv_heads * head_dim
        right_at = left_at + 2 * num_kv_heads * head_dim + head * (2 * PAGE)
        a = words_at(codes + pairs[None, :] * PAGE, PAGE // 4, is_aligned)
        b = words_at(codes + (pairs + quarter // 2)[None, :] * PAGE, PAGE // 4, is_aligned)
        s = _of_k(tl.load(scales_at + head * head_dim + ks[None, :]), head_dim)
        # [abreast, 4, head_dim]: minima, both columns of left, and one of these once more.
        which = tl.where(kinds == 0, num_kv_heads + head, 2 * num_kv_heads + 2 * head + kinds % 2) * head_dim
        linear = tl.load(scales_at[:, :, None] + which[None, :, None] + ks[None, None, :])
        r_0, r_1 = _linear_at(right_at, PAGE, tokens[None, :])
        # Of V the same.
        v_body = (
            body + 2 * side + 4 * num_kv_heads * (PAGE + 2 * head_dim) + 3 * count * num_kv_heads * head_dim
        )
        v_codes = v_body + head * (PAGE * quarter)
        v_scales_at = v_body.to(_FP16) + side
        v_left_at = v_scales_at + 2 * num_kv_heads * PAGE * num_groups
        v_right_at = v_left_at + 2 * num_kv_heads * PAGE + head * (2 * head_dim)
        v_left_at += head * (2 * PAGE)
        v_a = words_at(v_codes + even_tokens[None, :] * quarter, quarter // 4, is_aligned)
        v_b = words_at(v_codes + (even_tokens + 8)[None, :] * quarter, quarter // 4, is_aligned)
        of_groups = v_scales_at + head * (PAGE * num_groups)
        vs_low, vs_high = _of_groups(of_groups, num_groups)
        vm_low, vm_high = _of_groups(of_groups + num_kv_heads * PAGE * num_groups, num_groups)
        l_0, l_1 = _linear_at(v_left_at, PAGE, tokens[None, :])
        low_0, low_1 = _linear_at(v_right_at, head_dim, of_half[None, :])
        high_0, high_1 = _linear_at(v_right_at, head_dim, half + of_half[None, :])
        if has_outliers:
            twice = 2 * head * head_dim + tl.arange(0, 2 * head_dim)[None, :]
            outliers_at = right_at - head * (2 * PAGE) + 2 * num_kv_heads * PAGE
            outliers = tl.load(outliers_at + twice)
            places_at = (outliers_at + 2 * num_kv_heads * head_dim).to(_UINT8)
            places = tl.minimum(tl.load(places_at + twice).to(tl.int32), PAGE - 1)
            above, below = _two(outliers)
            place_above, place_below = _two(places)
            row = codes + (ks % quarter)[None, :] * PAGE
            code_above, code_below = tl.load(row + place_above), tl.load(row + place_below)
            above_0, above_1 = _linear_at(right_at, PAGE, place_above)
            below_0, below_1 = _linear_at(right_at, PAGE, place_below)
            twice = 2 * head * PAGE + tl.arange(0, 2 * PAGE)[None, :]
            v_outliers_at = v_right_at - head * (2 * head_dim) + 2 * num_kv_heads * head_dim
            v_outliers = tl.load(v_outliers_at + twice)
            v_places_at = (v_outliers_at + 2 * num_kv_heads * PAGE).to(_UINT8)
            v_places = tl.minimum(tl.load(v_places_at + twice).to(tl.int32), head_dim - 1)
            v_above, v_below = _two(v_outliers)
            v_place_above, v_place_below = _two(v_places)
            row = v_codes + tokens[None, :] * quarter
            v_code_above, v_code_below = (
                _code_at(row, quarter, v_place_above),
                _code_at(row, quarter, v_place_below),
            )
            v_above_0, v_above_1 = _linear_at(v_right_at, head_dim, v_place_above)
            v_below_0, v_below_1 = _linear_at(v_right_at, head_dim, v_place_below)

        # [abreast, 4, rows_block]
        biases = tl.dot(_of_linear(linear, head_dim), q)
        z0, z1, z2, z3 = word_pairs(a, b)
        evens = tl.join(
            k_operand(z0, z1, z2, z3, 0x00030003, is_plain),
            k_operand(z0, z1, z2, z3, 0x00300030, is_plain),
        )
        odds = tl.join(
            k_operand(z0, z1, z2, z3, 0x000C000C, is_plain),
            k_operand(z0, z1, z2, z3, 0x00C000C0, is_plain),
        )
        x = tl.permute(tl.join(evens, odds), [0, 1, 3, 4, 2])
        x = tl.reshape(x, [num_abreast, PAGE, head_dim])
        scores = tl.dot(x, q * (s * k_units)[:, :, None]) * (8.0 * _UNIT)
        if has_outliers:
            shifts = (ks // quarter * 2)[None, :]
            at = scales_at + head * head_dim + ks[None, :]
            s_item = tl.load(at).to(tl.float32)
            m_item = tl.load(at + num_kv_heads * head_dim).to(tl.float32)
            left_0, left_1 = _linear_at(left_at + head * (2 * head_dim), head_dim, ks[None, :])
            decoded = ((code_above.to(tl.int32) >> shifts) & 3).to(tl.float32) * s_item + m_item
            decoded += left_0.to(tl.float32) * above_0 + left_1.to(tl.float32) * above_1
            more = tl.where(place_above == place_below, 0.0, above.to(tl.float32) - decoded)
            decoded = ((code_below.to(tl.int32) >> shifts) & 3).to(tl.float32) * s_item + m_item
            decoded += left_0.to(tl.float32) * below_0 + left_1.to(tl.float32) * below_1
            less = below.to(tl.float32) - decoded
            number = tl.load(numbers + our_tokens)[:, :, None]
            at_above = _of_k(place_above.to(tl.float16), head_dim)[:, None, :]
            at_below = _of_k(place_below.to(tl.float16), head_dim)[:, None, :]
            more = _of_k((more / 8).to(tl.float16), head_dim)[:, :, None]
            less = _of_k((less / 8).to(tl.float16), head_dim)[:, :, None]
            found = tl.dot(equals(number, at_above, is_plain), q * more)
            scores += tl.dot(equals(number, at_below, is_plain), q * less, found) * 8.0
        scores += _row_of(biases, 0)
        scores += down(in_order(r_0)) * _row_of(biases, 2) + down(in_order(r_1)) * _row_of(biases, 1)
        scores = tl.where((own < last)[:, None, None], scores * k_power, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - finite(new_highest)[:, None, :])
        kept = tl.exp2(highest - finite(new_highest))
        total = total * kept + tl.sum(p, axis=1)
        highest = new_highest

        along_0 = tl.sum(p * down(in_order(l_0)), axis=1)[:, None, :]
        along_1 = tl.sum(p * down(in_order(l_1)), axis=1)[:, None, :]
        z0, z1, z2, z3 = word_pairs(v_a, v_b)
        x = tl.join(
            _v_operand(z0, z1, z2, z3, 0x00030003, is_plain),
            _v_operand(z0, z1, z2, z3, 0x000C000C, is_plain),
        )
        x = tl.reshape(tl.permute(x, [0, 3, 1, 2]), [num_abreast, half, PAGE])
        low = tl.dot(x, (p * down(in_order(vs_low))).to(tl.float16)) * v_units
        low += tl.sum(p * down(in_order(vm_low)), axis=1)[:, None, :]
        low += _of_v(low_0) * along_0 + _of_v(low_1) * along_1
        x = tl.join(
            _v_operand(z0, z1, z2, z3, 0x00300030, is_plain),
            _v_operand(z0, z1, z2, z3, 0x00C000C0, is_plain),
        )
        x = tl.reshape(tl.permute(x, [0, 3, 1, 2]), [num_abreast, half, PAGE])
        high = tl.dot(x, (p * down(in_order(vs_high))).to(tl.float16)) * (v_units / 16)
        high += tl.sum(p * down(in_order(vm_high)), axis=1)[:, None, :]
        high += _of_v(high_0) * along_0 + _of_v(high_1) * along_1
        if has_outliers:
            is_high = v_place_above >= half
            s_item, m_item = tl.where(is_high, vs_high, vs_low), tl.where(is_high, vm_high, vm_low)
            decoded = v_code_above.to(tl.float32) * s_item + m_item
            decoded += l_0.to(tl.float32) * v_above_0 + l_1.to(tl.float32) * v_above_1
            more = tl.where(v_place_above == v_place_below, 0.0, v_above.to(tl.float32) - decoded)
            is_high = v_place_below >= half
            s_item, m_item = tl.where(is_high, vs_high, vs_low), tl.where(is_high, vm_high, vm_low)
            decoded = v_code_below.to(tl.float32) * s_item + m_item
            decoded += l_0.to(tl.float32) * v_below_0 + l_1.to(tl.float32) * v_below_1
            less = v_below.to(tl.float32) - decoded
            p_above = (p * down(in_order(more.to(tl.float16)))).to(tl.float16)
            p_below = (p * down(in_order(less.to(tl.float16)))).to(tl.float16)
            at_above = in_order(v_place_above.to(tl.float16))[:, None, :]
            at_below = in_order(v_place_below.to(tl.float16))[:, None, :]
            number = tl.load(numbers + v_channels)[None, :, None]
            found = tl.dot(equals(number, at_above, is_plain), p_above)
            low += tl.dot(equals(number, at_below, is_plain), p_below, found)
            number = tl.load(numbers + half + v_channels)[None, :, None]
            found = tl.dot(equals(number, at_above, is_plain), p_above)
            high += tl.dot(equals(number, at_below, is_plain), p_below, found)
        out_low = out_low * kept[:, None, :] + low * v_power
        out_high = out_high * kept[:, None, :] + high * v_power
    highest, total, weights = merge_pages(highest, total)
    part = (tl.program_id(0) * num_splits + tl.program_id(1)).to(tl.int64) * group + rows
    where = sums + part[None, :] * head_dim + v_channels[:, None]
    tl.store(where, tl.sum(out_low * weights, axis=0), mask=is_row[None, :])
    tl.store(where + half, tl.sum(out_high * weights, axis=0), mask=is_row[None, :])
    tl.store(maxima + part, highest, mask=is_row)
    tl.store(totals + part, total, mask=is_row)
