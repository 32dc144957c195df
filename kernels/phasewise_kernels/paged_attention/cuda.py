"""Stand-in until the kernels are here."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CudaAttentionBatch:
    """Who attends to what in one step."""

    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_size: int
    num_tokens: int
    max_query_len: int
    max_context_len: int


def paged_attention_cuda(query, k_cache, v_cache, batch, *, window=0, out=None):  # type: ignore[no-untyped-def]
    from phasewise_kernels.paged_attention.device import attend_padded

    return attend_padded(query, k_cache, v_cache, batch, window=window, out=out)
