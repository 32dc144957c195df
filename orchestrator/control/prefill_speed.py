"""How many seconds a prompt takes at each worker, from what workers have learnt of their own steps. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from orchestrator.control.view import ClusterView
from workers.api import EngineConfig, Phase, WorkerId
from workers.step_cost import StepCost
from workers.step_shape import FactorSource, StepCosts

#: Of workers whose budget nobody has told.
DEFAULT_BUDGET = EngineConfig().token_budget


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """Of one worker: a StepCost, as one that waits for prompts sees it.

    sequence_s: what the context of one sequence that decodes adds to a step. budget_tokens: that a step computes at most, >= 1.
    """

    overhead_s: float
    token_s: float
    decode_s: float
    weights_s: float
    pair_s: float
    sequence_s: float
    budget_tokens: int

    @classmethod
    def of(cls, cost: StepCost, budget_tokens: int, mean_context: float) -> "PrefillSpeed":
        """mean_context: tokens that a sequence there attends to."""
        return cls(
            cost.overhead_s,
            cost.token_s,
            cost.decode_s,
            cost.weights_s,
            cost.pair_s,
            cost.context_s * mean_context,
            budget_tokens,
        )

    def prefill_s(self, num_waiting: int, num_new: int, num_before: int, num_sequences: int) -> float:
        """Until a prompt of which `num_new` tokens are missing is computed, behind `num_waiting` tokens of others.

        num_before: tokens of it that are there. Each step takes all sequences and, of prompts, what they leave of the budget: as many
        steps as that makes, of which the last may be a part, and one at least. Pairs of the others' prompts are not known.
        """
        num_tokens = num_waiting + num_new
        num_steps = num_tokens / max(1, self.budget_tokens - num_sequences)
        if num_steps < 1.0:
            num_steps = 1.0
        dense_s = self.token_s * num_tokens + self.decode_s * num_sequences * num_steps
        weights_s = self.weights_s * num_steps
        return (
            num_steps * (self.overhead_s + self.sequence_s * num_sequences)
            + (dense_s if dense_s > weights_s else weights_s)
            + self.pair_s * num_new * (num_before + (num_new + 1) / 2)
        )


def most_learnt(view: ClusterView) -> StepCosts | None:
    """Of the worker that has seen most steps, of those that have seen enough or begin with a profile; None where there is none."""
    found = [
        worker.status.step_costs
        for worker in view.workers
        if worker.status is not None and _is_believed(worker.status.step_costs)
    ]
    return max(found, key=lambda costs: costs.num_steps, default=None)


def learnt_cost(view: ClusterView) -> StepCost | None:
    """What steps cost as the most learnt worker has it, but tokens of prompts as who has computed them; None where nobody is believed."""
    most = most_learnt(view)
    return None if most is None else _joined(most, _of_prompts(view))


def _of_prompts(view: ClusterView) -> StepCost | None:
    """By the worker that has computed prompts in most steps, few as they are: it began with the roofline, and steps of decodes say less.

    None where nobody has.
    """
    known = [one.status.step_costs for one in view.workers if one.status is not None]
    found = [costs for costs in known if costs is not None and costs.num_prompt_steps]
    most = max(found, key=lambda costs: costs.num_prompt_steps, default=None)
    return None if most is None else StepCost.learnt(most)


def _joined(costs: StepCosts, prompts: StepCost | None) -> StepCost:
    """What a worker has learnt; of tokens of prompts what `prompts` has, unless it knows that itself."""
    cost = StepCost.learnt(costs)
    if prompts is None or costs.knows_prompts:
        return cost
    return replace(cost, token_s=prompts.token_s, pair_s=prompts.pair_s)


def prefill_speeds(view: ClusterView, budgets: Mapping[WorkerId, int]) -> dict[WorkerId, PrefillSpeed] | None:
    """Of each worker that prefills; None while none has learnt enough. Costs some microseconds a worker: once for each view.

    One that has not learnt enough itself takes what the one has that has seen most steps, and of prompts what the one has that has
    computed most. budgets: token budget of an engine's step.
    A sequence's context is the mean of those that decoded there at the last look, and where none did that of the cluster.
    """
    most = most_learnt(view)
    if most is None:
        return None
    prompts = _of_prompts(view)
    shared = _joined(most, prompts)
    work = [worker.status.work for worker in view.workers if worker.status is not None]
    mean_context = sum(one.decode_context for one in work) / max(1, sum(one.num_decoding for one in work))
    found = {}
    for worker in view.workers:
        if Phase.PREFILL not in worker.phases:
            continue
        cost, context, status = shared, mean_context, worker.status
        if status is not None:
            own = status.step_costs
            if _is_believed(own):
                cost = _joined(own, prompts)
            if status.work.num_decoding:
                context = status.work.decode_context / status.work.num_decoding
        budget = budgets.get(worker.worker_id, DEFAULT_BUDGET)
        found[worker.worker_id] = PrefillSpeed.of(cost, budget, context)
    return found


def _is_believed(costs: StepCosts | None) -> TypeGuard[StepCosts]:
    return costs is not None and costs.source is not FactorSource.ROOFLINE
