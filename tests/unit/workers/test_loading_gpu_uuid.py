"""A worker on a GPU knows which one it is, so that its telemetry is on; tested without one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.tiny_model import write_tiny_gguf
from workers import loading
from workers.api import Device, EngineConfig, Phase, WorkerId, WorkerSpec


@pytest.mark.parametrize(("device", "uuid"), [(Device.CUDA, "GPU-6f2c"), (Device.CPU, None)])
def test_the_gpu_of_a_worker_is_named_as_nvml_names_it(
    device: Device, uuid: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_load_text", lambda *_arguments: SimpleNamespace(num_blocks=4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid="6f2c"))
    spec = WorkerSpec(
        WorkerId("w"),
        1,
        frozenset({Phase.DECODE}),
        str(write_tiny_gguf(tmp_path / "tiny.gguf")),
        device=device,
        engine=EngineConfig(),
    )
    assert loading.load(spec, lambda _what, _done: None).gpu_uuid == uuid
