"""Two launches: parts of each sequence's pages by programs of their own, then the sum of the parts.

    attend   a program has one KV head and a run of pages: its queries, padded to 16 rows, meet a page of keys at a time
    merge    one KV head: the parts, rescaled to one maximum; rotated back; and the tail, which is not packed

`int4_hadamard`: a rotation keeps products, so the query is rotated once instead of each key, and the output instead of
each value. A code c becomes the fp16 number 1024 + c by its bits alone. With q the sum of the query's block and s, m the
scale and minimum of a token's block, query times key is s * (query . (1024 + c)) + (m - 1024 * s) * q.
`gear`: pages are unpacked in registers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from phasewise_kernels.kv_codec import reference
from phasewise_kernels.kv_codec.gear_kernel import _k_count, _side_bytes, decoded_side
from phasewise_kernels.kv_codec.reference import PageCodec
from phasewise_kernels.kv_codec.triton_kernel import _FP16, PAGE, power_of_two

_F = TypeVar("_F", bound=Callable[..., Any])
_jit: Callable[[_F], Any] = triton.jit

#: Programs of `attend` that a streaming multiprocessor gets, and pages of one at least.
PROGRAMS_PER_SM = 4
MIN_PAGES = 4


@_jit
def _shift(base, number):  # type: ignore[no-untyped-def] # Triton looks at annotations, and knows but its own
    exponent = tl.load(base + number).to(tl.int8, bitcast=True).to(tl.int32)
    return power_of_two(tl.maximum(-120, tl.minimum(120, exponent)))


@_jit
def _as_fp16(codes):  # type: ignore[no-untyped-def]
    """1024 + code."""
    return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@_jit
def attend_int4_kernel(  # type: ignore[no-untyped-def]
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
):
    """sums: [batch, num_kv_heads, num_splits, group, head_dim] fp32, rotated; maxima, totals: without head_dim.

    scale: of scores, for powers of two. rotation: [head_dim, head_dim] fp32. Programs: [batch * num_kv_heads, num_splits].
    """
    sequence, head, split = (
        tl.program_id(0) // num_kv_heads,
        tl.program_id(0) % num_kv_heads,
        tl.program_id(1),
    )
    half: tl.constexpr = head_dim // 2
    num_full = tl.load(context_lens + sequence) // PAGE
    of_split = tl.cdiv(num_full, num_splits)
    first = split * of_split
    last = tl.minimum(num_full, first + of_split)
    rows, channels, tokens = tl.arange(0, rows_block), tl.arange(0, half), tl.arange(0, PAGE)
    whole = tl.arange(0, head_dim)
    is_row = (rows < group)[:, None]
    start = (sequence * num_kv_heads + head) * group + rows
    q = tl.load(query + start[:, None] * head_dim + whole[None, :], mask=is_row, other=0.0).to(tl.float32)
    turn = rotation + whole[:, None] * head_dim + channels[None, :]
    q_low = tl.dot(q, tl.load(turn), input_precision="ieee").to(tl.float16)
    q_high = tl.dot(q, tl.load(turn + half), input_precision="ieee").to(tl.float16)
    of_low, of_high = tl.sum(q_low.to(tl.float32), axis=1), tl.sum(q_high.to(tl.float32), axis=1)
    highest = tl.full([rows_block], -float("inf"), tl.float32)
    total = tl.zeros([rows_block], tl.float32)
    out_low = tl.zeros([rows_block, half], tl.float32)
    out_high = tl.zeros([rows_block, half], tl.float32)
    row: tl.constexpr = 2 * num_kv_heads * PAGE
    # Where the block of the upper half of the channels lies, from that of the lower half.
    step: tl.constexpr = (half // block) * row
    num_blocks: tl.constexpr = head_dim // block
    page_at = page_table + sequence * max_pages
    for place in tl.range(first, last, num_stages=3):
        base = pages + tl.load(page_at + place).to(tl.int64) * page_bytes
        at = base + 2 * num_kv_heads + channels[:, None] * row + head * PAGE + tokens[None, :]
        scales_at = (base + 2 * num_kv_heads + half * row).to(_FP16) + head * PAGE + tokens
        codes = tl.load(at)
        v_codes = tl.load(at + num_kv_heads * PAGE)
        s_low = tl.load(scales_at).to(tl.float32)
        s_high = tl.load(scales_at + step).to(tl.float32)
        m_low = tl.load(scales_at + num_blocks * row).to(tl.float32)
        m_high = tl.load(scales_at + num_blocks * row + step).to(tl.float32)
        scores = tl.dot(q_low, _as_fp16(codes & 15)) * s_low[None, :]
        scores += tl.dot(q_high, _as_fp16(codes >> 4)) * s_high[None, :]
        scores += of_low[:, None] * (m_low - 1024.0 * s_low)[None, :]
        scores += of_high[:, None] * (m_high - 1024.0 * s_high)[None, :]
        scores *= _shift(base, head) * scale
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_highest[:, None])
        kept = tl.exp2(highest - new_highest)
        total = total * kept + tl.sum(p, axis=1)
        highest = new_highest
        v_scales_at = scales_at + num_kv_heads * PAGE
        v_shift = _shift(base, num_kv_heads + head)
        p_low = (p * tl.load(v_scales_at).to(tl.float32)[None, :]).to(tl.float16)
        p_high = (p * tl.load(v_scales_at + step).to(tl.float32)[None, :]).to(tl.float16)
        more_low = tl.sum(p * tl.load(v_scales_at + num_blocks * row).to(tl.float32)[None, :], axis=1)
        more_high = tl.sum(p * tl.load(v_scales_at + num_blocks * row + step).to(tl.float32)[None, :], axis=1)
        more_low -= 1024.0 * tl.sum(p_low.to(tl.float32), axis=1)
        more_high -= 1024.0 * tl.sum(p_high.to(tl.float32), axis=1)
        low = tl.dot(p_low, tl.trans(_as_fp16(v_codes & 15))) + more_low[:, None]
        high = tl.dot(p_high, tl.trans(_as_fp16(v_codes >> 4))) + more_high[:, None]
        out_low = out_low * kept[:, None] + low * v_shift
        out_high = out_high * kept[:, None] + high * v_shift
    part = (tl.program_id(0) * num_splits + split).to(tl.int64) * group + rows
    where = sums + part[:, None] * head_dim + channels[None, :]
    tl.store(where, out_low, mask=is_row)
    tl.store(where + half, out_high, mask=is_row)
    tl.store(maxima + part, highest, mask=rows < group)
    tl.store(totals + part, total, mask=rows < group)


@_jit
def attend_gear_kernel(  # type: ignore[no-untyped-def]
    query,
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
    is_gear: tl.constexpr,
    v_count: tl.constexpr,
    v_groups: tl.constexpr,
    rows_block: tl.constexpr,
):
    """As for int4, not rotated."""
    sequence, head, split = (
        tl.program_id(0) // num_kv_heads,
        tl.program_id(0) % num_kv_heads,
        tl.program_id(1),
    )
    num_full = tl.load(context_lens + sequence) // PAGE
    of_split = tl.cdiv(num_full, num_splits)
    first = split * of_split
    last = tl.minimum(num_full, first + of_split)
    rows, channels = tl.arange(0, rows_block), tl.arange(0, head_dim)
    is_row = (rows < group)[:, None]
    start = (sequence * num_kv_heads + head) * group + rows
    q = tl.load(query + start[:, None] * head_dim + channels[None, :], mask=is_row, other=0.0).to(tl.float16)
    highest = tl.full([rows_block], -float("inf"), tl.float32)
    total = tl.zeros([rows_block], tl.float32)
    out = tl.zeros([rows_block, head_dim], tl.float32)
    page_at = page_table + sequence * max_pages
    n = tl.full([], PAGE, tl.int32)
    count = _k_count(n, is_gear)
    while first < last:
        base = pages + tl.load(page_at + first).to(tl.int64) * page_bytes
        body = base + 2 * num_kv_heads
        k = decoded_side(
            body, n, head_dim, n, head, num_kv_heads, count, 1 if is_gear else 0, head_dim, PAGE, 1, True
        )
        scores = tl.dot(q, k.to(tl.float16)) * (_shift(base, head) * scale)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_highest[:, None])
        kept = tl.exp2(highest - new_highest)
        total = total * kept + tl.sum(p, axis=1)
        highest = new_highest
        v_body = body + num_kv_heads * _side_bytes(n, head_dim, n, 1, count)
        v = decoded_side(
            v_body,
            n,
            n,
            head_dim,
            head,
            num_kv_heads,
            n * 0 + v_count,
            v_count,
            PAGE,
            head_dim,
            v_groups,
            False,
        )
        found = tl.dot(p.to(tl.float16), v.to(tl.float16))
        out = out * kept[:, None] + found * _shift(base, num_kv_heads + head)
        first += 1
    part = (tl.program_id(0) * num_splits + split).to(tl.int64) * group + rows
    tl.store(sums + part[:, None] * head_dim + channels[None, :], out, mask=is_row)
    tl.store(maxima + part, highest, mask=rows < group)
    tl.store(totals + part, total, mask=rows < group)


@_jit
def merge_kernel(  # type: ignore[no-untyped-def]
    query,
    rotation,
    context_lens,
    k_tail,
    v_tail,
    sums,
    maxima,
    totals,
    out,
    scale,
    num_splits,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    rows_block: tl.constexpr,
    is_rotated: tl.constexpr,
):
    """Programs: [batch * num_kv_heads]."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    rows, channels, tokens = tl.arange(0, rows_block), tl.arange(0, head_dim), tl.arange(0, PAGE)
    is_row = (rows < group)[:, None]
    context_len = tl.load(context_lens + sequence)
    rest = context_len % PAGE
    start = (sequence * num_kv_heads + head) * group + rows
    highest = tl.full([rows_block], -float("inf"), tl.float32)
    total = tl.zeros([rows_block], tl.float32)
    summed = tl.zeros([rows_block, head_dim], tl.float32)
    split = tl.full([], 0, tl.int32)
    while split < num_splits:
        part = (tl.program_id(0) * num_splits + split).to(tl.int64) * group + rows
        own_highest = tl.load(maxima + part, mask=rows < group, other=-float("inf"))
        own_total = tl.load(totals + part, mask=rows < group, other=0.0)
        own = tl.load(sums + part[:, None] * head_dim + channels[None, :], mask=is_row, other=0.0)
        new_highest = tl.maximum(highest, own_highest)
        base = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        kept, added = tl.exp2(highest - base), tl.exp2(own_highest - base)
        total = total * kept + own_total * added
        summed = summed * kept[:, None] + own * added[:, None]
        highest = new_highest
        split += 1
    if is_rotated:
        # The rotation is its own inverse.
        turn = tl.load(rotation + channels[:, None] * head_dim + channels[None, :])
        summed = tl.dot(summed, turn, input_precision="ieee")
    if rest > 0:
        q = tl.load(query + start[:, None] * head_dim + channels[None, :], mask=is_row, other=0.0)
        at = ((sequence * PAGE + tokens) * num_kv_heads + head)[:, None] * head_dim + channels[None, :]
        is_token = (tokens < rest)[:, None]
        k = tl.load(k_tail + at, mask=is_token, other=0.0)
        v = tl.load(v_tail + at, mask=is_token, other=0.0)
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
        scores = tl.where((tokens < rest)[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_highest[:, None])
        kept = tl.exp2(highest - new_highest)
        total = total * kept + tl.sum(p, axis=1)
        summed = summed * kept[:, None] + tl.dot(p, v.to(tl.float32), input_precision="ieee")
    summed = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + start[:, None] * head_dim + channels[None, :], summed.to(out.dtype.element_ty), mask=is_row
    )


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    tail: tuple[torch.Tensor, torch.Tensor],
    codec: PageCodec,
    num_sms: int,
) -> torch.Tensor:
    """As the op, on the current stream. The number of programs depends on shapes alone."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads = tail[0].shape[2]
    group = num_heads // num_kv_heads
    out = torch.empty_like(query)
    if not batch:
        return out
    max_pages = page_table.shape[1]
    num_splits = max(1, min(num_sms * PROGRAMS_PER_SM // (batch * num_kv_heads), -(-max_pages // MIN_PAGES)))
    rows_block = max(16, triton.next_power_of_2(group))
    parts = (batch, num_kv_heads, num_splits, group)
    sums = torch.empty(*parts, head_dim, dtype=torch.float32, device=query.device)
    maxima, totals = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    # Scores are exponents of 2.
    scale = head_dim**-0.5 * 1.4426950408889634
    rotation = rotation_of(head_dim, query.device)
    fixed = (
        pages,
        page_table,
        context_lens,
        sums,
        maxima,
        totals,
        scale,
        pages.shape[1],
        max_pages,
        num_splits,
    )
    grid = (batch * num_kv_heads, num_splits)
    if codec == "int4_hadamard":
        block = reference.block_of(head_dim)
        attend_int4_kernel[grid](
            query, rotation, *fixed, num_kv_heads, group, head_dim, block, rows_block, num_warps=4
        )
    else:
        count, groups = reference.outlier_count(codec, head_dim), reference.groups_of(head_dim)
        attend_gear_kernel[grid](
            query,
            *fixed,
            num_kv_heads,
            group,
            head_dim,
            codec == "gear",
            count,
            groups,
            rows_block,
            num_warps=4,
        )
    merge_kernel[(batch * num_kv_heads,)](
        query,
        rotation,
        context_lens,
        *tail,
        sums,
        maxima,
        totals,
        out,
        scale,
        num_splits,
        num_kv_heads,
        group,
        head_dim,
        rows_block,
        codec == "int4_hadamard",
        num_warps=4,
    )
    return out


@cache
def rotation_of(head_dim: int, device: torch.device) -> torch.Tensor:
    """[head_dim, head_dim] fp32: what the pages' channels were multiplied by."""
    return reference.rotate(torch.eye(head_dim)).to(device)
