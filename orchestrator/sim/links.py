"""The links of the gateway to the processes of a simulated cluster. Pure."""

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from orchestrator.control.observation import ProcessKey
from orchestrator.control.router import ready_workers
from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.gateway.links import LinkListener
from orchestrator.sim.network import GATEWAY, Stream
from orchestrator.sim.unread import UnreadTokens
from orchestrator.sim.worker import SimWorker
from workers.api import Command, Event, KvEvent, Phase, RequestId, WorkerId

if TYPE_CHECKING:
    from orchestrator.sim.cluster import SimCluster


#: Of a command, in bytes.
COMMAND_BYTES = 4096
#: Waits before a session is opened again, in seconds, as gateway.worker_link.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0


class SimLink:
    """The gateway's way to one process. Implements gateway.links.Link."""

    def __init__(self, worker: WorkerView, process: SimWorker, *, is_cache_told: bool) -> None:
        self.worker = worker
        self.process = process
        #: The session, while it is open.
        self.stream: Stream | None = None
        engine = process.spec.engine
        self.block_size = engine.block_size if engine.is_prefix_cache_on and is_cache_told else 0


class SimLinks:
    """Implements gateway.links.Links."""

    def __init__(self, cluster: "SimCluster", listener: LinkListener) -> None:
        self._cluster = cluster
        self._network = cluster.network
        self._listener = listener
        self._links: dict[ProcessKey, SimLink] = {}
        #: That the dispatcher has not been told of.
        self.unread = UnreadTokens()
        #: What processes have told of their caches alone, by when it comes and by its number; it changes nothing but the dispatcher's index of
        #: blocks, so it is told of that before it looks.
        self._kv_coming: list[tuple[float, int, SimWorker, Sequence[KvEvent]]] = []
        self._num_sent = 0
        #: Workers that could be given prompts as of the last view.
        self._prefilling: frozenset[WorkerId] = frozenset()
        #: Told whose events have been dispatched, and when each of their tokens came, if that was before now.
        self.on_events: Callable[[Sequence[RequestId], Sequence[float]], None] = lambda _ids, _times_s: None
        #: Whether prompts may go elsewhere by this view, for want of room. What has not been read makes these fewer.
        self.may_route_again: Callable[[ClusterView], bool] = lambda _view: False

    def use(self, view: ClusterView) -> list[tuple[WorkerView, str]]:
        """See Links."""
        wanted = {(w.worker_id, w.incarnation): w for w in view.workers if w.state is LifecycleState.READY}
        lost = []
        for key in [key for key in self._links if key not in wanted]:
            present = view.worker(key[0])
            lost.append(
                (self._links.pop(key).worker, f"it is {present.state if present else 'not declared'}")
            )
        for key, worker in wanted.items():
            process = self._cluster.processes.get(key)
            if key not in self._links and process is not None:
                self._links[key] = link = SimLink(worker, process, is_cache_told=self._cluster.is_cache_told)
                self._open(link, FIRST_BACKOFF_S)
        return lost

    def _open(self, link: SimLink, backoff_s: float) -> None:
        """As gateway.worker_link: again and again, until a session is open."""
        if not self.has(link):
            return
        address = link.worker.address
        if self._network.loses(GATEWAY, address):
            again_s = self._network.break_heard_s() + backoff_s
            self._cluster.timers.call_later(again_s, self._open, link, min(2 * backoff_s, MAX_BACKOFF_S))
        else:
            self._network.send(GATEWAY, address, 0, self._opened, link)

    def _opened(self, link: SimLink) -> None:
        # What came before is lost.
        self.read_all()
        if link.process.is_alive and self.has(link):
            link.stream = link.process.open_stream()
            self._listener.link_opened(link)

    def has(self, link: object) -> bool:
        """See Links."""
        return any(one is link for one in self._links.values())

    def is_open(self, worker: WorkerView) -> bool:
        """See Links."""
        link = self._links.get((worker.worker_id, worker.incarnation))
        return link is not None and link.stream is not None

    def unsent_bytes(self, _worker: WorkerView) -> int:
        """See Links."""
        return 0

    def send(self, worker: WorkerView, command: Command) -> None:
        """See Links."""
        link = self._links.get((worker.worker_id, worker.incarnation))
        stream = link.stream if link is not None else None
        if link is None or stream is None or stream.is_broken:
            return
        address, process = link.worker.address, link.process
        if self._network.loses(GATEWAY, address):
            self.lose(process, stream)
            return
        num_bytes = COMMAND_BYTES + self._cluster.file_bytes(command)
        self._network.send(GATEWAY, address, num_bytes, process.command, command, stream)

    async def close(self) -> None:
        """See Links."""

    def events_came(
        self,
        process: SimWorker,
        stream: Stream | None,
        events: Sequence[Event],
        kv_events: Sequence[KvEvent],
        number: int,
    ) -> None:
        """From a process, by this session; when that is not open they are lost. number: see next_number."""
        self.read_caches(number)
        link = self._links.get(process.key)
        if link is not None and link.stream is not None and link.stream is stream:
            if kv_events:
                self._listener.cache_changed(link, kv_events)
            if events:
                self._dispatch(link, events, number)

    def next_number(self) -> int:
        """Of a message that is sent now: those of one process that come at one moment count in their order."""
        self._num_sent += 1
        return self._num_sent

    def cache_events_come(self, process: SimWorker, kv_events: Sequence[KvEvent], arrive_s: float) -> None:
        """The same for what changes no request, later."""
        heappush(self._kv_coming, (arrive_s, self.next_number(), process, kv_events))

    def read_caches(self, before: float = math.inf) -> None:
        """The dispatcher is told what has come by now of caches alone. before: of what comes now, messages with smaller numbers."""
        coming, until = self._kv_coming, (self._cluster.timers.now_s, before)
        while coming and coming[0][:2] < until:
            _, _, process, kv_events = heappop(coming)
            link = self._links.get(process.key)
            if link is not None and link.stream is not None:
                self._listener.cache_changed(link, kv_events)

    def _dispatch(self, link: SimLink, events: Sequence[Event], number: int) -> None:
        request_ids = list(dict.fromkeys(event.key.request_id for event in events))
        for request_id in request_ids:
            # What it got before.
            self._read(request_id, number)
        self._listener.events_came(link, events)
        self.on_events(request_ids, ())

    # Tokens that the dispatcher is told of later.

    def read_all(self) -> None:
        """The dispatcher is told of all that has come by now, of tokens with the time of each."""
        self.read_caches()
        for request_id in self.unread.request_ids():
            self._read(request_id)

    def read_on_time(self) -> None:
        """It is told of tokens that are on their way when they come."""
        timers = self._cluster.timers
        for request_id in self.unread.request_ids():
            for at_s in sorted(self.unread.coming_s(request_id, timers.time())):
                timers.call_at(at_s, self._read, request_id)

    def read_for(self, view: ClusterView) -> None:
        """The dispatcher is told of what it needs to know to use this view."""
        self.read_caches()
        ready = ready_workers(view, Phase.PREFILL, self.is_open)
        before, self._prefilling = self._prefilling, frozenset(worker.worker_id for worker in ready)
        # Prompts may go to a worker that has come to prefill, or has room: to choose which, it has to know how far each is.
        if self._prefilling != before or not self._is_steady(view) or self.may_route_again(view):
            self.read_all()

    def _is_steady(self, view: ClusterView) -> bool:
        """With this view all workers that are linked can go on as they do."""
        return all(
            (worker := view.worker(worker_id)) is not None
            and worker.incarnation == incarnation
            and worker.state is LifecycleState.READY
            and not worker.leaving
            for worker_id, incarnation in self._links
        )

    def _read(self, request_id: RequestId, before: float = math.inf) -> None:
        self.read_caches(before)
        for told in self.unread.read(request_id, self._cluster.timers.now_s):
            link = self._links.get(told.process)
            if link is not None and link.stream is not None:
                self._listener.events_came(link, (told.event,), told.times_s[-1])
                self.on_events((request_id,), told.times_s)

    # Sessions that end.

    def lose(self, process: SimWorker, stream: Stream) -> None:
        """A message of this session is lost."""
        stream.is_broken = True
        later = self._cluster.timers.call_later
        later(self._network.break_heard_s(), self._broke, process, stream)
        later(self._network.break_heard_s(), process.stream_ended, stream)

    def _broke(self, process: SimWorker, stream: Stream) -> None:
        link = self._links.get(process.key)
        if link is not None and link.stream is stream:
            self._close(link, "its session broke")
            self._cluster.timers.call_later(FIRST_BACKOFF_S, self._open, link, 2 * FIRST_BACKOFF_S)

    def ended(self, process: SimWorker) -> None:
        """The process has ended."""
        link = self._links.get(process.key)
        if link is not None and link.stream is not None:
            self._close(link, "its process ended")
        else:
            self.read_all()

    def _close(self, link: SimLink, reason: str) -> None:
        """What came before counts; what is under way is lost."""
        self.read_all()
        link.stream = None
        self.unread.forget(link.process.key)
        self._kv_coming = [one for one in self._kv_coming if one[2] is not link.process]
        heapify(self._kv_coming)
        self._listener.link_broke(link, reason)
