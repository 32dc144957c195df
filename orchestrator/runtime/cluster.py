"""Workers as Ray actors. Every call to Ray that the controller makes is in this file."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import ray

# isort: on
from ray.autoscaler.sdk import request_resources
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util import list_named_actors

from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.control.observation import ProcessReport
from workers.actor import WorkerActor
from workers.api import WorkerId
from workers.launch_environment import LAUNCH_ENVIRONMENT

#: Ray namespace of all actors of Phasewise.
NAMESPACE = "phasewise"
LOOPBACK = "127.0.0.1"

Result = TypeVar("Result")


@dataclass(slots=True)
class _Process:
    """One actor, and the two answers that it owes: where it listens, and why it ended."""

    actor: Any
    address_ref: Any
    wait_ref: Any
    address: str = ""
    exit_reason: str | None = None


class RayCluster:
    """The worker processes of one deployment, whoever started them.

    Actors are named DEPLOYMENT/worker/WORKER_ID/INCARNATION and detached: they outlive the controller, and
    the next one finds them by name. binds_to_node: workers are reached from other nodes.
    """

    def __init__(self, deployment: str, *, binds_to_node: bool) -> None:
        self._prefix = f"{deployment}/worker/"
        self._binds_to_node = binds_to_node
        self._processes: dict[tuple[WorkerId, int], _Process] = {}
        # One, so that a call that outlives its timeout does not meet the next in the middle.
        self._ray_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")

    async def list_processes(self) -> list[ProcessReport]:
        """All that were started and have not been stopped, the dead ones with the reason."""
        return await self._in_ray_thread(self._list)

    async def start(self, worker: DeclaredWorker, incarnation: int) -> None:
        """Ask Ray for a process; returns before it runs. A second call for the same one changes nothing."""
        await self._in_ray_thread(self._start, worker, incarnation)

    async def stop(self, worker_id: WorkerId, incarnation: int, reason: str) -> None:
        """End the process at once, whatever it is doing."""
        del reason  # the controller has logged it
        await self._in_ray_thread(self._stop, worker_id, incarnation)

    async def request_resources(self, workers: Sequence[WorkerResources]) -> None:
        """Tell Ray's autoscaler what is to fit, in place of what anybody told it before, for as long as the cluster lives."""
        await self._in_ray_thread(_request_resources, workers)

    async def _in_ray_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Ray's calls block."""
        return await asyncio.get_running_loop().run_in_executor(self._ray_thread, call, *arguments)

    def _list(self) -> list[ProcessReport]:
        for name in list_named_actors():
            if name.startswith(self._prefix):
                self._adopt(name)
        for process in self._processes.values():
            if process.exit_reason is None:
                _refresh(process)
        return [
            ProcessReport(
                worker_id=worker_id,
                incarnation=incarnation,
                address=process.address,
                exit_reason=process.exit_reason,
                detail="" if process.address else "waits for Ray to place and start it",
            )
            for (worker_id, incarnation), process in sorted(self._processes.items())
        ]

    def _adopt(self, name: str) -> None:
        worker_id, _, incarnation = name.removeprefix(self._prefix).rpartition("/")
        key = (WorkerId(worker_id), int(incarnation))
        if key in self._processes:
            return
        try:
            actor = ray.get_actor(name)
        except ValueError:
            # It went while we looked.
            return
        self._remember(key, actor)

    def _start(self, worker: DeclaredWorker, incarnation: int) -> None:
        spec = worker.spec(incarnation, LOOPBACK)
        actor = (
            ray.remote(WorkerActor)
            .options(
                name=f"{self._prefix}{worker.worker_id}/{incarnation}",
                get_if_exists=True,
                lifetime="detached",
                max_restarts=0,
                num_cpus=worker.resources.num_cpus,
                num_gpus=worker.resources.num_gpus,
                memory=worker.resources.memory_bytes,
                runtime_env={
                    "env_vars": {**LAUNCH_ENVIRONMENT, "OMP_NUM_THREADS": str(spec.engine.num_threads)}
                },
            )
            .remote(spec, binds_to_node=self._binds_to_node)
        )
        # An earlier process of this worker that has ended is history now.
        self._processes = {
            key: process
            for key, process in self._processes.items()
            if key[0] != worker.worker_id or process.exit_reason is None
        }
        self._remember((worker.worker_id, incarnation), actor)

    def _remember(self, key: tuple[WorkerId, int], actor: Any) -> None:
        self._processes[key] = _Process(actor, actor.address.remote(), actor.wait.remote())

    def _stop(self, worker_id: WorkerId, incarnation: int) -> None:
        process = self._processes.pop((worker_id, incarnation), None)
        if process is not None:
            ray.kill(process.actor)


def _request_resources(workers: Sequence[WorkerResources]) -> None:
    request_resources(bundles=[bundle_of(worker) for worker in workers])


def forget_resources() -> None:
    """Nothing is to fit any more, whoever asked for it; other deployments tell again soon what they need."""
    request_resources(bundles=[])


def bundle_of(worker: WorkerResources) -> dict[str, float]:
    """What Ray reserves for it, in Ray's words."""
    bundle: dict[str, float] = {"CPU": worker.num_cpus}
    if worker.num_gpus:
        bundle["GPU"] = worker.num_gpus
    if worker.memory_bytes is not None:
        bundle["memory"] = worker.memory_bytes
    return bundle


def _refresh(process: _Process) -> None:
    """Take the answers that have come."""
    if not process.address and _has_come(process.address_ref):
        try:
            process.address = ray.get(process.address_ref)
        except ActorUnavailableError:
            process.address_ref = process.actor.address.remote()
        except RayActorError as error:
            process.exit_reason = f"its process died: {_last_line(error)}"
        except RayTaskError as error:
            process.exit_reason = f"it could not listen: {error.cause}"
            ray.kill(process.actor)
    if process.exit_reason is None and _has_come(process.wait_ref):
        try:
            process.exit_reason = ray.get(process.wait_ref)
            ray.kill(process.actor)
        except ActorUnavailableError:
            process.wait_ref = process.actor.wait.remote()
        except RayActorError as error:
            process.exit_reason = f"its process died: {_last_line(error)}"


def _has_come(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _last_line(error: Exception) -> str:
    """The part of Ray's message that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
