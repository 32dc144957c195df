"""A way for KV that this kind of worker cannot go is refused when it starts."""

import pytest

from kvtransfer.config import KvTransferConfig, TransportChoice
from kvtransfer.errors import TransportUnavailable
from workers.api import Phase, WorkerId, WorkerSpec
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
