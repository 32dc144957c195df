"""What the policies of the controller see at one moment. Pure."""

import hashlib
from dataclasses import dataclass, fields

from orchestrator.control.policies.policy import FIRST_SWITCH_COST, ClusterLoad, SwitchCost, WorkerLoad
from orchestrator.control.role_switch import phase_text
from orchestrator.control.scaling_config import ScalingConfig
from orchestrator.control.slo import Slo
from workers.api import PhaseSet, WorkerId
from workers.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class Look:
    """What the policy saw at one moment, so that another one can be asked. at_s: of the controller's clock.

    tile_s: to encode a tile of a picture; 0 while that is not known. allowed: what a worker may come to serve. scaling: of how many workers;
    None where their number is fixed. waiting: those that were added and are not ready.
    """

    at_s: float
    load: ClusterLoad
    cost: StepCost
    slo: Slo
    tile_s: float = 0.0
    switch_cost: SwitchCost = FIRST_SWITCH_COST
    allowed: tuple[PhaseSet, ...] = ()
    scaling: ScalingConfig | None = None
    waiting: tuple[WorkerId, ...] = ()

    @property
    def digest(self) -> str:
        """Names it among all looks."""
        others = (self.load.totals, self.cost, self.tile_s, self.switch_cost)
        text = "|".join((*map(_as_text, self.load.workers), *map(repr, others)))
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


_LOAD_FIELDS = tuple(one.name for one in fields(WorkerLoad))


def _as_text(load: WorkerLoad) -> str:
    """All that it says."""
    told = {name: getattr(load, name) for name in _LOAD_FIELDS}
    # A set has no order of its own.
    told["phases"] = told["loaded"] = frozenset()
    return f"{phase_text(load.phases)}/{phase_text(load.loaded)}{told!r}"
