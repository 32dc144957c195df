"""What this kind of worker cannot do is refused when it starts."""

from dataclasses import replace

import pytest

from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.errors import TransportUnavailable
from workers.api import Device, EngineConfig, Phase, SpanReuseConfig, WeightDtype, WorkerId, WorkerSpec
from workers.device.placing import check_spec
from workers.errors import NotOnGpu
from workers.loading import load


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
