"""A pool of another process of the same host, in shared memory: mapped once, then read at the memory's speed."""

import json
from dataclasses import asdict, fields

from kvtransfer import host_memory, shared_memory
from kvtransfer.errors import PoolUnreachable
from kvtransfer.host_memory import HostMemory
from kvtransfer.layout import DTYPE_BITS, KvLayout
from kvtransfer.pieces import PoolGeometry
from kvtransfer.pool import KvPool, KvSpan
from kvtransfer.shared_memory import MappedMemory, SharedMemory, SharedMemoryDescriptor

TRANSPORT = shared_memory.TRANSPORT
_VERSION = 1


def describe(memory: SharedMemory, offset: int, geometry: PoolGeometry) -> bytes:
    """The descriptor of a pool that lies `offset` bytes into the data of `memory`."""
    about = {
        "version": _VERSION,
        "memory": asdict(memory.descriptor()),
        "offset": offset,
        "num_blocks": geometry.num_blocks,
        "layout": asdict(geometry.layout),
    }
    return json.dumps(about, separators=(",", ":")).encode()


class SharedPool:
    """Another process's pool, mapped. Implements pool.MappedPool."""

    def __init__(self, mapped: MappedMemory, offset: int, geometry: PoolGeometry) -> None:
        self._mapped = mapped
        data = mapped.bytes()[offset : offset + geometry.num_bytes]
        self._memory: HostMemory | None = HostMemory(data, geometry)

    def pull(self, source: KvSpan, target: KvPool, into: KvSpan) -> int:
        """See pool.MappedPool. What is mapped stays readable when its owner has ended.

        Raises ConnectionError after `close`; ValueError when a span is not within its pool or the two differ in shape.
        """
        if self._memory is None:
            raise ConnectionError("the pool is not mapped any more")
        return host_memory.pull(self._memory, source, target, into)

    def close(self) -> None:
        """See pool.MappedPool."""
        self._memory = None
        self._mapped.close()


def open_pool(descriptor: bytes) -> SharedPool:
    """Raises PoolUnreachable with the reason."""
    memory, offset, geometry = _parsed(descriptor)
    mapped = MappedMemory.open(memory)
    return SharedPool(mapped, offset, geometry)


def is_owner_gone(descriptor: bytes) -> bool:
    """Whether the process that offered the pool has ended, or given it up."""
    return shared_memory.is_owner_gone(_parsed(descriptor)[0])


def _parsed(descriptor: bytes) -> tuple[SharedMemoryDescriptor, int, PoolGeometry]:
    try:
        about = json.loads(descriptor)
        if about["version"] != _VERSION:
            raise PoolUnreachable(
                TRANSPORT, f"its descriptor is of version {about['version']}, not {_VERSION}"
            )
        memory = SharedMemoryDescriptor(**about["memory"])
        geometry, offset = PoolGeometry(KvLayout(**about["layout"]), about["num_blocks"]), about["offset"]
        is_whole = _is_right(memory) and _is_right(geometry.layout) and geometry.layout.dtype in DTYPE_BITS
        is_whole = is_whole and 0 <= geometry.layout.heads[0] < geometry.layout.heads[1]
        is_whole = is_whole and type(offset) is type(geometry.num_blocks) is int and offset >= 0
        is_whole = is_whole and 0 < geometry.num_bytes <= memory.num_bytes - offset
    except (ValueError, TypeError, KeyError) as error:
        raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {error!r}") from error
    if not is_whole:
        raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {about}")
    return memory, offset, geometry


def _is_right(about: SharedMemoryDescriptor | KvLayout) -> bool:
    """Whether each field is of its type, and no number negative: it comes from another process."""
    values = asdict(about)
    return all(
        type(values[field.name]) is field.type and (field.type is str or values[field.name] >= 0)
        for field in fields(about)
    )
