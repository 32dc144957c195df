"""What a gateway remembers of the controller's decisions about phases, and of what they were made from."""

from collections import deque
from collections.abc import Iterable

from orchestrator.control.admission import Refusals
from orchestrator.control.view import ClusterView, ScaleView, SwitchView
from orchestrator.control.view_wire import scale_to_pb, switch_to_pb
from protos import control_pb2 as pb

MAX_DECISIONS = 1000
#: An hour of looks, if there is one a second.
MAX_LOOKS = 3600


class DecisionLog:
    """The last MAX_DECISIONS switches and as many decisions about the number of workers, each as it was seen last, and the last MAX_LOOKS looks. Times are the gateway's clock."""

    def __init__(self) -> None:
        self._switches: dict[str, tuple[SwitchView, float]] = {}
        self._scales: dict[str, tuple[ScaleView, float]] = {}
        self._looks: deque[pb.Look] = deque(maxlen=MAX_LOOKS)

    def came(self, view: ClusterView, look: pb.Look | None, now_s: float) -> None:
        """The controller has decided once more."""
        for switch in view.switches:
            _, first_at_s = self._switches.get(switch.switch_id, (switch, now_s))
            self._switches[switch.switch_id] = switch, first_at_s
        for scale in view.scales:
            _, first_at_s = self._scales.get(scale.scale_id, (scale, now_s))
            self._scales[scale.scale_id] = scale, first_at_s
        for remembered in (self._switches, self._scales):
            while len(remembered) > MAX_DECISIONS:
                del remembered[next(iter(remembered))]
        if look is not None:
            self._looks.append(look)

    def answer(
        self, now_s: float, refusals: Iterable[Refusals] = (), *, with_looks: bool
    ) -> pb.GetDecisionsResponse:
        """As the message. refusals: of new requests, which the gateway decides itself, by the same clock."""
        switches = [
            pb.Decision(switch=switch_to_pb(switch), age_s=now_s - first_at_s)
            for switch, first_at_s in self._switches.values()
        ]
        scales = [
            pb.Decision(scale=scale_to_pb(scale), age_s=now_s - first_at_s)
            for scale, first_at_s in self._scales.values()
        ]
        refused = [
            pb.Decision(refusals=_refusals_to_pb(one), age_s=now_s - one.first_at_s) for one in refusals
        ]
        return pb.GetDecisionsResponse(
            decisions=sorted((*switches, *scales, *refused), key=lambda one: -one.age_s),
            looks=self._looks if with_looks else [],
        )


def _refusals_to_pb(refusals: Refusals) -> pb.Refusals:
    return pb.Refusals(
        num=refusals.num,
        lasted_s=refusals.last_at_s - refusals.first_at_s,
        target_s=refusals.target_s,
        least_ttft_s=refusals.ttft_s[0],
        most_ttft_s=refusals.ttft_s[1],
        least_retry_after_s=refusals.retry_after_s[0],
        most_retry_after_s=refusals.retry_after_s[1],
    )
