"""Guessed continuations of one sequence as a tree, so that one step of the model checks all of them. Pure.

Row 0 stands for the sequence's last real token, whose KV that step computes as well; row i + 1 for draft i.
A parent comes before its children, and the drafts worth most come first: the first n drafts of a tree are a
tree again.
"""

import heapq
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.engine.decoding.ngram_table import NgramTable

#: Drafts one below the other.
MAX_DEPTH = 10
#: How much of the chance a context leaves to tokens it never saw, as if they had been seen so often.
#: Measured: with 2 the chances of text by the embedded model are about as often right as they say.
ESCAPE = 2.0
#: Drafts less likely than this are not made: a row costs more than they bring.
MIN_CHANCE = 0.02


@dataclass(frozen=True, slots=True)
class DraftTree:
    """token_ids[i] is draft i; parents[i] the row it follows, 0 to i; depths[i] >= 1 its distance from row 0.

    chances[i]: of the whole path to draft i, 0 to 1, as whoever made the tree estimates it.
    The drafts that follow one row are distinct.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    @property
    def num_drafts(self) -> int:
        """Rows of the step beyond the one that it has anyway."""
        return len(self.token_ids)

    @property
    def position_offsets(self) -> tuple[int, ...]:
        """Of each row, what is added to the position of row 0."""
        return (0, *self.depths)

    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [num_drafts + 1, num_drafts + 1]: whether a row sees a column, itself and what it follows.

        What came before row 0 is seen by all.
        """
        sees = np.eye(self.num_drafts + 1, dtype=np.bool_)
        for row, parent in enumerate(self.parents, start=1):
            sees[row] |= sees[parent]
        return sees

    def path(self, row: int) -> tuple[int, ...]:
        """Draft tokens after row 0 up to this row: what the sampler adds to the sequence's tokens there."""
        tokens: list[int] = []
        while row > 0:
            tokens.append(self.token_ids[row - 1])
            row = self.parents[row - 1]
        return tuple(reversed(tokens))

    def first(self, num_drafts: int) -> "DraftTree":
        """The tree of the first drafts alone."""
        return DraftTree(
            self.token_ids[:num_drafts],
            self.parents[:num_drafts],
            self.depths[:num_drafts],
            self.chances[:num_drafts],
        )

    def check_invariants(self) -> None:
        """Parents first, depths right, no row followed twice by one token."""
        assert len(self.token_ids) == len(self.parents) == len(self.depths) == len(self.chances)
        assert all(0 <= chance <= 1 for chance in self.chances)
        offsets = self.position_offsets
        for i, parent in enumerate(self.parents):
            assert 0 <= parent <= i
            assert self.depths[i] == offsets[parent] + 1
        assert len(set(zip(self.parents, self.token_ids, strict=True))) == self.num_drafts


def chances_after(table: NgramTable, context: tuple[int, ...]) -> list[tuple[int, float]]:
    """Tokens that may come next, likeliest first, with a chance each; they sum to less than 1.

    Of the longest context that was seen; what it leaves to new tokens goes to the next shorter one.
    """
    chances: dict[int, float] = {}
    left = 1.0
    for length in range(min(table.max_context, len(context)), 0, -1):
        counts = table.successors(context[len(context) - length :])
        if not counts:
            continue
        share = left / (sum(counts.values()) + ESCAPE)
        # The newest first, which wins among equals.
        for token_id in reversed(counts):
            chances[token_id] = chances.get(token_id, 0.0) + share * counts[token_id]
        left = share * ESCAPE
    return sorted(chances.items(), key=lambda item: -item[1])


def likeliest_tree(table: NgramTable, token_ids: SequenceOf[int], max_drafts: int) -> DraftTree:
    """The drafts whose whole path is likeliest by the table, at most `max_drafts`; none if it knows nothing.

    token_ids: the end of the sequence, at least as long as the table's contexts if there is so much.
    Of all trees of this size it has the most accepted drafts to be expected, were the table right.
    """
    context = tuple(token_ids[-table.max_context :])
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    chances: list[float] = []
    # (-chance of the path, order of entry, token, parent row, depth, context before the token).
    frontier: list[tuple[float, int, int, int, int, tuple[int, ...]]] = []
    num_seen = 0

    def open_row(row: int, depth: int, chance: float, context: tuple[int, ...]) -> None:
        nonlocal num_seen
        for token_id, share in chances_after(table, context)[: max_drafts - len(tokens)]:
            if chance * share < MIN_CHANCE:
                break
            num_seen += 1
            heapq.heappush(frontier, (-chance * share, num_seen, token_id, row, depth + 1, context))

    open_row(0, 0, 1.0, context)
    while frontier and len(tokens) < max_drafts:
        minus_chance, _, token_id, parent, depth, before = heapq.heappop(frontier)
        tokens.append(token_id)
        parents.append(parent)
        depths.append(depth)
        chances.append(-minus_chance)
        if depth < MAX_DEPTH:
            after = (*before, token_id)[-table.max_context :]
            open_row(len(tokens), depth, -minus_chance, after)
    return DraftTree(tuple(tokens), tuple(parents), tuple(depths), tuple(chances))
