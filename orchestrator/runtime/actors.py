"""The gateway and the controller as Ray actors: thin, and started again by Ray when they die."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable
from typing import Any

# isort: off
import orchestrator.runtime.ray_token  # noqa: F401 - must come before ray
import ray

# isort: on
from orchestrator.control.controller import ControllerConfig
from orchestrator.gateway.config import GatewayConfig
from orchestrator.gateway.server import serve
from orchestrator.manifest.declare import extra_workers, scaling_of, slo_of, switch_mode_of, worker_specs
from orchestrator.manifest.models import Deployment
from orchestrator.runtime.cluster import RayCluster
from orchestrator.runtime.control_loop import ControlLoop
from orchestrator.runtime.view_publisher import GatewayPublisher
from orchestrator.runtime.worker_probe import WorkerProbe
from workers.actor import LOG_FORMAT, ServiceThread

#: Between a service that ended and the next start of its process, in seconds.
RESTART_PAUSE_S = 1.0


class GatewayActor:
    """Hosts the gateway."""

    def __init__(self, config: GatewayConfig) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        _keep_what_is_loaded()

        async def start(on_bound: Callable[[tuple[str, str]], None], stop: asyncio.Event) -> None:
            await serve(config, on_bound=lambda *addresses: on_bound(addresses), stop=stop)

        self._service: ServiceThread[tuple[str, str]] = ServiceThread(start)
        _end_with(self._service, is_first_start=_is_first_start())

    async def addresses(self) -> tuple[str, str]:
        """host:port for clients and for the controller; waits until both are bound."""
        return await asyncio.wrap_future(self._service.bound)


class ControllerActor:
    """Hosts the controller of one deployment. control_address: of the gateway that it tells."""

    def __init__(self, deployment: Deployment, control_address: str) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        _keep_what_is_loaded()

        async def start(on_bound: Callable[[int], None], stop: asyncio.Event) -> None:
            on_bound(os.getpid())
            await _control(deployment, control_address, stop, used_up=used_up)

        is_first_start = _is_first_start()
        # The one before us may have died with the gateway, the only one who knows what was used.
        used_up = 0 if is_first_start else int(time.time())
        self._service: ServiceThread[int] = ServiceThread(start)
        _end_with(self._service, is_first_start=is_first_start)

    async def pid(self) -> int:
        """Of this process; waits until the loop has begun."""
        return await asyncio.wrap_future(self._service.bound)


def _keep_what_is_loaded() -> None:
    """Collections of garbage look past what is here now, and stop the process for a part of the time."""
    gc.collect()
    gc.freeze()


def _is_first_start() -> bool:
    return not ray.get_runtime_context().was_current_actor_reconstructed


def _end_with(service: ServiceThread[Any], *, is_first_start: bool) -> None:
    """Have this process end when its service does, so that Ray starts the actor again: nobody else looks after it.

    A first start that fails is left to whoever asked for it, who hears why when asking for what was bound.
    """

    def ended(_reason: object) -> None:
        if is_first_start and service.bound.exception() is not None:
            return
        # A port that is taken now may be free in a moment.
        time.sleep(RESTART_PAUSE_S)
        os._exit(1)

    service.ended.add_done_callback(ended)


async def _control(
    deployment: Deployment, control_address: str, stop: asyncio.Event, *, used_up: int
) -> None:
    spec = deployment.spec
    tick_s = spec.controller.tick_ms / 1000
    # Half a tick for the answers leaves the other half for what follows from them.
    probe, publisher = WorkerProbe(timeout_s=tick_s / 2), GatewayPublisher(control_address)
    loop = ControlLoop(
        RayCluster(deployment.metadata.name, binds_to_node=spec.network.bind == "node"),
        probe,
        publisher,
        ControllerConfig(
            deployment=deployment.metadata.name,
            model=spec.model.served_name,
            declared=tuple(worker_specs(deployment)),
            heartbeat_timeout_s=spec.controller.heartbeat_timeout_ms / 1000,
            controller_pid=os.getpid(),
            used_up=used_up,
            slo=slo_of(deployment),
            switch_mode=switch_mode_of(deployment),
            extra=tuple(extra_workers(deployment)),
            scaling=scaling_of(deployment),
        ),
        tick_s=tick_s,
        clock=time.monotonic,
        sleep=asyncio.sleep,
        stop=stop,
    )
    try:
        await loop.run()
    finally:
        await probe.close()
        await publisher.close()
