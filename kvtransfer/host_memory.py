"""KV in memory of the host, one's own or mapped from another process, as bytes."""

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvtransfer.pieces import PoolGeometry, check_same_shape, check_span, pieces_between, pieces_in
from kvtransfer.pool import KvPool, KvSpan, span_bytes
from phasewise_kernels.kv_copy.op import checksum_pieces, copy_pieces


class HostMemory:
    """A pool's bytes and what they mean. memory: [geometry.num_bytes] uint8, maybe read-only, not copied."""

    def __init__(self, memory: npt.NDArray[np.uint8], geometry: PoolGeometry) -> None:
        assert memory.shape == (geometry.num_bytes,), (memory.shape, geometry)
        self.geometry = geometry
        self._memory = memory

    def checksum(self, span: KvSpan) -> int:
        """CRC32C of the span's bytes in the order of the wire."""
        check_span(span, self.geometry)
        pieces = pieces_in(span, self.geometry)
        return checksum_pieces(self._memory, pieces.source_offsets, pieces.lengths)

    def read(self, span: KvSpan, out: npt.NDArray[np.uint8]) -> int:
        """Gather the span into `out` in the order of the wire; returns its CRC32C."""
        self._check_size(span, out.size)
        pieces = pieces_in(span, self.geometry)
        return copy_pieces(self._memory, pieces.source_offsets, out, pieces.target_offsets, pieces.lengths)

    def write(self, span: KvSpan, payload: npt.NDArray[np.uint8]) -> int:
        """Scatter what `read` gave, of the same dtype; returns its CRC32C."""
        self._check_size(span, payload.size)
        pieces = pieces_in(span, self.geometry)
        return copy_pieces(
            payload, pieces.target_offsets, self._memory, pieces.source_offsets, pieces.lengths
        )

    def copy_to(self, source: KvSpan, target: "HostMemory", into: KvSpan) -> int:
        """From pool to pool of the same dtype in one pass; returns the CRC32C as `checksum` of the source."""
        check_span(source, self.geometry)
        check_span(into, target.geometry)
        check_same_shape(source, into)
        pieces = pieces_between(source, self.geometry, into, target.geometry)
        return copy_pieces(
            self._memory, pieces.source_offsets, target._memory, pieces.target_offsets, pieces.lengths
        )

    def _check_size(self, span: KvSpan, num_bytes: int) -> None:
        check_span(span, self.geometry)
        expected = span_bytes(span, self.geometry.layout)
        if num_bytes != expected:
            raise ValueError(f"{num_bytes} bytes for a span of {expected}")


@runtime_checkable
class InHostMemory(Protocol):
    """A pool whose bytes are in memory of the host."""

    @property
    def host_memory(self) -> HostMemory:
        """Its bytes."""
        ...


def pull(memory: HostMemory, source: KvSpan, target: KvPool, into: KvSpan) -> int:
    """As `MappedPool.pull`: in one pass where the target is in memory of the host too and of the same dtype."""
    if isinstance(target, InHostMemory) and target.layout.dtype == memory.geometry.layout.dtype:
        return memory.copy_to(source, target.host_memory, into)
    check_same_shape(source, into)
    check_span(source, memory.geometry)
    staged = np.empty(span_bytes(source, memory.geometry.layout), np.uint8)
    checksum = memory.read(source, staged)
    target.write(into, staged.data, memory.geometry.layout.dtype)
    return checksum
