"""How many drafts each sequence may have in a step, so that drafts pay. Pure.

A row of drafts costs time whether it is accepted or not. The governor knows what a step of so many rows takes
(measured) and how likely each draft is (estimated by the tree, corrected by what came of it), and takes the drafts
that bring the most tokens per second; often that is none.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from workers.engine.decoding.draft_tree import DraftTree

#: Tokens per second must rise by this factor, or the drafts are left out: estimates err, and trees cost time.
MIN_GAIN = 1.03
#: What is left of earlier steps in a sequence's record with each new one: it remembers about 20.
MEMORY = 0.95
#: Drafts' worth of belief that the estimates are right, before anything is known.
PRIOR_DRAFTS = 2.0
MAX_CORRECTION = 1.5


@dataclass(frozen=True, slots=True)
class StepCost:
    """Measured time of a step by its rows: (rows >= 1, seconds), rows ascending, at least one point.

    What was not measured is assumed to be cheap, so that it is tried and then known: between two points it is
    linear, before the first in proportion to the rows, after the last as steep as before it, but never falling.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def measured(cls, seconds_by_rows: Mapping[int, float]) -> "StepCost":
        """From single measurements, not empty: a step costs no more than one of more rows was seen to."""
        points: list[tuple[int, float]] = []
        least_s = math.inf
        for num_rows in sorted(seconds_by_rows, reverse=True):
            least_s = min(least_s, seconds_by_rows[num_rows])
            points.append((num_rows, least_s))
        return cls(tuple(reversed(points)))

    def seconds(self, num_rows: int) -> float:
        """Time of a step of num_rows >= 1 rows."""
        first, first_s = self.points[0]
        if num_rows <= first:
            return first_s * num_rows / first
        if len(self.points) == 1:
            return first_s
        right = min(bisect_left(self.points, (num_rows, 0.0)), len(self.points) - 1)
        (low, low_s), (high, high_s) = self.points[right - 1 : right + 1]
        slope_s = (high_s - low_s) / (high - low)
        if num_rows > high:
            return high_s + max(slope_s, 0.0) * (num_rows - high)
        return low_s + slope_s * (num_rows - low)


@dataclass(slots=True)
class DraftRecord:
    """How one sequence's drafts fared: accepted ones, and how many the trees promised; both fade."""

    num_accepted: float = 0.0
    num_promised: float = 0.0

    @property
    def correction(self) -> float:
        """What a tree's chances are multiplied with, 0 to MAX_CORRECTION."""
        ratio = (self.num_accepted + PRIOR_DRAFTS) / (self.num_promised + PRIOR_DRAFTS)
        return min(ratio, MAX_CORRECTION)

    def add(self, tree: DraftTree, token_ids: SequenceOf[int]) -> None:
        """Compare a tree with the tokens that came out of the step, at least one.

        The tree as it was made, before the governor cut it: drafts that were not computed are judged as well,
        as far down as there are tokens. So a sequence without drafts can earn them back at no cost.
        """
        self.num_accepted *= MEMORY
        self.num_promised *= MEMORY
        #: Rows whose path is what came out.
        right_rows = {0}
        for row, (token_id, parent, depth, chance) in enumerate(
            zip(tree.token_ids, tree.parents, tree.depths, tree.chances, strict=True), start=1
        ):
            if depth > len(token_ids):
                continue
            self.num_promised += chance
            if parent in right_rows and token_ids[depth - 1] == token_id:
                right_rows.add(row)
                self.num_accepted += 1


def may_draft(*, num_rows: int, num_waiting: int, max_rows: int) -> bool:
    """Whether drafts are worth a thought in this step; asked before any tree is made.

    num_rows: rows of the step without drafts. num_waiting: requests not begun, which drafts would delay further.
    max_rows: where a step stops being bound by reading the weights; more rows than that cost what they bring.
    """
    return num_waiting == 0 and num_rows < max_rows


def drafts_allowed(
    trees: SequenceOf[DraftTree],
    corrections: SequenceOf[float],
    cost: StepCost,
    *,
    num_rows: int,
    num_waiting: int,
    max_rows: int,
) -> list[int]:
    """Of each sequence's tree, how many of its first drafts to compute.

    trees, corrections: one for each sequence that decodes in this step and asked for drafts.
    num_rows >= len(trees): rows of the step without drafts. The sum of both never exceeds max_rows.
    """
    counts = [0] * len(trees)
    if not trees or not may_draft(num_rows=num_rows, num_waiting=num_waiting, max_rows=max_rows):
        return counts
    ranked: list[tuple[float, int]] = []
    for index, (tree, correction) in enumerate(zip(trees, corrections, strict=True)):
        gain = 1.0
        for chance in tree.chances:
            # A draft counts for no more than one before it, so that each tree is taken from its start.
            gain = min(gain, chance * correction)
            ranked.append((gain, index))
    # Stable: of equals, the earlier sequence and draft first.
    ranked.sort(key=lambda draft: -draft[0])
    del ranked[max_rows - num_rows :]
    num_tokens = float(len(trees))
    best_rate, best_length = num_tokens / cost.seconds(num_rows) * MIN_GAIN, 0
    for length, (gain, _) in enumerate(ranked, start=1):
        num_tokens += gain
        rate = num_tokens / cost.seconds(num_rows + length)
        if rate > best_rate:
            best_rate, best_length = rate, length
    for _, index in ranked[:best_length]:
        counts[index] += 1
    return counts
