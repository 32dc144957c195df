"""Workers of device cuda whose GPU is this CPU: the same code, without streams, graphs and kernels."""

import pytest
import torch

from workers import loading
from workers.device import gpu, pictures, placing
from workers.device.memory import GpuMemory

ROOMY = GpuMemory(8 * 2**30, 8 * 2**30)


def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch, memory: GpuMemory = ROOMY) -> None:
    """memory: what the GPU has, whatever is taken of it."""
    for module in (pictures, placing):
        monkeypatch.setattr(module, "open_gpu", lambda **_: torch.device("cpu"))
    for module in (gpu, placing):
        monkeypatch.setattr(module, "gpu_memory", lambda _device: memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "none")
    # Without a name there is no telemetry.
    monkeypatch.setattr(loading, "gpu_uuid", lambda: None)
