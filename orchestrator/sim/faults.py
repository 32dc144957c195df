"""What goes wrong in a simulation, and when. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from workers.api import WorkerId


class FaultKind(StrEnum):
    """Of one worker, of the ways to it, or of the controller."""

    #: Its process ends.
    CRASH = "crash"
    #: It does nothing for a while.
    PAUSE = "pause"
    #: Its steps take several times as long for a while.
    SLOW = "slow"
    #: It and the gateway cannot hear each other for a while.
    CUT_FROM_GATEWAY = "cut_from_gateway"
    #: It and the other workers cannot hear each other for a while.
    CUT_FROM_WORKERS = "cut_from_workers"
    #: The controller ends in its next tick, when it has told the gateway what it decided and done nothing of it; another one begins after a while.
    CONTROLLER_CRASH = "controller_crash"
    #: A part of what it and the gateway, or the controller, send each other is lost for a while: their stream breaks, and calls fail, done or not.
    LOSS_WITH_GATEWAY = "loss_with_gateway"
    #: The same between it and the other workers: streams of transfers break, chunks that are read in place are not whole, embeddings do not come.
    LOSS_WITH_WORKERS = "loss_with_workers"
    #: The gateway misses views, or the controller what the gateway says to them.
    LOSS_OF_VIEWS = "loss_of_views"


@dataclass(frozen=True, slots=True)
class Fault:
    """worker_id: nobody's for the controller and its views. duration_s, factor and rate: for kinds that have one."""

    at_s: float
    kind: FaultKind
    worker_id: WorkerId
    duration_s: float = 0.0
    #: How many times slower.
    factor: float = 1.0
    #: The share of messages that is lost.
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class FaultOutcome:
    """What came of a fault.

    why_not: why nothing was broken; empty where something was. over_at_s: on the fault's clock, when it was over: after a crash when the process in its place
    was READY for the gateway, else after its duration, or with its process. None where it was not over when the run ended.
    """

    fault: Fault
    why_not: str
    over_at_s: float | None = None


def random_faults(
    rng: random.Random, worker_ids: Sequence[WorkerId], *, rate_per_s: float, until_s: float
) -> tuple[Fault, ...]:
    """Faults that come as a Poisson process; none begins, or lasts, beyond `until_s`."""
    faults, at_s = [], 0.0
    while rate_per_s > 0 and (at_s := at_s + rng.expovariate(rate_per_s)) < until_s:
        duration_s = min(rng.expovariate(1 / 2.0), until_s - at_s)
        kind, worker_id = rng.choice(list(FaultKind)), rng.choice(worker_ids)
        faults.append(Fault(at_s, kind, worker_id, duration_s, rng.uniform(2.0, 10.0), random_rate(rng)))
    return tuple(faults)


def random_rate(rng: random.Random) -> float:
    """A share of messages that is lost: as often one of a thousand as nearly all."""
    return float(10 ** rng.uniform(-3.0, 0.0))
