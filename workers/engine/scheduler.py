"""What the next step computes. Pure.

Decodes first (one token each), then prefills that have begun, then new ones, all within one token budget:
a long prompt is cut into chunks and never stalls a decode.
Sources: Sarathi-Serve (OSDI'24), stall-free batching, section 4.2; SARATHI (arXiv 2308.16369), section 4,
for decode-maximal batches and tile alignment.

Blocks are taken chunk by chunk. When they run out, the sequence of the highest rank takes those of the
lowest, which starts again later (preemption by recompute). The first in rank is never preempted, and every
request fits the pool alone, so that there is always progress.
"""

import math
from collections.abc import Iterable
from heapq import merge
from itertools import chain

from kvtransfer.layout import blocks_needed
from workers.api import Batching, EngineConfig, Phase, PrefillOrder, StepBudget
from workers.engine.batch import Batch, places
from workers.engine.block_pool import PrefixMatch
from workers.engine.host_tier import PackedBlock
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.slack_order import SlackOrder
from workers.engine.span_reuse.rule import SpanReuse
from workers.engine.step_budget import PredictedBudget, StepLimits
from workers.engine.step_plan import Slice, StepPlan
from workers.latency_model import LatencyModel
from workers.step_cost import StepCost
from workers.step_shape import FactorSource

#: Prefill speed before any step was seen, in tokens a second, and how fast it follows what is seen.
FIRST_PREFILL_RATE = 500.0
PREFILL_RATE_GAIN = 0.1
#: A prompt that reuses spans is computed in one step, which may be so many times the budget.
MAX_REUSE_BUDGETS = 2
#: So is one that is filtered, all of it; a longer one is computed without the filter.
MAX_FILTER_BUDGETS = 4
#: Prefills that lack embeddings of their pictures may take so much of the places: while they wait they keep out others.
MAX_INCOMPLETE_SHARE = 0.25


