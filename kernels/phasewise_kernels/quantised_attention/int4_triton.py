"""Attention to `int4_hadamard` pages: a rotation keeps products, so the query is rotated once instead of each key."""

import triton.language as tl

from phasewise_kernels.kv_codec.triton_kernel import _FP16, PAGE
from phasewise_kernels.quantised_attention.packed_triton import (
    down,
    finite,
    in_order,
    jit,
    k_operand,
    merge_pages,
    power_at,
    run_of,
    v_operand,
    word_pairs,
    words_at,
)

#: Codes stand for themselves times 2**-24, of the upper four bits times 2**-20.
_LOW = tl.constexpr(2.0**24)
_HIGH = tl.constexpr(2.0**20)


@jit
def attend_int4_kernel(  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    query,
    rotation,
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
    block: tl.constexpr,
    rows_block: tl.constexpr,
    num_abreast: tl.constexpr,
    num_stages: tl.constexpr,
    is_plain: tl.constexpr,
):
    """sums: [batch, num_kv_heads, num_splits, group, head_dim] fp32, rotated; maxima, totals: without head_dim.

    scale: of scores, for powers of two. rotation: [head_dim, head_dim] fp32. Programs: [batch * num_kv_heads, num_splits].
    """
    sequence, head, first, last = run_of(context_lens, num_splits, num_kv_heads)
    half: tl.constexpr = head_dim // 2
    quarter: tl.constexpr = head_dim // 4
    rows, channels = tl.arange(0, rows_block), tl.arange(0, half)
    is_row = rows < group
    start = (sequence * num_kv_heads + head) * group + rows
    of_block = tl.arange(0, block)
    at_block = query + start[None, :] * head_dim + of_block[:, None]
    q_low = tl.load(at_block, mask=is_row[None, :], other=0.0).to(tl.float32)
    q_high = tl.load(at_block + half // block * block, mask=is_row[None, :], other=0.0).to(tl.float32)
    # Two channels that are multiplied together come from two rows of codes.
    order = channels // 2 + channels % 2 * quarter
    turn = rotation + order[:, None] * head_dim + of_block[None, :]
    q_low = tl.dot(tl.load(turn), q_low, input_precision="tf32x3").to(tl.float16)
    turn += half * head_dim + half // block * block
    q_high = tl.dot(tl.load(turn), q_high, input_precision="tf32x3").to(tl.float16)
    of_low = tl.sum(q_low.to(tl.float32), axis=0)[None, None, :]
    of_high = tl.sum(q_high.to(tl.float32), axis=0)[None, None, :]
    q_low = tl.broadcast_to(q_low[None], [num_abreast, half, rows_block])
    q_high = tl.broadcast_to(q_high[None], [num_abreast, half, rows_block])
    highest = tl.full([num_abreast, rows_block], -float("inf"), tl.float32)
    total = tl.zeros([num_abreast, rows_block], tl.float32)
    out_low = tl.zeros([num_abreast, half, rows_block], tl.float32)
    out_high = tl.zeros([num_abreast, half, rows_block], tl.float32)
    row: tl.constexpr = 2 * num_kv_heads * PAGE
    # Where the block of the upper half of the channels lies, from that of the lower half.
    step: tl.constexpr = (half // block) * row
    to_minima: tl.constexpr = (head_dim // block) * row
    is_aligned: tl.constexpr = num_kv_heads % 2 == 0
    pairs, tokens = tl.arange(0, quarter), tl.arange(0, PAGE)
    page_at = page_table + sequence * max_pages
    for place in tl.range(first, last, num_abreast, num_stages=num_stages):
        own = place + tl.arange(0, num_abreast)
        # [num_abreast]
        page = pages + tl.load(page_at + tl.minimum(own, last - 1)).to(tl.int64) * page_bytes
        codes = page[:, None] + 2 * num_kv_heads + head * PAGE
        a = words_at(codes + pairs[None, :] * row, PAGE // 4, is_aligned)
        b = words_at(codes + quarter * row + pairs[None, :] * row, PAGE // 4, is_aligned)
        v = words_at(codes + num_kv_heads * PAGE + channels[None, :] * row, PAGE // 4, is_aligned)
        at = (page + 2 * num_kv_heads + half * row).to(_FP16)[:, None] + head * PAGE + tokens[None, :]
        s_low, s_high = down(in_order(tl.load(at))), down(in_order(tl.load(at + step)))
        m_low, m_high = (
            down(in_order(tl.load(at + to_minima))),
            down(in_order(tl.load(at + to_minima + step))),
        )
        at += num_kv_heads * PAGE
        vs_low, vs_high = down(in_order(tl.load(at))), down(in_order(tl.load(at + step)))
        vm_low, vm_high = (
            down(in_order(tl.load(at + to_minima))),
            down(in_order(tl.load(at + to_minima + step))),
        )
        k_power = power_at(page + head)[:, None, None] * scale
        v_power = power_at(page + num_kv_heads + head)[:, None]
        # [num_abreast, PAGE, rows_block]
        z0, z1, z2, z3 = word_pairs(a, b)
        scores = tl.dot(k_operand(z0, z1, z2, z3, 0x000F000F, is_plain), q_low) * (s_low * _LOW)
        scores += tl.dot(k_operand(z0, z1, z2, z3, 0x00F000F0, is_plain), q_high) * (s_high * _HIGH)
        scores += of_low * m_low + of_high * m_high
        scores = tl.where((own < last)[:, None, None], scores * k_power, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - finite(new_highest)[:, None, :])
        kept = tl.exp2(highest - finite(new_highest))
        total = total * kept + tl.sum(p, axis=1)
        highest = new_highest
        more_low = tl.sum(p * vm_low, axis=1) * v_power
        more_high = tl.sum(p * vm_high, axis=1) * v_power
        p_low, p_high = (p * vs_low).to(tl.float16), (p * vs_high).to(tl.float16)
        low = tl.dot(v_operand(v, v >> 8, 0x000F000F, is_plain), p_low)
        high = tl.dot(v_operand(v, v >> 8, 0x00F000F0, is_plain), p_high)
        out_low = out_low * kept[:, None, :] + (low * (v_power * _LOW)[:, None, :] + more_low[:, None, :])
        out_high = out_high * kept[:, None, :] + (
            high * (v_power * _HIGH)[:, None, :] + more_high[:, None, :]
        )
    highest, total, weights = merge_pages(highest, total)
    part = (tl.program_id(0) * num_splits + tl.program_id(1)).to(tl.int64) * group + rows
    where = sums + part[None, :] * head_dim + channels[:, None]
    tl.store(where, tl.sum(out_low * weights, axis=0), mask=is_row[None, :])
    tl.store(where + half, tl.sum(out_high * weights, axis=0), mask=is_row[None, :])
    tl.store(maxima + part, highest, mask=is_row)
    tl.store(totals + part, total, mask=is_row)
