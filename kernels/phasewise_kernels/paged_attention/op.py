"""Paged attention on the CPU; a batch for a GPU goes to `cuda.py`.

What depends on the batch alone (what to read, which scores to mask) is worked out once per step and window, by
`AttentionBatch`; `paged_attention` then runs once per layer. Sequences with one new token are read in place, by
`kernel.py`; where that is not to be had, and for sequences with more new tokens, K and V are gathered for torch,
by `torch_path.py`: what gathering costs is little beside the arithmetic of many rows.

Whatever unused slots contain, NaN included, cannot reach the output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from phasewise_kernels import jit
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch, paged_attention_cuda
from phasewise_kernels.paged_attention.padded import paged_attention_padded
from phasewise_kernels.paged_attention.torch_path import (
    Chunk,
    DecodeGroup,
    attend_chunk,
    attend_group,
    chunk,
    decode_groups,
)
from phasewise_kernels.threads import run_parts

#: Less than this to read is not worth waking other threads for.
MIN_SHARED_BYTES = 1 << 18
#: Longest part of a context that one thread reads on its own.
ITEM_TOKENS = 256
#: Keys and values come in float32.
_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who reads what under one window."""

    #: For the kernel, see there; [num_items, 4] int64.
    items: NDArray[np.int64]
    #: Tokens of all items before each, and of all; [num_items + 1] int64.
    item_tokens: NDArray[np.int64]
    #: The same sequences for torch, made when first needed.
    groups: list[DecodeGroup]
    chunks: list[Chunk]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Who attends to what in one step. Make it by `build`."""

    num_tokens: int
    block_size: int
    block_tables: NDArray[np.int32]
    query_lens: NDArray[np.int64]
    context_lens: NDArray[np.int64]
    tree_masks: Mapping[int, NDArray[np.bool_]]
    _plans: dict[int, _Plan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        *,
        block_tables: NDArray[np.int32],
        query_lens: NDArray[np.int64],
        context_lens: NDArray[np.int64],
        block_size: int,
        tree_masks: Mapping[int, NDArray[np.bool_]] | None = None,
    ) -> "AttentionBatch":
        """Arguments as in the reference; every sequence has 1 <= query_len <= context_len.

        block_tables: [num_sequences, at least the blocks of the longest context] int32, padded with anything.
        query_lens, context_lens: [num_sequences] int64. No argument may be changed while the batch is in use.
        Raises ValueError when a block table is too short for its context, lengths make no sense, or a tree
        mask is of the wrong shape or lets a token not see itself.
        """
        is_senseless = (query_lens < 1) | (query_lens > context_lens)
        if is_senseless.any():
            worst = int(np.argmax(is_senseless))
            raise ValueError(f"{query_lens[worst]} new tokens in a context of {context_lens[worst]}")
        longest = int(context_lens.max(initial=0))
        if -(-longest // block_size) > block_tables.shape[1]:
            raise ValueError(
                f"{longest} tokens need {-(-longest // block_size)} blocks; "
                f"the block table has {block_tables.shape[1]}"
            )
        for sequence, mask in (tree_masks or {}).items():
            query_len = int(query_lens[sequence])
            if mask.shape != (query_len, query_len):
                raise ValueError(f"a tree mask of {mask.shape} for {query_len} new tokens")
            if not mask.diagonal().all():
                raise ValueError("a token of a tree does not see itself")
        return cls(
            int(query_lens.sum()),
            block_size,
            np.ascontiguousarray(block_tables, np.int32),
            query_lens,
            context_lens,
            dict(tree_masks or {}),
        )

    def plan(self, window: int) -> _Plan:
        """What `paged_attention` needs, made at the first call for this window."""
        if window not in self._plans:
            self._plans[window] = self._new_plan(window)
        return self._plans[window]

    def _new_plan(self, window: int) -> _Plan:
        first_rows = np.cumsum(self.query_lens) - self.query_lens
        decodes = np.flatnonzero(self.query_lens == 1)
        highs = self.context_lens[decodes]
        lows = np.maximum(highs - window, 0) if window else np.zeros_like(highs)
        items = decode_items(first_rows[decodes], decodes, lows, highs)
        item_tokens = np.concatenate((np.zeros(1, np.int64), np.cumsum(items[:, 3] - items[:, 2])))
        groups: list[DecodeGroup] = []
        if len(decodes) and _kernel() is None:
            groups = decode_groups(
                first_rows[decodes], self.block_tables[decodes], lows, highs, self.block_size
            )
        chunks = [
            chunk(
                int(first_rows[sequence]),
                int(self.query_lens[sequence]),
                int(self.context_lens[sequence]),
                self.block_tables[sequence],
                self.block_size,
                window=window,
                tree_mask=self.tree_masks.get(int(sequence)),
            )
            for sequence in np.flatnonzero(self.query_lens > 1)
        ]
        return _Plan(items, item_tokens, groups, chunks)


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch | CudaAttentionBatch,
    *,
    window: int = 0,
) -> torch.Tensor:
    """Attention of the new tokens of `batch`; the K and V of these are in the cache already.

    query: [num_tokens, num_heads, head_dim]; k_cache, v_cache: [num_blocks, block_size, num_kv_heads,
    head_dim], contiguous. All float32 on the CPU; on a GPU as `cuda.py` takes them. num_heads is a
    multiple of num_kv_heads.
    window > 0: a query at position p sees positions p - window + 1 to p; 0: all up to p. In a tree a token's
    position is that of its parent plus one.
    Returns [num_tokens, num_heads, head_dim]. Raises ValueError when `batch` is of another size.
    """
    if isinstance(batch, CudaAttentionBatch):
        compute = paged_attention_cuda if query.is_cuda else paged_attention_padded
        return compute(query, k_cache, v_cache, batch, window=window)
    if query.shape[0] != batch.num_tokens:
        raise ValueError(f"query has {query.shape[0]} tokens, the batch {batch.num_tokens}")
    plan = batch.plan(window)
    output = torch.empty(query.shape)
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    if plan.groups:
        for group in plan.groups:
            output[group.rows] = attend_group(query[group.rows], keys, values, group)
    elif len(plan.items):
        _attend_in_place(query, k_cache, v_cache, batch, plan, output)
    for part in plan.chunks:
        rows = slice(part.first_row, part.first_row + part.query_len)
        output[rows] = attend_chunk(query[rows], keys, values, part)
    return output


def decode_items(
    rows: NDArray[np.int64],
    sequences: NDArray[np.int64],
    lows: NDArray[np.int64],
    highs: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Cut positions lows[i]..highs[i]-1 of each row at multiples of ITEM_TOKENS; [num_items, 4], see kernel.py."""
    first_cuts = lows // ITEM_TOKENS
    counts = -(-highs // ITEM_TOKENS) - first_cuts
    owners = np.repeat(np.arange(len(rows)), counts)
    cuts = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts) + first_cuts[owners]
    items = np.empty((len(owners), 4), np.int64)
    items[:, 0], items[:, 1] = rows[owners], sequences[owners]
    items[:, 2] = np.maximum(lows[owners], cuts * ITEM_TOKENS)
    items[:, 3] = np.minimum(highs[owners], (cuts + 1) * ITEM_TOKENS)
    return items


