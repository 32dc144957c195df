"""Paged attention by torch's scaled dot-product attention over gathered K and V.

Sequences with one new token are computed together, those of similar length in one call (`DecodeGroup`);
a sequence with more is one call (`Chunk`). With grouped-query attention the query heads that share a KV head
become further query rows of it, so that K and V are never repeated. Only slots that hold a token are read:
padding reads a token of the same sequence again.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token, whose numbers of tokens to read differ by less than a factor of two."""

    #: Rows of query, [group_size] int64.
    rows: torch.Tensor
    #: Slots to read, [group_size * max_tokens] int64, sequence by sequence.
    slots: torch.Tensor
    #: 0 or -inf to add to the scores, [group_size, 1, 1, max_tokens] float32; None when nothing is padded.
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with several new tokens, which are query[first_row : first_row + query_len]."""

    first_row: int
    query_len: int
    #: Slots to read, [num_read] int64.
    slots: torch.Tensor
    #: 0 or -inf to add to the scores, [query_len, num_read] float32.
    mask: torch.Tensor


def decode_groups(
    rows: NDArray[np.int64],
    block_tables: NDArray[np.int32],
    lows: NDArray[np.int64],
    highs: NDArray[np.int64],
    block_size: int,
) -> list[DecodeGroup]:
    """Row rows[i] reads positions lows[i]..highs[i]-1 of the sequence with block_tables[i]."""
    lengths = highs - lows
    classes = np.frexp(lengths.astype(np.float64))[1]
    groups = []
    for number in np.unique(classes):
        members = np.flatnonzero(classes == number)
        longest = int(lengths[members].max())
        steps = np.arange(longest)
        is_beyond = steps[None] >= lengths[members, None]
        positions = lows[members, None] + np.where(is_beyond, 0, steps[None])
        tables = block_tables[members].astype(np.int64)
        slots = np.take_along_axis(tables, positions // block_size, 1) * block_size + positions % block_size
        mask = _additive(~is_beyond)[:, None, None] if is_beyond.any() else None
        groups.append(DecodeGroup(torch.from_numpy(rows[members]), torch.from_numpy(slots.reshape(-1)), mask))
    return groups


def chunk(
    first_row: int,
    query_len: int,
    context_len: int,
    block_table: NDArray[np.int32],
    block_size: int,
    *,
    window: int,
    tree_mask: NDArray[np.bool_] | None,
) -> Chunk:
    """The new tokens of one sequence; window and tree_mask as in the reference, for this sequence."""
    prefix_len = context_len - query_len
    low = max(0, prefix_len - window + 1) if window else 0
    keys = np.arange(low, context_len)
    queries = np.arange(prefix_len, context_len)
    if tree_mask is None:
        is_seen = keys[None] <= queries[:, None]
    else:
        # A node is one further than its parent, and sees itself and its ancestors.
        depths = prefix_len + tree_mask.sum(axis=1) - 1
        is_seen = np.ones((query_len, len(keys)), np.bool_)
        is_seen[:, prefix_len - low :] = tree_mask
        keys, queries = np.concatenate((keys[: prefix_len - low], depths)), depths
    if window:
        is_seen &= keys[None] > queries[:, None] - window
    places = np.arange(low, context_len)
    slots = block_table.astype(np.int64)[places // block_size] * block_size + places % block_size
    return Chunk(first_row, query_len, torch.from_numpy(slots), _additive(is_seen))


def attend_group(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup
) -> torch.Tensor:
    """query: [group_size, num_heads, head_dim]; keys, values: [num_slots, num_kv_heads, head_dim]."""
    group_size, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    # [group_size, num_kv_heads, max_tokens, head_dim]
    gathered_keys, gathered_values = (
        cache.index_select(0, group.slots).view(group_size, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (keys, values)
    )
    # [group_size, num_kv_heads, heads that share a KV head, head_dim]
    grouped_query = query.reshape(group_size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    attended = F.scaled_dot_product_attention(
        grouped_query, gathered_keys, gathered_values, attn_mask=group.mask
    )
    return attended.reshape(group_size, num_heads, head_dim)


def attend_chunk(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """query: [query_len, num_heads, head_dim]; keys, values: [num_slots, num_kv_heads, head_dim]."""
    query_len, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    # [num_kv_heads, 1, num_read, head_dim]: each KV head is a batch entry for the query heads that share it.
    gathered_keys, gathered_values = (
        cache.index_select(0, chunk.slots).transpose(0, 1)[:, None] for cache in (keys, values)
    )
    shared = num_heads // num_kv_heads
    # [num_kv_heads, shared, query_len, head_dim]
    grouped_query = query.reshape(query_len, num_kv_heads, shared, head_dim).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(
        grouped_query,
        gathered_keys.expand(-1, shared, -1, -1),
        gathered_values.expand(-1, shared, -1, -1),
        attn_mask=chunk.mask,
    )
    return attended.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim)


def _additive(is_seen: NDArray[np.bool_]) -> torch.Tensor:
    return torch.zeros(is_seen.shape).masked_fill_(torch.from_numpy(~is_seen), float("-inf"))
