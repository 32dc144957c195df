"""What happens to KV blocks beside steps, the same on each rank."""

from collections.abc import Mapping

import torch


def copy_blocks(kv_cache: torch.Tensor, blocks: Mapping[int, int]) -> None:
    """kv_cache: [num_layers, 2, num_blocks, block_size, heads, head_dim]; blocks: target -> source, in this order."""
    for target, source in blocks.items():
        kv_cache[:, :, target] = kv_cache[:, :, source]


def move_slots(kv_cache: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor) -> None:
    """targets, sources: block * block_size + place in it, [num_slots] int64 on the CPU."""
    flat = kv_cache.flatten(2, 3)
    # The right side is a copy, so that no row is overwritten before it is read.
    flat[:, :, targets] = flat[:, :, sources]
