"""A GPU that cannot be used, or has too little memory, is refused with what to do; tested without one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phasewise_kernels.fp8_linear.reference import quantise_reference
from tests.support.device_engine import ENGINE, TINY, random_weights
from workers.api import Device, EngineConfig, KvDtype, Phase, WeightDtype, WorkerId, WorkerSpec
from workers.device import gpu, placing
from workers.device.dtypes import needed_capability
from workers.device.memory import GpuMemory
from workers.errors import GpuUnavailable, KvCacheTooSmall, OutOfMemory
from workers.model import fp8

CPU = torch.device("cpu")
LAYOUT = TINY.kv_layout(block_size=16, dtype="bfloat16", model_digest="d", weight_dtype="bfloat16")
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


def test_a_gpu_that_does_not_multiply_fp8_is_refused_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "A100")
    for engine in (EngineConfig(weight_dtype=WeightDtype.FP8), EngineConfig(kv_dtype=KvDtype.FP8)):
        with pytest.raises(
            GpuUnavailable,
            match=r"A100 has compute capability 8\.0 and 8\.9 is needed for fp8; use a newer GPU, or neither engine",
        ):
            gpu.open_gpu(needed_capability=needed_capability(engine))
    assert needed_capability(EngineConfig(weight_dtype=WeightDtype.BFLOAT16)) == (8, 0)


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
    weights = gpu.load_to_gpu(tmp_path / "weights", CPU, WeightDtype.BFLOAT16, 0.9, told.append)
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].bfloat16()) for name in stored)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_matrices_are_quantised_as_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_memory", lambda _device: GpuMemory(MIB, MIB))
    # Pieces of three rows.
    monkeypatch.setattr(fp8, "PIECE_VALUES", 3 * TINY.hidden_size)
    config = replace(TINY, num_layers=1, has_qkv_bias=True, tie_embeddings=False)
    stored = random_weights(config)
    save_file(stored, tmp_path / "weights")
    weights = gpu.load_to_gpu(tmp_path / "weights", CPU, WeightDtype.FP8, 1.0, nothing)
    for name, values in stored.items():
        if name in ("layers.0.qkv", "layers.0.attention_out", "layers.0.gate_up", "layers.0.down"):
            numbers, scales = quantise_reference(values)
            assert torch.equal(weights.pop(name).view(torch.uint8), numbers.view(torch.uint8))
            assert torch.equal(weights.pop(f"{name}_scales"), scales[:, 0])
        else:
            assert torch.equal(weights.pop(name), values.bfloat16())
    assert not weights


def test_room_is_needed_for_what_fp8_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"layers.0.down": torch.zeros(32, 64), "norm": torch.zeros(64)}
    save_file(stored, tmp_path / "weights")
    needed = 32 * 64 + 32 * 4 + 64 * 2
    for free, is_enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(gpu, "gpu_memory", lambda _device, free=free: GpuMemory(free, free))
        if is_enough:
            found = gpu.load_to_gpu(tmp_path / "weights", CPU, WeightDtype.FP8, 1.0, nothing)
            assert sum(one.nbytes for one in found.values()) == needed
        else:
            with pytest.raises(OutOfMemory):
                gpu.load_to_gpu(tmp_path / "weights", CPU, WeightDtype.FP8, 1.0, nothing)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_memory", lambda _device: GpuMemory(100, 200, 100))
    save_file({"a": torch.zeros(64)}, tmp_path / "weights")
    with pytest.raises(OutOfMemory, match=r"weights on the GPU.*raise engine.gpuMemoryFraction"):
        gpu.load_to_gpu(tmp_path / "weights", CPU, WeightDtype.BFLOAT16, 0.9, nothing)


def taken(
    monkeypatch: pytest.MonkeyPatch, free_mib: int, kv_cache_bytes: int, total_mib: int = 100
) -> torch.Tensor:
    """The KV cache that is taken when so much of 100 MiB is free, the rest is ours, and a step needs 10; others hold what is beyond."""
    memory = GpuMemory(free_mib * MIB, total_mib * MIB, (100 - free_mib) * MIB)
    monkeypatch.setattr(placing, "gpu_memory", lambda _device: memory)
    engine = replace(ENGINE, kv_cache_bytes=kv_cache_bytes, gpu_memory_fraction=0.9)
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", engine=engine, device=Device.CUDA)
    return placing._take_kv_cache(spec, LAYOUT, 10 * MIB, CPU, nothing)


def test_kv_takes_what_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kv_cache = taken(monkeypatch, 60, 0)
    assert not caplog.records
    assert 40 * MIB - LAYOUT.block_bytes < kv_cache.nbytes <= 40 * MIB
    assert kv_cache.dtype is torch.bfloat16


def test_kv_that_others_leave_little_for_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert taken(monkeypatch, 60, 0, 4000).nbytes <= 50 * MIB
    assert "others hold 3500 MiB of what engine.gpuMemoryFraction 0.9 gives" in caplog.text
    caplog.clear()
    taken(monkeypatch, 60, 7 * MIB, 4000)
    assert not caplog.records


def test_kv_takes_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 7 * MIB - LAYOUT.block_bytes < taken(monkeypatch, 60, 7 * MIB).nbytes <= 7 * MIB


def test_kv_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemory, match=r"KV cache on the GPU: needs 41 MiB.* 40 MiB are available; lower"):
        taken(monkeypatch, 60, 41 * MIB)
    with pytest.raises(OutOfMemory, match="0 MiB are available"):
        taken(monkeypatch, 15, 0)
    with pytest.raises(KvCacheTooSmall):
        taken(monkeypatch, 60, 1)
