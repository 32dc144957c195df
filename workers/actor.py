"""A worker hosted by Ray: the same `serve` as in `main`, in a thread of an actor process.

Nothing heavy is imported before an actor exists: whoever starts actors imports this module.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Generic, TypeVar

from workers.api import WorkerSpec

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
Bound = TypeVar("Bound")


class ServiceThread(Generic[Bound]):
    """An asyncio service in a thread of its own, beside the loop in which an actor's methods run.

    start(on_bound, stop) serves until `stop` is set, and calls on_bound once it listens.
    """

    def __init__(
        self, start: Callable[[Callable[[Bound], None], asyncio.Event], Coroutine[Any, Any, None]]
    ) -> None:
        #: Where it listens, or what ended it before it did.
        self.bound: Future[Bound] = Future()
        #: Why it ended.
        self.ended: Future[str] = Future()
        self._start = start
        threading.Thread(target=self._run, name="service", daemon=True).start()

    def _run(self) -> None:
        reason = "it was stopped"
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            # Told to whoever asks: a thread has no caller that would hear of it.
            logger.exception("service_failed")
            reason = f"it failed: {error}"
            if not self.bound.done():
                self.bound.set_exception(error)
        self.ended.set_result(reason)

    async def _serve(self) -> None:
        # Nobody sets it: an actor's process is ended from outside.
        await self._start(self.bound.set_result, asyncio.Event())


class WorkerActor:
    """The Ray actor. Its methods are for the controller alone; requests go by gRPC.

    binds_to_node: listen on the address by which other nodes reach this one, instead of spec.bind_host.
    """

    def __init__(self, spec: WorkerSpec, *, binds_to_node: bool) -> None:
        from workers.worker import serve  # brings torch

        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        if binds_to_node:
            spec = replace(spec, bind_host=_node_address())
        self._service: ServiceThread[str] = ServiceThread(
            lambda on_bound, stop: serve(spec, on_bound=on_bound, stop=stop)
        )

    async def address(self) -> str:
        """host:port of its gRPC server; waits until it listens."""
        return await asyncio.wrap_future(self._service.bound)

    async def wait(self) -> str:
        """Until it has ended; returns why."""
        return await asyncio.wrap_future(self._service.ended)


def _node_address() -> str:
    """The address under which this node joined the Ray cluster."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return str(next(node["NodeManagerAddress"] for node in nodes if node["NodeID"] == node_id))
