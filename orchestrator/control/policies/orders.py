"""Orders of a device's queue, for any policy. Pure.

What ages does so by the same amount for all, and is left out of keys.
"""

from collections.abc import Iterable, Sequence

from orchestrator.control.policies.policy import Job, WorkerLoad
from workers.prompt_order import LEAST_SHARE, Due, LateTokens, Standing, TenantTokens, standings
from workers.step_cost import StepCost

#: Steps that pass beside the computing of a prompt: half of the one in which its last token is. None runs while an order is asked.
STEPS_AROUND = 0.5
#: Ranks before every standing: of who waits for a token that is not the first, and of who is too late and has its turn.
AGAIN, LATE_TURN = -2, -1


class Fcfs:
    """First come, first served."""

    def key(self, job: Job) -> float:
        """See Order."""
        return job.arrived_at_s

    def ranks(self, _now_s: float, _jobs: Iterable[Job], _device: WorkerLoad) -> Sequence[int]:
        """See Order."""
        return ()

    def waits(self, job: Job) -> None:
        """See Order."""

    def leaves(self, job: Job) -> None:
        """See Order."""

    def charge(self, job: Job, num_tokens: int) -> None:
        """See Order."""


class ShortestFirst:
    """Shortest remaining prompt first. tokens_per_s: what a second of waiting makes up for.

    Source: Nexus (arXiv 2507.06608), algorithm 2, where it is 15 without a unit.
    """

    def __init__(self, tokens_per_s: float = 15.0) -> None:
        self._tokens_per_s = tokens_per_s

    def key(self, job: Job) -> float:
        """See Order."""
        return job.num_left + self._tokens_per_s * job.arrived_at_s

    def ranks(self, _now_s: float, _jobs: Iterable[Job], _device: WorkerLoad) -> Sequence[int]:
        """See Order."""
        return ()

    def waits(self, job: Job) -> None:
        """See Order."""

    def leaves(self, job: Job) -> None:
        """See Order."""

    def charge(self, job: Job, num_tokens: int) -> None:
        """See Order."""


class LeastSlack:
    """As few as possible miss their targets for the first token: `standings`, as the engine has it (workers/engine/slack_order.py).

    planned_s: that steps with decodes are to take; infinity for what token_budget allows, which steps never pass. weights: of tenants
    that are worth more or less than 1. A tenant that was given more than another that waits is put back by the time that the difference
    took; in a key as it was when the key was asked.
    """

    def __init__(
        self, cost: StepCost, token_budget: int, planned_s: float, weights: dict[str, float] | None = None
    ) -> None:
        self._cost = cost
        self._token_budget = token_budget
        self._planned_s = planned_s
        self._weights = weights or {}
        self._tokens = TenantTokens()
        self._late_tokens = LateTokens()
        #: Prompts of each tenant that are not computed yet, by number.
        self._prompts: dict[str, set[int]] = {}

    def key(self, job: Job) -> float:
        """See Order."""
        if job.has_first_token:
            return job.arrived_at_s
        debt_s = self._tokens.debts().get(job.tenant, 0.0) * self._cost.token_s
        return Due(job.deadline_s, 0.0, debt_s).key

    def ranks(self, now_s: float, jobs: Iterable[Job], device: WorkerLoad) -> Sequence[int]:
        """See Order."""
        cost, debts = self._cost, self._tokens.debts()
        step_s, share = self._speed(device)
        first_s = begin_s = now_s + STEPS_AROUND * step_s
        found: list[int] = []
        others: list[tuple[int, Job]] = []
        dues: list[Due] = []
        first_late: tuple[int, Job] | None = None
        for i, job in enumerate(jobs):
            if job.deadline_s < first_s and not job.has_first_token:
                # Most of a long queue: however little is left, it makes no difference to the others.
                job.standing = Standing.LATE
                first_late = first_late or (i, job)
                found.append(Standing.LATE)
                continue
            pairs = job.num_left * (job.num_done + job.num_left / 2)
            left_s = (cost.token_s * job.num_left + cost.pair_s * pairs) / share
            found.append(AGAIN)
            if job.has_first_token:
                begin_s += left_s
            else:
                others.append((i, job))
                dues.append(Due(job.deadline_s, left_s, debts[job.tenant] * cost.token_s))
        for (i, job), standing in zip(others, standings(dues, begin_s), strict=True):
            job.standing = standing
            found[i] = standing
            if standing is Standing.LATE and (first_late is None or i < first_late[0]):
                first_late = i, job
        self._late_tokens.is_anyone_late = first_late is not None
        if first_late is not None and self._late_tokens.is_enough_for(first_late[1].num_left):
            found[first_late[0]] = LATE_TURN
        return found

    def _speed(self, device: WorkerLoad) -> tuple[float, float]:
        """How long a step is, in seconds, and the part of the time that prompts get."""
        num, context = device.num_decoding, device.decode_context
        step_s = self._cost.step_s(num, context, max(0, self._token_budget - num))
        if num:
            step_s = min(step_s, self._planned_s)
        return step_s, max(LEAST_SHARE, self._cost.prompt_share(num, context, step_s))

    def waits(self, job: Job) -> None:
        """See Order."""
        self._prompts.setdefault(job.tenant, set()).add(job.number)
        self._tokens.are_waiting(self._prompts.keys())

    def leaves(self, job: Job) -> None:
        """See Order."""
        prompts = self._prompts[job.tenant]
        prompts.discard(job.number)
        if not prompts:
            del self._prompts[job.tenant]
            self._tokens.are_waiting(self._prompts.keys())

    def charge(self, job: Job, num_tokens: int) -> None:
        """See Order."""
        self._tokens.charge(job.tenant, num_tokens, self._weights.get(job.tenant, 1.0))
        self._late_tokens.charge(job.standing, num_tokens)
