"""A pool of the same process: read where it lies."""

import json
import os
import secrets
from weakref import WeakValueDictionary

from kvtransfer import host_memory
from kvtransfer.errors import PoolUnreachable
from kvtransfer.host_memory import InHostMemory
from kvtransfer.pool import KvPool, KvSpan

TRANSPORT = "in_process"
_VERSION = 1
#: A pid may be used again, and a forked child has its parent's: both are needed to name a process.
_START = secrets.token_hex(8)

#: Pools of this process by number, as long as somebody else holds them.
_pools: "WeakValueDictionary[int, InHostMemory]" = WeakValueDictionary()
_last_number = 0


def register(pool: InHostMemory) -> bytes:
    """The descriptor of a pool, which is not kept alive by it."""
    global _last_number
    _last_number += 1
    _pools[_last_number] = pool
    place = {"version": _VERSION, "pid": os.getpid(), "start": _START, "number": _last_number}
    return json.dumps(place).encode()


class InProcessPool:
    """A pool of this process. Implements pool.MappedPool."""

    def __init__(self, number: int) -> None:
        self._number: int | None = number

    def pull(self, source: KvSpan, target: KvPool, into: KvSpan) -> int:
        """See pool.MappedPool. Raises ValueError when a span is not within its pool."""
        pool = None if self._number is None else _pools.get(self._number)
        if pool is None:
            raise ConnectionError("the pool is not there any more")
        return host_memory.pull(pool.host_memory, source, target, into)

    def close(self) -> None:
        """See pool.MappedPool."""
        self._number = None


def open_pool(descriptor: bytes) -> InProcessPool:
    """Raises PoolUnreachable: it is of another process, or gone."""
    number = _number(descriptor)
    if number not in _pools:
        raise PoolUnreachable(TRANSPORT, "the pool is not there any more")
    return InProcessPool(number)


def is_owner_gone(descriptor: bytes) -> bool:
    """Whether a pool that was opened has been given up."""
    return _number(descriptor) not in _pools


def _number(descriptor: bytes) -> int:
    try:
        place = json.loads(descriptor)
        is_here = (place["version"], place["pid"], place["start"]) == (_VERSION, os.getpid(), _START)
        number = int(place["number"])
    except (ValueError, TypeError, KeyError) as error:
        raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {error!r}") from error
    if not is_here:
        raise PoolUnreachable(TRANSPORT, "it is of another process")
    return number
