"""What followed which tokens so far, one table for each tenant. Pure.

Bounded in every direction: contexts by least recent use, successors of a context by count, counts by a
cap, tables by least recent use. Tables are never shared between tenants: a draft that is accepted shows in
the timing, so a shared table would tell one tenant what another one wrote.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from types import MappingProxyType

#: Successors kept of one context. Source: ADED's code.
MAX_SUCCESSORS = 12
#: A count goes no higher, so that new text can catch up with old.
MAX_COUNT = 16
#: Contexts of all lengths kept in one table; about 430 bytes each.
MAX_CONTEXTS = 16384
MAX_TENANTS = 16
#: Longest context of drafts: of ADED's trigrams, two tokens, it is one more.
DRAFT_CONTEXT = 3

_NOTHING: Mapping[int, int] = MappingProxyType({})


class NgramTable:
    """Counts of the token after each context of 1 to `max_context` tokens."""

    def __init__(self, max_context: int = DRAFT_CONTEXT, max_contexts: int = MAX_CONTEXTS) -> None:
        assert max_context >= 1
        assert max_contexts >= 1
        self.max_context = max_context
        self._max_contexts = max_contexts
        self._successors: OrderedDict[tuple[int, ...], dict[int, int]] = OrderedDict()

    def __len__(self) -> int:
        """Contexts held."""
        return len(self._successors)

    def learn(self, token_ids: SequenceOf[int], start: int = 0) -> None:
        """Count the n-grams that end at positions `start` and later of a sequence.

        The caller moves `start` on by what it has learned, so that each n-gram is counted once.
        """
        for end in range(max(start, 1), len(token_ids)):
            for length in range(1, min(self.max_context, end) + 1):
                self._count(tuple(token_ids[end - length : end]), token_ids[end])

    def successors(self, context: tuple[int, ...]) -> Mapping[int, int]:
        """Token -> count after exactly this context; empty when it was never seen."""
        return self._successors.get(context, _NOTHING)

    def check_invariants(self) -> None:
        """Nothing outgrows its bound."""
        assert len(self._successors) <= self._max_contexts
        for context, counts in self._successors.items():
            assert 1 <= len(context) <= self.max_context
            assert 1 <= len(counts) <= MAX_SUCCESSORS
            assert all(1 <= count <= MAX_COUNT for count in counts.values())

    def _count(self, context: tuple[int, ...], token_id: int) -> None:
        counts = self._successors.get(context)
        if counts is None:
            if len(self._successors) >= self._max_contexts:
                self._successors.popitem(last=False)
            self._successors[context] = {token_id: 1}
            return
        self._successors.move_to_end(context)
        # The newest is last, so of equal counts the oldest goes first.
        count = counts.pop(token_id, 0)
        if count == 0 and len(counts) >= MAX_SUCCESSORS:
            del counts[min(counts, key=counts.__getitem__)]
        counts[token_id] = min(count + 1, MAX_COUNT)


class NgramTables:
    """A table for each cache salt; the one unused for longest makes room for a new one."""

    def __init__(
        self,
        max_context: int = DRAFT_CONTEXT,
        *,
        max_tenants: int = MAX_TENANTS,
        max_contexts: int = MAX_CONTEXTS,
    ) -> None:
        assert max_tenants >= 1
        self._max_context = max_context
        self._max_tenants = max_tenants
        self._max_contexts = max_contexts
        self._tables: OrderedDict[str, NgramTable] = OrderedDict()

    def __len__(self) -> int:
        """Tables held."""
        return len(self._tables)

    def __iter__(self) -> Iterator[str]:
        """Salts, the one unused for longest first."""
        return iter(self._tables)

    def of(self, cache_salt: str) -> NgramTable:
        """The table of a tenant, empty at first. Ask for it anew in each step: it may have been dropped."""
        table = self._tables.get(cache_salt)
        if table is None:
            if len(self._tables) >= self._max_tenants:
                self._tables.popitem(last=False)
            table = self._tables[cache_salt] = NgramTable(self._max_context, self._max_contexts)
        self._tables.move_to_end(cache_salt)
        return table
