"""The CPU path of paged attention against its specification."""

import pytest
import torch

from phasewise_kernels.paged_attention.op import AttentionBatch, paged_attention
from phasewise_kernels.paged_attention.reference import paged_attention_reference
from phasewise_kernels.testing import ATTENTION_TOLERANCES, assert_close, poison_empty, shape_id

TOLERANCE = ATTENTION_TOLERANCES[torch.float32]
BLOCK_SIZE = 4

#: (new tokens, all tokens) of each sequence.
BATCHES = [
    [(1, 1)],
    [(1, 4)],
    [(1, 5)],
    [(4, 4)],
    [(5, 5)],
    [(3, 11)],
    [(1, 1), (1, 1)],
    [(1, 2), (1, 3), (1, 9), (1, 31)],
    [(2, 2), (1, 7), (5, 13), (1, 1), (1, 4)],
    [(1, 8), (8, 8), (1, 8)],
]


class Case:
    """Random query, and a cache where only the slots of these sequences are not NaN."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        num_kv_heads: int = 2,
        shared: int = 3,
        head_dim: int = 8,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query_lens = [query_len for query_len, _ in lengths]
        self.context_lens = [context_len for _, context_len in lengths]
        needed = [-(-context_len // block_size) for context_len in self.context_lens]
        # One block to spare, which nobody owns.
        block_ids = torch.randperm(sum(needed) + 1, generator=generator).tolist()
        self.block_tables = [[block_ids.pop() for _ in range(count)] for count in needed]
        shape = (sum(needed) + 1, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = poison_empty(shape), poison_empty(shape)
        for block_table, context_len in zip(self.block_tables, self.context_lens, strict=True):
            for i in range(context_len):
                place = block_table[i // block_size], i % block_size
                self.k_cache[place] = torch.randn(num_kv_heads, head_dim, generator=generator)
                self.v_cache[place] = torch.randn(num_kv_heads, head_dim, generator=generator)
        self.query = torch.randn(sum(self.query_lens), num_kv_heads * shared, head_dim, generator=generator)
        self.block_size = block_size

    def run(self) -> torch.Tensor:
        """The op."""
        batch = AttentionBatch.build(
            block_tables=self.block_tables,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            block_size=self.block_size,
        )
        return paged_attention(self.query, self.k_cache, self.v_cache, batch)

    def expected(self) -> torch.Tensor:
        """The specification."""
        return paged_attention_reference(
            self.query,
            self.k_cache,
            self.v_cache,
            block_tables=self.block_tables,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
        )


@pytest.mark.parametrize("lengths", BATCHES, ids=shape_id)
def test_op_equals_reference_and_reads_no_unused_slot(lengths: list[tuple[int, int]]) -> None:
    case = Case(lengths)
    assert_close(case.run(), case.expected(), TOLERANCE)


@pytest.mark.parametrize("shared", [1, 3, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_query_heads_share_kv_heads_in_order(shared: int, num_kv_heads: int) -> None:
    case = Case([(1, 6), (3, 7), (1, 2)], num_kv_heads=num_kv_heads, shared=shared)
    assert_close(case.run(), case.expected(), TOLERANCE)


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (2, 1), (16, 5)], ids=shape_id)
def test_head_and_block_sizes(head_dim: int, block_size: int) -> None:
    case = Case([(1, 17), (7, 16), (2, 33)], head_dim=head_dim, block_size=block_size)
    assert_close(case.run(), case.expected(), TOLERANCE)


def test_empty_batch_gives_no_rows() -> None:
    case = Case([])
    assert case.run().shape == (0, 6, 8)


def test_scores_too_large_for_exp_give_finite_output() -> None:
    case = Case([(1, 9), (4, 9)])
    case.query *= 1000
    assert torch.isfinite(case.run()).all()


def test_a_later_token_changes_nothing_before_it() -> None:
    case = Case([(6, 10)])
    before = case.run()
    last = case.block_tables[0][9 // BLOCK_SIZE], 9 % BLOCK_SIZE
    case.k_cache[last] += 1
    case.v_cache[last] += 1
    after = case.run()
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_order_of_sequences_does_not_matter() -> None:
    lengths = [(1, 3), (4, 6), (1, 12), (2, 9)]
    case = Case(lengths)
    forward = case.run().split(case.query_lens)
    case.query = torch.cat(case.query.split(case.query_lens)[::-1])
    for name in ("block_tables", "query_lens", "context_lens"):
        setattr(case, name, getattr(case, name)[::-1])
    backward = case.run().split(case.query_lens)[::-1]
    for first, second in zip(forward, backward, strict=True):
        assert_close(first, second, TOLERANCE)


def test_spare_blocks_at_the_end_of_a_table_are_ignored() -> None:
    case = Case([(1, 5), (3, 6)])
    expected = case.expected()
    spare = [block for block in range(5) if not any(block in table for table in case.block_tables)]
    case.block_tables = [table + spare for table in case.block_tables]
    assert_close(case.run(), expected, TOLERANCE)


def build(block_tables: list[list[int]], query_lens: list[int], context_lens: list[int]) -> AttentionBatch:
    return AttentionBatch.build(
        block_tables=block_tables, query_lens=query_lens, context_lens=context_lens, block_size=BLOCK_SIZE
    )


def test_too_short_a_block_table_is_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens need 2 blocks; the block table has 1"):
        build([[0]], [1], [5])


@pytest.mark.parametrize(("query_len", "context_len"), [(0, 3), (4, 3)])
def test_senseless_lengths_are_refused(query_len: int, context_len: int) -> None:
    with pytest.raises(ValueError, match="new tokens in a context"):
        build([[0]], [query_len], [context_len])


def test_query_of_another_batch_is_refused() -> None:
    case = Case([(2, 2)])
    case.query = case.query[:1]
    with pytest.raises(ValueError, match="query has 1 tokens, the batch"):
        paged_attention(case.query, case.k_cache, case.v_cache, build([[0]], [2], [2]))
