"""Two launches: parts of each sequence's pages by programs of their own, then the sum of the parts.

    attend   a program has one KV head and a run of pages, each of its warps a page at a time
    merge    one KV head: the parts, rescaled to one maximum; rotated back; and the tail, which is not packed

`attend` is in `int4_triton.py` and `gear_triton.py`; what they share is in `packed_triton.py`.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from phasewise_kernels.kv_codec import reference
from phasewise_kernels.kv_codec.reference import PageCodec
from phasewise_kernels.kv_codec.triton_kernel import PAGE
from phasewise_kernels.quantised_attention.gear_triton import attend_gear_kernel
from phasewise_kernels.quantised_attention.int4_triton import attend_int4_kernel
from phasewise_kernels.quantised_attention.packed_triton import finite, jit

#: Of `attend`, whose registers leave room for no more.
WARPS_PER_SM = 8
NUM_STAGES = 3


@jit
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
    block: tl.constexpr,
    num_rows: tl.constexpr,
    rows_block: tl.constexpr,
    splits_block: tl.constexpr,
    is_rotated: tl.constexpr,
):
    """Programs: [batch * num_kv_heads, group / num_rows]. splits_block: parts that are added at once."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    channels, tokens = tl.arange(0, head_dim), tl.arange(0, PAGE)
    is_of_program = tl.arange(0, rows_block) < num_rows
    rows = tl.program_id(1) * num_rows + tl.arange(0, rows_block)
    is_row = is_of_program[:, None]
    rest = tl.load(context_lens + sequence) % PAGE
    start = (sequence * num_kv_heads + head) * group + rows
    highest = tl.full([rows_block], -float("inf"), tl.float32)
    total = tl.zeros([rows_block], tl.float32)
    summed = tl.zeros([rows_block, head_dim], tl.float32)
    for first in tl.range(0, num_splits, splits_block):
        split = first + tl.arange(0, splits_block)
        is_there = (split < num_splits)[:, None] & is_of_program[None, :]
        # [splits_block, rows_block]
        part = ((tl.program_id(0) * num_splits).to(tl.int64) + split)[:, None] * group + rows[None, :]
        own_highest = tl.load(maxima + part, mask=is_there, other=-float("inf"))
        own_total = tl.load(totals + part, mask=is_there, other=0.0)
        at = sums + part[:, :, None] * head_dim + channels[None, None, :]
        own = tl.load(at, mask=is_there[:, :, None], other=0.0)
        new_highest = tl.maximum(highest, tl.max(own_highest, axis=0))
        kept = tl.exp2(highest - finite(new_highest))
        added = tl.exp2(own_highest - finite(new_highest)[None, :])
        total = total * kept + tl.sum(own_total * added, axis=0)
        summed = summed * kept[:, None] + tl.sum(own * added[:, :, None], axis=0)
        highest = new_highest
    if is_rotated:
        # A block of channels is a row. The rotation is its own inverse.
        of_block = tl.arange(0, block)
        turn = tl.load(rotation + of_block[:, None] * head_dim + of_block[None, :])
        blocks = tl.reshape(summed, [rows_block * (head_dim // block), block])
        blocks = tl.dot(blocks, turn, input_precision="tf32x3")
        summed = tl.reshape(blocks, [rows_block, head_dim])
    if rest > 0:
        q = tl.load(query + start[:, None] * head_dim + channels[None, :], mask=is_row, other=0.0)
        at = ((sequence * PAGE + tokens) * num_kv_heads + head)[:, None] * head_dim + channels[None, :]
        is_token = (tokens < rest)[:, None]
        k = tl.load(k_tail + at, mask=is_token, other=0.0)
        v = tl.load(v_tail + at, mask=is_token, other=0.0)
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="tf32x3") * scale
        scores = tl.where((tokens < rest)[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_highest[:, None])
        kept = tl.exp2(highest - new_highest)
        total = total * kept + tl.sum(p, axis=1)
        summed = summed * kept[:, None] + tl.dot(p, v.to(tl.float32), input_precision="tf32x3")
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
    *,
    is_plain: bool = False,
) -> torch.Tensor:
    """As the op, on the current stream. The number of programs depends on shapes alone.

    is_plain: without instructions that Triton's interpreter does not know.
    """
    batch, num_heads, head_dim = query.shape
    num_kv_heads = tail[0].shape[2]
    group = num_heads // num_kv_heads
    out = torch.empty_like(query)
    if not batch:
        return out
    max_pages = page_table.shape[1]
    # Fewer parts of a sequence are fewer to merge; warps of one program wait for each other now and then.
    num_warps = 4 if batch * num_kv_heads < num_sms else 2
    num_programs = num_sms * WARPS_PER_SM // num_warps
    num_splits = max(1, min(num_programs // (batch * num_kv_heads), -(-max_pages // num_warps)))
    parts = (batch, num_kv_heads, num_splits, group)
    sums = torch.empty(*parts, head_dim, dtype=torch.float32, device=query.device)
    maxima, totals = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    # Scores are exponents of 2.
    scale = head_dim**-0.5 * 1.4426950408889634
    rotation = rotation_of(head_dim, query.device)
    block = reference.block_of(head_dim)
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
        num_kv_heads,
        group,
        head_dim,
    )
    width = max(8, triton.next_power_of_2(group))
    how = (width, num_warps, NUM_STAGES, is_plain or query.device.type == "cpu")
    grid = (batch * num_kv_heads, num_splits)
    if codec == "int4_hadamard":
        attend_int4_kernel[grid](query, rotation, *fixed, block, *how, num_warps=num_warps)
    else:
        groups = reference.groups_of(head_dim)
        attend_gear_kernel[grid](
            query,
            numbers_of(head_dim, query.device),
            *fixed,
            groups,
            codec == "gear",
            *how,
            num_warps=num_warps,
        )
    # Where there are few sequences, more programs share the parts of each.
    num_rows = 1 if batch * num_kv_heads < num_sms else group
    rows_block = triton.next_power_of_2(num_rows)
    merge_kernel[(batch * num_kv_heads, group // num_rows)](
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
        block,
        num_rows,
        rows_block,
        max(1, min(triton.next_power_of_2(num_splits), 64 // rows_block)),
        codec == "int4_hadamard",
        num_warps=8,
    )
    return out


@cache
def rotation_of(head_dim: int, device: torch.device) -> torch.Tensor:
    """[head_dim, head_dim] fp32: what the pages' channels were multiplied by."""
    return reference.rotate(torch.eye(head_dim), reference.block_of(head_dim)).to(device)


@cache
def numbers_of(head_dim: int, device: torch.device) -> torch.Tensor:
    """[head_dim] fp16: 0, 1, 2 and so on."""
    return torch.arange(head_dim).half().to(device)
