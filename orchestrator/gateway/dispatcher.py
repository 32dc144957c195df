"""MAIN LOOP 2: gives requests to workers and what comes of them to clients.

It is driven by calls, all in one event loop: a request comes or goes, events come, a link opens or
breaks, the view changes. Its only tasks are the links', one for each worker. Nothing here waits, so the
state is whole between any two calls. The simulator runs it too, with its own timers and links.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from orchestrator.control.admission import Admission, RefusalLog, refusal
from orchestrator.control.policies.policy import Totals
from orchestrator.control.prefix_index import PrefixIndex
from orchestrator.control.request_actions import (
    Action,
    Deliver,
    DeliverDrafts,
    DeliverPrompt,
    Fail,
    Send,
    WantEncoders,
    WantRoute,
)
from orchestrator.control.request_machine import RequestState
from orchestrator.control.request_record import RequestRecords
from orchestrator.control.router import LoadLedger, Refuse, Route, Wait
from orchestrator.control.served_totals import ServedTotals
from orchestrator.control.slo import NO_SLO, Slo
from orchestrator.control.view import ClusterView, WorkerView
from orchestrator.errors import DuplicateRequest, GatewayFull, GatewayStopping
from orchestrator.gateway.encoders import FULL_S, Encoders
from orchestrator.gateway.links import Link, LinkListener, Links, Timer, Timers
from orchestrator.gateway.live_request import LiveRequest, LiveSample, enqueue
from orchestrator.gateway.routes import Routes, can_go_back
from orchestrator.gateway.validation import CheckedRequest
from workers.api import (
    Event,
    KvEvent,
    KvTransferred,
    ModelInfo,
    Phase,
    PhaseSet,
    RequestId,
    SubscribeKvEvents,
    WorkerId,
)

logger = logging.getLogger(__name__)

#: A worker that told more of its cache than could be read is asked again after so long, in seconds.
ASK_AGAIN_S = 5.0


class Dispatcher:
    """Running and waiting requests, the links to workers, and the load on them.

    timers: the event loop. make_links: makes the links to workers, which tell the listener that they are given.
    learn_model: told of the model of each worker before it is used; may raise UnusableModel. on_view: told of each view.
    first_attempt: attempts are numbered from here, over all requests. Should differ from one start of
    the gateway to the next, so that a worker cannot take an attempt for an earlier gateway's. slo: of every request, for `totals`,
    `admission` and the workers. tenant_weights: by cache salt. token_budgets: of a step of each worker's engine. growth_reserves: of each engine, see EngineConfig.
    """

    def __init__(
        self,
        timers: Timers,
        make_links: Callable[[LinkListener], Links],
        *,
        max_waiting_requests: int,
        max_running_requests: int,
        learn_model: Callable[[WorkerView, ModelInfo], Awaitable[None]],
        on_change: Callable[[], None] = lambda: None,
        on_view: Callable[[ClusterView], None] = lambda _view: None,
        first_attempt: int = 1,
        slo: Slo = NO_SLO,
        admission: Admission = Admission.OFF,
        token_budgets: Mapping[WorkerId, int] | None = None,
        growth_reserves: Mapping[WorkerId, float] | None = None,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.num_finished = 0
        self.num_failed = 0
        #: That would have been too late, and are not among those that failed.
        self.refusals = RefusalLog()
        self.records = RequestRecords()
        self._served = ServedTotals(slo)
        self._slo = slo
        self._admission = admission
        self._tenant_weights = tenant_weights or {}
        self._max_waiting = max_waiting_requests
        self._max_running = max_running_requests
        self._learn_model = learn_model
        self._on_change = on_change
        self._on_view = on_view
        self._attempts = itertools.count(first_attempt)
        self._timers = timers
        self._view_at_s = 0.0
        #: Workers that give up phases, and which.
        self._leaving: dict[WorkerId, PhaseSet] = {}
        #: Workers that could be given prompts as of the last view, or have been linked since.
        self._prefilling: frozenset[WorkerId] = frozenset()
        self._links = make_links(self)
        self._ledger = LoadLedger()
        self._prefixes = PrefixIndex()
        self._routes = Routes(
            self._ledger, self._prefixes, self._links.is_open, token_budgets or {}, growth_reserves or {}
        )
        #: All that are not over.
        self._requests: dict[RequestId, LiveRequest] = {}
        #: Samples that workers have, by their attempt, which is no other one's.
        self._running: dict[int, LiveSample] = {}
        self._encoders = Encoders(self._ledger, self._links.is_open, self._links.unsent_bytes)
        #: Until encode workers that had no room are looked at again; None while none has a reason for it.
        self._look_again: Timer | None = None
        #: Samples that want a route, in the order of `enqueue`. New requests are refused above max_waiting_requests;
        #: samples that lost their workers come back, max_running_requests at most, and those after the first of
        #: their request join, at most MAX_SAMPLES - 1 for each that runs.
        self._waiting: deque[LiveSample] = deque()
        self._is_stopping = False
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # What others ask.

    @property
    def view(self) -> ClusterView | None:
        """The view that is in use."""
        return self._routes.view

    @property
    def view_age_s(self) -> float:
        """Seconds since it came."""
        return self._timers.time() - self._view_at_s

    @property
    def num_waiting(self) -> int:
        """Samples of requests that wait for a route."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Samples of requests that workers have."""
        return len(self._running)

    @property
    def can_serve(self) -> bool:
        """A request that came now could go to workers."""
        return not self._is_stopping and isinstance(self._routes.choose(frozenset()), Route)

    @property
    def is_leaving(self) -> bool:
        """Some worker gives up a phase: requests go elsewhere from it as soon as they can."""
        return bool(self._leaving)

    @property
    def totals(self) -> Totals:
        """What was served."""
        return self._served.totals

    def why_not(self) -> str:
        """Why `can_serve` is false."""
        if self._is_stopping:
            return str(GatewayStopping())
        choice = self._routes.choose(frozenset())
        return "" if isinstance(choice, Route) else choice.reason

    def check_room(self, num_more: int = 0) -> None:
        """Raises GatewayStopping or GatewayFull when a request would be refused. num_more: those before it."""
        if self._is_stopping:
            raise GatewayStopping
        if len(self._waiting) + num_more >= self._max_waiting:
            raise GatewayFull(len(self._waiting) + num_more)

    def check_invariants(self) -> None:
        """The ledger is what the samples say, every request and sample is in its place."""
        ledger = LoadLedger()
        for request_id, request in self._requests.items():
            assert request.request_id == request_id
            assert not request.is_over
            assert not request.is_failed
            for sample in request.samples:
                machine = sample.machine
                machine.check_invariants()
                is_started = sample.index < request.num_started
                is_queued = machine.state is RequestState.QUEUED
                assert (sample in self._waiting) == (is_queued and is_started)
                assert (self._running.get(machine.attempt) is sample) == (
                    not is_queued and not machine.is_over
                )
                if machine.route is not None and not is_queued and not machine.is_over:
                    decode_id = machine.route.decode.worker_id
                    ledger.add(decode_id, decode_sequences=1)
                    if machine.state is RequestState.PREFILL:
                        num_tokens = machine.num_prefill_tokens - machine.route.num_cached_tokens
                        ledger.add(
                            machine.route.prefill.worker_id,
                            prefill_tokens=num_tokens,
                            coming_tokens=machine.route.prefill_room,
                        )
                    if machine.state is RequestState.PREFILL or machine.is_moving:
                        ledger.add(decode_id, coming_tokens=machine.route.decode_room)
                self._encoders.check_invariants(sample, ledger)
        assert len(self._running) <= self._max_running
        assert ledger == self._ledger, (ledger, self._ledger)
        self._prefixes.check_invariants()

    def may_route_again(self, view: ClusterView) -> bool:
        """Some worker may have no room for a prompt that it was given, by this view."""
        return self._routes.may_be_crowded(view)

    # Clients.

    def submit(self, checked: CheckedRequest, *, arrived_at_s: float, deadline_s: float) -> LiveRequest:
        """Run a request; times are the loop's. Every submitted request must be released.

        Raises DuplicateRequest, GatewayFull, GatewayStopping or TooLate.
        """
        self.check_room()
        if checked.request_id in self._requests:
            raise DuplicateRequest(checked.request_id)
        request = LiveRequest.of(
            checked,
            arrived_at_s=arrived_at_s,
            deadline_s=deadline_s,
            slo=self._slo,
            tenant_weight=self._tenant_weights.get(checked.cache_salt, 1.0),
        )
        self._check_lateness(request)
        self._requests[checked.request_id] = request
        self.records.begin(request.record, [sample.machine for sample in request.samples])
        self._is_idle.clear()
        enqueue(request.samples[0], self._waiting)
        request.deadline = self._timers.call_at(deadline_s, self._deadline_passed, request)
        self._route_waiting()
        return request

    def release(self, request: LiveRequest) -> None:
        """The client's call has ended: if the request has not, it is cancelled."""
        self._cancel(request, "the client left")
        self._route_waiting()

    def abort(self, request_id: RequestId) -> bool:
        """End it as cancelled; False when no such request is running."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._cancel(request, "aborted by the client")
        self._route_waiting()
        return True

    def text_stopped(self, sample: LiveSample, num_tokens: int) -> None:
        """A stop string ended the text of a sample within its first `num_tokens` tokens."""
        was_over = sample.machine.is_over
        actions = sample.machine.text_stopped(num_tokens)
        sample.drop_rest()
        if not was_over:
            self._do(sample, actions)
            self._route_waiting()

    # The cluster.

    def update_view(self, view: ClusterView) -> bool:
        """Use this view from now on; False, and nothing changes, when it is older than the present one."""
        present = self.view
        if self._is_closed:
            return False
        if present is not None and (view.controller_epoch, view.version) < (
            present.controller_epoch,
            present.version,
        ):
            return False
        self._view_at_s = self._timers.time()
        self._routes.update(view, self._view_at_s)
        for worker, reason in self._links.use(view):
            self._worker_lost(worker, reason)
        self._on_view(view)
        self._leaving = {worker.worker_id: worker.leaving for worker in view.workers if worker.leaving}
        self._leave_workers()
        self._spread_prompts()
        self._route_waiting()
        self._route_again()
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
            for sample in request.samples:
                if not sample.machine.is_over:
                    self._do(sample, sample.machine.stopped("the gateway stopped"))
        if self._look_again is not None:
            self._look_again.cancel()
        await self._links.close()
        self._on_change()

    # Links: see LinkListener.

    async def model_found(self, worker: WorkerView, model: ModelInfo) -> None:
        """A worker is about to be used."""
        await self._learn_model(worker, model)

    def link_opened(self, link: Link) -> None:
        """A worker can be used."""
        worker = link.worker
        logger.info(
            "link_opened worker_id=%s incarnation=%d address=%s",
            worker.worker_id,
            worker.incarnation,
            worker.address,
        )
        if link.block_size > 0:
            self._prefixes.add(worker, link.block_size)
            self._links.send(worker, SubscribeKvEvents())
        self._give_share(worker.worker_id)
        self._changed()

    def link_broke(self, link: Link, reason: str) -> None:
        """A worker cannot be used for now."""
        worker = link.worker
        logger.info(
            "link_broke worker_id=%s incarnation=%d reason=%s", worker.worker_id, worker.incarnation, reason
        )
        if self._links.has(link):
            self._worker_lost(worker, reason)
            self._changed()

    def events_came(self, link: Link, events: Sequence[Event], came_at_s: float | None = None) -> None:
        """A worker reported."""
        worker_id = link.worker.worker_id
        now_s = self._timers.time() if came_at_s is None else came_at_s
        for event in events:
            if isinstance(event, KvTransferred):
                self.records.transferred(event)
            self._encoders.said(link.worker, event, now_s)
            attempt = event.key.attempt
            if (encoding := self._encoders.sample_of(attempt)) is not None:
                self._do(encoding, encoding.machine.worker_event(worker_id, event, now_s))
            elif (sample := self._running.get(attempt)) is not None:
                if actions := sample.machine.worker_event(worker_id, event, now_s):
                    self._do(sample, actions)
                else:
                    # Its KV may have come.
                    sample.settle(self._ledger)
        self._leave_workers()
        self._route_waiting()

    def cache_changed(self, link: Link, events: Sequence[KvEvent]) -> None:
        """A worker told of its prefix cache."""
        if not self._prefixes.apply(link.worker, events):
            logger.info("kv_events_lost worker_id=%s reason=told_too_much_at_once", link.worker.worker_id)
            self._timers.call_later(ASK_AGAIN_S, self._ask_again, link)

    # Inside.

    def _check_lateness(self, request: LiveRequest) -> None:
        """Raises TooLate when it is predicted to be; where nothing is known it is not."""
        if self._admission is Admission.OFF:
            return
        first = request.samples[0]
        choice = self._routes.choose_for(first)
        predicted = choice.predicted if isinstance(choice, Route) else None
        now_s = self._timers.time()
        problem = refusal(predicted, now_s - first.machine.times.arrived_at_s, self._slo.ttft_s)
        if problem is not None:
            self.refusals.add(now_s, problem)
            logger.info("request_refused request_id=%s reason=%s", request.request_id, problem)
            raise problem

    def _ask_again(self, link: Link) -> None:
        if self._links.has(link):
            self._links.send(link.worker, SubscribeKvEvents())

    def _leave_workers(self) -> None:
        """Requests go elsewhere from workers that give up the phase for which they are there."""
        if not self._leaving:
            return
        # The latest first: see _worker_lost.
        for sample in reversed(list(self._running.values())):
            machine, route, now_s = sample.machine, sample.machine.route, self._timers.time()
            if route is None or machine.is_over:
                continue
            prefill_id, decode_id = route.prefill.worker_id, route.decode.worker_id
            is_decode_leaving = Phase.DECODE in self._leaving.get(decode_id, ())
            if machine.is_prefill_waiting:
                if Phase.PREFILL in self._leaving.get(prefill_id, ()):
                    self._do(sample, machine.sent_back(f"{prefill_id} gives up prefill"))
                elif is_decode_leaving:
                    self._do(sample, machine.sent_back(f"{decode_id} gives up decode"))
            elif is_decode_leaving and machine.can_migrate:
                self._migrate(sample, f"{decode_id} gives up decode", now_s)

    def _spread_prompts(self) -> None:
        """Some of the prompts that wait go to a worker that has come to prefill, which else would wait for those that are to come."""
        ready = self._routes.ready(Phase.PREFILL)
        before, self._prefilling = self._prefilling, frozenset(worker.worker_id for worker in ready)
        come = self._prefilling - before
        if come and before:
            self._send_back(Phase.PREFILL, come)

    def _give_share(self, worker_id: WorkerId) -> None:
        """A worker that can be used again gets some of the prompts that wait: all that it had have gone to others, perhaps to one that has no room to decode them."""
        for phase in (Phase.PREFILL, Phase.DECODE):
            if any(one.worker_id == worker_id for one in self._routes.ready(phase)):
                self._send_back(phase, frozenset({worker_id}))
                if phase is Phase.PREFILL:
                    self._prefilling |= {worker_id}

    def _send_back(self, phase: Phase, come: frozenset[WorkerId]) -> None:
        """The last prompts, as many as make the queues of a phase alike. The first stay, and are sooner too: they are late already, and the last need not be.

        One that has its last attempt stays as well: a link that broke may break again. So do those that would come back: what avoids these workers, samples
        that follow the first of their request, and what is decoded where it is prefilled.
        """
        num_moved = 0
        for sample in reversed(list(self._running.values())):
            machine, route = sample.machine, sample.machine.route
            if route is None or not can_go_back(sample) or come <= machine.avoided:
                continue
            if phase is Phase.DECODE and route.is_colocated:
                continue
            if phase is Phase.PREFILL:
                num_here = self._ledger.of(route.prefill.worker_id).prefill_tokens
                num_moved += machine.num_prefill_tokens
            else:
                num_here = self._ledger.of(route.decode.worker_id).decode_sequences
                num_moved += 1
            if num_moved > len(come) * num_here:
                return
            self._do(sample, machine.sent_back(f"{', '.join(sorted(come))} has come to {phase}"))

    def _route_again(self) -> None:
        """Prompts for which their workers have no room go to others that have."""
        now_s = self._timers.time()
        for prompt in self._routes.take_prompts_without_room(self._running, now_s):
            sample = self._running.get(prompt.attempt)
            # It may have been cancelled with another sample of its request.
            if sample is not None and (reason := self._routes.why_again(sample, now_s - prompt.since_s)):
                self._do(sample, sample.machine.sent_back(reason))
                self._route_waiting()

    def _migrate(self, sample: LiveSample, reason: str, now_s: float) -> None:
        target = self._routes.choose_decode(sample)
        if target is None:
            # It stays where it is until there is one.
            return
        actions = sample.machine.migrated(target, reason, now_s)
        if not sample.machine.is_over:
            sample.move_charge(self._ledger)
        self._do(sample, actions)

    def _changed(self) -> None:
        self._route_waiting()
        self._on_change()

    def _worker_lost(self, worker: WorkerView, reason: str) -> None:
        self._encoders.lost(worker)
        self._prefixes.remove(worker)
        # The latest first, since each goes before others of its priority: the earliest is then the next.
        for sample in reversed([sample for request in self._requests.values() for sample in request.samples]):
            if actions := sample.machine.worker_lost(worker, reason, self._timers.time()):
                self._do(sample, actions)
            elif sample.machine.images is not None:
                # A shard that was no longer needed ends without an action.
                self._encoders.settle(sample)

    def _deadline_passed(self, request: LiveRequest) -> None:
        for sample in request.samples:
            if not sample.machine.is_over:
                self._do(sample, sample.machine.deadline_passed(self._why_waiting(sample)))
        self._route_waiting()

    def _cancel(self, request: LiveRequest, reason: str) -> None:
        for sample in request.samples:
            if not sample.machine.is_over:
                self._do(sample, sample.machine.cancelled(reason))

    def _why_waiting(self, sample: LiveSample) -> str:
        if sample.machine.state is not RequestState.QUEUED:
            return self._encoders.why_waiting(self.view, sample, self._timers.time())
        return self.why_not() or f"{self.num_running} requests were running (gateway.maxRunningRequests)"

    def _do(self, sample: LiveSample, actions: Sequence[Action]) -> None:
        """Carry out what a machine says, which was not over. Who calls this gives free places to others."""
        request = sample.request
        for action in actions:
            match action:
                case Deliver() | DeliverPrompt() | DeliverDrafts():
                    sample.deliver(action)
                case Send():
                    self._links.send(action.worker, action.command)
                case WantRoute():
                    logger.info(
                        "request_wants_route request_id=%s sample=%d attempt=%d num_delivered=%d reason=%s",
                        request.request_id,
                        sample.index,
                        sample.machine.num_attempts,
                        len(sample.machine.delivered),
                        action.reason,
                    )
                    enqueue(sample, self._waiting, is_first=True)
                case WantEncoders():
                    self._encoders.want(sample)
                case Fail():
                    if not request.is_failed:
                        logger.info(
                            "request_failed request_id=%s sample=%d kind=%s reason=%s",
                            request.request_id,
                            sample.index,
                            action.kind,
                            action.reason,
                        )
                    request.fail(action)
        sample.note_state(actions, self._timers.time())
        self._put_away(sample)
        if request.is_failed:
            # One sample that cannot be had fails the request.
            self._cancel(request, "another sample of the request failed")
        elif request.num_started < len(request.samples) and (
            sample.machine.delivered or sample.machine.is_over
        ):
            self._start_others(request)

    def _put_away(self, sample: LiveSample) -> None:
        """Take a sample from where its machine's state says that it no longer is."""
        machine, request = sample.machine, sample.request
        sample.settle(self._ledger)
        if machine.images is not None:
            self._encoders.settle(sample)
        if machine.state not in (RequestState.PREFILL, RequestState.DECODE):
            self._running.pop(machine.attempt, None)
        if not machine.is_over:
            return
        if sample in self._waiting:
            self._waiting.remove(sample)
        if not request.is_over:
            return
        # Its last sample is over, and so is the request.
        del self._requests[request.request_id]
        self.records.end(request.record)
        self._served.ended([sample.machine for sample in request.samples])
        if request.deadline is not None:
            request.deadline.cancel()
        if request.is_failed:
            self.num_failed += 1
        else:
            self.num_finished += 1
        if not self._requests:
            self._is_idle.set()

    def _start_others(self, request: LiveRequest) -> None:
        """The first sample has its first token: what it prefilled is cached for the others."""
        others = request.samples[request.num_started :]
        request.num_started = len(request.samples)
        for sample in reversed(others):
            enqueue(sample, self._waiting, is_first=True)

    def _route_waiting(self) -> None:
        """Give routes to waiting samples, the first first, while there are any.

        All want the same phases, so what the first cannot have the second cannot either.
        """
        if self._encoders.is_wanted:
            self._give_encoders()
        while self._waiting and self.num_running < self._max_running:
            sample = self._waiting[0]
            choice = self._routes.choose_for(sample)
            if isinstance(choice, Wait):
                return
            self._waiting.popleft()
            if isinstance(choice, Refuse):
                self._do(sample, sample.machine.no_route(choice.reason))
                continue
            actions = sample.machine.routed(choice, next(self._attempts), self._timers.time())
            if not sample.machine.is_over:
                self._running[sample.machine.attempt] = sample
                sample.charge(self._ledger)
                if not sample.is_counted:
                    sample.is_counted = True
                    self._served.routed(sample.machine, self._encoders.num_new_tiles(sample))
            self._do(sample, actions)

    def _give_encoders(self) -> None:
        """Give encode workers to samples whose pictures are wanted, as far as there are any."""
        now_s = self._timers.time()
        for sample in self._encoders.wanting():
            machine = sample.machine
            choice = self._encoders.choose(self.view, sample, now_s)
            if isinstance(choice, Wait):
                if self._look_again is None and self._encoders.is_anyone_full(self.view, now_s):
                    self._look_again = self._timers.call_later(FULL_S, self._look_at_full_encoders)
                return
            if isinstance(choice, Refuse):
                self._do(sample, machine.no_route(choice.reason))
                continue
            shards = [(next(self._attempts), shard) for shard in choice]
            actions = machine.encoders_chosen(shards, now_s)
            self._encoders.given(sample, now_s)
            self._do(sample, actions)

    def _look_at_full_encoders(self) -> None:
        self._look_again = None
        self._route_waiting()
