"""Starts a deployment and stops it: Ray if need be, then gateway and controller, then waits for the workers.

The gateway runs on the node on which `launch` is called; the controller starts the workers.
"""

import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import ray

# isort: on
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import interruptible
from orchestrator.errors import AddressInUse, AlreadyRunning, LaunchFailed
from orchestrator.gateway.config import GatewayConfig
from orchestrator.manifest.declare import gateway_config
from orchestrator.manifest.models import Deployment, split_address
from orchestrator.runtime.actors import ControllerActor, GatewayActor
from orchestrator.runtime.cluster import NAMESPACE
from orchestrator.runtime.head import Head, end_process, is_running, start_head
from orchestrator.runtime.local_head import NODE_ADDRESS
from orchestrator.runtime.readiness import Progress, has_gateway, wait_until_ready
from orchestrator.runtime.registry import Registry, RunningDeployment

ACTOR_TIMEOUT_S = 120.0


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
    """Start it and return when it serves. What goes wrong, or Ctrl-C, undoes all of it.

    ray_address: a running cluster, as for `ray.init`; None starts one on this machine. is_bound_to_us: a
    cluster that is started here ends with this process, however that ends.
    Raises AlreadyRunning, AddressInUse and LaunchFailed.
    """
    registry = registry if registry is not None else Registry()
    name = deployment.metadata.name
    earlier = registry.get(name)
    if earlier is not None and is_alive(earlier):
        raise AlreadyRunning(name, earlier.address)
    config = with_fixed_ports(gateway_config(deployment))
    running = RunningDeployment(name, config.address, config.control_address, ray_address or "", None, None)
    head: Head | None = None
    try:
        if ray_address is None:
            progress("starting Ray")
            head = start_head(
                num_cpus=_num_cpus(deployment), is_bound_to_us=is_bound_to_us, log=registry.log_path(name)
            )
            running = replace(
                running,
                ray_address=head.ray_address,
                head_pid=head.process.pid,
                head_created_unix_s=head.created_unix_s,
            )
        registry.save(running)
        _connect(running)
        progress("starting the gateway")
        _start_actors(deployment, config)
        interruptible.run(wait_until_ready(running, progress))
    except BaseException:
        with _undisturbed():
            progress("stopping what was started")
            shut_down(running, registry)
        raise
    finally:
        ray.shutdown()
    return Launched(running, head)


def shut_down(running: RunningDeployment, registry: Registry | None = None) -> None:
    """Stop it at once and forget it. Requests that still run end with UNAVAILABLE."""
    registry = registry if registry is not None else Registry()
    if running.head_pid is not None:
        # Nothing but this deployment runs on that cluster.
        ray.shutdown()
        end_process(running.head_pid, running.head_created_unix_s)
    elif running.ray_address:
        if not ray.is_initialized():
            _connect(running)
        prefix = f"{running.name}/"
        # The controller first, or it would start the workers again: it is the first by name.
        for name in sorted(name for name in list_named_actors() if name.startswith(prefix)):
            _kill(name)
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


def with_fixed_ports(config: GatewayConfig) -> GatewayConfig:
    """The same with a free port for each port 0, so that a gateway that is started again comes back there.

    Raises AddressInUse for a port that is taken.
    """
    return replace(
        config,
        address=_free_address(config.address, "spec.gateway.address"),
        control_address=_free_address(config.control_address, "spec.gateway.controlAddress"),
    )


def _free_address(address: str, manifest_key: str) -> str:
    host, port = split_address(address)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that connections of an earlier gateway that linger do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise AddressInUse(address, manifest_key) from error
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
        ray.init(
            address=running.ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        remedy = "Check the address, and that RAY_AUTH_MODE and the token are those of the cluster"
        raise LaunchFailed(f"no Ray cluster answers at {running.ray_address!r}: {error}", remedy) from error


def _start_actors(deployment: Deployment, config: GatewayConfig) -> None:
    """Gateway here, controller anywhere; both come back by themselves."""
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
        if isinstance(cause, AddressInUse):
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
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits: what happens here takes seconds and must be done."""
    try:
        earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        # Only the main thread has signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
