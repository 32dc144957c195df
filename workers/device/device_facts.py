"""What `capability.py` wants to know of a GPU, asked of torch, the driver and NVML."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from kvtransfer.transports.cuda_driver import CudaDriverError, driver_version
from workers.device.capability import DeviceFacts
from workers.device.nvml import NvmlUnavailable, open_nvml


def device_facts(device_index: int = 0) -> DeviceFacts | None:
    """Of this GPU of the process; None when it sees none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device_index)
    try:
        driver = driver_version()
    except CudaDriverError:
        driver = 0
    return DeviceFacts(
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        driver=driver,
        is_mig=_is_mig(f"GPU-{properties.uuid}"),
        bindings=_bindings(),
        mps_control=shutil.which("nvidia-cuda-mps-control") or "",
        environment={name: value for name, value in os.environ.items() if name.startswith("CUDA_MPS_")},
    )


def _bindings() -> str:
    try:
        return version("cuda-bindings")
    except PackageNotFoundError:
        return ""


def _is_mig(uuid: str) -> bool | None:
    try:
        nvml = open_nvml()
    except NvmlUnavailable:
        return None
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError as error:
        # Of a GPU that has no MIG: every other one says what it is.
        return False if error.value == nvml.NVML_ERROR_NOT_SUPPORTED else None
    return bool(current)
