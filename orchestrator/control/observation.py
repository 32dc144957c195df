"""What one look at the cluster found. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.control.policies.policy import Totals
from orchestrator.control.role_switch import SwitchRequest
from workers.api import PhasesRefused, WorkerId, WorkerStatus

#: One process: which worker, and which of its incarnations.
ProcessKey = tuple[WorkerId, int]


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """A worker's process as the cluster knows it."""

    worker_id: WorkerId
    incarnation: int
    #: host:port; empty until the process has bound one.
    address: str = ""
    #: Why the process ended; None while it lives or is being placed.
    exit_reason: str | None = None
    #: What it waits for while it is being placed.
    detail: str = ""

    @property
    def key(self) -> ProcessKey:
        """Names this process among all that ever were."""
        return self.worker_id, self.incarnation

    @property
    def is_alive(self) -> bool:
        """It runs, or is being placed."""
        return self.exit_reason is None


@dataclass(frozen=True, slots=True)
class GatewayNews:
    """What a gateway answers to a view.

    wanted_switches: that somebody has asked it for and no view has told of yet. totals: what it has served; None before its first answer.
    version: of the last view that it has of this controller; 0 before the first.
    """

    wanted_switches: tuple[SwitchRequest, ...] = ()
    totals: Totals | None = None
    version: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """All processes of the deployment, and what was heard from them in this tick."""

    processes: tuple[ProcessReport, ...] = ()
    statuses: Mapping[ProcessKey, WorkerStatus] = field(default_factory=dict)
    #: As of the last view. A switch that was seen before is ignored.
    gateway: GatewayNews = GatewayNews()
    #: Of workers that were told to take other phases since the last look, and did not.
    refusals: Mapping[ProcessKey, PhasesRefused] = field(default_factory=dict)
