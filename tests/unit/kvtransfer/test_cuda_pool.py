"""What a pool of a GPU does that needs no GPU: its memory is the CPU's here, and the reference copies."""

import json
from itertools import product

import google_crc32c
import pytest
import torch

from kvtransfer.errors import PoolUnreachable
from kvtransfer.layout import DTYPE_BITS
from kvtransfer.pool import KvSpan, span_bytes, span_of
from kvtransfer.shared_memory import boot_id
from kvtransfer.transports import cuda_driver, cuda_ipc
from kvtransfer.transports.cuda_driver import Allocation, CudaDriverError
from kvtransfer.transports.cuda_ipc import CudaPool, MappedCudaPool, open_pool
from kvtransfer.transports.cuda_mapping import this_process
from phasewise_kernels.block_copy.reference import checksum_reference, convert
from tests.support.block_copy_pools import bits_of
from tests.support.cuda_layouts import a_span, kept_in, layout_of, pool_tensor

DTYPES = tuple(DTYPE_BITS)


def a_pool(
    dtype: str = "float32", block_size: int = 16, *, heads: tuple[int, int] = (0, 3), seed: int = 0
) -> tuple[CudaPool, torch.Tensor]:
    layout = layout_of(dtype, block_size, heads)
    kv_cache = pool_tensor(layout, seed)
    return CudaPool(kv_cache, layout), kv_cache


def mapped(pool: CudaPool, kv_cache: torch.Tensor) -> MappedCudaPool:
    return MappedCudaPool(0, Allocation(0, kv_cache.nbytes), kv_cache, pool.layout)


def described(**changes: object) -> bytes:
    """A descriptor as another process makes it."""
    fields = {
        "handle": bytes(cuda_driver.HANDLE_BYTES).hex(),
        "offset": 0,
        "num_blocks": 3,
        "layout": {name: getattr(layout_of("float32"), name) for name in layout_of("float32").__slots__},
        "device_uuid": "00000000-0000-0000-0000-000000000000",
        "boot_id": boot_id(),
        "pid": 1,
        "pid_namespace": "pid:[1]",
        "ticks": 1,
        "start": "of another process",
        "version": 2,
    }
    return json.dumps({**fields, **changes}).encode()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_in_the_order_of_the_wire_with_its_crc32c(dtype: str) -> None:
    pool, kv_cache = a_pool(dtype)
    span = a_span(pool.layout)
    out = bytearray(span_bytes(span, pool.layout))
    assert pool.read(span, memoryview(out)) == google_crc32c.value(bytes(out))
    assert out == bits_of(kept_in(kv_cache, pool.layout, span)).numpy().tobytes()
    assert pool.checksum(span, "cuda_ipc") == checksum_reference(bytes(out))


@pytest.mark.parametrize(("dtype", "own_dtype"), list(product(DTYPES, DTYPES)))
def test_what_is_written_is_converted_and_leaves_the_rest_alone(dtype: str, own_dtype: str) -> None:
    source, source_cache = a_pool(dtype)
    span = a_span(source.layout)
    payload = bytearray(span_bytes(span, source.layout))
    source.read(span, memoryview(payload))
    pool, kv_cache = a_pool(own_dtype, 32, seed=5)
    before = kv_cache.clone()
    into = a_span(pool.layout, (30, 67), seed=6)
    assert pool.write(into, memoryview(payload), dtype) == google_crc32c.value(bytes(payload))
    expected = convert(kept_in(source_cache, source.layout, span), kv_cache.dtype)
    assert torch.equal(bits_of(kept_in(kv_cache, pool.layout, into)), bits_of(expected))
    assert (bits_of(kv_cache) != bits_of(before)).sum() <= expected.numel() * kv_cache.itemsize


@pytest.mark.parametrize(("dtype", "own_dtype"), list(product(DTYPES, DTYPES)))
def test_a_pull_gives_the_checksum_that_the_owner_announces(dtype: str, own_dtype: str) -> None:
    source, source_cache = a_pool(dtype)
    pool, kv_cache = a_pool(own_dtype, 32, heads=(1, 4), seed=5)
    span, into = a_span(source.layout), a_span(pool.layout, seed=6)
    assert mapped(source, source_cache).pull(span, pool, into) == source.checksum(span, "cuda_ipc")
    expected = convert(kept_in(source_cache, source.layout, span), kv_cache.dtype)
    assert torch.equal(bits_of(kept_in(kv_cache, pool.layout, into)), bits_of(expected))


def test_a_pool_of_the_host_can_be_filled_too() -> None:
    class HostPool:
        """Takes what it is given."""

        def write(self, span: KvSpan, payload: memoryview, dtype: str) -> int:
            self.written = (span, bytes(payload), dtype)
            return 0

    source, source_cache = a_pool("bfloat16")
    target = HostPool()
    span = a_span(source.layout)
    checksum = mapped(source, source_cache).pull(span, target, span)  # type: ignore[arg-type]
    out = bytearray(span_bytes(span, source.layout))
    source.read(span, memoryview(out))
    assert target.written == (span, bytes(out), "bfloat16")
    assert checksum == checksum_reference(bytes(out))


