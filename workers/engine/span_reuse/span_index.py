"""Finds the parts of a prompt whose KV this worker has from other contexts. Pure.

Full blocks are known by hashes of windows of their tokens; a prompt is searched by the same hash at every place, what
is found is compared token by token, and extended to both sides through the blocks before and after. A tenant, which
is a root of `block_hash`, finds what was added under that root alone.
Source: KVShare (arXiv 2503.16525), retrieval of spans of any length; windows at fixed places in what is known and at
every place in what is looked for are those of rsync (Tridgell 1999, section 3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

#: Tokens of a window, at most: a span of twice as many has a whole window of it, wherever blocks begin.
WINDOW_TOKENS = 16
#: Shorter spans are not worth their errors: a token's KV depends most on what is just before it.
MIN_SPAN_TOKENS = 2 * WINDOW_TOKENS
#: Places of one window that are remembered, the newest.
MAX_PLACES = 8
#: Blocks after one block that are looked at.
MAX_CHILDREN = 32

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.array([pow(0x100000001B3, i, 2**64) for i in range(WINDOW_TOKENS)], np.uint64)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[start, start + num_tokens)` of a prompt, whose KV is in these blocks, in order."""

    start: int
    num_tokens: int
    block_ids: tuple[int, ...]
    #: Place of the first token in the first block.
    offset: int
    #: What position its K is of.
    old_start: int

    @property
    def end(self) -> int:
        """After its last token."""
        return self.start + self.num_tokens


class _Block(NamedTuple):
    root: bytes
    name: bytes
    parent: bytes
    position: int
    token_ids: tuple[int, ...]


class _Run(NamedTuple):
    """Blocks in order, and how many tokens of them are those of the prompt."""

    block_ids: list[int]
    num_tokens: int


