"""Weights of a text model that all workers of one GPU have in memory once: a keeper loads them, workers map them.

Keeper and workers are processes of one user. What decides the bytes is in the keeper's name: the GPU, the model as it was converted, and
the dtype of the weights. A worker is a member while it has them mapped (`keeper`); a new one maps them in milliseconds, as long as
the keeper lives. When that was killed, workers go on with what they have mapped, and the next one to start has another keeper.

The keeper computes nothing and is no client of MPS, so that a fault of one does not take its memory (`resident_memory`).
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from workers.api import WeightDtype
from workers.device import keeper
from workers.device.capability import PERCENTAGE, PIPE_DIRECTORY
from workers.device.dtypes import FP8_CAPABILITY, MIN_CAPABILITY
from workers.device.gpu import load_to_gpu, open_gpu
from workers.device.keeper import ROOT, Keeping, Membership, Start, Tell
from workers.device.mps import LOG_DIRECTORY
from workers.device.resident_memory import AttachedMemory, ResidentMemory, attach
from workers.errors import ResidentWeightsFailed, SharingUnsupported
from workers.model.prepare import WEIGHTS, PreparedModel

logger = logging.getLogger(__name__)

#: For a single worker that has failed to be there again; also how long memory is not free after the last one has ended.
GRACE_S = 20.0
#: Grows when other bytes are loaded of the same file, or members are told otherwise where they are.
VERSION = 1
#: MPS, and allocators whose memory other processes cannot map: the keeper has torch's own, whatever its workers have.
_NOT_THE_KEEPERS = (
    PIPE_DIRECTORY,
    LOG_DIRECTORY,
    PERCENTAGE,
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)


class ResidentWeights:
    """Weights that a keeper has; made by `map_weights`. num_bytes: of the GPU's memory, that the keeper has for them."""

    def __init__(self, memory: AttachedMemory, membership: Membership) -> None:
        self.tensors: Mapping[str, torch.Tensor] = memory.tensors
        self.num_bytes = memory.num_bytes
        self._memory = memory
        self._membership: Membership | None = membership

    def close(self) -> None:
        """Unmap them, which waits for this process's work on the GPU; what computes with them must be at its end. Twice does nothing."""
        if self._membership is None:
            return
        try:
            self._memory.close()
        except RuntimeError as error:
            # A GPU that failed: they go with the process.
            logger.warning("resident_weights_unmap_failed reason=%s", str(error).splitlines()[0])
        self._membership.leave()
        self._membership = None


def map_weights(
    prepared: PreparedModel,
    dtype: WeightDtype,
    uuid: str,
    progress: Tell,
    *,
    start: Start | None = None,
    open_memory: Callable[[bytes], AttachedMemory] = attach,
    root: Path = ROOT,
) -> ResidentWeights:
    """Those of the model, on the first GPU that this process sees, whose UUID this is; loaded by a keeper unless one has them.

    progress: told how far that is, 0 to 1; may raise to wait no longer. start: of the keeper; loads them when None.
    Raises SharingUnsupported, GpuUnavailable, OutOfMemory, ResidentMemoryGone and ResidentWeightsFailed.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
        raise SharingUnsupported(
            "engine.residentWeights", "a MIG instance, with which it was not tried", "leave it out"
        )
    path = (prepared.folder / WEIGHTS).absolute()
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_THE_KEEPERS}
    keeping = Keeping(start or partial(_load, path, dtype), ResidentWeightsFailed, None, GRACE_S, environment)
    # The name of the folder has the version of what was converted.
    key = "\n".join((uuid, prepared.folder.name, dtype, str(VERSION)))
    name = f"{dtype}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    membership = keeper.join("weights", name, keeping, root=root, on_wait=progress)
    try:
        memory = open_memory(membership.kept)
    except BaseException:
        # As after an error of the GPU, with which its memory has gone: nobody is to wait for the end of its grace.
        membership.give_up()
        raise
    logger.info("resident_weights_mapped folder=%s resident_bytes=%d", membership.folder, memory.num_bytes)
    return ResidentWeights(memory, membership)


def _load(path: Path, dtype: WeightDtype, _folder: Path, tell: Tell) -> tuple[bytes, Callable[[], None]]:
    """In the keeper, which belongs to no worker: all that is free may be theirs. Tells what `attach` takes."""
    needed = FP8_CAPABILITY if dtype is WeightDtype.FP8 else MIN_CAPABILITY
    weights = load_to_gpu(path, open_gpu(needed_capability=needed), dtype, 1.0, tell)
    # What was on its way to fp8.
    torch.cuda.empty_cache()
    kept = [ResidentMemory(weights)]
    weights.clear()

    def end() -> None:
        kept.clear()
        torch.cuda.empty_cache()

    return kept[0].manifest, end
