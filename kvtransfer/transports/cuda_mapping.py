"""What sharing memory of a GPU between processes needs beside the driver: who a process is, and a tensor over mapped bytes."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: A pid means little between containers, and a forked child has what its parent had: both name a process.
_START = secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, told apart from a later one with its pid.

    ticks: when it began, in ticks since the machine did, as its own namespace has it. start: drawn at random when it began.
    """

    pid: int
    pid_namespace: str
    ticks: int | None
    start: str

    @property
    def is_this_process(self) -> bool:
        """Whether it is the one that asks."""
        return (self.pid, self.start) == (os.getpid(), _START)

    @property
    def has_ended(self) -> bool:
        """False where that cannot be seen, as in another container."""
        return self.pid_namespace == _pid_namespace() and self.ticks != _ticks(self.pid)


def this_process() -> ProcessIdentity:
    """The one that asks."""
    return ProcessIdentity(os.getpid(), _pid_namespace(), _ticks(os.getpid()), _START)


def device_uuid(device_index: int) -> str:
    """Of a GPU of this process, without NVML's prefix."""
    return str(torch.cuda.get_device_properties(device_index).uuid)


def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8, not copied, on the device that CUDA says: with another one named it would be a copy. The memory must outlive the tensor."""
    about = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 2}
    return torch.as_tensor(_CudaArray(about))


@dataclass(frozen=True, slots=True)
class _CudaArray:
    """Memory that torch takes as it is: it asks for this attribute."""

    __cuda_array_interface__: dict[str, Any]


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _ticks(pid: int) -> int | None:
    """None when it has ended. A pid alone is used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which may hold anything: the state, ..., and the time as the 22nd field of all.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
