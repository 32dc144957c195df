"""EPD: when a worker changes from one phase to another, from what waits in each. Pure.

Source: EPD (arXiv 2501.05460), section on dynamic role switching, which names no thresholds: they are those of its code. The published
trigger counts requests of one sample, cannot see what waits between two phases and never rests. The steady one
is ours: seconds of work, with what waits in front of a phase, averaged, and against the cost of a switch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.api import Phase

PHASES = (Phase.ENCODE, Phase.PREFILL, Phase.DECODE)


@dataclass(frozen=True, slots=True)
class Switch:
    """One worker changes its phase."""

    source: Phase
    target: Phase
    reason: str


def published_switch(queued: Mapping[Phase, int], num_workers: Mapping[Phase, int]) -> Switch | None:
    """The published trigger. queued: requests that wait inside each phase, as the last sample had it, without those between phases.

    The longest queue takes a worker, unless all have at least half of its length, from the phase with most workers beyond one whose queue is
    shorter. Ties go to the phase that comes first.
    """
    most = max(queued[phase] for phase in PHASES)
    target = next(phase for phase in PHASES if queued[phase] == most)
    if all(queued[phase] >= most / 2 for phase in PHASES):
        return None
    donors = [
        phase for phase in PHASES if phase is not target and queued[phase] < most and num_workers[phase] > 1
    ]
    if not donors:
        return None
    source = max(donors, key=lambda phase: num_workers[phase])
    return Switch(source, target, f"{most} requests wait in {target}, {queued[source]} in {source}")


@dataclass(frozen=True, slots=True)
class PhaseLoad:
    """What waits for one phase, in seconds of one worker, and who works on it.

    queued_s: inside it. bridge_s: in front of it, between the phase before and this one; what decode lacks room for waits there. can_give: one of
    its workers can take another phase in place of this one.
    """

    queued_s: float
    bridge_s: float
    num_workers: int
    can_give: bool = True


@dataclass(frozen=True, slots=True)
class Settings:
    """No source has numbers for these but the memory (10 s or more) and the cooldown (twice a drain).

    memory_s: time constant of the average; before so long was observed nothing is decided. drain_s: what a worker takes to finish or hand over
    what it runs. switch_s: seconds that a switch costs, drain included; the clearing time must fall by more.
    """

    memory_s: float = 10.0
    drain_s: float = 5.0
    switch_s: float = 6.0

    @property
    def cooldown_s(self) -> float:
        """After a switch."""
        return 2 * self.drain_s


class SteadyTrigger:
    """Decides on the average of what it was told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began_s: float | None = None
        self._told_s = 0.0
        #: Of all samples so far, 0 to 1: what the average is divided by, so that it does not begin at nothing.
        self._weight = 0.0
        self._switched_s = -math.inf
        #: Seconds of one worker that wait for each phase, averaged.
        self._work_s: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    def decide(self, now_s: float, loads: Mapping[Phase, PhaseLoad]) -> Switch | None:
        """Take a sample, and say which switch it is time for; a switch that is returned counts as done. now_s does not go back.

        A phase without workers of its own takes part with infinite clearing time if anything waits for it, so that it gets one.
        """
        self._tell(now_s, loads)
        settings = self._settings
        assert self._began_s is not None
        if now_s - self._began_s < settings.memory_s or now_s - self._switched_s < settings.cooldown_s:
            return None
        num = {phase: loads[phase].num_workers for phase in PHASES}
        before_s = self._clearing_s(num)
        target = max(PHASES, key=lambda phase: before_s[phase])
        # By the longest time that is left, then by the donor's own; the last worker of a phase stays.
        best: tuple[float, float, Phase] | None = None
        for source in PHASES:
            if source is target or num[source] <= 1 or not loads[source].can_give:
                continue
            after_s = self._clearing_s({**num, source: num[source] - 1, target: num[target] + 1})
            one = max(after_s.values()), after_s[source], source
            if best is None or one[:2] < best[:2]:
                best = one
        if best is None:
            return None
        after, _, source = best
        # Where nobody works any worker is worth it, even if another phase has none either.
        gain_s = math.inf if math.isinf(before_s[target]) else before_s[target] - after
        if gain_s <= settings.switch_s:
            return None
        self._switched_s = now_s
        reason = (
            f"{target} needs {before_s[target]:.1f} s for what waits, {source} {before_s[source]:.1f} s; "
            f"{after:.1f} s with a worker moved"
        )
        return Switch(source, target, reason)

    def _tell(self, now_s: float, loads: Mapping[Phase, PhaseLoad]) -> None:
        """An exponential average in which a sample counts for the time since the one before; the first counts for none."""
        if self._began_s is None:
            self._began_s = self._told_s = now_s
            return
        new = -math.expm1((self._told_s - now_s) / self._settings.memory_s)
        self._told_s = now_s
        self._weight += new * (1.0 - self._weight)
        gain = new / self._weight if self._weight > 0 else 0.0
        for phase in PHASES:
            waits_s = loads[phase].queued_s + loads[phase].bridge_s
            self._work_s[phase] += gain * (waits_s - self._work_s[phase])

    def _clearing_s(self, num_workers: Mapping[Phase, int]) -> dict[Phase, float]:
        """Until what waits for each phase is done, if nothing comes."""
        return {
            phase: work_s / num_workers[phase] if num_workers[phase] else (math.inf if work_s > 0 else 0.0)
            for phase, work_s in self._work_s.items()
        }


@dataclass(frozen=True, slots=True)
class Allocation:
    """Workers of each phase."""

    encode: int
    prefill: int
    decode: int


def allocations(num_workers: int) -> list[Allocation]:
    """All with at least one worker in each phase, to be compared by who can predict their goodput; none below three workers.

    Source: EPD, its allocation over which it optimises. Its code looks only at those with two decode workers or more, which leaves
    out the allocations that the paper reports.
    """
    return [
        Allocation(encode, prefill, num_workers - encode - prefill)
        for encode in range(1, num_workers - 1)
        for prefill in range(1, num_workers - encode)
    ]
