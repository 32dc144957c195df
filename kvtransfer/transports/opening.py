"""The best way to read another worker's pool, and the pools that are open.

Used in the loop. A pool is opened in a thread: to map gigabytes, or to hear from another process, may take long.
"""

import asyncio
import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from kvtransfer.errors import PoolUnreachable
from kvtransfer.pool import MappedPool, PoolOffer
from kvtransfer.transports import in_process, nixl, shm

logger = logging.getLogger(__name__)

#: The best first.
TRANSPORTS = ("in_process", "cuda_ipc", "shm", "nixl")
#: Pools that stay open while no transfer uses them. A pool of a host keeps its memory as long as it is mapped, also
#: when its owner has ended: `close_gone`.
MAX_IDLE_POOLS = 16
#: How long a transfer waits for a pool to be opened, in seconds. Then it takes a worse way.
OPEN_S = 5.0
#: Idle pools whose owners are gone are looked for so often, in seconds. The next process in the place of an owner takes its KV cache some
#: seconds after the other's end, of what is free by then.
LOOK_S = 1.0


def _is_cuda_owner_gone(descriptor: bytes) -> bool:
    # Loaded already: a pool of it is open.
    gone: bool = import_module("kvtransfer.transports.cuda_ipc").is_owner_gone(descriptor)
    return gone


#: How to see that the owner of a pool gave it up. Others find out when they read.
_IS_OWNER_GONE: dict[str, Callable[[bytes], bool]] = {
    in_process.TRANSPORT: in_process.is_owner_gone,
    shm.TRANSPORT: shm.is_owner_gone,
    nixl.TRANSPORT: nixl.is_owner_gone,
    "cuda_ipc": _is_cuda_owner_gone,
}


@dataclass(slots=True, eq=False)
class _Open:
    """A pool that is open, or being opened: by a thread, which may hang."""

    pool: "asyncio.Future[MappedPool]"
    began_s: float
    #: With those that wait for it.
    num_users: int = 0

    @property
    def mapped(self) -> MappedPool | None:
        """The pool, once it is open."""
        return self.pool.result() if self.pool.done() and self.pool.exception() is None else None

    @property
    def is_idle(self) -> bool:
        """It is open, and nobody reads from it."""
        return self.mapped is not None and not self.num_users


