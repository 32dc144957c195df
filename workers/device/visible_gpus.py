"""Which GPUs a worker's process sees: its own first, and then the others of the host, whose KV it can take straight from their memory.

Ray hides from a worker all GPUs but those that it hands to it. CUDA maps memory of none that is hidden, so that KV between two GPUs of one host would go by way
of the host's memory and gRPC. Nothing is computed on the others.
"""

import logging
import os
from collections.abc import MutableMapping, Sequence
from typing import Any

from kvtransfer.config import TransportChoice
from workers.api import Device, WorkerSpec
from workers.device.nvml import NvmlUnavailable, gpu_uuids, open_nvml

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"


def see_others(
    spec: WorkerSpec, *, environment: MutableMapping[str, str] = os.environ, nvml: Any = None
) -> None:
    """For a worker that may take KV by CUDA IPC, before its process uses the GPU; nothing happens where NVML does not say which GPUs there are.

    A tensor-parallel group counts its GPUs by what it sees, and a client of MPS has what its daemon has: these see their own alone. nvml: the module to ask; opened when None.
    """
    visible = environment.get(VISIBLE)
    is_alone = spec.engine.tensor_parallel > 1 or spec.sm_percentage is not None
    if spec.device is not Device.CUDA or visible is None or is_alone:
        return
    if spec.kv_transfer.transport not in (TransportChoice.AUTO, TransportChoice.CUDA_IPC):
        return
    try:
        found = with_others(visible, gpu_uuids(nvml if nvml is not None else open_nvml()))
    except NvmlUnavailable as error:
        logger.info("other_gpus_not_seen worker_id=%s reason=%s", spec.worker_id, error)
        return
    if found != visible:
        environment[VISIBLE] = found
        logger.info("other_gpus_seen worker_id=%s own=%s visible=%s", spec.worker_id, visible, found)


def with_others(visible: str, uuids: Sequence[str]) -> str:
    """CUDA_VISIBLE_DEVICES with all GPUs of the host behind those that it names; as it is where it names none, or instances of MIG.

    uuids: of all, in the order in which they are numbered.
    """
    own = [name.strip() for name in visible.split(",")]
    if all(name.isdecimal() for name in own):
        others = [str(index) for index in range(len(uuids)) if index not in map(int, own)]
    elif all(name.startswith("GPU-") for name in own):
        others = [uuid for uuid in uuids if not uuid.startswith(tuple(own))]
    else:
        return visible
    return ",".join((*own, *others))
