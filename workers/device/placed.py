"""The text model of a worker where it computes."""

from dataclasses import dataclass

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvPool
from workers.device.forward import DeviceForward
from workers.model.llama import Llama
from workers.step_shape import DeviceShape


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A model in memory, and the KV cache beside it. forward: None is the model's own."""

    model: Llama
    pool: KvPool
    kv_cache: torch.Tensor
    layout: KvLayout
    forward: DeviceForward | None
    shape: DeviceShape
