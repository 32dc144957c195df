"""KV in memory of a host, read by another process or another host through NIXL: UCX, over RDMA where there is any.

The owner registers its pool with the NIXL agent of its process and describes it once. A reader makes itself known to that
agent, and from then on reads without the owner's event loop: by RDMA, by the kernel between two processes of a
host, or, over TCP, served by a thread of the agent. KV arrives in memory of the reader's agent (`nixl_endpoint` says
why), and goes from there into the target, checked in the same pass.
"""

import base64
import json
import logging
import secrets
import threading
from dataclasses import asdict, dataclass, field

import numpy as np

from kvtransfer.errors import PoolUnreachable, TransportUnavailable
from kvtransfer.layout import DTYPE_BITS, KvLayout
from kvtransfer.pieces import PoolGeometry, check_same_shape, check_span, pieces_in
from kvtransfer.pool import KvPool, KvSpan, PoolOffer, span_bytes
from kvtransfer.transports import nixl_endpoint
from kvtransfer.transports.nixl_endpoint import Bytes, NixlEndpoint, address_of, make_agent
from phasewise_kernels.kv_copy.op import crc32c

logger = logging.getLogger(__name__)

TRANSPORT = nixl_endpoint.TRANSPORT
_VERSION = 1
_NONCE_BYTES = 16


class NixlPool:
    """The pool of another process. Implements pool.MappedPool; made by `open_pool`."""

    def __init__(self, endpoint: NixlEndpoint, description: "_Description") -> None:
        self._endpoint: NixlEndpoint | None = endpoint
        self._description = description

    def pull(self, source: KvSpan, target: KvPool, into: KvSpan) -> int:
        """See pool.MappedPool. Waits for at most the endpoint's time-out.

        Raises ConnectionError after `close`, and when its owner does not answer; ValueError when a span is not
        within its pool or the two differ in shape.
        """
        if self._endpoint is None:
            raise ConnectionError("the pool is not open any more")
        geometry = self._description.geometry
        check_span(source, geometry)
        check_same_shape(source, into)
        pieces = pieces_in(source, geometry)
        # What is read is to be used before the next read.
        with _lock:
            staged = np.zeros(0, np.uint8)
            if pieces.lengths.size:
                addresses = pieces.source_offsets + self._description.address
                staged = self._endpoint.read(self._description.agent, addresses, pieces.lengths)
            assert staged.size == span_bytes(source, geometry.layout)
            return target.write(into, staged.data, geometry.layout.dtype)

    def close(self) -> None:
        """See pool.MappedPool."""
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            with _lock:
                endpoint.let_go(self._description.agent)


@dataclass(frozen=True, slots=True)
class _Description:
    """What another process needs. Addresses are those of the owner's process."""

    agent: str
    metadata: bytes = field(repr=False)
    address: int
    geometry: PoolGeometry
    #: Where random bytes lie, and which: the proof that this is the process that is meant.
    nonce_address: int
    nonce: bytes

    def packed(self) -> bytes:
        about = {
            "version": _VERSION,
            "agent": self.agent,
            "metadata": base64.b64encode(self.metadata).decode(),
            "crc": crc32c(np.frombuffer(self.metadata, np.uint8)),
            "address": self.address,
            "num_blocks": self.geometry.num_blocks,
            "layout": asdict(self.geometry.layout),
            "nonce_address": self.nonce_address,
            "nonce": self.nonce.hex(),
        }
        return json.dumps(about, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, packed: bytes) -> "_Description":
        """Raises PoolUnreachable."""
        try:
            about = json.loads(packed)
            if about["version"] != _VERSION:
                raise PoolUnreachable(
                    TRANSPORT, f"its descriptor is of version {about['version']}, not {_VERSION}"
                )
            metadata = base64.b64decode(about["metadata"], validate=True)
            is_whole = crc32c(np.frombuffer(metadata, np.uint8)) == about["crc"]
            description = cls(
                agent=str(about["agent"]),
                metadata=metadata,
                address=int(about["address"]),
                geometry=PoolGeometry(KvLayout(**about["layout"]), int(about["num_blocks"])),
                nonce_address=int(about["nonce_address"]),
                nonce=bytes.fromhex(about["nonce"]),
            )
            geometry = description.geometry
            is_whole = is_whole and geometry.layout.dtype in DTYPE_BITS and geometry.num_bytes > 0
            is_whole = is_whole and len(description.nonce) == _NONCE_BYTES
            is_whole = is_whole and min(description.address, description.nonce_address) > 0
        except (ValueError, TypeError, KeyError) as error:
            raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {error!r}") from error
        if not is_whole:
            raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {description}")
        return description


#: Of this process; made when the first pool is offered or opened.
_endpoint: NixlEndpoint | None = None
#: Of all that uses it: the loop reads while a thread opens another pool.
_lock = threading.RLock()


def offer(memory: Bytes, geometry: PoolGeometry) -> PoolOffer:
    """How others may read a pool of this process. memory: [geometry.num_bytes], kept until the process ends.

    Takes a second when it is the first, and a core from then on. Raises TransportUnavailable with the reason.
    """
    nonce = np.frombuffer(secrets.token_bytes(_NONCE_BYTES), np.uint8).copy()
    with _lock:
        endpoint = this_endpoint()
        metadata = endpoint.share((memory, nonce))
    place = (address_of(memory), geometry, address_of(nonce), nonce.tobytes())
    logger.info("nixl_pool_offered agent=%s bytes=%d", endpoint.name, memory.size)
    return PoolOffer(TRANSPORT, _Description(endpoint.name, metadata, *place).packed())


def open_pool(descriptor: bytes) -> NixlPool:
    """Raises PoolUnreachable with the reason: its agent does not answer, or another one does."""
    about = _Description.parse(descriptor)
    with _lock:
        return _open(about)


def _open(about: _Description) -> NixlPool:
    try:
        endpoint = this_endpoint()
    except TransportUnavailable as error:
        raise PoolUnreachable(TRANSPORT, f"here {error.reason}") from error
    endpoint.connect(about.agent, about.metadata)
    pool = NixlPool(endpoint, about)
    try:
        found = endpoint.read(about.agent, np.array([about.nonce_address]), np.array([len(about.nonce)]))
        is_same = found.tobytes() == about.nonce
    except ConnectionError as error:
        pool.close()
        raise PoolUnreachable(TRANSPORT, str(error)) from error
    if not is_same:
        pool.close()
        raise PoolUnreachable(TRANSPORT, f"agent {about.agent} has something else where the pool was")
    return pool


def is_owner_gone(descriptor: bytes) -> bool:
    """Whether a pool that was opened cannot be read any more: it is to be closed, and opened anew."""
    return _endpoint is None or _endpoint.problem(_Description.parse(descriptor).agent) is not None


def this_endpoint() -> NixlEndpoint:
    """That of this process. Raises TransportUnavailable."""
    global _endpoint
    if _endpoint is None:
        _endpoint = NixlEndpoint(make_agent())
    return _endpoint
