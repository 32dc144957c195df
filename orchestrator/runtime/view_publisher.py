"""Tells the gateway over gRPC what the cluster is."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc.aio

from orchestrator.control.look import Look
from orchestrator.control.look_wire import look_to_pb
from orchestrator.control.observation import GatewayNews
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.view import ClusterView
from orchestrator.control.view_wire import totals_from_pb, view_from_pb, view_to_pb
from orchestrator.errors import ControllerSuperseded, GatewayUnreachable
from orchestrator.runtime.channel import open_channel
from protos import control_pb2 as pb
from protos.control_pb2_grpc import GatewayControlServiceStub
from workers.api import WorkerId
from workers.wire import phases_from_pb

PUBLISH_TIMEOUT_S = 1.0
#: The gateway may be starting itself.
LAST_VIEW_TIMEOUT_S = 5.0


class GatewayPublisher:
    """Implements ViewPublisher for the gateway whose control address this is.

    Made in the loop in which it is used; `close` it there.
    """

    def __init__(self, control_address: str) -> None:
        self._address = control_address
        self._channel = open_channel(control_address)
        self._stub = GatewayControlServiceStub(self._channel)

    async def publish(self, view: ClusterView, look: Look | None = None) -> GatewayNews:
        """See ViewPublisher."""
        with self._map_errors():
            request = pb.PublishViewRequest(
                view=view_to_pb(view), look=look_to_pb(look) if look is not None else None
            )
            answer = await self._stub.PublishView(request, timeout=PUBLISH_TIMEOUT_S)
        if answer.is_superseded:
            raise ControllerSuperseded(view.controller_epoch)
        wanted = tuple(
            SwitchRequest(one.switch_id, WorkerId(one.worker_id), phases_from_pb(one.phases), one.reason)
            for one in answer.wanted_switches
        )
        return GatewayNews(wanted, totals_from_pb(answer.totals))

    async def last_view(self) -> ClusterView | None:
        """The view that the gateway has; waits a while for a gateway to come. Raises GatewayUnreachable."""
        with self._map_errors():
            answer = await self._stub.GetView(
                pb.GetViewRequest(), timeout=LAST_VIEW_TIMEOUT_S, wait_for_ready=True
            )
        return view_from_pb(answer.view) if answer.HasField("view") else None

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    @contextmanager
    def _map_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise GatewayUnreachable(self._address, error.details() or error.code().name) from error
