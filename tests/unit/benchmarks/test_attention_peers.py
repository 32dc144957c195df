"""What other libraries are given of a batch, and what is not reported of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kernels.attention_peers import MAX_ERROR, check, pages_of
from phasewise_kernels.paged_attention.cuda import CudaAttentionBatch

BLOCK_SIZE = 4


@given(st.data(), st.lists(st.integers(1, 5 * BLOCK_SIZE), min_size=1, max_size=6))
def test_flat_tables_name_the_slots_that_block_tables_name(data: st.DataObject, lengths: list[int]) -> None:
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = data.draw(st.permutations(range(sum(counts))))
    # Padding names a block too: it must not be taken for one.
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, piece in zip(tables, torch.tensor(order, dtype=torch.int32).split(counts), strict=True):
        row[: len(piece)] = piece
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    query_starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    batch = CudaAttentionBatch(
        tables, query_starts, context_lens, BLOCK_SIZE, len(lengths), 1, max_context_len=max(lengths)
    )
    first = data.draw(st.integers(0, len(lengths) - 1))

    starts, indices, last_lens = pages_of(batch, slice(first, None))

    assert {starts.dtype, indices.dtype, last_lens.dtype} == {torch.int32}
    assert starts[-1] == len(indices)
    for i, length in enumerate(lengths[first:]):
        blocks = indices[starts[i] : starts[i + 1]].tolist()
        assert blocks == tables[first + i, : len(blocks)].tolist()
        assert (len(blocks) - 1) * BLOCK_SIZE + last_lens[i] == length


@pytest.mark.parametrize("factor", [1 + 1.5 * MAX_ERROR, 0.0, float("nan")])
def test_one_head_that_differs_is_not_reported(factor: float) -> None:
    expected = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    check(expected * (1 + MAX_ERROR / 2), expected)
    other = expected.clone()
    other[1, 2] *= factor
    with pytest.raises(ValueError, match="differs"):
        check(other, expected)
