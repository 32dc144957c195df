"""Starts a deployment and stops it: Ray if need be, then gateway and controller, then waits for the workers.

The gateway runs on the node on which `launch` is called; the controller starts the workers.
"""

import errno
import logging
import math
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import ray

# isort: on
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import interruptible
from orchestrator.errors import AddressInUse, AddressUnusable, AlreadyRunning, LaunchFailed
from orchestrator.gateway.config import GatewayConfig
from orchestrator.manifest.declare import gateway_config
from orchestrator.manifest.models import Deployment, split_address
from orchestrator.runtime.actors import ControllerActor, GatewayActor
from orchestrator.runtime.cluster import NAMESPACE, forget_resources
from orchestrator.runtime.head import Head, end_process, is_running, start_head
from orchestrator.runtime.local_head import NODE_ADDRESS
from orchestrator.runtime.readiness import Progress, has_gateway, wait_until_ready
from orchestrator.runtime.registry import Registry, RunningDeployment

ACTOR_TIMEOUT_S = 120.0
#: For a gateway that runs already to say where.
ANSWER_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
#: Below those that Linux gives to connections, which could take one before the gateway does (ip_local_port_range).
OWN_PORTS = range(20_000, 32_768)
NUM_TRIED_PORTS = 20


@dataclass(frozen=True, slots=True)
class Launched:
    """What `launch` started; `head` owns the local Ray cluster and is to be kept as long as that is to live."""

    running: RunningDeployment
    head: Head | None


def launch(
    deployment: Deployment,
    progress: Progress,
    *,
    ray_address: str | None = None,
    is_bound_to_us: bool = False,
    registry: Registry | None = None,
) -> Launched:
    """Start it and return when it serves. What goes wrong, Ctrl-C, or SIGTERM, undoes all of it.

    ray_address: a running cluster, as for `ray.init`; None starts one on this machine. is_bound_to_us: a
    cluster that is started here ends with this process, however that ends.
    Raises AlreadyRunning, AddressInUse, AddressUnusable and LaunchFailed.
    """
    registry = registry if registry is not None else Registry()
    with registry.starting(deployment.metadata.name), _undone_by_sigterm() as heed_sigterm:
        launched = _launch(deployment, progress, registry, ray_address, heed_sigterm)
        if launched.head is not None and not is_bound_to_us:
            launched.head.release()
        return launched


def _launch(
    deployment: Deployment,
    progress: Progress,
    registry: Registry,
    ray_address: str | None,
    on_connected: Callable[[], None],
) -> Launched:
    """on_connected: is called whenever this process has joined a cluster."""
    name = deployment.metadata.name
    earlier = registry.get(name)
    if earlier is not None and is_alive(earlier):
        raise AlreadyRunning(name, earlier.address)
    config = with_fixed_ports(gateway_config(deployment))
    is_autoscaled = deployment.spec.controller.autoscale is not None
    running = RunningDeployment(
        name, config.address, config.control_address, "", None, None, is_autoscaled=is_autoscaled
    )
    head: Head | None = None
    if ray_address is not None:
        progress(f"joining the Ray cluster at {ray_address}")
        running = _join(replace(running, ray_address=ray_address), registry)
        on_connected()
    try:
        if ray_address is None:
            progress("starting Ray")
            head = start_head(num_cpus=_num_cpus(deployment), log=registry.log_path(name))
            running = replace(
                running,
                ray_address=head.ray_address,
                head_pid=head.process.pid,
                head_created_unix_s=head.created_unix_s,
            )
        registry.save(running)
        if head is not None:
            _connect(running)
            on_connected()
        progress("starting the gateway")
        _start_actors(deployment, config)
        interruptible.run(wait_until_ready(running, progress, lambda: _is_there(running)))
    except AlreadyRunning:
        # Somebody else was faster, on the same cluster: what runs there is not ours to stop.
        raise
    except BaseException:
        with _undisturbed():
            progress("stopping what was started")
            shut_down(running, registry)
        raise
    finally:
        ray.shutdown()
    return Launched(running, head)


def _join(running: RunningDeployment, registry: Registry) -> RunningDeployment:
    """Connect to a cluster that is not ours; returns it with the cluster's own address.

    Raises LaunchFailed, and AlreadyRunning when something of this name runs there, whoever started it: that is
    then remembered here, so that it can be stopped from here.
    """
    try:
        _connect(running)
        running = replace(running, ray_address=ray.get_runtime_context().gcs_address)
        if not _actor_names(running.name):
            return running
        there = _with_real_addresses(running)
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()
    registry.save(there)
    raise AlreadyRunning(there.name, there.address)


def _with_real_addresses(running: RunningDeployment) -> RunningDeployment:
    """The same with the addresses that its gateway says; unchanged when there is none that speaks."""
    try:
        gateway: Any = ray.get_actor(gateway_actor_name(running.name))
        address, control_address = ray.get(gateway.addresses.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ValueError, RayError):
        return running
    return replace(running, address=address, control_address=control_address)


def shut_down(running: RunningDeployment, registry: Registry | None = None) -> None:
    """Stop it at once and forget it. Requests that still run end with UNAVAILABLE."""
    registry = registry if registry is not None else Registry()
    if running.head_pid is not None:
        # Nothing but this deployment runs on that cluster.
        ray.shutdown()
        end_process(running.head_pid, running.head_created_unix_s)
    elif running.ray_address:
        if not ray.is_initialized():
            try:
                _connect(running)
            except LaunchFailed as error:
                remedy = (
                    f"{error.remedy}. If that cluster is gone for good, delete {registry.path(running.name)}"
                )
                raise LaunchFailed(error.problem, remedy) from error
        # The controller first, or it would start the workers again: it is the first by name.
        for name in _actor_names(running.name):
            _kill(name)
        if running.is_autoscaled:
            forget_resources()
        ray.shutdown()
    registry.remove(running.name)


