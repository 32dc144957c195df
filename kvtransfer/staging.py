"""Between a paged KV cache in CPU memory and the contiguous bytes of a chunk. The only torch import here.

The copies are numpy's over the tensor's own memory: as fast as index_select and index_copy_ for blocks
of this size, and numpy takes a read-only payload as it is, which torch does not without another copy.
"""

from collections.abc import Sequence

import numpy as np
import torch


class CacheBytes:
    """A KV cache seen as bytes.

    kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], fp32, bf16 or fp16, CPU,
    contiguous; K is [:, 0], V is [:, 1]. Its memory is shared, not copied.
    """

    def __init__(self, kv_cache: torch.Tensor) -> None:
        assert kv_cache.ndim == 6, kv_cache.shape
        assert kv_cache.shape[1] == 2, kv_cache.shape
        assert kv_cache.device.type == "cpu", kv_cache.device
        assert kv_cache.is_contiguous()
        # [num_layers, 2, num_blocks, bytes of K or of V in one block of one layer]
        self._bytes = kv_cache.view(torch.uint8).flatten(3).numpy()

    def read(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int) -> memoryview:
        """A copy of these layers of these blocks, ordered [layer, K then V, block, byte]."""
        ids = np.asarray(block_ids, np.intp)
        return self._bytes[layer_lo:layer_hi].take(ids, axis=2).reshape(-1).data

    def write(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int, payload: memoryview) -> None:
        """The reverse of `read`. Raises ValueError when the payload has another size."""
        layers = self._bytes[layer_lo:layer_hi]
        ids = np.asarray(block_ids, np.intp)
        shape = (*layers.shape[:2], len(ids), layers.shape[3])
        layers[:, :, ids] = np.frombuffer(payload, np.uint8).reshape(shape)
