"""Orders of a device's queue, for any policy. Pure.

What ages does so by the same amount for all, and is left out of keys.
"""

from orchestrator.control.policies.policy import Job
from workers.prompt_order import TenantTokens, is_too_late, slack_key


class Fcfs:
    """First come, first served."""

    def key(self, job: Job) -> float:
        """See Order."""
        return job.arrived_at_s

    def late_key(self, _now_s: float, _job: Job) -> float | None:
        """See Order."""
        return None

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

    def late_key(self, _now_s: float, _job: Job) -> float | None:
        """See Order."""
        return None

    def waits(self, job: Job) -> None:
        """See Order."""

    def leaves(self, job: Job) -> None:
        """See Order."""

    def charge(self, job: Job, num_tokens: int) -> None:
        """See Order."""


class LeastSlack:
    """Who has least time left to begin goes first; who cannot make it any more lets the others past, for LATE_S at most.

    As the engine does it: workers/prompt_order.py. token_s: a prompt takes so long for each of its tokens. weights: of tenants that
    are worth more or less than 1. A tenant that was given more than another that waits is put back by the time that the difference took.
    """

    def __init__(self, token_s: float, weights: dict[str, float] | None = None) -> None:
        self._token_s = token_s
        self._weights = weights or {}
        self._tokens = TenantTokens()
        #: Prompts of each tenant that are not computed yet, by number.
        self._prompts: dict[str, set[int]] = {}

    def key(self, job: Job) -> float:
        """See Order."""
        debt_s = self._tokens.debts().get(job.tenant, 0.0) * self._token_s
        return slack_key(job.deadline_s, job.num_left * self._token_s, debt_s, is_late=job.is_late)

    def late_key(self, now_s: float, job: Job) -> float | None:
        """See Order."""
        left_s = job.num_left * self._token_s
        if job.is_late or job.is_begun or not is_too_late(now_s, job.deadline_s, left_s):
            return None
        job.is_late = True
        return slack_key(job.deadline_s, left_s, is_late=True)

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
