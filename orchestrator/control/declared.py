"""A worker as the manifest declares it, before any process of it exists. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.api import Device, EngineConfig, KvTransferConfig, PhaseSet, WorkerId, WorkerSpec
from workers.step_shape import StepCosts


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """What Ray reserves for one worker; `memory_bytes` None reserves no memory."""

    num_cpus: float
    num_gpus: int = 0
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DeclaredWorker:
    """Everything about a worker that does not change when its process is replaced."""

    worker_id: WorkerId
    phases: PhaseSet
    model_source: str
    resources: WorkerResources
    engine: EngineConfig
    kv_transfer: KvTransferConfig
    device: Device = Device.CPU
    #: What its latency model begins with; None: the roofline.
    profile: StepCosts | None = None

    def spec(self, incarnation: int, bind_host: str) -> WorkerSpec:
        """What a process of this worker is started with; it binds a free port of `bind_host`."""
        return WorkerSpec(
            worker_id=self.worker_id,
            incarnation=incarnation,
            phases=self.phases,
            model_source=self.model_source,
            bind_host=bind_host,
            engine=self.engine,
            kv_transfer=self.kv_transfer,
            device=self.device,
            profile=self.profile,
        )


def growth_reserves(workers: Sequence[DeclaredWorker]) -> Mapping[WorkerId, float]:
    """The part of what a sequence may still generate for which each worker's engine keeps room."""
    return {worker.worker_id: worker.engine.growth_reserve for worker in workers}


def token_budgets(workers: Sequence[DeclaredWorker]) -> Mapping[WorkerId, int]:
    """Tokens of one step of each worker's engine."""
    return {worker.worker_id: worker.engine.token_budget for worker in workers}