class PoolOpener:
    """Opens each pool once, however many transfers read from it.

    open_s: how long a transfer waits for one. look_s: how often pools whose owners are gone are looked for.
    """

    def __init__(
        self, max_idle: int = MAX_IDLE_POOLS, *, open_s: float = OPEN_S, look_s: float = LOOK_S
    ) -> None:
        self._max_idle = max_idle
        self._open_s = open_s
        self._look_s = look_s
        #: The one whose last use began longest ago is first. Bounded by `max_idle` and the transfers that are served.
        self._open: OrderedDict[PoolOffer, _Open] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, offers: Sequence[PoolOffer]) -> tuple[str, MappedPool | None, str]:
        """The best of the offers that works: its transport, the pool, and why no better one.

        ("grpc", None, why) when none does. A pool that was returned is given back to `release` once.
        """
        notes: list[str] = []
        for offer in sorted(offers, key=lambda offer: _rank(offer.transport)):
            try:
                return offer.transport, await self._use(offer), "; ".join(notes)
            except PoolUnreachable as error:
                notes.append(f"{offer.transport}: {error.reason}")
        return "grpc", None, "; ".join(notes)

    async def _use(self, offer: PoolOffer) -> MappedPool:
        """One user more. Raises PoolUnreachable."""
        opened = self._open.get(offer) or self._begin(offer)
        self._open.move_to_end(offer)
        opened.num_users += 1
        try:
            async with asyncio.timeout_at(opened.began_s + self._open_s):
                # Others may wait for it too.
                return await asyncio.shield(opened.pool) if not opened.pool.done() else opened.pool.result()
        except TimeoutError:
            opened.num_users -= 1
            # What comes of it later is kept for the next transfer.
            reason = f"it was not open after {self._open_s:g} s"
            raise PoolUnreachable(offer.transport, reason) from None
        except BaseException:
            opened.num_users -= 1
            raise

    def has_begun(self, offer: PoolOffer) -> bool:
        """It is open, or a thread is still opening it."""
        return offer in self._open

    def _begin(self, offer: PoolOffer) -> _Open:
        loop = asyncio.get_running_loop()
        opened = self._open[offer] = _Open(_in_thread(_open_pool, offer), loop.time())
        # The first that hears of it.
        opened.pool.add_done_callback(lambda _: self._note_opened(offer, opened))
        if self._timer is None:
            self._timer = loop.call_later(self._look_s, self._look)
        return opened

    def _note_opened(self, offer: PoolOffer, opened: _Open) -> None:
        mapped, is_wanted = opened.mapped, self._open.get(offer) is opened
        if mapped is None and is_wanted:
            # Each that waits raises what went wrong; the next transfer tries anew.
            del self._open[offer]
        elif mapped is not None and is_wanted:
            logger.info("pool_opened transport=%s", offer.transport)
        elif mapped is not None:
            mapped.close()

    def release(self, pool: MappedPool) -> None:
        """A transfer does not read from it any more."""
        opened = next(one for one in self._open.values() if one.mapped is pool)
        assert opened.num_users > 0
        opened.num_users -= 1
        self.close_gone()
        idle = [offer for offer, opened in self._open.items() if opened.is_idle]
        for offer in idle[: max(0, len(idle) - self._max_idle)]:
            self._close(offer, "idle")

    def close_gone(self) -> None:
        """Close idle pools whose owners gave them up: they take memory for nothing."""
        for offer, opened in list(self._open.items()):
            is_gone = _IS_OWNER_GONE.get(offer.transport)
            if opened.is_idle and is_gone is not None and is_gone(offer.descriptor):
                self._close(offer, "owner_gone")

    def close(self) -> None:
        """Close all, used or not."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for offer in list(self._open):
            self._close(offer, "end")

    @property
    def num_open(self) -> int:
        """Pools that are open."""
        return sum(one.mapped is not None for one in self._open.values())

    def _look(self) -> None:
        """Now and then, while any is open."""
        self.close_gone()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._look_s, self._look) if self._open else None

    def _close(self, offer: PoolOffer, reason: str) -> None:
        mapped = self._open.pop(offer).mapped
        # One that is still being opened is closed when it is.
        if mapped is not None:
            mapped.close()
            logger.info("pool_closed transport=%s reason=%s", offer.transport, reason)


def _in_thread(call: Callable[[PoolOffer], MappedPool], offer: PoolOffer) -> "asyncio.Future[MappedPool]":
    """What the call returns. Not in a pool of threads: one that hangs would keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[MappedPool] = loop.create_future()
    if offer.transport == "cuda_ipc":
        call = _on_this_gpu(call)

    def run() -> None:
        try:
            pool = call(offer)
        except Exception as error:  # noqa: BLE001 - whoever waits for the future raises it
            tell(future.set_exception, error)
        else:
            tell(future.set_result, pool)

    def tell(act: Callable[..., None], what: object) -> None:
        # The loop may have ended meanwhile, and with it all that waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(act, what)

    threading.Thread(target=run, name=f"open-{offer.transport}", daemon=True).start()
    return future


def _rank(transport: str) -> int:
    return TRANSPORTS.index(transport) if transport in TRANSPORTS else len(TRANSPORTS)


def _on_this_gpu(call: Callable[[PoolOffer], MappedPool]) -> Callable[[PoolOffer], MappedPool]:
    """A thread begins on the first GPU; that of the loop may be another."""
    # Late: only who offers its pool so has it loaded for sure.
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return call
    device_index = torch.cuda.current_device()

    def call_there(offer: PoolOffer) -> MappedPool:
        with torch.cuda.device(device_index):
            return call(offer)

    return call_there


def _open_pool(offer: PoolOffer) -> MappedPool:
    """Raises PoolUnreachable."""
    if offer.transport == in_process.TRANSPORT:
        return in_process.open_pool(offer.descriptor)
    if offer.transport == shm.TRANSPORT:
        return shm.open_pool(offer.descriptor)
    if offer.transport not in TRANSPORTS:
        raise PoolUnreachable(offer.transport, "it is not known here")
    try:
        # Late: these need libraries that most workers do without.
        module = import_module(f"kvtransfer.transports.{offer.transport}")
    except ImportError as error:
        raise PoolUnreachable(offer.transport, f"it cannot be loaded here: {error}") from error
    pool: MappedPool = module.open_pool(offer.descriptor)
    return pool
