"""The KV cache of a worker on a CPU. The torch that transfers of such workers need is here and in `shared_memory`."""

import numpy as np
import torch

from kvtransfer.host_memory import HostMemory
from kvtransfer.layout import KvLayout, check_dtype
from kvtransfer.pieces import PoolGeometry, check_span
from kvtransfer.pool import KvSpan, PoolOffer, span_bytes
from kvtransfer.pool_tensor import payload_tensor, pool_shape, torch_dtype
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transports import in_process, nixl, shm
from phasewise_kernels.block_copy.reference import convert
from phasewise_kernels.kv_copy.op import copy_pieces, has_kernel

#: What checksums of it can be compared with: each transport's is CRC32C.
_TRANSPORTS = ("grpc", "in_process", "shm", "nixl")


class HostPool:
    """A KV cache in memory of the host. Implements pool.KvPool.

    kv_cache: [num_layers, 2, num_blocks, block_size, heads, head_dim], CPU, contiguous, of the layout's dtype; K is
    [:, 0], V is [:, 1]. Its memory is shared, not copied. memory: where it lies, when other processes may read it:
    `kv_cache` is then `memory.tensor(...)`. is_in_nixl: other processes and hosts may read it through NIXL.

    Raises ValueError when the tensor is not what the layout says, or does not lie in `memory`; TransportUnavailable when
    NIXL is asked for and does not work here.
    """

    def __init__(
        self,
        kv_cache: torch.Tensor,
        layout: KvLayout,
        memory: SharedMemory | None = None,
        *,
        is_in_nixl: bool = False,
    ) -> None:
        _check_tensor(kv_cache, layout)
        # Compiled now: at the first chunk it would keep the loop from everything else, longer than a lease perhaps.
        has_kernel()
        self._layout = layout
        #: Held, so that it can be opened as long as there is a pool.
        self._shared_memory = memory
        geometry = PoolGeometry(layout, kv_cache.shape[2])
        flat = kv_cache.view(-1).view(torch.uint8).numpy()
        self._memory = HostMemory(flat, geometry)
        offers = [PoolOffer(in_process.TRANSPORT, in_process.register(self))]
        if memory is not None:
            offset = kv_cache.data_ptr() - memory.address
            if not 0 <= offset <= memory.num_bytes - geometry.num_bytes:
                raise ValueError("the KV cache does not lie in the shared memory")
            offers.append(PoolOffer(shm.TRANSPORT, shm.describe(memory, offset, geometry)))
        if is_in_nixl:
            offers.append(nixl.offer(flat, geometry))
        self._offers = tuple(offers)

    @property
    def layout(self) -> KvLayout:
        """See pool.KvPool."""
        return self._layout

    @property
    def offers(self) -> tuple[PoolOffer, ...]:
        """To this process, and where it lies in shared memory, to all of the host."""
        return self._offers

    @property
    def host_memory(self) -> HostMemory:
        """Its bytes."""
        return self._memory

    def checksum(self, span: KvSpan, transport: str) -> int:
        """CRC32C, by whichever way of the host it is read."""
        if transport not in _TRANSPORTS:
            raise ValueError(f"memory of the host is read by {', '.join(_TRANSPORTS)}, not by {transport}")
        return self._memory.checksum(span)

    def read(self, span: KvSpan, out: memoryview) -> int:
        """See pool.KvPool. Raises ValueError when `out` has another size."""
        return self._memory.read(span, np.frombuffer(out, np.uint8))

    def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
        """See pool.KvPool. Rounds to the nearest, ties to even; what float8 cannot hold becomes its largest value."""
        check_dtype(dtype)
        check_span(span, self._memory.geometry)
        received, expected = np.frombuffer(payload, np.uint8), span_bytes(span, self._layout, dtype)
        if received.size != expected:
            raise ValueError(f"{received.size} bytes for a span of {expected} in {dtype}")
        if dtype == self._layout.dtype:
            return self._memory.write(span, received)
        # A tensor must not share memory that may be read-only; the copy is also the pass that makes the checksum.
        staged = torch.empty(received.size, dtype=torch.uint8)
        start = np.zeros(1, np.int64)
        checksum = copy_pieces(received, start, staged.numpy(), start, np.array([received.size], np.int64))
        kv = payload_tensor(staged, span, self._layout, dtype)
        converted = convert(kv, torch_dtype(self._layout.dtype))
        self._memory.write(span, converted.contiguous().view(-1).view(torch.uint8).numpy())
        return checksum


def _check_tensor(kv_cache: torch.Tensor, layout: KvLayout) -> None:
    expected = pool_shape(layout, kv_cache.shape[2] if kv_cache.ndim == 6 else 0)
    if tuple(kv_cache.shape) != expected or kv_cache.dtype != torch_dtype(layout.dtype):
        raise ValueError(
            f"the KV cache is {list(kv_cache.shape)} {kv_cache.dtype}, not {list(expected)} {layout.dtype}"
        )
    if kv_cache.device.type != "cpu" or not kv_cache.is_contiguous():
        raise ValueError("the KV cache is not contiguous in memory of the host")
