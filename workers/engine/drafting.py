"""N-gram drafts in the engine: which guesses a step verifies, and what is learned from what came out. Pure.

Source: ADED (arXiv 2407.12021); tables, trees and the governor are in `decoding`.
"""

from dataclasses import dataclass, field

from workers.api import NgramDrafts
from workers.engine.batch import Batch
from workers.engine.decoding.draft_tree import DraftTree, likeliest_tree
from workers.engine.decoding.governor import DraftRecord, StepCost, drafts_allowed, may_draft
from workers.engine.decoding.ngram_table import NgramTables
from workers.engine.sequence import Sequence

#: Rows of a step, drafts included, beyond which no drafts are made.
MAX_ROWS = 64
#: How fast what is known of a step's time follows what is measured.
COST_GAIN = 0.2
#: Tokens of one sequence that its table learns in a step.
MAX_LEARNED = 256
NO_DRAFTS = DraftTree()


@dataclass(slots=True)
class _Drafted:
    """num_learned: tokens that the table has seen. tree: the last guess, made when there were num_known tokens."""

    cache_salt: str
    num_learned: int = 0
    record: DraftRecord = field(default_factory=DraftRecord)
    tree: DraftTree = NO_DRAFTS
    num_known: int = 0


class Drafting:
    """The sequences of one engine that asked for drafts. What steps cost is learned from those that it sees."""

    def __init__(self) -> None:
        #: Rows of a step -> its time, in seconds; None after the first, which may have been slow for once.
        self._step_s: dict[int, float | None] = {}
        self._tables = NgramTables()
        self._drafted: dict[Sequence, _Drafted] = {}

    def begin(self, sequence: Sequence, cache_salt: str) -> None:
        """A request has come; nothing to do unless it asks for drafts."""
        if isinstance(sequence.sampling.decoding, NgramDrafts):
            self._drafted[sequence] = _Drafted(cache_salt)

    def forget(self, sequence: Sequence) -> None:
        """It is dropped."""
        self._drafted.pop(sequence, None)

    def observe(self, num_rows: int, step_s: float) -> None:
        """A step of decodes alone took this long."""
        if self._drafted and num_rows <= MAX_ROWS:
            if num_rows not in self._step_s:
                self._step_s[num_rows] = None
                return
            known_s = self._step_s[num_rows] or step_s
            self._step_s[num_rows] = known_s + COST_GAIN * (step_s - known_s)

    def propose(
        self, decodes: list[Sequence], batch: Batch, *, num_rows: int, num_waiting: int
    ) -> dict[int, DraftTree]:
        """Trees for some of these sequences, by index, with blocks for them taken. num_rows: of the step without."""
        if not self._drafted:
            return {}
        indices = [i for i, one in enumerate(decodes) if one in self._drafted]
        for i in indices:
            self._learn(decodes[i])
        if not indices or not may_draft(num_rows=num_rows, num_waiting=num_waiting, max_rows=MAX_ROWS):
            return {}
        trees = [self._guess(decodes[i]) for i in indices]
        known_s = {rows: step_s for rows, step_s in self._step_s.items() if step_s is not None}
        allowed = drafts_allowed(
            trees,
            [self._drafted[decodes[i]].record.correction for i in indices],
            StepCost.measured(known_s or {1: 1.0}),
            num_rows=num_rows,
            num_waiting=num_waiting,
            max_rows=MAX_ROWS,
        )
        proposed = {}
        for i, tree, num_drafts in zip(indices, trees, allowed, strict=True):
            num_tokens = len(decodes[i].token_ids) + num_drafts
            if (
                num_drafts > 0
                and batch.num_blocks_to_grow(decodes[i], num_tokens) <= batch.pool.num_available
            ):
                batch.grow(decodes[i], num_tokens)
                proposed[i] = tree.first(num_drafts)
        return proposed

    def _learn(self, sequence: Sequence) -> None:
        """What has come since the last step, and how the last guess fared."""
        drafted, tokens = self._drafted[sequence], sequence.token_ids
        if drafted.tree.num_drafts > 0 and len(tokens) > drafted.num_known:
            drafted.record.add(drafted.tree, tokens[drafted.num_known :])
        drafted.tree = NO_DRAFTS
        table = self._tables.of(self._drafted[sequence].cache_salt)
        # A long prompt is learned over several steps, about 10 us a token.
        end = min(len(tokens), drafted.num_learned + MAX_LEARNED)
        table.learn(tokens[:end], drafted.num_learned)
        drafted.num_learned = end

    def _guess(self, sequence: Sequence) -> DraftTree:
        decoding = sequence.sampling.decoding
        assert isinstance(decoding, NgramDrafts)
        # One token comes out beyond the drafts.
        max_drafts = min(decoding.max_draft_tokens, sequence.max_tokens - len(sequence.token_ids) - 1)
        if max_drafts < 1:
            return NO_DRAFTS
        table = self._tables.of(self._drafted[sequence].cache_salt)
        tree = likeliest_tree(table, sequence.token_ids[-table.max_context :], max_drafts)
        drafted = self._drafted[sequence]
        drafted.tree, drafted.num_known = tree, len(sequence.token_ids)
        return tree
