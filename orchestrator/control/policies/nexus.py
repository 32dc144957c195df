"""Nexus: which part of the SMs prefill and decode get, and which prompts are prefilled next, from predictions alone. Pure.

Source: Nexus (arXiv 2507.06608): two modes, the greedy search and the buffer of Algorithm 1, the order of Algorithm 2. Percents are whole,
of the SMs; those of the two stages sum to 100. What is beyond the paper: the hysteresis of the mode, bounds for the search, the cases of an
idle stage, rounding to what the hardware can do, and cutting the prompt that does not fit. Its costs: `nexus_cost.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.api import Phase

#: A stage may take so many times its least predicted latency while the other one is served first: prefill (alpha) and decode (beta).
PREFILL_SLACK = 1.3
DECODE_SLACK = 1.1
#: Part of the KV capacity in use above which decode is served first.
KV_SWITCH = 0.70

#: Predicted seconds of a stage with so many percent.
Cost = Callable[[Phase, int], float]


def other(phase: Phase) -> Phase:
    """Of the two stages."""
    return Phase.DECODE if phase is Phase.PREFILL else Phase.PREFILL


def target(kv_used: float, last: Phase | None = None, *, hysteresis: float = 0.0) -> Phase:
    """The stage that is to be as fast as the other's slack allows.

    kv_used: part of the KV capacity, 0 to 1. hysteresis: how far from the threshold the target changes, so that it does not change with
    every block; 0 is the paper's.
    """
    if last is not None and abs(kv_used - KV_SWITCH) < hysteresis:
        return last
    return Phase.DECODE if kv_used > KV_SWITCH else Phase.PREFILL


@dataclass(frozen=True, slots=True)
class Split:
    """Percent of each stage; they sum to 100, and 0 is for a stage without work."""

    prefill: int
    decode: int

    def of(self, phase: Phase) -> int:
        """Of one stage."""
        return self.prefill if phase is Phase.PREFILL else self.decode

    @classmethod
    def giving(cls, phase: Phase, percent: int) -> "Split":
        """So much to one stage, the rest to the other."""
        return cls(percent, 100 - percent) if phase is Phase.PREFILL else cls(100 - percent, percent)


def adjust(goal: Phase, now: Split, cost: Cost, *, best_s: float | None = None, least: int = 1) -> Split:
    """The largest share of the goal at which the other stage keeps its slack, found in steps of one percent from the current one.

    Both stages have work. cost: predicted seconds, not growing with the share. best_s: what the other's slack is of; its cost with all
    SMs when absent. least: percent that no stage goes below, 1 to 50; the goal has that much where no split keeps the slack.
    Source: Algorithm 1.
    """
    rest = other(goal)
    slack = DECODE_SLACK if goal is Phase.PREFILL else PREFILL_SLACK
    limit_s = slack * (cost(rest, 100) if best_s is None else best_s)
    share = min(max(now.of(goal), least), 100 - least)
    while share > least and cost(rest, 100 - share) > limit_s:
        share -= 1
    while share < 100 - least and cost(rest, 100 - share - 1) <= limit_s:
        share += 1
    return Split.giving(goal, share)


@dataclass(frozen=True, slots=True)
class Choice:
    """The split that is to be, which may be the one that is."""

    split: Split
    reason: str


def choose(
    goal: Phase,
    now: Split,
    cost: Cost,
    *,
    is_prefilling: bool,
    is_decoding: bool,
    delta: int,
    best_s: float | None = None,
    least: int = 1,
) -> Choice:
    """One tick: search, and change only what changes by more than `delta` percent, which the paper does not number.

    A stage without work leaves all to the other one, and gets its part back when it has some, whatever the delta. Without any work nothing changes.
    """
    if not is_prefilling and not is_decoding:
        return Choice(now, "nothing runs")
    if not is_prefilling or not is_decoding:
        alone = Phase.PREFILL if is_prefilling else Phase.DECODE
        return Choice(Split.giving(alone, 100), f"only {alone} has work")
    new = adjust(goal, now, cost, best_s=best_s, least=least)
    if 0 not in (now.prefill, now.decode) and abs(new.prefill - now.prefill) <= delta:
        return Choice(now, f"{goal} first: {new.of(goal)} % is within {delta} of {now.of(goal)} %")
    limit = ", the least" if new.of(goal) == least else f", as far as the slack of {other(goal)} reaches"
    return Choice(new, f"{goal} first: {now.of(goal)} to {new.of(goal)} %{limit}")


def layouts(num_sms: int, *, least: int, multiple: int) -> tuple[int, ...]:
    """SMs of prefill that a device can set apart, ascending; decode has the rest, which need not be a multiple.

    least, multiple: of a part, in SMs; CUDA green contexts of compute capability 9.0 have 8 and 8.
    """
    return tuple(num for num in range(multiple, num_sms, multiple) if num >= least and num_sms - num >= least)


def rounded(goal: Phase, split: Split, prefill_sms: Sequence[int], num_sms: int) -> int:
    """SMs of prefill in the layout next to a split between two stages that have work.

    The goal's share is rounded down, so that the other keeps its slack; below the smallest layout it gets that one. prefill_sms: ascending, not empty.
    """
    if goal is Phase.PREFILL:
        fitting = [num for num in prefill_sms if num * 100 <= split.prefill * num_sms]
        return fitting[-1] if fitting else prefill_sms[0]
    fitting = [num for num in prefill_sms if (num_sms - num) * 100 <= split.decode * num_sms]
    return fitting[0] if fitting else prefill_sms[-1]


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A prompt that waits for its next chunk. num_done: of its tokens, prefilled or found in a cache."""

    request_id: str
    num_tokens: int
    num_done: int
    arrived_s: float

    @property
    def num_left(self) -> int:
        """Tokens to prefill."""
        return self.num_tokens - self.num_done

    def score(self, now_s: float, decay: float) -> float:
        """The lower, the sooner. decay >= 0: tokens that a second of waiting makes up for."""
        return self.num_left - decay * (now_s - self.arrived_s)


def shortest_first(
    queue: Sequence[QueuedPrompt], *, now_s: float, budget: int, decay: float, cuts_prompts: bool = True
) -> list[tuple[QueuedPrompt, int]]:
    """What is prefilled next, with tokens of each: in order of score, to be computed anew at every step, until the budget is full.

    cuts_prompts: the first that does not fit gets what is left of the budget. Without, as Algorithm 2 is printed, it ends the batch, and an
    old long prompt at the head leaves every batch empty. decay: the paper has 15 and says no unit; 0 is shortest first without aging.
    """
    batch: list[tuple[QueuedPrompt, int]] = []
    left = budget
    unfinished = [one for one in queue if one.num_left > 0]
    for one in sorted(unfinished, key=lambda one: (one.score(now_s, decay), one.arrived_s, one.request_id)):
        num = min(one.num_left, left) if cuts_prompts else one.num_left
        if left == 0 or num > left:
            break
        batch.append((one, num))
        left -= num
    return batch
