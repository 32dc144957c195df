"""KV in the memory of a GPU, read by another process of the same host through CUDA IPC.

The owner describes its pool once: a handle of the allocation that holds it, and what lies where. Another process maps
that allocation into its own address space, and from then on copies by a kernel that runs in itself: the owner's part
of a pull is nothing at all. The handle comes from the driver's own calls rather than from torch's sharing of tensors,
whose reference counts live in files of the owner and are lost with it; here the blocks' leases say who may read what.

Who waits for whom: bytes that one process wrote are seen by the other when the kernel that wrote them has ended. The
owner computes `checksum` on the stream that the KV was written on and waits for the result, so what it announces with
that checksum has been written. The reader waits for its copy before it says that it has the chunk.

A checksum by a GPU is not CRC32C but the sum of `phasewise_kernels.block_copy.reference`, for which the order of
the bytes does not matter. Bytes that reach the host (`read`, `write`) have their CRC32C, as all memory of hosts.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtransfer.errors import PoolUnreachable
from kvtransfer.layout import KvLayout
from kvtransfer.pieces import PoolGeometry, check_same_shape, check_span
from kvtransfer.pool import KvPool, KvSpan, PoolOffer, span_bytes
from kvtransfer.pool_tensor import payload_tensor, pool_shape, torch_dtype
from kvtransfer.shared_memory import boot_id
from kvtransfer.transports import cuda_driver
from kvtransfer.transports.cuda_driver import Allocation, CudaDriverError
from kvtransfer.transports.cuda_mapping import ProcessIdentity, bytes_at, device_uuid, this_process
from phasewise_kernels.block_copy.op import block_checksum, block_copy, checksum_of, start_block_copy
from phasewise_kernels.block_copy.reference import TokenRows, contiguous_rows

logger = logging.getLogger(__name__)

TRANSPORT = "cuda_ipc"
_VERSION = 2


class CudaPool:
    """The KV cache of one worker in the memory of one GPU. Implements pool.KvPool.

    kv_cache: [num_layers, 2, num_blocks, block_size, heads, head_dim], contiguous, of the layout's dtype; its memory
    is shared, not copied. On the CPU, for tests, it offers nothing and the rest works.
    All work is put on the stream that is current in the calling thread, and waited for. KV is to be written on that
    stream, or waited for, before it is announced; blocks are to be leased when no kernel uses them any more.
    Raises ValueError when the tensor is not what the layout says.
    """

    def __init__(self, kv_cache: torch.Tensor, layout: KvLayout) -> None:
        shape = pool_shape(layout, kv_cache.shape[2] if kv_cache.ndim == 6 else 0)
        if tuple(kv_cache.shape) != shape or kv_cache.dtype != torch_dtype(layout.dtype):
            raise ValueError(
                f"the KV cache is {list(kv_cache.shape)} {kv_cache.dtype} and the layout {list(shape)} {layout.dtype}"
            )
        if not kv_cache.is_contiguous():
            raise ValueError("the KV cache is not contiguous")
        self._kv_cache = kv_cache
        self._layout = layout
        self._offers: tuple[PoolOffer, ...] = ()
        #: Why other processes cannot read it; None when they can.
        self.ipc_problem: str | None = None
        try:
            self._offers = (PoolOffer(TRANSPORT, _describe(kv_cache, layout)),)
        except CudaDriverError as error:
            self.ipc_problem = (
                f"{error}: CUDA shares no memory of an allocator with expandable segments; run the worker without "
                "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF)"
            )
            logger.warning("cuda_ipc_unavailable reason=%s", self.ipc_problem)
        except PoolUnreachable as error:
            self.ipc_problem = error.reason

    @property
    def layout(self) -> KvLayout:
        """What its bytes mean."""
        return self._layout

    @property
    def offers(self) -> tuple[PoolOffer, ...]:
        """CUDA IPC; empty when the memory cannot be shared."""
        return self._offers

    def warm_up(self) -> None:
        """Compile the kernels for all heads of the pool: a second or more, which the first transfer then has not to
        wait for. Other ranges of heads compile when they are first met."""
        shape = (1, 2, 1, *self._kv_cache.shape[4:])
        kv = torch.empty((2, *shape), dtype=self._kv_cache.dtype, device=self._kv_cache.device)
        pair = contiguous_rows(kv[0]), contiguous_rows(kv[1])
        block_checksum(pair[0])
        block_copy(*pair)
        start_block_copy(*pair, is_checked=False)
        self._wait()

    def checksum(self, span: KvSpan, transport: str) -> int:
        """Of the span's bytes as a pull by CUDA IPC gives it; what was written on this stream has been, thereafter."""
        if transport != TRANSPORT:
            raise ValueError(f"a pool of a GPU is read by {TRANSPORT}, not by {transport}")
        return block_checksum(self.rows(span))

    def read(self, span: KvSpan, out: memoryview) -> int:
        """Gather the span into `out`, in the order of the wire and the pool's dtype; returns its CRC32C.

        Raises ValueError when `out` has another size.
        """
        _check_size(out, span_bytes(span, self._layout))
        kv, _ = _gather(self.rows(span), is_checked=False)
        return _copy_with_crc32c(_to_host(kv), np.frombuffer(out, np.uint8))

    def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
        """Scatter what `read` of a pool of this dtype gave, converted if need be; returns the payload's CRC32C.

        Raises ValueError when the payload has another size.
        """
        _check_size(payload, span_bytes(span, self._layout, dtype))
        rows = self.rows(span)
        host = _host_bytes(len(payload), rows.kv_cache.device)
        crc = _copy_with_crc32c(np.frombuffer(payload, np.uint8), host.numpy())
        kv = payload_tensor(host.to(rows.kv_cache.device, non_blocking=True), span, self._layout, dtype)
        start_block_copy(contiguous_rows(kv), rows, is_checked=False)
        self._wait()
        return crc

    def rows(self, span: KvSpan) -> TokenRows:
        """Where the span lies. Raises ValueError when it is not within the pool."""
        return _rows(self._kv_cache, self._layout, span)

    def _wait(self) -> None:
        if self._kv_cache.is_cuda:
            torch.cuda.current_stream(self._kv_cache.device).synchronize()


