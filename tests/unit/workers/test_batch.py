"""Blocks and rows of sequences: shared, copied before a write, given back."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.engine_fakes import BOTH, CONFIG, submit
from workers.engine.batch import Batch, places
from workers.engine.block_pool import BlockPool
from workers.engine.sequence import Sequence, SequenceState

NUM_BLOCKS = 24


class World:
    """A batch and what its KV cache holds: for each slot the token that was written there."""

    def __init__(self, *, is_cache_on: bool = True, num_blocks: int = NUM_BLOCKS) -> None:
        config = replace(CONFIG, is_prefix_cache_on=is_cache_on)
        self.size = config.block_size
        self.batch = Batch(config, BlockPool(num_blocks, self.size), num_blocks)
        self.slots: dict[int, int] = {}
        self.num_arrived = 0

    def start(self, token_ids: list[int]) -> Sequence:
        self.num_arrived += 1
        request = replace(submit(phases=BOTH, max_new=50), token_ids=tuple(token_ids))
        sequence = Sequence.from_submit(request, 0.0, root=b"root", number=self.num_arrived)
        self.batch.wait(sequence)
        self.batch.admit(sequence, self.batch.match(sequence))
        return sequence

    def compute(self, sequence: Sequence) -> None:
        """What a step does with it: blocks, then copies, then a write for each token that is not computed."""
        num_tokens = len(sequence.token_ids)
        self.batch.grow(sequence, num_tokens)
        self.copy()
        for place in range(sequence.num_computed_tokens, num_tokens):
            self.slots[self.slot(sequence, place)] = sequence.token_ids[place]
        sequence.num_computed_tokens = num_tokens
        self.batch.store_blocks(sequence, num_tokens, is_pending=False)

    def copy(self) -> None:
        """Make the copies that are due, all from what was there before."""
        copies, self.batch.copies = self.batch.copies, {}
        before = dict(self.slots)
        for target, source in copies.items():
            for offset in range(self.size):
                self.slots[target * self.size + offset] = before.get(source * self.size + offset, -1)

    def slot(self, sequence: Sequence, place: int) -> int:
        return sequence.block_table[place // self.size] * self.size + place % self.size

    def check(self, sequences: list[Sequence]) -> None:
        self.batch.check_invariants()
        self.batch.pool.check_invariants()
        named = [block_id for one in sequences for block_id in one.block_table]
        self.batch.pool.check_owners(in_use=named, leased=[])
        if not self.batch.copies:
            for one in sequences:
                read = [self.slots.get(self.slot(one, i)) for i in range(one.num_computed_tokens)]
                assert read == one.token_ids[: one.num_computed_tokens]


def decoding(world: World, token_ids: list[int]) -> Sequence:
    sequence = world.start(token_ids)
    world.compute(sequence)
    world.batch.move(sequence, SequenceState.DECODE)
    sequence.token_ids.append(99)
    return sequence


@pytest.mark.parametrize("num_tokens", [5, 8])
def test_a_fork_takes_no_block_until_it_writes_and_then_one(num_tokens: int) -> None:
    world = World()
    sequence = decoding(world, list(range(num_tokens)))
    del sequence.token_ids[num_tokens:]
    num_before = world.batch.pool.counts().in_use
    world.batch.move(sequence, SequenceState.BRANCHED)
    branches = [world.batch.fork(sequence, stream=i) for i in range(3)]
    assert world.batch.pool.counts().in_use == num_before
    for i, branch in enumerate(branches):
        branch.token_ids.append(200 + i)
        world.compute(branch)
    assert world.batch.pool.counts().in_use == num_before + 3
    world.check([sequence, *branches])


def test_the_last_to_write_to_a_shared_block_needs_no_copy() -> None:
    world = World(is_cache_on=False)
    sequence = decoding(world, [1, 2, 3, 4, 5])
    branch = world.batch.fork(sequence, stream=1)
    branch.token_ids[-1] = 50
    world.compute(sequence)
    num_in_use = world.batch.pool.counts().in_use
    world.compute(branch)
    assert world.batch.pool.counts().in_use == num_in_use == 3
    world.check([sequence, branch])


def test_a_branch_that_is_chosen_becomes_the_sequence() -> None:
    world = World()
    sequence = decoding(world, [1, 2, 3, 4, 5])
    world.compute(sequence)
    world.batch.grow(sequence, 20)
    num_blocks = len(sequence.block_table)
    world.batch.move(sequence, SequenceState.BRANCHED)
    branch = world.batch.fork(sequence, stream=0)
    branch.token_ids += [7, 8, 9]
    world.compute(branch)
    world.batch.become(sequence, branch)
    assert sequence.token_ids == [1, 2, 3, 4, 5, 99, 7, 8, 9]
    assert len(sequence.block_table) == num_blocks
    assert branch.state is SequenceState.FINISHED
    world.check([sequence])


def test_a_sequence_that_was_cut_back_writes_to_no_block_that_others_read() -> None:
    world = World()
    sequence = decoding(world, [1, 2, 3, 4, 5, 6, 7])
    world.compute(sequence)
    other = world.start([1, 2, 3, 4, 5, 6, 7, 99, 5])
    world.compute(other)
    assert other.block_table[:2] == sequence.block_table[:2]
    world.batch.truncate(sequence, 6, num_computed=6)
    sequence.token_ids += [60, 61]
    world.compute(sequence)
    world.check([sequence, other])
    # Cut back once more: now the block is its own, and what the index said of it is no longer true.
    world.batch.truncate(sequence, 6, num_computed=5)
    sequence.token_ids += [70, 71]
    world.compute(sequence)
    world.check([sequence, other])
    third = world.start([1, 2, 3, 4, 5, 6, 60, 61, 1])
    assert third.num_cached_tokens == 6
    world.compute(third)
    world.check([sequence, other, third])


def test_a_copy_that_is_due_is_forgotten_with_the_one_who_needs_it() -> None:
    world = World()
    first = world.start([1, 2, 3, 4, 5, 6, 7, 8])
    world.compute(first)
    second = world.start([1, 2, 3, 4, 5, 6, 7, 8])
    assert len(world.batch.copies) == 1
    world.batch.leave(second)
    assert not world.batch.copies
    world.check([first])


def test_more_rows_come_when_they_run_out() -> None:
    world = World()
    sequence = decoding(world, [1, 2, 3])
    branches = [world.batch.fork(sequence, stream=i) for i in range(9)]
    for branch in branches:
        world.compute(branch)
    world.check([sequence, *branches])
    assert places(branches[0]) == 0


class AnyOrder(RuleBasedStateMachine):
    """Sequences begin, grow, fork, are cut back and leave; nobody's KV ever changes under it."""

    @initialize(is_cache_on=st.booleans())
    def begin(self, is_cache_on: bool) -> None:
        self.world = World(is_cache_on=is_cache_on)
        self.live: list[Sequence] = []

    def pick(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(self.live))

    def has_room(self, num_blocks: int = 7) -> bool:
        return self.world.batch.pool.num_available >= num_blocks

    @precondition(lambda self: self.has_room() and len(self.live) < 5)
    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def start(self, token_ids: list[int]) -> None:
        sequence = self.world.start(token_ids)
        self.world.compute(sequence)
        self.world.batch.move(sequence, SequenceState.DECODE)
        self.live.append(sequence)

    @precondition(lambda self: self.live and self.has_room())
    @rule(data=st.data(), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def decode(self, data: st.DataObject, token_ids: list[int]) -> None:
        sequence = self.pick(data)
        sequence.token_ids.extend(token_ids)
        self.world.compute(sequence)

    @precondition(lambda self: self.live and len(self.live) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        branch = self.world.batch.fork(sequence, stream=1)
        branch.parent = None
        self.world.batch.num_places += 1
        self.world.batch.num_running += 1
        self.live.append(branch)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cut_back(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        num_tokens = data.draw(st.integers(1, len(sequence.token_ids)))
        num_computed = data.draw(st.integers(0, num_tokens))
        self.world.batch.truncate(sequence, num_tokens, num_computed=num_computed)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        self.live.remove(sequence)
        self.world.batch.leave(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        if self.has_room(12):
            self.world.batch.preempt(sequence)
            self.world.batch.admit(sequence, self.world.batch.match(sequence))
            self.world.compute(sequence)
            self.world.batch.move(sequence, SequenceState.DECODE)

    @invariant()
    def kv_is_right(self) -> None:
        if hasattr(self, "world"):
            self.world.check(self.live)


TestAnyOrder = AnyOrder.TestCase
