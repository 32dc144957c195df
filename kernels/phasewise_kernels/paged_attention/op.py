"""Paged attention on the CPU, by torch's scaled dot-product attention over gathered K and V.

What depends on the batch alone (which slots to read, which scores to mask) is worked out once per step,
in `AttentionBatch.build`; `paged_attention` then runs once per layer.

Only slots that hold a token are ever read: padding reads a token of the same sequence again. So whatever
unused slots contain, NaN included, cannot reach the output.

Sequences with one new token are computed together, those of similar length in one call (`_DecodeGroup`);
a sequence with more is one call (`_PrefillChunk`). With grouped-query attention the query heads that
share a KV head become further query rows of it, so that K and V are never repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one new token, whose context lengths differ by less than a factor of two."""

    #: Rows of query, [group_size] int64.
    rows: torch.Tensor
    #: Slots to read, [group_size * max_context] int64, sequence by sequence.
    slots: torch.Tensor
    #: 0 or -inf to add to the scores, [group_size, 1, 1, max_context] float32; None when nothing is padded.
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    """A sequence with several new tokens, which are query[first_row : first_row + query_len]."""

    first_row: int
    query_len: int
    #: Slots to read, [context] int64.
    slots: torch.Tensor
    #: 0 or -inf to add to the scores, [query_len, context] float32.
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Who attends to what in one step."""

    num_tokens: int
    decode_groups: tuple[_DecodeGroup, ...]
    prefill_chunks: tuple[_PrefillChunk, ...]

    @classmethod
    def build(
        cls,
        *,
        block_tables: Sequence[Sequence[int]],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_size: int,
    ) -> "AttentionBatch":
        """Arguments as in the reference; every sequence has 1 <= query_len <= context_len.

        Raises ValueError when a block table is too short for its context, or lengths make no sense.
        """
        chunks: list[_PrefillChunk] = []
        decodes: dict[int, list[tuple[int, torch.Tensor]]] = {}
        row = 0
        for block_table, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True):
            if not 1 <= query_len <= context_len:
                raise ValueError(f"{query_len} new tokens in a context of {context_len}")
            slots = _slots(block_table, context_len, block_size)
            if query_len == 1:
                decodes.setdefault(context_len.bit_length(), []).append((row, slots))
            else:
                chunks.append(_PrefillChunk(row, query_len, slots, _causal_mask(query_len, context_len)))
            row += query_len
        groups = tuple(_decode_group(members) for _, members in sorted(decodes.items()))
        return cls(row, groups, tuple(chunks))


def paged_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch
) -> torch.Tensor:
    """Attention of the new tokens of `batch`; the K and V of these are in the cache already.

    query: [num_tokens, num_heads, head_dim]; k_cache, v_cache: [num_blocks, block_size, num_kv_heads,
    head_dim], contiguous. All float32 on the CPU; num_heads is a multiple of num_kv_heads.
    Returns [num_tokens, num_heads, head_dim]. Raises ValueError when `batch` is of another size.
    """
    if query.shape[0] != batch.num_tokens:
        raise ValueError(f"query has {query.shape[0]} tokens, the batch {batch.num_tokens}")
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    output = torch.empty_like(query)
    for group in batch.decode_groups:
        output[group.rows] = _decode(query[group.rows], keys, values, group)
    for chunk in batch.prefill_chunks:
        rows = slice(chunk.first_row, chunk.first_row + chunk.query_len)
        output[rows] = _prefill(query[rows], keys, values, chunk)
    return output


def _slots(block_table: Sequence[int], context_len: int, block_size: int) -> torch.Tensor:
    """Slot of each token of a context, [context_len] int64."""
    num_blocks = -(-context_len // block_size)
    if len(block_table) < num_blocks:
        raise ValueError(
            f"{context_len} tokens need {num_blocks} blocks; the block table has {len(block_table)}"
        )
    first_slots = torch.tensor(block_table[:num_blocks], dtype=torch.int64) * block_size
    return (first_slots[:, None] + torch.arange(block_size)).flatten()[:context_len]


def _causal_mask(query_len: int, context_len: int) -> torch.Tensor:
    """Query i, at position context_len - query_len + i, sees the positions up to its own."""
    future = torch.ones(query_len, context_len, dtype=torch.bool).triu(context_len - query_len + 1)
    return torch.zeros(query_len, context_len).masked_fill_(future, float("-inf"))


def _decode_group(members: Sequence[tuple[int, torch.Tensor]]) -> _DecodeGroup:
    """Pad the slots of each member to the longest with its own first slot, and mask that."""
    rows = torch.tensor([row for row, _ in members], dtype=torch.int64)
    lengths = torch.tensor([len(slots) for _, slots in members])
    max_context = int(lengths.max())
    padded = torch.stack(
        [F.pad(slots, (0, max_context - len(slots)), value=int(slots[0])) for _, slots in members]
    )
    if bool((lengths == max_context).all()):
        return _DecodeGroup(rows, padded.flatten(), None)
    beyond = torch.arange(max_context) >= lengths[:, None]
    mask = torch.zeros(beyond.shape).masked_fill_(beyond, float("-inf"))
    return _DecodeGroup(rows, padded.flatten(), mask[:, None, None, :])


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _DecodeGroup
) -> torch.Tensor:
    """query: [group_size, num_heads, head_dim]; keys, values: [num_slots, num_kv_heads, head_dim]."""
    group_size, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    # [group_size, num_kv_heads, max_context, head_dim]
    gathered_keys, gathered_values = (
        cache.index_select(0, group.slots).view(group_size, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (keys, values)
    )
    # [group_size, num_kv_heads, heads that share a KV head, head_dim]
    grouped_query = query.view(group_size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    attended = F.scaled_dot_product_attention(
        grouped_query, gathered_keys, gathered_values, attn_mask=group.mask
    )
    return attended.reshape(group_size, num_heads, head_dim)


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: _PrefillChunk
) -> torch.Tensor:
    """query: [query_len, num_heads, head_dim]; keys, values: [num_slots, num_kv_heads, head_dim]."""
    query_len, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    # [num_kv_heads, 1, context, head_dim]: each KV head is a batch entry for the query heads that share it.
    gathered_keys, gathered_values = (
        cache.index_select(0, chunk.slots).transpose(0, 1)[:, None] for cache in (keys, values)
    )
    shared = num_heads // num_kv_heads
    # [num_kv_heads, shared, query_len, head_dim]
    grouped_query = query.view(query_len, num_kv_heads, shared, head_dim).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(
        grouped_query,
        gathered_keys.expand(-1, shared, -1, -1),
        gathered_values.expand(-1, shared, -1, -1),
        attn_mask=chunk.mask,
    )
    return attended.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim)
