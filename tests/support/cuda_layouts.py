"""Pools of the shape that tests of CUDA IPC use."""

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan, span_of
from tests.support.block_copy_pools import random_pool

NUM_LAYERS = 3
NUM_BLOCKS = 12


def layout_of(dtype: str, block_size: int = 16, heads: tuple[int, int] = (0, 3)) -> KvLayout:
    """Of a model with 4 KV heads of 32 elements."""
    return KvLayout("digest", dtype, block_size, NUM_LAYERS, 4, 32, "rope:theta=10000", *heads)


def pool_tensor(layout: KvLayout, seed: int) -> torch.Tensor:
    """Random, on the CPU; the same in every process for the same seed."""
    return random_pool(
        getattr(torch, layout.dtype),
        num_layers=layout.num_layers,
        num_blocks=NUM_BLOCKS,
        block_size=layout.block_size,
        num_heads=layout.num_heads,
        head_dim=layout.head_dim,
        seed=seed,
    )


def a_span(
    layout: KvLayout, tokens: tuple[int, int] = (3, 40), *, seed: int = 0, heads: tuple[int, int] = (1, 3)
) -> KvSpan:
    """Some tokens in layers 1 and 2, of a sequence in shuffled blocks."""
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    return span_of(blocks, layout.block_size, tokens=tokens, layers=(1, 3), heads=heads)


def values_in(kv_cache: torch.Tensor, layout: KvLayout, span: KvSpan) -> torch.Tensor:
    """[num_layers, 2, num_tokens, num_heads, head_dim] float32 on the CPU, by indexing token for token."""
    first_head = layout.heads[0]
    heads = slice(span.head_lo - first_head, span.head_hi - first_head)
    cache = kv_cache.cpu().float()[span.layer_lo : span.layer_hi]
    places = range(span.first_token, span.first_token + span.num_tokens)
    size = layout.block_size
    return torch.stack([cache[:, :, span.block_ids[i // size], i % size, heads] for i in places], dim=2)