@contextmanager
def local_deployment(
    deployment: Deployment, shown: Callable[[], AbstractContextManager[Progress]]
) -> Iterator[RunningDeployment]:
    """A deployment on this machine for the length of a `with` block; it cannot outlive this process.

    shown: makes what the progress of starting, and of stopping, is told to.
    """
    with shown() as progress:
        launched = launch(deployment, progress, is_bound_to_us=True)
    try:
        yield launched.running
    finally:
        with _undisturbed(), shown() as progress:
            progress("stopping")
            shut_down(launched.running)
            if launched.head is not None:
                launched.head.close()


def is_alive(running: RunningDeployment) -> bool:
    """Whether there is something to stop, as far as can be told without joining the cluster."""
    if running.head_pid is not None:
        return is_running(running.head_pid, running.head_created_unix_s)
    return interruptible.run(has_gateway(running.control_address))


def _is_there(running: RunningDeployment) -> bool:
    """The same from within the cluster."""
    if running.head_pid is not None:
        return is_running(running.head_pid, running.head_created_unix_s)
    return gateway_actor_name(running.name) in _actor_names(running.name)


def _actor_names(deployment: str) -> list[str]:
    """Of all its actors that live, sorted."""
    return sorted(name for name in list_named_actors() if name.startswith(f"{deployment}/"))


def with_fixed_ports(config: GatewayConfig) -> GatewayConfig:
    """The same with a free port for each port 0, so that a gateway that is started again comes back there.

    Raises AddressInUse for a port that is taken, and AddressUnusable.
    """
    return replace(
        config,
        address=_free_address(config.address, "spec.gateway.address"),
        control_address=_free_address(config.control_address, "spec.gateway.controlAddress"),
    )


def _is_free(host: str, port: int) -> bool:
    with socket.socket(
        socket.AF_INET6 if host.startswith("[") else socket.AF_INET, socket.SOCK_STREAM
    ) as probe:
        try:
            probe.bind((host.strip("[]"), port))
        except OSError:
            return False
    return True


def _free_address(address: str, manifest_key: str) -> str:
    host, port = split_address(address)
    if port == 0:
        port = next((one for one in random.sample(OWN_PORTS, NUM_TRIED_PORTS) if _is_free(host, one)), 0)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that connections of an earlier gateway that linger do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(address, manifest_key) from error
            raise AddressUnusable(address, manifest_key, error.strerror or str(error)) from error
        return f"{host}:{probe.getsockname()[1]}"


def _num_cpus(deployment: Deployment) -> int:
    """What Ray may hand out: the cores of this machine, or more if the manifest declares more."""
    declared = sum(group.replicas * group.resources.cpus for group in deployment.spec.workers)
    return max(os.cpu_count() or 1, math.ceil(declared))


def _connect(running: RunningDeployment) -> None:
    options: dict[str, Any] = {}
    if running.head_pid is not None:
        options["_node_ip_address"] = NODE_ADDRESS
    try:
        _check_reachable(running.ray_address)
        ray.init(
            address=running.ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        remedy = "Check the address, and that RAY_AUTH_MODE and the token are those of the cluster"
        raise LaunchFailed(f"no Ray cluster answers at {running.ray_address!r}: {error}", remedy) from error


def _check_reachable(ray_address: str) -> None:
    """Raises OSError when nothing listens there: Ray itself would go on asking for minutes."""
    host, _, port = ray_address.rpartition(":")
    # Others are names, as `auto`, or of another protocol.
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _start_actors(deployment: Deployment, config: GatewayConfig) -> None:
    """Gateway and controller, both on this node; both come back by themselves."""
    name = deployment.metadata.name
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    common: dict[str, Any] = {
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        "scheduling_strategy": here,
    }
    try:
        gateway: Any = (
            ray.remote(GatewayActor).options(name=gateway_actor_name(name), **common).remote(config)
        )
        ray.get(gateway.addresses.remote(), timeout=ACTOR_TIMEOUT_S)
        controller: Any = (
            ray.remote(ControllerActor)
            .options(name=controller_actor_name(name), **common)
            .remote(deployment, config.control_address)
        )
        ray.get(controller.pid.remote(), timeout=ACTOR_TIMEOUT_S)
    except ValueError as error:
        raise AlreadyRunning(name, config.address) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, AddressInUse | AddressUnusable):
            raise cause from error
        raise LaunchFailed(f"the gateway or the controller failed: {cause}", "See Ray's logs") from error
    except (RayActorError, TimeoutError) as error:
        raise LaunchFailed(
            f"the gateway or the controller did not start: {error}", "See Ray's logs"
        ) from error


def gateway_actor_name(deployment: str) -> str:
    """Name of the gateway's actor."""
    return f"{deployment}/gateway"


def controller_actor_name(deployment: str) -> str:
    """Name of the controller's actor."""
    return f"{deployment}/controller"


def _kill(name: str) -> None:
    try:
        ray.kill(ray.get_actor(name))
    except ValueError:
        # It went by itself.
        return


@contextmanager
def _undone_by_sigterm() -> Iterator[Callable[[], None]]:
    """SIGTERM raises SystemExit, which undoes what was started, unless our caller treats it otherwise.

    Gives what sees to that again: Ray, when it connects, puts a handler in the place of ours that prints C++ stacks, and aborts the
    process where that takes it longer than three seconds.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    is_ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def heed() -> None:
        if is_ours:
            signal.signal(signal.SIGTERM, end)

    heed()
    try:
        yield heed
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: what happens here takes seconds and must be done."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread has signals.
        yield
        return
    earlier = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
