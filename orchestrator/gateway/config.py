"""What a gateway is started with. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.control.admission import Admission
from orchestrator.control.slo import NO_SLO, Slo
from workers.api import ImageReduction, WorkerId


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The part of a deployment that its gateway needs."""

    #: Name of the deployment.
    deployment: str
    #: Served model name.
    model: str
    #: host:port that clients call; port 0 takes a free one.
    address: str
    #: host:port at which the controller publishes its view; port 0 takes a free one.
    control_address: str
    #: Deadline of a request whose client sets none, or a later one, in seconds.
    request_timeout_s: float
    #: Requests that wait for a worker; one more is refused.
    max_waiting_requests: int
    #: Requests that are on workers at a time.
    max_running_requests: int
    #: Bytes of the pictures of all requests that are here, together; a request that would bring more is refused.
    max_image_bytes: int = 1024 * 2**20
    #: Of pictures, where a request says nothing of it.
    image_reduction: ImageReduction | None = None
    #: Targets of every request.
    slo: Slo = NO_SLO
    #: What tenants are worth, by the cache salt of their requests; others have 1.
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    #: Which new requests are taken.
    admission: Admission = Admission.OFF
    #: Of each declared worker, the tokens of one step of its engine.
    token_budgets: Mapping[WorkerId, int] = field(default_factory=dict)
    #: Of each declared worker, the part of what a sequence may still generate for which its engine keeps room.
    growth_reserves: Mapping[WorkerId, float] = field(default_factory=dict)
