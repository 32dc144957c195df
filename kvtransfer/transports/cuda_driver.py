"""The calls of the CUDA driver that share memory between processes, which torch keeps to itself.

Through libcuda rather than the runtime library: it comes with the driver under one name, whichever version of the
runtime torch was built with, and it alone tells where the allocation begins that an address lies in.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

HANDLE_BYTES = 64
#: Lets the handle be opened for a GPU that reaches the memory of the other over a link.
_LAZY_PEER_ACCESS = 1


class CudaDriverError(Exception):
    """A call of the driver failed; `name` is what CUDA calls the error."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(call, name)
        self.call = call
        self.name = name

    def __str__(self) -> str:
        return f"{self.call} failed with {self.name}"


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory of a GPU as one call made it: where it begins in this process, and its size."""

    address: int
    num_bytes: int


def allocation_of(device_index: int, address: int) -> Allocation:
    """The allocation that this address of the device lies in. Raises CudaDriverError."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    with _context(device_index):
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    return Allocation(base.value, size.value)


def ipc_handle(device_index: int, allocation: Allocation) -> bytes:
    """What `open_ipc_handle` of another process takes; valid as long as the allocation is. Raises CudaDriverError."""
    handle = _Handle()
    with _context(device_index):
        _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(allocation.address))
    return bytes(handle.reserved)


def open_ipc_handle(device_index: int, handle: bytes) -> Allocation:
    """Map memory of another process. Each success needs one `close_ipc_handle`. Raises CudaDriverError."""
    address = ctypes.c_uint64()
    with _context(device_index):
        _call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
    try:
        return allocation_of(device_index, address.value)
    except CudaDriverError:
        close_ipc_handle(device_index, address.value)
        raise


def close_ipc_handle(device_index: int, address: int) -> None:
    """Unmap it, once nothing reads it any more. Raises CudaDriverError."""
    with _context(device_index):
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def driver_version() -> int:
    """The newest CUDA that the driver runs, 13000 for 13.0. Raises CudaDriverError."""
    version = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(version))
    return version.value


@contextmanager
def _context(device_index: int) -> Iterator[None]:
    """The device's primary context, which torch uses, in this thread; the driver has no notion of a default one."""
    _call("cuCtxPushCurrent_v2", _primary_context(device_index))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def _primary_context(device_index: int) -> ctypes.c_void_p:
    """Held from now on: it goes with the process, and what is mapped in it stays."""
    _call("cuInit", ctypes.c_uint(0))
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(device_index))
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise CudaDriverError(name, _error_name(status))


def _error_name(status: int) -> str:
    text = ctypes.c_char_p()
    _library().cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
    return text.value.decode() if text.value else f"error {status}"


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaDriverError("loading libcuda.so.1", str(error)) from error
