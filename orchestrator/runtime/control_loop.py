"""Main loop 1, the controller: observe, decide, apply, every tick.

Everything that is decided is decided in `control.controller`. This loop only sees, acts, and lives through
what goes wrong in doing so.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

from orchestrator.control.controller import ControllerConfig, ControllerState, decide, recover
from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.look import Look
from orchestrator.control.observation import GatewayNews, Observation, ProcessKey, ProcessReport
from orchestrator.control.plan import Action, Plan, RequestResources, SetPhases, StartWorker, StopWorker
from orchestrator.control.role_switch import phase_text
from orchestrator.control.view import ClusterView
from orchestrator.errors import ControllerSuperseded, PhasewiseOrchestratorError
from workers.api import PhaseSet, PhasesRefused, WorkerId, WorkerStatus

logger = logging.getLogger(__name__)

#: Longest that one call to the cluster may take, in seconds.
CLUSTER_TIMEOUT_S = 30.0
#: Between two ticks while a worker takes other phases, if that is less than a tick, in seconds.
SWITCH_TICK_S = 0.02
#: Least time for which a view may be on its way to the gateway, in seconds.
MIN_PUBLISH_TIMEOUT_S = 1.0
#: Longest wait after ticks that failed, in seconds.
MAX_BACKOFF_S = 10.0


class Cluster(Protocol):
    """Where the processes of one deployment run. `tests/contract` says what each call promises."""

    async def list_processes(self) -> list[ProcessReport]:
        """All that live, and those that ended by themselves, whoever started them."""
        ...

    async def start(self, worker: DeclaredWorker, incarnation: int) -> None:
        """Ask for a process; returns once asked. A second call for the same one changes nothing."""
        ...

    async def stop(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """End a process, whatever it is doing. One that is not there is no error."""
        ...

    async def request_resources(self, workers: Sequence[WorkerResources]) -> None:
        """Tell the autoscaler that all of these are to fit, in place of what it was told before. Without one nothing comes of it."""
        ...


class StatusProbe(Protocol):
    """Asks workers how they are."""

    async def probe(self, address: str) -> WorkerStatus | None:
        """What the worker at this address says, or None if it says nothing soon: well within a tick."""
        ...

    async def keep_only(self, addresses: frozenset[str]) -> None:
        """Forget all other addresses."""
        ...

    async def set_phases(
        self, address: str, incarnation: int, phases: PhaseSet, phase_epoch: int
    ) -> PhasesRefused | None:
        """Tell the worker at this address what to serve; why it does not, if it says so. Raises WorkerUnreachable."""
        ...


class ViewPublisher(Protocol):
    """The way to the gateway."""

    async def publish(self, view: ClusterView, look: Look | None) -> GatewayNews:
        """Replace the gateway's view; returns what the gateway has to tell. look: what the policy for phases saw.

        Raises GatewayUnreachable or ControllerSuperseded.
        """
        ...

    async def last_view(self) -> ClusterView | None:
        """The view that the gateway has; None when it never got one. Raises GatewayUnreachable."""
        ...


class FailureLog:
    """What goes wrong in a loop: all of it counted, and each kind logged once until it changes."""

    def __init__(self) -> None:
        #: How often each act has failed.
        self.counts: Counter[str] = Counter()
        #: What the act failed with last; without those that succeeded since.
        self.last: dict[str, str] = {}

    def failed(self, act: str, error: Exception) -> None:
        """Count it; log it unless the same was logged before."""
        self.counts[act] += 1
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if self.last.get(act) != text:
            is_expected = isinstance(error, PhasewiseOrchestratorError)
            logger.error(
                "control_failed act=%s count=%d error=%r",
                act,
                self.counts[act],
                text,
                exc_info=None if is_expected else error,
            )
        self.last[act] = text

    def succeeded(self, act: str) -> None:
        """It works; log that if it did not before."""
        if self.last.pop(act, None) is not None:
            logger.info("control_works_again act=%s count=%d", act, self.counts[act])


class ControlLoop:
    """Keeps the workers of one deployment as declared.

    clock: monotonic seconds. sleep: as `asyncio.sleep`. stop: ends `run`; the workers go on.
    The caller closes probe and publisher after `run`.
    """

    def __init__(
        self,
        cluster: Cluster,
        probe: StatusProbe,
        publisher: ViewPublisher,
        config: ControllerConfig,
        *,
        tick_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        stop: asyncio.Event,
    ) -> None:
        self.failures = FailureLog()
        #: None until the first look that succeeded.
        self.state: ControllerState | None = None
        self._cluster = cluster
        self._probe = probe
        self._publisher = publisher
        self._config = config
        self._tick_s = tick_s
        self._clock = clock
        self._sleep = sleep
        self._stop = stop
        self._last_view: ClusterView | None = None
        #: Starts that could not even be asked for, until the next `decide` has seen them.
        self._failed_starts: list[ProcessReport] = []
        #: What the next `decide` is to know beside what it looks at.
        self._gateway = GatewayNews()
        self._refusals: dict[ProcessKey, PhasesRefused] = {}

    async def run(self) -> None:
        """Until `stop` is set. Lives through every exception but one, and waits longer after each in a row.

        Raises ControllerSuperseded: the workers are another controller's, whom this one must not disturb.
        """
        num_failed = 0
        while not self._stop.is_set():
            began_s = self._clock()
            try:
                await self.tick()
            except ControllerSuperseded:
                raise
            except Exception as error:  # noqa: BLE001 - counted and logged there; the loop must go on
                self.failures.failed("tick", error)
                num_failed += 1
                pause_s = min(MAX_BACKOFF_S, self._tick_s * 2.0 ** min(num_failed, 10))
            else:
                self.failures.succeeded("tick")
                num_failed = 0
                # A tick that took too long is followed by a rest all the same.
                tick_s = min(self._tick_s, SWITCH_TICK_S) if self._is_switching else self._tick_s
                pause_s = max(tick_s / 10, tick_s - (self._clock() - began_s))
            await self._pause(pause_s)

    @property
    def _is_switching(self) -> bool:
        return bool(self._gateway.wanted_switches) or (
            self.state is not None and self.state.switching.is_under_way
        )

    async def tick(self) -> None:
        """Look, decide, act: once."""
        observation = await self._observe()
        now_s = self._clock()
        if self.state is None:
            # Without the gateway's answer we do not know which incarnations and epochs are used up: the
            # tick fails and nothing is touched. Workers and gateway do without a controller meanwhile.
            self._last_view = await self._publisher.last_view()
            self.state = recover(self._last_view, observation.processes, self._config, now_s)
            logger.info(
                "controller_started deployment=%s epoch=%d", self._config.deployment, self.state.epoch
            )
        plan = decide(now_s, observation, self.state, self._config)
        self._failed_starts.clear()
        self._refusals.clear()
        _log_changes(self._last_view, plan.view)
        self._last_view = plan.view
        # The view goes first. It keeps requests off a worker that is about to be stopped, and keeps the
        # new incarnation from being used again should we die in the middle. And it ends us here if another
        # controller has taken over.
        await self._publish(plan)
        async with asyncio.TaskGroup() as group:
            for action in plan.actions:
                group.create_task(self._apply(action))

    async def _observe(self) -> Observation:
        async with asyncio.timeout(CLUSTER_TIMEOUT_S):
            listed = await self._cluster.list_processes()
        address_of = {report.key: report.address for report in listed if report.is_alive and report.address}
        statuses: dict[ProcessKey, WorkerStatus] = {}
        for status in await self._probe_all(frozenset(address_of.values())):
            # An address may have passed to another process since: each speaks for itself alone.
            if (status.worker_id, status.incarnation) in address_of:
                statuses[status.worker_id, status.incarnation] = status
        return Observation((*listed, *self._failed_starts), statuses, self._gateway, dict(self._refusals))

    async def _probe_all(self, addresses: frozenset[str]) -> list[WorkerStatus]:
        """The answers that came, all asked at once. A probe that breaks is one that heard nothing."""

        async def ask(address: str) -> WorkerStatus | None:
            async with asyncio.timeout(self._tick_s):
                return await self._probe.probe(address)

        async with self._tolerate("probe", self._tick_s):
            await self._probe.keep_only(addresses)
        answers = await asyncio.gather(*map(ask, sorted(addresses)), return_exceptions=True)
        broken = [answer for answer in answers if isinstance(answer, Exception)]
        if broken:
            self.failures.failed("probe", broken[0])
        return [answer for answer in answers if isinstance(answer, WorkerStatus)]

    async def _publish(self, plan: Plan) -> None:
        # What was told before stands, but for what has been asked for: that is told again.
        self._gateway = replace(self._gateway, wanted_switches=())
        async with self._tolerate("publish", max(MIN_PUBLISH_TIMEOUT_S, self._tick_s)):
            news = await self._publisher.publish(plan.view, plan.look)
            self._gateway = replace(news, version=plan.view.version)

    async def _apply(self, action: Action) -> None:
        match action:
            case StartWorker():
                await self._start(action)
            case StopWorker():
                await self._end(action)
            case SetPhases():
                await self._set_phases(action)
            case RequestResources():
                await self._request_resources(action)

    async def _start(self, action: StartWorker) -> None:
        worker_id, incarnation = action.declared.worker_id, action.incarnation
        logger.info(
            "worker_start_asked worker_id=%s incarnation=%d reason=%r", worker_id, incarnation, action.reason
        )
        async with self._tolerate("start", CLUSTER_TIMEOUT_S):
            await self._cluster.start(action.declared, incarnation)
            return
        # It failed. The machine hears of it as of a process that has ended.
        reason = f"could not be started: {self.failures.last['start']}"
        self._failed_starts.append(ProcessReport(worker_id, incarnation, exit_reason=reason))

    async def _set_phases(self, action: SetPhases) -> None:
        logger.info(
            "worker_phases_asked worker_id=%s incarnation=%d phase_epoch=%d phases=%s reason=%r",
            action.worker_id,
            action.incarnation,
            action.phase_epoch,
            phase_text(action.phases),
            action.reason,
        )
        # It is told again, and the others must not wait for it.
        async with self._tolerate("set_phases", max(MIN_PUBLISH_TIMEOUT_S, self._tick_s)):
            refused = await self._probe.set_phases(
                action.address, action.incarnation, action.phases, action.phase_epoch
            )
            if refused is not None:
                self._refusals[action.worker_id, action.incarnation] = refused

    async def _request_resources(self, action: RequestResources) -> None:
        logger.info("resources_asked num_workers=%d reason=%r", len(action.workers), action.reason)
        # It is told again, whether or not this succeeds.
        async with self._tolerate("request_resources", CLUSTER_TIMEOUT_S):
            await self._cluster.request_resources(action.workers)

    async def _end(self, action: StopWorker) -> None:
        logger.info(
            "worker_stop_asked worker_id=%s incarnation=%d reason=%r",
            action.worker_id,
            action.incarnation,
            action.reason,
        )
        async with self._tolerate("stop", CLUSTER_TIMEOUT_S):
            await self._cluster.stop(action.worker_id, action.incarnation, action.reason)

    @asynccontextmanager
    async def _tolerate(self, act: str, timeout_s: float) -> AsyncIterator[None]:
        """Count an exception and go on: the rest of the tick does not depend on this act."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except ControllerSuperseded:
            raise
        except Exception as error:  # noqa: BLE001 - counted and logged; reconciling must go on
            self.failures.failed(act, error)
        else:
            self.failures.succeeded(act)

    async def _pause(self, pause_s: float) -> None:
        """Sleep, or less when told to stop."""
        sleeping = asyncio.ensure_future(self._sleep(pause_s))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((sleeping, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            stopping.cancel()
            await asyncio.gather(sleeping, stopping, return_exceptions=True)


def _log_changes(before: ClusterView | None, after: ClusterView) -> None:
    """One line for each worker that is not where it was."""
    for worker in after.workers:
        old = before.worker(worker.worker_id) if before is not None else None
        if old is None or (old.state, old.incarnation) != (worker.state, worker.incarnation):
            logger.info(
                "worker_state_changed worker_id=%s incarnation=%d from=%s to=%s reason=%r",
                worker.worker_id,
                worker.incarnation,
                "none" if old is None else old.state,
                worker.state,
                worker.reason,
            )
    for scale in after.scales:
        old_scale = next((o for o in before.scales if o.scale_id == scale.scale_id), None) if before else None
        if old_scale is None or old_scale.state is not scale.state:
            logger.info(
                "workers_scaled scale_id=%s from=%d to=%d state=%s reason=%r",
                scale.scale_id,
                scale.num_before,
                scale.num_wanted,
                scale.state,
                scale.reason,
            )
    for switch in after.switches:
        old_switch = (
            next((o for o in before.switches if o.switch_id == switch.switch_id), None) if before else None
        )
        if old_switch is None or old_switch.state is not switch.state:
            logger.info(
                "worker_switch_changed worker_id=%s switch_id=%s from=%s to=%s state=%s reason=%r",
                switch.worker_id,
                switch.switch_id,
                phase_text(switch.before),
                phase_text(switch.phases),
                switch.state,
                switch.reason,
            )
