"""A deployment that grows and shrinks on a Ray cluster with a real autoscaler: nodes come for workers and go after them."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from orchestrator.control.view import LifecycleState, ScaleState, WorkerView
from orchestrator.control.view_wire import view_from_pb
from orchestrator.runtime.registry import Registry
from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.support.autoscaled_ray import autoscaled_ray, num_asked_for, num_nodes
from tests.support.command import User
from tests.support.waiting import until_in_thread
from workers.api import WorkerId

pytestmark = pytest.mark.integration

#: No worker meets such targets: whatever runs is more than there are workers for.
MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {{name: grows}}
spec:
  model: {{source: "{model}"}}
  workers:
    - {{name: text, phases: [prefill, decode], resources: {{cpus: 1}}, engine: {{kvCacheMiB: 4}}}}
  slo: {{ttftMs: 100, tpotMs: 1}}
  gateway: {{address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}}
  controller:
    tickMs: 100
    heartbeatTimeoutMs: 10000
    roleSwitch: "on"
    autoscale: {{group: text, maxWorkers: 2, holdS: 1, releaseS: 1}}
"""
ADDED = WorkerId("text-1")
NUM_CLIENTS = 4
NUM_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Deployed:
    """One deployment, with clients that ask while `is_asking`."""

    inference: inference_pb2_grpc.InferenceServiceStub
    control: control_pb2_grpc.GatewayControlServiceStub
    is_asking: threading.Event

    def answer(self) -> control_pb2.GetViewResponse:
        return self.control.GetView(control_pb2.GetViewRequest(), timeout=5)

    def worker(self) -> WorkerView | None:
        """The one that is added."""
        return view_from_pb(self.answer().view).worker(ADDED)

    def has_served(self) -> bool:
        """It is ready, and has computed something."""
        worker = self.worker()
        is_ready = worker is not None and worker.state is LifecycleState.READY
        return is_ready and worker.status is not None and worker.status.num_steps > 0

    def ask(self) -> set[tuple[int, ...]]:
        """Requests one after the other; all answers. Raises grpc.RpcError when one fails."""
        request = inference_pb2.GenerateRequest(
            text="to sleep no more",
            sampling=inference_pb2.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        answers: set[tuple[int, ...]] = set()
        while self.is_asking.is_set() or not answers:
            tokens: list[int] = []
            for response in self.inference.Generate(request, timeout=120):
                assert not response.token_ids or response.first_token_index == len(tokens)
                tokens.extend(response.token_ids)
            answers.add(tuple(tokens))
        return answers


@contextmanager
def deployed(user: User, manifest: Path, ray_address: str) -> Iterator[Deployed]:
    up = user.run("up", str(manifest), "--ray-address", ray_address)
    assert up.returncode == 0, up.stderr
    known = Registry(user.state / "phasewise" / "deployments").get("grows")
    assert known is not None
    with (
        grpc.insecure_channel(known.address) as channel,
        grpc.insecure_channel(known.control_address) as control_channel,
    ):
        found = Deployed(
            inference_pb2_grpc.InferenceServiceStub(channel),
            control_pb2_grpc.GatewayControlServiceStub(control_channel),
            threading.Event(),
        )
        try:
            yield found
        finally:
            found.is_asking.clear()
            down = user.run("down", "grows")
    assert down.returncode == 0, down.stderr


def test_a_node_comes_for_a_load_and_goes_after_it_and_no_request_fails(
    tmp_path: Path, model_path: Path, cache_home: Path
) -> None:
    del cache_home
    manifest, user = tmp_path / "grows.yaml", User(tmp_path / "state")
    manifest.write_text(MANIFEST.format(model=model_path))
    with (
        autoscaled_ray(tmp_path, max_nodes=2) as ray_address,
        deployed(user, manifest, ray_address) as running,
        ThreadPoolExecutor(NUM_CLIENTS) as clients,
    ):
        # No worker fits on the head: the declared one has a node already, and needs no other one.
        assert num_nodes(ray_address) == 1
        until_in_thread(lambda: num_asked_for(ray_address) == 0, "nothing is asked for any more")
        running.is_asking.set()
        asking: list[Future[set[tuple[int, ...]]]] = [clients.submit(running.ask) for _ in range(NUM_CLIENTS)]
        until_in_thread(lambda: num_asked_for(ray_address) == 2, "room for two workers is asked for")
        until_in_thread(lambda: num_nodes(ray_address) == 2, "a node has come")
        until_in_thread(running.has_served, "the worker that was added has served")
        until_in_thread(lambda: num_asked_for(ray_address) == 0, "the request is taken back")
        running.is_asking.clear()
        answers = set[tuple[int, ...]]().union(*(one.result(timeout=60) for one in asking))
        assert len(answers) == 1, "the same tokens, whoever computed them"
        until_in_thread(lambda: running.worker() is None, "the worker that was added has gone")
        until_in_thread(lambda: num_nodes(ray_address) == 1, "its node has been given back")
        after = running.answer()
        assert (after.num_failed_requests, after.num_refused_requests) == (0, 0)
        scales = view_from_pb(after.view).scales
        ends = [
            (one.num_before, one.num_wanted, one.state) for one in scales if one.num_wanted != one.num_before
        ]
        # Beside those that wanted more workers than there may be.
        assert ends == [(1, 2, ScaleState.DONE), (2, 1, ScaleState.DONE)]
        assert all(one.digest for one in scales)
