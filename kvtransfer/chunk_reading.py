"""The sender's end of chunks: out of the transfer's blocks, some of them announced before they leave."""

import asyncio
from collections.abc import Sequence

from kvtransfer.chunk_codec import pack_chunk
from kvtransfer.codecs.codec import CodecId
from kvtransfer.frames import Announce, Chunk
from kvtransfer.host import KvHost
from kvtransfer.pool import KvSpan, span_bytes, span_of
from kvtransfer.raw_bytes import filled
from kvtransfer.session import SendChunk
from kvtransfer.wire import CHUNK_HEADER_BYTES, chunk_header, encode

#: A smaller chunk has its checksum sooner than it would be heard of.
MIN_ANNOUNCED_BYTES = 2**22


class ChunkReader:
    """Reads the chunks of one transfer. block_ids: its blocks in the order of the sequence."""

    def __init__(self, host: KvHost, block_ids: Sequence[int]) -> None:
        self._host = host
        self._block_ids = block_ids
        #: Numbers of chunks that were announced on this stream.
        self._announced: set[int] = set()

    async def read(self, item: SendChunk) -> tuple[bytes, int]:
        """The message of a chunk, and the checksum of what it carries."""
        pool, span = self._host.pool, self._span_of(item)
        layout = pool.layout
        if item.transport != "grpc":
            chunk = _chunk_of(item, pool.checksum(span, item.transport), span)
            return chunk_header(chunk), chunk.checksum
        num_bytes = span_bytes(span, layout)
        if item.codec is not CodecId.NONE:
            plain = bytearray(num_bytes)
            pool.read(span, memoryview(plain))
            packed, checksum = await asyncio.to_thread(
                pack_chunk, memoryview(plain), span, layout, item.codec
            )
            return chunk_header(_chunk_of(item, checksum)) + packed, checksum
        checksum = 0

        def fill(message: memoryview) -> None:
            nonlocal checksum
            checksum = pool.read(span, message[CHUNK_HEADER_BYTES:])
            message[:CHUNK_HEADER_BYTES] = chunk_header(_chunk_of(item, checksum))

        return filled(CHUNK_HEADER_BYTES + num_bytes, fill), checksum

    def announce(self, items: Sequence[SendChunk]) -> list[bytes]:
        """Messages that let the receiver begin with these chunks, where that is worth it and was not said before."""
        messages = []
        for item in items:
            span = self._span_of(item)
            is_worth_it = span_bytes(span, self._host.pool.layout) >= MIN_ANNOUNCED_BYTES
            if is_worth_it and item.sequence_number not in self._announced:
                self._announced.add(item.sequence_number)
                messages.append(encode(Announce(_chunk_of(item, 0, span))))
        return messages

    def forget_announced(self) -> None:
        """What was announced has to be announced anew: the stream has broken."""
        self._announced.clear()

    def _span_of(self, item: SendChunk) -> KvSpan:
        where = item.kv_range
        return span_of(
            self._block_ids,
            self._host.pool.layout.block_size,
            tokens=(where.token_lo, where.token_hi),
            layers=(where.layer_lo, where.layer_hi),
            heads=item.heads,
        )


def _chunk_of(item: SendChunk, checksum: int, span: KvSpan | None = None) -> Chunk:
    return Chunk(
        item.lease_id,
        item.incarnation,
        item.sequence_number,
        item.kv_range,
        item.heads,
        item.codec,
        checksum,
        source_block_ids=span.block_ids if span is not None else (),
        source_first_token=span.first_token if span is not None else 0,
    )
