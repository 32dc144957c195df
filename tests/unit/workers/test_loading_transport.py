"""What this kind of worker cannot do is refused when it starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.errors import TransportUnavailable
from tests.support.device_engine import TINY
from tests.support.tiny_vision_models import write_vision_folder
from tests.support.worker_client import BOTH, worker_spec
from workers.api import (
    Device,
    EngineConfig,
    KvDtype,
    Phase,
    PhaseSharing,
    SpanReuseConfig,
    StepBudget,
    WeightDtype,
    WorkerId,
    WorkerSpec,
)
from workers.device.placing import check_dtypes, check_spec
from workers.errors import NotOnCpu, NotOnGpu, SharingUnsupported, UnsupportedModel
from workers.loading import load

SPLIT = EngineConfig(step_budget=StepBudget.PREDICTED, phase_sharing=PhaseSharing.PREDICTED)


def test_memory_of_a_gpu_is_not_asked_of_a_worker_that_has_its_kv_in_memory_of_the_host() -> None:
    config = KvTransferConfig(transport=TransportChoice.CUDA_IPC)
    phases = frozenset({Phase.DECODE})
    spec = WorkerSpec(WorkerId("w"), 1, phases, "no-such-model", kv_transfer=config)
    with pytest.raises(TransportUnavailable) as caught:
        load(spec, lambda *_progress: None)
    assert str(caught.value) == (
        "the transport cuda_ipc cannot be used here: the KV cache of this worker is in memory of the host, "
        "not of a GPU; set kvTransfer.transport to auto, shm or grpc"
    )


@pytest.mark.parametrize("choice", [TransportChoice.SHM, TransportChoice.IN_PROCESS, TransportChoice.NIXL])
def test_memory_of_the_host_is_not_asked_of_a_worker_that_has_its_kv_on_a_gpu(
    choice: TransportChoice,
) -> None:
    config = KvTransferConfig(transport=choice)
    phases = frozenset({Phase.DECODE})
    spec = WorkerSpec(WorkerId("w"), 1, phases, "no-such-model", kv_transfer=config, device=Device.CUDA)
    with pytest.raises(TransportUnavailable, match="in memory of a GPU, not of the host"):
        load(spec, lambda *_progress: None)


def test_what_a_cpu_does_not_compute_with_is_refused() -> None:
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "no-such-model")
    for engine, says in (
        (EngineConfig(weight_dtype=WeightDtype.FP8), "engine.weightDtype fp8 is not supported on a CPU; use"),
        (
            EngineConfig(kv_dtype=KvDtype.FP8),
            "engine.kvDtype fp8 is not supported on a CPU; use auto, or a GPU",
        ),
        (EngineConfig(weight_dtype=WeightDtype.FP8, tensor_parallel=2), "not supported on a CPU"),
    ):
        with pytest.raises(NotOnCpu, match=says):
            load(replace(spec, engine=engine), lambda *_progress: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": Device.CPU}, "cannot be had on a CPU, which has no SMs to divide; use mixed"),
        ({"engine": replace(SPLIT, tensor_parallel=2)}, "cannot be had over 2 devices, whose ranks compute"),
        ({"engine": replace(SPLIT, step_budget=StepBudget.FIXED)}, "cannot be had with a fixed step budget"),
    ],
)
def test_a_worker_whose_steps_are_not_split_is_not_asked_to(change: dict[str, Any], says: str) -> None:
    spec = WorkerSpec(WorkerId("w"), 1, BOTH, "no-such-model", device=Device.CUDA, engine=SPLIT)
    with pytest.raises(SharingUnsupported, match=f"^engine.phaseSharing predicted: {says}"):
        load(replace(spec, **change), lambda *_progress: None)


@pytest.mark.parametrize("dtype", [WeightDtype.FLOAT32, WeightDtype.INT8])
def test_the_layout_of_kv_names_what_weights_are_kept_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: WeightDtype
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_vision_folder(tmp_path)
    spec = worker_spec(tmp_path, frozenset({Phase.DECODE}), weight_dtype=dtype)
    text = load(spec, lambda *_progress: None).text
    assert text is not None
    assert text.pool.layout.weight_dtype == dtype
    text.runner.close()
    text.compiler.close()


def test_matrices_of_odd_sizes_are_refused_in_fp8_alone() -> None:
    config = replace(TINY, intermediate_size=264)
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", device=Device.CUDA)
    check_dtypes(spec, config)
    spec = replace(spec, engine=EngineConfig(weight_dtype=WeightDtype.FP8))
    check_dtypes(spec, TINY)
    with pytest.raises(UnsupportedModel, match=r"has 128 x 264 numbers in down, with .*multiples of 16"):
        check_dtypes(spec, config)


def test_heads_that_cannot_be_turned_are_refused_with_kv_in_four_bits_alone() -> None:
    config = replace(TINY, head_dim=80)
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", device=Device.CUDA)
    check_dtypes(spec, config)
    spec = replace(spec, engine=EngineConfig(kv_dtype=KvDtype.INT4))
    check_dtypes(spec, TINY)
    with pytest.raises(
        UnsupportedModel, match=r"heads of 80 channels, with engine.kvDtype int4.*power of two"
    ):
        check_dtypes(spec, config)


def test_kv_in_fp8_of_a_model_whose_keys_may_be_large_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", device=Device.CUDA)
    fp8 = replace(spec, engine=EngineConfig(kv_dtype=KvDtype.FP8))
    with_bias = replace(TINY, has_qkv_bias=True)
    check_dtypes(spec, with_bias)
    check_dtypes(fp8, TINY)
    assert not caplog.records
    check_dtypes(fp8, with_bias)
    assert "kv_in_fp8_may_saturate worker_id=w" in caplog.text


def test_what_a_gpu_does_not_compute_is_refused() -> None:
    spec = WorkerSpec(WorkerId("w"), 1, frozenset({Phase.DECODE}), "m", device=Device.CUDA)
    check_spec(spec)
    for engine, says in (
        (
            EngineConfig(weight_dtype=WeightDtype.INT8),
            "engine.weightDtype int8 is not supported on a GPU; use float32",
        ),
        (
            EngineConfig(span_reuse=SpanReuseConfig()),
            "engine.spanReuse is not supported on a GPU; leave it out",
        ),
    ):
        with pytest.raises(NotOnGpu, match=says):
            check_spec(replace(spec, engine=engine))
