"""What describes shared tensors, without a GPU: the driver's handles are made up, the memory is that of the host."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvtransfer.transports import cuda_driver
from kvtransfer.transports.cuda_driver import Allocation, CudaDriverError
from workers.device import resident_memory
from workers.device.resident_memory import ResidentMemory, attach
from workers.errors import ResidentMemoryGone


def manifest(**changes: Any) -> bytes:
    """Of two tensors in one allocation of 4096 bytes, whose owner is in another container."""
    return json.dumps(
        {
            "version": 1,
            "device_uuid": "gpu-1",
            "owner": {"pid": 7, "pid_namespace": "pid:[1]", "ticks": 5, "start": "abc"},
            "handles": ["00" * 64],
            "tensors": {
                "a": {"allocation": 0, "offset": 512, "shape": [2, 3], "stride": [3, 1], "dtype": "float32"},
                "b": {"allocation": 0, "offset": 4092, "shape": [1], "stride": [1], "dtype": "float32"},
            },
            **changes,
        }
    ).encode()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was opened and closed, in order."""
    log: list[str] = []
    host = torch.arange(4096, dtype=torch.int32).to(torch.uint8)

    def open_handle(_device: int, _handle: bytes) -> Allocation:
        log.append("open")
        return Allocation(host.data_ptr(), 4096)

    def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
        start = address - host.data_ptr()
        return host[start : start + num_bytes]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: log.append("wait"))
    monkeypatch.setattr(resident_memory, "device_uuid", lambda _index: "gpu-1")
    monkeypatch.setattr(resident_memory, "bytes_at", bytes_at)
    monkeypatch.setattr(cuda_driver, "open_ipc_handle", open_handle)
    monkeypatch.setattr(cuda_driver, "close_ipc_handle", lambda _device, _address: log.append("close"))
    yield log
    assert log.count("open") == log.count("close")


def test_tensors_of_one_allocation_open_it_once_and_are_closed_after_the_work(opened: list[str]) -> None:
    memory = attach(manifest())
    assert memory.tensors["a"].shape == (2, 3)
    assert memory.tensors["a"].dtype == torch.float32
    assert not memory.is_owner_gone
    memory.close()
    memory.close()
    assert opened == ["open", "wait", "close"]
    assert memory.tensors == {}


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ({"offset": 4093, "shape": [1], "stride": [1]}, "4 bytes from 4093 on of an allocation of 4096"),
        ({"offset": -4, "shape": [1], "stride": [1]}, "from -4 on"),
        ({"offset": 0, "shape": [2, 2], "stride": [1023, 1]}, "4100 bytes from 0 on"),
    ],
)
def test_a_tensor_beyond_its_allocation_is_refused_and_nothing_stays_mapped(
    opened: list[str], tensor: dict[str, Any], problem: str
) -> None:
    wrong = {"a": {"allocation": 0, "dtype": "float32", **tensor}}
    with pytest.raises(ResidentMemoryGone, match=problem):
        attach(manifest(tensors=wrong))
    assert opened == ["open", "wait", "close"]


def test_when_the_second_allocation_cannot_be_mapped_the_first_is_unmapped(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_one = cuda_driver.open_ipc_handle

    def open_but_one(device: int, handle: bytes) -> Allocation:
        if handle[0]:
            raise CudaDriverError("cuIpcOpenMemHandle_v2", "CUDA_ERROR_INVALID_VALUE")
        return open_one(device, handle)

    monkeypatch.setattr(cuda_driver, "open_ipc_handle", open_but_one)
    with pytest.raises(ResidentMemoryGone, match=r"process 7 .*INVALID_VALUE; start its owner again"):
        attach(manifest(handles=["00" * 64, "01" * 64]))
    assert opened == ["open", "wait", "close"]


def test_another_version_and_another_gpu_are_refused(opened: list[str]) -> None:
    with pytest.raises(ResidentMemoryGone, match="version 2, not 1"):
        attach(manifest(version=2))
    with pytest.raises(ResidentMemoryGone, match="GPU gpu-2 is not visible here"):
        attach(manifest(device_uuid="gpu-2"))
    assert opened == []


def test_memory_of_a_host_is_not_shared_this_way() -> None:
    with pytest.raises(ValueError, match="all are to be of one GPU"):
        ResidentMemory({"a": torch.zeros(4)})
    with pytest.raises(ValueError, match="all are to be of one GPU"):
        ResidentMemory({})
