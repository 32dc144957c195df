"""Settings for the number of workers, and loads that ask for more or fewer."""

from orchestrator.control.look import Look
from orchestrator.control.policies.policy import ClusterLoad, Totals
from orchestrator.control.scaling import Demand
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from workers.api import Phase, WorkerId
from workers.step_cost import StepCost

E, P, D = (frozenset({phase}) for phase in Phase)
EXTRA = tuple(WorkerId(f"w-{i}") for i in range(2, 5))
CONFIG = ScalingConfig(EXTRA, hold_s=10.0, release_s=20.0, give_up_s=60.0, blocked_s=100.0)
COST = StepCost(0.002, 2.5e-5, 2.6e-5, 0.005, 5e-8, 1e-9)
LOOK = Look(0.0, ClusterLoad((), Totals()), COST, Slo(1.0, 0.05))


def demand(load: float, *, is_moving: bool = False) -> Demand:
    """Of two workers or more that serve both."""
    return Demand(load, is_moving, P | D, LOOK)
