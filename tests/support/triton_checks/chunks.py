"""Contexts of chunks that are cut into pieces, on a GPU or interpreted (see paged_attention.py)."""

import heapq
from dataclasses import replace

import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewise_kernels.paged_attention import cuda
from phasewise_kernels.paged_attention.chunk_triton import pieces_of
from phasewise_kernels.paged_attention.tiles_triton import jit
from tests.support.triton_checks.paged_attention import Case, assert_semaphores_are_reset, run_cut

_GROUPS, _COSTS = st.integers(1, 132), st.integers(0, 40)


def check_that_contexts_of_chunks_are_cut_anywhere(device: str) -> None:
    """At borders of tiles and of what rows see, beside sequences of other lengths, with any number of programs."""
    for case in (
        # Parts of heads as large are merged in bands.
        Case(((22, 331), (1, 90)), head_dim=128),
        Case(((21, 352), (23, 35))),
        Case(((43, 353), (64, 224)), window=50),
        Case(((30, 321),), window=40, trees=(0,)),
    ):
        inputs = replace(case, num_kv_heads=1, num_padding=1).on(device)
        expected = inputs.expected_dense()
        for num_groups in (1, 3):
            inputs.check(run_cut(inputs, num_groups=num_groups), expected)
            assert_semaphores_are_reset()


def check_that_contexts_are_not_cut_for_little(device: str) -> None:
    """The same bits as of one program per tile, where parts cost more than they gain or tiles fill all multiprocessors."""
    inputs = Case(((30, 300),), num_kv_heads=1).on(device)
    whole = run_cut(inputs, num_groups=1)
    assert torch.equal(run_cut(inputs, num_groups=2), whole)
    assert torch.equal(run_cut(inputs, num_groups=3, part_tokens=320), whole)
    # Other sums round otherwise; parts are merged in the order of the pieces, whoever came last.
    cut = run_cut(inputs, num_groups=3)
    assert not torch.equal(cut, whole)
    assert torch.equal(run_cut(inputs, num_groups=3), cut)


def check_that_pieces_fit(device: str) -> None:
    """Whatever the lengths, there is room for all, and what is nothing is not cut."""

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5000)), max_size=8), _GROUPS, _COSTS)
    def fit(sequences: list[tuple[int, int]], num_groups: int, part_cost: int) -> None:
        num_tiles = [num_tiles for num_tiles, _ in sequences]
        reaches = [reach if num_tiles else 0 for num_tiles, reach in sequences]
        pieces = cut(num_tiles, reaches, num_groups, part_cost, device)
        assert all(count == 1 or num for count, num in zip(pieces, num_tiles, strict=True))
        assert min(pieces, default=1) >= 1
        places = sum(num * count for num, count in zip(num_tiles, pieces, strict=True))
        assert max(pieces, default=1) == 1 or places <= cuda.MAX_WAVES * num_groups

    fit()


def check_that_a_cut_is_worth_its_cost(device: str) -> None:
    """Of contexts as long as each other: all ends earlier by more than parts cost, and what would leave most groups idle is cut."""

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5000), _GROUPS, _COSTS)
    def pays(num_tiles: list[int], reach: int, num_groups: int, part_cost: int) -> None:
        reaches = [reach] * len(num_tiles)
        pieces = cut(num_tiles, reaches, num_groups, part_cost, device)
        whole = ends_at(num_tiles, reaches, [1] * len(pieces), num_groups)
        if max(pieces) > 1:
            assert ends_at(num_tiles, reaches, pieces, num_groups) + part_cost < whole
        else:
            assert sum(num_tiles) * 2 > num_groups or whole <= 4 * part_cost + 8

    pays()


def cut(num_tiles: list[int], reaches: list[int], num_groups: int, part_cost: int, device: str) -> list[int]:
    """Pieces of up to 8 sequences, as the kernel has them."""
    padded = torch.zeros(2, 8, dtype=torch.int32)
    padded[:, : len(num_tiles)] = torch.tensor((num_tiles, reaches))
    found = torch.empty(8, dtype=torch.int32, device=device)
    cut_kernel[(1,)](*padded.to(device), found, num_groups, part_cost, cuda.MAX_WAVES)
    pieces: list[int] = found.tolist()
    assert pieces[len(num_tiles) :] == [1] * (8 - len(num_tiles))
    return pieces[: len(num_tiles)]


@jit
def cut_kernel(num_tiles, reaches, found, num_groups, part_cost, max_waves: tl.constexpr):  # type: ignore[no-untyped-def]
    """found: [8] int32, the pieces of sequences."""
    ids = tl.arange(0, 8)
    pieces = pieces_of(tl.load(num_tiles + ids), tl.load(reaches + ids), num_groups, part_cost, max_waves)
    tl.store(found + ids, pieces)


def ends_at(num_tiles: list[int], reaches: list[int], pieces: list[int], num_groups: int) -> int:
    """When the last of all pieces has been read, each by the group that is free first, in the order of the kernel."""
    free = [0] * num_groups
    for tiles, reach, count in reversed(list(zip(num_tiles, reaches, pieces, strict=True))):
        for _ in range(tiles * count):
            heapq.heapreplace(free, free[0] + -(-reach // count))
    return max(free)
