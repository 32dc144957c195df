"""Who holds which KV block, and which blocks hold KV that later prompts can use. Pure.

A block is held by sequences (IN USE, shared by any number), by transfers (LEASED when by them alone), or
by nobody: then it is CACHED while it holds KV that the prefix index knows, and FREE otherwise. A cached
block is taken when no free one is left, the one that was used longest ago first; with a host tier, what it
holds is saved there in that moment, before its next holder can write to it.

free + cached + in use + leased = total, always.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, count, pairwise
from operator import eq, ne

from workers.api import BlockCounts, KvBlocksRemoved, KvBlocksStored
from workers.engine.host_tier import HostTier, HostTierCounts, PackedBlock, SavedBlock
from workers.engine.kv_news import KvNews
from workers.engine.span_reuse.span_index import SpanIndex

#: Blocks with the same parent that are looked at for one that begins with the rest of a prompt.
MAX_SIBLINGS = 32


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that hold the beginning of a prompt: `block_ids` whole, then the first `num_partial` tokens of `partial`."""

    block_ids: tuple[int, ...] = ()
    partial: int | None = None
    num_partial: int = 0


NO_MATCH = PrefixMatch()


class BlockPool:
    """Hands out block ids 0..num_blocks-1, and finds those that hold the beginning of a prompt.

    Every act names the holder it changes, so that freeing twice, or freeing what a transfer holds, fails
    at once.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        tier: HostTier | None = None,
        spans: SpanIndex | None = None,
    ) -> None:
        self.block_size = block_size
        #: Knows some of the blocks that the prefix index knows. `Batch` adds to it; what is forgotten here goes there.
        self.spans = spans
        self._tier = tier
        #: All blocks, whoever holds them.
        self.num_blocks = num_blocks
        #: Of the blocks that anybody has ever taken: the others come after them, and nothing has to be known of them.
        self._num_sequences: list[int] = []
        self._num_transfers: list[int] = []
        #: Of these blocks, a stack: the one freed last is the one most likely still in a cache.
        self._free: list[int] = []
        #: Held by nobody but known to the index; the one to take first is first.
        self._cached: dict[int, None] = {}
        self._num_in_use = 0
        self._num_leased = 0
        #: What the prefix index knows of a block: its name, that of the block before it, and its tokens, which begin so far into those of all
        #: blocks that were stored with it. No object of each block's own, which the garbage collector would look at. These tokens stay
        #: as long as one of the blocks does.
        self._names: dict[int, bytes] = {}
        self._parents: dict[int, bytes] = {}
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._begins: dict[int, int] = {}
        #: Of those, blocks whose KV came through a lossy codec or was computed from such: for prompts of this worker alone.
        self._lossy: set[int] = set()
        self._by_hash: dict[bytes, int] = {}
        #: By the name of the block before them: nearly always it is one.
        self._children: dict[bytes, int | dict[int, None]] = {}
        #: In the index already, but computed by the step that is being planned or run.
        self._pending: dict[int, None] = {}
        #: What has not been told yet.
        self.news = KvNews()

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free ones, and cached ones at the price of what they hold."""
        # As _num_free, without a call: asked for every block that is filled.
        return self.num_blocks - len(self._num_sequences) + len(self._free) + len(self._cached)

    @property
    def _num_free(self) -> int:
        return self.num_blocks - len(self._num_sequences) + len(self._free)

    @property
    def has_tier(self) -> bool:
        """`find_saved` may find something."""
        return self._tier is not None

    def counts(self) -> BlockCounts:
        """The four counts, whose sum is the total."""
        return BlockCounts(
            free=self._num_free,
            cached=len(self._cached),
            in_use=self._num_in_use,
            leased=self._num_leased,
            total=self.num_blocks,
        )

    def free_block_ids(self) -> tuple[int, ...]:
        """Blocks that nobody holds and that hold nothing."""
        return (*range(self.num_blocks - 1, len(self._num_sequences) - 1, -1), *self._free)

    def cached_block_ids(self) -> tuple[int, ...]:
        """Blocks that nobody holds and that the index knows."""
        return tuple(self._cached)

    def host_tier_counts(self) -> HostTierCounts:
        """Of the blocks in host memory; all zero without a tier."""
        return self._tier.counts() if self._tier is not None else HostTierCounts()

    # Taking and giving back.

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for a sequence. The caller has checked `num_available`."""
        taken = self._take(num_blocks)
        for block_id in taken:
            self._num_sequences[block_id] = 1
        self._num_in_use += num_blocks
        return taken

    def lease(self, num_blocks: int) -> list[int]:
        """Take blocks for a transfer that will fill them. The caller has checked `num_available`."""
        taken = self._take(num_blocks)
        for block_id in taken:
            self._num_transfers[block_id] = 1
        self._num_leased += num_blocks
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """One more sequence holds these, which are in use or cached."""
        for block_id in block_ids:
            if self._num_sequences[block_id] == 0:
                self._num_in_use += 1
                if self._num_transfers[block_id] > 0:
                    self._num_leased -= 1
                else:
                    # A block that holds nothing cannot be shared: KeyError, or IndexError where nobody ever took it.
                    del self._cached[block_id]
            self._num_sequences[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """A sequence is done with these, in the order of its tokens."""
        # From the end: a block is of use only with those before it, so it should be taken before them.
        num_sequences, num_transfers = self._num_sequences, self._num_transfers
        stored, cached, free = self._names, self._cached, self._free
        num_free = num_leased = 0
        for block_id in reversed(block_ids):
            num_left = num_sequences[block_id] - 1
            assert num_left >= 0, f"block {block_id} is in use by no sequence"
            num_sequences[block_id] = num_left
            if num_left:
                continue
            num_free += 1
            if num_transfers[block_id]:
                num_leased += 1
            # As _put_back.
            elif block_id in stored:
                cached[block_id] = None
            else:
                free.append(block_id)
        self._num_in_use -= num_free
        self._num_leased += num_leased

    def hold(self, block_ids: Sequence[int]) -> None:
        """A transfer holds these too, which are in use."""
        num_sequences, num_transfers = self._num_sequences, self._num_transfers
        for block_id in block_ids:
            assert num_sequences[block_id] > 0, f"block {block_id} is in use by no sequence"
            num_transfers[block_id] += 1

    def adopt(self, block_ids: Sequence[int]) -> None:
        """A sequence takes over what a transfer has filled."""
        num_sequences, num_transfers = self._num_sequences, self._num_transfers
        for block_id in block_ids:
            assert num_transfers[block_id] == 1, f"block {block_id} is not leased once"
            assert num_sequences[block_id] == 0, f"block {block_id} is in use"
            num_transfers[block_id], num_sequences[block_id] = 0, 1
        self._num_leased -= len(block_ids)
        self._num_in_use += len(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """A transfer is done with these."""
        num_sequences, num_transfers = self._num_sequences, self._num_transfers
        for block_id in reversed(block_ids):
            num_left = num_transfers[block_id] - 1
            assert num_left >= 0, f"block {block_id} is leased by no transfer"
            num_transfers[block_id] = num_left
            if not num_left and not num_sequences[block_id]:
                self._num_leased -= 1
                self._put_back(block_id)

    def is_shared(self, block_id: int) -> bool:
        """More than one holds it."""
        return self._num_sequences[block_id] + self._num_transfers[block_id] > 1

    def prepare_to_write(self, block_id: int) -> bool:
        """Whether its one sequence may write to it; False when others hold it too, who need a copy's original.

        What the index knew of a block that is written to is forgotten.
        """
        if self.is_shared(block_id):
            return False
        if block_id in self._names:
            self._forget(block_id)
        return True

    # The prefix index.

    def match(self, parents: Sequence[bytes], token_ids: Sequence[int]) -> PrefixMatch:
        """The longest known beginning of a prompt, short of its last token: that one is always computed.

        parents: the root and then the hashes of the prompt's full blocks, in order.
        """
        size = self.block_size
        found: list[int] = []
        for i, name in enumerate(parents[1:]):
            block_id = self._by_hash.get(name)
            if block_id is None or self._tokens_of(block_id) != tuple(token_ids[i * size : (i + 1) * size]):
                break
            found.append(block_id)
        if len(found) * size == len(token_ids):
            # All of it is known. The last block is copied, and its last token computed in the copy.
            last = found.pop()
            if last in self._pending:
                return PrefixMatch(tuple(found))
            return PrefixMatch(tuple(found), last, size - 1)
        begin = len(found) * size
        rest = token_ids[begin : min(begin + size, len(token_ids) - 1)]
        if not rest:
            return PrefixMatch(tuple(found))
        best, num_best = None, 0
        siblings = self._children.get(parents[len(found)], ())
        newest = (siblings,) if isinstance(siblings, int) else reversed(siblings)
        for block_id, _ in zip(newest, range(MAX_SIBLINGS), strict=False):
            # What this step computes cannot be copied before it.
            if block_id in self._pending:
                continue
            # Most have nothing in common.
            if self._tokens[block_id][self._begins[block_id]] == rest[0]:
                num_same = _common(self._tokens_of(block_id), rest)
                if num_same > num_best:
                    best, num_best = block_id, num_same
        return PrefixMatch(tuple(found), best, num_best)

    def find_saved(
        self, parents: Sequence[bytes], token_ids: Sequence[int], num_known: int
    ) -> list[PackedBlock]:
        """What the host tier holds of a prompt's full blocks after the first `num_known`.

        parents: as for `match`. All of it is whole now, and stays so for whoever has it.
        """
        if self._tier is None:
            return []
        size = self.block_size
        wanted = enumerate(parents[num_known + 1 :], start=num_known)
        found = self._tier.find((name, tuple(token_ids[i * size : (i + 1) * size])) for i, name in wanted)
        self._tell_removed([])
        return found

    def num_exact_of(self, block_ids: Sequence[int]) -> int:
        """How many of these stored blocks, from the first on, hold exactly what was computed from such."""
        return next((i for i, one in enumerate(block_ids) if one in self._lossy), len(block_ids))

    def count_exact(self, hashes: Sequence[bytes]) -> tuple[int, int]:
        """Exact blocks of these names that are computed, up to the first that is not known; how many of them the host tier has."""
        num_saved = 0
        for i, name in enumerate(hashes):
            if self._exact_block(name) is None:
                if name in self._by_hash or self._tier is None or not self._tier.has_exact(name):
                    return i, num_saved
                num_saved += 1
        return len(hashes), num_saved

    def is_known(self, name: bytes) -> bool:
        """A block of this name is in the pool: `find_exact` has not to look into the host tier."""
        return name in self._by_hash

    def find_exact(self, name: bytes) -> int | SavedBlock | None:
        """A block that `count_exact` counts: where it is, or what `put_back` takes."""
        if name in self._by_hash:
            return self._exact_block(name)
        found = self._tier.find_exact(name) if self._tier is not None else None
        # It may have been found damaged.
        self._tell_removed([])
        return found

    def put_back(self, saved: Sequence[SavedBlock]) -> list[int]:
        """Blocks of the host tier, none of them known here, into the pool, for a transfer that holds them.

        The caller has checked `num_available`. Their KV is copied at once.
        """
        if self._tier is None:
            return []
        self._tier.used(saved)
        taken = self.lease(len(saved))
        for block_id, one in zip(taken, saved, strict=True):
            self._tier.unpack(one, block_id)
            self.store(block_id, one.name, one.parent, one.token_ids)
        return taken

    def _exact_block(self, name: bytes) -> int | None:
        block_id = self._by_hash.get(name)
        return None if block_id in self._pending or block_id in self._lossy else block_id

    def num_cached_of(self, block_ids: Sequence[int]) -> int:
        """How many of these are held by nobody: `num_available` falls by so many if they are shared."""
        return sum(block_id in self._cached for block_id in block_ids)

    def is_computed(self, block_id: int) -> bool:
        """No step is still to compute what the index knows of it."""
        return block_id not in self._pending

    def store(
        self,
        block_id: int,
        name: bytes,
        parent: bytes,
        token_ids: Sequence[int],
        *,
        is_pending: bool = False,
        is_lossy: bool = False,
    ) -> bool:
        """The block holds the KV of these tokens after `parent`. The first block of a name is kept: False when there
        is another.

        is_pending: it will hold them when the step has run that is being planned. is_lossy: the KV is near to theirs,
        and not the same.
        """
        if name in self._by_hash:
            return False
        assert block_id not in self._names, f"block {block_id} holds something else"
        self._names[block_id], self._parents[block_id] = name, parent
        self._tokens[block_id], self._begins[block_id] = tuple(token_ids), 0
        self._by_hash[name] = block_id
        if is_lossy:
            self._lossy.add(block_id)
        self._add_child(parent, block_id)
        if is_pending:
            self._pending[block_id] = None
        else:
            self.news.stored(parent, (name,))
        return True

    def store_chain(
        self,
        block_ids: Sequence[int],
        names: Sequence[bytes],
        token_ids: Sequence[int],
        *,
        is_pending: bool = False,
    ) -> None:
        """`store` for blocks that follow on each other, exact ones. names: the parent of the first, then theirs. token_ids: of all of them."""
        size, new = self.block_size, names[1:]
        if len(block_ids) < 2 or not self._by_hash.keys().isdisjoint(new):
            for i, (block_id, name) in enumerate(zip(block_ids, new, strict=True)):
                self.store(
                    block_id, name, names[i], token_ids[i * size : (i + 1) * size], is_pending=is_pending
                )
            return
        assert self._names.keys().isdisjoint(block_ids), f"one of blocks {block_ids} holds something else"
        self._names.update(zip(block_ids, new, strict=True))
        self._parents.update(zip(block_ids, names, strict=False))
        self._tokens.update(dict.fromkeys(block_ids, tuple(token_ids)))
        self._begins.update(zip(block_ids, count(0, size), strict=False))
        self._by_hash.update(zip(new, block_ids, strict=True))
        # Others may begin as they do; of the rest nobody is the child, but for what was evicted before its children.
        self._add_child(names[0], block_ids[0])
        if self._children.keys().isdisjoint(new):
            self._children.update(zip(new, block_ids[1:], strict=False))
        else:
            for parent, block_id in zip(new, block_ids[1:], strict=False):
                self._add_child(parent, block_id)
        if is_pending:
            self._pending.update(dict.fromkeys(block_ids))
        else:
            self.news.stored(names[0], new)

    def _tokens_of(self, block_id: int) -> tuple[int, ...]:
        begin = self._begins[block_id]
        return self._tokens[block_id][begin : begin + self.block_size]

    def _add_child(self, parent: bytes, block_id: int) -> None:
        siblings = self._children.setdefault(parent, block_id)
        if siblings == block_id:
            return
        if isinstance(siblings, int):
            self._children[parent] = {siblings: None, block_id: None}
        else:
            siblings[block_id] = None

    def _remove_child(self, parent: bytes, block_id: int) -> None:
        siblings = self._children[parent]
        if not isinstance(siblings, int):
            del siblings[block_id]
            if siblings:
                return
        del self._children[parent]

    @property
    def pending(self) -> tuple[int, ...]:
        """Blocks that will hold what the index says when the steps have run that are planned."""
        return tuple(self._pending)

    def settle(self, block_ids: Iterable[int]) -> None:
        """A step has run: what was pending of these is computed."""
        computed = [block_id for block_id in block_ids if block_id in self._pending]
        if not computed:
            return
        for block_id in computed:
            del self._pending[block_id]
        names = [self._names[block_id] for block_id in computed]
        parents = [self._parents[block_id] for block_id in computed]
        # Where one is not the child of the one before it another chain begins.
        begins = compress(count(1), map(ne, parents[1:], names))
        for begin, end in pairwise([0, *begins, len(names)]):
            self.news.stored(parents[begin], names[begin:end])

    def forget_pending(self) -> None:
        """The step has failed: what was pending holds nothing."""
        pending, self._pending = list(self._pending), {}
        for block_id in pending:
            self._forget(block_id, is_told=False)
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def watch(self) -> None:
        """From now on changes of the index are told, beginning with all that it knows."""
        known = self._tier.parents() if self._tier is not None else {}
        known |= {name: self._parents[i] for i, name in self._names.items() if i not in self._pending}
        #: By the last block of each: what comes before its first, and all of it.
        chains: dict[bytes, tuple[bytes, list[bytes]]] = {}
        for name, parent in known.items():
            first, names = chains.pop(parent, (parent, []))
            names.append(name)
            chains[name] = first, names
        self.news.watch(
            KvBlocksStored(first, tuple(names), is_known=True) for first, names in chains.values()
        )

    def take_events(self) -> list[KvBlocksStored | KvBlocksRemoved]:
        """Changes of the index since the last call, in order; new blocks that follow on each other are one."""
        return self.news.take()

    # Checks.

    def check_invariants(self) -> None:
        """Counts agree with holders, and the index with the blocks."""
        touched = len(self._num_sequences)
        assert len(self._num_transfers) == touched <= self.num_blocks
        used = list(compress(range(touched), self._num_sequences))
        sent = list(compress(range(touched), self._num_transfers))
        assert all(self._num_sequences[i] > 0 for i in used)
        assert all(self._num_transfers[i] > 0 for i in sent)
        held = {*used, *sent}
        assert self._num_in_use == len(used)
        assert self._num_leased == len(held) - len(used)
        free, cached, stored = set(self._free), self._cached.keys(), self._names
        assert len(free) == len(self._free) == touched - len(held) - len(cached)
        assert all(min(found) >= 0 and max(found) < touched for found in (free, cached) if found)
        assert free.isdisjoint(held)
        assert free.isdisjoint(stored)
        assert held.isdisjoint(cached)
        assert cached <= stored.keys()
        assert len(self._by_hash) == len(stored)
        assert all(map(eq, map(self._by_hash.get, stored.values()), stored))
        assert stored.keys() == self._parents.keys() == self._tokens.keys() == self._begins.keys()
        # Each child is listed under its parent, and there are as many of them as there are blocks: each is listed, and once.
        single = {parent: one for parent, one in self._children.items() if isinstance(one, int)}
        several = {parent: ones for parent, ones in self._children.items() if not isinstance(ones, int)}
        assert len(single) + sum(map(len, several.values())) == len(stored)
        assert all(map(eq, map(self._parents.get, single.values()), single))
        assert all(self._parents[one] == parent for parent, siblings in several.items() for one in siblings)
        assert all(several.values())
        assert self._pending.keys() <= stored.keys()
        assert self._lossy <= stored.keys()
        if self._tier is not None:
            self._tier.check_invariants()
        if self.spans is not None:
            self.spans.check_invariants()
            assert set(self.spans.block_ids()) <= stored.keys()

    def check_owners(self, *, in_use: Sequence[int], leased: Sequence[int]) -> None:
        """Sequences and transfers name each block exactly as often as it counts them."""
        for name, named, counted in (
            ("in use", in_use, self._num_sequences),
            ("leased", leased, self._num_transfers),
        ):
            found = [0] * len(counted)
            for block_id in named:
                found[block_id] += 1
            assert found == counted, name

    def _take(self, num_blocks: int) -> list[int]:
        free, touched = self._free, len(self._num_sequences)
        num_short = num_blocks - len(free) - (self.num_blocks - touched)
        if num_short > 0:
            assert num_short <= len(self._cached), f"asked for {num_blocks} of {self.num_available} blocks"
            self._evict(num_short)
        # From the top of the stack.
        taken = free[: -num_blocks - 1 : -1]
        del free[len(free) - len(taken) :]
        num_new = num_blocks - len(taken)
        if num_new:
            taken += range(touched, touched + num_new)
            self._num_sequences += [0] * num_new
            self._num_transfers += [0] * num_new
        return taken

    def _evict(self, num_blocks: int) -> None:
        """So many of the cached blocks are free now, the one that was used longest ago the first."""
        removed: list[bytes] = []
        for _ in range(num_blocks):
            block_id = next(iter(self._cached))
            del self._cached[block_id]
            name = self._names[block_id]
            removed.append(name)
            if self._tier is not None:
                # A block that a step is still to compute is held by its sequence, so this one is computed.
                assert block_id not in self._pending, f"block {block_id} is not computed yet"
                parent, token_ids = self._parents[block_id], self._tokens_of(block_id)
                self._tier.save(block_id, name, parent, token_ids, is_lossy=block_id in self._lossy)
            self._forget(block_id, is_told=False)
            self._free.append(block_id)
        self._tell_removed(removed)

    def _put_back(self, block_id: int) -> None:
        """Nobody holds it any more."""
        if block_id in self._names:
            self._cached[block_id] = None
        else:
            self._free.append(block_id)

    def _forget(self, block_id: int, *, is_told: bool = True) -> None:
        """Take it out of the index."""
        name, parent = self._names.pop(block_id), self._parents.pop(block_id)
        del self._tokens[block_id], self._begins[block_id]
        self._lossy.discard(block_id)
        if self.spans is not None:
            self.spans.remove(block_id)
        del self._by_hash[name]
        self._remove_child(parent, block_id)
        is_pending = self._pending.pop(block_id, self) is None
        if is_told and not is_pending:
            self._tell_removed([name])

    def _tell_removed(self, names: list[bytes]) -> None:
        """These have left the pool, and some perhaps the tier: tell of those that are in neither now."""
        if self._tier is not None:
            tier, left = self._tier, [*names, *self._tier.take_dropped()]
            names = [name for name in dict.fromkeys(left) if name not in tier and not self._is_told(name)]
        self.news.removed(names)

    def _is_told(self, name: bytes) -> bool:
        """A block of the pool holds it, and it is computed."""
        block_id = self._by_hash.get(name)
        return block_id is not None and block_id not in self._pending


def _common(stored: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (one, other) in enumerate(zip(stored, wanted, strict=False)):
        if one != other:
            return i
    return min(len(stored), len(wanted))
