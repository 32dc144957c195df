"""The forward pass as a runner calls it, and that of a CPU."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.model.forward_batch import ForwardBatch
from workers.model.llama import Llama


class Forward(Protocol):
    """The forward pass on one device: `DeviceForward` on a GPU, that of the model itself on a CPU."""

    def __call__(
        self,
        batch: ForwardBatch,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
        sources: NDArray[np.int64] | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Llama.forward`. sources: which of `previous` is the token of each row, below 0 where `batch` has it. Returns logits in any floating-point dtype, where they were computed."""
        ...


class HostForward:
    """The model's own forward pass. Implements Forward."""

    def __init__(self, model: Llama, kv_cache: torch.Tensor) -> None:
        self._model = model
        self._kv_cache = kv_cache

    def __call__(
        self,
        batch: ForwardBatch,
        *,
        layer_group_size: int | None = None,
        on_layers: Callable[[int, int], None] | None = None,
        sources: NDArray[np.int64] | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert sources is None, "tokens of a CPU are known"
        assert previous is None
        return self._model.forward(
            batch, self._kv_cache, layer_group_size=layer_group_size, on_layers=on_layers
        )
