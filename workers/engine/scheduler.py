"""What the next step computes. Pure.

Decodes first (one token each), then prefills that have begun, then new ones, all within one token budget:
a long prompt is cut into chunks and never stalls a decode.
Sources: Sarathi-Serve (OSDI'24), stall-free batching, section 4.2; SARATHI (arXiv 2308.16369), section 4,
for decode-maximal batches and tile alignment.
"""

import math
from collections.abc import Iterable
from heapq import merge
from itertools import chain

from workers.api import EngineConfig, Phase, PrefillOrder, StepBudget
from workers.engine.batch import Batch
from workers.engine.host_tier import PackedBlock
from workers.engine.planning import Planning
from workers.engine.sequence import Sequence, SequenceState
from workers.engine.slack_order import SlackOrder
from workers.engine.step_budget import PredictedBudget, StepLimits
from workers.engine.step_plan import StepPlan
from workers.latency_model import LatencyModel
from workers.step_cost import StepCost
from workers.step_shape import FactorSource

#: Prefill speed before any step was seen, in tokens a second, and how fast it follows what is seen.
FIRST_PREFILL_RATE = 500.0
PREFILL_RATE_GAIN = 0.1


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
        plan = Planning(self._config, self._batch, self._attention_tokens, may_preempt=may_preempt)
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
        plan: Planning,
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


def _begun_first(sequence: Sequence) -> tuple[int, bool, tuple[int, float, int]]:
    return sequence.rank[0], sequence.state is SequenceState.WAITING, sequence.rank
