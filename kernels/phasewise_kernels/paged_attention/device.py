"""Paged attention of a batch whose shape is in tensors beside the cache, as a GPU reads it.

On a GPU the kernels of `cuda.py` compute it; on a CPU, and for rows of draft trees, torch does. Rows beyond those of
the sequences and sequences without tokens are padding: what comes out there means nothing, and is finite.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch, paged_attention_cuda
from phasewise_kernels.paged_attention.torch_path import Chunk, attend_chunk, chunk


@dataclass(frozen=True, slots=True)
class Tree:
    """The new tokens of a sequence that see each other by a mask."""

    first_row: int
    query_len: int
    context_len: int
    #: [at least the blocks of context_len] int32.
    block_table: NDArray[np.int32]
    #: [query_len, query_len], row sees column.
    mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class DeviceAttentionBatch:
    """Who attends to what in one step.

    padded: all sequences, on the device of the cache. trees: those of them that have a mask; their rows are computed again.
    """

    padded: CudaAttentionBatch
    trees: tuple[Tree, ...] = ()
    _chunks: dict[int, list[Chunk]] = field(default_factory=dict, compare=False, repr=False)

    def chunks(self, window: int) -> list[Chunk]:
        """The trees for torch, made at the first call for this window."""
        if window not in self._chunks:
            self._chunks[window] = [_on_device(one, self.padded, window) for one in self.trees]
        return self._chunks[window]


def attend(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: DeviceAttentionBatch,
    *,
    window: int = 0,
) -> torch.Tensor:
    """As `op.paged_attention`, for tensors of any floating-point dtype on one device."""
    compute = paged_attention_cuda if query.is_cuda else attend_padded
    output = compute(query, k_cache, v_cache, batch.padded, window=window)
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    for part in batch.chunks(window):
        rows = slice(part.first_row, part.first_row + part.query_len)
        output[rows] = attend_chunk(query[rows], keys, values, part)
    return output


def attend_padded(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: CudaAttentionBatch,
    *,
    window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by torch alone, without a look at the values: K and V of all sequences are gathered.

    query: [num_tokens, num_heads, head_dim]; of a row of no sequence 0 comes out.
    """
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    device = query.device
    starts, contexts = batch.query_starts.long(), batch.context_lens.long()
    num_sequences = len(contexts)
    rows = torch.arange(num_tokens, device=device)
    owners = torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp(max=num_sequences - 1)
    query_lens = starts[1:] - starts[:-1]
    positions = contexts[owners] - query_lens[owners] + rows - starts[owners]
    is_row = (rows < starts[-1]) & (contexts[owners] > 0)
    places = torch.arange(max(batch.max_context_len, 1), device=device)
    slots = batch.block_tables.long()[:, places // block_size].clamp(min=0) * block_size + places % block_size
    is_known = (places[None] < contexts[:, None])[:, :, None, None]
    keys, values = (
        torch.where(is_known, cache.flatten(0, 1)[slots], 0).to(query.dtype) for cache in (k_cache, v_cache)
    )
    seen = places[None] <= positions[:, None]
    if window:
        seen &= places[None] > positions[:, None] - window
    # Something has to be seen, or a row of padding is no number.
    mask = (seen | ~is_row[:, None])[:, None, None]
    shared = num_heads // num_kv_heads
    attended = F.scaled_dot_product_attention(
        query.view(num_tokens, num_kv_heads, shared, head_dim),
        keys[owners].transpose(1, 2),
        values[owners].transpose(1, 2),
        attn_mask=mask.expand(-1, num_kv_heads, shared, -1),
    ).reshape(num_tokens, num_heads, head_dim)
    attended = torch.where(is_row[:, None, None], attended, 0)
    return attended if out is None else out.copy_(attended)


def _on_device(tree: Tree, batch: CudaAttentionBatch, window: int) -> Chunk:
    made = chunk(
        tree.first_row,
        tree.query_len,
        tree.context_len,
        tree.block_table,
        batch.block_size,
        window=window,
        tree_mask=tree.mask,
    )
    device = batch.context_lens.device
    return Chunk(made.first_row, made.query_len, made.slots.to(device), made.mask.to(device))
