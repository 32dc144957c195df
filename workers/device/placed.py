"""The text model of a worker where it computes."""

from dataclasses import dataclass

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvPool
from workers.device.forward import DeviceForward
from workers.device.sampler import DeviceSampler
from workers.model.llama import Llama
from workers.step_shape import DeviceShape


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A model in memory, and the KV cache beside it. forward, sampler: see ModelRunner."""

    model: Llama
    pool: KvPool
    kv_cache: torch.Tensor
    layout: KvLayout
    forward: DeviceForward | None
    sampler: DeviceSampler | None
    shape: DeviceShape
