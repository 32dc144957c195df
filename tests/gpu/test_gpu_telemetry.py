"""NVML on a real GPU.

    python -m pytest tests/gpu/test_gpu_telemetry.py -q

needs torch with CUDA and nvidia-ml-py.
"""

import pytest
import torch

from workers.device.gpu_telemetry import GpuTelemetry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]


def test_a_gpu_that_is_well_answers_every_question() -> None:
    properties = torch.cuda.get_device_properties(0)
    told: list[str] = []
    telemetry = GpuTelemetry(f"GPU-{properties.uuid}", on_unhealthy=told.append)
    telemetry.start()
    held = torch.ones(1 << 28, device="cuda")
    telemetry.sample()
    status = telemetry.status
    telemetry.stop()
    assert (status.name, status.missing, status.problem, told) == (properties.name, "", "", [])
    assert status.memory_used_bytes is not None
    assert status.memory_used_bytes > held.nbytes
    assert status.memory_total_bytes is not None
    assert status.memory_total_bytes >= properties.total_memory
    assert None not in (status.utilisation, status.sm_clock_mhz, status.power_w, status.temperature_c)
    assert None not in (status.max_sm_clock_mhz, status.power_limit_w, status.ecc_uncorrected)
