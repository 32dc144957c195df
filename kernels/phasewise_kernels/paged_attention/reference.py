"""The specification of paged attention: plain loops over tokens and heads."""

from collections.abc import Mapping, Sequence

import torch


def paged_attention_reference(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tree_masks: Mapping[int, Sequence[Sequence[bool]]] | None = None,
    window: int = 0,
) -> torch.Tensor:
    """For each new token, softmax(q k / sqrt(head_dim)) v over the tokens that it sees.

    query: [num_tokens, num_heads, head_dim], the new tokens of sequence 0, then of sequence 1, and so on.
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]; the K and V of the new tokens are
    in them already. Token i of a sequence is in slot i % block_size of block block_table[i // block_size].
    query_lens, context_lens: per sequence the new tokens, and all tokens with the new ones.
    A token sees all up to and with itself. tree_masks: by index of sequence, [query_len][query_len], which new
    token (row) sees which (column): itself and its ancestors; each sees all tokens before the new ones.
    window: of these, those with a position above its own minus window; 0 is no limit. In a tree the first new
    token has the position that it has in the cache, and each other that of its parent plus one.
    Query head h reads KV head h // (num_heads // num_kv_heads).
    Returns [num_tokens, num_heads, head_dim] in the dtype of query; computed in fp64.
    """
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    output = torch.zeros_like(query)
    row = 0
    lengths = zip(block_tables, query_lens, context_lens, strict=True)
    for sequence, (block_table, query_len, context_len) in enumerate(lengths):
        prefix_len = context_len - query_len
        mask = (tree_masks or {}).get(sequence) or [
            [j <= i for j in range(query_len)] for i in range(query_len)
        ]
        positions = [*range(prefix_len), *(prefix_len + sum(seen) - 1 for seen in mask)]
        for new in range(query_len):
            own = positions[prefix_len + new]
            seen = [*range(prefix_len), *(prefix_len + j for j in range(query_len) if mask[new][j])]
            if window:
                seen = [i for i in seen if positions[i] > own - window]
            places = [(block_table[i // block_size], i % block_size) for i in seen]
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                keys = torch.stack([k_cache[block, slot, kv_head] for block, slot in places]).double()
                values = torch.stack([v_cache[block, slot, kv_head] for block, slot in places]).double()
                scores = keys @ query[row, head].double() / head_dim**0.5
                output[row, head] = (torch.softmax(scores, dim=0) @ values).to(query.dtype)
            row += 1
    return output
