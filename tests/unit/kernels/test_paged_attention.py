"""Paged attention, by our kernel and by torch alone, against its specification."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phasewise_kernels import jit
from phasewise_kernels.paged_attention import op
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

#: A root with children 1 and 2; 3 and 4 follow 1. Row sees column.
TREE = np.array(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]], np.bool_
)


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of sequences with one new token."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setitem(jit._loaded, jit.KERNEL_MODULES[1], None)
    else:
        assert jit.load(jit.KERNEL_MODULES[1]) is not None
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
        window: int = 0,
        tree_masks: dict[int, NDArray[np.bool_]] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query_lens = [query_len for query_len, _ in lengths]
        self.context_lens = [context_len for _, context_len in lengths]
        needed = [-(-context_len // block_size) for context_len in self.context_lens]
        # One block to spare, which nobody owns.
        block_ids = torch.randperm(sum(needed) + 1, generator=generator).tolist()
        self.block_tables = [[block_ids.pop() for _ in range(count)] for count in needed]
        self.spare_block = block_ids.pop()
        shape = (sum(needed) + 1, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = poison_empty(shape), poison_empty(shape)
        for block_table, context_len in zip(self.block_tables, self.context_lens, strict=True):
            for i in range(context_len):
                place = block_table[i // block_size], i % block_size
                self.k_cache[place] = torch.randn(num_kv_heads, head_dim, generator=generator)
                self.v_cache[place] = torch.randn(num_kv_heads, head_dim, generator=generator)
        self.query = torch.randn(sum(self.query_lens), num_kv_heads * shared, head_dim, generator=generator)
        self.block_size, self.window = block_size, window
        self.tree_masks = tree_masks or {}

    def run(self) -> torch.Tensor:
        """The op; tables are padded with a block that is all NaN."""
        width = max(map(len, self.block_tables), default=0)
        tables = [table + [self.spare_block] * (width - len(table)) for table in self.block_tables]
        batch = AttentionBatch.build(
            block_tables=np.array(tables, np.int32).reshape(len(tables), width),
            query_lens=np.array(self.query_lens, np.int64),
            context_lens=np.array(self.context_lens, np.int64),
            block_size=self.block_size,
            tree_masks=self.tree_masks,
        )
        return paged_attention(self.query, self.k_cache, self.v_cache, batch, window=self.window)

    def expected(self) -> torch.Tensor:
        """The specification."""
        return paged_attention_reference(
            self.query,
            self.k_cache,
            self.v_cache,
            block_tables=self.block_tables,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            tree_masks={sequence: mask.tolist() for sequence, mask in self.tree_masks.items()},
            window=self.window,
        )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("window", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("lengths", BATCHES, ids=shape_id)
def test_op_equals_reference_and_reads_no_unused_slot(lengths: list[tuple[int, int]], window: int) -> None:
    case = Case(lengths, window=window)
    assert_close(case.run(), case.expected(), TOLERANCE)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shared", [1, 3, 4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_query_heads_share_kv_heads_in_order(shared: int, num_kv_heads: int) -> None:
    case = Case([(1, 6), (3, 7), (1, 2)], num_kv_heads=num_kv_heads, shared=shared)
    assert_close(case.run(), case.expected(), TOLERANCE)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (96, 16), (128, 8), (2, 1), (16, 5), (5, 3)], ids=shape_id
)
def test_head_and_block_sizes(head_dim: int, block_size: int) -> None:
    case = Case([(1, 17), (7, 16), (2, 33), (1, 30)], head_dim=head_dim, block_size=block_size)
    assert_close(case.run(), case.expected(), TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=5),
    window=st.integers(0, 20),
    block_size=st.integers(1, 9),
    item_tokens=st.integers(1, 12),
)
def test_any_batch_in_items_of_any_size_equals_the_reference(
    lengths: list[tuple[int, int]], window: int, block_size: int, item_tokens: int
) -> None:
    case = Case(
        [(query_len, query_len + prefix_len) for query_len, prefix_len in lengths],
        window=window,
        block_size=block_size,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "ITEM_TOKENS", item_tokens)
        assert_close(case.run(), case.expected(), TOLERANCE)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("prefix_len", [0, 1, 7])
def test_a_token_of_a_tree_sees_its_ancestors_and_the_prefix(prefix_len: int, window: int) -> None:
    case = Case([(1, 6), (5, 5 + prefix_len), (5, 9)], tree_masks={1: TREE}, window=window)
    assert_close(case.run(), case.expected(), TOLERANCE)


def test_a_tree_that_is_a_line_is_a_chunk() -> None:
    line = np.tri(4, dtype=np.bool_)
    for window in (0, 2, 6):
        tree = Case([(4, 9)], tree_masks={0: line}, window=window)
        assert torch.equal(tree.run(), Case([(4, 9)], window=window).run())


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "MIN_SHARED_BYTES", 0)
    monkeypatch.setattr(op, "ITEM_TOKENS", 8)
    case = Case([(1, 50), (1, 3), (1, 17), (1, 64)], head_dim=64)
    outputs = []
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        outputs.append(case.run())
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert_close(outputs[0], case.expected(), TOLERANCE)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    case = Case([(1, 20), (1, 600), (1, 3)], head_dim=64, block_size=16)
    together = case.run()
    for i in range(3):
        alone = Case([(1, 1)], head_dim=64, block_size=16)
        alone.block_tables, alone.context_lens = [case.block_tables[i]], [case.context_lens[i]]
        alone.k_cache, alone.v_cache, alone.query = case.k_cache, case.v_cache, case.query[i : i + 1]
        assert torch.equal(alone.run()[0], together[i])


@pytest.mark.usefixtures("way")
def test_empty_batch_gives_no_rows() -> None:
    case = Case([])
    assert case.run().shape == (0, 6, 8)


@pytest.mark.usefixtures("way")
def test_scores_too_large_for_exp_give_finite_output() -> None:
    case = Case([(1, 9), (4, 9)])
    case.query *= 1000
    assert torch.isfinite(case.run()).all()


@pytest.mark.usefixtures("way")
def test_a_query_that_is_a_view_is_read_right() -> None:
    case = Case([(1, 9), (4, 9)])
    expected = case.run()
    case.query = torch.cat((case.query, case.query * 2), dim=1)[:, :6]
    assert torch.equal(case.run(), expected)


def test_a_later_token_changes_nothing_before_it() -> None:
    case = Case([(6, 10)])
    before = case.run()
    last = case.block_tables[0][9 // BLOCK_SIZE], 9 % BLOCK_SIZE
    case.k_cache[last] += 1
    case.v_cache[last] += 1
    after = case.run()
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


@pytest.mark.usefixtures("way")
def test_order_of_sequences_does_not_matter() -> None:
    case = Case([(1, 3), (4, 6), (1, 12), (2, 9)])
    forward = torch.split(case.run(), case.query_lens)
    case.query = torch.cat(torch.split(case.query, case.query_lens)[::-1])
    for name in ("block_tables", "query_lens", "context_lens"):
        setattr(case, name, getattr(case, name)[::-1])
    backward = torch.split(case.run(), case.query_lens)[::-1]
    for first, second in zip(forward, backward, strict=True):
        assert_close(first, second, TOLERANCE)


def build(
    block_tables: list[list[int]],
    query_lens: list[int],
    context_lens: list[int],
    tree_masks: dict[int, NDArray[np.bool_]] | None = None,
) -> AttentionBatch:
    return AttentionBatch.build(
        block_tables=np.array(block_tables, np.int32),
        query_lens=np.array(query_lens, np.int64),
        context_lens=np.array(context_lens, np.int64),
        block_size=BLOCK_SIZE,
        tree_masks=tree_masks,
    )


def test_too_short_a_block_table_is_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens need 2 blocks; the block table has 1"):
        build([[0]], [1], [5])


@pytest.mark.parametrize(("query_len", "context_len"), [(0, 3), (4, 3)])
def test_senseless_lengths_are_refused(query_len: int, context_len: int) -> None:
    with pytest.raises(ValueError, match="new tokens in a context"):
        build([[0]], [query_len], [context_len])


def test_a_tree_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a tree mask of"):
        build([[0]], [2], [3], {0: np.ones((3, 3), np.bool_)})


def test_a_token_that_does_not_see_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="does not see itself"):
        build([[0]], [2], [3], {0: np.zeros((2, 2), np.bool_)})


def test_query_of_another_batch_is_refused() -> None:
    case = Case([(2, 2)])
    case.query = case.query[:1]
    with pytest.raises(ValueError, match="query has 1 tokens, the batch"):
        paged_attention(case.query, case.k_cache, case.v_cache, build([[0]], [2], [2]))
