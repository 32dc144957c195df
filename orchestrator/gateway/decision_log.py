"""What a gateway remembers of the controller's decisions about phases, and of what they were made from."""

from collections import deque

from orchestrator.control.view import ClusterView, SwitchView
from orchestrator.control.view_wire import switch_to_pb
from protos import control_pb2 as pb

MAX_DECISIONS = 1000
#: An hour of looks, if there is one a second.
MAX_LOOKS = 3600


class DecisionLog:
    """The last MAX_DECISIONS switches, each as it was seen last, and the last MAX_LOOKS looks. Times are the gateway's clock."""

    def __init__(self) -> None:
        self._switches: dict[str, tuple[SwitchView, float]] = {}
        self._looks: deque[pb.Look] = deque(maxlen=MAX_LOOKS)

    def came(self, view: ClusterView, look: pb.Look | None, now_s: float) -> None:
        """The controller has decided once more."""
        for switch in view.switches:
            _, first_at_s = self._switches.get(switch.switch_id, (switch, now_s))
            self._switches[switch.switch_id] = switch, first_at_s
        while len(self._switches) > MAX_DECISIONS:
            del self._switches[next(iter(self._switches))]
        if look is not None:
            self._looks.append(look)

    def answer(self, now_s: float, *, with_looks: bool) -> pb.GetDecisionsResponse:
        """As the message."""
        return pb.GetDecisionsResponse(
            decisions=[
                pb.Decision(switch=switch_to_pb(switch), age_s=now_s - first_at_s)
                for switch, first_at_s in self._switches.values()
            ],
            looks=self._looks if with_looks else [],
        )
