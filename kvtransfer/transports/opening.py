"""The best way to read another worker's pool, and the pools that are open. Used in one thread."""

import logging
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
    pool: MappedPool
    num_users: int = 0


class PoolOpener:
    """Opens each pool once, however many transfers read from it."""

    def __init__(self, max_idle: int = MAX_IDLE_POOLS) -> None:
        self._max_idle = max_idle
        #: The one whose last use began longest ago is first.
        self._open: OrderedDict[PoolOffer, _Open] = OrderedDict()

    def open(self, offers: Sequence[PoolOffer]) -> tuple[str, MappedPool | None, str]:
        """The best of the offers that works: its transport, the pool, and why no better one.

        ("grpc", None, why) when none does. A pool that was returned is given back to `release` once.
        """
        notes: list[str] = []
        ranked = sorted(offers, key=lambda offer: _rank(offer.transport))
        for offer in ranked:
            try:
                opened = self._open.get(offer) or _Open(_open_pool(offer))
            except PoolUnreachable as error:
                notes.append(f"{offer.transport}: {error.reason}")
                continue
            opened.num_users += 1
            if offer not in self._open:
                logger.info("pool_opened transport=%s not_used=%s", offer.transport, "; ".join(notes) or "-")
            self._open[offer] = opened
            self._open.move_to_end(offer)
            return offer.transport, opened.pool, "; ".join(notes)
        return "grpc", None, "; ".join(notes)

    def release(self, pool: MappedPool) -> None:
        """A transfer does not read from it any more."""
        opened = next(opened for opened in self._open.values() if opened.pool is pool)
        assert opened.num_users > 0
        opened.num_users -= 1
        self.close_gone()
        idle = [offer for offer, opened in self._open.items() if not opened.num_users]
        for offer in idle[: max(0, len(idle) - self._max_idle)]:
            self._close(offer, "idle")

    def close_gone(self) -> None:
        """Close idle pools whose owners gave them up. To be called now and then: they take memory for nothing."""
        for offer, opened in list(self._open.items()):
            is_gone = _IS_OWNER_GONE.get(offer.transport)
            if not opened.num_users and is_gone is not None and is_gone(offer.descriptor):
                self._close(offer, "owner_gone")

    def close(self) -> None:
        """Close all, used or not."""
        for offer in list(self._open):
            self._close(offer, "end")

    @property
    def num_open(self) -> int:
        """Pools that are open."""
        return len(self._open)

    def _close(self, offer: PoolOffer, reason: str) -> None:
        self._open.pop(offer).pool.close()
        logger.info("pool_closed transport=%s reason=%s", offer.transport, reason)


def _rank(transport: str) -> int:
    return TRANSPORTS.index(transport) if transport in TRANSPORTS else len(TRANSPORTS)


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
