"""What the dispatcher needs of the ways to workers, and of time. `worker_links` and the event loop have it; so has the simulator."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from orchestrator.control.view import ClusterView, WorkerView
from workers.api import Command, Event, KvEvent, ModelInfo


class Timer(Protocol):
    """Something that is to be called later."""

    def cancel(self) -> None:
        """It is not called; nothing happens when it was."""


class Timers(Protocol):
    """The clock of a gateway, in seconds, as asyncio's loops have it."""

    def time(self) -> float:
        """Now."""

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call this when the clock says so."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call this after so long."""


class Link(Protocol):
    """The way to one incarnation of a worker."""

    @property
    def worker(self) -> WorkerView:
        """Where it leads."""

    @property
    def block_size(self) -> int:
        """Tokens of the blocks that this worker caches KV in, once the link has opened; 0 when it caches none."""


class LinkListener(Protocol):
    """Whom a link tells. Never called from within `send`."""

    async def model_found(self, worker: WorkerView, model: ModelInfo) -> None:
        """The worker has loaded this model; the link opens when this returns. May raise UnusableModel."""

    def link_opened(self, link: Link) -> None:
        """Commands can be sent."""

    def link_broke(self, link: Link, reason: str) -> None:
        """It could not be opened, or the worker drops all that came by it; it is being opened anew."""

    def events_came(self, link: Link, events: Sequence[Event], came_at_s: float | None = None) -> None:
        """In the order in which the worker sent them. came_at_s: the last of them, if that was before now."""

    def cache_changed(self, link: Link, events: Sequence[KvEvent]) -> None:
        """Likewise, once it was asked to tell of its cache."""


class Links(Protocol):
    """The ways to all workers of the view."""

    def use(self, view: ClusterView) -> list[tuple[WorkerView, str]]:
        """Have links to the workers of this view; returns those whose links it closed, and why."""

    def has(self, link: Link) -> bool:
        """It has not been closed."""

    def is_open(self, worker: WorkerView) -> bool:
        """Commands can be sent to that incarnation."""

    def unsent_bytes(self, worker: WorkerView) -> int:
        """Of pictures that are queued for that incarnation."""

    def send(self, worker: WorkerView, command: Command) -> None:
        """Give it a command; without a link it is dropped, as the worker has dropped all that came by it."""

    async def close(self) -> None:
        """End all."""