class SpanIndex:
    """What full blocks hold, by the windows of their tokens. Bounded by the blocks that are known."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._window = min(block_size, WINDOW_TOKENS)
        # The last one ends with the block, so that no two begin further apart than they are long.
        last = block_size - self._window
        self._offsets = (*range(0, last, self._window), last)
        self._blocks: dict[int, _Block] = {}
        self._by_name: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, None]] = {}
        #: Root -> hash of a window -> block and place in it.
        self._places: dict[bytes, dict[int, dict[tuple[int, int], None]]] = {}

    def block_ids(self) -> tuple[int, ...]:
        """Blocks of which it is known what they hold."""
        return tuple(self._blocks)

    def add(
        self,
        block_id: int,
        *,
        root: bytes,
        name: bytes,
        parent: bytes,
        position: int,
        token_ids: Sequence[int],
    ) -> None:
        """The block holds the KV of these tokens, the first of which is at `position`; names as in `block_hash`."""
        assert block_id not in self._blocks, f"block {block_id} holds something else"
        block = _Block(root, name, parent, position, tuple(token_ids))
        assert len(block.token_ids) == self._block_size, block
        self._blocks[block_id] = block
        self._by_name[name] = block_id
        self._children.setdefault(parent, {})[block_id] = None
        by_hash = self._places.setdefault(root, {})
        for window, offset in self._windows_of(block):
            places = by_hash.setdefault(window, {})
            places[block_id, offset] = None
            if len(places) > MAX_PLACES:
                del places[next(iter(places))]

    def remove(self, block_id: int) -> None:
        """The block holds that no more. Nothing happens when it is not known."""
        block = self._blocks.pop(block_id, None)
        if block is None:
            return
        del self._by_name[block.name]
        children = self._children[block.parent]
        del children[block_id]
        if not children:
            del self._children[block.parent]
        by_hash = self._places[block.root]
        for window, offset in self._windows_of(block):
            places = by_hash.get(window, {})
            places.pop((block_id, offset), None)
            if not places:
                by_hash.pop(window, None)
        if not by_hash:
            del self._places[block.root]

    def find(
        self, root: bytes, token_ids: Sequence[int], start: int, end: int, is_ready: Callable[[int], bool]
    ) -> list[Span]:
        """Spans of the tokens `[start, end)`, none overlapping another, in order, each of MIN_SPAN_TOKENS at least.

        is_ready: whether a block's KV is computed. Whatever of that length is left between spans is not known, but for
        what more than MAX_PLACES blocks hold.
        """
        hashes = window_hashes(token_ids[start:end], self._window).tolist()
        by_hash = self._places.get(root, {})

        def longest(at: int, free: int) -> Span | None:
            found = (
                self._span_at(block_id, offset, token_ids, at, (free, end), is_ready)
                for block_id, offset in by_hash.get(hashes[at - start], ())
                if is_ready(block_id)
            )
            long = [span for span in found if span.num_tokens >= MIN_SPAN_TOKENS]
            return max(long, key=lambda span: span.num_tokens, default=None)

        spans: list[Span] = []
        at = free = start
        while at - start < len(hashes):
            best = longest(at, free)
            if best is None:
                at += 1
                continue
            # A longer one may have its first window a little later.
            for later in range(at + 1, min(at + self._window, start + len(hashes))):
                other = longest(later, free)
                if other is not None and other.num_tokens > best.num_tokens:
                    best = other
            spans.append(best)
            at = free = best.end
        return spans

    def check_invariants(self) -> None:
        """Every entry is of a block that is known."""
        assert self._by_name == {block.name: i for i, block in self._blocks.items()}
        children = {(block.parent, i) for i, block in self._blocks.items()}
        assert children == {(parent, i) for parent, those in self._children.items() for i in those}
        for root, by_hash in self._places.items():
            assert by_hash, root
            assert all(0 < len(places) <= MAX_PLACES for places in by_hash.values())
            for window, places in by_hash.items():
                for block_id, offset in places:
                    assert self._blocks[block_id].root == root
                    assert (window, offset) in self._windows_of(self._blocks[block_id])

    def _windows_of(self, block: _Block) -> list[tuple[int, int]]:
        """Hash and place of each."""
        hashes = window_hashes(block.token_ids, self._window)
        return [(int(hashes[offset]), offset) for offset in self._offsets]

    def _span_at(
        self,
        block_id: int,
        offset: int,
        token_ids: Sequence[int],
        at: int,
        bounds: tuple[int, int],
        is_ready: Callable[[int], bool],
    ) -> Span:
        """The longest span within `bounds` in which token `at` is that at `offset` of this block; perhaps of 0."""
        first, end = bounds
        right = self._to_the_right(block_id, offset, token_ids, at, end, is_ready)
        left = self._to_the_left(block_id, offset, token_ids, at, first, is_ready)
        num_before = left.num_tokens
        head = left.block_ids[0] if left.block_ids else block_id
        # Blocks on the left are whole but for the first.
        begin = (offset - num_before) % self._block_size
        return Span(
            start=at - num_before,
            num_tokens=num_before + right.num_tokens,
            block_ids=(*left.block_ids, *right.block_ids),
            offset=begin,
            old_start=self._blocks[head].position + begin,
        )

    def _to_the_right(
        self,
        block_id: int,
        offset: int,
        token_ids: Sequence[int],
        at: int,
        end: int,
        is_ready: Callable[[int], bool],
    ) -> _Run:
        """From this place of the block on."""
        size = self._block_size
        num_tokens = _common(
            self._blocks[block_id].token_ids[offset:], token_ids[at : min(end, at + size - offset)]
        )
        block_ids = [block_id]
        is_whole = num_tokens == size - offset
        while is_whole and at + num_tokens < end:
            wanted = token_ids[at + num_tokens : min(end, at + num_tokens + size)]
            num_best = 0
            children = self._children.get(self._blocks[block_ids[-1]].name, {})
            for child, _ in zip(reversed(children), range(MAX_CHILDREN), strict=False):
                num_same = _common(self._blocks[child].token_ids, wanted) if is_ready(child) else 0
                if num_same > num_best:
                    best, num_best = child, num_same
            if num_best == 0:
                break
            block_ids.append(best)
            num_tokens += num_best
            is_whole = num_best == size
        return _Run(block_ids, num_tokens)

    def _to_the_left(
        self,
        block_id: int,
        offset: int,
        token_ids: Sequence[int],
        at: int,
        first: int,
        is_ready: Callable[[int], bool],
    ) -> _Run:
        """Up to this place of the block; block ids without the block itself."""
        size = self._block_size
        before = self._blocks[block_id].token_ids[:offset]
        num_tokens = _common(before[::-1], token_ids[max(first, at - offset) : at][::-1])
        block_ids: list[int] = []
        is_whole = num_tokens == offset
        while is_whole and at - num_tokens > first:
            head = block_ids[0] if block_ids else block_id
            parent = self._by_name.get(self._blocks[head].parent)
            if parent is None or not is_ready(parent):
                break
            end = at - num_tokens
            num_same = _common(
                self._blocks[parent].token_ids[::-1], token_ids[max(first, end - size) : end][::-1]
            )
            if num_same == 0:
                break
            block_ids.insert(0, parent)
            num_tokens += num_same
            is_whole = num_same == size
        return _Run(block_ids, num_tokens)


def window_hashes(token_ids: Sequence[int], window: int) -> NDArray[np.uint64]:
    """A hash of the `window` tokens from each place on, [len(token_ids) - window + 1], empty for fewer tokens.

    window: at most WINDOW_TOKENS. A polynomial modulo 2**64 of tokens that were mixed; different windows may share one.
    """
    if len(token_ids) < window:
        return np.zeros(0, np.uint64)
    mixed = (np.asarray(token_ids, np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    hashes: NDArray[np.uint64] = (sliding_window_view(mixed, window) * _POWERS[:window]).sum(
        axis=1, dtype=np.uint64
    )
    return hashes


def _common(known: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (one, other) in enumerate(zip(known, wanted, strict=False)):
        if one != other:
            return i
    return min(len(known), len(wanted))