class MappedCudaPool:
    """The pool of another process, mapped here. Implements pool.MappedPool; made by `open_pool`."""

    def __init__(self, device_index: int, allocation: Allocation, kv_cache: torch.Tensor, layout: KvLayout):
        self._device_index = device_index
        self._address = allocation.address
        self._kv_cache: torch.Tensor | None = kv_cache
        self._layout = layout

    def pull(self, source: KvSpan, target: KvPool, into: KvSpan) -> int:
        """See pool.MappedPool. Into a pool of the host it goes by way of page-locked memory.

        Raises ConnectionError when it is closed, or the memory cannot be read any more; ValueError when a span is not
        within its pool or the two differ in shape.
        """
        check_same_shape(source, into)
        rows = self.rows(source)
        with _as_connection_error():
            if isinstance(target, CudaPool):
                return block_copy(rows, target.rows(into))
            kv, partials = _gather(rows, is_checked=True)
            payload = _to_host(kv)
            checksum = checksum_of(partials)
        target.write(into, payload.data, self._layout.dtype)
        return checksum

    def rows(self, span: KvSpan) -> TokenRows:
        """Where the span lies, as mapped here; not to be kept. Raises as `pull` does."""
        if self._kv_cache is None:
            raise ConnectionError("the pool is not mapped any more")
        return _rows(self._kv_cache, self._layout, span)

    def close(self) -> None:
        """Unmap it. Every pull has ended: each waits for its own. Closing twice does nothing."""
        if self._kv_cache is None:
            return
        self._kv_cache = None
        try:
            cuda_driver.close_ipc_handle(self._device_index, self._address)
        except CudaDriverError as error:
            # Nothing that anybody could do: it goes with the process.
            logger.warning("cuda_ipc_unmap_failed reason=%s", error)


def open_pool(descriptor: bytes) -> MappedCudaPool:
    """Map the pool of another process for the current device of this one, which need not see the GPU that has it.

    Raises PoolUnreachable with the reason: another host, no GPU here, the same process, or what CUDA says when the owner is
    gone, or the GPUs do not reach each other.
    """
    pool = _Description.parse(descriptor)
    if pool.boot_id != boot_id():
        raise PoolUnreachable(TRANSPORT, "it is on another host")
    if pool.owner.is_this_process:
        raise PoolUnreachable(
            TRANSPORT, "it is a pool of this same process, which CUDA IPC does not open; in_process does"
        )
    if pool.owner.has_ended:
        raise PoolUnreachable(TRANSPORT, f"process {pool.pid}, which had it, has ended")
    if not torch.cuda.is_available():
        raise PoolUnreachable(TRANSPORT, "this process sees no GPU")
    device_index = torch.cuda.current_device()
    try:
        allocation = cuda_driver.open_ipc_handle(device_index, bytes.fromhex(pool.handle))
    except CudaDriverError as error:
        problem = f"{error}; its owner is process {pool.pid}, on GPU {pool.device_uuid}"
        raise PoolUnreachable(TRANSPORT, problem) from error
    try:
        kv_cache = _tensor_in(allocation, pool)
    except (RuntimeError, ValueError) as error:
        cuda_driver.close_ipc_handle(device_index, allocation.address)
        raise PoolUnreachable(TRANSPORT, f"its memory is not what it says: {error}") from error
    return MappedCudaPool(device_index, allocation, kv_cache, pool.layout)


def is_owner_gone(descriptor: bytes) -> bool:
    """Whether the owner's process has ended. Until it is unmapped here, its memory stays taken on the GPU.

    False where that cannot be seen, as in another container.
    """
    return _Description.parse(descriptor).owner.has_ended


