"""The text model of a worker where it computes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvPool
from workers.model.llama import Llama
from workers.step_shape import DeviceShape

if TYPE_CHECKING:
    from workers.device.sampler import DeviceSampler
    from workers.device.sm_share import SmShares
    from workers.engine.forwarding import Forward
    from workers.tensor_parallel.followers import Followers


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A model in memory, and the KV cache beside it. forward, sampler: see ModelRunner."""

    model: Llama
    pool: KvPool
    kv_cache: torch.Tensor
    layout: KvLayout
    forward: "Forward | None"
    sampler: "DeviceSampler | None"
    shape: DeviceShape
    #: The other ranks of a tensor-parallel group.
    followers: "Followers | None" = None
    #: Layouts of its SMs, for split steps.
    shares: "SmShares | None" = None

    def close(self) -> None:
        """Give back what other processes and the driver have."""
        if self.shares is not None:
            # Whoever has layouts has imported what makes them.
            from workers.device.sm_share import close_shares

            close_shares(self.shares)
        if self.followers is not None:
            self.followers.close()
