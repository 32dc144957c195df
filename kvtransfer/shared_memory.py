"""Memory that other processes of the host may read, and that nobody has to clean up.

A memfd has no name in any file system: it lives as long as a process has it open or mapped, and the kernel frees it
when the last of them ends, `kill -9` included. It is not part of /dev/shm, so neither a full one nor a small one (64 MiB
in a container, unless asked otherwise) is in the way. Another process opens it through its owner's /proc/PID/fd/FD,
which the kernel allows to the same user in the same pid namespace.

    | header, one page: magic, nonce, size of the data | data |

Who opens it must find the random nonce of the descriptor in the header: a process that was given the pid of one that
ended has not got it.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch

from kvtransfer.errors import PoolUnreachable, SharedMemoryUnavailable

TRANSPORT = "shm"
HEADER_BYTES = 4096
NONCE_BYTES = 16
#: Memory of another process is touched in slices of this size.
TOUCHED_BYTES = 2**26
#: Of the memory's file as the kernel shows it in /proc.
FILE_NAME = "phasewise-kv"
_LINK_START = f"/memfd:{FILE_NAME}"
_HEADER = struct.Struct(f"<8s{NONCE_BYTES}sQ")
_MAGIC = b"phasewkv"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SEALS = ("F_ADD_SEALS", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


@dataclass(frozen=True, slots=True)
class SharedMemoryDescriptor:
    """Where a process of the same host finds the memory. num_bytes: of the data. nonce: hexadecimal."""

    boot_id: str
    pid_namespace: int
    pid: int
    fd: int
    num_bytes: int
    nonce: str

    @property
    def link(self) -> str:
        """What the kernel shows of it while its owner has it open."""
        return f"/proc/{self.pid}/fd/{self.fd}"


class SharedMemory:
    """Memory of this process that others may read, all of it backed by the machine's: touching it cannot fail."""

    def __init__(self, fd: int, mapped: mmap.mmap, descriptor: SharedMemoryDescriptor) -> None:
        """See `create`."""
        self._close_fd = weakref.finalize(self, os.close, fd)
        self._mapped: mmap.mmap | None = mapped
        self._descriptor = descriptor

    @classmethod
    def create(cls, num_bytes: int, name: str = "") -> "SharedMemory":
        """name: shown in /proc/PID/maps beside what it is; no other use.

        Takes up to seconds per GB: the kernel clears every page. A container's limit is not looked at here.

        Raises SharedMemoryUnavailable: not on this system, or the machine has less memory free.
        """
        if not hasattr(os, "memfd_create") or not all(hasattr(fcntl, seal) for seal in _SEALS):
            raise SharedMemoryUnavailable(num_bytes, "it needs memfd_create and its seals, which Linux has")
        available = psutil.virtual_memory().available
        # The kernel would give it, and then end a process when pages run out.
        if num_bytes + HEADER_BYTES > available:
            raise SharedMemoryUnavailable(num_bytes, f"the machine has {available} bytes of memory free")
        try:
            fd = os.memfd_create(f"{FILE_NAME}{name and '-'}{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise SharedMemoryUnavailable(num_bytes, f"memfd_create: {error.strerror}") from error
        try:
            mapped = _filled(fd, num_bytes)
        except OSError as error:
            os.close(fd)
            raise SharedMemoryUnavailable(num_bytes, f"{error.strerror or error}") from error
        nonce = secrets.token_bytes(NONCE_BYTES)
        _HEADER.pack_into(mapped, 0, _MAGIC, nonce, num_bytes)
        place = (boot_id(), _pid_namespace(), os.getpid(), fd)
        return cls(fd, mapped, SharedMemoryDescriptor(*place, num_bytes, nonce.hex()))

    @property
    def num_bytes(self) -> int:
        """Of the data."""
        return self._descriptor.num_bytes

    @property
    def address(self) -> int:
        """Of the data."""
        address: int = self._bytes().__array_interface__["data"][0]
        return address

    def descriptor(self) -> SharedMemoryDescriptor:
        """What another process needs."""
        return self._descriptor

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor at the begin of the data, aligned to a page, zero at first. It keeps the memory.

        Raises ValueError when the data is smaller.
        """
        flat = torch.from_numpy(self._bytes())
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > self.num_bytes:
            raise ValueError(f"a tensor of {size} bytes in {self.num_bytes} bytes of memory")
        return flat[:size].view(dtype).view(shape)

    def close(self) -> None:
        """Nobody can open it any more; so it is when this object is gone. Tensors keep it, and who has it mapped. Closing twice does nothing."""
        self._close_fd()
        self._mapped = None

    def _bytes(self) -> npt.NDArray[np.uint8]:
        if self._mapped is None:
            raise ValueError("the shared memory is closed")
        return np.frombuffer(self._mapped, np.uint8, offset=HEADER_BYTES, count=self.num_bytes)


class MappedMemory:
    """Memory of another process, mapped to be read."""

    def __init__(self, mapped: mmap.mmap, num_bytes: int) -> None:
        self._mapped: mmap.mmap | None = mapped
        self._num_bytes = num_bytes

    @classmethod
    def open(cls, descriptor: SharedMemoryDescriptor) -> "MappedMemory":
        """Raises PoolUnreachable with the reason."""
        if descriptor.boot_id != boot_id():
            raise PoolUnreachable(TRANSPORT, "it is on another host")
        if descriptor.pid_namespace != _pid_namespace():
            raise PoolUnreachable(TRANSPORT, "it is in another container (another pid namespace)")
        fd = _open(descriptor)
        try:
            opened = cls(_checked(fd, descriptor), descriptor.num_bytes)
        except (OSError, ValueError) as error:
            raise PoolUnreachable(TRANSPORT, f"its memory cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        _touch(opened.bytes())
        return opened

    def bytes(self) -> npt.NDArray[np.uint8]:
        """The data, [num_bytes], read-only. It stays mapped as long as this lives. Raises ConnectionError after `close`."""
        if self._mapped is None:
            raise ConnectionError("the pool is not mapped any more")
        return np.frombuffer(self._mapped, np.uint8, offset=HEADER_BYTES, count=self._num_bytes)

    def close(self) -> None:
        """Unmap it, in a thread: that takes up to tenths of a second per GB. Closing twice does nothing."""
        if self._mapped is not None:
            mapped, self._mapped = self._mapped, None
            threading.Thread(target=_unmap, args=(mapped,), name="unmap-pool", daemon=True).start()


def is_owner_gone(descriptor: SharedMemoryDescriptor) -> bool:
    """Whether the process that made the memory has ended, or closed it."""
    try:
        return not os.readlink(descriptor.link).startswith(_LINK_START)
    except OSError:
        return True


def _unmap(mapped: mmap.mmap) -> None:
    # Refused while someone has its bytes, an error's traceback maybe; the last that lets go of them unmaps it.
    with contextlib.suppress(BufferError):
        mapped.close()


def _filled(fd: int, num_bytes: int) -> mmap.mmap:
    """Size it, back it with memory, forbid that it ever changes its size, and map it."""
    size = HEADER_BYTES + num_bytes
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)
    # Who maps it can then read all of it, whatever its owner does.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE)


def _open(descriptor: SharedMemoryDescriptor) -> int:
    pid = descriptor.pid
    try:
        # Before it is opened: to open another kind of file may block, or do something.
        target = os.readlink(descriptor.link)
        if not target.startswith(_LINK_START):
            raise PoolUnreachable(TRANSPORT, f"process {pid} is another one by now, or has closed its pool")
        return os.open(descriptor.link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise PoolUnreachable(
            TRANSPORT, f"process {pid} belongs to another user: {error.strerror}"
        ) from error
    except FileNotFoundError as error:
        if Path(f"/proc/{pid}").exists():
            raise PoolUnreachable(TRANSPORT, f"process {pid} has closed its pool") from error
        raise PoolUnreachable(TRANSPORT, f"process {pid} is gone") from error
    except OSError as error:
        raise PoolUnreachable(TRANSPORT, f"process {pid}: {error.strerror}") from error


def _checked(fd: int, descriptor: SharedMemoryDescriptor) -> mmap.mmap:
    size = HEADER_BYTES + descriptor.num_bytes
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or about.st_size != size:
        raise PoolUnreachable(TRANSPORT, f"process {descriptor.pid} has a pool of another size there")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise PoolUnreachable(TRANSPORT, "its memory could shrink while it is read")
    header = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    if header != (_MAGIC, bytes.fromhex(descriptor.nonce), descriptor.num_bytes):
        raise PoolUnreachable(
            TRANSPORT, f"process {descriptor.pid} is another one by now: its pool is not the one meant"
        )
    # Not MAP_POPULATE: Python's call holds the interpreter until gigabytes are mapped.
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)


def _touch(data: npt.NDArray[np.uint8]) -> None:
    """Have all pages mapped: else the first pull of each meets some thousand page faults.

    numpy lets other threads run meanwhile.
    """
    for begin in range(0, data.size, TOUCHED_BYTES):
        data[begin : begin + TOUCHED_BYTES : mmap.PAGESIZE].max()


def boot_id() -> str:
    """Of this machine since it was started; all its containers have the same."""
    return _BOOT_ID.read_text().strip()


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
