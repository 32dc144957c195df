"""A worker on a GPU knows which one it is, so that its telemetry is on, and how many of its SMs it has; tested without one."""

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
    loaded = loading.load(spec, lambda _what, _done: None)
    assert (loaded.gpu_uuid, loaded.sm_count) == (uuid, None)


def test_a_share_of_the_sms_is_taken_before_the_gpu_is_used_and_looked_at_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def use_gpu(*_arguments: object) -> SimpleNamespace:
        calls.append("used")
        return SimpleNamespace(num_blocks=4)

    def check() -> None:
        calls.append("checked")

    def take(spec: WorkerSpec) -> SimpleNamespace:
        calls.append(f"took {spec.sm_percentage:g}")
        return SimpleNamespace(check=check, folder=tmp_path)

    monkeypatch.setattr(loading, "take_share", take)
    monkeypatch.setattr(loading, "_load_text", use_gpu)
    properties = SimpleNamespace(uuid="6f2c", multi_processor_count=66)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    path = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    phases = frozenset({Phase.DECODE})
    spec = WorkerSpec(WorkerId("w"), 1, phases, path, device=Device.CUDA, sm_percentage=50)
    assert loading.load(spec, lambda _what, _done: None).sm_count == 66
    assert calls == ["took 50", "used", "checked"]
