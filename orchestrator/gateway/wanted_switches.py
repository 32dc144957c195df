"""Changes of phases that somebody asked a gateway for, on their way to the controller and back. Used in the loop only."""

import asyncio
from collections.abc import AsyncIterator

from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.view import ClusterView, SwitchView

#: That no view has told of yet; one more is refused.
MAX_WANTED = 64
#: A controller that has not taken one by then is not there, in seconds.
TAKEN_WITHIN_S = 10.0


class WantedSwitches:
    """Kept until a view tells of them; those who asked follow them in the views that come."""

    def __init__(self) -> None:
        self._wanted: dict[str, SwitchRequest] = {}
        self._view: ClusterView | None = None
        self._came = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """No more can be asked for now."""
        return len(self._wanted) >= MAX_WANTED

    def untold(self) -> tuple[SwitchRequest, ...]:
        """Those that no view has told of yet, for the controller, who may be told of one twice."""
        return tuple(self._wanted.values())

    def view_came(self, view: ClusterView) -> None:
        """The controller has decided once more."""
        for switch in view.switches:
            self._wanted.pop(switch.switch_id, None)
        self._view = view
        self._came.set()
        self._came = asyncio.Event()

    async def follow(self, request: SwitchRequest) -> AsyncIterator[SwitchView]:
        """Ask for it; then each state that it comes to, until it has ended or is forgotten.

        Raises TimeoutError when no controller takes it, which is then not asked for any more, or none speaks while it is under way;
        LookupError when it is forgotten before it has ended, by a new controller.
        """
        self._wanted[request.switch_id] = request
        try:
            async with asyncio.timeout(TAKEN_WITHIN_S):
                last = await self._next(request.switch_id, None)
        finally:
            self._wanted.pop(request.switch_id, None)
        yield last
        while last.is_under_way:
            last = await self._next(request.switch_id, last)
            yield last

    async def _next(self, switch_id: str, last: SwitchView | None) -> SwitchView:
        """The next state that is another one."""
        while True:
            async with asyncio.timeout(TAKEN_WITHIN_S):
                await self._came.wait()
            switches = self._view.switches if self._view is not None else ()
            found = next((one for one in switches if one.switch_id == switch_id), None)
            if found is None and last is not None:
                raise LookupError(switch_id)
            if found is not None and (last is None or found.state is not last.state):
                return found