@pytest.mark.parametrize(
    "span",
    [
        span_of([0, 12], 16, tokens=(0, 20), layers=(0, 1), heads=(0, 1)),
        KvSpan((0, -1), 0, 20, 0, 1, 0, 1),
        KvSpan((0,), 0, 17, 0, 1, 0, 1),
        KvSpan((0,), 16, 1, 0, 1, 0, 1),
        KvSpan((0,), 0, 1, 0, 4, 0, 1),
        KvSpan((0,), 0, 1, 0, 1, 0, 4),
    ],
    ids=str,
)
def test_a_span_outside_the_pool_is_refused_before_memory_is_touched(span: KvSpan) -> None:
    pool, kv_cache = a_pool()
    with pytest.raises(ValueError):
        pool.checksum(span, "cuda_ipc")
    with pytest.raises(ValueError):
        mapped(pool, kv_cache).pull(span, pool, span)


def test_payloads_of_another_size_are_refused() -> None:
    pool, _ = a_pool()
    span = a_span(pool.layout)
    for num_bytes in (0, span_bytes(span, pool.layout) - 1, span_bytes(span, pool.layout) + 1):
        with pytest.raises(ValueError, match="bytes for a span"):
            pool.write(span, memoryview(bytearray(num_bytes)), "float32")
        with pytest.raises(ValueError, match="bytes for a span"):
            pool.read(span, memoryview(bytearray(num_bytes)))


def test_a_tensor_that_is_not_what_the_layout_says_is_refused() -> None:
    layout = layout_of("float32")
    kv_cache = pool_tensor(layout, 0)
    for wrong in (kv_cache.half(), kv_cache[:2], kv_cache[0], kv_cache.transpose(3, 4)):
        with pytest.raises(ValueError, match="the KV cache is"):
            CudaPool(wrong, layout)


def test_memory_of_the_cpu_is_not_offered_and_says_why() -> None:
    pool, _ = a_pool()
    assert pool.offers == ()
    assert pool.ipc_problem == "it is in memory of cpu"
    pool.warm_up()


def test_a_pool_that_is_closed_is_unmapped_once_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(cuda_driver, "close_ipc_handle", lambda _device, address: closed.append(address))
    source, kv_cache = a_pool()
    pool = MappedCudaPool(0, Allocation(77, kv_cache.nbytes), kv_cache, source.layout)
    pool.close()
    pool.close()
    assert closed == [77]
    span = a_span(source.layout)
    with pytest.raises(ConnectionError, match="not mapped"):
        pool.pull(span, source, span)


def test_what_cuda_reports_while_it_copies_is_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_ipc, "block_copy", fail)
    source, kv_cache = a_pool()
    span = a_span(source.layout)
    with pytest.raises(ConnectionError, match="illegal memory access"):
        mapped(source, kv_cache).pull(span, source, span)


@pytest.mark.parametrize(
    "descriptor",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        described(version=1),
        described(handle="00"),
        described(handle="xy"),
        described(num_blocks=0),
        described(offset=-1),
        described(layout={}),
        described(unknown=1),
    ],
)
def test_a_descriptor_that_makes_no_sense_is_unreachable(descriptor: bytes) -> None:
    with pytest.raises(PoolUnreachable, match="its descriptor"):
        open_pool(descriptor)


def test_a_pool_of_another_host_is_not_opened() -> None:
    with pytest.raises(PoolUnreachable, match="it is on another host"):
        open_pool(described(boot_id="another"))


def test_a_pool_of_a_gpu_that_this_process_does_not_see_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    source, kv_cache = a_pool()
    opened: list[tuple[int, bytes]] = []

    def open_handle(device_index: int, handle: bytes) -> Allocation:
        opened.append((device_index, handle))
        return Allocation(4096, 64 + kv_cache.nbytes)

    def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
        assert (address, num_bytes) == (4096 + 64, kv_cache.nbytes)
        return kv_cache.view(-1).view(torch.uint8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_driver, "open_ipc_handle", open_handle)
    monkeypatch.setattr(cuda_ipc, "bytes_at", bytes_at)
    pool = open_pool(described(offset=64, num_blocks=kv_cache.shape[2], device_uuid="another"))
    assert opened == [(0, bytes(cuda_driver.HANDLE_BYTES))]
    span = a_span(source.layout)
    target, _ = a_pool(seed=5)
    assert pool.pull(span, target, span) == source.checksum(span, "cuda_ipc")


def test_a_gpu_whose_memory_this_one_does_not_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> Allocation:
        raise CudaDriverError("cuIpcOpenMemHandle_v2", "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_driver, "open_ipc_handle", refuse)
    with pytest.raises(
        PoolUnreachable, match="PEER_ACCESS_UNSUPPORTED; its owner is process 1, on GPU another"
    ):
        open_pool(described(device_uuid="another"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_opened() -> None:
    with pytest.raises(PoolUnreachable, match="sees no GPU"):
        open_pool(described())


def test_an_owner_is_gone_when_its_pid_is_free_or_anothers() -> None:
    us = this_process()
    here, ticks = {"pid_namespace": us.pid_namespace, "pid": us.pid}, us.ticks
    assert ticks is not None
    assert not cuda_ipc.is_owner_gone(described(**here, ticks=ticks))
    assert cuda_ipc.is_owner_gone(described(**here, ticks=ticks - 1))
    # Beyond the largest pid.
    assert cuda_ipc.is_owner_gone(described(**{**here, "pid": 2**22 + 1}, ticks=ticks))
    assert not cuda_ipc.is_owner_gone(described(pid=2**22 + 1))
