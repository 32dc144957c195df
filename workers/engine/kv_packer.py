"""Blocks of a KV cache as bytes in host memory, and back."""

import logging

import google_crc32c
import numpy as np
import torch

from kvtransfer.codecs.codec import Codec, CodecId, PageShape
from phasewise_kernels.block_copy.reference import convert
from workers.api import HostCacheCodec
from workers.engine.host_tier import PackedBlock

logger = logging.getLogger(__name__)


def codec_of(word: HostCacheCodec) -> Codec | None:
    """The codec that a setting names; None when blocks are kept as they are."""
    if word is HostCacheCodec.NONE:
        return None
    from kvtransfer.codecs.codecs import codec  # takes time, and most workers need none

    return codec(CodecId[word.name])


class KvPacker:
    """Packs blocks with a codec, or as they are without one. Used in the engine's thread. Implements `host_tier.Packer`.

    kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], of any dtype of `kvtransfer.layout`, on any
    device; rows in four bits are not packed with a codec.
    """

    def __init__(self, kv_cache: torch.Tensor, codec: Codec | None = None) -> None:
        self._kv_cache = kv_cache
        self._codec = codec
        num_layers, _, _, block_size, num_heads, head_dim = kv_cache.shape
        self._shape = PageShape(num_layers, block_size, num_heads, head_dim)
        if codec is None:
            self._block_bytes = kv_cache.nbytes // kv_cache.shape[2]
        else:
            self._block_bytes = codec.packed_bytes(self._shape)

    @property
    def block_bytes(self) -> int:
        """See Packer."""
        return self._block_bytes

    def pack(self, block_id: int) -> PackedBlock | None:
        """See Packer. None, and logged, for numbers that the codec cannot pack or when memory runs out."""
        try:
            data = np.empty(self._block_bytes, np.uint8)
            if self._codec is None:
                self._as_block(data).copy_(self._kv_cache[:, :, block_id])
            else:
                self._codec.pack(self._kv_cache[:, :, block_id].to("cpu").contiguous(), data.data)
        except (ValueError, MemoryError) as error:
            logger.warning("block_not_packed block_id=%d reason=%s", block_id, error)
            return None
        return PackedBlock(data, google_crc32c.value(data), is_lossy=self._codec is not None)

    def is_whole(self, packed: PackedBlock) -> bool:
        """See Packer. What is not is logged."""
        checksum = google_crc32c.value(packed.data)
        if checksum != packed.checksum:
            logger.error("packed_block_damaged crc32c=%08x expected=%08x", checksum, packed.checksum)
        return bool(checksum == packed.checksum)

    def unpack(self, packed: PackedBlock, block_id: int) -> None:
        """See Packer."""
        if self._codec is None:
            kv = self._as_block(packed.data)
        else:
            # What a codec rounds up may be beyond what float8 holds.
            kv = convert(self._codec.unpack(packed.data.data, self._shape), self._kv_cache.dtype)
        self._kv_cache[:, :, block_id] = kv.to(self._kv_cache.device)

    def _as_block(self, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> torch.Tensor:
        """The same memory as a block of the cache, [num_layers, 2, block_size, num_kv_heads, head_dim]."""
        kv = torch.from_numpy(data).view(self._kv_cache.dtype)
        return kv.view(*self._kv_cache.shape[:2], *self._kv_cache.shape[3:])
