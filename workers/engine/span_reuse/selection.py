"""Which reused tokens are computed again: those whose reuse distorts attention most.

Source: KVShare (arXiv 2503.16525), Dual-Stage High Deviation, of which this is the prefill stage.
"""

import math

import torch

from workers.engine.span_reuse.rule import num_recomputed
from workers.model.selective import CheckedLayer, Choose, is_seen

#: Scores of so many queries are in memory at once.
QUERY_BLOCK = 128


def by_deviation(fraction: float) -> Choose:
    """Choose this part of the reused tokens, 0 to 1, those of the highest `deviation`."""
    return lambda checked: highest(deviation(checked), fraction)


def highest(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """Indices of the highest scores, `num_recomputed` of them; [num_tokens] fp32 gives [number] int64."""
    return torch.topk(scores, num_recomputed(len(scores), fraction), sorted=False).indices


def deviation(checked: CheckedLayer) -> torch.Tensor:
    """How much reuse of each token distorts what others read from it, [num_reused] fp32, at least 0.

    The attention that a token gets, times how far its reused V is from the computed one (L1). 0 for a token that has
    the same context as where its KV was computed.
    """
    return attention_mass(checked) * v_deviation(checked)


def v_deviation(checked: CheckedLayer) -> torch.Tensor:
    """L1 distance of reused and computed V, [num_reused]."""
    return (checked.v_computed - checked.v_reused).abs().sum(dim=(1, 2))


def attention_mass(checked: CheckedLayer) -> torch.Tensor:
    """What each reused token gets of the attention of all tokens of the batch, mean of all heads, [num_reused].

    Computed by blocks of queries: the whole matrix is never in memory.
    """
    batch, query = checked.batch, checked.query
    num_heads, head_dim = query.shape[1:]
    keys = checked.keys.transpose(0, 1)
    num_kv_heads = len(keys)
    places = torch.arange(batch.context_len)
    mass = torch.zeros(batch.context_len)
    for first in range(0, len(query), QUERY_BLOCK):
        rows = query[first : first + QUERY_BLOCK]
        seen = is_seen(batch.positions[first : first + QUERY_BLOCK], places, checked.window)
        # Query heads that share a KV head are further rows of it: [num_kv_heads, heads that share * rows, head_dim].
        grouped = rows.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        scores = (grouped @ keys.transpose(1, 2)).mul_(1 / math.sqrt(head_dim))
        scores.view(num_heads, len(rows), -1).masked_fill_(~seen, float("-inf"))
        mass += scores.softmax(dim=-1).sum(dim=(0, 1))
    return mass[batch.reused.positions] / num_heads