class Scheduler:
    """Plans the steps of one batch.

    attention_tokens: the context at which a token's attention is as much work as everything else. A chunk
    that late in its prompt costs its tokens twice in the budget; without it (infinity) tokens alone count.
    latency: of the order by slack and of budgets by prediction; without one, or before it has learnt enough, the first goes by the
    speed of the last steps and the second is the whole budget.
    """

    def __init__(
        self,
        config: EngineConfig,
        batch: Batch,
        *,
        attention_tokens: float,
        latency: LatencyModel | None = None,
    ) -> None:
        self._config = config
        self._batch = batch
        self._attention_tokens = attention_tokens
        self._prefill_rate = FIRST_PREFILL_RATE
        self._latency = latency
        self._limits = limits = StepLimits(config, latency)
        self._slack: SlackOrder | None = None
        if config.prefill_order is PrefillOrder.LEAST_SLACK:
            self._slack = SlackOrder(batch, latency, limits)
        self._predicted: PredictedBudget | None = None
        if config.step_budget is StepBudget.PREDICTED and latency is not None:
            self._predicted = PredictedBudget(config, latency, limits, attention_tokens)

    @property
    def prefill_tokens_per_s(self) -> float:
        """As the last steps that mostly prefilled had it."""
        return self._prefill_rate

    def planned_s(self) -> float:
        """How long a step with the decodes is to be, by their targets; infinity for no limit."""
        latency, decodes = self._latency, self._batch.decodes
        if latency is None or latency.source is FactorSource.ROOFLINE:
            return math.inf
        context = sum(len(one.token_ids) for one in decodes)
        return self._limits.planned_s(StepCost.of(latency), decodes, context)

    def observe(self, plan: StepPlan, step_s: float) -> None:
        """A step took this long. Steps that mostly prefill tell how long a prompt takes."""
        num_tokens = plan.num_tokens
        if step_s > 0 and num_tokens > 2 * len(plan.decodes):
            self._prefill_rate += PREFILL_RATE_GAIN * (num_tokens / step_s - self._prefill_rate)
        if self._slack is not None:
            for part in plan.chunks:
                self._slack.charge(part.sequence, part.num_rows)
        if self._predicted is not None:
            self._predicted.observe(sum(tree.num_drafts for tree in plan.drafts.values()))

    def plan(
        self,
        now_s: float,
        *,
        num_places: int,
        arrived_until_s: float,
        may_preempt: bool = True,
        phase: Phase | None = None,
    ) -> StepPlan:
        """Plan one step, taking blocks and moving sequences between waiting and running.

        num_places: for sequences; the rest is kept for KV on its way. Who arrived later than
        arrived_until_s is not admitted yet. may_preempt: False when every decode has room, and others are to wait for theirs.
        phase: prompts alone, up to the token budget, or decodes alone; None is both.
        """
        plan = _Plan(self._config, self._batch, self._attention_tokens, may_preempt=may_preempt)
        is_decoding = phase is not Phase.PREFILL
        if is_decoding:
            plan.make_room_for_decodes()
        if self._predicted is not None:
            self._predicted.begin(is_decoding=is_decoding and bool(self._batch.decodes))
        if phase is not Phase.DECODE:
            self._add_prefills(plan, now_s, num_places, arrived_until_s, beside_decodes=is_decoding)
        if plan.admitted and self._config.prefill_order is not PrefillOrder.FCFS:
            self._note_who_passed(plan.admitted, now_s)
        # A chunk may have taken the blocks of a decode.
        batch = self._batch
        decodes = batch.decodes.copy() if is_decoding else []
        copies: dict[int, int] = {}
        restores: dict[int, PackedBlock] = {}
        if decodes or plan.chunks:
            copies, batch.copies = batch.copies, {}
            restores, batch.restores = batch.restores, {}
        return StepPlan(
            decodes,
            tuple(sorted(plan.chunks, key=lambda part: (part.is_filtered, part.is_alone))),
            batch.block_tables,
            tuple(plan.admitted),
            tuple(plan.preempted),
            tuple(plan.imageless),
            copies,
            restores,
        )

    def _add_prefills(
        self,
        plan: "_Plan",
        now_s: float,
        num_places: int,
        arrived_until_s: float,
        *,
        beside_decodes: bool,
    ) -> None:
        """Chunks of running prefills, and of waiting sequences while they can be admitted."""
        batch = self._batch
        is_admitting = bool(batch.waiting) and batch.num_places < num_places
        # All of a prompt may be in the step that runs: nothing of it is left to plan.
        prefills = [one for one in batch.prefills if one.num_uncomputed_tokens > 0]
        if not is_admitting and not prefills:
            return
        waiting = batch.waiting.copy() if is_admitting else []
        # Looked at one by one, and no more once somebody has to wait.
        candidates = (one for one in waiting if is_admitting and one.arrived_s <= arrived_until_s)
        ordered = self._in_order(prefills, candidates, now_s)
        if self._predicted is not None and beside_decodes and batch.decodes:
            ordered = iter(ordered)
            first = next(ordered, None)
            if first is None:
                return
            plan.limit(self._predicted.budget(now_s, batch.decodes, first))
            ordered = chain((first,), ordered)
        for sequence in ordered:
            if plan.is_full:
                return
            if sequence.state is SequenceState.WAITING:
                if not is_admitting or not plan.may_begin(sequence):
                    continue
                # The first that has to wait lets nobody past, or it might wait for ever.
                is_admitting = plan.admit(sequence, num_places)
            if sequence.state is SequenceState.PREFILL:
                plan.add_chunk(sequence)

    def _in_order(
        self, prefills: list[Sequence], waiting: Iterable[Sequence], now_s: float
    ) -> Iterable[Sequence]:
        """Highest priority first, whatever the order within one. waiting: by rank."""
        if self._config.prefill_order is PrefillOrder.FCFS:
            return merge(sorted(prefills, key=_begun_first), waiting, key=_begun_first)
        if self._slack is not None:
            return self._slack.sorted([*prefills, *waiting], now_s, self._prefill_rate)
        return sorted([*prefills, *waiting], key=self._urgency)

    def _note_who_passed(self, admitted: list[Sequence], now_s: float) -> None:
        """Say of those that begin, not in their turn, why."""
        for sequence in admitted:
            earlier = [one for one in self._batch.waiting if one.rank < sequence.rank]
            passed = [one for one in earlier if one.rank[0] == sequence.rank[0]]
            for one in passed:
                one.num_passed_by += 1
            if self._slack is not None:
                sequence.order_reason = self._slack.reason(sequence, len(passed), now_s, self._prefill_rate)
            elif passed:
                sequence.order_reason = f"before {len(passed)} that came earlier: the least left to do, less the time to its deadline"

    def _urgency(self, sequence: Sequence) -> tuple[int, float, int]:
        """By priority, then by work left and time to the deadline, both in seconds.

        Whoever has waited a second longer with the same timeout may have a second more of prefill left: no
        sequence is overtaken for ever. `now` would be the same summand for all, and is left out.
        """
        priority, _, number = sequence.rank
        left_s = sequence.num_uncomputed_tokens / self._prefill_rate
        return priority, left_s + sequence.deadline_s, number


class _Plan:
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
        is_begun = all(map(self._pool.is_computed, sequence.block_table))
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


def _begun_first(sequence: Sequence) -> tuple[int, bool, tuple[int, float, int]]:
    return sequence.rank[0], sequence.state is SequenceState.WAITING, sequence.rank
