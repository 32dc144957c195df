"""The block pool: four counts, holders that can share, and an index of what blocks hold."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.api import BlockCounts, KvBlocksRemoved, KvBlocksStored
from workers.block_hash import block_hash, chain_hashes, root_hash
from workers.engine.block_pool import BlockPool
from workers.engine.prefix_index import NO_MATCH, PrefixMatch

SIZE = 2
ROOT = root_hash("model", "tokenizer", "")


def hashes(token_ids: list[int]) -> list[bytes]:
    """The root, then those of the full blocks."""
    names = [ROOT]
    for i in range(len(token_ids) // SIZE):
        names.append(block_hash(names[-1], token_ids[i * SIZE : (i + 1) * SIZE]))
    return names


def store(pool: BlockPool, block_ids: list[int], token_ids: list[int], *, is_pending: bool = False) -> None:
    names = hashes(token_ids)
    for i, block_id in enumerate(block_ids):
        tokens = token_ids[i * SIZE : (i + 1) * SIZE]
        pool.index.store(block_id, names[i + 1], names[i], tokens, is_pending=is_pending)


def match(pool: BlockPool, token_ids: list[int]) -> PrefixMatch:
    return pool.index.match(hashes(token_ids), token_ids)


# Holders.


def test_a_block_goes_from_sequence_to_transfer_to_free() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(3)
    assert pool.counts() == BlockCounts(free=1, cached=0, in_use=3, leased=0, total=4)
    pool.hold(blocks[:2])
    pool.free(blocks)
    assert pool.counts() == BlockCounts(free=2, cached=0, in_use=0, leased=2, total=4)
    pool.release(blocks[:2])
    assert pool.num_available == pool.num_blocks == 4
    pool.check_invariants()


def test_a_shared_block_is_in_use_until_its_last_holder_is_done() -> None:
    pool = BlockPool(2, SIZE)
    [block] = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert pool.counts().in_use == 1
    pool.free([block])
    assert pool.counts().free == 2


def test_the_block_freed_last_is_taken_first() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(2)
    pool.free([first])
    pool.free([second])
    assert pool.allocate(2) == [second, first]


@pytest.mark.parametrize("act", ["free", "hold"])
def test_what_a_transfer_alone_holds_is_not_a_sequences_to_give(act: str) -> None:
    pool = BlockPool(2, SIZE)
    leased = pool.lease(1)
    with pytest.raises(AssertionError, match="is in use by no sequence"):
        getattr(pool, act)(leased)


def test_what_a_sequence_holds_is_not_a_transfers_to_give() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="is leased by no transfer"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="is not leased once"):
        pool.adopt(blocks)


def test_freeing_twice_fails_at_once() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="is in use by no sequence"):
        pool.free(blocks)


def test_more_than_is_available_is_never_taken() -> None:
    pool = BlockPool(2, SIZE)
    pool.lease(1)
    with pytest.raises(AssertionError, match="asked for 2 of 1 blocks"):
        pool.allocate(2)


def test_a_free_block_cannot_be_shared() -> None:
    pool = BlockPool(2, SIZE)
    with pytest.raises(LookupError):
        pool.share([0])


# The index.


def test_what_a_finished_sequence_leaves_is_cached_and_found() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(2)
    store(pool, blocks, [1, 2, 3, 4])
    pool.free(blocks)
    assert pool.counts() == BlockCounts(free=2, cached=2, in_use=0, leased=0, total=4)
    assert match(pool, [1, 2, 3, 4, 5]) == PrefixMatch(tuple(blocks))
    pool.share(blocks)
    assert pool.counts() == BlockCounts(free=2, cached=0, in_use=2, leased=0, total=4)
    pool.check_invariants()


def test_another_salt_model_or_tokenizer_finds_nothing() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(1)
    store(pool, blocks, [1, 2])
    for root in (
        root_hash("model", "tokenizer", "x"),
        root_hash("m", "tokenizer", ""),
        root_hash("model", "t", ""),
    ):
        assert pool.index.match([root, block_hash(root, [1, 2])], [1, 2, 3]) == NO_MATCH


def test_roots_that_spell_alike_differ() -> None:
    assert root_hash("a", "b", "cd") != root_hash("a", "bc", "d") != root_hash("ab", "c", "d")


def test_an_image_is_part_of_what_a_block_holds() -> None:
    names = {block_hash(ROOT, [1, 2], contents) for contents in ((), (b"cat",), (b"dog",), (b"cat", b"dog"))}
    assert len(names) == 4


def test_the_last_token_of_a_prompt_is_computed_in_a_copy() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(2)
    store(pool, blocks, [1, 2, 3, 4])
    assert match(pool, [1, 2, 3, 4]) == PrefixMatch((blocks[0],), blocks[1], 1)


def test_a_block_that_begins_with_the_rest_of_a_prompt_is_copied() -> None:
    pool = BlockPool(4, 4)
    [block] = pool.allocate(1)
    pool.index.store(block, block_hash(ROOT, [1, 2, 3, 4]), ROOT, [1, 2, 3, 4])
    assert pool.index.match([ROOT], [1, 2, 9]) == PrefixMatch((), block, 2)
    # The last token is never taken from a copy.
    assert pool.index.match([ROOT], [1, 2]) == PrefixMatch((), block, 1)
    assert pool.index.match([ROOT], [9, 2]) == NO_MATCH


def test_the_block_used_longest_ago_is_taken_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, SIZE)
    old, new = pool.allocate(2), pool.allocate(2)
    store(pool, old, [1, 2, 3, 4])
    store(pool, new, [5, 6, 7, 8])
    pool.free(old)
    pool.free(new)
    assert pool.allocate(3) == [new[1], old[0], old[1]]
    assert match(pool, [5, 6, 7, 8, 9]).block_ids == (new[0],)


def test_a_name_is_stored_once() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(2)
    store(pool, [first], [1, 2])
    store(pool, [second], [1, 2])
    pool.free([second])
    assert pool.counts().cached == 0
    assert match(pool, [1, 2, 3]) == PrefixMatch((first,))
    pool.check_invariants()


def test_what_is_written_to_is_forgotten_or_copied() -> None:
    pool = BlockPool(4, SIZE)
    [block] = pool.allocate(1)
    store(pool, [block], [1, 2])
    pool.share([block])
    assert not pool.prepare_to_write(block)
    pool.free([block])
    assert pool.prepare_to_write(block)
    assert match(pool, [1, 2, 3]) == NO_MATCH
    pool.hold([block])
    assert not pool.prepare_to_write(block)


def test_what_a_step_is_about_to_compute_can_be_shared_but_not_copied() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(2)
    store(pool, blocks, [1, 2, 3, 4], is_pending=True)
    assert match(pool, [1, 2, 3, 4, 5]) == PrefixMatch(tuple(blocks))
    assert match(pool, [1, 2, 3, 4]) == PrefixMatch((blocks[0],))
    assert match(pool, [1, 2, 3, 9]) == PrefixMatch((blocks[0],))
    pool.index.settle(pool.index.pending)
    assert match(pool, [1, 2, 3, 4]) == PrefixMatch((blocks[0],), blocks[1], 1)


def test_what_a_failed_step_did_not_compute_is_forgotten() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(2)
    store(pool, blocks, [1, 2, 3, 4], is_pending=True)
    pool.free([blocks[1]])
    pool.forget_pending()
    assert match(pool, [1, 2, 3]) == NO_MATCH
    assert pool.counts() == BlockCounts(free=3, cached=0, in_use=1, leased=0, total=4)
    pool.check_invariants()


# Events.


def test_changes_are_told_from_when_somebody_watches() -> None:
    pool = BlockPool(2, SIZE)
    [first] = pool.allocate(1)
    store(pool, [first], [1, 2])
    assert pool.take_events() == []
    pool.watch()
    name = hashes([1, 2])[1]
    assert pool.take_events() == [KvBlocksStored(ROOT, (name,), is_known=True)]
    [second] = pool.allocate(1)
    store(pool, [second], [3, 4], is_pending=True)
    assert pool.take_events() == []
    pool.index.settle(pool.index.pending)
    other = hashes([3, 4])[1]
    assert pool.take_events() == [KvBlocksStored(ROOT, (other,))]
    pool.free([first])
    pool.allocate(1)
    assert pool.take_events() == [KvBlocksRemoved((name,))]


def test_what_was_never_computed_is_never_told() -> None:
    pool = BlockPool(2, SIZE)
    pool.watch()
    blocks = pool.allocate(1)
    store(pool, blocks, [1, 2], is_pending=True)
    pool.forget_pending()
    assert pool.take_events() == []


@given(st.data())
def test_a_match_holds_what_the_prompt_says(data: st.DataObject) -> None:
    """Every match is as long as a look at all stored prefixes says it can be."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)
    pool = BlockPool(32, SIZE)
    known: dict[int, list[int]] = {}
    for prompt in data.draw(st.lists(tokens, max_size=4)):
        num_whole = len(prompt) // SIZE
        blocks = pool.allocate(num_whole)
        store(pool, blocks, prompt)
        known |= {block: prompt[: (i + 1) * SIZE] for i, block in enumerate(blocks)}
        pool.free(blocks)
    prompt = data.draw(tokens)
    found = match(pool, prompt)
    for i, block in enumerate(found.block_ids):
        assert known[block] == prompt[: (i + 1) * SIZE]
    num_found = len(found.block_ids) * SIZE + found.num_partial
    if found.partial is not None:
        assert known[found.partial][:num_found] == prompt[:num_found]
    longest = max((_num_common(stored, prompt) for stored in known.values()), default=0)
    assert num_found == min(longest, len(prompt) - 1)
    pool.check_invariants()