@dataclass(frozen=True, slots=True)
class _Description:
    """What another process needs. offset: of the pool in its allocation, in bytes."""

    handle: str
    offset: int
    num_blocks: int
    layout: KvLayout
    device_uuid: str
    boot_id: str
    pid: int
    pid_namespace: str
    ticks: int | None
    start: str
    version: int = _VERSION

    @property
    def owner(self) -> ProcessIdentity:
        """The process that has it."""
        return ProcessIdentity(self.pid, self.pid_namespace, self.ticks, self.start)

    def packed(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def parse(cls, packed: bytes) -> "_Description":
        """Raises PoolUnreachable."""
        try:
            fields = json.loads(packed)
            if fields["version"] != _VERSION:
                raise PoolUnreachable(
                    TRANSPORT, f"its descriptor is of version {fields['version']}, not {_VERSION}"
                )
            description = cls(**{**fields, "layout": KvLayout(**fields["layout"])})
            is_handle = len(bytes.fromhex(description.handle)) == cuda_driver.HANDLE_BYTES
            is_whole = is_handle and description.offset >= 0 and description.num_blocks > 0
            is_whole = is_whole and description.layout.block_bytes > 0
        except (ValueError, TypeError, KeyError) as error:
            raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {error!r}") from error
        if not is_whole:
            raise PoolUnreachable(TRANSPORT, f"its descriptor makes no sense: {description}")
        return description


def _describe(kv_cache: torch.Tensor, layout: KvLayout) -> bytes:
    """Raises CudaDriverError when the memory cannot be shared, PoolUnreachable when it is not that of a GPU."""
    if not kv_cache.is_cuda:
        raise PoolUnreachable(TRANSPORT, f"it is in memory of {kv_cache.device.type}")
    index = kv_cache.get_device()
    allocation = cuda_driver.allocation_of(index, kv_cache.data_ptr())
    return _Description(
        handle=cuda_driver.ipc_handle(index, allocation).hex(),
        offset=kv_cache.data_ptr() - allocation.address,
        num_blocks=kv_cache.shape[2],
        layout=layout,
        device_uuid=device_uuid(index),
        boot_id=boot_id(),
        **asdict(this_process()),
    ).packed()


def _tensor_in(allocation: Allocation, pool: _Description) -> torch.Tensor:
    """The pool, not copied. The allocation must outlive the tensor."""
    num_bytes = pool.num_blocks * pool.layout.block_bytes
    if pool.offset + num_bytes > allocation.num_bytes:
        raise ValueError(
            f"{num_bytes} bytes from {pool.offset} on of an allocation of {allocation.num_bytes}"
        )
    address = allocation.address + pool.offset
    flat = bytes_at(address, num_bytes)
    return flat.view(torch_dtype(pool.layout.dtype)).view(pool_shape(pool.layout, pool.num_blocks))


def _rows(kv_cache: torch.Tensor, layout: KvLayout, span: KvSpan) -> TokenRows:
    check_span(span, PoolGeometry(layout, kv_cache.shape[2]))
    places = np.arange(span.first_token, span.first_token + span.num_tokens, dtype=np.int64)
    blocks = np.asarray(span.block_ids, np.int64)[places // layout.block_size]
    first_head = layout.heads[0]
    return TokenRows(
        kv_cache,
        blocks * layout.block_size + places % layout.block_size,
        (span.layer_lo, span.layer_hi),
        (span.head_lo - first_head, span.head_hi - first_head),
    )


def _gather(rows: TokenRows, *, is_checked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy in the memory of this process, in the order of the wire, and its partial checksums."""
    kv = torch.empty(rows.shape, dtype=rows.kv_cache.dtype, device=rows.kv_cache.device)
    return kv, start_block_copy(rows, contiguous_rows(kv), is_checked=is_checked)


def _to_host(kv: torch.Tensor) -> NDArray[np.uint8]:
    """The same in page-locked memory; waits for the copy."""
    host = _host_bytes(kv.nbytes, kv.device)
    host.copy_(kv.view(-1).view(torch.uint8))
    return host.numpy()


def _host_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _copy_with_crc32c(source: Any, target: Any) -> int:
    # Here and not above: CUDA IPC alone does without what this needs.
    from phasewise_kernels.kv_copy.op import copy_pieces

    start = np.zeros(1, np.int64)
    return copy_pieces(source, start, target, start, np.array([source.size], np.int64))


def _check_size(memory: memoryview, expected: int) -> None:
    if memory.nbytes != expected:
        raise ValueError(f"{memory.nbytes} bytes for a span of {expected}")


@contextmanager
def _as_connection_error() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        # Of this process, whatever becomes of the other's memory.
        raise
    except RuntimeError as error:
        raise ConnectionError(f"the mapped pool cannot be read: {error}") from error
