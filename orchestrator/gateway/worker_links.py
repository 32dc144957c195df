"""The links to all workers of the view: one for each READY incarnation at its address."""

import asyncio
import logging
from functools import partial
from typing import NamedTuple

from orchestrator.control.view import ClusterView, LifecycleState, WorkerView
from orchestrator.gateway.links import Link, LinkListener
from orchestrator.gateway.worker_link import WorkerLink
from workers.api import Command, WorkerId

logger = logging.getLogger(__name__)


class LinkKey(NamedTuple):
    """What one link leads to."""

    worker_id: WorkerId
    incarnation: int
    address: str

    @classmethod
    def of(cls, worker: WorkerView) -> "LinkKey":
        """The link that leads to this worker."""
        return cls(worker.worker_id, worker.incarnation, worker.address)


class WorkerLinks:
    """Opens and closes links as views come. Its tasks are the links', one for each worker. Implements links.Links."""

    def __init__(self, listener: LinkListener) -> None:
        self._listener = listener
        self._links: dict[LinkKey, WorkerLink] = {}
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}

    def use(self, view: ClusterView) -> list[tuple[WorkerView, str]]:
        """Have links to the workers of this view; returns those whose links it closed, and why."""
        wanted = {
            LinkKey.of(worker): worker
            for worker in view.workers
            if worker.state is LifecycleState.READY and worker.address
        }
        gone = [(key, _why_gone(key, view)) for key in self._links if key not in wanted]
        lost = [(self._links[key].worker, reason) for key, reason in gone]
        for key, reason in gone:
            self._close(key, reason)
        for key, worker in wanted.items():
            if key not in self._links:
                link = WorkerLink(worker, self._listener)
                self._links[key] = link
                self._tasks[link] = task = asyncio.create_task(link.run())
                task.add_done_callback(partial(self._ended, link))
        return lost

    def has(self, link: Link) -> bool:
        """It has not been closed."""
        return self._links.get(LinkKey.of(link.worker)) is link

    def open_links(self) -> list[WorkerLink]:
        """Those that commands can be sent by."""
        return [link for link in self._links.values() if link.is_open]

    def is_open(self, worker: WorkerView) -> bool:
        """Commands can be sent to that incarnation."""
        link = self._links.get(LinkKey.of(worker))
        return link is not None and link.is_open

    def unsent_bytes(self, worker: WorkerView) -> int:
        """Of pictures that are queued for that incarnation."""
        link = self._links.get(LinkKey.of(worker))
        return link.num_unsent_bytes if link is not None else 0

    def send(self, worker: WorkerView, command: Command) -> None:
        """Give it a command; without a link it is dropped, as the worker has dropped all that came by it."""
        link = self._links.get(LinkKey.of(worker))
        if link is not None:
            link.send(command)

    async def close(self) -> None:
        """End all. Commands that are queued, Aborts, need no way out: a worker drops what came by an ended stream."""
        for key in list(self._links):
            self._close(key, "the gateway stopped")
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _close(self, key: LinkKey, reason: str) -> None:
        self._tasks[self._links.pop(key)].cancel()
        logger.info(
            "link_closed worker_id=%s incarnation=%d reason=%s", key.worker_id, key.incarnation, reason
        )

    def _ended(self, link: WorkerLink, _task: asyncio.Task[None]) -> None:
        del self._tasks[link]


def _why_gone(key: LinkKey, view: ClusterView) -> str:
    worker = view.worker(key.worker_id)
    if worker is None:
        return "it is no longer declared"
    if worker.incarnation != key.incarnation:
        return f"incarnation {worker.incarnation} took its place"
    if worker.state is not LifecycleState.READY:
        return f"it is {worker.state}" + (f": {worker.reason}" if worker.reason else "")
    return f"its address is {worker.address} now"
