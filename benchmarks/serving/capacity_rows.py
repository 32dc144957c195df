"""What came of the requests of one load. Pure."""

from dataclasses import dataclass

from orchestrator.bench.plan import PlannedRequest


@dataclass(slots=True)
class Served:
    """One request: when it was due and when its tokens came, on the clock of the run."""

    plan: PlannedRequest
    due_s: float
    times_s: list[float]
