"""Attention of a batch whose lengths are tensors: what the engine's padded batches compute on a CPU."""

import numpy as np
import pytest
import torch

from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch
from phasewise_kernels.paged_attention.op import paged_attention
from phasewise_kernels.paged_attention.padded import tree_mask_bits
from phasewise_kernels.paged_attention.reference import paged_attention_reference
from phasewise_kernels.testing import ATTENTION_TOLERANCES, assert_close

BLOCK_SIZE, NUM_BLOCKS = 4, 40
#: New tokens and context of each sequence; 0 is padding.
LENS = ((1, 9), (5, 5), (3, 17), (1, 1), (4, 11))
TREE = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("has_tree", [False, True])
@pytest.mark.parametrize("num_padding", [0, 3])
def test_it_equals_the_reference(window: int, has_tree: bool, num_padding: int) -> None:
    generator = torch.Generator().manual_seed(window + num_padding)
    num_tokens = sum(new for new, _ in LENS)
    query = torch.randn(num_tokens + num_padding, 6, 8, generator=generator)
    caches = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, 2, 8, generator=generator)
    order = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    width = 5
    tables = [order[i * width : (i + 1) * width] for i in range(len(LENS))]
    used = {
        table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
        for table, (_, n) in zip(tables, LENS, strict=True)
        for i in range(n)
    }
    unused = [i for i in range(NUM_BLOCKS * BLOCK_SIZE) if i not in used]
    caches.flatten(1, 2)[:, unused] = float("nan")
    masks = {len(LENS) - 1: TREE} if has_tree else {}
    expected = paged_attention_reference(
        query[:num_tokens],
        caches[0],
        caches[1],
        block_tables=tables,
        query_lens=[new for new, _ in LENS],
        context_lens=[context for _, context in LENS],
        tree_masks=masks,
        window=window,
    )
    bits = torch.zeros(num_tokens + num_padding, dtype=torch.int64)
    if has_tree:
        bits[num_tokens - 4 : num_tokens] = tree_mask_bits(torch.tensor(TREE, dtype=torch.bool))
    padding = [1] * num_padding
    starts = np.cumsum([0, *(new for new, _ in LENS), *padding])
    batch = CudaAttentionBatch(
        torch.tensor([*tables, *([0] * width for _ in padding)], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([*(context for _, context in LENS), *(0 for _ in padding)], dtype=torch.int32),
        BLOCK_SIZE,
        num_tokens + num_padding,
        5,
        17,
        tree_masks=bits if has_tree else None,
    )
    given = paged_attention(query, caches[0], caches[1], batch, window=window)
    assert_close(given[:num_tokens], expected, ATTENTION_TOLERANCES[torch.float32])
    assert not given[num_tokens:].any()
