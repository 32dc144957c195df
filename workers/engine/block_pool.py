"""Who holds which KV block. Pure.

A block is held by sequences (IN USE, shared by any number), by transfers (LEASED when by them alone), or
by nobody: then it is CACHED while it holds KV that the prefix index knows, and FREE otherwise. A cached
block is taken when no free one is left, the one that was used longest ago first; with a host tier, what it
holds is saved there in that moment, before its next holder can write to it.

free + cached + in use + leased = total, always.
"""

from collections.abc import Sequence
from itertools import compress

from workers.api import BlockCounts, KvBlocksRemoved, KvBlocksStored
from workers.engine.host_tier import HostTier, HostTierCounts, PackedBlock, SavedBlock
from workers.engine.prefix_index import PrefixIndex
from workers.engine.span_reuse.span_index import SpanIndex


class BlockPool:
    """Hands out block ids 0..num_blocks-1; its index finds those that hold the beginning of a prompt.

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
        self.index = PrefixIndex(block_size, spans)
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
        stored, cached, free = self.index.names, self._cached, self._free
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
        name = self.index.names.get(block_id)
        if name is not None and self.index.forget(block_id):
            self._tell_removed([name])
        return True

    # What the host tier has of the prefix index.

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

    def count_exact(self, hashes: Sequence[bytes]) -> tuple[int, int]:
        """Exact blocks of these names that are computed, up to the first that is not known; how many of them the host tier has."""
        num_saved = 0
        for i, name in enumerate(hashes):
            if self.index.exact_block(name) is None:
                if self.index.is_known(name) or self._tier is None or not self._tier.has_exact(name):
                    return i, num_saved
                num_saved += 1
        return len(hashes), num_saved

    def find_exact(self, name: bytes) -> int | SavedBlock | None:
        """A block that `count_exact` counts: where it is, or what `put_back` takes."""
        if self.index.is_known(name):
            return self.index.exact_block(name)
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
            self.index.store(block_id, one.name, one.parent, one.token_ids)
        return taken

    def num_cached_of(self, block_ids: Sequence[int]) -> int:
        """How many of these are held by nobody: `num_available` falls by so many if they are shared."""
        return sum(block_id in self._cached for block_id in block_ids)

    def forget_pending(self) -> None:
        """The step has failed: what was pending holds nothing."""
        for block_id in self.index.forget_pending():
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def watch(self) -> None:
        """From now on changes of the index are told, beginning with all that it and the host tier know."""
        self.index.watch(self._tier.parents() if self._tier is not None else {})

    def take_events(self) -> list[KvBlocksStored | KvBlocksRemoved]:
        """Changes of the index since the last call, in order; new blocks that follow on each other are one."""
        return self.index.news.take()

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
        free, cached, stored = set(self._free), self._cached.keys(), self.index.names
        assert len(free) == len(self._free) == touched - len(held) - len(cached)
        assert all(min(found) >= 0 and max(found) < touched for found in (free, cached) if found)
        assert free.isdisjoint(held)
        assert free.isdisjoint(stored)
        assert held.isdisjoint(cached)
        assert cached <= stored.keys()
        self.index.check_invariants()
        if self._tier is not None:
            self._tier.check_invariants()

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
            name = self.index.names[block_id]
            removed.append(name)
            if self._tier is not None:
                # A block that a step is still to compute is held by its sequence, so this one is computed.
                assert self.index.is_computed(block_id), f"block {block_id} is not computed yet"
                parent, token_ids = self.index.parent_of(block_id), self.index.tokens_of(block_id)
                self._tier.save(block_id, name, parent, token_ids, is_lossy=self.index.is_lossy(block_id))
            self.index.forget(block_id)
            self._free.append(block_id)
        self._tell_removed(removed)

    def _put_back(self, block_id: int) -> None:
        """Nobody holds it any more."""
        if block_id in self.index.names:
            self._cached[block_id] = None
        else:
            self._free.append(block_id)

    def _tell_removed(self, names: list[bytes]) -> None:
        """These have left the pool, and some perhaps the tier: tell of those that are in neither now."""
        if self._tier is not None:
            tier, index, left = self._tier, self.index, [*names, *self._tier.take_dropped()]
            names = [name for name in dict.fromkeys(left) if name not in tier and not index.is_told(name)]
        self.index.news.removed(names)