def _num_common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


class AnyOrder(RuleBasedStateMachine):
    """Sequences and transfers take, share and give back in any order."""

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(8, SIZE)
        self.sequences: list[list[int]] = []
        self.transfers: list[list[int]] = []
        self.next_token = 0

    @rule(num_blocks=st.integers(0, 4))
    def allocate(self, num_blocks: int) -> None:
        if num_blocks <= self.pool.num_available:
            self.sequences.append(self.pool.allocate(num_blocks))

    @rule(num_blocks=st.integers(0, 4))
    def lease(self, num_blocks: int) -> None:
        if num_blocks <= self.pool.num_available:
            self.transfers.append(self.pool.lease(num_blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), is_pending=st.booleans())
    def store(self, data: st.DataObject, is_pending: bool) -> None:
        blocks = data.draw(st.sampled_from(self.sequences))
        for block in blocks:
            if block not in self.pool.index.names:
                self.next_token += 1
                tokens = [self.next_token] * SIZE
                self.pool.index.store(block, block_hash(ROOT, tokens), ROOT, tokens, is_pending=is_pending)

    @rule(is_good=st.booleans())
    def end_step(self, is_good: bool) -> None:
        if is_good:
            self.pool.index.settle(self.pool.index.pending)
        else:
            self.pool.forget_pending()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.sequences))
        self.pool.share(blocks)
        self.sequences.append(list(blocks))

    @rule()
    def share_cached(self) -> None:
        cached = list(self.pool._cached)[:2]
        self.pool.share(cached)
        self.sequences.append(cached)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.sequences))
        self.pool.hold(blocks)
        self.transfers.append(list(blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.free(self.sequences.pop(index))

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.transfers) - 1))
        self.pool.release(self.transfers.pop(index))

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.transfers) - 1))
        held = Counter(block for blocks in (*self.sequences, *self.transfers) for block in blocks)
        if all(held[block] == 1 for block in self.transfers[index]):
            blocks = self.transfers.pop(index)
            self.pool.adopt(blocks)
            self.sequences.append(blocks)

    @invariant()
    def every_block_has_its_holders(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        in_use = [block for blocks in self.sequences for block in blocks]
        leased = [block for blocks in self.transfers for block in blocks]
        self.pool.check_owners(in_use=in_use, leased=leased)
        counts = self.pool.counts()
        assert counts.in_use == len(set(in_use))
        assert counts.leased == len(set(leased) - set(in_use))


TestAnyOrder = AnyOrder.TestCase


def _index_of(pool: BlockPool) -> tuple[object, ...]:
    index = pool.index
    tokens = {block_id: index.tokens_of(block_id) for block_id in index.names}
    known = index.names, index._parents, tokens, index._by_hash, index._children, index._pending
    return *known, pool.take_events()


@given(st.data(), st.booleans(), st.booleans())
def test_a_chain_is_stored_as_its_blocks_one_by_one_are(
    data: st.DataObject, is_pending: bool, is_watched: bool
) -> None:
    """Some of its names may be known already, in blocks of others."""
    one, other = BlockPool(40, SIZE), BlockPool(40, SIZE)
    for pool in (one, other) if is_watched else ():
        pool.watch()
    for _ in range(data.draw(st.integers(1, 3))):
        token_ids = data.draw(st.lists(st.integers(0, 1), max_size=5 * SIZE))
        names = [ROOT, *chain_hashes(ROOT, token_ids, SIZE)]
        first = data.draw(st.integers(0, len(names) - 1))
        block_ids = one.allocate(len(names) - 1 - first)
        assert other.allocate(len(block_ids)) == block_ids
        own = token_ids[first * SIZE : (len(names) - 1) * SIZE]
        one.index.store_chain(block_ids, names[first:], own, is_pending=is_pending)
        for i, block_id in enumerate(block_ids):
            tokens = own[i * SIZE : (i + 1) * SIZE]
            other.index.store(block_id, names[first + i + 1], names[first + i], tokens, is_pending=is_pending)
        one.check_invariants()
        assert _index_of(one) == _index_of(other)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 7))
def test_hashes_of_a_chain_are_those_of_its_blocks(token_ids: list[int], size: int) -> None:
    names = [ROOT]
    for i in range(len(token_ids) // size):
        names.append(block_hash(names[-1], token_ids[i * size : (i + 1) * size]))
    assert chain_hashes(ROOT, token_ids, size) == names[1:]
