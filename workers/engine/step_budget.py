"""How many tokens of prompts a step computes beside an engine's decodes, by prediction. Pure."""

import math

from workers.api import EngineConfig, StepBudget
from workers.engine.sequence import Sequence
from workers.latency_model import LatencyModel
from workers.step_choice import Head, Mixed, StepChoice, StepPace
from workers.step_cost import StepCost
from workers.step_shape import FactorSource

#: Part of the target for TPOT that is kept free at least; more when the latency model says that it is further off.
MIN_ERROR = 0.05
#: Steps in a row that prompts are left out of at most.
MAX_WAITS = 8


class StepLimits:
    """How long an engine's steps with decodes are to be."""

    def __init__(self, config: EngineConfig, latency: LatencyModel | None) -> None:
        self._config = config
        self._latency = latency

    def planned_s(self, cost: StepCost, decodes: list[Sequence], context: int) -> float:
        """By the least target of these, with what the latency model is off; infinity for no limit: nobody has a target, the budget is
        fixed, or one of them would miss it alone. context: of all of them."""
        if self._config.step_budget is StepBudget.FIXED or not decodes or self._latency is None:
            return math.inf
        target_s = min(one.tpot_target_s for one in decodes)
        planned_s = target_s / (1 + max(MIN_ERROR, self._latency.mean_error or 0.0))
        # What no order of things meets on this device is no reason to leave prompts out: that would only make these late too.
        return planned_s if cost.step_s(1, context // len(decodes)) <= planned_s else math.inf

    def step_s(self, cost: StepCost, decodes: list[Sequence], context: int, num_tokens: int) -> float:
        """That, or what a step takes with so many tokens of prompts, as far as they fit into the token budget."""
        num = len(decodes)
        num_tokens = min(num_tokens, max(0, self._config.token_budget - num))
        return min(cost.step_s(num, context, num_tokens), self.planned_s(cost, decodes, context))


class PredictedBudget:
    """What the least target of those that decode leaves for prompts, on average over a few steps.

    Before the latency model has learnt enough, where nobody has a target, and where a sequence would miss it alone, there is no limit
    but the engine's token budget.
    """

    def __init__(
        self, config: EngineConfig, latency: LatencyModel, limits: StepLimits, attention_tokens: float
    ) -> None:
        self._config = config
        self._limits = limits
        self._latency = latency
        self._attention_tokens = attention_tokens
        self._pace = StepPace()
        self._num_decode_steps = 0
        #: Rows of the last step beyond one for each decode.
        self._num_drafts = 0

    def begin(self, *, is_decoding: bool) -> None:
        """A step is planned."""
        if not is_decoding:
            self._pace = StepPace()
        self._num_decode_steps += is_decoding

    def observe(self, num_drafts: int) -> None:
        """A step has run, with so many drafts."""
        self._num_drafts = num_drafts

    def budget(self, now_s: float, decodes: list[Sequence], first: Sequence) -> float:
        """In tokens of a prompt's beginning, beside these decodes; 0 leaves prompts out of this step. first: of the prompts."""
        latency = self._latency
        if latency.source is FactorSource.ROOFLINE:
            return math.inf
        cost = StepCost.of(latency)
        num_decodes = len(decodes) + self._num_drafts
        context = sum(len(one.token_ids) for one in decodes)
        planned_s = self._limits.planned_s(cost, decodes, context)
        if planned_s == math.inf:
            return math.inf
        num_done = first.num_computed_tokens
        choice = StepChoice(
            cost,
            max_prefill_tokens=self._config.token_budget,
            # What is handed off goes by whole blocks.
            min_chunk_tokens=self._config.block_size,
            max_waits=MAX_WAITS,
        )
        self._pace.begin(now_s, planned_s, num_decode_steps=self._num_decode_steps, is_decoding=True)
        head = Head(0, first.num_uncomputed_tokens, num_done, first.first_token_by_s, math.inf)
        step = choice.step(head, num_decodes, context, self._pace)
        if not isinstance(step, Mixed):
            return 0.0
        # A late chunk costs more of a budget for that reason; here its pairs are counted already.
        return (step.token_budget - num_decodes) * (1 + num_done / self._attention_tokens)
