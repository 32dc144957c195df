"""A GPU that cannot be used, or has too little memory, is refused with what to do; tested without one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.device_engine import ENGINE, TINY
from workers.api import Device, Phase, WorkerId, WorkerSpec
from workers.device import gpu, placing
from workers.device.memory import GpuMemory
from workers.errors import GpuUnavailable, KvCacheTooSmall, OutOfMemory

CPU = torch.device("cpu")
LAYOUT = TINY.kv_layout(block_size=16, dtype="bfloat16", model_digest="d")
MIB = 2**20


def nothing(*_progress: object) -> None:
    """Nobody is told."""


def test_torch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        GpuUnavailable, match=r"was built without CUDA; install torch with CUDA, or use device cpu"
    ):
        gpu.open_gpu()


def test_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GpuUnavailable, match="CUDA finds none; see that nvidia-smi lists one"):
        gpu.open_gpu()


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "T4")
    with pytest.raises(GpuUnavailable, match=r"T4 has compute capability 7\.5 and 8\.0 is needed"):
        gpu.open_gpu()


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        GpuUnavailable, match=r"tensorParallel is 2 and this process sees 1; set resources.gpus: 2"
    ):
        gpu.open_gpu(0, 2)


def test_weights_are_converted_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_memory", lambda _device: GpuMemory(MIB, MIB))
    stored = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    save_file(stored, tmp_path / "weights")
    told: list[float] = []
    weights = gpu.load_to_gpu(tmp_path / "weights", CPU, torch.bfloat16, 0.9, told.append)
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].bfloat16()) for name in stored)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_memory", lambda _device: GpuMemory(100, 200, 100))
    save_file({"a": torch.zeros(64)}, tmp_path / "weights")
    with pytest.raises(OutOfMemory, match=r"weights on the GPU.*raise engine.gpuMemoryFraction"):
        gpu.load_to_gpu(tmp_path / "weights", CPU, torch.bfloat16, 0.9, nothing)


def taken(monkeypatch: pytest.MonkeyPatch, free_mib: int, kv_cache_bytes: int) -> torch.Tensor:
    """The KV cache that is taken when so much of 100 MiB is free, the rest is ours, and a step needs 10."""
    memory = GpuMemory(free_mib * MIB, 100 * MIB, (100 - free_mib) * MIB)
    monkeypatch.setattr(placing, "gpu_memory", lambda _device: memory)
    engine = replace(ENGINE, kv_cache_bytes=kv_cache_bytes, gpu_memory_fraction=0.9)
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", engine=engine, device=Device.CUDA)
    return placing._take_kv_cache(spec, LAYOUT, 10 * MIB, CPU, nothing)


def test_kv_takes_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache = taken(monkeypatch, 60, 0)
    assert 40 * MIB - LAYOUT.block_bytes < kv_cache.nbytes <= 40 * MIB
    assert kv_cache.dtype is torch.bfloat16


def test_kv_takes_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 7 * MIB - LAYOUT.block_bytes < taken(monkeypatch, 60, 7 * MIB).nbytes <= 7 * MIB


def test_kv_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemory, match=r"KV cache on the GPU: needs 41 MiB.* 40 MiB are available; lower"):
        taken(monkeypatch, 60, 41 * MIB)
    with pytest.raises(OutOfMemory, match="0 MiB are available"):
        taken(monkeypatch, 15, 0)
    with pytest.raises(KvCacheTooSmall):
        taken(monkeypatch, 60, 1)
