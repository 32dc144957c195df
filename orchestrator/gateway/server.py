"""The gateway process: binds both addresses, serves until it is told to stop."""

import asyncio
import errno
import logging
import random
import socket
from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from orchestrator.errors import AddressInUse, AddressUnusable
from orchestrator.gateway.config import GatewayConfig
from orchestrator.gateway.control_service import ControlService
from orchestrator.gateway.dispatcher import Dispatcher
from orchestrator.gateway.images import LIMITS
from orchestrator.gateway.inference_service import InferenceService, add_inference_service
from orchestrator.gateway.served_model import ServedModel
from orchestrator.gateway.worker_links import WorkerLinks
from protos import inference_pb2
from protos.control_pb2_grpc import add_GatewayControlServiceServicer_to_server

logger = logging.getLogger(__name__)

#: A longer message of a client is refused by gRPC, with RESOURCE_EXHAUSTED: pictures, and some for all else.
MAX_CLIENT_MESSAGE_BYTES = LIMITS.max_total_bytes + 8 * 2**20
#: A view of thousands of workers fits.
MAX_CONTROL_MESSAGE_BYTES = 64 * 2**20
#: How long requests that run may go on when the gateway is stopped, in seconds.
GRACE_S = 5.0
#: How long the last messages may take to leave, in seconds.
LINGER_S = 0.5
INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


async def serve(
    config: GatewayConfig,
    *,
    on_bound: Callable[[str, str], None],
    stop: asyncio.Event,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until `stop` is set, then give running requests `grace_s`.

    on_bound: told both addresses, host:port with the real ports, when they answer.
    Raises AddressInUse or AddressUnusable.
    """
    changed = asyncio.Event()
    served = ServedModel()
    # Attempts of this start of the gateway and of the one before have different numbers.
    random_source = random.SystemRandom()
    dispatcher = Dispatcher(
        asyncio.get_running_loop(),
        WorkerLinks,
        max_waiting_requests=config.max_waiting_requests,
        max_running_requests=config.max_running_requests,
        learn_model=served.learn,
        on_change=changed.set,
        on_view=served.keep,
        first_attempt=random_source.randrange(1, 2**31),
        slo=config.slo,
        tenant_weights=config.tenant_weights,
        admission=config.admission,
        token_budgets=config.token_budgets,
        growth_reserves=config.growth_reserves,
    )
    server = _server(MAX_CLIENT_MESSAGE_BYTES)
    control_server = _server(MAX_CONTROL_MESSAGE_BYTES)
    inference = InferenceService(config, dispatcher, served, lambda: random_source.getrandbits(64))
    add_inference_service(inference, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection(
        (INFERENCE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    add_GatewayControlServiceServicer_to_server(ControlService(config.deployment, dispatcher), control_server)
    try:
        address = _bind(server, config.address, "gateway.address")
        control_address = _bind(control_server, config.control_address, "gateway.controlAddress")
        await _report_health(healthy, dispatcher)
        await server.start()
        await control_server.start()
        logger.info("gateway_serving address=%s control_address=%s", address, control_address)
        on_bound(address, control_address)
        await _watch(healthy, dispatcher, changed, stop)
        logger.info("gateway_stopping num_requests=%d", dispatcher.num_running + dispatcher.num_waiting)
        dispatcher.stop_accepting()
        await healthy.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(grace_s):
                await dispatcher.wait_idle()
        except TimeoutError:
            logger.info(
                "gateway_ends_requests num_requests=%d", dispatcher.num_running + dispatcher.num_waiting
            )
    finally:
        await dispatcher.close()
        await asyncio.gather(server.stop(LINGER_S), control_server.stop(LINGER_S))


def _server(max_message_bytes: int) -> grpc.aio.Server:
    options = (
        # With it a second gateway could share the port, and clients would reach either.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
    )
    return grpc.aio.server(options=options)


def _bind(server: grpc.aio.Server, address: str, manifest_key: str) -> str:
    """Listen at host:port; returns it with the real port. Raises AddressInUse or AddressUnusable."""
    host = address.rpartition(":")[0]
    try:
        return f"{host}:{server.add_insecure_port(address)}"
    except RuntimeError as error:
        # gRPC does not say why; the same attempt by hand does.
        problem = _why_not_bound(address)
        if problem is None or problem.errno == errno.EADDRINUSE:
            raise AddressInUse(address, manifest_key) from error
        raise AddressUnusable(address, manifest_key, problem.strerror or str(problem)) from error


def _why_not_bound(address: str) -> OSError | None:
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
    except OSError as error:
        return error
    return None


async def _watch(
    healthy: health.aio.HealthServicer, dispatcher: Dispatcher, changed: asyncio.Event, stop: asyncio.Event
) -> None:
    """Report health whenever it changes, until `stop` is set."""
    stopped = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            change = asyncio.create_task(changed.wait())
            await asyncio.wait((stopped, change), return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            changed.clear()
            await _report_health(healthy, dispatcher)
    finally:
        stopped.cancel()


async def _report_health(healthy: health.aio.HealthServicer, dispatcher: Dispatcher) -> None:
    statuses = health_pb2.HealthCheckResponse
    status = statuses.SERVING if dispatcher.can_serve else statuses.NOT_SERVING
    for name in ("", INFERENCE_SERVICE):
        await healthy.set(name, status)
