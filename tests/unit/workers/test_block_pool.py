"""The block pool: four counts, three states, no block lost or doubled."""

from itertools import chain

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.api import BlockCounts
from workers.engine.block_pool import BlockPool


def test_a_block_goes_from_sequence_to_transfer_to_free() -> None:
    pool = BlockPool(4, block_size=2)
    blocks = pool.allocate(3)
    assert pool.counts() == BlockCounts(free=1, cached=0, in_use=3, leased=0, total=4)
    pool.hand_over(blocks[:2])
    assert pool.counts() == BlockCounts(free=1, cached=0, in_use=1, leased=2, total=4)
    pool.release(blocks[:2])
    pool.free(blocks[2:])
    assert pool.num_free == pool.num_blocks == 4
    pool.check_invariants()


def test_the_block_freed_last_is_taken_first() -> None:
    pool = BlockPool(4, block_size=2)
    first, second = pool.allocate(2)
    pool.free([first])
    pool.free([second])
    assert pool.allocate(2) == [second, first]


@pytest.mark.parametrize("act", ["free", "hand_over"])
def test_what_a_transfer_holds_is_not_a_sequences_to_give(act: str) -> None:
    pool = BlockPool(2, block_size=2)
    leased = pool.lease(1)
    with pytest.raises(AssertionError, match="is leased, not in_use"):
        getattr(pool, act)(leased)


@pytest.mark.parametrize("act", ["release", "adopt"])
def test_what_a_sequence_holds_is_not_a_transfers_to_give(act: str) -> None:
    pool = BlockPool(2, block_size=2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="is in_use, not leased"):
        getattr(pool, act)(blocks)


def test_freeing_twice_fails_at_once() -> None:
    pool = BlockPool(2, block_size=2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="is free, not in_use"):
        pool.free(blocks)


def test_more_than_is_free_is_never_taken() -> None:
    pool = BlockPool(2, block_size=2)
    pool.lease(1)
    with pytest.raises(AssertionError, match="asked for 2 of 1 free blocks"):
        pool.allocate(2)


def test_owners_that_do_not_match_break_the_invariant() -> None:
    pool = BlockPool(3, block_size=2)
    mine, theirs = pool.allocate(1), pool.lease(1)
    pool.check_owners(in_use=mine, leased=theirs)
    for in_use, leased in [(mine, []), ([], theirs), (mine * 2, theirs), (theirs, mine)]:
        with pytest.raises(AssertionError):
            pool.check_owners(in_use=in_use, leased=leased)


class PoolModel(RuleBasedStateMachine):
    """The pool against two sets of owned blocks."""

    @initialize(num_blocks=st.integers(0, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, block_size=1)
        self.in_use: list[list[int]] = []
        self.leased: list[list[int]] = []

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(0, self.pool.num_free))
        if data.draw(st.booleans()):
            self.in_use.append(self.pool.allocate(num_blocks))
        else:
            self.leased.append(self.pool.lease(num_blocks))

    @precondition(lambda self: self.in_use)
    @rule(data=st.data(), is_sent=st.booleans())
    def sequence_ends(self, data: st.DataObject, is_sent: bool) -> None:
        blocks = self.in_use.pop(data.draw(st.integers(0, len(self.in_use) - 1)))
        if is_sent:
            self.pool.hand_over(blocks)
            self.leased.append(blocks)
        else:
            self.pool.free(blocks)

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), is_committed=st.booleans())
    def transfer_ends(self, data: st.DataObject, is_committed: bool) -> None:
        blocks = self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1)))
        if is_committed:
            self.pool.adopt(blocks)
            self.in_use.append(blocks)
        else:
            self.pool.release(blocks)

    @invariant()
    def every_block_has_one_owner(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        in_use, leased = list(chain(*self.in_use)), list(chain(*self.leased))
        self.pool.check_owners(in_use=in_use, leased=leased)
        assert self.pool.num_free == self.pool.num_blocks - len(in_use) - len(leased)


TestPoolModel = PoolModel.TestCase
