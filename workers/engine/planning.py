"""The step that is being planned: who gets a place, blocks and a chunk in it. Pure.

Blocks are taken chunk by chunk. When they run out, the sequence of the highest rank takes those of the
lowest, which starts again later (preemption by recompute). The first in rank is never preempted, and every
request fits the pool alone, so that there is always progress.
"""

from kvtransfer.layout import blocks_needed
from workers.api import Batching, EngineConfig
from workers.engine.batch import Batch, places
from workers.engine.prefix_index import PrefixMatch
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.span_reuse.rule import SpanReuse
from workers.engine.step_plan import Slice

#: A prompt that reuses spans is computed in one step, which may be so many times the budget.
MAX_REUSE_BUDGETS = 2
#: So is one that is filtered, all of it; a longer one is computed without the filter.
MAX_FILTER_BUDGETS = 4
#: Prefills that lack embeddings of their pictures may take so much of the places: while they wait they keep out others.
MAX_INCOMPLETE_SHARE = 0.25


class Planning:
    """A step that is being planned."""

    def __init__(
        self, config: EngineConfig, batch: Batch, attention_tokens: float, *, may_preempt: bool
    ) -> None:
        self.chunks: list[Slice] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        #: See StepPlan.
        self.imageless: list[tuple[Sequence, int]] = []
        self._config = config
        self._batch = batch
        self._pool = batch.pool
        self._attention_tokens = attention_tokens
        self._may_preempt = may_preempt
        #: What is left of the budget, in tokens of a prompt's beginning.
        self._budget = float(config.token_budget)
        self._num_tokens = 0
        #: They have their blocks for this step already.
        self._planned: set[Sequence] = set()
        #: Running prefills that lack embeddings; None when they are to be counted again.
        self._num_incomplete: int | None = None

    @property
    def is_full(self) -> bool:
        """Nothing more fits."""
        if self._config.batching is Batching.DECODE_MAXIMAL and self.chunks:
            return True
        return self._budget < 1

    def limit(self, budget: float) -> None:
        """Of prompts, compute this much at most, in tokens of a prompt's beginning."""
        self._budget = min(self._budget, budget)

    def make_room_for_decodes(self) -> None:
        """Every decode gets a slot for its token, or is preempted for others'. None is left out for the budget."""
        decodes = self._batch.decodes
        needy = [one for one in decodes if len(one.token_ids) > one.capacity or one.is_tail_shared]
        if len(needy) > 1:
            needy.sort(key=lambda one: one.rank)
        for sequence in needy:
            if sequence.state is SequenceState.DECODE and not self._grow(sequence, len(sequence.token_ids)):
                self._preempt(sequence.parent or sequence)
        self._num_tokens = len(decodes)
        self._budget -= self._num_tokens

    def may_begin(self, sequence: Sequence) -> bool:
        """It does not wait for the embeddings of a picture with which its prompt begins; others may pass it then."""
        images = sequence.images
        if images is None or images.is_complete:
            return True
        # Those that lack something and run hold places and blocks, for which those that hold embeddings wait: what they lack
        # must have room. How many tokens are left of a prompt that is reduced is known when all have come.
        if not images.is_granted or sequence.reduction is not None or not images.has_news:
            return False
        if self._count_incomplete() >= max(1, int(MAX_INCOMPLETE_SHARE * self._config.max_running_sequences)):
            return False
        num_known = self._batch.num_known_tokens(sequence)
        if not images.covers(num_known):
            self.imageless.append((sequence, num_known))
            return False
        num_ready = sequence.num_ready_tokens(num_known)
        if num_ready == len(sequence.token_ids) or num_ready >= num_known + self._pool.block_size:
            return True
        images.has_news = False
        return False

    def admit(self, sequence: Sequence, num_places: int) -> bool:
        """Let a waiting sequence begin, if it may; False when it has to wait for places or blocks.

        It stays where it is when it is to ask for embeddings anew.
        """
        batch = self._batch
        if batch.num_places + places(sequence) > num_places and batch.num_places > 0:
            return False
        if self._chunk_tokens(sequence, sequence.num_uncomputed_tokens)[0] == 0:
            return False
        match = batch.match(sequence)
        if self._is_imageless(sequence, match):
            return True
        # What it needs now, and its share of what it may need later, beside that of those who run.
        need = blocks_needed(len(sequence.token_ids), self._pool.block_size)
        need += (
            batch.future_blocks(sequence) - len(match.block_ids) + self._pool.num_cached_of(match.block_ids)
        )
        need += batch.num_reserved_blocks()
        if need > self._pool.num_available:
            victims = self._outranked_by_priority(sequence)
            gain = sum(len(one.block_table) + batch.reserved_blocks(one) for one in victims)
            if need > self._pool.num_available + gain:
                return False
            while need > self._pool.num_available and victims:
                victim = victims.pop()
                need -= batch.reserved_blocks(victim)
                self._preempt(victim)
            # Blocks that were shared did not come free.
            match = batch.match(sequence)
        if blocks_needed(len(sequence.token_ids), self._pool.block_size) - len(match.block_ids) > (
            self._pool.num_available - self._pool.num_cached_of(match.block_ids)
        ):
            return False
        batch.admit(sequence, match)
        self._num_incomplete = None
        if sequence.images is not None and not sequence.images.covers(sequence.num_cached_tokens):
            # Of what the host tier has, not all fitted.
            self.imageless.append((sequence, sequence.num_cached_tokens))
            batch.put_back(sequence)
            return True
        self.admitted.append(sequence)
        return True

    def add_chunk(self, sequence: Sequence) -> None:
        """The next chunk of a running prefill, as far as budget and blocks reach."""
        most = MAX_FILTER_BUDGETS * self._config.token_budget
        if sequence.is_to_filter and sequence.num_own_tokens <= most:
            self._add_filtered(sequence)
            return
        reuse = self._batch.find_spans(sequence)
        if reuse is not None and self._add_reusing(sequence, reuse):
            return
        start = sequence.num_computed_tokens
        num_ready = sequence.num_ready_tokens(start) - start
        if num_ready <= 0:
            return
        num_tokens, cost = self._chunk_tokens(sequence, num_ready)
        if num_tokens == 0:
            return
        if not self._grow(sequence, start + num_tokens):
            # What fits into the blocks that there are.
            room = sequence.capacity + self._pool.num_available * self._pool.block_size - start
            num_tokens, cost = self._chunk_tokens(sequence, min(num_tokens, room))
            if num_tokens <= 0 or sequence.is_tail_shared:
                return
            self._batch.grow(sequence, start + num_tokens)
        self._batch.store_blocks(sequence, start + num_tokens, is_pending=True)
        self.chunks.append(Slice(sequence, start, start + num_tokens))
        self._planned.add(sequence)
        self._num_tokens += num_tokens
        self._budget -= cost

    def _is_imageless(self, sequence: Sequence, match: PrefixMatch) -> bool:
        """It has not asked for all embeddings that it needs: KV that was known when it asked is gone."""
        images = sequence.images
        if images is None or images.covers(len(match.block_ids) * self._pool.block_size):
            return False
        num_known = self._batch.num_known_tokens(sequence)
        if images.covers(num_known):
            return False
        self.imageless.append((sequence, num_known))
        return True

    def _count_incomplete(self) -> int:
        if self._num_incomplete is None:
            self._num_incomplete = sum(
                one.images is not None and not one.images.is_complete for one in self._batch.prefills
            )
        return self._num_incomplete

    def _add_filtered(self, sequence: Sequence) -> None:
        """All of a prompt but what was generated, in a step without other chunks if it is more than the budget."""
        end = sequence.num_own_tokens
        cost = end * (1 + end / 2 / self._attention_tokens)
        if (self.chunks and cost > self._budget) or not self._grow(sequence, end):
            return
        self.chunks.append(Slice(sequence, 0, end, is_filtered=True))
        self._planned.add(sequence)
        self._num_tokens += end
        self._budget -= cost

    def _add_reusing(self, sequence: Sequence, reuse: SpanReuse) -> bool:
        """All the rest of a prompt with the KV of spans, now or in a step to come; False when that cannot be."""
        part = Slice(sequence, sequence.num_computed_tokens, len(sequence.token_ids), reuse)
        # A token in the middle of it costs what all do on average.
        cost = part.num_rows * (1 + (part.start + part.end) / 2 / self._attention_tokens)
        most = MAX_REUSE_BUDGETS * self._config.token_budget - len(self._batch.decodes)
        num_left = self._pool.num_available - self._pool.num_cached_of(reuse.source_block_ids)
        if cost > most or self._batch.num_blocks_to_grow(sequence, part.end) > num_left:
            return False
        # It is computed before the other chunks, so what it begins with has to be there before the step.
        is_begun = all(map(self._pool.index.is_computed, sequence.block_table))
        if not is_begun or (self.chunks and cost > self._budget):
            # What is handed off begins now: later there would be no telling the other side.
            return not sequence.is_handed_off
        self._batch.begin_reuse(sequence, reuse)
        self.chunks.append(part)
        self._planned.add(sequence)
        self._num_tokens += part.num_rows
        self._budget -= cost
        return True

    def _chunk_tokens(self, sequence: Sequence, num_tokens: int) -> tuple[int, float]:
        """Tokens of the next chunk and their cost in the budget; at most num_tokens.

        A chunk that does not finish its prompt ends at a tile's border of the step, or else at a block's border:
        always so with a hand-off, where every block is sent once, when it is full.
        """
        rate = 1 + sequence.num_computed_tokens / self._attention_tokens
        size, tile = self._pool.block_size, self._config.tile_tokens
        # However late it is in its prompt: in a step of its own it gets a block, or it might never get anything.
        least = size if self._num_tokens == 0 else 0
        cut = min(num_tokens, max(least, int(self._budget / rate)))
        if cut < sequence.num_uncomputed_tokens and cut > 0:
            over_tile = (self._num_tokens + cut) % tile
            over_block = (sequence.num_computed_tokens + cut) % size
            over = over_tile if tile > 1 and not sequence.is_handed_off else over_block
            if over < cut:
                cut -= over
            elif sequence.is_handed_off:
                cut = 0
        return cut, cut * rate

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it blocks for so many tokens, from those behind it in rank if need be."""
        need = self._batch.num_blocks_to_grow(sequence, num_tokens)
        while need > self._pool.num_available:
            victim = self._last_behind(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        self._batch.grow(sequence, num_tokens)
        return True

    def _last_behind(self, sequence: Sequence) -> Sequence | None:
        """The last in rank of those that may be preempted for this one."""
        if not self._may_preempt:
            return None
        behind = [
            one
            for one in self._batch.running()
            if one.parent is None
            and one.is_preemptible
            and one.rank > sequence.rank
            and one not in self._planned
        ]
        return max(behind, key=lambda one: one.rank, default=None)

    def _outranked_by_priority(self, sequence: Sequence) -> list[Sequence]:
        """Those of a lower priority, in order of rank."""
        if not self._may_preempt:
            return []
        running = self._batch.running()
        lower = [one for one in running if one.rank[0] > sequence.rank[0] and one not in self._planned]
        return sorted(
            (one for one in lower if one.parent is None and one.is_preemptible), key=lambda one: one.rank
        )

    def _preempt(self, sequence: Sequence) -> None:
        for branch in [one for one in self._batch.running() if one.parent is sequence]:
            self._batch.leave(branch)
            branch.move_to(SequenceState.FINISHED)
        self._batch.preempt(sequence)
        self._num_incomplete = None
        self.preempted.append(sequence)
