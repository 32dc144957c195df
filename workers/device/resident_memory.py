"""Tensors of a GPU that one process owns and others map: weights and the KV pool, which outlive the processes that compute.

The owner computes nothing. A worker whose share of the SMs changes is a new process: it maps the same memory in milliseconds where
loading takes seconds (semi-PD, resident process). Several tensors of one allocation share a handle, which is opened once.

When a process that mapped them dies, nothing happens to the others: its mappings go with it. When the owner dies, what is mapped stays
readable until the last mapping is closed, and nobody can map it any more: `AttachedMemory.is_owner_gone` tells; its workers go on
with what they have until a new owner is there, and are started anew then.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kvtransfer.transports import cuda_driver
from kvtransfer.transports.cuda_driver import Allocation, CudaDriverError
from kvtransfer.transports.cuda_mapping import ProcessIdentity, bytes_at, device_uuid, this_process
from workers.errors import ResidentMemoryGone, SharingUnsupported

logger = logging.getLogger(__name__)

_VERSION = 1


class ResidentMemory:
    """Tensors that other processes may map, as long as this one lives and keeps this. Of one GPU.

    manifest: what `attach` takes; any bytes that reach the other process. Raises SharingUnsupported when CUDA does not share them,
    and ValueError for none, or for tensors of a CPU or of several GPUs.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            raise ValueError(f"tensors are of {sorted(map(str, devices))}; all are to be of one GPU")
        self._tensors = dict(tensors)
        index = next(iter(self._tensors.values())).get_device()
        torch.cuda.synchronize(index)
        allocations: dict[Allocation, str] = {}
        described = {}
        try:
            for name, tensor in self._tensors.items():
                place = (0, 0)
                # One without values lies nowhere.
                if tensor.numel():
                    allocation = cuda_driver.allocation_of(index, tensor.data_ptr())
                    if allocation not in allocations:
                        allocations[allocation] = cuda_driver.ipc_handle(index, allocation).hex()
                    place = (list(allocations).index(allocation), tensor.data_ptr() - allocation.address)
                described[name] = _describe(tensor, place)
        except CudaDriverError as error:
            remedy = (
                "run it without expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF)"
            )
            raise SharingUnsupported("CUDA IPC", str(error), remedy) from error
        about = {
            "version": _VERSION,
            "device_uuid": device_uuid(index),
            "owner": asdict(this_process()),
            "handles": list(allocations.values()),
            "tensors": described,
        }
        self.manifest = json.dumps(about, separators=(",", ":")).encode()


class AttachedMemory:
    """The tensors of another process, mapped here; made by `attach`. Views of them must be gone before `close`."""

    def __init__(
        self, owner: ProcessIdentity, tensors: dict[str, torch.Tensor], close: Callable[[], None]
    ) -> None:
        self.tensors = tensors
        self._owner = owner
        self._close: Callable[[], None] | None = close

    @property
    def is_owner_gone(self) -> bool:
        """Whether its process has ended. False where that cannot be seen, as in another container."""
        return self._owner.has_ended

    def close(self) -> None:
        """Wait for this process's work on the GPU, and unmap. Closing twice does nothing."""
        if self._close is not None:
            self.tensors.clear()
            self._close()
            self._close = None


def attach(manifest: bytes) -> AttachedMemory:
    """Map what `ResidentMemory` of another process described. Raises ResidentMemoryGone."""
    about = _parse(manifest)
    owner = ProcessIdentity(**about["owner"])
    if owner.is_this_process:
        raise ResidentMemoryGone(owner.pid, "it is this same process, which CUDA does not map")
    if owner.has_ended:
        raise ResidentMemoryGone(owner.pid, "it has ended")
    index = device_of(manifest)
    mapped: list[Allocation] = []

    def close() -> None:
        torch.cuda.synchronize(index)
        for allocation in mapped:
            try:
                cuda_driver.close_ipc_handle(index, allocation.address)
            except CudaDriverError as error:
                # Nothing that anybody could do: it goes with the process.
                logger.warning("resident_memory_unmap_failed reason=%s", error)

    try:
        for handle in about["handles"]:
            mapped.append(cuda_driver.open_ipc_handle(index, bytes.fromhex(handle)))  # noqa: PERF401 - closed one by one
        tensors = {name: _tensor(one, mapped, index) for name, one in about["tensors"].items()}
    except (CudaDriverError, ValueError, RuntimeError) as error:
        close()
        raise ResidentMemoryGone(owner.pid, str(error)) from error
    return AttachedMemory(owner, tensors, close)


def device_of(manifest: bytes) -> int:
    """Which GPU of this process the memory is of. Raises ResidentMemoryGone when it is none."""
    about = _parse(manifest)
    visible = [device_uuid(index) for index in range(torch.cuda.device_count())]
    if about["device_uuid"] not in visible:
        raise ResidentMemoryGone(about["owner"]["pid"], f"its GPU {about['device_uuid']} is not visible here")
    return visible.index(about["device_uuid"])


def _describe(tensor: torch.Tensor, place: tuple[int, int]) -> dict[str, Any]:
    """place: number of its allocation, and bytes from there."""
    return {
        "allocation": place[0],
        "offset": place[1],
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


def _parse(manifest: bytes) -> Any:
    about = json.loads(manifest)
    if about["version"] != _VERSION:
        raise ResidentMemoryGone(
            about["owner"]["pid"], f"it speaks version {about['version']}, not {_VERSION}"
        )
    return about


def _tensor(about: Mapping[str, Any], mapped: Sequence[Allocation], device_index: int) -> torch.Tensor:
    """Raises ValueError when it does not lie within its allocation."""
    dtype, shape, stride = getattr(torch, about["dtype"]), about["shape"], about["stride"]
    if 0 in shape:
        return torch.empty_strided(shape, stride, dtype=dtype, device=torch.device("cuda", device_index))
    allocation, offset = mapped[about["allocation"]], about["offset"]
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    num_bytes = reach * dtype.itemsize
    if offset < 0 or offset + num_bytes > allocation.num_bytes:
        raise ValueError(f"{num_bytes} bytes from {offset} on of an allocation of {allocation.num_bytes}")
    flat = bytes_at(allocation.address + offset, num_bytes).view(dtype)
    return torch.as_strided(flat, shape, stride)
