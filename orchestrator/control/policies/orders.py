"""Orders of a device's queue, for any policy. Pure.

Keys do not change while a prompt waits: what ages does so by the same amount for all, and is left out.
"""

from orchestrator.control.policies.policy import Job

#: Seconds after which a prompt that is too late has the rank that its deadline would have given it: none waits for ever.
LATE_S = 30.0


class Fcfs:
    """First come, first served."""

    def key(self, job: Job) -> float:
        """See Order."""
        return job.arrived_at_s

    def late_key(self, _now_s: float, _job: Job) -> float | None:
        """See Order."""
        return None

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

    def charge(self, job: Job, num_tokens: int) -> None:
        """See Order."""


class LeastSlack:
    """Who has least time left to begin goes first; who cannot make it any more lets the others past, for LATE_S at most.

    token_s: a prompt takes so long for each of its tokens. weights: of tenants that are worth more or less than 1. A tenant that was
    given more virtual tokens (tokens over weight) than the one with fewest of those that wait is put back by the time that the
    difference took. Source: virtual token counter (Sheng et al., OSDI'24), with deadlines in place of turns.
    """

    def __init__(self, token_s: float, weights: dict[str, float] | None = None) -> None:
        self._token_s = token_s
        self._weights = weights or {}
        self._virtual: dict[str, float] = {}

    def key(self, job: Job) -> float:
        """See Order."""
        if job.is_late:
            return job.deadline_s + LATE_S
        return job.deadline_s - job.num_left * self._token_s + self._debt_s(job.tenant)

    def late_key(self, now_s: float, job: Job) -> float | None:
        """See Order."""
        if job.is_late or job.is_begun or now_s + job.num_left * self._token_s <= job.deadline_s:
            return None
        job.is_late = True
        return job.deadline_s + LATE_S

    def charge(self, job: Job, num_tokens: int) -> None:
        """See Order."""
        weight = self._weights.get(job.tenant, 1.0)
        self._virtual[job.tenant] = self._virtual.get(job.tenant, 0.0) + num_tokens / weight

    def _debt_s(self, tenant: str) -> float:
        if len(self._virtual) < 2 and tenant in self._virtual:
            return 0.0
        least = min(self._virtual.values(), default=0.0)
        # A tenant that comes back has no claim on what it did not use.
        own = self._virtual.setdefault(tenant, least)
        return (own - least) * self._token_s
