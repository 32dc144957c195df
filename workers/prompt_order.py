"""Which prompt is computed first where each has a time by which its first token should come. Pure.

The engine's scheduler and the coarse simulator's order sort by this.
"""

import heapq
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from enum import IntEnum
from typing import NamedTuple

#: Seconds by which a prompt whose tenant was given more than others is put back at most.
LATE_S = 30.0
#: Part of the tokens of prompts that those that are too late get at least, by deadline: nobody waits for ever.
LATE_SHARE = 0.05
#: Part of the time that prompts get at least beside decodes, as is assumed.
LEAST_SHARE = 0.05
#: Tenants without a prompt that are remembered.
MAX_IDLE_TENANTS = 1024


class Standing(IntEnum):
    """How a prompt stands beside the others that wait. Who has a smaller one goes first."""

    ON_TIME = 0
    #: It could make it alone, but not all can, and without it more do.
    PASSED_OVER = 1
    #: It cannot make it though it were the next one.
    LATE = 2


class Due(NamedTuple):
    """A prompt. deadline_s: of its first token. left_s: that its computing takes beside what else runs. debt_s: of its tenant."""

    deadline_s: float
    left_s: float
    debt_s: float = 0.0

    @property
    def key(self) -> float:
        """Who has a smaller one goes first, among those who stand alike."""
        return self.deadline_s + min(self.debt_s, LATE_S)


def standings(prompts: Iterable[Due], begin_s: float) -> list[Standing]:
    """Which of these, computed one after the other in this order, have their first token in time, so that as few as possible are late.

    prompts: by key. begin_s: when the first one can begin. Where one would be late, that one of those so far is passed over which takes
    longest, and of a tenant that was given more as if it took longer by what it owes. Without debts no other choice has fewer late ones.

    Source: Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs" (Management Science 15, 1968).
    """
    found: list[Standing] = []
    kept: list[tuple[float, int, float]] = []
    end_s = begin_s
    for i, (deadline_s, left_s, debt_s) in enumerate(prompts):
        if begin_s + left_s > deadline_s:
            found.append(Standing.LATE)
            continue
        found.append(Standing.ON_TIME)
        heapq.heappush(kept, (-left_s - min(debt_s, LATE_S), -i, left_s))
        end_s += left_s
        while end_s > deadline_s:
            _, index, out_s = heapq.heappop(kept)
            end_s -= out_s
            found[-index] = Standing.PASSED_OVER
    return found


class LateTokens:
    """What those that are too late have not got of their share."""

    def __init__(self) -> None:
        #: Whether somebody waits who is. Nothing is owed to nobody.
        self.is_anyone_late = False
        self._owed = 0.0

    def is_enough_for(self, num_left: int) -> bool:
        """The first of them goes before all others now. num_left: tokens that it needs."""
        return self._owed >= num_left

    def charge(self, standing: Standing, num_tokens: int) -> None:
        """So much was computed for one that stands so."""
        if standing is Standing.LATE:
            self._owed = max(0.0, self._owed - num_tokens)
        elif self.is_anyone_late:
            self._owed += LATE_SHARE * num_tokens
        else:
            self._owed = 0.0


class TenantTokens:
    """Tokens of prompts that tenants were given, over their weights. Who got more than another one that waits owes it that.

    Source: virtual token counter (Sheng et al., OSDI'24), of prompts alone.
    """

    def __init__(self) -> None:
        self._virtual: dict[str, float] = {}
        self._waiting: AbstractSet[str] = frozenset()
        self._least = 0.0

    def are_waiting(self, tenants: AbstractSet[str]) -> None:
        """These have prompts now. One that comes back has no claim on what it did not use meanwhile."""
        if tenants == self._waiting:
            return
        virtual = self._virtual
        staying = tenants & self._waiting
        self._least = min((virtual[one] for one in staying or self._waiting), default=self._least)
        for one in tenants - self._waiting:
            virtual[one] = max(virtual.get(one, 0.0), self._least)
        self._waiting = frozenset(tenants)
        if len(virtual) > len(tenants) + MAX_IDLE_TENANTS:
            idle = sorted(virtual.keys() - tenants, key=lambda one: (virtual[one], one))
            for one in idle[: len(idle) - MAX_IDLE_TENANTS // 2]:
                del virtual[one]

    def charge(self, tenant: str, num_tokens: int, weight: float = 1.0) -> None:
        """So much was computed for it. weight > 0: what it is worth beside others."""
        self._virtual[tenant] = self._virtual.get(tenant, self._least) + num_tokens / weight

    def debts(self) -> dict[str, float]:
        """Of those that wait: virtual tokens beyond the one of them that got least, >= 0."""
        least = min((self._virtual[one] for one in self._waiting), default=0.0)
        return {one: self._virtual[one] - least for one in self._waiting}
