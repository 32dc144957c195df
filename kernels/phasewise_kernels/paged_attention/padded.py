"""What `cuda.py` computes, by torch alone and on any device: the reference of a batch whose lengths are tensors."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from phasewise_kernels.kv_int4.op import values_of
from phasewise_kernels.paged_attention.cuda import MAX_TREE_TOKENS, CudaAttentionBatch


def paged_attention_padded(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    *,
    window: int = 0,
) -> torch.Tensor:
    """Arguments as in `paged_attention_cuda`. K and V of all sequences are gathered; rows of padding become 0."""
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    device = query.device
    starts, contexts = batch.query_starts.long(), batch.context_lens.long()
    rows = torch.arange(num_tokens, device=device)
    owners = torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp(max=len(contexts) - 1)
    prefix_lens = contexts - (starts[1:] - starts[:-1])
    is_row = (rows < starts[-1]) & (contexts[owners] > 0)
    places = torch.arange(max(batch.max_context_len, 1), device=device)
    slots = batch.block_tables.long()[:, places // block_size].clamp(min=0) * block_size + places % block_size
    is_known = (places[None] < contexts[:, None])[:, :, None, None]
    keys, values = (
        torch.where(is_known, values_of(cache.flatten(0, 1)[slots], query.dtype), 0)
        for cache in (k_cache, v_cache)
    )
    # Position of each row, and of each place of its sequence: in a tree they are not those in memory.
    positions = prefix_lens[owners] + rows - starts[owners]
    seen = places[None] <= positions[:, None]
    place_positions = places.expand(num_tokens, -1)
    if batch.tree_masks is not None:
        masks = batch.tree_masks
        new = places[None] - prefix_lens[owners, None]
        bits = (masks[:, None] >> new.clamp(0, MAX_TREE_TOKENS - 1)) & 1
        is_tree = (masks != 0)[:, None]
        seen = torch.where(is_tree & (new >= 0), (bits == 1) & (new < MAX_TREE_TOKENS), seen)
        sizes = ((masks[:, None] >> torch.arange(MAX_TREE_TOKENS, device=device)) & 1).sum(dim=1)
        positions = torch.where(is_tree[:, 0], prefix_lens[owners] + sizes - 1, positions)
        row_of_place = (starts[owners, None] + new).clamp(0, num_tokens - 1)
        place_positions = torch.where(is_tree & (new >= 0), positions[row_of_place], place_positions)
    if window:
        seen = seen & (place_positions > positions[:, None] - window)
    # Something has to be seen, or a row of padding is no number.
    mask = (seen | ~is_row[:, None])[:, None, None]
    shared = num_heads // num_kv_heads
    attended = F.scaled_dot_product_attention(
        query.reshape(num_tokens, num_kv_heads, shared, head_dim),
        keys[owners].transpose(1, 2),
        values[owners].transpose(1, 2),
        attn_mask=mask.expand(-1, num_kv_heads, shared, -1),
    ).reshape(num_tokens, num_heads, head_dim)
    return torch.where(is_row[:, None, None], attended, 0)


def tree_mask_bits(mask: torch.Tensor) -> torch.Tensor:
    """[n, n] bool, row sees column, as CudaAttentionBatch has it: [n] int64. n is at most MAX_TREE_TOKENS."""
    weights = torch.ones(mask.shape[1], dtype=torch.int64) << torch.arange(mask.shape[1])
    return (mask.long() * weights).sum(dim=1)
