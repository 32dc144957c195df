"""The fake cluster keeps the promises that the tests of the control loop rely on."""

import pytest

from orchestrator.control.declared import DeclaredWorker
from orchestrator.runtime.control_loop import Cluster
from tests.contract.cluster_contract import ClusterContract, ClusterHarness
from tests.support.fake_cluster import FakeCluster, FakeMachines, declare
from workers.api import WorkerId


class FakeHarness:
    """Processes that are none."""

    deadline_s = 5.0

    def __init__(self) -> None:
        self.machines = FakeMachines()

    def connect(self) -> Cluster:
        return FakeCluster(self.machines)

    def declare(self, worker_id: str) -> DeclaredWorker:
        return declare(worker_id)

    async def kill(self, worker_id: WorkerId, incarnation: int) -> None:
        self.machines.crash((worker_id, incarnation))


class TestFakeCluster(ClusterContract):
    """The suite, on the fake."""

    @pytest.fixture
    def harness(self) -> ClusterHarness:
        return FakeHarness()
