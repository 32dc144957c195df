"""semi-PD: which part of a device's SMs prefill and decode may use, from the latencies that were observed. Pure.

Source: semi-PD (arXiv 2504.19867), its latency model (equations 1 to 4) and its SLO-aware adjusting algorithm (Algorithm 1).
Two defects of the listing are put right as its prose has it: steps are counted, and when both targets are missed nothing
changes. What is beyond the paper: floors, the cooldown, the age of requests that wait, how the curves are fitted, and what is done
while they cannot be (the paper names no method).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.control.slo import Slo, percentile

#: Loads that are tried in a fit, first over all that are possible and then about the best of them.
NUM_LOADS = 64
#: A load is at most so much of the smallest share that was observed; at it the curve has its pole.
MAX_LOAD = 0.999

Vector = npt.NDArray[np.float64]
#: (share in percent, seconds)
Sample = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Partition:
    """Percent of the SMs that each phase may use, 1 to 100. Together they may pass 100: then the hardware arbitrates."""

    prefill: int
    decode: int

    @property
    def prefill_share(self) -> float:
        """Normalised, in percent: what the curves and the algorithm look at."""
        return 100.0 * self.prefill / (self.prefill + self.decode)

    @property
    def decode_share(self) -> float:
        """Normalised, in percent."""
        return 100.0 * self.decode / (self.prefill + self.decode)


@dataclass(frozen=True, slots=True)
class TtftCurve:
    """TTFT = a / (share - load) + b, in seconds; share and load in percent. a > 0, b >= 0, load >= 0.

    load: the share that arriving work takes up (the paper's lambda), at which the queue has no end. Source: equation 4.
    """

    a: float
    b: float
    load: float

    def seconds(self, share: float) -> float:
        """Infinite at the load and below it, where the formula would be negative and look like a target that is met."""
        return self.a / (share - self.load) + self.b if share > self.load else math.inf

    def least_share(self, target_s: float) -> float:
        """From which on the target is met; infinite when no share does."""
        return self.load + self.a / (target_s - self.b) if target_s > self.b else math.inf

    def through(self, share: float, seconds: float) -> "TtftCurve":
        """The curve that has this value there. Of the three the load changes, as it alone follows the arrival rate; where that
        cannot explain the value, b, and then a."""
        if seconds > self.b and share - self.a / (seconds - self.b) >= 0:
            return TtftCurve(self.a, self.b, share - self.a / (seconds - self.b))
        b = seconds - self.a / share
        return TtftCurve(self.a, b, 0.0) if b >= 0 else TtftCurve(seconds * share, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TpotCurve:
    """TPOT = a / share + b, in seconds; share in percent. a > 0, b >= 0. Decode is taken to have no queue.

    Source: equation 4.
    """

    a: float
    b: float

    def seconds(self, share: float) -> float:
        """Infinite without any share."""
        return self.a / share + self.b if share > 0 else math.inf

    def least_share(self, target_s: float) -> float:
        """From which on the target is met; infinite when no share does."""
        return self.a / (target_s - self.b) if target_s > self.b else math.inf

    def through(self, share: float, seconds: float) -> "TpotCurve":
        """The curve that has this value there: b changes, and where that is not enough, a."""
        b = seconds - self.a / share
        return TpotCurve(self.a, b) if b >= 0 else TpotCurve(seconds * share, 0.0)


def queueing_curve(rate_rps: float, full_s: float) -> TtftCurve:
    """What the theory says before anything is observed. full_s > 0: of one prefill with all SMs.

    Source: equations 1 to 3: M/M/1 whose service time is inversely proportional to the share.
    """
    return TtftCurve(a=100.0 * full_s, b=0.0, load=100.0 * rate_rps * full_s)


def fit_tpot(samples: Sequence[Sample]) -> TpotCurve | None:
    """Least squares with a > 0 and b >= 0; None with fewer than two shares, or when TPOT grows with the share."""
    if len({share for share, _ in samples}) < 2:
        return None
    shares, seconds = np.array(samples, dtype=float).T
    found = _best_of(shares, seconds, np.zeros(1))
    return TpotCurve(found.a, found.b) if found is not None else None


def fit_ttft(samples: Sequence[Sample]) -> TtftCurve | None:
    """Least squares with a > 0, b >= 0 and a load in 0 to the smallest share, which is scanned: for a given load the model is linear.

    None with fewer than three shares, which do not determine three parameters, or when TTFT grows with the share.
    """
    if len({share for share, _ in samples}) < 3:
        return None
    shares, seconds = np.array(samples, dtype=float).T
    most = MAX_LOAD * float(shares.min())
    found = _best_of(shares, seconds, np.linspace(0.0, most, NUM_LOADS))
    width = most / (NUM_LOADS - 1)
    while found is not None and width > 1e-6 * most:
        low, high = max(0.0, found.load - width), min(most, found.load + width)
        found = _best_of(shares, seconds, np.linspace(low, high, NUM_LOADS))
        width = (high - low) / (NUM_LOADS - 1)
    return found


def _best_of(shares: Vector, seconds: Vector, loads: Vector) -> TtftCurve | None:
    """The curve of least squared error over some loads; None when a is not positive with any of them."""
    # [num_loads, num_samples]
    inverse = 1.0 / (shares - loads[:, None])
    centred = inverse - inverse.mean(axis=1, keepdims=True)
    spread = np.square(centred).sum(axis=1)
    a = (centred @ (seconds - seconds.mean())) / spread
    b = seconds.mean() - a * inverse.mean(axis=1)
    # Where b would be negative the best is on the border of what is allowed.
    on_border = b < 0
    a = np.where(on_border, (inverse @ seconds) / np.square(inverse).sum(axis=1), a)
    b = np.where(on_border, 0.0, b)
    errors = np.square(a[:, None] * inverse + b[:, None] - seconds).sum(axis=1)
    errors = np.where(a > 0, errors, np.inf)
    best = int(np.argmin(errors))
    if not np.isfinite(errors[best]):
        return None
    return TtftCurve(float(a[best]), float(b[best]), float(loads[best]))


class Estimator:
    """Both curves, as the last windows had them.

    memory: windows that count; older ones are forgotten, as the load drifts. ttft, tpot: what holds until three and two shares were
    observed within it, from a profile of some partitions or from `queueing_curve`. While too few were, the last curves are kept and put
    through the last value.
    """

    def __init__(self, ttft: TtftCurve, tpot: TpotCurve, *, memory: int = 16) -> None:
        self.ttft = ttft
        self.tpot = tpot
        self._ttft_samples: deque[Sample] = deque(maxlen=memory)
        self._tpot_samples: deque[Sample] = deque(maxlen=memory)

    def observe(self, partition: Partition, ttft_s: float | None, tpot_s: float | None) -> None:
        """What a window had in which the partition did not change; None when it had no requests of that kind."""
        if ttft_s is not None and ttft_s > 0:
            share = partition.prefill_share
            self._ttft_samples.append((share, ttft_s))
            self.ttft = fit_ttft(self._ttft_samples) or self.ttft.through(share, ttft_s)
        if tpot_s is not None and tpot_s > 0:
            share = partition.decode_share
            self._tpot_samples.append((share, tpot_s))
            self.tpot = fit_tpot(self._tpot_samples) or self.tpot.through(share, tpot_s)


def observed_ttft_s(
    finished_s: Sequence[float], waiting_ages_s: Sequence[float], percent: float
) -> float | None:
    """A percentile of the TTFT of a window, which sees a queue that grows; None without any request.

    waiting_ages_s: of requests without a first token yet: each is a lower bound of its TTFT. They can raise the percentile of those that
    have finished, and never lower it.
    """
    if not finished_s and not waiting_ages_s:
        return None
    of_all = percentile(sorted([*finished_s, *waiting_ages_s]), percent)
    return max(of_all, percentile(sorted(finished_s), percent)) if finished_s else of_all


@dataclass(frozen=True, slots=True)
class Settings:
    """The paper and its code say none of the numbers.

    step: percent that a step gives or takes. max_steps: of one adjustment. least: percent that neither phase goes below. cooldown_s:
    after a switch, in which nothing is adjusted since what is observed spans two partitions; a window at least.
    """

    step: int = 5
    max_steps: int = 6
    least: int = 10
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Adjustment:
    """The partition that is to be, which may be the one that is."""

    partition: Partition
    reason: str


def adjust(
    partition: Partition,
    *,
    ttft_s: float | None,
    tpot_s: float | None,
    slo: Slo,
    estimator: Estimator,
    settings: Settings,
    since_switch_s: float = math.inf,
) -> Adjustment:
    """One run of Algorithm 1 at the end of a window.

    ttft_s, tpot_s: percentiles of the window, already told to the estimator; None when there was nothing to observe. since_switch_s: since the
    partition last changed.
    """
    if since_switch_s < settings.cooldown_s:
        return Adjustment(partition, f"switched {since_switch_s:.1f} s ago")
    if ttft_s is None or tpot_s is None:
        return Adjustment(partition, "nothing was observed of one phase")
    misses_ttft, misses_tpot = ttft_s > slo.ttft_s, tpot_s > slo.tpot_s
    if misses_ttft == misses_tpot:
        return Adjustment(partition, "both targets are missed" if misses_ttft else "both targets are met")
    new = partition
    for _ in range(settings.max_steps):
        if misses_ttft:
            is_enough = estimator.ttft.seconds(new.prefill_share) <= slo.ttft_s
        else:
            is_enough = estimator.tpot.seconds(new.decode_share) <= slo.tpot_s
        raised = _raised(new, settings, is_prefill=misses_ttft)
        if is_enough or raised == new:
            break
        new = raised
    missed = f"TTFT {ttft_s:.3g} s" if misses_ttft else f"TPOT {tpot_s:.3g} s"
    target_s = slo.ttft_s if misses_ttft else slo.tpot_s
    if new == partition:
        return Adjustment(partition, f"{missed} misses {target_s:g} s; no step is left that would help")
    return Adjustment(
        new,
        f"{missed} misses {target_s:g} s: prefill {partition.prefill} to {new.prefill} %, "
        f"decode {partition.decode} to {new.decode} %",
    )


def _raised(partition: Partition, settings: Settings, *, is_prefill: bool) -> Partition:
    """One step more for a phase: of its own percentage up to 100, then off the other's down to the floor."""
    own, other = partition.prefill, partition.decode
    if not is_prefill:
        own, other = other, own
    if own + settings.step <= 100:
        own += settings.step
    elif other - settings.step >= settings.least:
        other -= settings.step
    return Partition(own, other) if is_prefill else Partition(other, own)


def feasible_shares(ttft: TtftCurve, tpot: TpotCurve, slo: Slo) -> tuple[float, float] | None:
    """Least and largest normalised share of prefill, in percent, at which both targets are met; None when there is none.

    The closed form of what the algorithm walks to.
    """
    least = ttft.least_share(slo.ttft_s)
    most = 100.0 - tpot.least_share(slo.tpot_s)
    return (least, most) if least <= most else None
