"""Pools of the shape that tests of CUDA IPC use."""

from dataclasses import replace

import torch

from kvtransfer.layout import INT4, KvLayout
from kvtransfer.pool import KvSpan, span_of
from phasewise_kernels.block_copy.reference import convert
from phasewise_kernels.kv_int4.op import PACKED_DTYPE, unpack_kv
from tests.support.block_copy_pools import random_pool

NUM_LAYERS = 3
NUM_BLOCKS = 12


def layout_of(
    dtype: str, block_size: int = 16, heads: tuple[int, int] = (0, 3), head_dim: int = 32
) -> KvLayout:
    """Of a model with 4 KV heads."""
    return KvLayout("digest", dtype, block_size, NUM_LAYERS, 4, head_dim, "rope:theta=10000", *heads)


def pool_tensor(layout: KvLayout, seed: int) -> torch.Tensor:
    """Random, on the CPU; the same in every process for the same seed."""
    if layout.dtype == INT4:
        return convert(pool_tensor(replace(layout, dtype="float32"), seed), PACKED_DTYPE)
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
    kept = kept_in(kv_cache, layout, span)
    return unpack_kv(kept) if kept.dtype == PACKED_DTYPE else kept.float()


def kept_in(kv_cache: torch.Tensor, layout: KvLayout, span: KvSpan) -> torch.Tensor:
    """The same in the dtype of the pool."""
    first_head = layout.heads[0]
    heads = slice(span.head_lo - first_head, span.head_hi - first_head)
    cache = kv_cache.cpu()[span.layer_lo : span.layer_hi]
    places = range(span.first_token, span.first_token + span.num_tokens)
    size = layout.block_size
    rows = [cache[:, :, span.block_ids[i // size], i % size, heads] for i in places]
    # As bytes: not every dtype can be stacked.
    return torch.stack([one.contiguous().view(torch.uint8) for one in rows], dim=2).view(cache.dtype)
