"""Pictures are decoded in a few threads, with bounds on how many wait, what memory they need and how long they take.

First come, first served: a large picture that has to wait for memory lets no smaller one pass, so it is never starved.
Pillow lets other threads run while it decodes, so several pictures are decoded at once.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.errors import DecodePoolBusy, ImageFault, ImageRejected
from workers.images.decode import decode, peak_bytes
from workers.images.header import ImageHeader, read_header
from workers.images.limits import ImageLimits

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
T = TypeVar("T")

#: How long `close` waits for threads.
CLOSE_S = 5.0
STOPPING = "this worker is stopping"


@dataclass(frozen=True, slots=True)
class DecodePoolConfig:
    """Bounds of a pool; all of them 1 or more, the time above 0."""

    num_threads: int = 2
    #: Pictures that wait for a thread or for memory; one more is refused.
    max_waiting: int = 64
    #: By `peak_bytes`, of all pictures that are being decoded. One that needs more is decoded while no other is.
    max_bytes_in_flight: int = 2**30
    #: For waiting, and again for decoding, in seconds.
    timeout_s: float = 30.0

    def validate(self) -> None:
        """Raises ValueError that names the field and its value."""
        for name in ("num_threads", "max_waiting", "max_bytes_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s:g}; allowed: above 0")


@dataclass(eq=False, slots=True)
class _Job:
    """One picture. It is freed by its thread alone once it is started."""

    data: bytes
    header: ImageHeader
    num_bytes: int
    started: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    done: asyncio.Future[Pixels] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class DecodePool:
    """Made, used and closed in one event loop.

    A thread cannot be interrupted. When a picture takes too long, or nobody wants it any more, its caller goes on at once,
    while its thread and its memory stay counted until it ends: a decoder that hangs takes one thread away, and never makes
    more of them. With all threads gone pictures are refused as DecodePoolBusy. Threads do not keep the process from ending.
    """

    def __init__(self, config: DecodePoolConfig, limits: ImageLimits) -> None:
        config.validate()
        limits.validate()
        self._config = config
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._bytes_in_flight = 0
        self._is_closed = False
        # Bounded by the number of threads: a job is put in when one is free.
        self._handed: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"image-decode-{number}", daemon=True)
            for number in range(config.num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Pictures that have no thread yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Threads that decode."""
        return len(self._running)

    @property
    def bytes_in_flight(self) -> int:
        """What the pictures that are being decoded may need."""
        return self._bytes_in_flight

    async def decode(self, data: bytes, media_type: str) -> Pixels:
        """Pixels, [height, width, 3] uint8 RGB, upright. media_type: what it was sent as, "" when nothing is said.

        The array is the caller's, and is not counted any more. Raises ImageRejected, DecodePoolBusy.
        """
        header = read_header(data, media_type, self._limits)
        job = _Job(data, header, min(peak_bytes(header), self._config.max_bytes_in_flight))
        self._enter(job)
        try:
            await self._within(job.started)
            return await self._within(job.done)
        except TimeoutError:
            raise self._too_late(job) from None
        finally:
            self._leave(job)

    async def close(self) -> None:
        """Refuse what waits and what comes, and wait for what runs, CLOSE_S at most."""
        self._is_closed = True
        while self._waiting:
            _fail(self._waiting.popleft().started, DecodePoolBusy(STOPPING))
        for _ in self._threads:
            self._handed.put(None)
        give_up_s = self._loop.time() + CLOSE_S
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, give_up_s - self._loop.time()))
        num_left = sum(thread.is_alive() for thread in self._threads)
        if num_left:
            logger.warning("image_decode_threads_left num_threads=%d", num_left)

    def check_invariants(self) -> None:
        """Assert that what is counted is what is there."""
        assert self._bytes_in_flight == sum(job.num_bytes for job in self._running)
        assert self._bytes_in_flight <= self._config.max_bytes_in_flight
        assert len(self._running) <= self._config.num_threads
        assert len(self._waiting) <= self._config.max_waiting
        assert not (self._waiting and self._fits(self._waiting[0]))

    def _enter(self, job: _Job) -> None:
        if self._is_closed:
            raise DecodePoolBusy(STOPPING)
        if (self._waiting or not self._fits(job)) and len(self._waiting) >= self._config.max_waiting:
            raise DecodePoolBusy(f"{len(self._waiting)} pictures wait to be decoded already")
        self._waiting.append(job)
        self._start_waiting()

    async def _within(self, future: asyncio.Future[T]) -> T:
        async with asyncio.timeout(self._config.timeout_s):
            return await future

    def _too_late(self, job: _Job) -> Exception:
        after = f"after {self._config.timeout_s:g} s"
        if not job.started.done() or job.started.cancelled():
            return DecodePoolBusy(f"no thread was free to decode the picture {after}")
        logger.warning("image_decode_slow width=%d height=%d", job.header.width, job.header.height)
        return ImageRejected(
            f"it was not decoded {after}; scale it down, or save it anew", ImageFault.TOO_SLOW
        )

    def _leave(self, job: _Job) -> None:
        """Its caller goes: with its pixels, or because it gave up."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._start_waiting()

    def _fits(self, job: _Job) -> bool:
        return (
            len(self._running) < self._config.num_threads
            and self._bytes_in_flight + job.num_bytes <= self._config.max_bytes_in_flight
        )

    def _start_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            is_given_up = job.started.done()
            if not is_given_up and not self._fits(job):
                return
            self._waiting.popleft()
            if is_given_up:
                continue
            self._running.add(job)
            self._bytes_in_flight += job.num_bytes
            job.started.set_result(None)
            self._handed.put(job)

    def _ended(self, job: _Job, found: Pixels | ImageRejected) -> None:
        self._running.remove(job)
        self._bytes_in_flight -= job.num_bytes
        if not job.done.done():
            if isinstance(found, ImageRejected):
                _fail(job.done, found)
            else:
                job.done.set_result(found)
        self._start_waiting()

    def _work(self) -> None:
        """One thread: decode what is handed over."""
        while (job := self._handed.get()) is not None:
            found: Pixels | ImageRejected
            try:
                found = decode(job.data, job.header)
            except ImageRejected as error:
                found = error
            try:
                self._loop.call_soon_threadsafe(self._ended, job, found)
            except RuntimeError:
                # The loop is closed: nobody waits for this thread any more.
                return
            # While it waits for the next one it must keep neither file nor pixels alive.
            del job, found


def _fail(future: "asyncio.Future[None] | asyncio.Future[Pixels]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Seen here, so that it is not reported as lost when the caller has gone.
        future.exception()
