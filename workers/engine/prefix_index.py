"""Which blocks hold KV that later prompts can use: names, what is before them, and tokens. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, count, pairwise
from operator import eq, ne

from workers.api import KvBlocksStored
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


class PrefixIndex:
    """Finds blocks that hold the beginning of a prompt, by name: what a block's tokens are after those of all before it.

    Who holds a block is nothing to it; see BlockPool.
    """

    def __init__(self, block_size: int, spans: SpanIndex | None = None) -> None:
        self.block_size = block_size
        #: Knows some of the blocks that are known here. `Batch` adds to it; what is forgotten here goes there.
        self.spans = spans
        #: What is known of a block: its name, that of the block before it, and its tokens, which begin so far into those of all
        #: blocks that were stored with it. No object of each block's own, which the garbage collector would look at. These tokens stay
        #: as long as one of the blocks does.
        self.names: dict[int, bytes] = {}
        self._parents: dict[int, bytes] = {}
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._begins: dict[int, int] = {}
        #: Of those, blocks whose KV came through a lossy codec or was computed from such: for prompts of this worker alone.
        self._lossy: set[int] = set()
        self._by_hash: dict[bytes, int] = {}
        #: By the name of the block before them: nearly always it is one.
        self._children: dict[bytes, int | dict[int, None]] = {}
        #: Here already, but computed by the step that is being planned or run.
        self._pending: dict[int, None] = {}
        #: What has not been told yet.
        self.news = KvNews()

    def match(self, parents: Sequence[bytes], token_ids: Sequence[int]) -> PrefixMatch:
        """The longest known beginning of a prompt, short of its last token: that one is always computed.

        parents: the root and then the hashes of the prompt's full blocks, in order.
        """
        size = self.block_size
        found: list[int] = []
        for i, name in enumerate(parents[1:]):
            block_id = self._by_hash.get(name)
            if block_id is None or self.tokens_of(block_id) != tuple(token_ids[i * size : (i + 1) * size]):
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
                num_same = _common(self.tokens_of(block_id), rest)
                if num_same > num_best:
                    best, num_best = block_id, num_same
        return PrefixMatch(tuple(found), best, num_best)

    def num_exact_of(self, block_ids: Sequence[int]) -> int:
        """How many of these stored blocks, from the first on, hold exactly what was computed from such."""
        return next((i for i, one in enumerate(block_ids) if one in self._lossy), len(block_ids))

    def is_known(self, name: bytes) -> bool:
        """A block of this name is in the pool: `BlockPool.find_exact` has not to look into the host tier."""
        return name in self._by_hash

    def exact_block(self, name: bytes) -> int | None:
        """The block of this name, if it is computed, and exactly."""
        block_id = self._by_hash.get(name)
        return None if block_id in self._pending or block_id in self._lossy else block_id

    def is_computed(self, block_id: int) -> bool:
        """No step is still to compute what the index knows of it."""
        return block_id not in self._pending

    def is_lossy(self, block_id: int) -> bool:
        """What it holds is near to what would be computed, and not the same."""
        return block_id in self._lossy

    def parent_of(self, block_id: int) -> bytes:
        """The name of what is before it."""
        return self._parents[block_id]

    def is_told(self, name: bytes) -> bool:
        """A block of the pool holds this, and it is computed."""
        block_id = self._by_hash.get(name)
        return block_id is not None and block_id not in self._pending

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
        assert block_id not in self.names, f"block {block_id} holds something else"
        self.names[block_id], self._parents[block_id] = name, parent
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
        assert self.names.keys().isdisjoint(block_ids), f"one of blocks {block_ids} holds something else"
        self.names.update(zip(block_ids, new, strict=True))
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

    def tokens_of(self, block_id: int) -> tuple[int, ...]:
        """Of which it holds the KV."""
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
        names = [self.names[block_id] for block_id in computed]
        parents = [self._parents[block_id] for block_id in computed]
        # Where one is not the child of the one before it another chain begins.
        begins = compress(count(1), map(ne, parents[1:], names))
        for begin, end in pairwise([0, *begins, len(names)]):
            self.news.stored(parents[begin], names[begin:end])

    def forget(self, block_id: int) -> bool:
        """It holds this no more; True when it was computed, and so may have been told of."""
        name, parent = self.names.pop(block_id), self._parents.pop(block_id)
        del self._tokens[block_id], self._begins[block_id]
        self._lossy.discard(block_id)
        if self.spans is not None:
            self.spans.remove(block_id)
        del self._by_hash[name]
        self._remove_child(parent, block_id)
        return self._pending.pop(block_id, self) is not None

    def forget_pending(self) -> list[int]:
        """The step has failed: what was pending holds nothing. The blocks that it was in."""
        pending, self._pending = list(self._pending), {}
        for block_id in pending:
            self.forget(block_id)
        return pending

    def watch(self, known: dict[bytes, bytes]) -> None:
        """From now on changes are told, beginning with all that is known here and with `known`, names and those before them."""
        known = known | {name: self._parents[i] for i, name in self.names.items() if i not in self._pending}
        #: By the last block of each: what comes before its first, and all of it.
        chains: dict[bytes, tuple[bytes, list[bytes]]] = {}
        for name, parent in known.items():
            first, names = chains.pop(parent, (parent, []))
            names.append(name)
            chains[name] = first, names
        self.news.watch(
            KvBlocksStored(first, tuple(names), is_known=True) for first, names in chains.values()
        )

    def check_invariants(self) -> None:
        """What is known of a block is known in all respects."""
        stored = self.names
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
        if self.spans is not None:
            self.spans.check_invariants()
            assert set(self.spans.block_ids()) <= stored.keys()


def _common(stored: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (one, other) in enumerate(zip(stored, wanted, strict=False)):
        if one != other:
            return i
    return min(len(stored), len(wanted))
