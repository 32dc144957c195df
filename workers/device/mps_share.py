"""A worker's share of a GPU's SMs by MPS: taken before its process first uses the GPU, and looked at when it has."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from workers.api import WorkerSpec
from workers.device.capability import PIPE_DIRECTORY, mig_refusal
from workers.device.device_facts import is_mig
from workers.device.mps import COMMAND
from workers.device.mps_member import ROOT, MpsMember, join
from workers.device.nvml import NvmlUnavailable, gpu_uuids, open_nvml
from workers.errors import GpuUnavailable, SharingUnsupported

logger = logging.getLogger(__name__)


def take_share(
    spec: WorkerSpec, *, nvml: Any = None, command: str = COMMAND, root: Path = ROOT
) -> MpsMember | None:
    """What this process is a member of from now on, with its environment set; None for a worker without a share.

    nvml: the module to ask; opened when None. Raises SharingUnsupported, GpuUnavailable and MpsFailed.
    """
    percentage = spec.sm_percentage
    if percentage is None:
        return None
    setting = f"resources.smPercentage {percentage:g}"
    try:
        nvml = nvml if nvml is not None else open_nvml()
        uuid = first_gpu(os.environ, nvml)
    except NvmlUnavailable as error:
        problem = f"which GPU it is cannot be told before it is used: {error}"
        raise SharingUnsupported(
            setting, problem, "see to that, or leave resources.smPercentage out"
        ) from error
    refusal = mig_refusal(is_mig=uuid.startswith("MIG-") or is_mig(uuid, nvml))
    if refusal is not None:
        raise SharingUnsupported(setting, refusal.problem, refusal.remedy)
    try:
        member = join(uuid, command=command, root=root)
    except SharingUnsupported as error:
        remedy = "install the driver's compute utilities, mount them into the container, or leave resources.smPercentage out"
        raise SharingUnsupported(setting, error.problem, remedy) from error
    earlier = os.environ.get(PIPE_DIRECTORY)
    if earlier not in (None, str(member.folder)):
        member.leave()
        problem = f"{PIPE_DIRECTORY} is {earlier}, of another MPS daemon than the one that workers share"
        raise SharingUnsupported(setting, problem, "unset it where Ray or the worker is started")
    os.environ.update(member.environment(percentage))
    return member


def sm_count(spec: WorkerSpec, member: MpsMember) -> int:
    """SMs of the share that this process, which has used the GPU, has got. Raises MpsFailed."""
    member.check()
    found = int(torch.cuda.get_device_properties(0).multi_processor_count)
    logger.info(
        "sm_share_taken worker_id=%s sm_percentage=%g sm_count=%d folder=%s",
        spec.worker_id,
        spec.sm_percentage,
        found,
        member.folder,
    )
    return found


def first_gpu(environment: Mapping[str, str], nvml: Any) -> str:
    """UUID of the first GPU that a process with this environment sees, told without using it.

    A number is NVML's; where GPUs differ CUDA may have another order, and workers that name one GPU in two ways would have two daemons.
    Raises GpuUnavailable, and NvmlUnavailable where NVML knows none.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
    name = visible.split(",")[0].strip()
    if name.startswith("MIG-"):
        return name
    uuids = gpu_uuids(nvml)
    if name.isdecimal():
        found = uuids[int(name) : int(name) + 1]
    else:
        # Its beginning will do for CUDA.
        found = [uuid for uuid in uuids if name and uuid.startswith(name)]
    if not found:
        raise GpuUnavailable(
            f"CUDA_VISIBLE_DEVICES={visible!r} names none of {', '.join(uuids) or 'no GPU'}",
            "see what nvidia-smi -L lists and what hides it (Ray hides it from a worker whose resources.gpus is 0 where "
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1)",
        )
    return found[0]
