"""Ray keeps the same promises, with real workers that load a tiny model."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from orchestrator.control.declared import DeclaredWorker, WorkerResources
from orchestrator.runtime.cluster import RayCluster, bundle_of, forget_resources
from orchestrator.runtime.control_loop import Cluster
from protos import worker_pb2, worker_pb2_grpc
from tests.contract.cluster_contract import ClusterContract, ClusterHarness
from tests.support.local_ray import local_ray, requested_resources
from tests.support.tiny_model import write_tiny_gguf
from workers.api import EngineConfig, KvTransferConfig, Phase, WorkerId

pytestmark = pytest.mark.integration


class RayHarness:
    """Actors of a local Ray cluster."""

    deadline_s = 60.0

    def __init__(self, model: Path) -> None:
        self._model = model

    def connect(self) -> Cluster:
        return RayCluster("contract", binds_to_node=False)

    def declare(self, worker_id: str) -> DeclaredWorker:
        return DeclaredWorker(
            worker_id=WorkerId(worker_id),
            phases=frozenset({Phase.PREFILL, Phase.DECODE}),
            model_source=str(self._model),
            resources=WorkerResources(num_cpus=0.1),
            engine=EngineConfig(kv_cache_bytes=2**20),
            kv_transfer=KvTransferConfig(),
        )

    async def kill(self, worker_id: WorkerId, incarnation: int) -> None:
        cluster = self.connect()
        address = ""
        while not address:
            # The contract bounds each of its scenarios.
            for report in await cluster.list_processes():
                if report.key == (worker_id, incarnation):
                    address = report.address
        async with grpc.aio.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            status = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
        os.kill(status.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterHarness]:
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with local_ray(folder, num_cpus=2):
            yield RayHarness(write_tiny_gguf(folder / "tiny.gguf"))


class TestRayCluster(ClusterContract):
    """The suite, on Ray."""

    def test_the_last_request_is_what_the_autoscaler_finds(self, harness: ClusterHarness) -> None:
        """There is no autoscaler here: what it would read is read instead."""
        gpu = WorkerResources(num_cpus=2, num_gpus=1, memory_bytes=2**30)
        cluster = harness.connect()
        for workers in ([gpu] * 3, [gpu, WorkerResources(num_cpus=0.5)]):
            asyncio.run(cluster.request_resources(workers))
            assert requested_resources() == [bundle_of(one) for one in workers]
        forget_resources()
        assert requested_resources() == []
