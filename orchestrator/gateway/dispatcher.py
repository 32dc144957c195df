"""MAIN LOOP 2: gives requests to workers and what comes of them to clients.

It is driven by calls, all in one event loop: a request comes or goes, events come, a link opens or
breaks, the view changes. Its only tasks are the links', one for each worker. Nothing here waits, so the
state is whole between any two calls.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from orchestrator.control.request_machine import (
    Action,
    Deliver,
    Fail,
    RequestMachine,
    RequestState,
    RequestTimes,
    Send,
    WantRoute,
)
from orchestrator.control.router import LoadLedger, Refuse, Route, Wait, choose_route
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.errors import DuplicateRequest, GatewayFull, GatewayStopping
from orchestrator.gateway.live_request import LiveRequest
from orchestrator.gateway.validation import CheckedRequest
from orchestrator.gateway.worker_link import WorkerLink
from workers.api import Event, ModelInfo, RequestId, WorkerId

logger = logging.getLogger(__name__)


class LinkKey(NamedTuple):
    """What one link leads to."""

    worker_id: WorkerId
    incarnation: int
    address: str

    @classmethod
    def of(cls, worker: WorkerView) -> "LinkKey":
        """The link that leads to this worker."""
        return cls(worker.worker_id, worker.incarnation, worker.address)


class Dispatcher:
    """Running and waiting requests, the links to workers, and the load on them. Made in the loop.

    learn_model: told of the model of each worker before it is used; may raise UnusableModel.
    first_attempt: attempts are numbered from here, over all requests. Should differ from one start of
    the gateway to the next, so that a worker cannot take an attempt for an earlier gateway's.
    """

    def __init__(
        self,
        *,
        max_waiting_requests: int,
        max_running_requests: int,
        learn_model: Callable[[WorkerView, ModelInfo], Awaitable[None]],
        on_change: Callable[[], None] = lambda: None,
        first_attempt: int = 1,
    ) -> None:
        self.num_finished = 0
        self.num_failed = 0
        self._max_waiting = max_waiting_requests
        self._max_running = max_running_requests
        self._learn_model = learn_model
        self._on_change = on_change
        self._attempts = itertools.count(first_attempt)
        self._loop = asyncio.get_running_loop()
        self._view: ClusterView | None = None
        self._view_at_s = 0.0
        self._links: dict[LinkKey, WorkerLink] = {}
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}
        self._ledger = LoadLedger()
        #: All that are not over.
        self._requests: dict[RequestId, LiveRequest] = {}
        #: Those that want a route, the next one first. New ones are refused above max_waiting_requests;
        #: ones that lost their workers come back to the front, max_running_requests at most.
        self._waiting: deque[LiveRequest] = deque()
        self._is_stopping = False
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # What others ask.

    @property
    def view(self) -> ClusterView | None:
        """The view that is in use."""
        return self._view

    @property
    def view_age_s(self) -> float:
        """Seconds since it came."""
        return self._loop.time() - self._view_at_s

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a route."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that workers have."""
        return len(self._requests) - len(self._waiting)

    @property
    def can_serve(self) -> bool:
        """A request that came now could go to workers."""
        return not self._is_stopping and isinstance(self._choose(frozenset()), Route)

    def why_not(self) -> str:
        """Why `can_serve` is false."""
        if self._is_stopping:
            return str(GatewayStopping())
        choice = self._choose(frozenset())
        return "" if isinstance(choice, Route) else choice.reason

    def check_room(self, num_more: int = 0) -> None:
        """Raises GatewayStopping or GatewayFull when a request would be refused. num_more: those before it."""
        if self._is_stopping:
            raise GatewayStopping
        if len(self._waiting) + num_more >= self._max_waiting:
            raise GatewayFull(len(self._waiting) + num_more)

    def check_invariants(self) -> None:
        """The ledger is what the requests say, every request is in its place."""
        ledger = LoadLedger()
        for request_id, request in self._requests.items():
            machine = request.machine
            machine.check_invariants()
            assert machine.request_id == request_id
            assert not machine.is_over
            assert (request in self._waiting) == (machine.state is RequestState.QUEUED)
            if machine.route is not None and machine.state is not RequestState.QUEUED:
                ledger.add(machine.route.decode.worker_id, decode_sequences=1)
                if machine.state is RequestState.PREFILL:
                    ledger.add(machine.route.prefill.worker_id, prefill_tokens=machine.num_prefill_tokens)
        assert ledger == self._ledger, (ledger, self._ledger)
        assert set(self._tasks) >= set(self._links.values())

    # Clients.

    def submit(self, checked: CheckedRequest, *, arrived_at_s: float, deadline_s: float) -> LiveRequest:
        """Run a request; times are the loop's. Every submitted request must be released.

        Raises DuplicateRequest, GatewayFull or GatewayStopping.
        """
        self.check_room()
        if checked.request_id in self._requests:
            raise DuplicateRequest(checked.request_id)
        machine = RequestMachine(
            checked.request_id, checked.prompt_ids, checked.sampling, deadline_s, RequestTimes(arrived_at_s)
        )
        request = LiveRequest(machine)
        self._requests[checked.request_id] = request
        self._is_idle.clear()
        self._waiting.append(request)
        request.deadline = self._loop.call_at(deadline_s, self._deadline_passed, request)
        self._route_waiting()
        return request

    def release(self, request: LiveRequest) -> None:
        """The client's call has ended: if the request has not, it is cancelled."""
        self._do(request, request.machine.cancelled("the client left"))
        self._route_waiting()

    def abort(self, request_id: RequestId) -> bool:
        """End it as cancelled; False when no such request is running."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._do(request, request.machine.cancelled("aborted by the client"))
        self._route_waiting()
        return True

    # The cluster.

    def update_view(self, view: ClusterView) -> bool:
        """Use this view from now on; False, and nothing changes, when it is older than the present one."""
        present = self._view
        if self._is_closed:
            return False
        if present is not None and (view.controller_epoch, view.version) < (
            present.controller_epoch,
            present.version,
        ):
            return False
        self._view = view
        self._view_at_s = self._loop.time()
        wanted = {
            LinkKey.of(worker): worker
            for worker in view.workers
            if worker.state is LifecycleState.READY and worker.address
        }
        for key in [key for key in self._links if key not in wanted]:
            self._close_link(key, _why_gone(key, view))
        for key, worker in wanted.items():
            if key not in self._links:
                link = WorkerLink(worker, self)
                self._links[key] = link
                self._tasks[link] = task = asyncio.create_task(link.run())
                task.add_done_callback(partial(self._link_ended, link))
        self._changed()
        return True

    def stop_accepting(self) -> None:
        """Refuse new requests from now on; those that are here go on."""
        self._is_stopping = True
        self._on_change()

    async def wait_idle(self) -> None:
        """Until no request is here."""
        await self._is_idle.wait()

    async def close(self) -> None:
        """Fail what is left, and close the links."""
        self._is_stopping = self._is_closed = True
        for request in list(self._requests.values()):
            self._do(request, request.machine.stopped("the gateway stopped"))
        # Commands that are queued, Aborts, need no way out: a worker drops what came by an ended stream.
        for key in list(self._links):
            self._close_link(key, "the gateway stopped")
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._on_change()

    # Links: see LinkListener.

    async def model_found(self, worker: WorkerView, model: ModelInfo) -> None:
        """A worker is about to be used."""
        await self._learn_model(worker, model)

    def link_opened(self, link: WorkerLink) -> None:
        """A worker can be used."""
        worker = link.worker
        logger.info(
            "link_opened worker_id=%s incarnation=%d address=%s",
            worker.worker_id,
            worker.incarnation,
            worker.address,
        )
        self._changed()

    def link_broke(self, link: WorkerLink, reason: str) -> None:
        """A worker cannot be used for now."""
        worker = link.worker
        logger.info(
            "link_broke worker_id=%s incarnation=%d reason=%s", worker.worker_id, worker.incarnation, reason
        )
        if self._links.get(LinkKey.of(worker)) is link:
            self._worker_lost(worker, reason)
            self._changed()

    def events_came(self, link: WorkerLink, events: Sequence[Event]) -> None:
        """A worker reported."""
        worker_id, now_s = link.worker.worker_id, self._loop.time()
        for event in events:
            request = self._requests.get(event.key.request_id)
            if request is not None and (actions := request.machine.worker_event(worker_id, event, now_s)):
                self._do(request, actions)
        self._route_waiting()

    # Inside.

    def _changed(self) -> None:
        self._route_waiting()
        self._on_change()

    def _close_link(self, key: LinkKey, reason: str) -> None:
        link = self._links.pop(key)
        self._tasks[link].cancel()
        logger.info(
            "link_closed worker_id=%s incarnation=%d reason=%s", key.worker_id, key.incarnation, reason
        )
        self._worker_lost(link.worker, reason)

    def _link_ended(self, link: WorkerLink, _task: asyncio.Task[None]) -> None:
        del self._tasks[link]

    def _worker_lost(self, worker: WorkerView, reason: str) -> None:
        # The latest first, since each goes to the front of the queue: the earliest is then the next.
        for request in reversed(list(self._requests.values())):
            self._do(request, request.machine.worker_lost(worker, reason))

    def _deadline_passed(self, request: LiveRequest) -> None:
        is_waiting = request.machine.state is RequestState.QUEUED
        self._do(request, request.machine.deadline_passed(self._why_waiting() if is_waiting else ""))
        self._route_waiting()

    def _why_waiting(self) -> str:
        return self.why_not() or f"{self.num_running} requests were running (gateway.maxRunningRequests)"

    def _do(self, request: LiveRequest, actions: Sequence[Action]) -> None:
        """Carry out what a machine says. Who calls this gives free places to others (`_route_waiting`)."""
        if not actions:
            return
        for action in actions:
            match action:
                case Deliver():
                    request.deliver(action)
                case Send():
                    link = self._links.get(LinkKey.of(action.worker))
                    if link is not None:
                        link.send(action.command)
                case WantRoute():
                    logger.info(
                        "request_wants_route request_id=%s attempt=%d num_delivered=%d reason=%s",
                        request.machine.request_id,
                        request.machine.num_attempts,
                        len(request.machine.delivered),
                        action.reason,
                    )
                    self._waiting.appendleft(request)
                case Fail():
                    logger.info(
                        "request_failed request_id=%s kind=%s reason=%s",
                        request.machine.request_id,
                        action.kind,
                        action.reason,
                    )
                    request.fail(action)
        request.settle(self._ledger)
        if request.machine.is_over:
            self._forget(request)

    def _forget(self, request: LiveRequest) -> None:
        del self._requests[request.machine.request_id]
        if request in self._waiting:
            self._waiting.remove(request)
        if request.deadline is not None:
            request.deadline.cancel()
        if request.machine.state is RequestState.FINISHED:
            self.num_finished += 1
        else:
            self.num_failed += 1
        if not self._requests:
            self._is_idle.set()

    def _route_waiting(self) -> None:
        """Give routes to waiting requests, first come first served, while there are any.

        All want the same phases, so what the first cannot have the second cannot either.
        """
        while self._waiting and self.num_running < self._max_running:
            request = self._waiting[0]
            choice = self._choose(frozenset(request.machine.avoided))
            if isinstance(choice, Wait):
                return
            self._waiting.popleft()
            if isinstance(choice, Refuse):
                self._do(request, request.machine.no_route(choice.reason))
                continue
            actions = request.machine.routed(choice, next(self._attempts), self._loop.time())
            if not request.machine.is_over:
                request.charge(self._ledger)
            self._do(request, actions)

    def _choose(self, avoided: frozenset[WorkerId]) -> Route | Wait | Refuse:
        """The best route without the avoided workers, or else with them."""
        if avoided:
            choice = choose_route(
                self._view, self._ledger, lambda w: self._is_linked(w) and w.worker_id not in avoided
            )
            if isinstance(choice, Route):
                return choice
        return choose_route(self._view, self._ledger, self._is_linked)

    def _is_linked(self, worker: WorkerView) -> bool:
        link = self._links.get(LinkKey.of(worker))
        return link is not None and link.is_open


def _why_gone(key: LinkKey, view: ClusterView) -> str:
    worker = view.worker(key.worker_id)
    if worker is None:
        return "it is no longer declared"
    if worker.incarnation != key.incarnation:
        return f"incarnation {worker.incarnation} took its place"
    if worker.state is not LifecycleState.READY:
        return f"it is {worker.state}" + (f": {worker.reason}" if worker.reason else "")
    return f"its address is {worker.address} now"
