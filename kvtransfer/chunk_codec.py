"""Chunks through a codec. Slow: called in threads."""

from dataclasses import replace

import google_crc32c
import torch

from kvtransfer.codecs.codec import CodecId, PageShape
from kvtransfer.frames import Chunk
from kvtransfer.layout import KvLayout
from kvtransfer.pool import KvSpan
from kvtransfer.pool_tensor import payload_tensor


def pack_chunk(plain: memoryview, span: KvSpan, layout: KvLayout, codec: CodecId) -> tuple[bytes, int]:
    """What travels of a span, and its CRC32C. plain: as `KvPool.read` of a pool that is not in four bits gives it."""
    from kvtransfer.codecs.codecs import codec as codec_of

    shape = PageShape(
        span.layer_hi - span.layer_lo, span.num_tokens, span.head_hi - span.head_lo, layout.head_dim
    )
    kv = payload_tensor(torch.frombuffer(plain, dtype=torch.uint8), span, layout, layout.dtype)
    packer = codec_of(codec)
    packed = bytearray(packer.packed_bytes(shape))
    packer.pack(kv, memoryview(packed))
    message = bytes(packed)
    return message, google_crc32c.value(message)


def unpack_chunk(chunk: Chunk, head_dim: int) -> Chunk:
    """The chunk with its payload unpacked to fp32. Raises ValueError when it is not what was packed."""
    from kvtransfer.codecs.codecs import codec as codec_of

    packed = chunk.payload.tobytes()
    checksum = google_crc32c.value(packed)
    if checksum != chunk.checksum:
        raise ValueError(f"its checksum is {checksum:x}, not {chunk.checksum:x}")
    where = chunk.kv_range
    shape = PageShape(where.num_layers, where.num_tokens, chunk.heads[1] - chunk.heads[0], head_dim)
    unpacked = codec_of(chunk.codec).unpack(memoryview(packed), shape)
    return replace(chunk, payload=unpacked.contiguous().view(torch.uint8).flatten().numpy().data)