def _kernel() -> object | None:
    found: object | None = jit.load(jit.KERNEL_MODULES[1])
    return found


def _attend_in_place(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    plan: _Plan,
    output: torch.Tensor,
) -> None:
    """Write the rows of plan.items."""
    module = jit.load(jit.KERNEL_MODULES[1])
    num_items, (num_heads, head_dim) = len(plan.items), query.shape[1:]
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    largest = np.empty((num_items, num_heads), np.float32)
    weight_sums = np.empty((num_items, num_heads), np.float32)
    partial = np.empty((num_items, num_heads, head_dim), np.float32)
    fixed = (
        query.contiguous().numpy(),
        k_cache.numpy(),
        v_cache.numpy(),
        batch.block_tables,
        plan.items,
        np.float32(head_dim**-0.5),
        largest,
        weight_sums,
        partial,
        ITEM_TOKENS,
    )
    num_tokens = int(plan.item_tokens[-1])
    num_parts = min(torch.get_num_threads(), num_items)
    if num_tokens * k_cache.shape[2] * head_dim * 2 * _BYTES < MIN_SHARED_BYTES:
        num_parts = 1
    # Where the tokens are shared out evenly.
    goals = [num_tokens * i // num_parts for i in range(1, num_parts)]
    ends = [0, *np.searchsorted(plan.item_tokens, goals).tolist(), num_items]
    run_parts(module.attend, [(*fixed, first, last) for first, last in pairwise(ends)])
    module.merge(plan.items, largest, weight_sums, partial, output.numpy())
